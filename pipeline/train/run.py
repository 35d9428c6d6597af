"""A run, put together: what it is, what its folder holds, and what each of its processes does."""

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import code
from pipeline.config import Config, differences, from_dict, to_dict
from pipeline.data import decode
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Feed, Measures, order_of
from pipeline.data.refused import Refused
from pipeline.models import flops
from pipeline.models.build import build as build_model
from pipeline.models.build import initialise
from pipeline.models.weights.exported import put
from pipeline.objectives.classify import HEAD_BIAS
from pipeline.seed import number
from pipeline.track.log import Log
from pipeline.track.metrics import mfu, peak_flops
from pipeline.train.checkpoint import Checkpoints, complete
from pipeline.train.engine import Engine
from pipeline.train.evaluate import evaluate
from pipeline.train.loop import train
from pipeline.train.objective import MASKED, PATCH_HEAD, Objective, teacher_of, with_heads
from pipeline.world import World
from shards.progress import Progress
from shards.storage import Folder

CONFIG = "config.json"
ABOUT = "about.json"
DECODER = "decoder"
REFUSED = "refused"
EXPORT = "export"
UNSENT = "metrics-unsent.json"
FLUSH_SECONDS = 60.0

# What may differ from one start of a run to the next: it decides nothing that the run computes. Where the pictures
# are may change, since the digest of what they are stands beside it.
_FREE_OF_DATA = ("shards", "validation", "samples", "threads", "cache", "cache_gigabytes", "fetches")
_LIMITS_OF_DATA = ("refused_limit", "wait_seconds", "patience_seconds")
FREE = {f"data.{name}" for name in _FREE_OF_DATA + _LIMITS_OF_DATA} | {"keep", "distillation.teacher"}


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


def work(job: Job, world: World, device: torch.device, say: Callable[[str], None]) -> None:
    """What one process does, from what the folder holds to the end of the run."""
    config, folder = job.config, Folder(job.folder)
    refuse_other_decoder(folder)
    training, validation = refuse_misfits(config, world.size)
    samples = training.samples
    steps = config.steps(samples)
    engine = Engine(config, build(config), world, device)
    start, attempt = engine.agree(([0, *complete(folder)][-1], uuid.uuid4().hex[:8]))
    checkpoints = Checkpoints(folder, world, attempt, keep=config.keep)
    record = checkpoints.restore(start, engine) if start else {}
    if start and world.first:
        say(f"{job.name}: goes on after step {start:,} of {steps:,}")
    refused = Refused(folder / REFUSED, config.data.refused_limit, lambda line: say(f"{job.name}: {line}"))
    pictures = Feed(training, config, world, refused=refused, pinned=device.type == "cuda")
    test = Feed(validation, config, world, pinned=device.type == "cuda") if validation else None
    log = Log(job.tracking_uri, job.mlflow_run, record.get("metrics", [])) if world.first else None
    meter = Meter(config, engine, pictures, log, Progress(job.name, steps, "steps", say=say), samples)
    meter.progress.update(start)

    def validate(done: int) -> None:
        meter.emit(done)
        engine.average_buffers()
        if test and config.objective != "masked":
            batches = test.evaluation(config.micro(world.size))
            meter.validated(done, evaluate(engine.model, batches, config, device, engine.sum))

    def keep(done: int) -> None:
        meter.emit(done)
        engine.average_buffers()
        # Asked while training goes on: what was logged after this step, the next start will log itself.
        checkpoints.save(done, engine, lambda: {"metrics": log.unsent(up_to=done)} if log else {})

    train(
        config,
        engine,
        pictures.training(start, steps),
        Objective(config, engine),
        samples=samples,
        start=start,
        log=meter.log,
        validate=validate,
        save=keep,
    )
    checkpoints.wait()
    for used in filter(None, (pictures, test)):
        used.close()
    weights = engine.weights()
    if log:
        export(folder, config, weights, {"data_root": training.root, "steps": steps, **meter.last})
        flush(folder, log)


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


