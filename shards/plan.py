"""Which picture goes to which shard, and to which place in it: pure, and worked out for one shard at a time."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.chance import permuted


@dataclass(frozen=True)
class Plan:
    """`samples` pictures in an order that `shuffle` decides, cut into equal shards of about `samples_per_shard`.

    Runs of `run` neighbours of the source stay in one shard (two, where a shard ends within a run): that saves
    requests where the source is a store, and costs mixing. Within a shard the order is shuffled in any case.
    """

    samples: int
    samples_per_shard: int
    shuffle: str
    run: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("there are no pictures to put into shards")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {self.samples_per_shard}; at least 1 is needed")
        if not 1 <= self.run <= self.samples_per_shard:
            raise ValueError(f"run is {self.run}; it lies between 1 and samples_per_shard, {self.samples_per_shard}")

    @property
    def shards(self) -> int:
        """Number of shards."""
        return max(1, round(self.samples / self.samples_per_shard))

    def numbers(self, shard: int) -> NDArray[np.int64]:
        """The pictures of a shard, by their number in the source, in the order of the tar.

        Every picture is in exactly one shard; the sizes of two shards differ by one at most.
        """
        places = np.arange(self._first(shard), self._first(shard + 1))
        if self.run == 1:
            return permuted(places, self.samples, "shards", self.shuffle)
        numbers = self._of_runs(places)
        return numbers[permuted(np.arange(len(numbers)), len(numbers), "places", self.shuffle, shard)]

    def _of_runs(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at `places` when whole runs are put in another order; an incomplete last run stays last."""
        whole = self.samples // self.run
        moved = places < whole * self.run
        runs = permuted(places[moved] // self.run, whole, "runs", self.shuffle) if whole else places[:0]
        return np.concatenate([runs * self.run + places[moved] % self.run, places[~moved]])

    def size(self, shard: int) -> int:
        """How many pictures a shard has."""
        return self._first(shard + 1) - self._first(shard)

    def _first(self, shard: int) -> int:
        return self.samples * shard // self.shards


def shard_name(shard: int) -> str:
    """The file of a shard."""
    return f"{shard:06}.tar"
