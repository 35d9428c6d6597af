"""Chance as a function of words, without a state and without a table.

`permuted` is a permutation that is worked out place by place, so that one shard of a corpus of any size is drawn
without drawing the others.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def number(*words: object) -> int:
    """63 bits that depend on every word and on their order.

    Words are joined by a character that does not occur in them: ("a", "b") and ("ab",) differ.
    """
    text = "\x1f".join(str(word) for word in words)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def mixed(key: ArrayLike, counter: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each pair of `key` and `counter`, broadcast against each other.

    The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), written out here because the order of a
    corpus must not change with a release of a library.
    """
    state = np.asarray(key, np.uint64) + (np.asarray(counter, np.uint64) + np.uint64(1)) * _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def permuted(places: ArrayLike, count: int, *words: object) -> NDArray[np.int64]:
    """What stands at `places` when the numbers below `count` are put in an order that the words decide.

    A Feistel network (Luby and Rackoff 1988) over the next power of 4, walked until it lands below `count`
    (Black and Rogaway 2002): every number stands at exactly one place, and no other place has to be worked out.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    found = np.atleast_1d(np.asarray(places, np.uint64))
    if found.size and int(found.max()) >= count:
        raise ValueError(f"place {int(found.max())} is not below {count}")
    outside = np.ones(found.shape, bool)
    while outside.any():
        found = np.where(outside, _feistel(found, half, words), found)
        outside = found >= count
    return found.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, words: tuple[object, ...]) -> NDArray[np.uint64]:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for turn in range(_ROUNDS):
        left, right = right, left ^ (mixed(number(*words, turn), right) & mask)
    return (left << shift) | right
