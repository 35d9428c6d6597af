"""A part of a checkpoint: what one process keeps, as one safetensors file with a digest of every 16 MiB of it.

The file is laid out in memory first, once for all saves: training waits while the state is copied there, and threads
take it to the disk. As each chunk has a digest of its own, a reader fetches and verifies those that it needs alone.
"""

import errno
import fcntl
import json
import os
import struct
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from xxhash import xxh3_128

from pipeline.train.engine import Fragment
from shards.storage import Folder

CHUNK = 16 << 20
"""Bytes of a file that one digest is of."""
PAGE = 4096
"""Bytes that a disk takes at a time; where tensors begin and memory is written from is a multiple of it."""
THREADS = 4
"""Chunks that a process works on at a time."""
NUMBER = 4
"""Bytes of a number: all state is fp32."""
XXH3 = "xxh3_128"
DIGESTS: dict[str, Callable[[Any], Any]] = {XXH3: xxh3_128, "sha256": sha256}
"""By name, what digests were made with. They are there against accidents, which 128 bits find as surely, and sha256
would take longer than the writing; format 1 has it."""

Layout = dict[str, dict[str, tuple[int, int]]]


class Damaged(ValueError):
    """A file of a checkpoint is not what was written; `detail` says which, and what is wrong with it."""

    def __init__(self, place: Folder, name: str, why: str) -> None:
        super().__init__(f"{place.absolute}/{name} is damaged: {why}")
        self.detail = f"{name}: {why}"


