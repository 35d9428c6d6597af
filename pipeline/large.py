"""A fine-tuning that is a run of its own: of a task too large for one process, on all of a cluster.

It lives in a folder like every run and goes on from what it finds there, whoever is killed and on as many processes as
there is room for. When all steps are done the processes share the test pictures, each of which is looked at once.
"""

import json
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Config, Data, Optim
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Feed
from pipeline.launch import has_gpus, launch
from pipeline.objectives.classify import correct
from pipeline.track import log
from pipeline.track.runs import tracking_uri
from pipeline.train.checkpoint import CHECKPOINTS
from pipeline.train.engine import Engine
from pipeline.train.folder import Job, finished, open_folder, refuse_misfits, roots_of
from pipeline.train.objective import to_device
from pipeline.train.run import Told, work
from pipeline.transfer.finetune import Trial, found_for
from pipeline.transfer.protocols import Recipe
from pipeline.transfer.tasks import DEV, Part, Task
from shards.manifest import ShardSet
from shards.storage import Folder

Result = dict[str, Any]

COUNTED = "counted.json"
RUNGS = "rungs"
LANES = 64
"""The most; they decide the order of the pictures, so they depend on the recipe alone."""


@dataclass(frozen=True)
class Stretch:
    """A part of one shard set, in hundredths of it."""

    url: str
    part: tuple[int, int]


def perform(
    trial: Trial,
    source: str,
    data: str,
    folder: Folder,
    *,
    processes: Sequence[int],
    say: Callable[[str], None] = print,
    cpus_each: int = 1,
    max_failures: int = 10,
    uri: str = "",
) -> Result:
    """Run the trial, or the rest of it, with the checkpoint at `source` and the tasks' shard sets under `data`.

    On the largest of these numbers of processes for which the Ray cluster has room, under `folder`/runs. The same trial
    has the same result on any of them, to rounding. MLflow at `uri` (the environment's if empty) has its curves.
    ValueError, before a machine is asked for, where the checkpoint, the task's data or the recipe do not fit; as
    `pipeline.launch.launch` otherwise.
    """
    began = time.monotonic()
    config, count = planned(trial, source, data, cpus_each=cpus_each, precision=_precision())
    run, title = folder_of(trial, folder), trial.describe()
    _go(trial, config, count, run, processes, say, cpus_each, max_failures, uri)
    counted = json.loads(run.read(COUNTED))
    run.remove(CHECKPOINTS)  # the model is exported, and nothing goes on from here
    own = counted.pop("")
    say(f"{title}: {100 * own['accuracy']:.2f} % of {own['count']:,} pictures")
    seconds = time.monotonic() - began
    return {"trial": asdict(trial), **own, "classes": config.classes, "seconds": seconds, "also": counted}


def judge_early(
    trial: Trial,
    source: str,
    data: str,
    folder: Folder,
    steps: int,
    *,
    processes: Sequence[int],
    say: Callable[[str], None] = print,
    cpus_each: int = 1,
    max_failures: int = 10,
    uri: str = "",
) -> float:
    """The accuracy on the pictures to choose a rate by when this many steps of the trial, or more, are done.

    They are those of the run that `perform` goes on with, which is left with a checkpoint: nothing of it is a result.
    Errors as `perform`; ValueError for a trial that would see the test.
    """
    if trial.split != DEV:
        raise ValueError(f"only on {DEV} is it looked at how well a trial does so far, not {trial.describe()}")
    run = folder_of(trial, folder)
    if steps not in (early := judged_early(trial, folder)):
        if finished(run):
            return json.loads(run.read(COUNTED))[""]["accuracy"]
        config, count = planned(trial, source, data, cpus_each=cpus_each, precision=_precision())
        count = replace(count, file=f"{RUNGS}/{steps}.json")
        _go(trial, config, count, run, processes, say, cpus_each, max_failures, uri, until=steps)
        early = judged_early(trial, folder)
    return early[steps]


