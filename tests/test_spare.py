"""Spare work gives way to whom that helps, and to nobody else; asked of a real Ray."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.transfer import tasks
from pipeline.transfer.results import Results
from pipeline.transfer.spare import MARK, Cluster, Watch, fits, held, look, needed, room
from pipeline.transfer.sweep import Told, sweep
from pipeline.transfer.workers import Resources
from shards.storage import Folder
from tests.chores import Chores
from tests.test_transfer import wanted

pytestmark = pytest.mark.timeout(180)

ONE = {"CPU": 1.0}
TWO_NODES = {"a": {"CPU": 2.0, "GPU": 1.0}, "b": {"CPU": 1.0}}


def test_every_actor_that_fits_on_a_node_is_counted_and_no_share_of_one() -> None:
    assert room(ONE, TWO_NODES) == 3
    assert room({"CPU": 2.0}, TWO_NODES) == 1
    assert room({"CPU": 0.1, "GPU": 0.1}, TWO_NODES) == 10
    assert room({"CPU": 0.1}, {"a": {"CPU": 0.3}}) == 3, "as many as Ray itself counts"
    assert room(ONE, {}) == 0


def test_what_fits_is_what_can_be_placed_on_single_nodes() -> None:
    assert fits([ONE] * 3, TWO_NODES) and not fits([ONE] * 4, TWO_NODES)
    assert not fits([{"CPU": 3.0}], TWO_NODES), "although there are three CPUs"
    assert fits([ONE, {"CPU": 2.0}], {"a": {"CPU": 2.0}, "b": {"CPU": 1.0}}), "whatever their order"
    assert not fits([{"GPU": 1.0, "CPU": 1.0}] * 2, TWO_NODES)


@given(st.lists(st.floats(0.1, 4).map(lambda n: {"CPU": n}), max_size=6))
def test_whatever_is_placed_is_no_more_than_there_is(bundles: list[dict[str, float]]) -> None:
    if fits(bundles, TWO_NODES):
        assert sum(bundle["CPU"] for bundle in bundles) <= 3 + 1e-3


@pytest.mark.parametrize(
    ("waiting", "own", "gives_way"),
    [
        ([], {"a": [ONE]}, False),
        ([(ONE,)], {"a": [ONE]}, True),
        ([(ONE,)], {}, False),  # holds nothing that could be given up
        ([(ONE, ONE)], {"a": [ONE]}, False),  # nobody would be helped
        ([(ONE, ONE)], {"a": [ONE], "b": [ONE]}, True),
        ([({"CPU": 2.0},)], {"a": [ONE], "b": [ONE]}, False),
        ([({"GPU": 1.0},)], {"a": [ONE, ONE]}, False),
        ([({"GPU": 8.0},), (ONE,)], {"b": [ONE]}, True),  # one of several
    ],
)
def test_it_gives_way_to_whom_that_helps_and_to_nobody_else(waiting: list, own: dict, gives_way: bool) -> None:
    cluster = Cluster(tuple(waiting), {"a": {}, "b": {}})
    assert needed(cluster, own) == gives_way


def test_what_is_about_to_start_anyway_is_given_way_to_as_well() -> None:
    assert needed(Cluster(((ONE,),), {"a": ONE}), {})


class Hand:
    """A clock and an answer that are set by hand."""

    time, waits = 0.0, False

    def watch(self) -> Watch:
        return Watch(ONE, patience=2, calm=10, now=lambda: self.time, waits=lambda: self.waits)


def test_who_waits_for_a_moment_is_not_given_way_to_and_who_goes_on_waiting_is() -> None:
    hand = Hand()
    watch = hand.watch()
    for hand.time, hand.waits, gives_way in (
        (0, False, False),
        (1, True, False),
        (2, True, False),
        (2.5, False, False),
        (3, True, False),  # counted afresh
        (4.5, True, False),
        (5, True, True),
    ):
        assert watch() == gives_way, hand.time


def test_after_giving_way_it_stays_away_until_nobody_has_waited_for_a_while() -> None:
    hand = Hand()
    watch = hand.watch()
    for hand.time, hand.waits, gives_way in (
        (0, True, False),
        (2, True, True),
        (3, False, True),
        (11, False, True),
        (11.5, True, True),  # a run that is started anew
        (12, False, True),
        (21, False, True),
        (21.5, False, False),
        (22, True, False),
        (24, True, True),
    ):
        assert watch() == gives_way, hand.time


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, look()
        time.sleep(0.05)


@pytest.fixture
def actors(local_ray: None) -> Any:
    """Makes actors with so many CPUs each; all are ended."""
    import ray

    class Idle:
        def ready(self) -> None: ...

    made: list[Any] = []

    def make(cpus: float, **options: Any) -> Any:
        made.append(ray.remote(num_cpus=cpus, **options)(Idle).remote())
        return made[-1]

    yield make
    for actor in made:
        ray.kill(actor)
    until(lambda: room(ONE, look().free) == 4)


def test_a_placement_group_is_seen_at_once_and_gets_what_is_given_up(actors: Any) -> None:
    import ray
    from ray.util import placement_group, remove_placement_group

    own = [actors(1, label_selector=MARK) for _ in range(3)]
    ray.get([actor.ready.remote() for actor in own])
    until(lambda: room(ONE, look().free) == 1)
    assert not look().waiting and not needed(look(), held(ONE))
    group = placement_group([ONE] * 3)
    try:
        until(lambda: look().waiting == ((ONE, ONE, ONE),))
        assert needed(look(), held(ONE)) and not needed(look(), {})
        for actor in own:
            ray.kill(actor)
        ray.get(group.ready(), timeout=60)
        until(lambda: not look().waiting)
        assert not needed(look(), held(ONE))
    finally:
        remove_placement_group(group)


def test_an_actor_of_others_is_seen_and_ones_own_that_is_marked_is_not(actors: Any) -> None:
    import ray

    ray.get([actors(2, label_selector=MARK).ready.remote() for _ in range(2)])
    marked = actors(2, label_selector=MARK)
    other = actors(2)
    until(lambda: look().waiting == (({"CPU": 2.0},),))
    assert needed(look(), held({"CPU": 2.0}))
    ray.kill(other)
    until(lambda: not look().waiting)
    assert not marked.ready.remote().is_nil(), "and the marked one still waits"
    assert Watch({"CPU": 2.0}, patience=0)() is False


def test_what_nobody_could_have_is_not_made_room_for(actors: Any) -> None:
    import ray
    from ray.util import placement_group, remove_placement_group

    ray.get(actors(1, label_selector=MARK).ready.remote())
    group = placement_group([{"CPU": 100.0}])
    try:
        until(lambda: len(look().waiting) == 1)
        watch = Watch(ONE, patience=0)
        until(lambda: watch.room() == 3)
        assert not watch()
    finally:
        remove_placement_group(group)
        until(lambda: not look().waiting)


def test_a_marked_actor_is_placed_wherever_any_other_is(actors: Any) -> None:
    import ray

    ray.get([actors(1, label_selector=MARK).ready.remote() for _ in range(4)], timeout=60)
    until(lambda: room(ONE, look().free) == 0)
    (own,) = held(ONE).values()
    assert len(own) == 4


def test_an_actor_that_outlives_its_driver_holds_nothing_of_its_own(actors: Any) -> None:
    import ray

    ray.get(actors(0, lifetime="detached", name="left behind").ready.remote())
    assert held(ONE) == {}


@pytest.mark.slow
def test_a_sweep_makes_room_for_a_run_and_goes_on_beside_it_and_after_it(local_ray: None, tmp_path: Path) -> None:
    import ray
    from ray.util import placement_group, remove_placement_group

    chores, results = Chores(str(tmp_path / "chores")), Results(Folder(str(tmp_path)))
    asked, resources = wanted(tasks=tasks.named("digits,mnist")), Resources(1.0)
    watch = Watch(resources.needed, patience=0.2, calm=0.5)
    errors: list[dict[str, str]] = []

    def swept() -> None:
        place = {"resources": resources, "retries": 0, "told": Told(), "spare": watch, "work": chores}
        errors.append(sweep(asked, "source", "data", results, **place))

    until(lambda: room(ONE, look().free) == 4)
    chores.hold()
    thread = threading.Thread(target=swept, daemon=True)
    thread.start()
    until(lambda: len(chores.at_work()) == 4)
    group = placement_group([ONE] * 3)
    try:
        ray.get(group.ready(), timeout=60)
        put_off = sum(chores.performed().values())
        until(lambda: sum(chores.performed().values()) == put_off + 1)  # on the one CPU that is left
        assert sum(map(len, held(ONE).values())) == 1 and not look().waiting
    finally:
        remove_placement_group(group)
    until(lambda: sum(map(len, held(ONE).values())) == 4)
    chores.let_go()
    thread.join(120)
    assert errors == [{}]
    assert chores.performed().keys() == Results(Folder(str(tmp_path))).load().keys()
    assert len(results.known) == asked.count
