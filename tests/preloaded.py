"""What the process imports, and does once, from which those of a test are forked (tests/gang.py)."""

import tempfile

import torch

import pipeline.train.run  # noqa: F401
from pipeline.track import log
from pipeline.train.engine import library

torch.set_num_threads(1)
library(torch.device("cpu"))
with tempfile.TemporaryDirectory(prefix="vitscale-") as folder:  # MLflow takes seconds for its first store
    log.begin(f"sqlite:///{folder}/mlflow.db", "first", {"vitscale.run": "first"}, {}, same="vitscale.run")
