"""Bytes of pictures by their place in a corpus: from local shards, copies in a cache, or straight from the store."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.cache import Cache, Verified
from pipeline.data.corpus import Corpus
from pipeline.data.plan import Picks
from shards.manifest import INDEX
from shards.storage import digest

OPEN_FILES = 128
COLUMNS = ("offset", "size", "width", "height", "labels")

Numbers = NDArray[np.int64]
Encoded = bytes  # a picture's; the reader has a method of that name


class Rows(NamedTuple):
    """What the index says of pictures: where their bytes are, sizes in pixels, labels (n, m) with -1 for none."""

    offset: Numbers
    size: Numbers
    width: Numbers
    height: Numbers
    labels: Numbers


class _File:
    """A file that closes when nobody refers to it any more, so that no thread loses it while it reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Reader:
    """Random access to the pictures of a corpus, from any number of threads.

    The digest of a shard, local or in the cache, is checked before its first picture is given; ValueError names one
    that is damaged. Without a cache the pictures of remote shards are fetched one by one, and only their lengths are
    checked. `kept` is of how many shards the index is kept in memory.
    """

    def __init__(self, corpus: Corpus, cache: Cache | None, verified: Verified, *, kept: int = 256) -> None:
        self.corpus, self.cache, self.verified = corpus, cache, verified
        self.opening: set[str] = set()
        """URLs of shards that are being fetched or verified now."""
        self._locks = [Lock() for _ in corpus.counts]
        self._rows: Callable[[int], Rows] = lru_cache(maxsize=kept)(self._read_rows)
        self._file: Callable[[int], _File] = lru_cache(maxsize=OPEN_FILES)(self._open)
        self._whole: set[int] = set()
        for one in corpus.sets:
            if not one.folder.local and cache:
                one.read_index_from(cache.path(one.folder, INDEX, one.manifest.files[INDEX], 0))

    def rows(self, picks: Picks) -> Rows:
        """What the index says of the pictures."""
        found = np.empty((4, len(picks.shard)), np.int64)
        labels: list[tuple[Numbers, Numbers]] = []
        for shard, here in _by_shard(picks.shard):
            rows, places = self._rows(shard), picks.place[here]
            for column, values in zip(found, rows[:4], strict=True):
                column[here] = values[places]
            labels.append((here, rows.labels[places]))
        most = max(some.shape[1] for _, some in labels)
        together = np.full((len(picks.shard), most), -1, np.int64)
        for here, some in labels:
            together[here, : some.shape[1]] = some
        return Rows(found[0], found[1], found[2], found[3], together)

    def each(self, picks: Picks, rows: Rows) -> Iterator[tuple[int, Encoded]]:
        """Place in `picks` and encoded picture, shard by shard; `rows` is what the index says of them.

        A picture is read when it is asked for, so that who decodes it finds its bytes in the processor's cache.
        """
        offsets, sizes = rows.offset.tolist(), rows.size.tolist()
        afar: list[int] = []
        for shard, here in _by_shard(picks.shard):
            if self.direct(shard):
                afar += here.tolist()
                continue
            file = self.file(shard)
            for i in here.tolist():
                data = os.pread(file.descriptor, sizes[i], offsets[i])
                if len(data) != sizes[i]:
                    raise ValueError(f"{file.path} has become shorter while the run went on: it ends within a picture")
                yield i, data
        yield from zip(afar, self._ranges(picks.shard, afar, offsets, sizes), strict=True)

    def bytes(self, picks: Picks, rows: Rows) -> list[Encoded]:
        """The encoded pictures, in the order of `picks`."""
        found = dict(self.each(picks, rows))
        return [found[i] for i in range(len(found))]

    def direct(self, shard: int) -> bool:
        """Whether the pictures of a shard are fetched one by one."""
        return self.cache is None and not self.corpus.tars(shard).local

    def file(self, shard: int) -> _File:
        """The shard, opened; whole and right."""
        with self._locks[shard]:
            return self._file(shard)

    def prepare(self, shard: int) -> None:
        """Fetch and verify a shard ahead of need."""
        with self._locks[shard]:
            self._path(shard)

    def changed(self, shard: int) -> str:
        """Why the bytes of a shard are no more what the manifest says, empty where they are."""
        if self.direct(shard):
            return ""
        path = self.file(shard).path
        if path.exists() and digest(path) == self.corpus.about(shard).sha256:
            return ""
        return f"{path} has been changed or removed while the run went on: put the very same file back and start again"

    def name(self, shard: int) -> str:
        """The URL of a shard."""
        return f"{self.corpus.tars(shard).absolute}/{self.corpus.about(shard).name}"

    def _ranges(self, shards: Numbers, which: list[int], offsets: list[int], sizes: list[int]) -> Iterator[Encoded]:
        folders = {self.corpus.tars(shards.item(i)).absolute: self.corpus.tars(shards.item(i)) for i in which}
        found: dict[int, Encoded] = {}
        for url, folder in folders.items():
            here = [i for i in which if self.corpus.tars(shards.item(i)).absolute == url]
            wanted = [(self.corpus.about(shards.item(i)).name, offsets[i], sizes[i]) for i in here]
            found.update(zip(here, folder.ranges(wanted), strict=True))
        return (found[i] for i in which)

    def _read_rows(self, shard: int) -> Rows:
        table = self.corpus.rows(shard, COLUMNS)
        offset, size, width, height = (table[name].to_numpy().astype(np.int64, copy=False) for name in COLUMNS[:4])
        labels = table["labels"].combine_chunks()
        return Rows(
            offset, size, width, height, _padded(labels.value_lengths().to_numpy(), labels.flatten().to_numpy())
        )

    def _open(self, shard: int) -> _File:
        path = self._path(shard)
        try:
            return _File(path)
        except FileNotFoundError:  # a copy that another process has just removed to make room
            return _File(self._path(shard))

    def _path(self, shard: int) -> Path:
        name = self.name(shard)
        self.opening.add(name)
        try:
            return self._found(shard)
        finally:
            self.opening.discard(name)

    def _found(self, shard: int) -> Path:
        folder, about = self.corpus.tars(shard), self.corpus.about(shard)
        if not folder.local:
            assert self.cache, "what is read directly has no path"
            return self.cache.path(folder, about.name, about.sha256, about.bytes)
        path = folder.local / about.name
        if shard not in self._whole:
            try:
                self.verified.check(path, about.sha256)
            except FileNotFoundError as error:
                why = "does not exist any more, though the manifest names it: put the very same file back, start again"
                raise FileNotFoundError(f"{path} {why}") from error
            self._whole.add(shard)
        return path


def _by_shard(shards: Numbers) -> Iterator[tuple[int, Numbers]]:
    """Each shard with the places at which it stands."""
    order = np.argsort(shards, kind="stable")
    ordered = shards[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    yield from zip(ordered[starts].tolist(), np.split(order, starts[1:]), strict=True)


def _padded(lengths: Numbers, values: NDArray[np.int32]) -> Numbers:
    """Lists of these lengths, laid end to end in `values`, as rows with -1 where there is nothing."""
    most = max(1, int(lengths.max(initial=0)))
    found = np.full((len(lengths), most), -1, np.int64)
    found[np.arange(most) < lengths[:, None]] = values
    return found


def at(corpus: Corpus, samples: Sequence[int] | Numbers) -> Picks:
    """Pictures by their numbers in the corpus, as of epoch 0."""
    numbers = np.asarray(samples, np.int64)
    return Picks(np.zeros_like(numbers), *corpus.find(numbers))
