"""A fire drill: a small run is disturbed on purpose, and what comes of it is compared with a quiet one.

    python jobs/drill.py kill-worker            a process of the run dies, as one does that is out of memory
    python jobs/drill.py drain-node             the machine of a process is about to be taken away
    python jobs/drill.py s3-faults              for 20 s nobody answers where the run's bucket is
    python jobs/drill.py nan-batch              the loss of a batch is not a number
    python jobs/drill.py truncate-checkpoint    all of the run dies, and its newest checkpoint has lost its end
    python jobs/drill.py all [--to FOLDER]      one after the other, those that can be held

Runs on two CPUs of the Ray cluster it is submitted to, or of a Ray on this machine. FOLDER is an empty folder or URL
(s3://bucket/prefix) that all machines see; on this machine it can be left out. drain-node takes a machine out of the
cluster for good, as a cloud would. Exit code 1 where something that is promised did not hold.
"""

import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli import parse, run

if TYPE_CHECKING:
    import torch

    from pipeline.config import Config
    from pipeline.data.loader import Batch
    from pipeline.train.folder import Job
    from pipeline.train.run import Steps
    from pipeline.world import World
    from shards.storage import Folder

PROCESSES, CLASSES, PICTURES, SIDE, BATCH = 2, 3, 48, 12, 16
STEPS, SAVE_EVERY, AT = 50, 10, 22
"""The fault comes after step `AT`: after the second checkpoint, and not with one or with the end of an epoch."""
AWAY_SECONDS = 20.0
DRAIN_SECONDS = 120.0
END_SECONDS = 600.0
A_BUCKET = "--to s3://bucket/prefix"


@dataclass(frozen=True)
class Drill:
    """Where it is held."""

    to: str = ""
    """Folder or URL that keeps all that the drill makes; on this machine, a temporary one if empty."""


@dataclass(frozen=True)
class Finding:
    """Whether something that is promised held."""

    held: bool
    what: str


class NotTried(Exception):
    """A drill cannot be held here; says what it needs."""


