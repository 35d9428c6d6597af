"""What a run needs of machines, time, stores and money for any number of GPUs, from its configuration alone.

Arithmetic; a transformer's needs no torch. Bytes are decimal: a gigabyte is 10^9.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from pipeline.config import Config
from pipeline.models.flops import parameters, training_exaflops
from pipeline.models.memory import checkpoint_bytes, memory

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Machines:
    """What is taken for given."""

    gpu_memory: float = 80e9
    """Bytes of a GPU."""
    peak: float = 989e12
    """Dense bf16 FLOP/s of a GPU."""
    mfu: float = 0.4
    """Share of it that goes into three forward passes a picture (PaLM, Chowdhery et al. 2022, appendix B)."""
    price: float = 2.5
    """Of a GPU-hour, in any currency."""
    store: float = 1e9
    """Bytes a second that the store of checkpoints takes from all processes together."""
    copy: float = 10e9
    """Bytes a second that a process copies from its GPU to its machine's memory."""
    node: int = 8
    """GPUs of one machine."""
    shard_pictures: int = 10_000
    """Pictures of a shard."""
    picture: float = 110e3
    """Bytes of a picture in a shard."""


@dataclass(frozen=True)
class State:
    """Memory of one GPU under a stage of ZeRO, with or without recompute."""

    zero: int
    recompute: bool
    total: float
    activations: float
    host: float
    fits: bool


@dataclass(frozen=True)
class Row:
    """What the run needs on so many GPUs."""

    gpus: int
    problem: str
    """Why the run cannot be on so many; empty where it can, and all that follows holds."""
    micro: int = 0
    passes: int = 0
    states: tuple[State, ...] = ()
    """Of the stages that the run can have at its precision."""
    hours: float = 0.0
    cost: float = 0.0
    step_seconds: float = 0.0
    pictures_per_second: float = 0.0
    """That the feed has to give in all."""
    node_pictures_per_second: float = 0.0
    lanes: int = 0
    """Of one process."""
    shards: float = 0.0
    """That one process reads from at a time: each lane from those that its window touches, on average."""
    cache_bytes: float = 0.0
    """Of the shards that the lanes of one machine read from at a time, which its cache should hold."""
    write_seconds: float = 0.0
    saving: float = 0.0
    """Share of the time that the run waits for its checkpoints."""


@dataclass(frozen=True)
class Plan:
    """What the run is, and a row for each number of GPUs."""

    name: str
    parameters: int
    pictures: int
    steps: int
    batch: int
    exaflops: float
    checkpoint_bytes: float
    machines: Machines
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def plan(config: Config, gpus: list[int], machines: Machines) -> Plan:
    """The plan; ValueError where the length of the run is not known."""
    if config.unit == "epochs" and not config.data.samples:
        raise ValueError("the pictures of the corpus are not known: give --data.samples, or a duration in other units")
    steps = config.steps(config.data.samples)
    return Plan(
        name=config.name,
        parameters=parameters(config.model, config.classes),
        pictures=steps * config.batch,
        steps=steps,
        batch=config.batch,
        exaflops=training_exaflops(config.model, config.classes, steps * config.batch),
        checkpoint_bytes=checkpoint_bytes(config),
        machines=machines,
        rows=tuple(row(config, count, machines) for count in gpus),
    )


