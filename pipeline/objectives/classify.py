"""Losses of classification.

Legend: b batch, m labels a picture at the most, c classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

HEAD_BIAS = -10.0
"""Of a head trained with the sigmoid objective: no class is likely at first (the paper's code, on ImageNet-21k)."""


def loss(logits: Tensor, labels: Tensor, objective: Literal["sigmoid", "softmax"], smoothing: float) -> Tensor:
    """The mean loss of a batch: `logits` (b, c), `labels` (b, m) with -1 where a picture has fewer than m.

    Sigmoid: cross-entropy of each class for itself, summed over classes, with targets 1 - smoothing and smoothing.
    Softmax: cross-entropy against labels that share 1 - smoothing, with smoothing spread over all classes.
    """
    logits = logits.float()
    if objective == "sigmoid":
        targets = multi_hot(labels, logits.shape[1]) * (1 - 2 * smoothing) + smoothing
        return binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
    if labels.shape[1] == 1:
        return cross_entropy(logits, labels[:, 0], label_smoothing=smoothing)
    targets = multi_hot(labels, logits.shape[1])
    return cross_entropy(logits, targets / targets.sum(1, keepdim=True), label_smoothing=smoothing)


def multi_hot(labels: Tensor, classes: int) -> Tensor:
    """(b, m) with -1 for none to (b, c) of ones and zeros."""
    hot = torch.zeros(len(labels), classes + 1, device=labels.device)
    return hot.scatter_(1, labels.where(labels >= 0, classes), 1.0)[:, :classes]


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(b): whether the likeliest class is one of the picture's labels."""
    return (logits.argmax(1, keepdim=True) == labels).any(1)
