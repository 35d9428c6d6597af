"""Chance as a function of words: the same words give the same numbers, in any process, on any machine.

Nothing here has a state. `number` turns words into a key; `bits` and `uniform` are a counter-based generator
(the output function of SplitMix64, Steele, Lea and Flood, OOPSLA 2014), written out so that neither a release of
numpy nor one of torch can change the order of a corpus.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def number(*words: object) -> int:
    """63 bits that depend on every word and on their order.

    Words are joined by a character that does not occur in them: ("a", "b") and ("ab",) differ.
    """
    text = "\x1f".join(str(word) for word in words)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def bits(key: ArrayLike, counter: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each pair of `key` and `counter`, broadcast against each other."""
    state = np.asarray(key, np.uint64) + (np.asarray(counter, np.uint64) + np.uint64(1)) * _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))


def uniform(key: ArrayLike, counter: ArrayLike) -> NDArray[np.float64]:
    """A number in [0, 1) with 53 random bits for each pair of `key` and `counter`."""
    return (bits(key, counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *words: object) -> NDArray[np.int64]:
    """The numbers below `count` in an order that the words decide."""
    return np.argsort(bits(number(*words), np.arange(count, dtype=np.uint64)), kind="stable")
