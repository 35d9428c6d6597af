"""A run, put together: what it is, what its folder holds, and what each of its processes does."""

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.config import Config, to_dict
from pipeline.data import decode
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Batch, Feed, order_of
from pipeline.data.plan import part_of_step
from pipeline.data.refused import Refused
from pipeline.models import flops
from pipeline.models.build import build as build_model
from pipeline.models.build import initialise
from pipeline.models.weights.exported import Exported, put
from pipeline.objectives.classify import HEAD_BIAS
from pipeline.seed import number
from pipeline.track.log import Log
from pipeline.train.checkpoint import Checkpoints, TakenOver, name_of, newest
from pipeline.train.engine import Engine
from pipeline.train.evaluate import evaluate
from pipeline.train.folder import EXPORT, Job, changes_of, flush, optim_at, refuse_misfits
from pipeline.train.health import GoBack, Health, Sick, listed
from pipeline.train.ledger import CHECKPOINTING, Account, Ledger, Notes, line, metrics, noted, resumed
from pipeline.train.loop import Values, train
from pipeline.train.meter import Meter
from pipeline.train.objective import MASKED, PATCH_HEAD, Objective, with_heads
from pipeline.train.origin import begin, origin_of
from pipeline.train.probe import Probe, size_of
from pipeline.world import World
from shards.progress import Progress
from shards.storage import Folder

DECODER = "decoder"
REFUSED = "refused"
MILESTONES = "milestones"
ATTEMPT = "attempt"
SKIPPED, SPIKES = "skipped", "spikes"
LEDGER = "ledger"
STOP_SECONDS = 5.0


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


def classes_of(config: Config) -> int:
    """Classes of the model's head; 0, and no head, where the objective has no classes."""
    return 0 if config.objective == "masked" else config.classes


def build(config: Config, origin: Exported | None = None) -> nn.Module:
    """The run's model with its initial weights, those of `origin` where there is one, the same on every process."""
    model = build_model(config.model, classes_of(config))
    head_bias = HEAD_BIAS if config.objective == "sigmoid" else 0.0
    initialise(model, torch.Generator().manual_seed(number("weights", config.seed)), head_bias=head_bias)
    if origin:
        begin(model, origin, config, head_bias=head_bias)
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


def left_out(folder: Folder) -> dict[int, Sick]:
    """The steps of a run that are not to be taken, by number: those that were sick, and those that a person names."""
    notes = folder / SKIPPED
    found = [Sick.from_json(notes.read(name)) for name in notes.sizes() if name.endswith(".json")]
    return {sick.step: sick for sick in found}


