"""Laws of parts of shard sets: they hold what they should, are sets themselves, and lie within each other."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from shards.manifest import MANIFEST, ShardSet
from shards.storage import Folder
from shards.subset import Part, subset
from shards.verify import verify
from tests import tiny
from tests.gang import run_job
from tests.test_factory import images

pytestmark = pytest.mark.timeout(120)
SIZES = (70, 50, 110, 90)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return tiny.shard_set(tmp_path_factory.mktemp("subset") / "set", sizes=SIZES)


def part(whole: ShardSet, target: Path, **how: object) -> ShardSet:
    subset(whole.folder.url, Folder(str(target)), "part", Part(**how))  # type: ignore[arg-type]
    return ShardSet(str(target))


def keys(shards: ShardSet) -> dict[str, int]:
    every = (row for shard in range(len(shards.counts)) for row in shards.rows(shard).to_pylist())
    return {row["key"]: row["labels"][0] for row in every}


def test_every_part_is_a_set_whose_pictures_are_those_of_the_whole(
    local_ray: None, whole: ShardSet, tmp_path: Path
) -> None:
    found = part(whole, tmp_path / "a", share=0.1)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"index.parquet", MANIFEST}
    assert found.manifest.samples == 32 and verify(found.folder.url) == ""
    served, wanted = images(found), images(whole)
    assert len(served) == 32 and all((wanted[key] == pixels).all() for key, pixels in served.items())


def test_every_smaller_part_lies_within_every_larger_one_and_another_seed_has_others(
    whole: ShardSet, tmp_path: Path
) -> None:
    shares = [0.01, 0.1, 0.3, 0.9, 1 - 1e-9]
    parts = [set(keys(part(whole, tmp_path / f"{share}", share=share))) for share in shares]
    assert [len(one) for one in parts] == [3, 32, 96, 288, 320]
    assert all(small < large for small, large in pairwise(parts))
    assert set(keys(part(whole, tmp_path / "other", share=0.1, seed=1))) != parts[1]


def test_every_class_gets_as_many_pictures_and_more_contain_fewer(whole: ShardSet, tmp_path: Path) -> None:
    few, more = (keys(part(whole, tmp_path / f"{count}", per_class=count)) for count in (5, 20))
    assert set(Counter(few.values()).values()) == {5} and set(Counter(more.values()).values()) == {20}
    assert few.keys() < more.keys()
    assert len(keys(part(whole, tmp_path / "all", per_class=1000))) == 320


def test_what_is_left_out_by_its_key_is_out_and_nothing_else(whole: ShardSet, tmp_path: Path) -> None:
    out = ("picture-0003", "picture-0319")
    assert keys(whole).keys() - keys(part(whole, tmp_path / "a", without=out)).keys() == set(out)
    with pytest.raises(ValueError, match=r"has no picture 'x' \(1 of 2 keys"):
        part(whole, tmp_path / "b", without=("picture-0003", "x"))
    assert not (tmp_path / "b").exists()


def test_a_shard_of_which_nothing_is_left_is_not_named(whole: ShardSet, tmp_path: Path) -> None:
    first = tuple(key for key in keys(whole) if int(key[-4:]) < SIZES[0])
    found = part(whole, tmp_path / "a", without=first)
    assert [shard.name for shard in found.manifest.shards] == ["000001.tar", "000002.tar", "000003.tar"]
    assert [found.rows(shard)["shard"].to_pylist()[0] for shard in range(3)] == [0, 1, 2]


def test_a_target_that_holds_another_part_is_refused(whole: ShardSet, tmp_path: Path) -> None:
    before = part(whole, tmp_path / "a", share=0.5).manifest
    assert part(whole, tmp_path / "a", share=0.5).manifest == before
    with pytest.raises(ValueError, match=r"another shard set: share is 0\.5 there, 0\.25 here"):
        part(whole, tmp_path / "a", share=0.25)
    with pytest.raises(ValueError, match=r"holds files that are no part of part: 000000\.tar"):
        copy = tmp_path / "b"
        copy.mkdir()
        (copy / "000000.tar").write_bytes(b"")
        part(whole, copy, share=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--share", "0"], "share is 0; it lies above 0 and is 1 at the most"),
        (["--per-class", "-1"], "per_class is -1; it is a number of pictures, or 0 for all"),
        ([], "nothing is left out: give a share, a number of pictures per class, or keys"),
        (["--without", "/none"], "--without /none: No such file or directory"),
    ],
)
def test_every_mistake_is_answered_in_one_line(whole: ShardSet, tmp_path: Path, words: list[str], answer: str) -> None:
    done = run_job("prepare.py", "subset", whole.folder.absolute, "--to", tmp_path / "a", *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {answer}\n")


def test_the_command_describes_a_part(whole: ShardSet, tmp_path: Path) -> None:
    to = str(tmp_path / "tenth")
    done = run_job("prepare.py", "subset", whole.folder.absolute, "--to", to, "--share", "0.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"subset: 32 pictures of {whole.folder.absolute} are described at {to}\n"
