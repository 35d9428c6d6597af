"""Laws of pictures in tars, and of the forms that ImageNet comes in."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import random
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.io import savemat

from shards.datasets import Dataset, imagenet1k, imagenet21k, imagenet_real
from shards.sources import Origin, Ranges, tars, unpacking
from shards.sources.members import Broken, Member, Read, walk
from shards.storage import Folder

pytestmark = pytest.mark.timeout(60)

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def in_pieces(compress: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Compresses as programs do that use several processors: piece by piece, one behind the other."""
    return lambda data: b"".join(compress(data[at : at + 8000]) for at in range(0, len(data), 8000))


COMPRESS = {
    ".tar.gz": gzip.compress,
    ".tgz": in_pieces(gzip.compress),
    ".tar.bz2": in_pieces(bz2.compress),
    ".tar.xz": lzma.compress,
    ".txz": in_pieces(lzma.compress),
}


def tar_of(members: Mapping[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


def noise(count: int, word: str = "") -> bytes:
    return random.Random(f"{count} {word}").randbytes(count)


def class_tars() -> dict[str, dict[str, bytes]]:
    """Pictures by class and name: of every size about a tar's blocks."""
    return {
        wnid: {f"{wnid}_{n}.JPEG": noise(size + place, wnid) for n, size in enumerate((1, 511, 512, 513, 3000))}
        for place, wnid in enumerate(("n02", "n01", "n03"))
    }


def origin(source: object, downloads: object = "unused", **others: Any) -> Origin:
    return Origin(str(source), Folder(str(downloads)), **{"say": lambda line: None, **others})


def contents(found: Ranges) -> dict[str, tuple[str, bytes]]:
    """Class and bytes of each picture by its key, read at the places that the listing names."""
    rows = found.table.to_pylist()
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: (found.classes[row["labels"][0]], at(found, n)) for n, row in enumerate(rows)}


def at(found: Ranges, number: int) -> bytes:
    url, offset, size = found.place(number)
    files, path = fsspec.core.url_to_fs(url)
    return files.cat_file(path)[offset : offset + size]


def expected(classes: Mapping[str, Mapping[str, bytes]]) -> dict[str, tuple[str, bytes]]:
    return {
        name.rpartition(".")[0]: (wnid, data) for wnid, pictures in classes.items() for name, data in pictures.items()
    }


# the headers of one tar


def reader(data: bytes) -> Read:
    return lambda offset, size: data[offset : offset + size]


def taken(data: bytes) -> tuple[list[Member], Broken | None]:
    """The members up to a fault, and the fault."""
    found = []
    try:
        for member in walk(reader(data), 0, len(data)):
            found.append(member)
    except Broken as broken:
        return found, broken
    return found, None


names = some.text(some.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=12)
paths = some.one_of(
    some.lists(names, min_size=1, max_size=4).map("/".join),
    some.integers(90, 300).map(lambda count: "n" * count),
    some.integers(30, 90).map(lambda count: f"{'folder/' * (count // 7)}{'n' * count}"),
).filter(lambda path: not path.startswith(".") and path.isprintable())


@given(members=some.dictionaries(paths, some.binary(max_size=1500), max_size=6), form=some.sampled_from(list(FORMATS)))
@settings(max_examples=150, deadline=None)
def test_every_member_is_found_where_tarfile_finds_it(members: dict[str, bytes], form: str) -> None:
    try:
        data = tar_of(members, FORMATS[form])
    except ValueError:  # ustar has no room for such a name
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        theirs = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    assert taken(data) == (theirs, None)
    assert [data[offset : offset + size] for _, offset, size in theirs] == list(members.values())


def header(name: str, size: int, form: Any, **fields: Any) -> bytes:
    made = tarfile.TarInfo(name)
    made.size = size
    for each, value in fields.items():
        setattr(made, each, value)
    return made.tobuf(form)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_size_is_read_even_beyond_eight_gigabytes(tmp_path: Path, form: int) -> None:
    size = 9 * 2**30 + 5
    with (tmp_path / "large.tar").open("wb") as file:  # it has a hole, and takes no room
        file.write(header("a.jpg", size, form))
        first = file.tell()
        file.seek(first + size + (-size) % 512)
        file.write(header("b.jpg", 1, form) + b"b".ljust(512, b"\0") + bytes(1024))
    with tars._opened(Folder(str(tmp_path)), "large.tar", 1 << 40) as read:
        found = list(walk(read, 0, (tmp_path / "large.tar").stat().st_size))
    assert [(name, count) for name, _, count in found] == [("a.jpg", size), ("b.jpg", 1)]
    assert found[0].offset == first


def resummed(block: bytes) -> bytes:
    return block[:148] + b"%06o\0 " % (sum(block[:148]) + sum(block[156:512]) + 256) + block[156:]


def test_every_tar_from_before_posix_is_read() -> None:
    def old(name: str, size: int) -> bytes:
        return resummed(header(name, size, tarfile.USTAR_FORMAT)[:156] + bytes(356))

    data = old("folder/", 0) + old("folder/a.jpg", 3) + b"abc".ljust(512, b"\0") + bytes(1024)
    assert taken(data) == ([("folder/a.jpg", 1024, 3)], None)


def test_a_signed_checksum_counts_as_if_it_were_unsigned() -> None:
    block = header("é.jpg", 0, tarfile.USTAR_FORMAT)
    signed = sum(byte - 256 * (byte > 127) for byte in block[:148] + block[156:]) + 256
    assert signed < 0o777777 and taken(block[:148] + b"%06o\0 " % signed + block[156:] + bytes(1024))[1] is None


def test_a_global_pax_header_speaks_of_every_member_that_has_none_of_its_own() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x", "path": "g"}):
        pass
    common = file.getvalue()[:1536].split(header("", 0, tarfile.USTAR_FORMAT))[0].rstrip(b"\0")
    common = common + bytes(-len(common) % 512)
    data = common + tar_of({"a.jpg": b"a", "é.jpg": b"b"}, tarfile.PAX_FORMAT)
    assert [member.name for member in taken(data)[0]] == ["g", "é.jpg"]


def test_links_folders_and_devices_are_no_files_whatever_size_they_claim() -> None:
    kinds = [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
    blocks = [resummed(header("x.jpg", 5000, tarfile.USTAR_FORMAT, type=kind)) for kind in kinds]
    data = b"".join(blocks) + tar_of({"a.jpg": b"abc"})
    assert taken(data) == ([("a.jpg", 3072 + 512, 3)], None)


def test_names_that_differ_in_bytes_that_are_no_text_stay_different() -> None:
    data = b"".join(
        resummed(header("x.jpg", 0, tarfile.USTAR_FORMAT).replace(b"x.jpg", name))
        for name in (b"\xe9.jpg", b"\xe8.jpg")
    )
    names = [member.name for member in taken(data + bytes(1024))[0]]
    assert len(set(names)) == 2 and "".join(names).encode()


SAMPLE = {"a.jpg": noise(700), "n" * 150 + ".jpg": noise(1024), "é.jpg": noise(5)}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_known_to_be_cut_at_every_byte_and_what_is_whole_before_is_found(form: int) -> None:
    data = tar_of(SAMPLE, form)
    whole, none = taken(data)
    assert none is None and len(whole) == 3
    for cut in range(0, whole[-1].offset + 1024, 7):
        found, broken = taken(data[:cut])
        assert broken and broken.offset <= cut
        assert found == [member for member in whole if member.offset + member.size <= cut]


@given(place=some.integers(0, 511).filter(lambda place: not 148 <= place < 156), byte=some.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_every_changed_byte_of_a_header_is_noticed_at_its_offset(place: int, byte: int) -> None:
    data = bytearray(tar_of({"a.jpg": noise(600), "b.jpg": b"b"}))
    data[1536 + place] ^= byte
    found, broken = taken(bytes(data))
    assert [member.name for member in found] == ["a.jpg"]
    assert broken and broken.offset == 1536 and "no header" in broken.why


def pax(text: bytes) -> bytes:
    block = resummed(header("x", len(text), tarfile.USTAR_FORMAT, type=b"x"))
    return block + text.ljust(512, b"\0") + tar_of({"a.jpg": b"a"})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<html>".ljust(2048), "no header"),
        (b"", "cut short"),
        (resummed(header("a", 1, 0)[:124] + b"-0000000001\0" + header("a", 1, 0)[136:]), "gives no size"),
        (resummed(header("a", 1, 0)[:124] + b"\xff" * 12 + header("a", 1, 0)[136:]), "gives no size"),
        (resummed(header("a", 1 << 30, 0, type=b"L")) + bytes(1024), "1,073,741,824 bytes does not fit"),
        (pax(b"10 path=a\n"), None),
        (pax(b"99 path=a\n"), "pax header is damaged at its byte 0"),
        (pax(b"10 path=a\nxx path=b\n"), "pax header is damaged at its byte 10"),
        (pax(b"0 path=a\n"), "pax header is damaged"),
        (pax(b"10 size=x\n"), "pax header gives no size: 'x'"),
        (pax(b"24 GNU.sparse.name=xxxx\n"), "with holes"),
        (resummed(header("a", 0, 0, type=b"S")), "with holes"),
        (tar_of({"a.jpg": b"a"}) + tar_of({"b.jpg": b"b"}), "goes on behind the mark of its end"),
    ],
)
def test_every_odd_tar_ends_with_a_reason(data: bytes, words: str | None) -> None:
    broken = taken(data)[1]
    assert broken is None if words is None else broken and words in broken.why


# where tars lie


@dataclass
class Server:
    """A web server of a folder that gives parts of files, and counts their bytes."""

    root: Path
    sent: list[int] = field(default_factory=list)

    def __enter__(self) -> str:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def answer(self, body: bool) -> None:
                path, asked = server.root / self.path.strip("/"), self.headers.get("Range")
                if not path.exists():
                    self.send_error(404)
                    return
                links = "".join(f'<a href="{each.name}">' for each in path.iterdir()) if path.is_dir() else ""
                data = links.encode() if links else path.read_bytes()
                self.send_response(206 if asked else 200)
                if asked:
                    first, last = asked.removeprefix("bytes=").split("-")
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                    data = data[int(first) : int(last) + 1]
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    server.sent.append(len(data))
                    self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


@pytest.fixture(params=["folder", "memory", "bucket", "web"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Callable[[str, bytes], None]]]:
    """A URL, and what puts a file there."""
    if request.param == "web":
        with Server(tmp_path) as url:
            yield url, lambda name, data: Folder(str(tmp_path)).write(name, data)
        return
    urls = {"folder": lambda: str(tmp_path), "memory": lambda: f"memory://{uuid4().hex}"}
    url = urls.get(request.param, lambda: request.getfixturevalue("s3"))()
    yield url, Folder(url).write


def outer_of(classes: Mapping[str, Mapping[str, bytes]], inside: str = "") -> bytes:
    return tar_of({f"{inside}{wnid}.tar": tar_of(pictures) for wnid, pictures in classes.items()})


def test_every_picture_is_found_in_class_tars_wherever_they_lie(place) -> None:
    url, put = place
    others = {"n01_x.txt": b"no picture", "._n01_0.JPEG": b"of macOS"}
    for wnid, pictures in class_tars().items():
        put(f"{wnid}.tar", tar_of({**pictures, **others}))
    put("readme.txt", b"no tar")
    found = tars.read(origin(url))
    assert found.classes == ("n01", "n02", "n03") and contents(found) == expected(class_tars())
    assert sorted(found.files.to_pylist()) == ["n01.tar", "n02.tar", "n03.tar"] and found.root == Folder(url).absolute


@pytest.mark.parametrize("inside", ["", "winter21_whole/", "./"])
def test_every_picture_is_found_in_a_tar_of_class_tars_wherever_it_lies(place, inside: str) -> None:
    url, put = place
    put("whole.tar", outer_of(class_tars(), inside))
    found = tars.read(origin(f"{url}/whole.tar"))
    assert found.classes == ("n01", "n02", "n03") and contents(found) == expected(class_tars())
    assert found.files.to_pylist() == ["whole.tar"]


def test_every_picture_is_found_in_a_tar_of_class_folders_wherever_it_lies(place) -> None:
    url, put = place
    members = {f"./train/{wnid}/{name}": data for wnid, each in class_tars().items() for name, data in each.items()}
    put("whole.tar", tar_of({**members, "train/readme.txt": b"no picture"}))
    found = tars.read(origin(f"{url}/whole.tar"))
    assert found.classes == ("n01", "n02", "n03") and contents(found) == expected(class_tars())


@pytest.mark.parametrize("block", [512, 1000, 4096, 1 << 22])
def test_every_block_size_lists_the_same_pictures(tmp_path: Path, monkeypatch, block: int) -> None:
    monkeypatch.setattr(tars, "BLOCK", block)
    url = f"memory://{uuid4().hex}"
    for there in (str(tmp_path), url):
        Folder(there).write("whole.tar", outer_of(class_tars()))
    here, away = (tars.read(origin(f"{there}/whole.tar")).table for there in (str(tmp_path), url))
    assert here == away


def test_pictures_that_are_larger_than_a_block_are_not_fetched(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tars, "BLOCK", 1 << 12)
    data = tar_of({f"c/{n}.jpg": noise(100_000) for n in range(5)})
    (tmp_path / "whole.tar").write_bytes(data)
    server = Server(tmp_path)
    with server as url:
        assert len(tars.read(origin(f"{url}/whole.tar"))) == 5
    assert sum(server.sent) <= 7 * (1 << 12) + 10240


def test_class_tars_are_leapt_over_by_small_requests(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tars, "BLOCK", 1 << 14)
    monkeypatch.setattr(tars, "LEAST", 1 << 9)
    (tmp_path / "whole.tar").write_bytes(tar_of({f"n{n}.tar": noise(50_000) for n in range(9)}))
    server = Server(tmp_path)
    with server as url:
        assert len(tars.scanned(origin(url), Folder(url), "whole.tar").tars) == 9
    assert sum(server.sent) <= (1 << 14) + 8 * (1 << 9) + 10240


def test_tars_are_listed_as_if_it_were_done_here_whoever_does_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tars, "BATCH", 2)
    asked = []

    def elsewhere(work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        for argument in arguments:
            asked.append(argument)
            work_there, argument_there = pickle.loads(pickle.dumps((work, argument)))
            yield pickle.loads(pickle.dumps(work_there(*argument_there)))

    Folder(str(tmp_path)).write("a/whole.tar", outer_of(class_tars()))
    for wnid, pictures in class_tars().items():
        Folder(str(tmp_path)).write(f"b/{wnid}.tar", tar_of(pictures))
    for source in (tmp_path / "a" / "whole.tar", tmp_path / "b"):
        here, there = tars.read(origin(source)), tars.read(origin(source, spread=elsewhere))
        assert (here.root, here.files, here.table, here.classes) == (
            there.root,
            there.files,
            there.table,
            there.classes,
        )
    assert len(asked) == 4


def test_every_class_has_the_number_that_the_class_list_gives_it(tmp_path: Path) -> None:
    (tmp_path / "whole.tar").write_bytes(outer_of(class_tars()))
    given = ("n03", "n09", "n02", "n01")
    found = tars.read(origin(tmp_path / "whole.tar", classes=given))
    assert found.classes == given and contents(found) == expected(class_tars())
    with pytest.raises(ValueError, match=r"whole\.tar has 1 classes that the class list of 2 does not have: n02"):
        tars.read(origin(tmp_path / "whole.tar", classes=("n01", "n03")))


# compressed


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ends of the names of what is decompressed from now on."""
    found: list[str] = []

    def noting(suffix: str, opener: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def note(raw: Any) -> Any:
            found.append(suffix)
            return opener(raw)

        return note

    openers = {suffix: noting(suffix, opener) for suffix, opener in unpacking.OPENERS.items()}
    monkeypatch.setattr(unpacking, "OPENERS", openers)
    return found


@pytest.mark.parametrize("downloads", ["folder", "memory"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_compressed_tar_is_read_once(tmp_path: Path, monkeypatch, suffix: str, downloads: str) -> None:
    reads = opened(monkeypatch)
    source = tmp_path / f"whole{suffix}"
    source.write_bytes(COMPRESS[suffix](outer_of(class_tars(), "inside/")))
    kept = tmp_path / "kept" if downloads == "folder" else f"memory://{uuid4().hex}"
    found = tars.read(origin(source, kept))
    assert contents(found) == expected(class_tars()) and found.root == f"{Folder(str(kept)).absolute}/whole"
    source.unlink()
    again = tars.read(origin(source, kept))
    assert again.table == found.table and reads == [suffix]
    there = set((Folder(str(kept)) / "whole").sizes()) - {".lock"}
    assert there == {"n01.tar", "n02.tar", "n03.tar", "unpacked.json", "source.json"}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_tar_of_class_folders_is_read_as_if_it_were_plain(tmp_path: Path, suffix: str) -> None:
    members = {f"{wnid}/{name}": data for wnid, each in class_tars().items() for name, data in each.items()}
    data = tar_of({"readme.txt": b"no picture", **members})
    (tmp_path / "whole.tar").write_bytes(data)
    (tmp_path / f"whole{suffix}").write_bytes(COMPRESS[suffix](data))
    plain, packed = (tars.read(origin(tmp_path / name, tmp_path / "kept")) for name in ("whole.tar", f"whole{suffix}"))
    assert contents(packed) == contents(plain) == expected(class_tars()) and packed.classes == plain.classes
    assert (tmp_path / "kept" / "whole" / "whole.tar").is_file()


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_whatever_a_killed_pass_had_made_is_not_made_again(tmp_path: Path, monkeypatch, killed_at: int) -> None:
    source, making, made = tmp_path / "whole.tar.gz", Folder.making, []
    source.write_bytes(gzip.compress(outer_of(class_tars())))

    @contextmanager
    def killing(folder: Folder, name: str) -> Iterator[Path]:
        with making(folder, name) as path:
            yield path
            if len(made) == killed_at:
                raise KeyboardInterrupt
        made.append(name)

    monkeypatch.setattr(Folder, "making", killing)
    with pytest.raises(KeyboardInterrupt):
        tars.read(origin(source, tmp_path))
    assert not (tmp_path / "whole" / "unpacked.json").exists()
    killed_at = -1
    assert contents(tars.read(origin(source, tmp_path))) == expected(class_tars())
    assert sorted(made) == ["n01.tar", "n02.tar", "n03.tar"]


def test_a_compressed_tar_is_read_once_whoever_asks_at_the_same_time(tmp_path: Path, monkeypatch) -> None:
    reads = opened(monkeypatch)
    (tmp_path / "whole.tgz").write_bytes(gzip.compress(outer_of(class_tars())))
    with ThreadPoolExecutor(4) as several:
        found = list(several.map(tars.read, [origin(tmp_path / "whole.tgz", tmp_path)] * 4))
    assert reads == [".tgz"] and all(contents(each) == expected(class_tars()) for each in found)


def test_what_was_lost_of_what_was_unpacked_is_unpacked_again(tmp_path: Path) -> None:
    source = tmp_path / "whole.tar.gz"
    source.write_bytes(gzip.compress(outer_of(class_tars())))
    tars.read(origin(source, tmp_path))
    (tmp_path / "whole" / "n02.tar").write_bytes(b"")
    assert contents(tars.read(origin(source, tmp_path))) == expected(class_tars())


def test_another_source_of_the_same_name_is_not_taken_for_what_was_unpacked(tmp_path: Path) -> None:
    source = tmp_path / "whole.tar.gz"
    source.write_bytes(gzip.compress(outer_of(class_tars())))
    tars.read(origin(source, tmp_path))
    source.write_bytes(gzip.compress(outer_of({"n07": {"n07_1.JPEG": b"7"}})))
    with pytest.raises(ValueError, match=r"/whole was unpacked from a source of .* bytes, .*remove that folder"):
        tars.read(origin(source, tmp_path))


def test_a_compressed_tar_with_a_wrong_checksum_leaves_nothing_of_it(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(outer_of(class_tars()) + bytes(1 << 16)))
    data[-6] ^= 1
    (tmp_path / "whole.tar.gz").write_bytes(data)
    for keep_sound in (False, True):
        with pytest.raises(ValueError, match=r"whole\.tar\.gz is damaged, and nothing of it can be trusted"):
            tars.read(origin(tmp_path / "whole.tar.gz", tmp_path, keep_sound=keep_sound))
        assert not list((tmp_path / "whole").glob("*.tar"))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_every_cut_compressed_tar_is_refused_or_taken_up_to_the_cut(tmp_path: Path, suffix: str, share: float) -> None:
    told, data = [], COMPRESS[suffix](outer_of(class_tars()))
    source = tmp_path / f"whole{suffix}"
    source.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(
        ValueError, match=rf"whole{suffix} is broken at byte [\d,]+ of what it unpacks to: .*keep-sound"
    ):
        tars.read(origin(source, tmp_path))
    assert not (tmp_path / "whole" / "unpacked.json").exists()
    try:
        found = contents(tars.read(origin(source, tmp_path, keep_sound=True, say=told.append)))
    except ValueError as error:  # the cut was before the first picture
        assert share < 0.5 and "neither tars nor pictures" in str(error)
        return
    assert found.items() <= expected(class_tars()).items() and len(found) >= 5 * (share > 0.9)
    assert any("is broken at byte" in line for line in told)
    with pytest.raises(ValueError, match="is broken at byte"):
        tars.read(origin(source, tmp_path))


# damaged and odd sources


def test_a_broken_class_tar_is_named_with_its_offset_or_taken_up_to_it(tmp_path: Path) -> None:
    whole, told = class_tars(), []
    for wnid, pictures in whole.items():
        (tmp_path / f"{wnid}.tar").write_bytes(tar_of(pictures))
    data = bytearray((tmp_path / "n02.tar").read_bytes())
    place = data.index(b"n02_2.JPEG")
    data[place + 100] ^= 1
    (tmp_path / "n02.tar").write_bytes(data)
    line = f"{tmp_path}/n02.tar is broken at byte {place:,}: "
    with pytest.raises(ValueError, match=line):
        tars.read(origin(tmp_path))
    found = tars.read(origin(tmp_path, keep_sound=True, say=told.append))
    whole["n02"] = dict(list(whole["n02"].items())[:2])
    assert contents(found) == expected(whole) and len(told) == 1 and told[0].startswith(line)


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_tar_of_tars_is_taken_up_to_every_cut_with_one_line(tmp_path: Path, where: str) -> None:
    url = str(tmp_path) if where == "folder" else f"memory://{uuid4().hex}"
    data, told = outer_of(class_tars()), []
    whole = expected(class_tars())
    ends = {name: data.index(picture) + len(picture) for name, (_, picture) in whole.items() if len(picture) > 99}
    for cut in range(4000, len(data) - 10240, 1777):
        Folder(url).write("whole.tar", data[:cut])
        with pytest.raises(ValueError, match=r"whole\.tar is broken at byte [\d,]+: .*everything before it is sound"):
            tars.read(origin(f"{url}/whole.tar"))
        told.clear()
        found = contents(tars.read(origin(f"{url}/whole.tar", keep_sound=True, say=told.append)))
        assert len(told) == 1 and "whole.tar" in told[0] and "is broken at byte" in told[0]
        assert {name for name in found if name in ends} == {name for name, end in ends.items() if end <= cut}
        assert found.items() <= whole.items()


def test_a_fault_in_an_inner_tar_is_named_by_its_offset_in_the_outer_one(tmp_path: Path) -> None:
    data, told = bytearray(outer_of(class_tars())), []
    place = data.index(b"n01_3.JPEG")
    data[place + 5] ^= 1
    (tmp_path / "whole.tar").write_bytes(data)
    line = rf"whole\.tar \(n01\.tar inside\) is broken at byte {place:,}: "
    with pytest.raises(ValueError, match=line):
        tars.read(origin(tmp_path / "whole.tar"))
    found = contents(tars.read(origin(tmp_path / "whole.tar", keep_sound=True, say=told.append)))
    assert set(expected(class_tars())) - set(found) == {"n01_3", "n01_4"} and len(told) == 1


@pytest.mark.parametrize(
    ("files", "source", "error", "words"),
    [
        ({}, "nowhere", FileNotFoundError, "nowhere does not exist"),
        ({}, "nowhere.tar", FileNotFoundError, r"nowhere\.tar does not exist"),
        ({}, "nowhere.tar.gz", FileNotFoundError, r"nowhere\.tar\.gz does not exist"),
        ({"d/readme": b""}, "d", ValueError, "d holds no tars: there are 1 other files"),
        ({"a.tar": b""}, "a.tar", ValueError, r"a\.tar is broken at byte 0: it is cut short"),
        ({"a.tar": tar_of({})}, "a.tar", ValueError, r"a\.tar holds no picture"),
        ({"a.tar": tar_of({"c/x.txt": b"x"})}, "a.tar", ValueError, r"a\.tar holds no picture"),
        ({"a.tar": tar_of({"x.jpg": b"x"})}, "a.tar", ValueError, r"a\.tar has pictures of no class"),
        ({"a.tar": outer_of({"n1": {"x": b""}})}, "a.tar", ValueError, r"n1\.tar inside\) holds no picture"),
        ({"d/n1.tar": tar_of({"x.jpg": b"x"}), "d/n2.tar": tar_of({})}, "d", ValueError, r"n2\.tar holds no picture"),
        ({"a.tgz": gzip.compress(tar_of({"x": b""}))}, "a.tgz", ValueError, r"a\.tgz holds neither tars nor pictures"),
        ({"a.tgz": b"<html>"}, "a.tgz", ValueError, r"a\.tgz is broken at byte 0 "),
        (
            {"a.tgz": gzip.compress(tar_of({"t/n1.tar": tar_of({}), "v/n1.tar": tar_of({})}))},
            "a.tgz",
            ValueError,
            r"two tars named n1\.tar",
        ),
    ],
)
def test_every_unusable_source_is_refused_in_one_line(tmp_path: Path, files, source: str, error, words: str) -> None:
    for name, data in files.items():
        Folder(str(tmp_path)).write(name, data)
    with pytest.raises(error, match=words) as raised:
        tars.read(origin(tmp_path / source, tmp_path / "kept"))
    assert "\n" not in str(raised.value)


def test_pictures_beside_class_tars_are_left_out_and_told_of(tmp_path: Path) -> None:
    inner = {f"{wnid}.tar": tar_of(pictures) for wnid, pictures in class_tars().items()}
    (tmp_path / "whole.tar").write_bytes(tar_of({"a/x.jpg": b"x", **inner}))
    told: list[str] = []
    assert contents(tars.read(origin(tmp_path / "whole.tar", say=told.append))) == expected(class_tars())
    assert told == [f"{tmp_path}/whole.tar: 1 pictures beside the class tars are left out"]


# ImageNet

WNIDS = ("n03", "n01", "n02")  # of the IDs 1, 2, 3
TRUTH = (3, 1, 2, 2, 1)


def devkit_files(wnids: tuple[str, ...] = WNIDS, truth: tuple[object, ...] = TRUTH) -> dict[str, bytes]:
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    leaves = [(float(number), wnid, "words", 0.0) for number, wnid in enumerate(wnids, 1)]
    synsets = np.array([*leaves, (float(len(wnids) + 1), "n00", "a synset above", 3.0)], kinds)[:, None]
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    lines = "".join(f"{each}\n" for each in truth).encode()
    return {"meta.mat": file.getvalue(), "ILSVRC2012_validation_ground_truth.txt": lines}


def put_devkit(folder: Path, files: dict[str, bytes], packed: bool = True) -> None:
    named = {f"{imagenet1k.DEVKIT}/data/{name}": data for name, data in files.items()}
    if packed:
        (folder / f"{imagenet1k.DEVKIT}.tar.gz").write_bytes(gzip.compress(tar_of(named)))
    else:
        for name, data in named.items():
            Folder(str(folder)).write(name, data)


def put_validation(folder: Path, numbers: Iterable[int], inside: str = "") -> None:
    pictures = {f"{inside}ILSVRC2012_val_{number:08}.JPEG": noise(number) for number in numbers}
    (folder / imagenet1k.VALIDATION).write_bytes(tar_of(pictures))


def small(dataset: Dataset, classes: int, **splits: int) -> Dataset:
    return replace(dataset, classes=classes, splits=splits)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inside", ["", "val/"])
def test_every_validation_picture_has_the_class_of_the_devkit(tmp_path: Path, packed: bool, inside: str) -> None:
    put_devkit(tmp_path, devkit_files(), packed)
    put_validation(tmp_path, (2, 5, 1, 4, 3), inside)
    found = small(imagenet1k.DATASET, 3, val=5).pictures("val", origin(tmp_path))
    assert isinstance(found, Ranges) and found.classes == ("n01", "n02", "n03")
    wanted = {f"ILSVRC2012_val_{n:08}": (WNIDS[each - 1], noise(n)) for n, each in enumerate(TRUTH, 1)}
    assert contents(found) == wanted and list(contents(found)) == sorted(wanted)
    given = imagenet1k.validation(origin(tmp_path, classes=WNIDS))
    assert given.classes == WNIDS and contents(given) == wanted


def test_every_training_picture_of_imagenet_has_the_same_class_as_for_validation(tmp_path: Path) -> None:
    put_devkit(tmp_path, devkit_files())
    put_validation(tmp_path, range(1, 6))
    (tmp_path / imagenet1k.TRAIN).write_bytes(outer_of(class_tars()))
    dataset = small(imagenet1k.DATASET, 3, train=15, val=5)
    train, val = (dataset.pictures(split, origin(tmp_path)) for split in ("train", "val"))
    assert isinstance(train, Ranges) and contents(train) == expected(class_tars()) and train.classes == val.classes
    with pytest.raises(ValueError, match="imagenet1k/train has 15 pictures, 1,281,167 expected"):
        imagenet1k.DATASET.pictures("train", origin(tmp_path))


@pytest.mark.parametrize(
    ("files", "numbers", "words"),
    [
        (devkit_files(truth=(3, 1, 4, 2, 1)), range(1, 6), r"ground_truth\.txt, line 3: '4' is no ID from 1 to 3"),
        (devkit_files(truth=(3, "x", 2)), range(1, 4), "line 2: 'x' is no ID"),
        (devkit_files(truth=(3, 1)), range(1, 4), "picture 3 has no class; the devkit has 2"),
        (devkit_files(wnids=("n1", "n1", "n2")), range(1, 6), "the IDs of its 3 classes are not the numbers from 1"),
        ({**devkit_files(), "meta.mat": b"x" * 200}, range(1, 6), r"meta\.mat is damaged"),
        ({"meta.mat": devkit_files()["meta.mat"]}, range(1, 6), r"t12\.tar\.gz is damaged, or no devkit"),
        (devkit_files(), [], "it holds no picture"),
        (devkit_files(), [0, 1], "or one of number 0"),
    ],
)
def test_every_devkit_that_does_not_fit_is_refused(tmp_path: Path, files, numbers, words: str) -> None:
    put_devkit(tmp_path, files)
    put_validation(tmp_path, numbers)
    with pytest.raises(ValueError, match=words):
        imagenet1k.validation(origin(tmp_path))


def test_validation_pictures_without_a_devkit_or_of_other_names_are_refused(tmp_path: Path) -> None:
    put_validation(tmp_path, range(1, 6))
    with pytest.raises(FileNotFoundError, match=r"holds neither ILSVRC2012_devkit_t12\.tar\.gz nor"):
        imagenet1k.validation(origin(tmp_path))
    put_devkit(tmp_path, devkit_files())
    (tmp_path / imagenet1k.VALIDATION).write_bytes(tar_of({"cat.jpg": b"x"}))
    with pytest.raises(ValueError, match="its picture cat is not named ILSVRC2012_val_00000001"):
        imagenet1k.validation(origin(tmp_path))


@pytest.fixture(scope="module")
def winter21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("winter21")
    for wnid, count in {"n01": 499, "n02": 500, "n03": 7, "n04": 560}.items():
        (folder / f"{wnid}.tar").write_bytes(tar_of({f"{wnid}_{n}.JPEG": b"%d" % n for n in range(count)}))
    return folder


def processed(split: str, folder: Path) -> dict[str, tuple[str, bytes]]:
    dataset = small(imagenet21k.DATASETS[2], 2, train=960, val=100)
    found = dataset.pictures(split, origin(folder))
    assert isinstance(found, Ranges) and found.classes == ("n02", "n04")
    return contents(found)


def test_every_common_class_of_imagenet21k_is_kept_and_fifty_pictures_of_it_held_out(winter21: Path) -> None:
    train, val = processed("train", winter21), processed("val", winter21)
    assert not train.keys() & val.keys()
    for wnid, count in {"n02": 500, "n04": 560}.items():
        assert sum(name == wnid for name, _ in val.values()) == 50
        assert {key for key, (name, _) in {**train, **val}.items() if name == wnid} == {
            f"{wnid}_{n}" for n in range(count)
        }


def test_the_same_pictures_are_held_out_whatever_the_order_of_the_tar(winter21: Path, tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(range(560), 560)
    (tmp_path / "n04.tar").write_bytes(tar_of({f"n04_{n}.JPEG": b"%d" % n for n in shuffled}))
    dataset = small(imagenet21k.DATASETS[2], 1, val=50)
    found = dataset.pictures("val", origin(tmp_path))
    assert isinstance(found, Ranges)
    assert contents(found).items() <= processed("val", winter21).items()


def test_every_release_of_imagenet21k_has_its_published_size() -> None:
    sizes = {each.name: (each.classes, dict(each.splits)) for each in imagenet21k.DATASETS}
    assert sizes == {
        "imagenet21k": (19_167, {"train": 13_153_500}),
        "imagenet21k_fall11": (21_841, {"train": 14_197_122}),
        "imagenet21k_processed": (10_450, {"train": 11_060_223, "val": 10_450 * imagenet21k.HELD_OUT}),
    }


def real_json(first: list[Any]) -> bytes:
    return json.dumps([*first, *([0] for _ in range(50_000 - len(first)))]).encode()


@pytest.mark.parametrize("with_devkit", [True, False])
def test_every_picture_with_reassessed_labels_has_all_of_them(tmp_path: Path, with_devkit: bool) -> None:
    labels = [[2], [], [1, 0], [0, 1, 2], []]
    put_validation(tmp_path, (3, 1, 5, 2, 4))
    (tmp_path / "real.json").write_bytes(real_json(labels))
    if with_devkit:
        put_devkit(tmp_path, devkit_files())
    found = small(imagenet_real.DATASET, 3, val=3).pictures("val", origin(tmp_path))
    assert isinstance(found, Ranges) and found.classes == (("n01", "n02", "n03") if with_devkit else ())
    rows = [(row["key"], row["labels"], at(found, n)) for n, row in enumerate(found.table.to_pylist())]
    assert rows == [(f"ILSVRC2012_val_{n:08}", labels[n - 1], noise(n)) for n in (1, 3, 4)]


@pytest.mark.slow
@given(labels=some.lists(some.lists(some.integers(0, 999), unique=True, max_size=3), max_size=20))
@settings(max_examples=5, deadline=None)
def test_every_list_of_labels_is_read_back(labels: list[list[int]]) -> None:
    assert imagenet_real.parse(real_json(labels))[: len(labels)] == tuple(map(tuple, labels))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "is no JSON"),
        (b"{}", "holds dict"),
        (b"[[1], [2]]", "should hold 50,000 lists of labels, and holds 2"),
        (real_json([[1], [1000]]), r"\[1000\] of picture 2 are no labels from 0 to 999"),
        (real_json([[-1]]), "of picture 1 are no labels"),
        (real_json([[True]]), "of picture 1 are no labels"),
        (real_json([[1, 1]]), "of picture 1 are no labels"),
        (real_json([3]), "3 of picture 1 are no labels"),
    ],
)
def test_every_wrong_list_of_labels_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=rf"real\.json.*{words}"):
        imagenet_real.parse(data)
