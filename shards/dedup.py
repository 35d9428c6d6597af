"""Copies among millions of pictures, within a corpus and between it and test sets: found, verified, decided upon.

Candidates come from hashes by multi-index hashing (Norouzi, Punjani and Fleet 2012, "Fast Search in Hamming Space with
Multi-Index Hashing", section 3): of two hashes that differ in few bits, one of three bands differs in very few, so that
a table for each band, asked for all values so near, meets every such pair and hardly any other. A candidate counts when
the two thumbnails, laid over each other as well as they can be, agree everywhere. How much of what is found, what is
taken for a copy and is none, and what the search costs, is measured by `benchmarks/dedup.py`; the figures, by which the
constants below were chosen, are in `benchmarks/RESULTS.md`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from shards.fingerprint import SIDE, VIEWS, hashed, mirrored, unpacked

RADIUS = 8
"""Bits in which a view of one picture and the whole of another may differ, where one is of a test set."""

CLOSE = 4
"""Bits in which two whole pictures of a corpus may differ, mirrored or not."""

THRESHOLD = 0.95
"""The score from which two pictures are copies."""

PAIRS = pa.schema(
    [
        ("number", pa.int64()),  # of a picture of the corpus
        ("of", pa.int64()),  # of the picture that it may be a copy of
        ("distance", pa.int16()),  # in bits, of the nearest hashes
        ("exact", pa.bool_()),  # whether the digests are equal
    ]
)

SCORED = PAIRS.append(pa.field("score", pa.float32()))

DECISIONS = pa.schema(
    [
        ("number", pa.int64()),  # of the picture that leaves the corpus
        ("reason", pa.string()),  # one of the three below
        ("of", pa.int64()),  # of the picture that stays, or of the one in the test set
        ("test_set", pa.string()),  # null where the other is of the corpus
        ("distance", pa.int16()),  # of the link for which it leaves
        ("score", pa.float32()),
        ("into", pa.int64()),  # of the picture that takes its labels over, null where none does
    ]
)

EXACT, NEAR, TESTED = "exact duplicate of", "near duplicate of", "in test set"

Numbers = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Thumbnail = NDArray[np.uint8]

_BANDS = (0, 21, 42)
_WIDEST = 21
_AT_ONCE = 1 << 20
_BLOCK = 1 << 18


class Index:
    """Hashes (n,) that can be searched; those that are 0 are of flat pictures and never found.

    Takes about 40 bytes a hash.
    """

    def __init__(self, hashes: Hashes) -> None:
        kept = np.flatnonzero(hashes)
        self._bits = min(_WIDEST, max(4, len(kept).bit_length()))
        self._bands = [_Band(hashes, kept, start, self._bits) for start in _BANDS]
        self._size = max(1, len(hashes))

    def near(self, queries: Hashes, radius: int) -> tuple[Numbers, Numbers, NDArray[np.int16]]:
        """Numbers of queries and of hashes, and distance in bits, of every pair within `radius`, in order.

        The time grows with the queries and, for evenly spread hashes, with the pairs that share a band's value. The
        memory is bounded but for what is found.
        """
        asked = np.flatnonzero(queries)
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int16))]
        for band, reach in zip(self._bands, _reaches(radius), strict=True):
            masks = _masks(self._bits, reach)
            step = max(1, _AT_ONCE // max(1, len(masks)))
            for start in range(0, len(asked) if len(masks) else 0, step):
                found += band.near(queries, asked[start : start + step], masks, radius)
        query, number, distance = (np.concatenate(column) for column in zip(*found, strict=True))
        _, first = np.unique(query * self._size + number, return_index=True)
        return query[first], number[first], distance[first]


class _Band:
    """The hashes in the order of some of their bits, and where each value of these begins."""

    def __init__(self, hashes: Hashes, kept: Numbers, start: int, bits: int) -> None:
        self.start, self.mask = np.uint64(start), np.uint64((1 << bits) - 1)
        # Value and number in one word: sorting words is several times faster than sorting numbers by value.
        words = np.sort((self.values(hashes[kept]) << np.uint64(40)) | kept.astype(np.uint64))
        self.numbers = (words & np.uint64((1 << 40) - 1)).astype(np.int64)
        self.hashes = hashes[self.numbers]
        counts = np.bincount((words >> np.uint64(40)).astype(np.int64), minlength=1 << bits)
        self.starts = np.concatenate([[0], np.cumsum(counts)])

    def values(self, hashes: Hashes) -> Hashes:
        return (hashes >> self.start) & self.mask

    def near(
        self, queries: Hashes, asked: Numbers, masks: Hashes, radius: int
    ) -> Iterator[tuple[Numbers, Numbers, NDArray[np.int16]]]:
        probes = (self.values(queries[asked])[:, None] ^ masks).reshape(-1).astype(np.int64)
        starts = self.starts[probes]
        counts = self.starts[probes + 1] - starts
        hit = np.flatnonzero(counts)
        starts, counts, asking = starts[hit], counts[hit], asked[hit // len(masks)]
        ends = np.cumsum(counts)
        edges = np.unique(np.searchsorted(ends, np.arange(0, ends[-1] if len(ends) else 0, _AT_ONCE))).tolist()
        for low, high in zip(edges, [*edges[1:], len(hit)], strict=False):
            count = counts[low:high]
            before = ends[low:high] - count
            places = np.arange(before[0], ends[high - 1]) + np.repeat(starts[low:high] - before, count)
            query = np.repeat(asking[low:high], count)
            distance = np.bitwise_count(self.hashes[places] ^ queries[query])
            near = np.flatnonzero(distance <= radius)
            yield query[near], self.numbers[places[near]], distance[near].astype(np.int16)


def _reaches(radius: int) -> list[int]:
    """How far to look in each band; the reaches, each plus one, add up to the radius plus one, which misses none."""
    each, rest = divmod(radius + 1, len(_BANDS))
    return [each + (band < rest) - 1 for band in range(len(_BANDS))]


def _masks(bits: int, reach: int) -> Hashes:
    """All words of so many bits with at most `reach` ones."""
    ones = (places for count in range(min(reach, bits) + 1) for places in combinations(range(bits), count))
    return np.array([sum(1 << place for place in places) for places in ones], np.uint64)


@dataclass(frozen=True)
class Held:
    """A test set made ready, so that a corpus can be held against it piece by piece."""

    digests: NDArray[np.bytes_]
    wholes: Hashes
    """(2 n,): of all pictures, then of their mirror images."""
    views: Index
    """Of n * v views."""


def hold(test: pa.Table) -> Held:
    """From the `PRINTS` of a test set; takes about 1 kB a picture."""
    found = unpacked(test)
    whole = found[:, 0]
    return Held(digests(test), np.concatenate([whole, mirrored(whole)]), Index(found.reshape(-1)))


def against(test: Held | pa.Table, corpus: pa.Table, radius: int = RADIUS, first: int = 0) -> pa.Table:
    """The candidates, `PAIRS`, of a piece of a corpus (`PRINTS`, whose first picture has the number `first`).

    Every pair is there of which some view of the one, mirrored or not, is within `radius` bits of the whole of the
    other, or whose digests are equal; once, in the order of (number, of).
    """
    held = test if isinstance(test, Held) else hold(test)
    found, tests = unpacked(corpus), max(1, len(held.digests))
    whole, count = found[:, 0], max(1, corpus.num_rows)
    query, view, distance = Index(found.reshape(-1)).near(held.wholes, radius)
    parts = [_pairs(view // VIEWS, query % tests, distance)]
    query, view, distance = held.views.near(np.concatenate([whole, mirrored(whole)]), radius)
    parts.append(_pairs(query % count, view // VIEWS, distance))
    number, of = _equal(digests(corpus), held.digests)
    parts.append(_pairs(number, of, np.zeros(len(number)), exact=True))
    return _nearest(parts, first)


def within(corpus: pa.Table, radius: int = CLOSE) -> pa.Table:
    """The candidates, `PAIRS`, of a corpus (`PRINTS`) within itself; `of` is the lower number.

    A picture whose digest was seen before has one pair, with the first that has it, and no other. Of the rest, each
    hash that was seen before has a pair with the first and one with the last before it that has the same, and each two
    different hashes within `radius` bits, mirrored or not, have a pair of the first pictures of each: so that the
    groups are those of all pairs, while a picture that is there a million times costs no million squared. Of the
    hashes only those of the wholes are looked at: the table may be what `fingerprint.wholes` makes of it.
    """
    _, first, group = np.unique(digests(corpus), return_index=True, return_inverse=True)
    later = np.flatnonzero(first[group] != np.arange(corpus.num_rows))
    parts = [_pairs(later, first[group[later]], np.zeros(len(later)), exact=True)]
    kept = np.sort(first)
    whole = unpacked(corpus, 1)[kept, 0]
    kept, whole = kept[whole != 0], whole[whole != 0]
    different, number, group = np.unique(whole, return_index=True, return_inverse=True)
    parts += _same_hash(kept, number, group)
    index = Index(different)
    for seen, start in product((different, mirrored(different)), range(0, len(different), _BLOCK)):
        one, other, distance = index.near(seen[start : start + _BLOCK], radius)
        once = one + start < other  # whatever is near is near in both directions
        pair = np.stack([kept[number[one[once] + start]], kept[number[other[once]]]])
        parts.append(_pairs(pair.max(0), pair.min(0), distance[once]))
    return _nearest(parts)


def _same_hash(kept: Numbers, number: Numbers, group: Numbers) -> list[pa.Table]:
    order = np.argsort(group, kind="stable")
    again = np.flatnonzero(group[order][1:] == group[order][:-1])
    later, before = order[again + 1], order[again]
    zeros = np.zeros(len(later))
    return [_pairs(kept[later], kept[before], zeros), _pairs(kept[later], kept[number[group[later]]], zeros)]


def digests(prints: pa.Table) -> NDArray[np.bytes_]:
    """The digests of a table of `PRINTS`."""
    parts = [np.zeros(0, "S16")]
    for chunk in prints["digest"].chunks:
        if len(chunk):
            parts.append(np.frombuffer(chunk.buffers()[1], "S16", len(chunk), 16 * chunk.offset))
    return np.concatenate(parts)


def _equal(left: NDArray[np.bytes_], right: NDArray[np.bytes_]) -> tuple[Numbers, Numbers]:
    """Numbers on both sides of all pairs that are equal."""
    order = np.argsort(right, kind="stable")
    low, high = (np.searchsorted(right[order], left, side) for side in ("left", "right"))
    count = high - low
    places = np.arange(count.sum()) + np.repeat(low - (np.cumsum(count) - count), count)
    return np.repeat(np.arange(len(left)), count), order[places]


def _pairs(number: Numbers, of: Numbers, distance: NDArray[Any], exact: bool = False) -> pa.Table:
    columns = (number.astype(np.int64), of.astype(np.int64), distance.astype(np.int16), np.full(len(number), exact))
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=PAIRS)


def _nearest(parts: list[pa.Table], first: int = 0) -> pa.Table:
    """Each pair once, with its least distance."""
    every = pa.concat_tables(parts)
    number, of, distance, exact = (every[name].to_numpy() for name in PAIRS.names)
    order = np.lexsort((distance, ~exact, of, number))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(number[order]) != 0) | (np.diff(of[order]) != 0)
    chosen = order[new]
    columns = number[chosen] + first, of[chosen], distance[chosen], exact[chosen]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=PAIRS)


# verification

_BLUR, _NEIGHBOURHOOD = 1.5, 12
_SIZES, _LEAST, _EDGE = (58, 61, 64), 56, 1
_UNLIKE = 0.7


def same(one: Thumbnail, other: Thumbnail) -> float:
    """How far two thumbnails (p, p) show the same picture: at most 1, and that for equal ones.

    One of them, mirrored or not, is laid over the other, at the size and place at which they correlate best, down to
    seven eighths of each side. The score is one less half the mean squared difference of what lies over each other, in
    standard deviations, in the neighbourhood where that is greatest: the correlation coefficient, if everything
    differed as much. So a picture in which one thing has moved scores far lower than it correlates.
    """
    return float(scores(one[None], other[None])[0])


def scores(ones: Thumbnail, others: Thumbnail) -> NDArray[np.float32]:
    """`same` of each of n pairs of thumbnails, (n, p, p) each: (n,)."""
    if not len(ones):
        return np.zeros(0, np.float32)
    turned = _turned(hashed(ones), hashed(others))
    pairs = zip(ones.astype(np.float32), others.astype(np.float32), turned, strict=True)
    return np.array([_score(one[:, ::-1] if turn else one, other) for one, other, turn in pairs], np.float32)


def _turned(ones: Hashes, others: Hashes) -> NDArray[np.bool_]:
    """(n,): whether the mirror image of one is nearer to the other than itself."""
    plain, turned = (
        np.minimum(np.bitwise_count(a ^ others[:, :1]).min(1), np.bitwise_count(a[:, :1] ^ others).min(1))
        for a in (ones, mirrored(ones))
    )
    return turned < plain


def _score(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    found = max((_aligned(part, whole), side) for side, (part, whole) in enumerate(((one, other), (other, one))))
    (_, height, width, top, left), side = found
    part, whole = (one, other) if side == 0 else (other, one)
    small = _inside(_sized(part, height, width))
    below = _inside(whole[top : top + height - 2 * _EDGE, left : left + width - 2 * _EDGE])
    box = (_NEIGHBOURHOOD, _NEIGHBOURHOOD)
    squares = np.square(_standard(small) - _standard(below))
    return float(1 - cv2.blur(squares, box, borderType=cv2.BORDER_REFLECT).max() / 2)


def _sized(part: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Scaled, and without its edge, into which a caption strip bleeds when a picture becomes a thumbnail."""
    return _inside(np.asarray(cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA), np.float32))


