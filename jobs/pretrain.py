"""Pretrain a model on a shard set.

    python jobs/pretrain.py EXPERIMENT --data.shards SET --to FOLDER [--processes N] [--model.width 96 ...]

A run lives in FOLDER/RUN and goes on from what it finds there. Runs on the Ray cluster it is submitted to, or starts a
Ray on this machine. `python jobs/pretrain.py EXPERIMENT --help` lists every field with its default.
"""

import sys
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import tyro

from pipeline.cli import parse, run
from pipeline.config import Config
from pipeline.experiments import known, load, summary
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
    processes: int = 1
    """Processes: one for each GPU, or with --cpus-each on CPUs."""
    cpus_each: int = 1
    """CPUs for each process."""
    tracking_uri: str = ""
    """Where MLflow is; the environment's MLFLOW_TRACKING_URI if empty, else a file in ~/.local/share/vitscale."""
    max_failures: int = 10
    """Starts after a failure before the run is given up."""
    wait_for_resources: float = 0.0
    """Seconds that a cluster which grows on demand is given to show what it can have."""
    dry_run: bool = False
    """Print what would be run and what it would need, and end."""


def main(argv: list[str]) -> None:
    """Check everything that can be known before a machine is asked for, then run to the end."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        print("Experiments:\n" + "\n".join(f"    {name:16} {summary(name)}" for name in known()))
        return
    arguments = parse(Arguments, argv[1:], default=Arguments(load(argv[0])))
    config = arguments.config
    config.check(arguments.processes)
    if arguments.dry_run:
        print(plan(config, arguments.processes))
        return
    if not arguments.to:
        raise ValueError("--to is missing: the folder or URL under which runs are kept")
    pretrain(arguments)


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
    parts["activations"] = need.activations
    lines += [
        f"{'memory per GPU (estimate)':28}{need.total / 2**30:,.2f} GiB with {processes} processes, ZeRO-{config.zero}"
    ]
    lines += [f"{'  ' + name:28}{value / 2**30:,.2f} GiB" for name, value in parts.items()]
    micro = config.micro(processes)
    lines += [f"{'a step of one process':28}{config.passes(processes)} passes of {micro} pictures"]
    return "\n".join(lines)


def flat(values: dict[str, object], path: str = "") -> dict[str, object]:
    """Nested values under dotted names."""
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return found


def pretrain(arguments: Arguments) -> None:
    """Run to the end, on the cluster or on this machine."""
    from pipeline.launch import has_gpus, launch
    from pipeline.track import log
    from pipeline.track.runs import check, tracking_uri
    from pipeline.train.objective import teacher_of
    from pipeline.train.run import Job, finish_metrics, finished, open_folder, refuse_another, refuse_misfits
    from shards.cluster import connect, require
    from shards.storage import Folder

    config, name = located(arguments.config), arguments.run or arguments.config.name
    folder = Folder(arguments.to) / name
    uri = tracking_uri(arguments.tracking_uri or None)
    training, validation = refuse_misfits(config, arguments.processes)
    check(uri)
    roots = {"training": training.root, **({"validation": validation.root} if validation else {})}
    if config.distillation.teacher:
        roots["teacher"] = teacher_of(config).digest
    refuse_another(config, folder, roots)
    if about := finished(folder):
        finish_metrics(folder, uri)
        print(f"{name} is finished: {result(about)}; {folder.absolute}/export")
        return
    folder.check_writable()
    connect()
    gpus = has_gpus()
    needed = {"CPU": float(arguments.processes * arguments.cpus_each), **({"GPU": arguments.processes} if gpus else {})}
    require(needed, f"{name} on {arguments.processes} processes", wait_s=arguments.wait_for_resources)
    open_folder(config, folder.absolute, roots)
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
            arguments.processes,
            gpus=gpus,
            cpus_each=arguments.cpus_each,
            max_failures=arguments.max_failures,
        )
    except BaseException:
        log.end(uri, mlflow_run, failed=True)
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
    return replace(config, data=replace(data, **found), distillation=learnt)


def result(about: dict) -> str:
    """What came of a run, in a few words."""
    metrics = about["metrics"]
    if "val_accuracy" not in metrics:
        return f"{metrics['steps']:,} steps"
    return f"val accuracy {100 * metrics['val_accuracy']:.2f} % after {metrics['steps']:,} steps"


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
