"""A run, put together: what it is, what its folder holds, and what each of its processes does."""

import json
import math
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline import code
from pipeline.config import Config, Optim, differences, from_dict, to_dict
from pipeline.data import decode
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Batch, Feed, order_of
from pipeline.data.plan import part_of_step
from pipeline.data.refused import Refused
from pipeline.models import flops
from pipeline.models.build import build as build_model
from pipeline.models.build import initialise
from pipeline.models.weights.exported import put
from pipeline.objectives.classify import HEAD_BIAS
from pipeline.seed import number
from pipeline.track.log import Log
from pipeline.train.checkpoint import Checkpoints, TakenOver, complete, name_of, newest
from pipeline.train.engine import Engine
from pipeline.train.evaluate import evaluate
from pipeline.train.health import GoBack, Health, Sick, listed
from pipeline.train.ledger import CHECKPOINTING, Account, Ledger, Notes, line, metrics, noted, resumed
from pipeline.train.loop import Values, train
from pipeline.train.meter import Meter
from pipeline.train.objective import MASKED, PATCH_HEAD, Objective, teacher_of, with_heads
from pipeline.world import World
from shards.progress import Progress
from shards.storage import Folder

CONFIG = "config.json"
ABOUT = "about.json"
DECODER = "decoder"
REFUSED = "refused"
EXPORT = "export"
MILESTONES = "milestones"
ATTEMPT = "attempt"
CHANGES = "changes.json"
SKIPPED, SPIKES = "skipped", "spikes"
LEDGER = "ledger"
UNSENT = "metrics-unsent.json"
FLUSH_SECONDS = 60.0
STOP_SECONDS = 5.0
CHANGEABLE = ("lr", "end_lr", "clip")
"""Fields of `optim` that may change in mid-run."""

# What may differ from one start of a run to the next: it decides nothing that the run computes. Where the pictures
# are may change, since the digest of what they are stands beside it.
_FREE_OF_DATA = ("shards", "validation", "samples", "threads", "cache", "cache_gigabytes", "fetches")
_LIMITS_OF_DATA = ("refused_limit", "wait_seconds", "patience_seconds")
FREE = {f"data.{name}" for name in _FREE_OF_DATA + _LIMITS_OF_DATA} | {"keep", "distillation.teacher"}
FREE |= {"health.skips", "health.hang_seconds", "save_beside"}


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
    training = Corpus.open(config.data.shards)
    validation = Corpus.open(config.data.validation) if config.data.validation else None
    for corpus in filter(None, (training, validation)):
        if len(corpus.classes) != config.classes:
            where = corpus.sets[0].folder.absolute
            raise ValueError(f"{where} has {len(corpus.classes)} classes, the run {config.classes}")
    if config.distillation.teacher:
        teacher_of(config)
    samples = training.samples
    order_of(training, config)
    if config.steps(samples) < 1:
        of = f" of {samples:,} pictures" if config.unit == "epochs" else ""
        raise ValueError(f"{config.duration:g} {config.unit}{of} are not one step of {config.batch}")
    return training, validation


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
        found += [line for line in differences(config, theirs) if line.split(":")[0] not in FREE]
    if folder.exists(ABOUT):
        roots = json.loads(folder.read(ABOUT))["data"]
        found += [f"data root of {k}: {data_roots.get(k)} != {v}" for k, v in roots.items() if v != data_roots.get(k)]
    if found:
        raise ValueError(f"{folder.absolute} holds another run; these fields differ: {'; '.join(found)}")


def refuse_other_decoder(folder: Folder) -> None:
    """Raise ValueError where other processes of the run, now or before, decode by something else than this one.

    Else the pictures of a step would depend on the machine.
    """
    if folder.create(DECODER, decode.BY.encode()):
        return
    theirs = folder.read(DECODER).decode()
    if theirs != decode.BY:
        raise ValueError(
            f"{folder.absolute} was begun with pictures decoded by {theirs}, this machine has {decode.BY}: install "
            f"libjpeg-turbo's headers and vitscale on all machines alike, or remove {DECODER} there to go on regardless"
        )


