"""What is measured of a run on its way to MLflow and to whoever watches."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean, median

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.data.loader import Feed, Measures
from pipeline.models import flops
from pipeline.track.log import Log
from pipeline.track.metrics import mfu, peak_flops
from pipeline.train.engine import Engine
from pipeline.train.hang import straggler
from pipeline.train.health import Health
from shards.progress import Progress

_NOTICEABLE = 0.05  # seconds: less says nothing of a process


class Meter:
    """What is measured of a run, as means over the steps from one line of the log to the next."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        pictures: Feed,
        log: Log | None,
        progress: Progress,
        samples: int,
        health: Health,
    ) -> None:
        self.config, self.engine, self.pictures, self.log_, self.progress = config, engine, pictures, log, progress
        self.samples, self.health = samples, health
        self.own = Stopwatch(engine.device)
        """Runs while this process does what it shares with no other."""
        self._stragglers = Stragglers()
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
        """Take what a step gave, means over the processes; it is looked at when a line is due."""
        self._values.append(values)
        if done % self.config.log_every == 0:
            self.emit(done)

    def emit(self, done: int) -> None:
        """Log the means since the last line, if there is anything; every process has to call."""
        if not self._values:
            return
        seconds = time.perf_counter() - self._began
        measures, world = self.pictures.measures(), self.engine.world
        fed = [now - then for now, then in zip(measures, self._measured, strict=True)]
        own = [0.0] * world.size
        own[world.rank] = self.own.take() + measures.waited - self._measured.waited
        local = torch.tensor([*own, *fed], dtype=torch.float64, device=self.engine.device)
        shared = self.engine.sum(local).tolist()
        own, total = shared[: world.size], shared[world.size :]
        if self.log_:
            if said := self._stragglers.look([each / len(self._values) for each in own]):
                self.progress.say(f"{self.progress.what}: {said}")
            rate = len(self._values) * self.config.batch / seconds
            line = {
                "loss": self._mean("loss"),
                "lr": float(self._values[-1]["lr"]),
                "gradient_norm": self._mean("gradient_norm"),
                "pictures_per_second": rate,
                "skipped_steps": self.health.skipped,
                "spikes": self.health.spikes,
                **self._of_feed(Measures(*total), seconds, world.size),
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

    def _mean(self, name: str) -> float:
        """The mean over the steps that gave a finite value, so that a sick one hides no other; nan where none did."""
        device = self.engine.device
        given = torch.stack([torch.as_tensor(v[name], dtype=torch.float32, device=device) for v in self._values])
        finite = [value for value in given.tolist() if math.isfinite(value)]
        return fmean(finite) if finite else math.nan

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

    def probed(self, done: int, accuracy: float | None) -> None:
        """Log the result of a milestone's probe; None where there were too few pictures for one."""
        if self.log_ and accuracy is not None:
            self.log_.add(done, {"probe_accuracy": accuracy})
            self.progress.say(f"{self.progress.what}: after {done:,} steps few-shot accuracy {100 * accuracy:.2f} %")
        self._restart()

    def _so_far(self, done: int) -> dict[str, float]:
        pictures = done * self.config.batch
        exaflops = flops.training_exaflops(self.config.model, self.config.classes, pictures)
        return {"epoch": pictures / self.samples, "exaflops": exaflops}


class Stopwatch:
    """How long a device works on what is given to it inside `running`; nothing waits for the device but `take`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is done inside counts."""
        if self._cuda:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._events.append((began, ended))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def take(self) -> float:
        """Seconds since the last call."""
        for began, ended in self._events:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        taken, self._seconds = self._seconds, 0.0
        self._events.clear()
        return taken


class Stragglers:
    """Which process holds up the others: named once, and only if it is the same one for two lines of the log."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._told: int | None = None

    def look(self, seconds: list[float]) -> str:
        """What there is to say, of the seconds that each process needs for its own part of a step; mostly nothing."""
        slowest = straggler(seconds) if max(seconds) - min(seconds) > _NOTICEABLE else None
        last, self._last = self._last, slowest
        if last is None or last != self._last or last == self._told:
            return ""
        self._told = last
        others = median(each for rank, each in enumerate(seconds) if rank != last)
        took = f"takes {seconds[last]:.3g} s a step for its data and forward passes"
        return f"process {last} holds up the others: it {took}, the others {others:.3g} s"
