"""What a milestone's features are worth, for less than a hundredth of what the steps since the last one have cost.

The few-shot evaluation of the paper (Dosovitskiy et al. 2021, section 4.1, and its figure 4), on the run's own
classes: a linear model of the features of five pictures a class, by regularised least squares in closed form, tells
other pictures of these classes apart. Many classes are more than are needed: some are drawn by the run's seed, the
same at every milestone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.data.corpus import Corpus
from pipeline.data.loader import Batch, Feed
from pipeline.data.mix import normalised
from pipeline.data.refused import Refused
from pipeline.models import flops
from pipeline.models.features import before_head
from pipeline.objectives import fewshot
from pipeline.seed import permutation
from pipeline.train.engine import Engine

SHARE = 0.01
SHOTS = 5
CLASSES, PICTURES = 200, 4000
"""The most that are told apart, and the most that are judged."""
LEAST = 20
"""Of fewer pictures nothing can be said."""
SCANNED = 1 << 17
"""Of how many pictures of a corpus the labels are looked at, to choose from."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """How much a probe looks at."""

    classes: int
    pictures: int
    """To judge by, beside `SHOTS` of each class to learn from."""

    def flops(self, config: Config) -> float:
        """Floating-point operations of one probe: the forward passes, and the least squares from above.

        With n shots of d features, and the smaller of n and d+1 called m: a Gram matrix, ten m^3 for its solution,
        which an eigendecomposition needs, the weights, and what they say of the pictures.
        """
        shots = SHOTS * self.classes
        wide = flops.macs(config.model, 1) - flops.macs(config.model, 0) + 1  # what one class is read off, and 1
        small = min(shots, wide)
        squares = 2 * shots * wide * small + 10 * small**3 + 2 * small * small * self.classes
        reading = 2 * (shots + self.pictures) * wide * self.classes
        return 2 * flops.macs(config.model, config.classes) * (shots + self.pictures) + squares + reading


def size_of(config: Config) -> Size | None:
    """The largest probe that costs at most `SHARE` of the training from one milestone to the next; None for none."""
    interval = 6 * flops.macs(config.model, config.classes) * config.milestone_every * config.batch
    most = min(CLASSES, config.classes)
    for pictures in range(PICTURES, LEAST - 1, -LEAST):
        size = Size(max(2, most * pictures // PICTURES), pictures)
        if size.flops(config) <= SHARE * interval:
            return size
    return None


class Chosen(NamedTuple):
    """Pictures by their numbers, each with its class among those that were chosen, counted from 0."""

    shots: Numbers
    shot_labels: Numbers
    judged: Numbers
    judged_labels: Numbers
    classes: int


def choose(training: Corpus, validation: Corpus, size: Size, seed: int) -> Chosen | None:
    """What a probe looks at: a function of the seed and the sets; None where no two classes have enough pictures.

    Pictures of a single class alone, of which the index is read shard by shard, and no more than `SCANNED` rows of it.
    """
    shots, shot_classes = _labelled(training, "shots", seed)
    judged, judged_classes = _labelled(validation, "judged", seed)
    classes, counts = np.unique(shot_classes, return_counts=True)
    there = np.intersect1d(classes[counts >= SHOTS], judged_classes)
    there = there[permutation(len(there), "probe classes", seed)][: size.classes]
    if len(there) < 2:
        return None
    found, place = _among(shot_classes, there)
    by_class = found[np.argsort(place, kind="stable")]
    starts = np.searchsorted(np.sort(place), np.arange(len(there)))
    first = by_class[(starts[:, None] + np.arange(SHOTS)).ravel()]
    others, other_place = (column[: size.pictures] for column in _among(judged_classes, there))
    labels = np.repeat(np.arange(len(there)), SHOTS)
    return Chosen(shots[first], labels, judged[others], other_place, len(there))


def _among(classes: Numbers, chosen: Numbers) -> tuple[Numbers, Numbers]:
    """Where one of the chosen classes stands, and the place among them of each."""
    order = np.argsort(chosen)
    at = np.searchsorted(chosen[order], classes)
    place = order[np.minimum(at, len(chosen) - 1)]
    found = np.flatnonzero(chosen[place] == classes)
    return found, place[found]


def _labelled(corpus: Corpus, what: str, seed: int) -> tuple[Numbers, Numbers]:
    """Number and class of pictures that have one class, in an order that the seed decides."""
    numbers: list[Numbers] = []
    classes: list[Numbers] = []
    scanned = 0
    for shard in permutation(len(corpus.counts), "probe", what, seed).tolist():
        if scanned >= SCANNED:
            break
        labels = corpus.rows(shard, ["labels"])["labels"].combine_chunks()
        single = np.flatnonzero(labels.value_lengths().to_numpy() == 1)
        classes.append(labels.take(single).flatten().to_numpy().astype(np.int64))
        numbers.append(corpus.first[shard] + single)
        scanned += len(labels)
    order = permutation(sum(map(len, numbers)), "probe pictures", what, seed)
    return np.concatenate(numbers)[order], np.concatenate(classes)[order]


class Probe:
    """The probe of a run's milestones; every process has to ask, and makes its share of the forward passes."""

    def __init__(
        self, config: Config, engine: Engine, training: Corpus, validation: Corpus, size: Size, refused: Refused
    ) -> None:
        self.config, self.engine, self.size = config, engine, size
        # Some pictures from many shards: of a store they are fetched one by one, and nothing makes room for them.
        direct = replace(config, data=replace(config.data, cache_gigabytes=0.0))
        self.training = Feed(training, direct, engine.world, refused=refused)
        self.validation = Feed(validation, direct, engine.world)
        self._chosen: Chosen | None = None
        self._asked = False

    def __call__(self, told: Callable[[Iterator[Batch]], Iterator[Batch]]) -> float | None:
        """The share of pictures that are named rightly, on process 0 and on all; None where there are too few.

        `told` is given the batches to pass on. The weights are those that a milestone keeps, their moving average if
        there is one. Nothing that training goes on from is changed.
        """
        if not self._asked:
            self._asked, chosen = True, None
            if self.engine.world.first:
                chosen = choose(self.training.corpus, self.validation.corpus, self.size, self.config.seed)
            self._chosen = self.engine.agree(chosen)
        if self._chosen is None:
            return None
        chosen, value = self._chosen, None
        with self.engine.averaged():
            shots = self._seen(self.training, chosen.shots, chosen.shot_labels, told)
            judged = self._seen(self.validation, chosen.judged, chosen.judged_labels, told)
        if self.engine.world.first and len(shots[1]) and len(judged[1]):
            value = fewshot.probe(*shots, *judged, chosen.classes)
        return self.engine.agree(value)

    def close(self) -> None:
        """Stop the threads."""
        self.training.close()
        self.validation.close()

    def _seen(
        self, feed: Feed, numbers: Numbers, labels: Numbers, told: Callable[[Iterator[Batch]], Iterator[Batch]]
    ) -> tuple[Tensor, Tensor]:
        """Features (n, d) and labels (n) of all processes' pictures, in their order, but those that are no pictures."""
        engine = self.engine
        batches = feed.looked_at(numbers.tolist(), self.config.micro(engine.world.size), refuse=True)
        parts = engine.gather(_features(engine.model, told(batches), engine.device))
        features, weights = (torch.cat(column) for column in zip(*parts, strict=True))
        return features[weights > 0], torch.from_numpy(labels)[weights > 0]


@torch.no_grad()
def _features(model: nn.Module, batches: Iterator[Batch], device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, d) and the weight of each (n), on the CPU, of this process's pictures without what only fills a batch."""
    training, dtype = model.training, next(model.parameters()).dtype
    model.eval()
    seen, weights = [], []
    for batch in batches:
        features = before_head(model, normalised(batch.images.to(device, non_blocking=True)).to(dtype))
        real = batch.samples >= 0
        seen.append(features.float().cpu()[real])
        weights.append(batch.weights[real])
    model.train(training)
    return torch.cat(seen), torch.cat(weights)
