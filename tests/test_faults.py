"""Laws of stores that go wrong: a fault that passes costs time, never data; what never passes is one line."""

import asyncio
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast
from urllib.parse import quote

import pytest
import s3fs
from aiohttp import web
from botocore.awsrequest import AWSPreparedRequest, HTTPHeaders
from botocore.exceptions import ClientError
from hypothesis import given, settings
from hypothesis import strategies as some

from shards import remote, retry
from shards.storage import Folder
from tests.faults import Asked, Fault, Faults, fits, proxy

pytestmark = pytest.mark.timeout(60)

DATA = bytes(range(256)) * 40
PASSING = (
    *(Fault.SLOW_DOWN, Fault.INTERNAL, Fault.EXPIRED),
    *(Fault.TRUNCATED, Fault.HANG, Fault.RESET, Fault.LOST),
)
Faulty = tuple[str, Faults]


def fill(folder: Folder) -> Folder:
    for name, data in {"x": DATA, "deep/er": b"1", "deep/est/y": b"22"}.items():
        folder.write(name, data)
    return folder


def contents(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read(name) for name, _ in folder.find()}


def make(folder: Folder, here: Path) -> None:
    with folder.making("made/here") as path:
        path.write_bytes(DATA)


def open_and_read(folder: Folder, here: Path) -> tuple[bytes, ...]:
    with folder.reading("x") as file:
        return file.read(5), file.seek(-7, os.SEEK_END).to_bytes(8, "big"), file.read()


def get(folder: Folder, here: Path) -> bytes:
    folder.get("x", here / "got")
    return (here / "got").read_bytes()


def fetch(folder: Folder, here: Path) -> tuple[str, bytes]:
    (here / "fetched").write_bytes(DATA * 2)
    return folder.fetch("x", here / "fetched"), (here / "fetched").read_bytes()


def copy(folder: Folder, here: Path) -> None:
    (here / "local").write_bytes(DATA * 2)
    folder.put(here / "local", "x")


def remove_folder(folder: Folder, here: Path) -> tuple[bool, list[str]]:
    folder.remove("deep")
    return folder.exists("deep"), folder.folders()


# What is done, and the methods of its requests.
OPERATIONS: dict[str, tuple[str, Callable[[Folder, Path], object]]] = {
    "read": ("GET", lambda folder, _: folder.read("x")),
    "slice": ("GET HEAD", lambda folder, _: [folder.read("x", *ends) for ends in ((3, 500), (-9, None), (9, 1 << 30))]),
    "ranges": ("GET", lambda folder, _: folder.ranges([("x", 1, 9), ("deep/er", 0, -1), ("x", 5, 10_000)])),
    "reading": ("GET HEAD", open_and_read),
    "exists": ("GET HEAD", lambda folder, _: [folder.exists(name) for name in ("x", "deep", "nothing")]),
    "size": ("GET HEAD", lambda folder, _: [folder.size(name) for name in ("x", "deep", "nothing")]),
    "sizes": ("GET", lambda folder, _: folder.sizes()),
    "folders": ("GET", lambda folder, _: folder.folders()),
    "find": ("GET", lambda folder, _: sorted(folder.find())),
    "get": ("GET HEAD", get),
    "fetch": ("GET HEAD", fetch),
    "write": ("PUT", lambda folder, _: folder.write("x", b"other")),
    "create": ("PUT", lambda folder, _: folder.create("new", DATA)),
    "create in vain": ("PUT HEAD", lambda folder, _: folder.create("x", DATA)),
    "put": ("PUT HEAD", copy),
    "making": ("PUT HEAD", make),
    "remove a file": ("HEAD POST", lambda folder, _: folder.remove("x")),
    "remove a folder": ("GET HEAD POST", remove_folder),
}  # fmt: skip


