"""A process that hangs is noticed, and a slow one named."""

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.train.hang import BEFORE_THE_FIRST, HUNG, Watch, straggler
from shards.storage import Folder

pytestmark = pytest.mark.timeout(60)


class Ended:
    """Instead of the end of the process."""

    def __init__(self) -> None:
        self.code, self.at = 0, threading.Event()

    def __call__(self, code: int) -> None:
        self.code = code
        self.at.set()


def test_every_thread_of_a_process_that_hangs_is_written_down_before_it_ends(tmp_path: Path) -> None:
    ended, held = Ended(), threading.Event()

    def a_collective_that_never_returns() -> None:
        held.wait()

    stuck = threading.Thread(target=a_collective_that_never_returns)
    stuck.start()
    watch = Watch(Folder(str(tmp_path)), "word", 3, 0.05, end=ended)
    watch.step(41)
    assert ended.at.wait(50) and ended.code == HUNG
    held.set()
    stuck.join()
    text = (tmp_path / "stacks" / "word-3.txt").read_text()
    assert text.startswith("no step for 0.05 s after step 41\n")
    assert "a_collective_that_never_returns" in text and "test_every_thread_of_a_process_that_hangs" in text


def test_a_storage_that_fails_too_keeps_no_process_from_its_end(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("a file where the folder should be")
    ended = Ended()
    threads = threading.excepthook
    threading.excepthook = lambda *_: None
    try:
        Watch(Folder(str(tmp_path)), "word", 0, 0.01, end=ended)
        assert ended.at.wait(50) and ended.code == HUNG
    finally:
        threading.excepthook = threads


@given(st.lists(st.floats(0, 9.99), max_size=20), st.floats(0, 39.9))
def test_as_long_as_every_step_is_in_time_nothing_ends_whatever_the_first_takes(
    steps: list[float], first: float
) -> None:
    now, ended = [1000.0], Ended()
    watch = Watch(Folder("/nowhere"), "word", 0, 10.0, end=ended, clock=lambda: now[0])
    assert watch.left() == BEFORE_THE_FIRST * 10.0
    for done, seconds in enumerate([first, *steps]):
        now[0] += seconds
        assert watch.left() > 0
        watch.step(done)
        assert watch.left() == 10.0
    now[0] += 10.1
    assert watch.left() <= 0
    watch.close()


def test_whoever_waits_for_ever_is_not_watched(tmp_path: Path) -> None:
    before = threading.active_count()
    Watch(Folder(str(tmp_path)), "word", 0, 0.0)
    assert threading.active_count() == before


@given(st.lists(st.floats(1.0, 1.4), min_size=2, max_size=64), st.data())
def test_the_one_process_that_is_slow_is_named_and_no_other_whatever_their_number(
    seconds: list[float], data: st.DataObject
) -> None:
    assert straggler(seconds) is None
    slow = data.draw(st.integers(0, len(seconds) - 1))
    assert straggler([each * (3.0 if rank == slow else 1.0) for rank, each in enumerate(seconds)]) == slow


def test_a_process_alone_is_no_straggler() -> None:
    assert straggler([]) is None and straggler([5.0]) is None
