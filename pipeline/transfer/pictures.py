"""The pictures of a task, in the memory of one process.

What fits into memory is kept: decoded where there is room for that, else as the bytes of the file; what does not fit
is read again each time. The pixels are the same whichever.

Legend: n pictures, m labels at most, h w pixels, all pictures RGB and uint8.
"""

from collections.abc import Callable, Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from pipeline.data.cache import VERIFIED, Verified
from pipeline.data.corpus import Corpus
from pipeline.data.image import Pixels, decode
from pipeline.data.read import Reader, Rows, at
from pipeline.transfer.tasks import Part, Task
from shards.manifest import ShardSet
from shards.storage import Folder

BUDGET = 4 << 30
"""Bytes of pictures that a process keeps."""

_AT_ONCE = 1024  # pictures read in one go, which of a store is much faster than one by one

Numbers = NDArray[np.int64]


class Room:
    """Bytes of memory that several sets of pictures share, from any number of threads."""

    def __init__(self, left: int) -> None:
        self.left = left
        self._lock = Lock()

    def take(self, sizes: Numbers, most: int) -> int:
        """How many things of these sizes, the first ones, fit into `most` bytes of what is left; they are taken."""
        with self._lock:
            ends = np.cumsum(sizes)
            fit = int(np.searchsorted(ends, min(most, self.left), side="right"))
            self.left -= int(sizes[:fit].sum())
        return fit

    def give(self, size: int) -> None:
        """Let go of bytes that were taken."""
        with self._lock:
            self.left += size