def row(config: Config, gpus: int, machines: Machines) -> Row:
    """What the run needs on so many GPUs. With recompute, each step takes a fourth forward pass's time more."""
    if problem := config.problem(gpus):
        return Row(gpus, problem)
    step_flops = 1e18 * training_exaflops(config.model, config.classes, config.batch)
    step = step_flops * (4 / 3 if config.recompute else 1) / (gpus * machines.peak * machines.mfu)
    hours = step * config.steps(config.data.samples) / 3600
    node, lanes = min(gpus, machines.node), config.data.lanes // gpus
    window = min(config.data.window, -(-config.data.samples // config.data.lanes) or config.data.window)
    write = checkpoint_bytes(config) / machines.store

    def touched(lanes: int) -> float:
        found = lanes * (1 + window / machines.shard_pictures)
        return min(found, (config.data.samples or math.inf) / machines.shard_pictures)

    return Row(
        gpus=gpus,
        problem="",
        micro=config.micro(gpus),
        passes=config.passes(gpus),
        states=tuple(_states(config, gpus, machines)),
        hours=hours,
        cost=hours * gpus * machines.price,
        step_seconds=step,
        pictures_per_second=config.batch / step,
        node_pictures_per_second=config.batch / step * node / gpus,
        lanes=lanes,
        shards=touched(lanes),
        cache_bytes=touched(node * lanes) * machines.shard_pictures * machines.picture,
        write_seconds=write,
        saving=saving(checkpoint_bytes(config) / gpus / machines.copy, write, config.save_every * step),
    )


def saving(copy: float, write: float, between: float) -> float:
    """Share of the time lost, where a checkpoint stops the run for a copy of the state and is written behind it.

    A checkpoint waits for the one before, where writing takes longer than the training `between`; all in seconds.
    """
    lost = copy + max(0.0, write - between)
    return lost / (between + lost)


def _states(config: Config, gpus: int, machines: Machines) -> list[State]:
    made = []
    for zero in STAGES:
        for recompute in (False, True):
            one = replace(config, zero=zero, recompute=recompute, offload=config.offload and zero > 0)
            if one.problem(gpus):
                continue
            need = memory(one, gpus)
            fits = need.total <= machines.gpu_memory
            made.append(State(zero, recompute, need.total, need.activations, need.host, fits))
    return made


def show(found: Plan, console: Console) -> None:
    """Print the plan as tables."""
    console.print(rendered(found))


def rendered(found: Plan) -> RenderableType:
    """The plan as rich shows it."""
    given = found.machines
    head = (
        f"{found.name}: {found.parameters:,} parameters; {found.steps:,} steps of {found.batch:,} pictures, "
        f"{found.exaflops:,.4g} exaFLOPs\n"
        f"checkpoint {_gigabytes(found.checkpoint_bytes)} GB, {found.checkpoint_bytes / given.store:,.1f} s at "
        f"{given.store / 1e9:g} GB/s; {given.mfu:.0%} of {given.peak / 1e12:,.0f} TFLOP/s, {given.price:g} a GPU-hour"
    )
    problems = [f"{row.gpus} GPUs: {row.problem}" for row in found.rows if row.problem]
    possible = [row for row in found.rows if not row.problem]
    tables = [_of_time(possible), _of_memory(possible, given)] if possible else []
    return Group(head, *tables, *problems)


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _of_time(rows: list[Row]) -> Table:
    columns = [
        "GPUs",
        "passes",
        "hours",
        "cost",
        "s/step",
        "pictures/s",
        "a node",
        "lanes",
        "shards",
        "cache",
        "saving",
    ]
    table = _table("time, feed and money", columns)
    for row in rows:
        table.add_row(
            str(row.gpus),
            f"{row.passes} x {row.micro}",
            f"{row.hours:,.1f}",
            f"{row.cost:,.0f}",
            f"{row.step_seconds:.3g}",
            f"{row.pictures_per_second:,.0f}",
            f"{row.node_pictures_per_second:,.0f}",
            str(row.lanes),
            f"{row.shards:,.0f}",
            f"{_gigabytes(row.cache_bytes)} GB",
            f"{row.saving:.2%}",
        )
    table.caption = "lanes and shards of one process, cache of one machine; saving is the share of time that it costs"
    return table


def _of_memory(rows: list[Row], given: Machines) -> Table:
    columns = ["GPUs", *(f"{'re ' if recompute else ''}ZeRO-{zero}" for recompute in (False, True) for zero in STAGES)]
    table = _table(f"GB of a GPU with {_gigabytes(given.gpu_memory)}", columns)
    for row in rows:
        there = {(state.recompute, state.zero): state for state in row.states}
        cells = [there.get((recompute, zero)) for recompute in (False, True) for zero in STAGES]
        table.add_row(str(row.gpus), *(_cell(state) for state in cells))
    table.caption = "re: with recompute; !: does not fit; -: not at this precision"
    return table


def _cell(state: State | None) -> str:
    return "-" if state is None else f"{_gigabytes(state.total)}{'' if state.fits else '!'}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size < 1e11 else f"{size / 1e9:,.0f}"