Told = Callable[[Iterator[Batch]], Iterator[Batch]]
"""Passes batches on, each of which shows that the process is at work."""


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
    ended: Callable[[Job, Engine, Told], None] = lambda job, engine, told: None,
    until: int | None = None,
) -> bool:
    """What one process does, from what the folder holds to the end of the run, or until `stop` says so.

    `stop` is asked after each step, and where it says so on any process all end with a checkpoint. `ended` is called by
    every process when all steps are done, before the run says that it is finished. With `until` it is called when so
    many are done, or more already; there the processes end with a checkpoint, and the run is not finished, however
    many steps it has. Returns whether that, or else the run's end, has been reached. TakenOver where another start of
    the run has.
    """
    ledger = Ledger(world.size)
    refuse_other_decoder(Folder(job.folder))
    training, validation = refuse_misfits(job.config, world.size)
    start = Start(job, world, device, say, ledger, training, validation)
    try:
        return start.go(stop, hang or _Nobody(), ended, until)
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
        self.origin = origin_of(self.config)
        self.engine = Engine(self.config, build(self.config, self.origin), world, device)
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
        self.probe = self._probe(validation)
        self.notes = Notes(self.folder / LEDGER, self.attempt)
        self.progress = Progress(job.name, self.steps, "steps", say=say)
        self.log: Log | None = None

    def go(
        self,
        stop: Callable[[int], bool],
        hang: Steps,
        ended: Callable[[Job, Engine, Told], None],
        until: int | None = None,
    ) -> bool:
        """Go on from what the folder holds; returns whether the run has come to its end, or to `until`."""
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
                done = self._train(start, record, stop, hang, until)
                break
            except GoBack as back:
                start, record = self._go_back(back.sick)
        with self.ledger.during(CHECKPOINTING):
            self.checkpoints.wait()
        arrived = done >= (self.steps if until is None else min(until, self.steps))
        if arrived:
            self.engine.average_buffers()
            ended(self.job, self.engine, lambda batches: self._told(batches, hang, done))
        if arrived and until is None:
            self._finish()
        else:
            self._stop(done)
        return arrived

    def _train(
        self, start: int, record: dict[str, Any], stop: Callable[[int], bool], hang: Steps, until: int | None
    ) -> int:
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
            until=until,
            health=health,
            optim=lambda step: optim_at(config, self.changes, step),
            log=log,
            validate=validate,
            probe=lambda done: self._judge_milestone(done, hang),
            save=save,
            stop=stop,
        )

    def _judge_milestone(self, done: int, hang: Steps) -> None:
        if self.probe:
            self.meter.emit(done)
            self.engine.average_buffers()
            self.meter.probed(done, self.probe(lambda batches: self._told(batches, hang, done)))
        hang.step(done)

    def _probe(self, validation: Corpus | None) -> Probe | None:
        """What judges the milestones; None, and why where it was asked for, where nothing does."""
        config = self.config
        if not (config.probe and config.milestone_every and validation):
            return None
        size = size_of(config)
        if size is None:
            self.say(f"milestones are not probed: {config.milestone_every:,} steps between them are too cheap for that")
            return None
        return Probe(config, self.engine, self.training, validation, size, self.pictures.refused)

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
            spent = self.ledger.account()
            self.log.add(done, metrics(spent, self._exaflops(spent.steps)))

        def also() -> dict[str, Any]:
            # Asked while training goes on: what was logged after this step, the next start will log itself.
            return {"metrics": self.log.unsent(up_to=done), "logged_at": self.log.latest, **kept} if self.log else kept

        self.checkpoints.save(done, self.engine, also)

    def _milestone(self, done: int, weights: dict[str, Tensor]) -> None:
        about = self._about(done)
        export(self.folder, self.config, weights, about, f"{MILESTONES}/{name_of(done)}", self.origin)

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
        spent = self.ledger.account()
        exaflops = self._exaflops(spent.steps)  # of all steps, those that were made again each time
        self.log.add(self.steps, metrics(spent, exaflops))
        about = {**self.meter.last, **self._about(self.steps)}
        export(self.folder, self.config, weights, about, origin=self.origin)
        self.notes.close(spent)
        flush(self.folder, self.log)
        self.say(line(spent, exaflops, "GPU-hours" if self.device.type == "cuda" else "process-hours"))

    def _stop(self, done: int) -> None:
        """End before the end of the run, which is as it was kept."""
        if self.log:
            self.notes.close(self.ledger.account())
            self.log.close(STOP_SECONDS)  # what this does not send is kept, too
            self.say(f"stops after step {done:,} of {self.steps:,}, which is kept")

    def _about(self, done: int) -> dict[str, Any]:
        """What is told of weights after so many steps; their compute is that of these steps, however often made."""
        return {"data_root": self.training.root, "steps": done, "exaflops": self._exaflops(done)}

    def _exaflops(self, steps: int) -> float:
        return flops.training_exaflops(self.config.model, self.config.classes, steps * self.config.batch)

    def close(self) -> None:
        """Stop the threads."""
        for used in filter(None, (self.pictures, self.test, self.probe)):
            used.close()


class _Nobody:
    """Told of the steps where nobody else is."""

    def step(self, done: int) -> None:
        """Nothing is done."""


def _account_of(record: dict[str, Any]) -> Account:
    return Account.from_dict(record["ledger"]) if "ledger" in record else Account()


def export(
    folder: Folder,
    config: Config,
    weights: dict[str, Tensor],
    metrics: dict[str, Any],
    name: str = EXPORT,
    origin: Exported | None = None,
) -> None:
    """The model as others use it, under `name` in the run's folder: safetensors, and a description, written last.

    It sees pictures in the units of what it started from.
    """
    aside = (f"{PATCH_HEAD}.", f"{MASKED}.")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(aside)}
    mean, std = (origin.about[name] if origin else [0.5] * 3 for name in ("mean", "std"))
    classes, made = classes_of(config), to_dict(config)
    put(folder / name, kept, config.model, classes, mean=mean, std=std, metrics=metrics, config=made)
