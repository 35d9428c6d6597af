"""Pretrain a model on a shard set.

    python jobs/pretrain.py EXPERIMENT --data.shards SET --to FOLDER [--processes N] [--model.width 96 ...]

A run lives in FOLDER/RUN and goes on from what it finds there. Runs on the Ray cluster it is submitted to, or starts a
Ray on this machine. `python jobs/pretrain.py EXPERIMENT --help` lists every field with its default.

With `--processes 2:8` it goes on with as many processes as there is room for. Ctrl-C, SIGTERM and `ray job stop` let it
save before it ends; the last only where the job's runtime environment says so, since Ray kills a job three seconds
after it was told: env_vars {RAY_JOB_STOP_SIGNAL: SIGINT, RAY_JOB_STOP_WAIT_TIME_S: "120"}.
"""

import sys
from dataclasses import asdict, dataclass, replace
from threading import Thread
from typing import Annotated

import tyro

from pipeline.cli import counts, parse, run
from pipeline.config import Config
from pipeline.experiments import listing, load
from pipeline.models import flops
from pipeline.models.memory import memory


@dataclass(frozen=True)
class Arguments:
    """How and where to run, beside what is run."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    to: str = ""
    """Folder or URL under which runs are kept."""
    run: str = ""
    """Name of the run, and of its folder; the experiment's name if empty."""
    processes: str = "1"
    """Processes, one for each GPU, or with --cpus-each on CPUs; or the fewest and the most of them, as in 2:8."""
    cpus_each: int = 1
    """CPUs for each process."""
    tracking_uri: str = ""
    """Where MLflow is; the environment's MLFLOW_TRACKING_URI if empty, else a file in ~/.local/share/vitscale."""
    max_failures: int = 10
    """Starts after a failure before the run is given up."""
    resize_seconds: float = 600.0
    """Seconds from one look whether there is room for more processes to the next."""
    change: tuple[str, ...] = ()
    """What is to be otherwise from the newest checkpoint on, such as optim.lr=3e-4; recorded in the run."""
    wait_for_resources: float = 0.0
    """Seconds that a cluster which grows on demand is given to show what it can have."""
    dry_run: bool = False
    """Print what would be run and what it would need, and end."""


