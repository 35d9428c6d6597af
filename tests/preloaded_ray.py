"""What of Ray a process imports before others are forked from it."""

import ray.train.torch  # noqa: F401

import pipeline.launch
import pipeline.transfer.sweep  # noqa: F401