def main(argv: list[str]) -> None:
    """Hold the drills that are asked for and print what held."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    kinds = list(KINDS) if argv[0] == "all" else [argv[0]]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"no drill {unknown[0]!r}; there are: {', '.join(KINDS)}, all")
    wanted = parse(Drill, argv[1:])
    if not wanted.to and "RAY_ADDRESS" in os.environ:
        raise ValueError("--to is missing: on a cluster, a drill needs a folder or URL that all of its machines see")
    if argv[0] == "s3-faults" and not in_s3(wanted.to):
        raise ValueError(f"s3-faults needs {A_BUCKET}")
    with ExitStack() as stack:
        aside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitscale-drill-")))
        findings = drills(Place.open(wanted.to, aside), kinds, by_name=argv[0] != "all")
    if not all(finding.held for finding in findings):
        sys.exit(1)


def drills(place: "Place", kinds: list[str], *, by_name: bool) -> list[Finding]:
    """Hold them, telling each finding as it comes; ValueError where one was asked for `by_name` that cannot be held."""
    findings: list[Finding] = []

    def tell(finding: Finding) -> None:
        findings.append(finding)
        print(f"  {'held    ' if finding.held else 'NOT HELD'} {finding.what}", flush=True)

    for kind in kinds:
        print(f"{kind}: {(KINDS[kind].__doc__ or '').splitlines()[0]}", flush=True)
        try:
            for finding in KINDS[kind](place):
                tell(finding)
        except NotTried as error:
            if by_name:
                raise ValueError(f"{kind} needs {error}") from error
            print(f"  not tried: it needs {error}", flush=True)
        except RuntimeError as error:
            tell(Finding(False, f"it came to its end: {error}"))
    return findings


# --- where and what is run ------------------------------------------------------------------------------------------


class Place:
    """The folder of a drill, with a shard set in it; and its runs, each in a folder of its own."""

    def __init__(self, folder: "Folder", config: "Config", root: str, tracking_uri: str) -> None:
        self.folder, self.config, self.root, self.tracking_uri = folder, config, root, tracking_uri
        self._said: dict[str, str] = {}
        self._in_mlflow: dict[str, str] = {}

    @classmethod
    def open(cls, to: str, aside: Path) -> "Place":
        """Join the cluster, or start one, and make what the runs need in the folder `to`, or in the local one `aside`.

        ValueError where there is something in the folder, or the cluster has too few CPUs.
        """
        from pipeline.data.corpus import Corpus
        from pipeline.track.runs import check, tracking_uri
        from shards.cluster import connect, require
        from shards.storage import Folder

        folder = Folder(Folder(to or str(aside)).absolute)
        if next(folder.find(), None):
            raise ValueError(f"{folder} is not empty: a drill needs a folder of its own")
        shared = "RAY_ADDRESS" in os.environ
        uri = tracking_uri(None) if shared else f"sqlite:///{folder.local or aside}/mlflow.db"
        check(uri)
        folder.check_writable()
        connect()
        require({"CPU": PROCESSES}, f"a drill on {PROCESSES} processes")
        make_set(folder / "set")
        cache = "" if shared else str(aside / "cache")
        config = small((folder / "set").absolute, cache)
        return cls(folder, config, Corpus.open(config.data.shards).root, uri)

    def run(self, name: str, disturbed: "Disturbed | None" = None, *, failures: int = 0) -> str:
        """What a run says on its way to its end, from what its folder holds; RuntimeError where it fails more often
        than `failures`."""
        from pipeline.launch import launch
        from pipeline.track import log
        from pipeline.train.run import work

        job, said = self.job(name), io.StringIO()
        try:
            with redirect_stdout(said):
                launch(job, [PROCESSES], gpus=False, cpus_each=1, max_failures=failures, work=disturbed or work)
        except BaseException as error:
            log.end(self.tracking_uri, job.mlflow_run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        finally:
            self._said[name] = self._said.get(name, "") + said.getvalue()
            self.folder.write(f"{name}.log", self._said[name].encode())
        log.end(self.tracking_uri, job.mlflow_run)
        return said.getvalue()

    def job(self, name: str) -> "Job":
        """The run of this name, begun in its folder and in MLflow."""
        from pipeline.track import log
        from pipeline.train.folder import Job, open_folder

        folder = open_folder(self.config, (self.folder / "runs" / name).absolute, {"training": self.root})
        tags = {"vitscale.kind": "drill", "vitscale.run": name, "vitscale.folder": folder.absolute}
        self._in_mlflow[name] = log.begin(self.tracking_uri, f"drill {name}", tags, {}, same="vitscale.folder")
        return Job(self.config, folder.absolute, self.tracking_uri, self._in_mlflow[name], name)

    def quiet(self, *, without: int | None = None) -> str:
        """The name of a run to its end that nobody disturbs, in which the step `without` is left out."""
        name = "quiet" if without is None else f"quiet-without-{without}"
        if name not in self._said:
            print(f"  a quiet run of {STEPS} steps on {PROCESSES} processes: {name}", flush=True)
            if without is not None:
                note = json.dumps({"step": without, "why": "not finite"}).encode()
                (self.folder / "runs" / name / "skipped").write(f"{without}.json", note)
            self.run(name)
        return name

    def of(self, name: str) -> "Folder":
        """The folder of a run."""
        return self.folder / "runs" / name

    def weights(self, name: str) -> dict[str, bytes]:
        """The weights that a run has exported, as they lie in memory."""
        from safetensors.numpy import load

        found = load((self.of(name) / "export").read("model.safetensors"))
        return {
            weight: f"{values.dtype} {values.shape} ".encode() + values.tobytes() for weight, values in found.items()
        }

    def losses(self, name: str) -> list[tuple[int, str]]:
        """Steps and losses of a run as MLflow has them, each as often as it has it; what is no number is equal, too."""
        from pipeline.track import log

        history = log.client(self.tracking_uri).get_metric_history(self._in_mlflow[name], "loss")
        return sorted((metric.step, repr(metric.value)) for metric in history)


def in_s3(url: str) -> bool:
    """Whether it is a bucket's."""
    return url.startswith(("s3://", "s3a://"))


