"""What a run is and what its folder holds, as far as whoever starts it has to know: nothing here imports torch."""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from pipeline import code
from pipeline.config import Config, Optim, differences, from_dict, to_dict
from pipeline.data.corpus import Corpus
from pipeline.data.plan import order
from pipeline.track.log import Log
from shards.storage import Folder

CONFIG = "config.json"
ABOUT = "about.json"
EXPORT = "export"
CHANGES = "changes.json"
UNSENT = "metrics-unsent.json"
FLUSH_SECONDS = 60.0
CHANGEABLE = ("lr", "end_lr", "clip")
"""Fields of `optim` that may change in mid-run."""

# What may differ from one start of a run to the next: it decides nothing that the run computes. Where the pictures
# and other models are may change, since the digest of what they are stands beside it.
_FREE_OF_DATA = ("shards", "validation", "samples", "threads", "cache", "cache_gigabytes", "fetches")
_LIMITS_OF_DATA = ("refused_limit", "wait_seconds", "patience_seconds")
FREE = {f"data.{name}" for name in _FREE_OF_DATA + _LIMITS_OF_DATA} | {"keep", "distillation.teacher", "start"}
FREE |= {"health.skips", "health.hang_seconds", "save_beside", "probe"}


@dataclass(frozen=True)
class Job:
    """What each process of a run has to know."""

    config: Config
    folder: str
    tracking_uri: str
    mlflow_run: str
    name: str


def refuse_misfits(config: Config, processes: int) -> tuple[Corpus, Corpus | None]:
    """The pictures to train and validate on, or ValueError: all that can be known before a machine is asked for."""
    config.check(processes)
    if not config.data.shards:
        raise ValueError("data.shards is empty: give the folder or URL of a shard set (made by jobs/prepare.py)")
    data = config.data
    training = Corpus.open(data.shards, data.part)
    validation = Corpus.open(data.validation, data.validation_part) if data.validation else None
    for corpus in filter(None, (training, validation)):
        if len(corpus.classes) != config.classes:
            where = corpus.sets[0].folder.absolute
            raise ValueError(f"{where} has {len(corpus.classes)} classes, the run {config.classes}")
    # Both import torch.
    if config.distillation.teacher:
        from pipeline.train.objective import teacher_of

        teacher_of(config)
    if config.start:
        from pipeline.train.origin import origin_of

        origin_of(config)
    samples = training.samples
    order(training.parts, config.data.weights, lanes=config.data.lanes, window=config.data.window, seed=config.seed)
    if config.steps(samples) < 1:
        of = f" of {samples:,} pictures" if config.unit == "epochs" else ""
        raise ValueError(f"{config.duration:g} {config.unit}{of} are not one step of {config.batch}")
    return training, validation


def roots_of(config: Config, training: Corpus, validation: Corpus | None) -> dict[str, str]:
    """Digests of all that a run reads, by what it is to the run."""
    roots = {"training": training.root, **({"validation": validation.root} if validation else {})}
    if config.distillation.teacher:
        from pipeline.train.objective import teacher_of

        roots["teacher"] = teacher_of(config).digest
    if config.start:
        from pipeline.train.origin import origin_of

        origin = origin_of(config)
        assert origin
        roots["start"] = origin.digest
    return roots


def open_folder(config: Config, url: str, data_roots: dict[str, str]) -> Folder:
    """The run's folder, with its configuration in it; ValueError where it holds another run, with what differs."""
    folder = Folder(Folder(url).absolute)
    folder.check_writable()
    folder.create(CONFIG, json.dumps(to_dict(config), indent=1).encode())
    about = {"code": code.version(), "data": data_roots}
    folder.create(ABOUT, json.dumps(about, indent=1).encode())
    refuse_another(config, folder, data_roots)
    return folder


def refuse_another(config: Config, folder: Folder, data_roots: dict[str, str]) -> None:
    """Raise ValueError, with the fields that differ, where the folder holds another run than this one."""
    found: list[str] = []
    if folder.exists(CONFIG):
        theirs = from_dict(json.loads(folder.read(CONFIG)))
        free = FREE if bool(config.start) == bool(theirs.start) else FREE - {"start"}
        found += [line for line in differences(config, theirs) if line.split(":")[0] not in free]
    if folder.exists(ABOUT):
        roots = json.loads(folder.read(ABOUT))["data"]
        found += [f"data root of {k}: {data_roots.get(k)} != {v}" for k, v in roots.items() if v != data_roots.get(k)]
    if found:
        raise ValueError(f"{folder.absolute} holds another run; these fields differ: {'; '.join(found)}")


def finished(folder: Folder) -> dict[str, Any] | None:
    """What the export says of itself, where the run has come to its end."""
    try:
        return json.loads((folder / EXPORT).read("model.json"))
    except FileNotFoundError:
        return None


def changes_of(folder: Folder) -> list[dict[str, float]]:
    """The changes in mid-run, as `record_change` has written them."""
    try:
        return json.loads(folder.read(CHANGES))
    except FileNotFoundError:
        return []


def optim_at(config: Config, changes: list[dict[str, float]], step: int) -> Optim:
    """What holds at `step`, counted from 0: the configuration with every change up to that step, later ones last."""
    optim = config.optim
    for change in changes:
        if change["step"] <= step:
            optim = replace(
                optim, **{name: change[f"optim.{name}"] for name in CHANGEABLE if f"optim.{name}" in change}
            )
    return optim


def record_change(folder: Folder, config: Config, changes: dict[str, float]) -> int:
    """Let fields of the run have other values from its newest complete checkpoint on; returns that step.

    ValueError where a field cannot be changed in mid-run, or not to that. What holds already is not written again.
    """
    for name, value in changes.items():
        if name.removeprefix("optim.") not in CHANGEABLE or not name.startswith("optim."):
            allowed = ", ".join(f"optim.{name}" for name in CHANGEABLE)
            raise ValueError(f"{name} cannot be changed in mid-run; these can: {allowed}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} cannot be changed to {value}: it is a number, at least 0")
    from pipeline.train.checkpoint import complete

    step, before = [0, *complete(folder)][-1], changes_of(folder)
    after = [*before, {"step": step, **changes}]
    if any(
        optim_at(config, before, at) != optim_at(config, after, at) for at in {step, *(int(c["step"]) for c in before)}
    ):
        folder.write(CHANGES, json.dumps(after, indent=1).encode())
    return step


def flush(folder: Folder, log: Log) -> None:
    """Send what is left to MLflow; what it does not take stays in the run's folder for the next start."""
    if left := log.close(FLUSH_SECONDS):
        folder.write(UNSENT, json.dumps({"mlflow_run": log.run_id, "records": left}).encode())
    else:
        folder.remove(UNSENT)


def finish_metrics(folder: Folder, uri: str) -> None:
    """Send what a finished run could not send, if anything is left of it."""
    if folder.exists(UNSENT):
        left = json.loads(folder.read(UNSENT))
        flush(folder, Log(uri, left["mlflow_run"], left["records"]))
