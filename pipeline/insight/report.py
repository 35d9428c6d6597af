"""What the runs in MLflow say together: the scaling of pretraining, and what pretraining is worth downstream.

Everything here is computed from `list[Run]` and nothing else; `words.py`, `charts.py` and `page.py` say and draw it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isfinite, sqrt
from statistics import fmean, stdev

from pipeline.insight.scaling import Law, front, law, missing
from pipeline.track.runs import KIND, PARENT, Point, Run


@dataclass(frozen=True)
class Validation:
    """How good a run was after so much compute."""

    step: int
    exaflops: float
    accuracy: float
    on_front: bool = False
    """No validation of any run is better for the same or less compute."""


@dataclass(frozen=True)
class Pretraining:
    """One pretraining run; None where MLflow does not hold what would be needed."""

    id: str
    name: str
    status: str
    parameters: int | None
    pictures: int | None
    """Pictures seen: steps done times the batch."""
    hours: float | None
    """Time spent in steps of training; validations and pauses do not count."""
    pictures_per_second: float | None
    mfu: float | None
    curve: tuple[Validation, ...]

    @property
    def end(self) -> Validation | None:
        """The last validation."""
        return self.curve[-1] if self.curve else None

    @property
    def finished(self) -> bool:
        return self.status == "FINISHED"


@dataclass(frozen=True)
class Results:
    """Test accuracies of the same fine-tuning, one for each seed, and the learning rates they were made with."""

    accuracies: tuple[float, ...]
    rates: tuple[str, ...]

    @property
    def mean(self) -> float:
        return fmean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True)
class Transfer:
    """A task, fine-tuned from a checkpoint and trained from scratch."""

    source: str
    """The pretraining run that the checkpoint is from."""
    checkpoint: str
    task: str
    protocol: str
    pretrained: Results | None
    scratch: Results | None

    @property
    def margin(self) -> float | None:
        """How much better pretrained is than scratch, on the mean over the seeds."""
        return self.pretrained.mean - self.scratch.mean if self.pretrained and self.scratch else None

    @property
    def error(self) -> float | None:
        """Standard error of the margin, the two sets of seeds being independent (Welch 1947); None for single seeds."""
        both = [side for side in (self.pretrained, self.scratch) if side]
        if len(both) < 2 or any(side.deviation is None for side in both):
            return None
        return sqrt(sum((side.deviation or 0.0) ** 2 / len(side.accuracies) for side in both))

    @property
    def verdict(self) -> str:
        """What may be said: a margin is told apart from nothing where it is more than two standard errors."""
        if self.margin is None:
            return "not compared"
        if self.error is None:
            return "ahead, by single seeds" if self.margin > 0 else "not ahead"
        if self.margin > 2 * self.error:
            return "ahead"
        return "behind" if self.margin < -2 * self.error else "no clear difference"


@dataclass(frozen=True)
class Report:
    """The comparison."""

    runs: tuple[Pretraining, ...]
    """By compute."""
    transfers: tuple[Transfer, ...]
    """By pretraining run, then by task."""
    law: Law | None
    """Through the ends of the finished runs that are on the front; None where they are too few."""
    missing: int
    """How many more such ends the law needs."""

    @property
    def front(self) -> list[Validation]:
        """The validations that no other beats, by compute."""
        kept = (point for run in self.runs for point in run.curve if point.on_front)
        return sorted(kept, key=lambda point: (point.exaflops, point.accuracy))


def compare(runs: Sequence[Run]) -> Report:
    """The report on these runs. Runs that are neither pretraining nor trials of ours are left out."""
    pretrainings = _marked([_pretraining(run) for run in runs if run.tags.get(KIND) == "pretrain"])
    pretrainings.sort(key=lambda run: (run.end.exaflops if run.end else float("inf"), run.name))
    # A validation before the end was made with a learning rate that had not decayed yet, and understates what its
    # compute can buy (Hoffmann et al. 2022, section 3.1): ends alone decide the law.
    ends = [run.end for run in pretrainings if run.finished and run.end and run.end.on_front]
    compute, accuracy = [end.exaflops for end in ends], [end.accuracy for end in ends]
    lacking = missing(compute, accuracy)
    return Report(
        runs=tuple(pretrainings),
        transfers=tuple(_transfers(runs, pretrainings)),
        law=None if lacking else law(compute, accuracy),
        missing=lacking,
    )


def _pretraining(run: Run) -> Pretraining:
    batch = _number(run.params.get("batch"))
    parameters = _number(run.params.get("parameters"))
    steps = max((points[-1].step for points in run.metrics.values() if points), default=0)
    speeds = _finite(run.metrics.get("pictures_per_second", ()))
    hours = _hours(speeds, batch) if batch else None
    seen = speeds[-1].step * batch if batch and speeds else 0.0
    return Pretraining(
        id=run.id,
        name=run.tags.get("vitscale.run", run.name),
        status=run.status,
        parameters=int(parameters) if parameters is not None else None,
        pictures=int(steps * batch) if batch and steps else None,
        hours=hours,
        pictures_per_second=seen / hours / 3600 if hours else None,
        mfu=_mean(_finite(run.metrics.get("mfu", ()))),
        curve=_curve(run),
    )


def _curve(run: Run) -> tuple[Validation, ...]:
    compute = {point.step: point.value for point in _finite(run.metrics.get("exaflops", ()))}
    accuracy = _finite(run.metrics.get("val_accuracy", ()))
    return tuple(Validation(p.step, compute[p.step], p.value) for p in accuracy if compute.get(p.step, 0.0) > 0)


def _hours(speeds: Sequence[Point], batch: float) -> float | None:
    """Each value is the mean over the steps since the value before it."""
    steps = [0, *(point.step for point in speeds)]
    seconds = sum((b - a) * batch / p.value for (a, b), p in zip(pairwise(steps), speeds, strict=True) if p.value > 0)
    return seconds / 3600 or None


def _mean(points: Sequence[Point]) -> float | None:
    """The mean over the steps, each value standing for the steps since the value before it."""
    steps = [0, *(point.step for point in points)]
    weights = [b - a for a, b in pairwise(steps)]
    return sum(w * p.value for w, p in zip(weights, points, strict=True)) / sum(weights) if sum(weights) else None


def _finite(points: Iterable[Point]) -> list[Point]:
    return [point for point in points if isfinite(point.value)]


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _marked(runs: list[Pretraining]) -> list[Pretraining]:
    """With the front marked, and a piece of its id behind a name that another run has too."""
    points = [(i, j) for i, run in enumerate(runs) for j in range(len(run.curve))]
    every = [runs[i].curve[j] for i, j in points]
    best = {points[k] for k in front([p.exaflops for p in every], [p.accuracy for p in every])}
    names = [run.name for run in runs]
    return [
        replace(
            run,
            name=run.name if names.count(run.name) == 1 else f"{run.name} ({run.id[:6]})",
            curve=tuple(replace(point, on_front=(i, j) in best) for j, point in enumerate(run.curve)),
        )
        for i, run in enumerate(runs)
    ]


@dataclass(frozen=True)
class _Trial:
    parent: str
    model: str
    """Digest of the weights it starts from, or of the architecture where it starts from scratch."""
    setting: tuple[str, ...]
    """Task, protocol and pictures: what has to be the same for two results to stand beside each other."""
    start: str
    split: str
    rate: str
    seed: str
    accuracy: float


def _transfers(runs: Sequence[Run], pretrainings: Sequence[Pretraining]) -> list[Transfer]:
    names = {run.id: run.name for run in pretrainings}
    place = {run.id: i for i, run in enumerate(pretrainings)}
    pretrained: dict[tuple[str, str, tuple[str, ...]], list[_Trial]] = defaultdict(list)
    scratch: dict[tuple[str, tuple[str, ...]], list[_Trial]] = defaultdict(list)
    for trial in _trials(runs):
        if trial.start == "pretrained":
            pretrained[trial.parent, trial.model, trial.setting].append(trial)
        else:
            scratch[trial.parent, trial.setting].append(trial)
    found = [
        Transfer(
            source=names.get(parent, "unknown run"),
            checkpoint=model,
            task=setting[0],
            protocol=setting[1],
            pretrained=_results(pretrained[parent, model, setting]),
            scratch=_results(_of_one_architecture(scratch[parent, setting])),
        )
        for parent, model, setting in sorted(pretrained, key=lambda key: (place.get(key[0], len(place)), *key))
    ]
    return [transfer for transfer in found if transfer.pretrained]


def _trials(runs: Sequence[Run]) -> list[_Trial]:
    """Every finished trial once for each run that it belongs to."""
    found: dict[tuple[str, str], _Trial] = {}
    for run in runs:
        accuracy = _finite(run.metrics.get("accuracy", ()))
        if run.tags.get(KIND) != "trial" or run.status != "FINISHED" or not accuracy:
            continue
        said = {
            name: run.params.get(name, "")
            for name in ("checkpoint", "task", "protocol", "start", "split", "lr", "seed")
        }
        pictures = (f"{name}={root}" for name, root in sorted(run.params.items()) if name.startswith("data."))
        parent = run.tags.get(PARENT, "")
        found[parent, run.tags.get("vitscale.trial", run.id)] = _Trial(
            parent=parent,
            model=said["checkpoint"],
            setting=(said["task"], said["protocol"], *pictures),
            start=said["start"],
            split=said["split"],
            rate=said["lr"],
            seed=said["seed"],
            accuracy=accuracy[-1].value,
        )
    return list(found.values())


def _of_one_architecture(trials: Sequence[_Trial]) -> Sequence[_Trial]:
    """None of them where they are of several: which of those a checkpoint is of cannot be told."""
    return trials if len({trial.model for trial in trials}) == 1 else ()


def _results(trials: Sequence[_Trial]) -> Results | None:
    """One test result for each seed: where there are several, that of the learning rate chosen without the test set.

    When learning rates are added to a sweep, the choice may change; what was tested before stays in MLflow.
    """
    choosing: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        if trial.split != "test":
            choosing[trial.rate].append(trial.accuracy)
    # Last comes the best; of equally good rates the smaller, as the sweep chooses.
    worth = {rate: (fmean(accuracies), -_number_or_zero(rate)) for rate, accuracies in choosing.items()}
    tested = [trial for trial in trials if trial.split == "test"]
    tested.sort(key=lambda trial: worth.get(trial.rate, (-1.0, 0.0)))
    of_seed = {trial.seed: trial for trial in tested}
    if not of_seed:
        return None
    ordered = [of_seed[seed] for seed in sorted(of_seed, key=_number_or_zero)]
    return Results(tuple(t.accuracy for t in ordered), tuple(sorted({t.rate for t in ordered}, key=_number_or_zero)))


def _number_or_zero(text: str) -> float:
    return _number(text) or 0.0