class Pictures:
    """Pictures of any sizes, whole, from any number of threads."""

    def __init__(
        self,
        labels: Numbers,
        width: Numbers,
        height: Numbers,
        keys: Sequence[str],
        load: Callable[[int], Pixels],
        room: Room,
        *,
        kept: int,
        held: int,
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        """`load` makes a picture; the first `kept` stay once they are made.

        `held` bytes of `room` have been taken for these and for what `load` keeps until it is told to `forget`.
        """
        self.labels = labels
        """(n, m), -1 for none."""
        self.width, self.height, self.keys = width, height, keys
        self.held = held
        """Bytes of memory that are taken for them."""
        self._load, self._forget, self._kept, self._room = load, forget, kept, room
        self._images: dict[int, Pixels] = {}

    @staticmethod
    def of(images: Sequence[Pixels], labels: Sequence[int] | Numbers) -> "Pictures":
        """Pictures that are in memory already, with one label each, named by their numbers."""
        height, width = (np.array([image.shape[axis] for image in images], np.int64) for axis in (0, 1))
        names = [str(number) for number in range(len(images))]
        numbers = np.asarray(labels, np.int64).reshape(-1, 1)
        return Pictures(numbers, width, height, names, images.__getitem__, Room(0), kept=0, held=0)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def sizes(self) -> tuple[Numbers, Numbers]:
        """Width and height of each."""
        return self.width, self.height

    def image(self, i: int) -> Pixels:
        """A picture (h, w, 3), which is not to be written to; ValueError, naming it, where its bytes are none."""
        image = self._images.get(i)
        if image is None:
            image = self._load(i)
            if i < self._kept:
                self._images[i] = image
        return image

    def drop(self) -> None:
        """Keep nothing any more and give the memory back; the pictures can still be had."""
        self._forget()
        self._images, self._kept = {}, 0
        self._room.give(self.held)
        self.held = 0


def joined(parts: Sequence[Pictures]) -> Pictures:
    """The pictures of several, one behind the other; each keeps its own."""
    if len(parts) == 1:
        return parts[0]
    first = np.cumsum([0, *(len(part) for part in parts)])

    def load(i: int) -> Pixels:
        which = int(np.searchsorted(first, i, side="right")) - 1
        return parts[which].image(i - first.item(which))

    most = max(part.labels.shape[1] for part in parts)
    return Pictures(
        np.concatenate([_wide(part.labels, most) for part in parts]),
        np.concatenate([part.width for part in parts]),
        np.concatenate([part.height for part in parts]),
        [key for part in parts for key in part.keys],
        load,
        Room(0),
        kept=0,
        held=0,
    )


def _wide(labels: Numbers, most: int) -> Numbers:
    return np.pad(labels, ((0, 0), (0, most - labels.shape[1])), constant_values=-1)


def read(parts: Sequence[tuple[ShardSet, Part]], budget: int) -> Pictures:
    """The pictures of parts of shard sets, one behind the other, in the sets' own order; at most `budget` bytes of
    memory are used to keep them."""
    room = Room(budget)
    return joined([_Stored(shards, part).pictures(room, room.left) for shards, part in parts])


class _Stored:
    """The pictures of a part of a shard set, as bytes in memory or where they lie."""

    def __init__(self, shards: ShardSet, part: Part) -> None:
        corpus, self._where = Corpus([shards]), shards.folder.absolute
        numbers = np.array(part.numbers(corpus.samples), np.int64)
        if not len(numbers):
            raise ValueError(f"{self._where} has too few pictures: {part.first} to {part.last} % of them are none")
        self._reader = Reader(corpus, None, Verified(VERIFIED))
        self._picks = at(corpus, numbers)
        self.rows, self.keys = self._reader.rows(self._picks), corpus.keys(numbers)
        self.pixels = 3 * self.rows.width * self.rows.height
        """Bytes of each when it is decoded: (n,)."""
        self._encoded: dict[int, bytes] = {}
        self._kept = self._decoded = 0

    def pictures(self, room: Room, most: int) -> Pictures:
        """These, of which as many are kept as fit into `most` bytes of what is left of `room`."""
        rows = self.rows
        encoded = room.take(rows.size, most)
        held = int(rows.size[:encoded].sum())
        more = np.maximum(self.pixels - rows.size, 0)[:encoded]  # that a picture takes when it has been decoded
        decoded = room.take(more, most - held)
        self._keep(encoded, decoded)
        return Pictures(
            rows.labels,
            rows.width,
            rows.height,
            self.keys,
            self._load,
            room,
            kept=decoded,
            held=held + int(more[:decoded].sum()),
            forget=self._forget,
        )

    def _keep(self, encoded: int, decoded: int) -> None:
        """Keep the bytes of the first `encoded`, of the first `decoded` only until they are asked for."""
        self._kept, self._decoded = encoded, decoded
        for first in range(0, encoded, _AT_ONCE):
            some = np.arange(first, min(first + _AT_ONCE, encoded))
            self._encoded.update(zip(some.tolist(), self._bytes(some), strict=True))

    def _forget(self) -> None:
        self._kept, self._decoded, self._encoded = 0, 0, {}

    def _load(self, i: int) -> Pixels:
        data = self._encoded.pop(i, None) if i < self._decoded else self._encoded.get(i)
        if data is None:
            data = self._bytes(np.array([i]))[0]
            if self._decoded <= i < self._kept:
                self._encoded[i] = data
        try:
            image = decode(data)
        except ValueError as error:
            raise ValueError(f"{self._where}, picture {self.keys[i]}: {error}") from error
        expected = self.rows.height.item(i), self.rows.width.item(i)
        if image.shape[:2] != expected:
            high, wide = image.shape[:2]
            wrong = f"it is {wide} x {high} pixels, the index says {expected[1]} x {expected[0]}"
            raise ValueError(f"{self._where}, picture {self.keys[i]}: {wrong}")
        image.setflags(write=False)  # it is everybody's
        return image

    def _bytes(self, some: Numbers) -> list[bytes]:
        picks = type(self._picks)(*(column[some] for column in self._picks))
        return self._reader.bytes(picks, Rows(*(column[some] for column in self.rows)))


class _Shelf:
    """The pictures that a process has, by what they are."""

    def __init__(self) -> None:
        self.room = Room(BUDGET)
        self.lock = Lock()
        self.parts: dict[tuple[str, str, str, Part], Pictures] = {}

    def part(self, data: str, where: str, root: str, part: Part) -> Pictures:
        """Those of a part of a shard set with this root digest."""
        key = (data, where, root, part)
        if key not in self.parts:
            shards = ShardSet((Folder(data) / where).absolute)
            if shards.manifest.root != root:
                raise ValueError(f"the shard set {where} has changed: it is {shards.manifest.root}, not {root}")
            stored = _Stored(shards, part)
            self._make_room(where, 2 * int(stored.pixels.sum()))
            self.parts[key] = stored.pictures(self.room, self.room.left // 2)
        self.parts[key] = self.parts.pop(key)  # the last that was wanted
        return self.parts[key]

    def _make_room(self, where: str, wanted: int) -> None:
        """Let the pictures of other data sets go, those first that were not wanted for longest."""
        for key in list(self.parts):
            if self.room.left >= wanted:
                return
            if key[1].partition("/")[0] != where.partition("/")[0]:
                self.parts.pop(key).drop()


_shelf = _Shelf()


def pictures_of(data: str, task: Task, parts: Sequence[Part], roots: Sequence[tuple[str, str]]) -> Pictures:
    """The pictures of parts of a task, whose shard sets lie under `data` and have these root digests.

    A process keeps them, `BUDGET` bytes at most of all tasks, from one trial to the next. One part takes no more than
    half of what is left, so that those that come later find room too. ValueError where a set has changed or is not
    there.
    """
    known = dict(roots)
    with _shelf.lock:
        return joined(
            [_shelf.part(Folder(data).absolute, task.where(part), known[task.where(part)], part) for part in parts]
        )