def main(argv: list[str]) -> None:
    """Check everything that can be known before a machine is asked for, then run to the end."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        print(listing())
        return
    arguments = parse(Arguments, argv[1:], default=Arguments(load(argv[0])))
    config = arguments.config
    processes = allowed(config, arguments.processes)
    if arguments.dry_run:
        print(plan(config, processes[-1]))
        return
    if not arguments.to:
        raise ValueError("--to is missing: the folder or URL under which runs are kept")
    pretrain(arguments, processes, changes_of(arguments.change))


def allowed(config: Config, text: str) -> list[int]:
    """The numbers of processes that `8` or `2:8` means and on which the run can be, in order; its batch is the same.

    ValueError, saying what would do, where there are none.
    """
    wanted = counts(text)
    most = wanted[-1]
    if len(wanted) == 1:
        config.check(most)
    found = [number for number in wanted if not config.problem(number)]
    if not found:
        lanes = config.data.lanes
        divisors = [number for number in range(1, lanes + 1) if lanes % number == 0]
        config.check(most if most in divisors else 1)  # that there is none may be for another reason
        raise ValueError(
            f"--processes {text}: {lanes} lanes divide over none of these numbers; "
            f"they do over {', '.join(map(str, divisors))}"
        )
    return found


def changes_of(words: tuple[str, ...]) -> dict[str, float]:
    """`optim.lr=3e-4` as a name and a number; ValueError where it is something else."""
    found: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(f"--change {word}: a field and its number are needed, as in optim.lr=3e-4") from None
    return found


def plan(config: Config, processes: int) -> str:
    """What a run is and what it needs, from its configuration alone."""
    count = flops.parameters(config.model, config.classes)
    lines = [f"{name:28}{value}" for name, value in flat(asdict(config)).items()]
    lines += ["", f"{'parameters':28}{count:,}"]
    if samples := config.data.samples:
        steps = config.steps(samples)
        compute = flops.training_exaflops(config.model, config.classes, steps * config.batch)
        lines += [
            f"{'steps':28}{steps:,} of {config.batch:,} pictures",
            f"{'training compute':28}{compute:,.4g} exaFLOPs",
        ]
    else:
        lines += ["steps, exaFLOPs             not known: give --data.samples, the pictures of the corpus"]
    need = memory(config, processes)
    parts = {"weights": need.weights, "gradients": need.gradients, "optimizer": need.optimizer}
    parts |= {"buckets": need.buffers, "activations or update": max(need.activations, need.update)}
    lines += [
        f"{'memory per GPU (estimate)':28}{need.total / 2**30:,.2f} GiB with {processes} processes, ZeRO-{config.zero}"
    ]
    lines += [f"{'  ' + name:28}{value / 2**30:,.2f} GiB" for name, value in parts.items()]
    if need.host:
        lines += [f"{'of its machine, for each':28}{need.host / 2**30:,.2f} GiB"]
    micro = config.micro(processes)
    lines += [f"{'a step of one process':28}{config.passes(processes)} passes of {micro} pictures"]
    return "\n".join(lines)


def flat(values: dict[str, object], path: str = "") -> dict[str, object]:
    """Nested values under dotted names."""
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return found


def pretrain(arguments: Arguments, processes: list[int], changes: dict[str, float]) -> None:
    """Run to the end, on the cluster or on this machine, on one of these numbers of processes."""
    from pipeline.track import log
    from pipeline.track.runs import check, tracking_uri
    from pipeline.train.folder import (
        Job,
        finish_metrics,
        finished,
        open_folder,
        refuse_another,
        refuse_misfits,
        roots_of,
    )
    from shards.cluster import connect, require
    from shards.storage import Folder

    config, name = located(arguments.config), arguments.run or arguments.config.name
    folder = Folder(arguments.to) / name
    uri = tracking_uri(arguments.tracking_uri or None)
    training, validation = refuse_misfits(config, processes[0])
    check(uri)
    roots = roots_of(config, training, validation)
    refuse_another(config, folder, roots)
    if about := finished(folder):
        finish_metrics(folder, uri)
        print(f"{name} is finished: {result(about)}; {folder.absolute}/export")
        return
    folder.check_writable()
    # Ray takes seconds to start, in which MLflow can be imported, which takes one.
    Thread(target=log.client, args=(uri,), daemon=True).start()
    connect()
    from pipeline.launch import has_gpus, launch

    gpus = has_gpus()
    least = processes[0]
    needed = {"CPU": float(least * arguments.cpus_each), **({"GPU": least} if gpus else {})}
    require(needed, f"{name} on {least} processes", wait_s=arguments.wait_for_resources)
    open_folder(config, folder.absolute, roots)
    if changes:
        from pipeline.train.folder import record_change

        step = record_change(folder, config, changes)
        print(f"{name}: {', '.join(f'{field}={value:g}' for field, value in changes.items())} from step {step:,} on")
    facts = {
        "parameters": flops.parameters(config.model, config.classes),
        "samples": training.samples,
        "steps": config.steps(training.samples),
        "processes": arguments.processes,
    }
    tags = {"vitscale.kind": "pretrain", "vitscale.run": name, "vitscale.folder": folder.absolute}
    tags["data_root"] = training.root
    mlflow_run = log.begin(uri, name, tags, {**flat(asdict(config)), **facts}, same="vitscale.folder")
    try:
        launch(
            Job(config, folder.absolute, uri, mlflow_run, name),
            processes,
            gpus=gpus,
            cpus_each=arguments.cpus_each,
            max_failures=arguments.max_failures,
            resize_seconds=arguments.resize_seconds,
        )
    except BaseException as error:
        log.end(uri, mlflow_run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    about = finished(folder)
    assert about, "a run that ends well has exported its model"
    log.end(uri, mlflow_run, tags={"vitscale.checkpoint": about["digest"]})
    print(f"{name}: {result(about)}; {folder.absolute}/export")


def located(config: Config) -> Config:
    """The run with its folders as they read from any working directory: those of its processes are others."""
    from shards.storage import Folder

    data = config.data
    places = {place: value for place in ("shards", "validation", "cache") if (value := getattr(data, place))}
    found = {
        place: ",".join(Folder(each.strip()).absolute for each in value.split(",")) for place, value in places.items()
    }
    learnt = config.distillation
    if learnt.teacher:
        learnt = replace(learnt, teacher=Folder(learnt.teacher).absolute)
    start = Folder(config.start).absolute if config.start else ""
    return replace(config, data=replace(data, **found), distillation=learnt, start=start)


def result(about: dict) -> str:
    """What came of a run, in a few words."""
    metrics = about["metrics"]
    if "val_accuracy" not in metrics:
        return f"{metrics['steps']:,} steps"
    return f"val accuracy {100 * metrics['val_accuracy']:.2f} % after {metrics['steps']:,} steps"


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
