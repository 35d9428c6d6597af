"""Fine-tune a pretrained model to many tasks, and train the same model from scratch on them to compare.

    python jobs/finetune.py --checkpoint RUN --tasks digits,mnist,fashion_offset --data SETS --to FOLDER

RUN is a run's folder. For each task a learning rate is chosen on 200 pictures, then the model is trained on all 1,000
and tested once, with each of several seeds. What has a result in FOLDER is not run again.
"""

import sys
from dataclasses import dataclass

from pipeline.cli import parse, run


@dataclass(frozen=True)
class Arguments:
    """What to fine-tune, to what, and how."""

    checkpoint: str
    """Folder of a finished run, or of an export."""
    data: str
    """Folder that holds the tasks' shard sets, as DATA/TASK/SPLIT."""
    to: str
    """Folder for the results."""
    tasks: str = "digits,mnist,fashion_offset"
    """Tasks, with commas between them."""
    protocol: str = "demo"
    rates: tuple[float, ...] = ()
    """Learning rates to choose from; the protocol's if none are given."""
    seeds: int = 3
    scratch: bool = True
    """Also train from scratch."""
    cpus_each: float = 1.0
    """CPUs of a trial."""
    gpus_each: float = 0.0
    """GPUs of a trial; several trials share one with less than 1."""
    retries: int = 2
    """How often a trial that failed is tried again."""
    tracking_uri: str = ""
    """Where MLflow is; the environment's MLFLOW_TRACKING_URI if empty, else a file in ~/.local/share/vitscale."""


def main(argv: list[str]) -> None:
    """Check what can be checked, then run what is missing."""
    arguments = parse(Arguments, argv)
    if arguments.seeds < 1:
        raise ValueError(f"seeds is {arguments.seeds}; at least 1 is needed")
    from pipeline.models.weights.exported import find
    from pipeline.track.log import Trials
    from pipeline.track.runs import check, tracking_uri
    from pipeline.transfer import protocols, sweep, tasks
    from shards.cluster import connect, require
    from shards.progress import Progress
    from shards.storage import Folder

    source = find(arguments.checkpoint)
    chosen = tasks.named(arguments.tasks)
    protocol = protocols.named(arguments.protocol)
    data, folder = Folder(arguments.data).absolute, Folder(Folder(arguments.to).absolute)
    sets = {task.name: tasks.find(data, task) for task in chosen}
    folder.check_writable()
    uri = tracking_uri(arguments.tracking_uri or None)
    check(uri)
    wanted = sweep.Wanted(
        tasks=chosen,
        data={name: tuple((split, s.manifest.root) for split, s in of.items()) for name, of in sets.items()},
        starts=("pretrained", "scratch") if arguments.scratch else ("pretrained",),
        protocol=protocol,
        rates=arguments.rates or protocol.rates,
        seeds=tuple(range(arguments.seeds)),
        pretrained=source.digest,
        architecture=source.architecture,
    )
    trials = Trials(uri, source.digest)
    progress = Progress("fine-tuning", wanted.count, "trials")

    def finished(name: str, result: dict) -> None:
        metrics = {key: float(result[key]) for key in ("accuracy", "count", "seconds")}
        title = " ".join(str(sweep.params(result)[key]) for key in ("task", "start", "split", "lr", "seed"))
        trials.add(name, title, sweep.params(result), metrics)

    done = sweep.Results(folder).load()
    missing = [trial for trial in wanted.trials(done) if trial.name not in done]
    if missing:
        connect()
        need = {"CPU": arguments.cpus_each, **({"GPU": arguments.gpus_each} if arguments.gpus_each else {})}
        require(need, "a trial")
    errors = sweep.sweep(
        wanted,
        source,
        data,
        folder,
        resources=sweep.Resources(arguments.cpus_each, arguments.gpus_each),
        retries=arguments.retries,
        progress=lambda done, running, failed: progress.update(done, running=str(running), failed=str(failed)),
        finished=finished,
    )
    print(f"fine-tuning: {wanted.count - len(errors)} of {wanted.count} trials have results; {folder.absolute}/results")
    if left := trials.flush():
        raise RuntimeError(f"MLflow at {uri} has not taken {left} results: start again when it is back; none is lost")
    if errors:
        raise RuntimeError(f"{len(errors)} trials failed: " + "; ".join(errors.values()))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