def judged_early(trial: Trial, folder: Folder) -> dict[int, float]:
    """By steps, the accuracies that `judge_early` has found so far."""
    rungs = folder_of(trial, folder) / RUNGS
    steps = sorted(int(stem) for name in rungs.sizes() if (stem := name.removesuffix(".json")).isdecimal())
    return {step: json.loads(rungs.read(f"{step}.json"))[""]["accuracy"] for step in steps}


def folder_of(trial: Trial, folder: Folder) -> Folder:
    """The run that a trial is, below the folder of a sweep."""
    return Folder((folder / f"runs/{trial.name}").absolute)


def _precision() -> Literal["bf16", "fp32"]:
    return "bf16" if has_gpus() else "fp32"


def _go(
    trial: Trial,
    config: Config,
    count: "Count",
    run: Folder,
    processes: Sequence[int],
    say: Callable[[str], None],
    cpus_each: int,
    max_failures: int,
    uri: str,
    until: int | None = None,
) -> None:
    """Train to the end, or until so many steps are done, unless that has been done."""
    numbers, title = _allowed(config, processes), trial.describe()
    training, validation = refuse_misfits(config, numbers[0])
    if run.exists(count.file) if until else finished(run):
        return
    early = f"{until:,} of " if until else ""
    say(f"{title}: a run of its own, {early}{config.steps(training.samples):,} steps; {run.absolute}")
    place = tracking_uri(uri or None)
    open_folder(config, run.absolute, roots_of(config, training, validation))
    mlflow_run = _begin(place, run, title, trial)
    try:
        launch(
            Job(config, run.absolute, place, mlflow_run, title),
            numbers,
            gpus=has_gpus(),
            cpus_each=cpus_each,
            max_failures=max_failures,
            work=partial(work, ended=count, until=until),
            ended=(lambda: run.exists(count.file)) if until else None,
        )
    except BaseException as error:
        log.end(place, mlflow_run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    log.end(place, mlflow_run, "KILLED" if until else "FINISHED")


def planned(
    trial: Trial, source: str, data: str, *, cpus_each: int, precision: Literal["bf16", "fp32"]
) -> tuple[Config, "Count"]:
    """The run that a trial is, and what is counted at its end; ValueError where they do not fit together."""
    found, task = found_for(trial, source, data), trial.task
    learnt = _stretches(task, found.sets, task.training(trial.split))
    if len(learnt) != 1:
        raise ValueError(f"{task.name} is learnt from several sets or parts of them; a run takes one")
    judged = {name: tuple(_stretches(task, found.sets, parts)) for name, parts in found.judged.items()}
    recipe = trial.recipe
    config = Config(
        name=trial.name,
        classes=found.classes,
        model=found.model,
        start=found.start.folder.absolute if trial.start == "pretrained" else "",
        data=_data(recipe, learnt[0], cpus_each),
        augment=recipe.augment,
        optim=_optim(recipe, trial.rate),
        objective="softmax",
        smoothing=recipe.smoothing,
        duration=float(recipe.steps),
        unit="steps",
        batch=recipe.batch,
        precision=precision,
        seed=trial.seed,
        save_every=max(1, min(500, recipe.steps // 10)),
        keep=1,
        log_every=50,
    )
    return config, Count(judged)


def _stretches(task: Task, sets: dict[str, ShardSet], parts: Sequence[Part]) -> list[Stretch]:
    """The parts, in order; those that adjoin as one."""
    found: list[Stretch] = []
    for part in parts:
        url = sets[task.where(part)].folder.absolute
        if found and found[-1].url == url and found[-1].part[1] == part.first:
            found[-1] = Stretch(url, (found[-1].part[0], part.last))
        else:
            found.append(Stretch(url, (part.first, part.last)))
    return found


def _data(recipe: Recipe, learnt: Stretch, cpus_each: int) -> Data:
    """How the recipe cuts its pictures; ValueError where a run has no such cut."""
    if recipe.method != "all" or recipe.training == "resmall" or (recipe.evaluation == "square" and recipe.judged < 1):
        how = f"{recipe.method}, pictures cut by {recipe.training}, {recipe.judged:g} of a {recipe.evaluation} judged"
        raise ValueError(f"this recipe is none for a run of its own ({how}): choose a protocol that trains all weights")
    # Each lane gives two pictures of a step or more, so that no pair is of one picture twice.
    most = min(LANES, recipe.batch if recipe.repeats == 1 else max(1, recipe.batch // 2))
    lanes = next(lanes for lanes in range(most, 0, -1) if recipe.batch % lanes == 0)
    return Data(
        shards=learnt.url,
        part=learnt.part,
        lanes=lanes,
        window=2048,
        crop_area=recipe.area,
        crop_side={"inception": 0.0, "crop": recipe.share, "resize": 1.0}[recipe.training],
        flip=recipe.flip,
        eval_crop=recipe.judged if recipe.evaluation == "central" else 0.0,
        threads=cpus_each,
    )


def _optim(recipe: Recipe, rate: float) -> Optim:
    return Optim(
        optimizer=recipe.optimizer,
        lr=rate,
        warmup=recipe.warmup,
        decay=recipe.decay,
        end_lr=recipe.end * rate,
        boundaries=recipe.boundaries,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        decayed=recipe.decayed,
        clip=recipe.clip,
        average=recipe.average,
    )


def _allowed(config: Config, processes: Sequence[int]) -> list[int]:
    """Those of the numbers on which the run can be; ValueError says why where there are none."""
    found = sorted(number for number in processes if not config.problem(number))
    if not found:
        config.check(max(processes))
    return found


def _begin(uri: str, run: Folder, title: str, trial: Trial) -> str:
    """The MLflow run that has the curves. The result goes to the trial's own, with those of small tasks."""
    tags = {"vitscale.kind": "large", "vitscale.folder": run.absolute, "vitscale.of": trial.name}
    params = {"task": trial.task.name, "split": trial.split, "lr": trial.rate, "seed": trial.seed}
    return log.begin(uri, title, tags, {**params, "protocol": trial.protocol}, same="vitscale.folder")


@dataclass(frozen=True)
class Count:
    """What all processes do when the steps are done: look at every picture of each of the test sets once."""

    judged: dict[str, tuple[Stretch, ...]]
    """What the accuracy is of, under "", and further test sets by their names."""
    file: str = COUNTED
    """Of the run's folder, to write to."""

    def __call__(self, job: Job, engine: Engine, told: Told) -> None:
        """Write `file`: of each set how many are right, and a bit for each picture, in the set's order."""
        with engine.averaged():
            said = {name: _judgement(job.config, stretches, engine, told) for name, stretches in self.judged.items()}
        if engine.world.first:
            Folder(job.folder).write(self.file, json.dumps(said).encode())


def _judgement(config: Config, stretches: Sequence[Stretch], engine: Engine, told: Told) -> dict[str, Any]:
    parts = [_right(config, Corpus.open(one.url, one.part), engine, told).cpu() for one in stretches]
    right, labelled = torch.cat(parts, dim=1).bool().numpy()
    hits, count = int(right.sum()), int(labelled.sum())
    bits = b64encode(np.packbits(right).tobytes()).decode()
    return {"accuracy": hits / count, "correct": hits, "count": count, "right": bits}


@torch.no_grad()
def _right(config: Config, corpus: Corpus, engine: Engine, told: Told) -> Tensor:
    """(2, n): of each picture of a set whether it is named rightly, and whether it has a label at all."""
    feed = Feed(corpus, config, engine.world, pinned=engine.device.type == "cuda")
    found = torch.zeros(3, corpus.samples, device=engine.device)
    engine.model.eval()
    for batch in told(feed.evaluation(config.micro(engine.world.size))):
        given = to_device(batch, engine.device, config.classes)
        right = correct(engine.model(given.images.to(engine.dtype)), given.labels) & (given.labels >= 0).any(1)
        seen = torch.stack([right, (given.labels >= 0).any(1), given.weights > 0]).float()
        here = batch.samples >= 0
        found[:, batch.samples[here].to(engine.device)] += seen[:, here.to(engine.device)]
    feed.close()
    engine.model.train()
    found = engine.sum(found)
    assert bool((found[2] == 1).all()), "a picture that was looked at twice, or not at all"
    return found[:2]
