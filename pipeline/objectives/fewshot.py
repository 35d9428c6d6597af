"""Few-shot learning in closed form: a ridge regression from a frozen model's features to classes.

Dosovitskiy et al. 2021, section 4.1: regularised least squares to targets of -1 and 1 for each class. What the paper
leaves open is as in its authors' code (big_vision, `evaluators/fewshot_lsr.py`): features are standardised by the
shots, a constant feature of 100 stands for the bias, which is penalised like all others, and the penalty is 1024. Their
older code instead takes for each data set the penalty that ranks best on all others (`leave_self_out`).

Legend: n pictures, d features, c classes, m labels a picture at the most, p penalties; all in float64.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.objectives.classify import correct
from pipeline.seed import permutation

PENALTY = 1024.0
BIAS = 100.0
EPSILON = 1e-5


class Head(NamedTuple):
    """What makes scores of features."""

    mean: Tensor
    """(d)."""
    deviation: Tensor
    """(d)."""
    weights: Tensor
    """(d + 1, c), the last row for the constant feature."""

    def scores(self, features: Tensor) -> Tensor:
        """(n, d) to (n, c)."""
        return _prepared(features, self.mean, self.deviation) @ self.weights


def ridge(features: Tensor, labels: Tensor, classes: int, penalty: float = PENALTY) -> Head:
    """The head that fits features (n, d) to labels (n), with the smallest squared error plus penalty."""
    return ridges(features, labels, classes, [penalty])[0]


def ridges(features: Tensor, labels: Tensor, classes: int, penalties: Sequence[float]) -> list[Head]:
    """A head for each penalty, all from one decomposition.

    With X the prepared features, (X'X + penalty)^-1 X'Y, or where there are fewer pictures than features the equal
    X'(XX' + penalty)^-1 Y. ValueError where there is no picture, a label beyond the classes, or a penalty of 0.
    """
    if not len(features) or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"{len(features)} pictures do not teach {classes} classes; each needs a label below that")
    if min(penalties) <= 0:
        raise ValueError(f"a penalty of {min(penalties):g}: it is more than 0, since shots alone decide too little")
    features = features.double()
    mean, deviation = features.mean(0), features.std(0, correction=0)
    x = _prepared(features, mean, deviation)  # n d+1
    y = torch.full((len(x), classes), -1.0, dtype=torch.float64, device=x.device)
    y[torch.arange(len(x), device=x.device), labels.to(x.device)] = 1.0
    wide = len(x) < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    turned = vectors.T @ (y if wide else x.T @ y)
    solved = [vectors @ (turned / (values.clamp(min=0) + penalty)[:, None]) for penalty in penalties]
    return [Head(mean, deviation, x.T @ one if wide else one) for one in solved]


def _prepared(features: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(n, d) to (n, d + 1): standardised, and the constant."""
    x = (features.to(mean.device, torch.float64) - mean) / (deviation + EPSILON)
    return torch.cat([x, x.new_full((len(x), 1), BIAS)], 1)


def right(head: Head, features: Tensor, labels: Tensor) -> Tensor:
    """(n): whether the class with the highest score is the label (n), or one of the labels (n, m) with -1 for none."""
    labels = labels[:, None] if labels.ndim == 1 else labels
    scores = head.scores(features)
    return correct(scores, labels.to(scores.device))


def accuracy(head: Head, features: Tensor, labels: Tensor) -> float:
    """The share of pictures that are right."""
    return right(head, features, labels).double().mean().item()


def probe(
    features: Tensor,
    labels: Tensor,
    features_test: Tensor,
    labels_test: Tensor,
    classes: int,
    penalty: float = PENALTY,
) -> float:
    """The accuracy on test features (n, d) of what the shots' features (k, d) teach."""
    return accuracy(ridge(features, labels, classes, penalty), features_test, labels_test)


def shots(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Which pictures, of labels (n), to learn from: `count` of each class, or all it has, in an order drawn by seed.

    Fewer shots of the same seed are among more of them.
    """
    order = permutation(len(labels), "shots", seed)
    found = labels[order]
    chosen = [order[found == one][:count] for one in np.unique(labels).tolist()]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def leave_self_out(accuracies: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """For each data set, which penalty has the best mean rank in all the others; the first of equals.

    `accuracies` of the same penalties in each; equal ones share the mean of their ranks. ValueError for fewer than two
    data sets, since nothing can be chosen by others then.
    """
    if len(accuracies) < 2 or len({len(row) for row in accuracies.values()}) != 1:
        raise ValueError(
            f"a penalty is chosen by the other data sets, and there are {len(accuracies)}: name two or more, with the "
            "same penalties, or take the fixed penalty"
        )
    ranks = {name: _ranks(np.array(row)) for name, row in accuracies.items()}
    total = sum(ranks.values())
    return {name: int(np.argmin(total - own)) for name, own in ranks.items()}


def _ranks(row: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 for the highest; those that are equal share the mean. In halves, so that sums of them are exact."""
    higher = (row[None, :] > row[:, None]).sum(1)
    equal = (row[None, :] == row[:, None]).sum(1)
    return higher + (equal - 1) / 2