def every_fault() -> Iterator[Any]:
    for operation, (methods, _) in OPERATIONS.items():
        for fault in PASSING:
            if any(fits(fault, method) for method in methods.split()):
                yield pytest.param(operation, fault, id=f"{operation}-{fault.name}")


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "fault"), list(every_fault()))
def test_a_fault_that_passes_costs_time_and_never_data(
    operation: str, fault: Fault, faulty: Faulty, tmp_path: Path
) -> None:
    url, faults = faulty
    act, burst = OPERATIONS[operation][1], [fault] * (2 if fault in (Fault.SLOW_DOWN, Fault.LOST) else 1)
    local, store = fill(Folder(str(tmp_path / "folder"))), fill(Folder(url))
    faults.script(*burst)
    assert act(store, tmp_path) == act(local, tmp_path)
    assert faults.injected[fault] >= 1
    faults.calm()
    assert contents(store) == contents(local)


@pytest.mark.parametrize("operation", ["slice", "ranges", "reading", "get", "fetch"])
def test_an_answer_that_lacks_bytes_is_asked_for_again_whatever_length_it_tells(
    operation: str, faulty: Faulty, tmp_path: Path
) -> None:
    url, faults = faulty
    local, store = fill(Folder(str(tmp_path / "folder"))), fill(Folder(url))
    faults.script(Fault.SHORT)
    assert OPERATIONS[operation][1](store, tmp_path) == OPERATIONS[operation][1](local, tmp_path)
    assert faults.injected[Fault.SHORT] == 1


@pytest.mark.parametrize("operation", ["put", "making"])
def test_a_file_that_a_store_says_it_has_taken_is_there(operation: str, faulty: Faulty, tmp_path: Path) -> None:
    url, faults = faulty
    local, store = fill(Folder(str(tmp_path / "folder"))), fill(Folder(url))
    faults.script(Fault.FORGOTTEN)
    OPERATIONS[operation][1](store, tmp_path)
    OPERATIONS[operation][1](local, tmp_path)
    assert contents(store) == contents(local) and faults.injected[Fault.FORGOTTEN] == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_whatever_goes_wrong_by_chance_a_bucket_ends_as_if_it_were_a_folder(
    seed: int, faulty: Faulty, tmp_path: Path
) -> None:
    url, faults = faulty
    soon = tuple(fault for fault in PASSING if fault is not Fault.HANG)
    local, store = Folder(str(tmp_path / "folder")), Folder(url)
    faults.chance(0.3, seed, soon)
    fill(local)
    fill(store)
    for _, act in OPERATIONS.values():
        assert act(store, tmp_path) == act(local, tmp_path)
    assert contents(store) == contents(local)
    assert len(faults.injected) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.LOST, Fault.TRUNCATED, Fault.SLOW_DOWN, Fault.RESET])