def export(folder: Folder, config: Config, weights: dict[str, Tensor], metrics: dict[str, Any]) -> None:
    """The model as others use it: safetensors, and a description that is written last."""
    aside = (f"{PATCH_HEAD}.", f"{MASKED}.")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(aside)}
    half, classes, origin = [0.5] * 3, classes_of(config), to_dict(config)
    put(folder / EXPORT, kept, config.model, classes, mean=half, std=half, metrics=metrics, config=origin)


class Meter:
    """What is measured of a run, as means over the steps from one line of the log to the next."""

    def __init__(
        self, config: Config, engine: Engine, pictures: Feed, log: Log | None, progress: Progress, samples: int
    ) -> None:
        self.config, self.engine, self.pictures, self.log_, self.progress = config, engine, pictures, log, progress
        self.samples = samples
        self.last: dict[str, float] = {}
        self.macs = flops.macs(config.model, config.classes)
        device = engine.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak = peak * engine.world.size if peak else None
        self._restart()

    def _restart(self) -> None:
        self._values: list[dict[str, float | Tensor]] = []
        self._began, self._measured = time.perf_counter(), self.pictures.measures()

    def log(self, done: int, values: dict[str, float | Tensor]) -> None:
        """Take what a step gave; it is looked at when a line is due."""
        self._values.append(values)
        if done % self.config.log_every == 0:
            self.emit(done)

    def emit(self, done: int) -> None:
        """Log the means since the last line, if there is anything; every process has to call."""
        if not self._values:
            return
        losses = torch.stack([torch.as_tensor(v["loss"], dtype=torch.float32) for v in self._values]).mean()
        seconds = time.perf_counter() - self._began
        fed = [now - then for now, then in zip(self.pictures.measures(), self._measured, strict=True)]
        local = [losses.to(self.engine.device, torch.float64), *(torch.tensor(x, dtype=torch.float64) for x in fed)]
        loss, *total = self.engine.sum(torch.stack([x.to(self.engine.device) for x in local])).tolist()
        processes = self.engine.world.size
        if self.log_:
            rate = len(self._values) * self.config.batch / seconds
            norms = torch.stack([torch.as_tensor(v["gradient_norm"]) for v in self._values])
            line = {
                "loss": loss / processes,
                "lr": float(self._values[-1]["lr"]),
                "gradient_norm": float(norms.mean()),
                "pictures_per_second": rate,
                **self._of_feed(Measures(*total), seconds, processes),
                **self._so_far(done),
            }
            if self.peak:
                line["mfu"] = mfu(rate, self.macs, self.peak)
            self.log_.add(done, line)
            self.progress.update(
                done, epoch=f"{line['epoch']:.2f}", loss=f"{line['loss']:.4f}", pictures=f"{rate:,.0f}/s",
                waiting_for_data=f"{100 * line['data_wait_share']:.1f} %",
            )  # fmt: skip
        self._restart()

    def _of_feed(self, fed: Measures, seconds: float, processes: int) -> dict[str, float]:
        """What the feeds of all processes did since the last line; the wait is the mean over the processes."""
        line = {
            "data_wait_share": fed.waited / seconds / processes,
            "data_bytes_per_second": fed.read / seconds,
            "data_retries": fed.retries,
            "data_refused": self.pictures.refused.count,
        }
        if asked := fed.hits + fed.misses:
            line |= {"cache_hit_share": fed.hits / asked, "cache_bytes_per_second": fed.fetched / seconds}
        return line

    def validated(self, done: int, values: dict[str, float]) -> None:
        """Log the result of a validation."""
        self.last = {"val_accuracy": values["accuracy"], "val_loss": values["loss"], **self._so_far(done)}
        if self.log_:
            self.log_.add(done, {name: self.last[name] for name in ("val_accuracy", "val_loss")})
            self.progress.say(
                f"{self.progress.what}: after epoch {self.last['epoch']:.2f} val accuracy "
                f"{100 * values['accuracy']:.2f} %, val loss {values['loss']:.4f}"
            )
        self._restart()

    def _so_far(self, done: int) -> dict[str, float]:
        pictures = done * self.config.batch
        exaflops = flops.training_exaflops(self.config.model, self.config.classes, pictures)
        return {"epoch": pictures / self.samples, "exaflops": exaflops}
