"""Chance as a function of words: the same words give the same numbers, in any process, on any machine.

Nothing here has a state, and neither a release of numpy nor one of torch can change what it gives.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.chance import mixed, number


def uniform(key: ArrayLike, counter: ArrayLike) -> NDArray[np.float64]:
    """A number in [0, 1) with 53 random bits for each pair of `key` and `counter`."""
    return (mixed(key, counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *words: object) -> NDArray[np.int64]:
    """The numbers below `count` in an order that the words decide."""
    return np.argsort(mixed(number(*words), np.arange(count, dtype=np.uint64)), kind="stable")


__all__ = ["mixed", "number", "permutation", "uniform"]