def test_every_part_of_a_large_file_arrives(
    fault: Fault, faulty: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, faults = faulty
    for name in ("PART", "STREAMED", "RANGE"):
        monkeypatch.setattr(remote, name, 5 << 20)  # the least that S3 takes
    data = os.urandom(11 << 20)
    (tmp_path / "large").write_bytes(data)
    last = iter(range(4))  # the completion of the upload, or a part of the download that is not the first
    faults.choose(lambda asked: fault if fits(fault, asked.method) and _of_part(asked) and next(last, 0) == 1 else None)
    Folder(url).put(tmp_path / "large", "large")
    assert Folder(url).fetch("large", tmp_path / "back") == sha256(data).hexdigest()
    assert faults.injected[fault] == 1
    assert any("partNumber=3" in asked.path for asked in faults.asked)
    assert (tmp_path / "back").read_bytes() == data and Folder(url).sizes() == {"large": len(data)}


def _of_part(asked: Asked) -> bool:
    return asked.method == "POST" or "range: bytes" in asked.headers.lower()


@pytest.mark.parametrize("requests", [1, 3])
def test_of_all_who_create_equal_files_one_is_told_that_it_did_whatever_answers_are_lost(
    requests: int, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, faults = faulty
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(first=0.01, silence=2, requests=requests))
    faults.chance(0.5, 1, [Fault.LOST, Fault.RESET])
    for name in ("a", "b", "c"):
        with ThreadPoolExecutor(4) as pool:
            told = list(pool.map(lambda _, name=name: Folder(url).create(name, b"equal"), range(4)))
        assert sum(told) == 1
    assert faults.injected[Fault.LOST] > 0


def test_credentials_that_expire_are_renewed_as_if_they_had_not(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    url, faults = faulty
    fill(Folder(url))
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "old")

    def expired(asked: Asked) -> Fault | None:
        if faults.injected[Fault.EXPIRED] == 3:
            os.environ["AWS_ACCESS_KEY_ID"] = "key"
        return Fault.EXPIRED if "Credential=old/" in asked.headers else None

    faults.choose(expired)
    folder = Folder(url)
    assert (folder.size("x"), folder.read("x")) == (len(DATA), DATA)
    assert faults.injected[Fault.EXPIRED] >= 3


def test_credentials_that_expire_while_a_file_comes_are_renewed_as_if_they_had_not(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch, forgetful: None, tmp_path: Path
) -> None:
    url, faults = faulty
    store = fill(Folder(url))

    def expired(asked: Asked) -> Fault | None:
        if asked.method == "HEAD" or faults.injected[Fault.EXPIRED] == 2:
            return None
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key" if faults.injected[Fault.EXPIRED] else "other")
        return Fault.EXPIRED

    faults.choose(expired)
    assert store.fetch("x", tmp_path / "x") == sha256(DATA).hexdigest()
    keys = [re.search("Credential=([a-z]+)/", asked.headers) for asked in faults.asked]
    assert [key and key[1] for key in keys] == ["key", "key", "other", "key"]


def test_keys_of_a_profile_that_renews_itself_are_new_for_every_request(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch, forgetful: None, tmp_path: Path
) -> None:
    url, _ = faulty
    fill(Folder(url))
    s3fs.S3FileSystem.clear_instance_cache()
    soon = (datetime.now(UTC) + timedelta(minutes=2)).isoformat()  # botocore asks anew ten minutes before
    keys = {"Version": 1, "AccessKeyId": "key", "SecretAccessKey": "secret", "Expiration": soon}
    (tmp_path / "keys").write_text(json.dumps(keys))
    asks = f"sh -c 'echo >> {tmp_path}/asked; cat {tmp_path}/keys'"
    (tmp_path / "config").write_text(f"[profile renewing]\ncredential_process = {asks}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "renewing")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = Folder(url)
    for times in (1, 2):
        assert store.fetch("x", tmp_path / "x") == sha256(DATA).hexdigest()
        assert len((tmp_path / "asked").read_text().splitlines()) >= 2 * times


# files that come whole


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("fault", [*(fault for fault in PASSING if fits(fault, "GET")), Fault.SHORT])
def test_every_fault_of_the_bytes_themselves_costs_time_and_never_data(
    fault: Fault, ranges: bool, faulty: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, faults = faulty
    monkeypatch.setattr(remote, "STREAMED", 0 if ranges else 1 << 20)
    store = fill(Folder(url))
    faults.choose(lambda asked: fault if asked.method == "GET" and not faults.injected[fault] else None)
    assert fetch(store, tmp_path) == (sha256(DATA).hexdigest(), DATA)
    assert faults.injected[fault] == 1


@pytest.mark.parametrize("requests", [1, 2])
@pytest.mark.parametrize("fault", [Fault.HANG, Fault.RESET, Fault.INTERNAL])
def test_no_more_is_asked_of_a_store_that_fails_than_patience_says(
    fault: Fault, requests: int, faulty: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    url, faults = faulty
    patience = retry.Patience(seconds=1e-9, first=0.01, silence=0.2, requests=requests)
    monkeypatch.setattr(retry, "PATIENCE", patience)
    store = fill(Folder(url))
    faults.choose(lambda asked: fault if asked.method == "GET" else None)
    with pytest.raises(OSError) as raised:
        store.fetch("x", tmp_path / "x")
    one_line(raised.value, f"{url}/x cannot be reached", "(3 tries)")
    assert faults.injected[fault] == 3 * requests and not (tmp_path / "x").exists()


def test_what_is_fetched_is_on_the_disk_whole_whatever_the_store(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write("x", DATA)
    synced: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_ino, os.fstat(file).st_size)))
    folder.fetch("x", tmp_path / "x")
    assert synced == [((tmp_path / "x").stat().st_ino, len(DATA))]


def test_a_file_that_is_cut_off_comes_from_where_it_was(faulty: Faulty, tmp_path: Path) -> None:
    url, faults = faulty
    data, store = os.urandom(5 << 20), Folder(url)
    store.write("x", data)
    faults.script(Fault.TRUNCATED, Fault.TRUNCATED)
    assert store.fetch("x", tmp_path / "x") == sha256(data).hexdigest()
    assert (tmp_path / "x").read_bytes() == data and faults.injected[Fault.TRUNCATED] == 2
    found = [re.search(r"range: bytes=(\d+)-", asked.headers.lower()) for asked in faults.asked]
    starts = [int(each[1]) for each in found if each]
    assert starts == sorted(set(starts)) and len(starts) == 3 and starts[1] >= 1 << 20


@pytest.mark.parametrize("ranges", [False, True])
def test_a_file_that_is_replaced_while_it_comes_is_never_a_mixture(
    ranges: bool, faulty: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, faults = faulty
    before, after, store = os.urandom(4 << 20), os.urandom(4 << 20), Folder(url)
    monkeypatch.setattr(remote, "STREAMED", 0 if ranges else 4 << 20)
    monkeypatch.setattr(remote, "RANGE", 1 << 20)
    store.write("x", before)
    some_came, replaced = threading.Event(), threading.Event()

    def choice(asked: Asked) -> Fault | None:
        if asked.method != "GET" or replaced.is_set():
            return None
        first = not some_came.is_set()
        some_came.set()
        return (None if ranges else Fault.TRUNCATED) if first else Fault.RESET

    def replace() -> None:
        assert some_came.wait(20)
        store.write("x", after)
        replaced.set()

    faults.choose(choice)
    writer = threading.Thread(target=replace)
    writer.start()
    digest = store.fetch("x", tmp_path / "x")
    writer.join()
    assert (tmp_path / "x").read_bytes() == after and digest == sha256(after).hexdigest()


@pytest.mark.parametrize("tag", ["", 'W/"weak"', '"other"'])
def test_a_file_comes_whatever_its_tag(tag: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = fill(Folder(s3)), remote._asked

    async def other(*words: Any) -> Any:
        info, sent = await asked(*words)
        return {**info, "ETag": tag}, sent

    monkeypatch.setattr(remote, "_asked", other)
    assert store.fetch("x", tmp_path / "x") == sha256(DATA).hexdigest()


NAMES = ["a b+c%20~.tar", "dé/日本", "x#?*&=;@:$!'()"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_every_name_is_fetched(name: str, folder: Folder, tmp_path: Path) -> None:
    folder.write(name, DATA)
    assert folder.fetch(name, tmp_path / "x") == sha256(DATA).hexdigest() and (tmp_path / "x").read_bytes() == DATA


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (3 << 20) + 1])
def test_every_file_is_fetched_with_its_digest_whatever_its_size_and_the_store(
    size: int, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STREAMED", 2 << 20)
    monkeypatch.setattr(remote, "RANGE", 300_001)
    data = os.urandom(size)
    for url in (str(tmp_path / "a"), s3, f"memory://{tmp_path.name}"):
        Folder(url).write("x", data)
        with ThreadPoolExecutor(4) as pool:
            places = [tmp_path / "to" / str(number) for number in range(4)]
            folder = Folder(url)
            assert set(pool.map(lambda to, folder=folder: folder.fetch("x", to), places)) == {sha256(data).hexdigest()}
        assert {place.read_bytes() for place in places} == {data}


@pytest.mark.parametrize("kind", ["folder", "bucket", "memory"])
def test_what_cannot_be_fetched_leaves_no_file_and_names_the_whole_url(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = {"folder": f"{tmp_path}/a", "memory": f"memory://{tmp_path.name}"}
    folder = Folder(place.get(kind) or request.getfixturevalue("s3"))
    for target in (tmp_path / "new", tmp_path / "old"):
        (tmp_path / "old").write_bytes(b"1")
        with pytest.raises(FileNotFoundError) as raised:
            folder.fetch("x", target)
        one_line(raised.value, f"{folder.absolute}/x does not exist")
        assert not target.exists()


@pytest.mark.parametrize("ranges", [False, True])
def test_every_disk_that_takes_no_more_is_named(
    ranges: bool, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STREAMED", 0 if ranges else 4 << 20)
    folder.write("x", bytes(3 << 20))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, before[1]))
    try:
        with pytest.raises(OSError) as raised:
            folder.fetch("x", tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    one_line(raised.value, "File too large", f"{tmp_path}/x")
    assert not (tmp_path / "x").exists()


def test_a_forked_process_fetches_as_if_it_were_the_first(s3: str, tmp_path: Path) -> None:
    Folder(s3).write("x", DATA)
    Folder(s3).fetch("x", tmp_path / "x")
    child = multiprocessing.get_context("fork").Process(target=_fetch_again, args=(s3, tmp_path / "again"))
    child.start()
    child.join(20)
    child.kill()
    assert child.exitcode == 0 and (tmp_path / "again").read_bytes() == DATA


def _fetch_again(url: str, target: Path) -> None:
    assert Folder(url).fetch("x", target) == sha256(DATA).hexdigest()


WORD = some.text(some.characters(codec="utf-8"), min_size=1).filter(lambda part: "/" not in part)
PART_OF_KEY = WORD | some.sampled_from([".", ".."])


@given(
    parts=some.lists(PART_OF_KEY, min_size=1, max_size=3),
    before=some.sampled_from(["http://127.0.0.1:8333/b", "https://b.s3.eu-west-1.amazonaws.com", "https://h/base/b"]),
    signed=some.booleans(),
)
def test_obstore_asks_where_botocore_did_whatever_the_style(parts: list[str], before: str, signed: bool) -> None:
    key, signature = "/".join(parts), "AWS4-HMAC-SHA256 Credential=K/20260101/eu-west-1/s3/aws4_request, SignedHeaders="
    way = remote._way(_asked_by_botocore(f"{before}/{quote(key)}", signature if signed else None), "b", key)
    if {".", ".."} & set(parts):
        assert way is None
    else:
        region = "eu-west-1" if signed else "us-east-1"
        assert way == remote.Way("b", before, region, signed, payer=False)


def test_an_object_with_a_key_of_its_own_is_left_to_s3fs() -> None:
    asked = _asked_by_botocore("http://h/b/x", None)
    assert remote._way(asked, "b", "x") == remote.Way("b", "http://h/b", "us-east-1", signed=False, payer=False)
    asked.headers["X-Amz-Server-Side-Encryption-Customer-Algorithm"] = "AES256"
    assert remote._way(asked, "b", "x") is None


@pytest.mark.parametrize(
    "signature", ["AWS key:signature", "AWS4-ECDSA-P256-SHA256 Credential=K/20260101/s3/aws4_request"]
)
def test_every_signature_that_obstore_cannot_make_is_left_to_s3fs(signature: str) -> None:
    assert remote._way(_asked_by_botocore("http://h/b/x", signature), "b", "x") is None


def _asked_by_botocore(url: str, signature: str | None) -> AWSPreparedRequest:
    headers = HTTPHeaders()
    if signature:
        headers["Authorization"] = signature
    return AWSPreparedRequest("HEAD", url, headers, None, False)


# what never passes


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Whatever a client remembers of its environment is forgotten before the test and after it."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def one_line(error: BaseException, *words: str) -> None:
    assert "\n" not in str(error) and all(word in str(error) for word in words), str(error)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_that_is_not_permitted_is_one_line(operation: str, faulty: Faulty, tmp_path: Path) -> None:
    url, faults = faulty
    faults.always(Fault.DENIED)
    with pytest.raises(PermissionError) as raised:
        OPERATIONS[operation][1](Folder(url), tmp_path)
    one_line(raised.value, "bucket gives no permission to", "(s3:", url, "Access Denied")
    assert len(faults.asked) <= 3  # three ranges at a time; nothing is asked for again


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_in_a_bucket_that_is_not_there_is_one_line(
    operation: str, faulty: Faulty, tmp_path: Path
) -> None:
    url, faults = faulty
    faults.always(Fault.MISSING)
    with pytest.raises(FileNotFoundError) as raised:
        OPERATIONS[operation][1](Folder(url), tmp_path)
    one_line(raised.value, "there is no bucket bucket", url)


def test_a_bucket_that_the_server_does_not_know_is_named(faulty: Faulty) -> None:
    folder = Folder("s3://never-made/deep")
    for act in (
        folder.sizes,
        folder.folders,
        lambda: folder.read("x"),
        lambda: folder.size("x"),
        lambda: [*folder.find()],
    ):
        with pytest.raises(FileNotFoundError) as raised:
            act()
        one_line(raised.value, "there is no bucket never-made: s3://never-made/deep")


@pytest.mark.parametrize(
    ("name", "word"), [("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId"), ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch")]
)
def test_every_wrong_key_is_one_line(
    name: str, word: str, faulty: Faulty, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    url, faults = faulty
    monkeypatch.setenv(name, "wrong")
    folder = Folder(url)
    for act in (folder.sizes, lambda: folder.read("x"), lambda: folder.size("x"), lambda: folder.create("x", b"")):
        faults.calm()
        with pytest.raises(PermissionError) as raised:
            act()
        one_line(raised.value, "the credentials for", url, "are refused", word)
        assert len(faults.asked) <= 2


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.INTERNAL, Fault.RESET, Fault.TRUNCATED])
def test_every_fault_that_stays_is_one_line_in_the_end(
    fault: Fault, faulty: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, faults = faulty
    store = fill(Folder(url))
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(seconds=0, first=0.01))
    faults.always(fault)
    for act in (lambda: store.read("x"), lambda: store.sizes(), lambda: store.fetch("x", tmp_path / "x")):
        with pytest.raises(OSError) as raised:
            act()
        one_line(raised.value, url, "cannot be reached", "(3 tries)")
    assert faults.injected[fault] >= 9 and not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("methods", [("GET", "HEAD"), ("GET",)])
def test_credentials_that_nobody_renews_are_one_line_with_the_way_out(
    methods: tuple[str, ...], faulty: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, faults = faulty
    store = fill(Folder(url))
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(seconds=0, first=0.01))
    faults.choose(lambda asked: Fault.EXPIRED if asked.method in methods else None)
    for act in (lambda: store.read("x"), lambda: store.sizes(), lambda: store.fetch("x", tmp_path / "x")):
        with pytest.raises(PermissionError) as raised:
            act()
        one_line(
            raised.value, f"the credentials for {url}", "have expired", "ExpiredToken", "renews itself", "start again"
        )
    assert faults.injected[Fault.EXPIRED] >= 9 and not (tmp_path / "x").exists()


@given(seconds=some.floats(1e-3, 1e9))
def test_every_store_is_waited_for_as_long_as_is_said(seconds: float) -> None:
    clock = [1.0]

    def attempt() -> None:
        raise ConnectionResetError("gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "PATIENCE", retry.Patience(first=seconds / 10, longest=seconds / 10))
        sleep = lambda pause: clock.append(clock.pop() + pause)  # noqa: E731
        patch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
        retry.wait_for(seconds)
        with pytest.raises(OSError, match="cannot be reached"):
            retry.persist(attempt, "s3://b/x", "read", lambda: None)
    assert 0.8 * seconds <= clock[0] - 1 <= seconds * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_nobody_can_wait_is_refused(seconds: float) -> None:
    before = retry.PATIENCE
    with pytest.raises(ValueError) as raised:
        retry.wait_for(seconds)
    one_line(raised.value, f"{seconds:g}")
    assert retry.PATIENCE is before


@given(passing=some.booleans(), tries=some.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_what_passes_is_tried_again_and_nothing_else_is(passing: bool, tries: int) -> None:
    found: list[int] = []
    error = ConnectionResetError("gone") if passing else KeyError("ours")

    def attempt() -> int:
        found.append(len(found))
        if len(found) < tries:
            raise error
        return 5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "PATIENCE", retry.Patience(first=0))
        if passing or tries == 1:
            assert retry.persist(attempt, "s3://b/x", "read", lambda: None) == 5 and len(found) == tries
        else:
            with pytest.raises(KeyError) as raised:
                retry.persist(attempt, "s3://b/x", "read", lambda: None)
            assert raised.value is error and len(found) == 1


@pytest.mark.parametrize(
    ("passes", "codes"),
    [
        (True, "SlowDown InternalError 503 RequestTimeout ExpiredToken NoSuchUpload ConditionalRequestConflict"),
        (False, "AccessDenied NoSuchKey NoSuchBucket SignatureDoesNotMatch InvalidRange PreconditionFailed 404"),
    ],
)
def test_every_code_of_the_store_is_heard_whatever_it_was_translated_to(codes: str, passes: bool) -> None:
    for code in codes.split():
        error = s3fs.core.translate_boto_error(ClientError({"Error": {"Code": code, "Message": "said"}}, "GetObject"))
        assert retry.code(error) == code and retry.passes(error) is passes


# files that are open, made or taken in parts


STEP = some.tuples(some.integers(-250, 250), some.sampled_from([0, 1, 2]), some.integers(-1, 250))


@given(data=some.binary(max_size=200), size=some.integers(1, 50), steps=some.lists(STEP, max_size=8))
@settings(deadline=None)
def test_an_open_remote_file_is_read_as_if_it_were_in_memory(
    data: bytes, size: int, steps: list[tuple[int, int, int]]
) -> None:
    def follow(file: BinaryIO) -> Iterator[object]:
        for offset, whence, count in steps:
            if offset + {0: 0, 1: file.tell(), 2: len(data)}[whence] >= 0:
                yield file.seek(offset, whence), file.read(count), file.tell()

    opened = remote.Opened(lambda start, end: data[start:end], len(data), "x")
    assert list(follow(cast(BinaryIO, io.BufferedReader(opened, size)))) == list(follow(io.BytesIO(data)))


@pytest.fixture(params=["folder", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "a") if request.param == "folder" else request.getfixturevalue("s3"))


def test_a_folder_that_is_sent_elsewhere_is_the_same_whatever_the_working_directory(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sent = Folder("a") if folder.local else folder
    sent.write("x", b"1")
    data = pickle.dumps(sent)
    monkeypatch.chdir("/")
    assert pickle.loads(data) == folder and pickle.loads(data).read("x") == b"1"


def test_what_is_made_appears_when_it_is_whole_and_never_otherwise(folder: Folder) -> None:
    with folder.making("deep/x") as path:
        path.write_bytes(b"first")
        assert list(folder.find()) == [] and folder.sizes() == {}
    with pytest.raises(ZeroDivisionError), folder.making("deep/x") as path:
        path.write_bytes(b"half")
        raise ZeroDivisionError
    assert contents(folder) == {"deep/x": b"first"} and not path.exists()


def test_every_range_that_is_not_there_is_named(folder: Folder) -> None:
    folder.write("x", b"0123456789")
    assert folder.ranges([("x", 8, 2), ("x", 0, -1), ("x", 10, 0), ("x", 4, 1)]) == [b"89", b"0123456789", b"", b"4"]
    with pytest.raises(OSError) as raised:
        folder.ranges([("x", 0, 2), ("x", 8, 5)])
    one_line(raised.value, f"{folder.absolute}/x ends too soon: 2 of 5 bytes at 8 are there")
    with pytest.raises(FileNotFoundError, match=f"{folder.absolute}/y"):
        folder.ranges([("x", 0, 2), ("y", 0, 1)])
    with pytest.raises(FileNotFoundError, match=f"{folder.absolute}/y"), folder.reading("y"):
        pass


@pytest.mark.slow
def test_all_files_below_are_found_whatever_the_number_of_pages(folder: Folder) -> None:
    names = [f"{number % 3}/{number}" for number in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: folder.write(name, name.encode()), names))
    assert dict(folder.find()) == {name: len(name) for name in names}
    assert len((folder / "1").sizes()) == 367 and folder.folders() == ["0", "1", "2"]


def test_every_file_of_a_local_folder_is_found_once_whatever_links_to_it(tmp_path: Path) -> None:
    Folder(str(tmp_path)).write("a/b/x", b"1")
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a/b")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    (tmp_path / f".x.{'0' * 32}").write_bytes(b"half")
    found = [name for name, _ in Folder(str(tmp_path)).find()]
    assert sorted(found) == ["a/b/x", "link/x"]


# web servers


@contextmanager
def served(path: Path, divided: bool) -> Iterator[str]:
    """The address of a web server for a folder, which gives parts of files or does not."""
    if divided:
        with _aiohttp_server(path) as url:
            yield url
        return

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def _aiohttp_server(path: Path) -> Iterator[str]:
    loop, started = asyncio.new_event_loop(), threading.Event()
    application = web.Application()
    application.router.add_static("/", path)
    runner = web.AppRunner(application, shutdown_timeout=0)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        started.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert started.wait(10)
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.TRUNCATED, Fault.RESET, Fault.HANG])
def test_every_web_server_is_read_as_if_it_were_a_folder(
    divided: bool, fault: Fault, faulty: Faulty, tmp_path: Path
) -> None:
    local = fill(Folder(str(tmp_path / "web")))
    with served(tmp_path / "web", divided) as server, proxy(server) as (url, faults):
        store = Folder(url)
        for operation in ("read", "reading", "get", "fetch", "exists"):
            act = OPERATIONS[operation][1]
            faults.script(fault)
            if operation != "exists":
                assert act(store, tmp_path) == act(local, tmp_path)
            assert (store.exists("x"), store.exists("y"), store.size("x"), store.size("y")) == (
                True,
                False,
                10240,
                None,
            )
            assert faults.injected[fault] == 1
        faults.script(Fault.SHORT)
        assert fetch(store, tmp_path) == fetch(local, tmp_path) and faults.injected[Fault.SHORT] == 1
        if divided:
            assert OPERATIONS["slice"][1](store, tmp_path) == OPERATIONS["slice"][1](local, tmp_path)
            assert store.ranges([("x", 1, 9), ("deep/er", 0, -1)]) == local.ranges([("x", 1, 9), ("deep/er", 0, -1)])
        else:
            for start, end in ((5, 9), (5, 1 << 30), (0, 9), (10, 10250)):
                with pytest.raises(OSError) as raised:
                    store.read("x", start, end)
                one_line(raised.value, f"{url}/x gives no parts of files: fetch it first")
