"""Losses of classification.

Legend: b batch, m labels a picture at the most, c classes.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

HEAD_BIAS = -10.0
"""Of a head trained with the sigmoid objective: no class is likely at first (the paper's code, on ImageNet-21k)."""


def loss(
    logits: Tensor,
    targets: Tensor,
    objective: Literal["sigmoid", "softmax"],
    smoothing: float,
    weights: Tensor | None = None,
) -> Tensor:
    """The mean loss of a batch of `logits` (b, c).

    `targets` are either labels, integers (b, m) with -1 where a picture has fewer than m, or the share of each class,
    floats (b, c), as mixed pictures have them. `weights` (b) multiply each picture's loss; the sum is divided by b
    all the same, so that a picture of weight 0 is as if it had no gradient, and micro-batches add up.

    Sigmoid: cross-entropy of each class for itself, summed over classes, with targets 1 - smoothing and smoothing.
    Softmax: cross-entropy against shares that sum to 1 - smoothing, with smoothing spread over all classes; 0 for a
    picture that has no label. Both smooth what is linear: as if before the pictures were mixed.
    """
    each = _losses(logits.float(), targets, objective, smoothing)
    return (each if weights is None else each * weights).mean()


def _losses(logits: Tensor, targets: Tensor, objective: Literal["sigmoid", "softmax"], smoothing: float) -> Tensor:
    """(b): the loss of each picture."""
    labelled = not targets.is_floating_point()
    if labelled and objective == "softmax" and targets.shape[1] == 1:
        return cross_entropy(logits, targets[:, 0], label_smoothing=smoothing, ignore_index=-1, reduction="none")
    shares = multi_hot(targets, logits.shape[1]) if labelled else targets
    if objective == "sigmoid":
        smooth = shares * (1 - 2 * smoothing) + smoothing
        return binary_cross_entropy_with_logits(logits, smooth, reduction="none").sum(1)
    total = shares.sum(1, keepdim=True)
    there = total > 0
    each = cross_entropy(logits, shares / total.where(there, 1), label_smoothing=smoothing, reduction="none")
    return each * there[:, 0]


def multi_hot(labels: Tensor, classes: int) -> Tensor:
    """(b, m) with -1 for none to (b, c) of ones and zeros."""
    hot = torch.zeros(len(labels), classes + 1, device=labels.device)
    return hot.scatter_(1, labels.where(labels >= 0, classes), 1.0)[:, :classes]


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(b): whether the likeliest class is one of the picture's labels."""
    return (logits.argmax(1, keepdim=True) == labels).any(1)