def make_set(folder: "Folder") -> None:
    """A shard set of noise, as bright as its class."""
    import numpy as np

    from shards.build import build
    from shards.recipe import Recipe
    from shards.sources import Arrays

    draw, labels = np.random.default_rng(0), np.arange(PICTURES) % CLASSES
    noise = draw.integers(0, 60, (PICTURES, SIDE, SIDE, 3))
    pixels = (noise + labels[:, None, None, None] * 190 // (CLASSES - 1)).astype(np.uint8)
    classes = tuple(f"class {label}" for label in range(CLASSES))
    pictures = Arrays([f"{number:04}" for number in range(PICTURES)], pixels, labels, classes)
    with redirect_stdout(io.StringIO()):
        build(Recipe("drill", "all", classes=classes, samples_per_shard=12), lambda: pictures, folder)


def small(shards: str, cache: str) -> "Config":
    """A run of seconds."""
    from pipeline.config import Config, Data, Optim, Vit

    return Config(
        name="drill",
        classes=CLASSES,
        model=Vit(width=16, depth=2, heads=2, hidden=32, patch=4, image_size=SIDE, dropout=0.1),
        data=Data(shards=shards, cache=cache, lanes=8, window=PICTURES, threads=1, crop_area=0.5),
        optim=Optim(lr=4e-3, warmup=5),
        objective="softmax",
        smoothing=0.1,
        duration=STEPS,
        unit="steps",
        batch=BATCH,
        precision="fp32",
        save_every=SAVE_EVERY,
        keep=3,
        log_every=2,
    )


# --- faults, in the processes of a run ------------------------------------------------------------------------------

Fault = Callable[["Job", "World"], Iterator[None]]
"""Begins after step `AT` of a process, and goes on, from one `yield` to the next, after each further step."""


@dataclass(frozen=True)
class Disturbed:
    """What each process of a run does, with a fault."""

    fault: Fault

    def __call__(
        self,
        job: "Job",
        world: "World",
        device: "torch.device",
        say: Callable[[str], None],
        *,
        stop: Callable[[int], bool],
        hang: "Steps",
    ) -> bool:
        from pipeline.train.run import work

        return work(job, world, device, say, stop=stop, hang=Told(hang, self.fault(job, world)))


class Told:
    """Told of the steps in place of the watch, which it tells."""

    def __init__(self, hang: "Steps", fault: Iterator[None]) -> None:
        self._hang, self._fault = hang, fault

    def step(self, done: int) -> None:
        """So many steps are done: the fault begins or goes on, where it is due."""
        self._hang.step(done)
        if done >= AT:
            next(self._fault, None)


def once(job: "Job", what: str) -> bool:
    """Whether this process is the first of the run, in all its starts, to ask for this."""
    from shards.storage import Folder

    return (Folder(job.folder) / "drill").create(what, uuid.uuid4().bytes)


def die(job: "Job") -> None:
    """End this process as Linux ends one that is out of memory, when the checkpoint due before `AT` is complete."""
    from pipeline.train.checkpoint import complete
    from shards.storage import Folder

    limit = time.monotonic() + END_SECONDS
    while not any(step > AT - SAVE_EVERY for step in complete(Folder(job.folder))):
        if time.monotonic() > limit:
            raise RuntimeError(f"no checkpoint of the last {SAVE_EVERY} steps after {END_SECONDS:g} s")
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def one_dies(job: "Job", world: "World") -> Iterator[None]:
    """The last process, once."""
    if world.rank == world.size - 1 and once(job, "killed"):
        die(job)
    yield


def all_die(job: "Job", world: "World") -> Iterator[None]:
    """Each time."""
    die(job)
    yield


@dataclass(frozen=True)
class TakenAway:
    """The machine of a process is about to go, if it is one of these nodes; one of them, once."""

    nodes: tuple[str, ...]

    def __call__(self, job: "Job", world: "World") -> Iterator[None]:
        from pipeline.launch import LOOK_SECONDS, drain, leaving, this_node

        if this_node() in self.nodes and once(job, "drained"):
            drain(this_node(), "a drill", DRAIN_SECONDS)
            limit = time.monotonic() + DRAIN_SECONDS
            while not leaving() and time.monotonic() < limit:  # a run as short as this one could be at its end before
                time.sleep(0.05)
            time.sleep(LOOK_SECONDS)  # so that the run looks for the notice after its next step
        yield


def no_number(job: "Job", world: "World") -> Iterator[None]:
    """The loss of the next step on the last process, once."""
    from pipeline.train.objective import Objective

    if world.rank != world.size - 1 or not once(job, "no number"):
        return
    whole = Objective.__call__

    def spoilt(self: Objective, batch: "Batch") -> "torch.Tensor":
        return whole(self, batch) * math.nan

    Objective.__call__ = spoilt
    yield
    Objective.__call__ = whole


def nobody_answers(job: "Job", world: "World") -> Iterator[None]:
    """For `AWAY_SECONDS` each call of S3 fails as if nobody were there; then what failed is counted in the run."""
    from botocore.exceptions import EndpointConnectionError
    from s3fs import S3FileSystem

    from shards.storage import Folder

    whole, end, failed = S3FileSystem.get_s3, time.monotonic() + AWAY_SECONDS, []

    async def away(self: S3FileSystem, bucket: str | None = None) -> Any:
        if time.monotonic() >= end:
            return await whole(self, bucket)
        failed.append(bucket)
        raise EndpointConnectionError(endpoint_url=job.folder)

    S3FileSystem.get_s3 = away
    while time.monotonic() < end:
        yield  # training goes on as long as no checkpoint is waited for
    S3FileSystem.get_s3 = whole
    (Folder(job.folder) / "drill").write(f"failed-{world.rank}", str(len(failed)).encode())


# --- drills ---------------------------------------------------------------------------------------------------------


def kill_worker(place: Place) -> Iterator[Finding]:
    """One of two processes is killed after a checkpoint; nobody starts the run again."""
    quiet = place.quiet()
    said = place.run("kill-worker", Disturbed(one_dies), failures=1)
    yield went_on(said, "the run went on by itself from a checkpoint", AT - AT % SAVE_EVERY)
    yield from compared(place, "kill-worker", quiet)


def drain_node(place: Place) -> Iterator[Finding]:
    """Ray is told that the machine of a process is about to be taken away; no failure is forgiven."""
    from pipeline.launch import spare_nodes

    needs = f"a machine that the cluster can lose: not its head, and with room for {PROCESSES} processes on the others"
    if not (spare := spare_nodes(PROCESSES)):
        raise NotTried(needs)
    quiet = place.quiet()
    said = place.run("drain-node", Disturbed(TakenAway(tuple(spare))))
    if not place.of("drain-node").exists("drill/drained"):
        raise NotTried(f"{needs}; Ray has put both processes elsewhere")
    yield Finding("has saved and stopped: a machine is about to go" in said, "the run saved before its machine went")
    yield went_on(said, "nothing was done twice", AT, AT + 1, AT + 2)
    yield from compared(place, "drain-node", quiet)


def s3_faults(place: Place) -> Iterator[Finding]:
    """Nobody answers where the run's bucket is while a checkpoint is due; no failure is forgiven."""
    if not in_s3(place.folder.url):
        raise NotTried(A_BUCKET)
    quiet = place.quiet()
    said = place.run("s3-faults", Disturbed(nobody_answers))
    notes = place.of("s3-faults") / "drill"
    failed = [int(notes.read(name)) for name in notes.sizes()]
    yield Finding(
        len(failed) == PROCESSES and min(failed) > 0 and "goes on after" not in said,
        f"the run waited for its bucket, of which {sum(failed)} calls failed in {AWAY_SECONDS:g} s",
    )
    yield from compared(place, "s3-faults", quiet)


def nan_batch(place: Place) -> Iterator[Finding]:
    """The loss of a batch is not a number; the quiet run has never seen that batch; no failure is forgiven."""
    quiet = place.quiet(without=AT)
    said = place.run("nan-batch", Disturbed(no_number))
    yield left_out(place, said)
    yield from compared(place, "nan-batch", quiet)


def truncate_checkpoint(place: Place) -> Iterator[Finding]:
    """All of the run is killed, its newest checkpoint loses the second half of a file, and the run is started again."""
    from pipeline.train.checkpoint import CHECKPOINTS, complete, name_of

    quiet, name = place.quiet(), "truncate-checkpoint"
    with suppress(RuntimeError):  # that was its end, and no other start was allowed
        place.run(name, Disturbed(all_die))
    if len(found := complete(place.of(name))) < 2:
        raise RuntimeError(f"{name} has not come to its second checkpoint; see {place.folder}/{name}.log")
    before, newest = found[-2:]
    checkpoint = place.of(name) / CHECKPOINTS / name_of(newest)
    part = max(file for file in checkpoint.sizes() if re.fullmatch(r"part-.*\.safetensors", file))
    whole = checkpoint.read(part)
    checkpoint.write(part, whole[: len(whole) // 2])
    said = place.run(name)
    yield Finding(
        bool(re.search(rf"{name_of(newest)} is damaged .*going on from {name_of(before)}", said)),
        f"the run said that the checkpoint of step {newest} is damaged",
    )
    yield went_on(said, "it took the one before", before)
    yield from compared(place, name, quiet)


KINDS: dict[str, Callable[[Place], Iterator[Finding]]] = {
    "kill-worker": kill_worker,
    "drain-node": drain_node,
    "s3-faults": s3_faults,
    "nan-batch": nan_batch,
    "truncate-checkpoint": truncate_checkpoint,
}


# --- findings -------------------------------------------------------------------------------------------------------


def went_on(said: str, what: str, *steps: int) -> Finding:
    """Whether the run said, once, that it goes on, after one of these steps where some are given."""
    found = [int(step.replace(",", "")) for step in re.findall(r"goes on after step ([\d,]+) of", said)]
    held = len(found) == 1 and (not steps or found[0] in steps)
    return Finding(held, f"{what}: it went on after step {', '.join(map(str, found)) or '0'}")


def left_out(place: Place, said: str) -> Finding:
    """Whether the run left the step out and named its pictures, in its folder and in what it `said`."""
    what = f"step {AT} was left out, and its pictures named"
    try:
        note = json.loads((place.of("nan-batch") / "skipped").read(f"{AT}.json"))
    except FileNotFoundError:
        return Finding(False, what)
    named = len(note["keys"]) == BATCH and f"step {AT} is not finite" in said and note["keys"][0] in said
    return Finding(named and note["why"] == "not finite", f"{what}: {', '.join(note['keys'][:3])}, …")


def compared(place: Place, disturbed: str, quiet: str) -> Iterator[Finding]:
    """What is promised of a disturbed run beside a quiet one."""
    logged, wanted = place.losses(disturbed), place.losses(quiet)
    yield Finding(
        place.weights(disturbed) == place.weights(quiet), "its weights are those of the quiet run, bit for bit"
    )
    yield Finding(
        [step for step, _ in logged] == sorted({step for step, _ in wanted}),
        f"MLflow has each of its {len(wanted)} lines once",
    )
    yield Finding(logged == wanted, "every loss in MLflow is that of the quiet run: nothing was lost, nothing repeated")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
