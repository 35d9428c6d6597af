"""What a process imports, and does once, before others are forked from it; nothing of Ray (tests/preloaded_ray.py)."""

import tempfile

import altair  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch
import torch._dynamo  # the first step of an optimizer would import it

import pipeline.train.run
import pipeline.transfer.finetune  # noqa: F401
from pipeline.track import log
from pipeline.train.engine import library

torch.set_num_threads(1)
library(torch.device("cpu"))
with tempfile.TemporaryDirectory(prefix="vitscale-") as folder:  # MLflow takes seconds for its first store
    log.begin(f"sqlite:///{folder}/mlflow.db", "first", {"vitscale.run": "first"}, {}, same="vitscale.run")