class Image:
    """The file of a part in memory: made once, and filled with the state at each save.

    The memory is pinned where there is a GPU to copy from. One that is not `whole` has no memory for more than the
    chunks that are being written, and looks at the state as they are.
    """

    def __init__(self, fragments: list[Fragment], *, whole: bool = True) -> None:
        self.layout = _layout(fragments)
        self.tensors: dict[str, dict[str, list[int]]] = {}
        """By state and parameter: first number of the stretch, numbers, first byte in the file."""
        header, offset = _header(self.layout)
        self._header, self._taken = header, dict[int, Tensor]()
        for state, stretches in self.layout.items():
            self.tensors[state] = {}
            for parameter, (start, length) in stretches.items():
                self.tensors[state][parameter] = [start, length, offset]
                offset += length * NUMBER
        self.bytes = offset
        gpu = any(values.is_cuda for fragment in fragments for values in fragment.states.values())
        self._memory = _aligned(_whole_pages(offset), pinned=gpu) if whole else None
        self._copied = torch.cuda.Event() if gpu and whole else None
        if self._memory is not None:
            self._memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
            self._memory[offset:] = 0

    def fits(self, fragments: list[Fragment]) -> bool:
        """Whether it is an image of just these stretches."""
        return self.layout == _layout(fragments)

    def take(self, fragments: list[Fragment]) -> None:
        """Copy the state as it is now.

        A GPU's is copied in the order of its work, before whatever changes it, while the host goes on. An image that
        is not whole copies nothing: the state may not change before it is written.
        """
        for fragment in fragments:
            for state, values in fragment.states.items():
                _, length, offset = self.tensors[state][fragment.parameter]
                if self._memory is None:
                    self._taken[offset] = values.detach()
                    continue
                own = self._memory[offset : offset + length * NUMBER].view(torch.float32)
                own.copy_(values.detach(), non_blocking=True)
        if self._copied:
            self._copied.record()

    def write(self, path: Path) -> list[str]:
        """Write what was taken, to the disk; returns the digest of each chunk."""
        if self._copied:
            self._copied.synchronize()
        file = _opened(path)
        try:

            def put(start: int) -> str:
                chunk = self._chunk(start)
                found = xxh3_128(chunk[: self.bytes - start]).hexdigest()
                _pwrite(file, chunk, start)
                return found

            with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-part") as threads:
                digests = list(threads.map(put, range(0, self.bytes, CHUNK)))
            os.ftruncate(file, self.bytes)
            os.fsync(file)
        finally:
            os.close(file)
        return digests

    def _chunk(self, start: int) -> memoryview:
        """The bytes of the file from `start` on, with what fills the last page."""
        size = min(CHUNK, _whole_pages(self.bytes) - start)
        if self._memory is not None:
            return self._memory[start : start + size].numpy().data
        chunk = _aligned(size)
        chunk[:] = 0
        for offset, values in [(0, torch.frombuffer(bytearray(self._header), dtype=torch.uint8)), *self._taken.items()]:
            low, high = max(start, offset), min(start + size, offset + values.nbytes)
            if low < high:
                width = values.element_size()
                piece = values[(low - offset) // width : (high - offset) // width]
                chunk[low - start : high - start].view(values.dtype).copy_(piece)
        return chunk.numpy().data

    def record(self, name: str, digests: list[str]) -> dict[str, Any]:
        """What a reader has to know of the file `name`, as plain values."""
        about = {"file": name, "bytes": self.bytes, "chunk": CHUNK, "digest": XXH3, "digests": digests}
        return {**about, "tensors": self.tensors}


def _layout(fragments: list[Fragment]) -> Layout:
    """By state and parameter, where each stretch starts and how long it is, in the order of the file.

    All of a state lies together: who wants the weights alone reads no moments.
    """
    layout: Layout = {}
    for fragment in fragments:
        for state, values in fragment.states.items():
            assert values.dtype == torch.float32 and values.dim() == 1, f"{state} of {fragment.parameter}"
            stretches = layout.setdefault(state, {})
            assert fragment.parameter not in stretches, f"two stretches of {fragment.parameter} in one process"
            stretches[fragment.parameter] = (fragment.start, values.numel())
    return layout


def _header(layout: Layout) -> tuple[bytes, int]:
    """The beginning of a safetensors file, and its length: whole pages."""
    header, offset = {}, 0
    for state, stretches in layout.items():
        for parameter, (_, length) in stretches.items():
            end = offset + length * NUMBER
            header[f"{state}/{parameter}"] = {"dtype": "F32", "shape": [length], "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header).encode()
    text = text.ljust(_whole_pages(len(text) + 8) - 8)
    return struct.pack("<Q", len(text)) + text, len(text) + 8


def _aligned(size: int, *, pinned: bool = False) -> Tensor:
    """Bytes that begin with a page."""
    memory = torch.empty(size + PAGE, dtype=torch.uint8, pin_memory=pinned)
    return memory[-memory.data_ptr() % PAGE :][:size]


def _whole_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _opened(path: Path) -> int:
    """The file for writing, past the system's cache where its file system can.

    The cache would take a copy of every byte, and the memory that the shards' pages are in.
    """
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644)


def _pwrite(file: int, data: memoryview, start: int) -> None:
    """Write all of `data` at `start`."""
    while data:
        try:
            written = os.pwrite(file, data, start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # A file system with larger blocks, or what is left of a block: through the cache, then.
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
            written = os.pwrite(file, data, start)
        data, start = data[written:], start + written


class _Piece(NamedTuple):
    """Bytes of a file, from `start` to `end`, and the flat fp32 tensor that they are for."""

    start: int
    end: int
    target: Tensor


def fill(place: Folder, part: dict[str, Any], wanted: list[Fragment]) -> int:
    """Copy what a part holds of the wanted stretches and states; returns how many numbers that was.

    Only the chunks that hold some of them are read. `Damaged` names one that is not there or has another digest;
    nothing of it has been copied then.
    """
    pieces = [piece for fragment in wanted for piece in _pieces(part["tensors"], fragment)]
    size, of_chunk = part["chunk"], defaultdict[int, list[_Piece]](list)
    for piece in pieces:
        for number in range(piece.start // size, -(-piece.end // size)):
            of_chunk[number].append(piece)

    def copy(number: int) -> None:
        first = number * size
        data = _chunk(place, part, number)
        for start, end, target in of_chunk[number]:
            low, high = max(start, first), min(end, first + size)
            values = torch.frombuffer(data, dtype=torch.float32, count=(high - low) // NUMBER, offset=low - first)
            target[(low - start) // NUMBER : (high - start) // NUMBER].copy_(values)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(copy, of_chunk))
    return sum(piece.target.numel() for piece in pieces)


def _pieces(tensors: dict[str, dict[str, list[int]]], fragment: Fragment) -> list[_Piece]:
    """Where the file has something of a fragment."""
    found = []
    for state, target in fragment.states.items():
        start, length, offset = tensors.get(state, {}).get(fragment.parameter, (0, 0, 0))
        low, high = max(fragment.start, start), min(fragment.start + target.numel(), start + length)
        if low < high:
            values = target[low - fragment.start : high - fragment.start]
            found.append(_Piece(offset + (low - start) * NUMBER, offset + (high - start) * NUMBER, values))
    return found


def _chunk(place: Folder, part: dict[str, Any], number: int) -> bytearray:
    first, name = number * part["chunk"], part["file"]
    try:
        data = place.read(name, first, min(first + part["chunk"], part["bytes"]))
    except FileNotFoundError as error:
        raise Damaged(place, name, "it is not there") from error
    if DIGESTS[part["digest"]](data).hexdigest() != part["digests"][number]:
        raise Damaged(place, name, f"chunk {number} has another digest than the recorded one")
    return bytearray(data)


def of_format_1(part: dict[str, Any]) -> dict[str, Any]:
    """The record of a part that had one digest for the whole file, as of one with a single chunk.

    There, the three states of AdamW lie side by side for each parameter in turn, up to the end of the file.
    """
    states = ("master", "exp_avg", "exp_avg_sq")
    offset = part["bytes"] - NUMBER * len(states) * sum(length for _, length in part["fragments"].values())
    tensors: dict[str, dict[str, list[int]]] = {state: {} for state in states}
    for parameter, (start, length) in part["fragments"].items():
        for state in states:
            tensors[state][parameter] = [start, length, offset]
            offset += length * NUMBER
    chunk = {"chunk": part["bytes"], "digest": "sha256", "digests": [part["sha256"]]}
    return {"file": part["file"], "bytes": part["bytes"], **chunk, "tensors": tensors}