def finished(folder: Folder) -> dict[str, Any] | None:
    """What the export says of itself, where the run has come to its end."""
    try:
        return json.loads((folder / EXPORT).read("model.json"))
    except FileNotFoundError:
        return None


def classes_of(config: Config) -> int:
    """Classes of the model's head; 0, and no head, where the objective has no classes."""
    return 0 if config.objective == "masked" else config.classes


def build(config: Config) -> nn.Module:
    """The run's model with its initial weights, the same on every process."""
    model = build_model(config.model, classes_of(config))
    head_bias = HEAD_BIAS if config.objective == "sigmoid" else 0.0
    initialise(model, torch.Generator().manual_seed(number("weights", config.seed)), head_bias=head_bias)
    return with_heads(config, model)


def claim(folder: Folder, attempt: str) -> None:
    """Say that the run is now that of the start `attempt`; an earlier one that is still at work has lost it."""
    folder.write(ATTEMPT, attempt.encode())


def owns(folder: Folder, attempt: str) -> bool:
    """Whether no other start has claimed the run since `attempt` did."""
    try:
        return folder.read(ATTEMPT).decode() == attempt
    except FileNotFoundError:
        return True


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
    step, before = [0, *complete(folder)][-1], changes_of(folder)
    after = [*before, {"step": step, **changes}]
    if any(
        optim_at(config, before, at) != optim_at(config, after, at) for at in {step, *(int(c["step"]) for c in before)}
    ):
        folder.write(CHANGES, json.dumps(after, indent=1).encode())
    return step


def left_out(folder: Folder) -> dict[int, Sick]:
    """The steps of a run that are not to be taken, by number: those that were sick, and those that a person names."""
    notes = folder / SKIPPED
    found = [Sick.from_json(notes.read(name)) for name in notes.sizes() if name.endswith(".json")]
    return {sick.step: sick for sick in found}


class Steps(Protocol):
    """What is told of each step, such as a watch that ends a process which does none any more."""

    def step(self, done: int) -> None:
        """So many steps are done."""
        ...


def work(
    job: Job,
    world: World,
    device: torch.device,
    say: Callable[[str], None],
    *,
    stop: Callable[[int], bool] = lambda done: False,
    hang: Steps | None = None,
) -> bool:
    """What one process does, from what the folder holds to the end of the run, or until `stop` says so.

    `stop` is asked after each step, and where it says so on any process all end with a checkpoint. Returns whether the
    run has come to its end. TakenOver where another start of the run has.
    """
    ledger = Ledger(world.size)
    refuse_other_decoder(Folder(job.folder))
    training, validation = refuse_misfits(job.config, world.size)
    start = Start(job, world, device, say, ledger, training, validation)
    try:
        return start.go(stop, hang)
    finally:
        start.close()


