"""A lease has one holder, whatever dies, whoever is late and whichever clock is wrong."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.transfer.lease import SKEW, Lease, holder, take
from shards.storage import Folder
from tests.faults import Fault, Faults

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Clock:
    """A clock that is moved by hand."""

    time: float = 1000.0

    def __call__(self) -> float:
        return self.time


@dataclass
class Counted:
    """A folder that counts what it is asked for, and may be hooked into, or list what it held earlier."""

    inside: Folder
    asked: list[str] = field(default_factory=list)
    before_write: Callable[[], None] = lambda: None
    before_create: Callable[[], None] = lambda: None
    shown: dict[str, int] | None = None

    def __truediv__(self, name: str) -> "Counted":
        return Counted(self.inside / name, self.asked, self.before_write, self.before_create, self.shown)

    def create(self, name: str, data: bytes) -> bool:
        self.asked.append("create")
        self.before_create()
        return self.inside.create(name, data)

    def write(self, name: str, data: bytes) -> None:
        self.asked.append("write")
        self.before_write()
        self.inside.write(name, data)

    def sizes(self) -> dict[str, int]:
        self.asked.append("list")
        return self.inside.sizes() if self.shown is None else self.shown

    def read(self, name: str) -> bytes:
        self.asked.append("read")
        return self.inside.read(name)


@pytest.fixture(params=["folder", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "bucket":
        return Folder(f"{request.getfixturevalue('s3')}/{tmp_path.name}")
    return Folder(str(tmp_path / "claims"))


@pytest.fixture
def local(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "claims"))


def got(lease: Lease | None) -> Lease:
    assert lease and lease.held
    return lease


def test_nobody_else_has_what_somebody_holds_until_he_gives_it_back(folder: Folder) -> None:
    for _ in range(3):
        first = got(take(folder, "a", 600))
        assert take(folder, "a", 600) is None
        assert got(take(folder, f"other-{first.generation}", 600))
        assert holder(folder, "a") == first.holder
        first.release()
        assert not first.held and not first.renew() and holder(folder, "a") == ""
    assert got(take(folder, "a", 600)).generation == 4


def test_of_all_who_try_at_once_one_gets_it_whether_it_was_never_held_given_back_or_left(folder: Folder) -> None:
    clock = Clock()

    def of_several(name: str, count: int = 8) -> list[Lease]:
        ready = threading.Barrier(count)

        def one(_: int) -> Lease | None:
            ready.wait(60)
            return take(folder, name, 60, now=clock)

        with ThreadPoolExecutor(count) as pool:
            return [lease for lease in pool.map(one, range(count)) if lease]

    (first,) = of_several("a")
    first.release()
    (second,) = of_several("a")
    assert of_several("a") == []
    clock.time = second.until + SKEW
    (third,) = of_several("a")
    assert third.held and not second.held and third.generation == 3


def test_a_lease_that_nobody_had_takes_one_operation_of_the_store(local: Folder) -> None:
    counted = Counted(local)
    lease = take(counted, "a", 60)  # type: ignore[arg-type]
    assert lease and counted.asked == ["create"]
    lease.renew()
    lease.release()
    assert counted.asked == ["create", "write", "write"]
    counted.asked.clear()
    assert take(counted, "a", 60)  # type: ignore[arg-type]
    assert counted.asked == ["create", "list", "read", "create"]


def test_a_lease_that_is_left_may_be_taken_when_it_is_over_and_never_sooner(folder: Folder) -> None:
    clock = Clock()
    left = got(take(folder, "a", 60, now=clock))
    clock.time = 1059.0
    assert left.held and take(folder, "a", 60, now=clock, skew=0) is None
    clock.time = 1060.0
    assert not left.held and take(folder, "a", 60, now=clock, skew=10) is None
    clock.time = 1070.0
    assert got(take(folder, "a", 60, now=clock, skew=10)).generation == 2
    assert not left.renew(), "what is lost is never held again"
    left.release()
    assert take(folder, "a", 60, now=clock, skew=10) is None, "and who lost it does not give back another's"


def test_who_renews_holds_it_as_long_as_he_likes(local: Folder) -> None:
    clock = Clock()
    lease = got(take(local, "a", 60, now=clock))
    for _ in range(10):
        clock.time += 59
        assert lease.renew() and lease.held
        assert take(local, "a", 60, now=clock, skew=0) is None
    clock.time += 60
    assert not lease.renew()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    skews=st.tuples(*[st.floats(-5, 5)] * 2),
    steps=st.lists(st.tuples(st.sampled_from(["take", "renew", "release"]), st.integers(0, 1), st.floats(0, 30))),
)
def test_no_clocks_that_differ_by_at_most_the_skew_make_two_holders(
    tmp_path_factory: pytest.TempPathFactory, skews: tuple[float, float], steps: list[tuple[str, int, float]]
) -> None:
    folder, true = Folder(str(tmp_path_factory.mktemp("claims"))), Clock()
    clocks = [lambda wrong=wrong: true() + wrong for wrong in skews]
    held: dict[int, Lease] = {}
    for what, who, later in steps:
        true.time += later
        match what:
            case "take" if not (who in held and held[who].held):
                if lease := take(folder, "a", 20, now=clocks[who], skew=10.001):
                    held[who] = lease
            case "renew" if who in held:
                held[who].renew()
            case "release" if who in held:
                held[who].release()
        assert sum(lease.held for lease in held.values()) <= 1


def test_a_renewal_whose_answer_comes_after_the_end_does_not_count(local: Folder) -> None:
    clock = Clock()

    def another_takes_it() -> None:
        clock.time = 1061.0
        others.append(got(take(local, "a", 60, now=clock, skew=0)))

    others: list[Lease] = []
    counted = Counted(local, before_write=another_takes_it)
    late = got(take(counted, "a", 60, now=clock))  # type: ignore[arg-type]
    clock.time = 1059.0
    assert not late.renew() and not late.held and others[0].held
    assert take(local, "a", 60, now=clock) is None


def test_a_lease_that_was_over_when_the_store_said_yes_is_not_had(local: Folder) -> None:
    clock = Clock()

    def long() -> None:
        clock.time += 61

    assert take(Counted(local, before_create=long), "a", 60, now=clock) is None  # type: ignore[arg-type]
    clock.time += SKEW
    assert got(take(local, "a", 60, now=clock)).generation == 2


def test_whoever_sees_an_old_state_of_the_folder_gets_nothing(local: Folder) -> None:
    """As in a store that lists late, or a process that slept between looking and creating."""
    for _ in range(3):
        got(take(local, "a", 60)).release()
    last = got(take(local, "a", 60))

    for shown in (["1.json"], ["2.json", "1.json"], []):
        late = Counted(local, shown=dict.fromkeys(shown, 1))
        assert take(late, "a", 60) is None  # type: ignore[arg-type]
    assert last.held


def test_a_thread_renews_while_the_work_goes_on_and_gives_it_back_whatever_the_end(local: Folder) -> None:
    lease = got(take(local, "a", 0.6))
    began = lease.until
    with pytest.raises(ZeroDivisionError), lease:
        while lease.until < began + 0.5:
            assert lease.held
            threading.Event().wait(0.01)
        raise ZeroDivisionError
    assert not lease.held and holder(local, "a") == ""
    assert not any(thread.name == "lease" for thread in threading.enumerate())


def test_a_store_that_is_away_for_a_while_loses_no_lease_that_lasts_longer(
    faulty: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shards import retry

    impatient = retry.Patience(seconds=0.1, first=0.01, longest=0.02, connect=0.2, silence=0.3, requests=1, pace=1e7)
    monkeypatch.setattr(retry, "PATIENCE", impatient)
    folder, faults = Folder(faulty[0]), faulty[1]
    with got(take(folder, "a", 30)) as lease:
        before = lease.until
        faults.always(Fault.INTERNAL)
        with pytest.raises(OSError, match=r"claims|faulty"):
            lease.renew()
        assert lease.held and lease.until == before
        faults.calm()
        assert lease.renew() and lease.until > before


TAKER = """
import sys, time
from shards.storage import Folder
from pipeline.transfer.lease import take
with take(Folder(sys.argv[1]), "a", 1.5, skew=0.1):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_what_a_killed_process_held_is_another_ones_after_a_while(local: Folder) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TAKER, local.absolute], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    assert take(local, "a", 60, skew=0.1) is None
    process.kill()
    process.wait()
    process.stdout.close()
    while not (lease := take(local, "a", 60, skew=0.1)):
        threading.Event().wait(0.05)
    assert lease.held and lease.generation == 2


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_every_time_that_is_none_is_refused(local: Folder, seconds: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        take(local, "a", seconds)
