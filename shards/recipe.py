"""What decides a shard set, beside the pictures themselves: a value, which stands in the manifest."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from shards.image import KEEP, Processing
from shards.plan import Plan


@dataclass(frozen=True)
class Clean:
    """Which pictures are taken out because they are there twice, or in a test set."""

    duplicates: Literal["keep", "drop", "merge"] = "keep"
    """What happens to equal and nearly equal pictures of the corpus: all stay; one of them stays, with its own labels;
    or one stays with the labels of all."""
    against: tuple[str, ...] = ()
    """Shard sets (folders or URLs) whose pictures must not be in this one."""

    @property
    def wanted(self) -> bool:
        """Whether anything is to be looked for."""
        return self.duplicates != "keep" or bool(self.against)


@dataclass(frozen=True)
class Recipe:
    """A shard set to be made of a source's pictures."""

    dataset: str
    split: str
    licence: str = "not stated"
    classes: tuple[str, ...] = ()
    """Their names in order; empty where the source says them."""
    samples_per_shard: int = 5000
    seed: int = 0
    """Of the order of the pictures."""
    run: int = 1
    """Neighbours of the source that stay together (see `Plan`)."""
    processing: Processing = KEEP
    clean: Clean = Clean()
    keep_sound: bool = False
    """Whether what is sound of a damaged file of the source was taken, rather than none of it."""
    refused_limit: float = 0.01
    """Share of pictures that may be unusable before the job fails; decides nothing about the bytes."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {self.samples_per_shard}; at least 1 is needed")
        if not 0 <= self.refused_limit <= 1:
            raise ValueError(f"refused_limit is {self.refused_limit}; it is a share between 0 and 1")

    @property
    def name(self) -> str:
        """The set's name."""
        return f"{self.dataset}/{self.split}"

    def plan(self, samples: int) -> Plan:
        """The plan for so many pictures."""
        words = self.name + (f"/{self.seed}" if self.seed else "")
        return Plan(samples, self.samples_per_shard, words, min(self.run, self.samples_per_shard))

    def values(self) -> dict[str, Any]:
        """The recipe as it stands in the manifest."""
        values = {name: value for name, value in asdict(self).items() if name not in ("classes", "refused_limit")}
        return {**values, "clean": {**values["clean"], "against": list(self.clean.against)}}
