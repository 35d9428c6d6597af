"""Chance as a function of words: the same words give the same numbers, in any process, on any machine.

Nothing here has a state, and neither a release of numpy nor one of torch can change what it gives.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.chance import mixed, number

_TURNS = 4


def keys(purpose: str, seed: int, epoch: NDArray[np.int64], sample: NDArray[np.int64]) -> NDArray[np.uint64]:
    """What decides each picture's chance for a purpose: a key for each of n epochs and samples, by itself alone."""
    epochs, which = np.unique(epoch, return_inverse=True)
    base = np.array([number(purpose, seed, one) for one in epochs.tolist()], np.uint64)
    return base[which] ^ sample.astype(np.uint64)


def uniform(key: ArrayLike, counter: ArrayLike) -> NDArray[np.float64]:
    """A number in [0, 1) with 53 random bits for each pair of `key` and `counter`."""
    return (mixed(key, counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *words: object) -> NDArray[np.int64]:
    """The numbers below `count` in an order that the words decide."""
    return np.argsort(mixed(number(*words), np.arange(count, dtype=np.uint64)), kind="stable")


def shuffled(place: NDArray[np.int64], size: NDArray[np.int64], key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where the thing at each `place` of a list of `size` things goes, in an order that `key` decides.

    A permutation for each pair of size and key, worked out place by place: a Feistel network (Luby and Rackoff 1988)
    on the numbers below a x b, which is hardly more than `size`, walked until it lands below it (Black and Rogaway
    2002). So no list is ever drawn, however long.
    """
    rows = np.ceil(np.sqrt(size)).astype(np.int64)
    columns = -(-size // rows)
    found = np.empty_like(place)
    left_over, at = np.arange(len(place)), place
    while len(left_over):
        at = _round_trip(at, rows[left_over], columns[left_over], key[left_over])
        within = at < size[left_over]
        found[left_over[within]] = at[within]
        left_over, at = left_over[~within], at[~within]
    return found


def _round_trip(
    at: NDArray[np.int64], rows: NDArray[np.int64], columns: NDArray[np.int64], key: NDArray[np.uint64]
) -> NDArray[np.int64]:
    row, column = at // columns, at % columns
    for turn in range(_TURNS):
        row = (row + (mixed(key + np.uint64(2 * turn), column) >> np.uint64(2)).astype(np.int64)) % rows
        column = (column + (mixed(key + np.uint64(2 * turn + 1), row) >> np.uint64(2)).astype(np.int64)) % columns
    return row * columns + column


__all__ = ["keys", "mixed", "number", "permutation", "shuffled", "uniform"]
