"""How a fine-tuning is done: frozen values with a name and a version."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """Fine-tuning of all weights by SGD with momentum, cosine decay to 0 (paper, appendix B.1.1 and table 4).

    Whatever changes a result changes the version.
    """

    name: str
    version: int
    steps: int
    batch: int
    rates: tuple[float, ...]
    """Learning rates to choose from."""
    warmup: int
    momentum: float = 0.9
    clip: float = 1.0
    crop_side: float = 6 / 7
    """Share of a side that a training crop keeps: 384 of 448 pixels in BiT, appendix F."""


demo = Protocol("demo", version=1, steps=300, batch=64, rates=(0.03, 0.1, 0.3), warmup=30)

ALL = (demo,)


def named(name: str) -> Protocol:
    """The protocol of this name; ValueError names those there are."""
    known = {protocol.name: protocol for protocol in ALL}
    if name not in known:
        raise ValueError(f"no protocol {name!r}; there are: {', '.join(known)}")
    return known[name]
