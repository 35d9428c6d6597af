"""Who one is among many processes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`; rank counts from 0."""

    rank: int = 0
    size: int = 1
    local: int = 1
    """Processes on this machine, which share its disk."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not within a world of {self.size}")

    @property
    def first(self) -> bool:
        """Whether this process speaks for all: it logs, prints and writes what exists once."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The contiguous part of `count` things that is this process's; shares differ by one at the most."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)
