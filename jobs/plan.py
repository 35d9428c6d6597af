"""What a pretraining needs on 1 to 512 GPUs: memory, hours, money, pictures a second, checkpoints.

    python jobs/plan.py EXPERIMENT [--gpus 8 64] [--gpu H100] [--mfu 0.45] [--price 3] [--model.depth 24 ...]

Takes every field of a run as jobs/pretrain.py does. Starts nothing and needs neither pictures nor a GPU.
"""

import json
import sys
from dataclasses import dataclass, fields
from typing import Annotated

import tyro

from pipeline.cli import parse, run
from pipeline.config import Config
from pipeline.experiments import listing, load


@dataclass(frozen=True)
class Arguments:
    """What is planned, and with what."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    gpus: tuple[int, ...] = (1, 8, 64, 512)
    """Numbers of GPUs to plan for."""
    gpu: str = ""
    """Name of a GPU whose peak is known, such as H200; without it, `peak` counts."""
    peak: float = 989e12
    """Dense bf16 FLOP/s of a GPU."""
    gpu_memory: float = 80.0
    """Gigabytes of a GPU."""
    mfu: float = 0.4
    """Share of the peak that the model's own arithmetic reaches."""
    price: float = 2.5
    """Of a GPU-hour, in any currency."""
    store_gigabytes_per_second: float = 1.0
    """What the store of checkpoints takes, from all processes together."""
    copy_gigabytes_per_second: float = 10.0
    """What a process copies from its GPU to its machine's memory."""
    node: int = 8
    """GPUs of one machine."""
    shard_pictures: int = 10_000
    """Pictures of a shard."""
    picture_kilobytes: float = 110.0
    """Size of a picture in its shard."""
    json: bool = False
    """Print all of it as JSON, in bytes and seconds."""


def main(argv: list[str]) -> None:
    """Print the plan."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        print(listing())
        return
    wanted = parse(Arguments, argv[1:], default=Arguments(load(argv[0])))
    for field in fields(Arguments)[1:]:
        value = getattr(wanted, field.name)
        if not isinstance(value, str | bool) and not min(value if isinstance(value, tuple) else (value,)) > 0:
            raise ValueError(f"--{field.name.replace('_', '-')} is {value}; it has to be above 0")
    # Imported here, so that --help answers at once.
    from rich.console import Console

    from pipeline.insight.plan import Machines, plan, show
    from pipeline.track.metrics import peak_flops

    peak = peak_flops(wanted.gpu) if wanted.gpu else wanted.peak
    if peak is None:
        raise ValueError(f"the peak of a GPU {wanted.gpu!r} is not known; give it as --peak, in FLOP/s")
    machines = Machines(
        gpu_memory=1e9 * wanted.gpu_memory,
        peak=peak,
        mfu=wanted.mfu,
        price=wanted.price,
        store=1e9 * wanted.store_gigabytes_per_second,
        copy=1e9 * wanted.copy_gigabytes_per_second,
        node=wanted.node,
        shard_pictures=wanted.shard_pictures,
        picture=1e3 * wanted.picture_kilobytes,
    )
    found = plan(wanted.config, list(wanted.gpus), machines)
    if wanted.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        # Wide enough for every number, since a narrow terminal can wrap a line but not bring back what was cut.
        show(found, Console(width=max(Console().width, 110)))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
