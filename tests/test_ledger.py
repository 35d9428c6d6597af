"""Whatever happens to a run, the parts of its time add up to the whole, and what was done twice is known."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.train.ledger import (
    CHECKPOINTING,
    KINDS,
    PRODUCTIVE,
    REPLAYED,
    RESTARTING,
    WAITING,
    Account,
    Ledger,
    Notes,
    line,
    metrics,
    noted,
    resumed,
)
from shards.storage import Folder

pytestmark = pytest.mark.timeout(60)
SECONDS = st.integers(0, 1000)
EVENTS = st.lists(st.tuples(st.sampled_from(["step", "wait", "save", "idle", "look", "back"]), SECONDS), max_size=30)
ACCOUNTS = st.builds(Account, st.fixed_dictionaries({kind: SECONDS.map(float) for kind in KINDS}), st.integers(0, 1000))


class Clock:
    """Says what it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def follow(ledger: Ledger, clock: Clock, events: list[tuple[str, int]]) -> None:
    kept = Account()
    for event, seconds in events:
        match event:
            case "step":
                clock.now += seconds
                ledger.stepped()
            case "wait" | "save":
                with ledger.during(WAITING if event == "wait" else CHECKPOINTING):
                    clock.now += seconds
                if event == "save":
                    kept = ledger.account()
            case "idle":
                clock.now += seconds
            case "look":
                ledger.account()
            case "back":
                clock.now += seconds
                ledger.go_back(kept)


@given(EVENTS, st.integers(1, 512), ACCOUNTS)
def test_the_parts_add_up_to_the_whole_whatever_the_events(
    events: list[tuple[str, int]], processes: int, before: Account
) -> None:
    clock = Clock()
    ledger = Ledger(processes, clock)
    ledger.add(before)
    follow(ledger, clock, events)
    account = ledger.account()
    assert account.total == pytest.approx(before.total + clock.now * processes)
    assert all(seconds >= 0 for seconds in account.seconds.values())
    assert account.steps == before.steps + sum(event == "step" for event, _ in events)


@given(EVENTS)
def test_a_run_that_never_goes_back_replays_nothing_and_waits_and_saves_as_long_as_it_did(
    events: list[tuple[str, int]],
) -> None:
    clock, events = Clock(), [("step", 5), *(event for event in events if event[0] != "back")]
    ledger = Ledger(2, clock)
    follow(ledger, clock, events)
    spent = {kind: 2.0 * sum(s for event, s in events if event == kind) for kind in ("wait", "save", "step", "idle")}
    expected = {WAITING: spent["wait"], CHECKPOINTING: spent["save"], RESTARTING: 10.0, REPLAYED: 0.0}
    assert ledger.account().seconds == {**expected, PRODUCTIVE: spent["step"] + spent["idle"] - 10.0}


@given(ACCOUNTS, ACCOUNTS)
def test_what_is_lost_is_replayed_whatever_it_was_but_not_what_a_start_takes(kept: Account, since: Account) -> None:
    last = Account({kind: kept.seconds[kind] + since.seconds[kind] for kind in KINDS}, kept.steps + since.steps)
    account = resumed(kept, last)
    assert account.total == pytest.approx(last.total) and account.steps == last.steps
    assert account.seconds[RESTARTING] == last.seconds[RESTARTING]
    for kind in (PRODUCTIVE, WAITING, CHECKPOINTING):
        assert account.seconds[kind] == kept.seconds[kind]
    assert resumed(kept, kept) == kept and resumed(last, kept) == last


@given(ACCOUNTS)
def test_every_account_survives_being_kept(account: Account) -> None:
    assert Account.from_dict(account.to_dict()) == account


def test_data_that_are_waited_for_count_as_waiting_and_all_of_them_come() -> None:
    clock = Clock()
    ledger = Ledger(1, clock)
    ledger.stepped()

    def slow() -> Iterator[int]:
        for number in range(3):
            clock.now += 10
            yield number

    for _ in ledger.waiting(slow()):
        clock.now += 1
    assert ledger.account().seconds[WAITING] == 30 and ledger.account().seconds[PRODUCTIVE] == 3


def test_the_last_note_of_all_starts_is_found_whatever_their_names(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "ledger"))
    assert noted(folder) is None
    for word, seconds in (("ffff", 1.0), ("aaaa", 3.0), ("cccc", 2.0)):
        notes = Notes(folder, word, every=0.0)
        notes.keep(Account)
        notes.close(Account({**Account().seconds, PRODUCTIVE: seconds}, int(seconds)))
    found = noted(folder)
    assert found and found.steps == 3


def test_the_last_line_says_what_the_metrics_say() -> None:
    shares = {PRODUCTIVE: 971.0, WAITING: 12.0, CHECKPOINTING: 4.0, RESTARTING: 8.0, REPLAYED: 5.0}
    account = Account({kind: 12.3 * 3.6 * seconds for kind, seconds in shares.items()}, 10)
    assert line(account, 3.1) == (
        "goodput 97.1 % of 12.3 GPU-hours: 1.2 % waiting for data, 0.4 % checkpointing, 0.8 % restarting, "
        "0.5 % replayed; 3.1 exaFLOPs"
    )
    found = metrics(account, 3.1)
    assert found["ledger_gpu_hours"] == pytest.approx(12.3) and found["ledger_exaflops"] == 3.1
    assert found["ledger_goodput"] + sum(found[f"ledger_{kind}"] for kind in KINDS[1:]) == pytest.approx(1)