class Start:
    """One start of a run, seen by one of its processes."""

    def __init__(
        self,
        job: Job,
        world: World,
        device: torch.device,
        say: Callable[[str], None],
        ledger: Ledger,
        training: Corpus,
        validation: Corpus | None,
    ) -> None:
        self.job, self.config, self.world, self.device, self.ledger = job, job.config, world, device, ledger
        self.folder, self.training = Folder(job.folder), training
        self.say: Callable[[str], None] = lambda line: say(f"{job.name}: {line}") if world.first else None
        self.steps = self.config.steps(training.samples)
        self.engine = Engine(self.config, build(self.config), world, device)
        self.objective = Objective(self.config, self.engine)
        self.attempt = self.engine.agree(uuid.uuid4().hex[:8])
        if world.first:
            claim(self.folder, self.attempt)
        self.checkpoints = Checkpoints(
            self.folder,
            world,
            self.attempt,
            keep=self.config.keep,
            milestone=self.config.is_milestone,
            export=self._milestone,
            owned=lambda: owns(self.folder, self.attempt),
            beside=self.config.save_beside,
        )
        self.changes = self.engine.agree(changes_of(self.folder) if world.first else None)
        refused = Refused(
            self.folder / REFUSED, self.config.data.refused_limit, lambda line: say(f"{job.name}: {line}")
        )
        self.pictures = Feed(training, self.config, world, refused=refused, pinned=device.type == "cuda")
        self.test = Feed(validation, self.config, world, pinned=device.type == "cuda") if validation else None
        self.notes = Notes(self.folder / LEDGER, self.attempt)
        self.progress = Progress(job.name, self.steps, "steps", say=say)
        self.log: Log | None = None

    def go(self, stop: Callable[[int], bool], hang: Steps | None) -> bool:
        """Go on from what the folder holds; returns whether the run has come to its end."""
        start, record = newest(self.folder, self.world, self.engine, self.say)
        if start:
            self.say(f"goes on after step {start:,} of {self.steps:,}")
        if self.world.first:
            kept = _account_of(record)
            self.ledger.add(resumed(kept, noted(self.folder / LEDGER) or kept))
            tags = {"vitscale.changes": json.dumps(self.changes)} if self.changes else {}
            unsent, logged_at = record.get("metrics", []), record.get("logged_at", 0)
            self.log = Log(self.job.tracking_uri, self.job.mlflow_run, unsent, tags=tags, not_before=logged_at)
        while True:
            try:
                done = self._train(start, record, stop, hang or _Nobody())
                break
            except GoBack as back:
                start, record = self._go_back(back.sick)
        with self.ledger.during(CHECKPOINTING):
            self.checkpoints.wait()
        if done == self.steps:
            self._finish()
        else:
            self._stop(done)
        return done == self.steps

    def _train(self, start: int, record: dict[str, Any], stop: Callable[[int], bool], hang: Steps) -> int:
        """Train from a checkpoint on; returns how many steps are done. GoBack where a step has to be undone."""
        config, engine = self.config, self.engine
        health = self._health(record.get("health"))
        meter = Meter(config, engine, self.pictures, self.log, self.progress, self.training.samples, health)
        meter.last = record.get("last", {})
        self.meter = meter
        self.progress.update(start)

        def judge(batch: Batch) -> Tensor:
            with meter.own.running():
                return self.objective(batch)

        def log(done: int, values: Values) -> None:
            self.ledger.stepped()
            if self.world.first:
                self.notes.keep(self.ledger.account)
            hang.step(done)
            meter.log(done, values)

        def validate(done: int) -> None:
            meter.emit(done)
            engine.average_buffers()
            if self.test and config.objective != "masked":
                batches = self._told(self.test.evaluation(config.micro(self.world.size)), hang, done)
                with engine.averaged():
                    meter.validated(done, evaluate(engine.model, batches, config, self.device, engine.sum))
            hang.step(done)

        def save(done: int) -> None:
            meter.emit(done)
            engine.average_buffers()
            with self.ledger.during(CHECKPOINTING):
                self._save(done, health)
            hang.step(done)

        if not start and not record and config.health.spike == "rollback":
            save(0)  # so that there is something to go back to
        return train(
            config,
            engine,
            self.ledger.waiting(self.pictures.training(start, self.steps)),
            judge,
            samples=self.training.samples,
            start=start,
            health=health,
            optim=lambda step: optim_at(config, self.changes, step),
            log=log,
            validate=validate,
            save=save,
            stop=stop,
        )

    @staticmethod
    def _told(batches: Iterator[Batch], hang: Steps, done: int) -> Iterator[Batch]:
        """The batches of a validation, each of which shows that the process is at work."""
        for batch in batches:
            yield batch
            hang.step(done)

    def _health(self, state: dict[str, Any] | None) -> Health:
        left = self.engine.agree(left_out(self.folder) if self.world.first else None)
        return Health(self.config.health, left, report=self._report, keys=self._keys, state=state)

    def _keys(self, step: int) -> list[str]:
        """Of the pictures of a step, in the order of the batch."""
        batch = self.config.batch
        picks = part_of_step(order_of(self.training, self.config), step, batch, 0, batch)
        return self.training.keys(self.training.first[picks.shard] + picks.place)

    def _report(self, sick: Sick, skipped: bool) -> None:
        """Write a sick step down with its pictures, and say so."""
        if not self.world.first:
            return
        keys, place = self._keys(sick.step), SKIPPED if skipped else SPIKES
        (self.folder / place).write(f"{sick.step}.json", sick.to_json(keys))
        what = "it is left out" if skipped else "it is kept"
        self.say(f"{sick}; {what}: {listed(keys)} ({place}/{sick.step}.json)")

    def _save(self, done: int, health: Health) -> None:
        """Begin to write a checkpoint."""
        kept = {"health": health.state(), "ledger": self.ledger.account().to_dict(), "last": self.meter.last}
        if self.log and 0 < done < self.steps:
            self.log.add(done, metrics(self.ledger.account(), self._exaflops()))

        def also() -> dict[str, Any]:
            # Asked while training goes on: what was logged after this step, the next start will log itself.
            return {"metrics": self.log.unsent(up_to=done), "logged_at": self.log.latest, **kept} if self.log else kept

        self.checkpoints.save(done, self.engine, also)

    def _milestone(self, done: int, weights: dict[str, Tensor]) -> None:
        about = {"data_root": self.training.root, "steps": done}
        export(self.folder, self.config, weights, about, f"{MILESTONES}/{name_of(done)}")

    def _go_back(self, sick: Sick) -> tuple[int, dict[str, Any]]:
        """Undo a step, which will be left out: go back to the newest checkpoint, all of which are before it."""
        self.checkpoints.wait()
        self._report(sick, True)
        start, record = newest(self.folder, self.world, self.engine, self.say)
        assert start <= sick.step, "no checkpoint is written before the steps in it have been judged"
        self.say(f"goes back to step {start:,}, to leave out step {sick.step:,}")
        if self.world.first:
            self.ledger.go_back(_account_of(record))
        return start, record

    def _finish(self) -> None:
        """Export the model, and say what it has cost."""
        weights = self.engine.weights()
        if not self.log:
            return
        if not owns(self.folder, self.attempt):
            raise TakenOver
        spent, exaflops = self.ledger.account(), self._exaflops()
        self.log.add(self.steps, metrics(spent, exaflops))
        about = {"data_root": self.training.root, "steps": self.steps, **self.meter.last}
        export(self.folder, self.config, weights, about)
        self.notes.close(spent)
        flush(self.folder, self.log)
        self.say(line(spent, exaflops, "GPU-hours" if self.device.type == "cuda" else "process-hours"))

    def _stop(self, done: int) -> None:
        """End before the end of the run, which is as it was kept."""
        if self.log:
            self.notes.close(self.ledger.account())
            self.log.close(STOP_SECONDS)  # what this does not send is kept, too
            self.say(f"stops after step {done:,} of {self.steps:,}, which is kept")

    def _exaflops(self) -> float:
        """Of all steps, those that were made again each time."""
        pictures = self.ledger.account().steps * self.config.batch
        return flops.training_exaflops(self.config.model, self.config.classes, pictures)

    def close(self) -> None:
        """Stop the threads."""
        for used in filter(None, (self.pictures, self.test)):
            used.close()


class _Nobody:
    """Told of the steps where nobody else is."""

    def step(self, done: int) -> None:
        """Nothing is done."""


def _account_of(record: dict[str, Any]) -> Account:
    return Account.from_dict(record["ledger"]) if "ledger" in record else Account()


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


def export(
    folder: Folder, config: Config, weights: dict[str, Tensor], metrics: dict[str, Any], name: str = EXPORT
) -> None:
    """The model as others use it, under `name` in the run's folder: safetensors, and a description, written last."""
    aside = (f"{PATCH_HEAD}.", f"{MASKED}.")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(aside)}
    half, classes, origin = [0.5] * 3, classes_of(config), to_dict(config)
    put(folder / name, kept, config.model, classes, mean=half, std=half, metrics=metrics, config=origin)