def _inside(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return pixels[_EDGE:-_EDGE, _EDGE:-_EDGE]


def _standard(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Blurred, so that fractions of a pixel and the artefacts of compression count for little."""
    soft = cv2.GaussianBlur(np.ascontiguousarray(pixels), (0, 0), _BLUR)
    return (soft - soft.mean()) / max(float(soft.std()), 1e-3)


Alignment = tuple[float, int, int, int, int]


def _aligned(part: NDArray[np.float32], whole: NDArray[np.float32]) -> Alignment:
    """Correlation, size with the edge, and where the inside lies in `whole`, of the best place of `part`."""
    tried = {size: _laid(part, whole, *size) for size in product(_SIZES, repeat=2)}
    best = max(tried.values())
    while best[0] > _UNLIKE:
        around = product(*(range(max(size - 1, _LEAST), min(size + 1, SIDE) + 1) for size in best[1:3]))
        tried |= {size: _laid(part, whole, *size) for size in around if size not in tried}
        if max(tried.values()) == best:
            break
        best = max(tried.values())
    return best


def _laid(part: NDArray[np.float32], whole: NDArray[np.float32], height: int, width: int) -> Alignment:
    laid = cv2.matchTemplate(whole, _sized(part, height, width), cv2.TM_CCOEFF_NORMED)
    _, correlation, _, (left, top) = cv2.minMaxLoc(laid)
    return correlation, height, width, top, left


def confirmed(pairs: pa.Table, scores: NDArray[np.float32], threshold: float = THRESHOLD) -> pa.Table:
    """Those candidates, `SCORED`, whose score reaches the threshold; equal digests need none, and count as 1."""
    score = np.where(pairs["exact"].to_numpy(), 1, scores).astype(np.float32)
    return pairs.append_column(SCORED.field("score"), pa.array(score)).filter(pa.array(score >= threshold))


# decision


def decide(
    count: int, inside: pa.Table, tested: Mapping[str, pa.Table], mode: Literal["merge", "drop"] = "merge"
) -> pa.Table:
    """What leaves a corpus of `count` pictures, and why: `DECISIONS`, in the order of the numbers.

    `inside` and the values of `tested`, by the names of the test sets, are `SCORED`. Pictures that pairs of `inside`
    connect, directly or through others, are a group. Where one of them is in a test set, all leave; else all but the
    lowest number leave, and if `mode` is "merge", that one takes their labels over.
    """
    if mode not in ("merge", "drop"):
        raise ValueError(f"mode is {mode!r}; it is 'merge' or 'drop'")
    names, links = _tests(tested)
    kept = _lowest(count, inside)
    tainted = np.zeros(count, bool)
    tainted[kept[links["number"]]] = True
    leaving = np.flatnonzero(tainted[kept] | (kept != np.arange(count)))
    in_test = tainted[kept[leaving]]
    rows = [
        _in_test(leaving[in_test], kept, links, names),
        _duplicates(leaving[~in_test], kept, inside, count, mode == "merge"),
    ]
    return pa.concat_tables(rows).sort_by("number").combine_chunks()


def united(labels: pa.ListArray | pa.ChunkedArray, decisions: pa.Table) -> pa.Array:
    """The labels of every picture of the corpus, after those that are kept took over, in order and each once."""
    moved = decisions.filter(decisions["into"].is_valid())
    groups: dict[int, set[int]] = {}
    for number, into in zip(moved["number"].to_pylist(), moved["into"].to_pylist(), strict=True):
        groups.setdefault(into, set(labels[into].as_py())).update(labels[number].as_py())
    whole = labels.combine_chunks() if isinstance(labels, pa.ChunkedArray) else labels
    places = np.arange(len(whole))
    places[list(groups)] = len(whole) + np.arange(len(groups))
    new = pa.array([sorted(group) for group in groups.values()], whole.type)
    return pa.concat_arrays([whole, new]).take(pa.array(places))


def _lowest(count: int, pairs: pa.Table) -> Numbers:
    """(count,): the lowest number of the group of each picture."""
    number, of = pairs["number"].to_numpy(), pairs["of"].to_numpy()
    links = coo_array((np.ones(len(number), np.int8), (number, of)), shape=(count, count))
    _, group = connected_components(links, directed=False)
    _, first = np.unique(group, return_index=True)
    return first[group]


def _tests(tested: Mapping[str, pa.Table]) -> tuple[list[str], dict[str, NDArray[Any]]]:
    """All links to test sets, the best first; and the names that their column `test` numbers."""
    names = list(tested)
    every = pa.concat_tables([SCORED.empty_table(), *tested.values()])
    links = {name: every[name].to_numpy() for name in SCORED.names}
    links["test"] = np.repeat(np.arange(len(names)), [table.num_rows for table in tested.values()])
    return names, {name: column[_best_first(links)] for name, column in links.items()}


def _best_first(links: Mapping[str, NDArray[Any]]) -> Numbers:
    keys = (links["of"], links["test"], -links["score"], links["distance"], ~links["exact"])
    return np.lexsort(keys)


def _in_test(leaving: Numbers, kept: Numbers, links: Mapping[str, NDArray[Any]], names: list[str]) -> pa.Table:
    """By its own best link, or else by the best of its group."""
    own, first_own = np.unique(links["number"], return_index=True)
    group, first_group = np.unique(kept[links["number"]], return_index=True)
    link = first_group[np.searchsorted(group, kept[leaving])] if len(leaving) else leaving
    place = np.minimum(np.searchsorted(own, leaving), max(0, len(own) - 1))
    link = np.where(own[place] == leaving, first_own[place], link) if len(leaving) else link
    columns = {name: links[name][link] for name in ("of", "distance", "score")}
    test_set = pa.array(names, pa.string()).take(pa.array(links["test"][link]))
    return _decisions(leaving, [TESTED] * len(leaving), columns, test_set, None)


def _duplicates(leaving: Numbers, kept: Numbers, inside: pa.Table, count: int, merge: bool) -> pa.Table:
    exact = _lowest(count, inside.filter(inside["exact"]))
    links = {name: inside[name].to_numpy() for name in SCORED.names}
    both = {name: np.concatenate([column, column]) for name, column in links.items()}
    both["end"] = np.concatenate([links["number"], links["of"]])
    both["test"] = np.zeros(len(both["end"]), np.int64)
    order = _best_first(both)
    end, first = np.unique(both["end"][order], return_index=True)
    link = order[first[np.searchsorted(end, leaving)]] if len(leaving) else leaving
    columns = {"of": kept[leaving], "distance": both["distance"][link], "score": both["score"][link]}
    same_bytes = exact[leaving] == exact[kept[leaving]]
    into = kept[leaving] if merge else None
    return _decisions(leaving, np.where(same_bytes, EXACT, NEAR).tolist(), columns, None, into)


def _decisions(
    number: Numbers,
    reason: list[str],
    columns: Mapping[str, NDArray[Any]],
    test_set: pa.Array | None,
    into: Numbers | None,
) -> pa.Table:
    nothing = pa.nulls(len(number))
    made = {"number": number, "reason": reason, **columns}
    made |= {"test_set": nothing if test_set is None else test_set, "into": nothing if into is None else into}
    return pa.table({name: pa.array(made[name]).cast(DECISIONS.field(name).type) for name in DECISIONS.names})
