"""Ratios of the benchmarks: taken within a round, with their spread."""

import json

import pytest

from benchmarks.peers.contest import divide_rounds, measure_spread, report, summarise, take_turns


def test_a_ratio_is_taken_within_its_round_before_the_median():
    theirs, ours = [2.0, 30.0, 4.0], [1.0, 10.0, 4.0]
    assert divide_rounds(theirs, ours) == [2.0, 3.0, 1.0]
    assert measure_spread(divide_rounds(theirs, ours))[:3] == (1.0, 2.0, 3.0)
    with pytest.raises(ValueError):
        divide_rounds([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("rounds", "noisy"),
    [
        ([1.0, 1.0, 1.14], False),
        ([1.0, 1.0, 1.16], True),
        ([10.0, 8.6, 10.0], False),  # the spread is a share of the median
        ([0.1, 0.08, 0.1], True),
        ([1.0], True),  # of one round nobody knows
    ],
)
def test_rounds_more_than_15_percent_apart_are_noisy(rounds, noisy):
    assert measure_spread(rounds).noisy == noisy
    assert summarise({"ratio": rounds}, {})["noisy"] == ["ratio"] * noisy


def test_each_contestant_takes_every_turn_and_warming_up_is_left_out():
    turns: list[tuple[str, int]] = []

    def contestant(name):
        return lambda number: turns.append((name, number)) or number

    names = ["ours", "floor", "webdataset"]
    found = take_turns({name: contestant(name) for name in names}, rounds=20, warm=1)
    assert found == {name: list(range(1, 21)) for name in names}
    rounds = [turns[start : start + 3] for start in range(0, 63, 3)]
    assert [{number for _, number in one} for one in rounds] == [{number} for number in range(21)]
    assert len({tuple(name for name, _ in one) for one in rounds}) > 1  # the order is drawn anew


def test_the_report_ends_with_its_figures_as_json(capsys):
    report({"quiet": [1.0, 1.01, 1.02], "loud": [1.0, 2.0, 3.0]}, {"pictures": 7, "seconds": 1.23456})
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {
        "pictures": 7,
        "seconds": 1.235,
        "quiet": 1.01,
        "loud": 2.0,
        "spread": {"quiet": [1.0, 1.02], "loud": [1.0, 3.0]},
        "noisy": ["loud"],
    }
    assert [line.split()[0] for line in lines] == ["quiet", "loud"]
    assert ["noisy" in line for line in lines] == [False, True]
