"""Compute against accuracy: the Pareto front, and the law that it follows.

Arithmetic only; compute is in exaFLOPs, accuracy and error are shares of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POINTS = 5
"""Fewest distinct points for a law: it has three numbers, and its spread needs points to spare."""

_RESAMPLES = 200
_STEEPEST = 3.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """error = floor + scale · compute^-power, each with a 95 % interval."""

    floor: float
    scale: float
    power: float
    floor_between: tuple[float, float]
    scale_between: tuple[float, float]
    power_between: tuple[float, float]
    points: int

    def error(self, compute: float) -> float:
        """The error expected after so many exaFLOPs."""
        return self.floor + self.scale * compute**-self.power


def front(compute: Sequence[float], accuracy: Sequence[float]) -> list[int]:
    """Which points are not dominated, in order of compute.

    A point is dominated where another took no more compute and is no less accurate, and is better in one of the two.
    Equal points do not dominate each other.
    """
    order = sorted(range(len(compute)), key=lambda i: (compute[i], -accuracy[i]))
    kept: list[int] = []
    for i in order:
        best = kept[-1] if kept else None
        if best is None or accuracy[i] > accuracy[best] or (compute[i], accuracy[i]) == (compute[best], accuracy[best]):
            kept.append(i)
    return kept


def missing(compute: Sequence[float], accuracy: Sequence[float]) -> int:
    """How many more distinct points a law would need."""
    return max(0, POINTS - len(_usable(compute, accuracy)))


def law(compute: Sequence[float], accuracy: Sequence[float]) -> Law:
    """The saturating power law through the points, by least squares of the logarithm of the error.

    error = E + A·C^-b is the law of Zhai et al. 2022, "Scaling Vision Transformers", section 2.1 (figure 2), without
    its shift of C for the smallest models; Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models",
    section 3.3, fit the same form, in logarithms too. E lies between zero and the smallest error seen, b between
    zero and three. The intervals are the middle 95 % of refits to the curve plus resampled residuals, enlarged by
    the degrees of freedom that the fit used up. ValueError where points are missing.
    """
    if lacking := missing(compute, accuracy):
        raise ValueError(f"a law needs at least {POINTS} distinct points; {lacking} are missing")
    pairs = np.array(_usable(compute, accuracy))
    # Compute in units of its geometric mean, so that scale and power hardly depend on each other.
    unit = float(np.exp(np.log(pairs[:, 0]).mean()))
    x, y = np.log(pairs[:, 0] / unit), np.log(1 - pairs[:, 1])
    best = min(
        (_fit(x, y, start) for start in _starts(y)), key=lambda fitted: float(np.sum((_curve(fitted, x) - y) ** 2))
    )
    spread = np.array([_at_one(fitted, unit) for fitted in _refits(x, y, best)])
    low, high = np.percentile(spread, [2.5, 97.5], axis=0)
    floor, scale, power = _at_one(best, unit)
    between = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return Law(floor, scale, power, between[0], between[1], between[2], len(pairs))


def _usable(compute: Sequence[float], accuracy: Sequence[float]) -> list[tuple[float, float]]:
    return sorted({(c, a) for c, a in zip(compute, accuracy, strict=True) if c > 0 and a < 1})


def _curve(fitted: Floats, x: Floats) -> Floats:
    floor, scale, power = fitted
    return np.log(floor + np.exp(scale - power * x))


def _fit(x: Floats, y: Floats, start: Floats) -> Floats:
    from scipy.optimize import least_squares

    highest = float(np.exp(y.min()))
    bounds = ([0.0, -np.inf, 0.0], [highest, np.inf, _STEEPEST])
    return least_squares(lambda fitted: _curve(fitted, x) - y, np.clip(start, *bounds), bounds=bounds).x


def _starts(y: Floats) -> list[Floats]:
    least = float(np.exp(y.min()))
    return [
        np.array([share * least, np.log(np.exp(y.mean()) - share * least), power])
        for share in (0.1, 0.5, 0.9)
        for power in (0.1, 0.5)
    ]


def _refits(x: Floats, y: Floats, best: Floats) -> list[Floats]:
    expected = _curve(best, x)
    residuals = (y - expected) * np.sqrt(len(x) / max(1, len(x) - len(best)))
    # A fixed seed: the same runs give the same report.
    chance = np.random.default_rng(0)
    return [_fit(x, expected + chance.choice(residuals, len(x)), best) for _ in range(_RESAMPLES)]


def _at_one(fitted: Floats, unit: float) -> tuple[float, float, float]:
    """Floor, scale at one exaFLOP, power."""
    floor, scale, power = (float(number) for number in fitted)
    return floor, float(np.exp(scale + power * np.log(unit))), power
