"""What each family's models are, as frozen values: one file a family. Imports nothing but the standard library."""

from dataclasses import replace
from typing import Any

from pipeline.architectures import bit, cmt, efficientnet, hybrid, maxvit, vit
from pipeline.architectures.bit import Bit
from pipeline.architectures.cmt import Cmt
from pipeline.architectures.efficientnet import Efficientnet
from pipeline.architectures.hybrid import Hybrid
from pipeline.architectures.maxvit import Maxvit
from pipeline.architectures.vit import Vit

Architecture = Vit | Hybrid | Bit | Cmt | Maxvit | Efficientnet
"""Every model there is. A hybrid is a `Vit` too: where a `match` tells them apart, `Hybrid()` comes first."""

FAMILIES: dict[str, type[Architecture]] = {
    "vit": Vit,
    "hybrid": Hybrid,
    "bit": Bit,
    "cmt": Cmt,
    "maxvit": Maxvit,
    "efficientnet": Efficientnet,
}
"""By the name that stands for each in files."""


def family(config: Architecture) -> str:
    """The name in `FAMILIES`."""
    return next(name for name, kind in FAMILIES.items() if type(config) is kind)


def described(name: str, values: dict[str, Any]) -> Architecture:
    """The architecture of a family from its fields as JSON has them; ValueError where there is no such family."""
    if name not in FAMILIES:
        raise ValueError(f"no architecture {name!r}; there are: {', '.join(FAMILIES)}")
    fields: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in values.items()}
    return FAMILIES[name](**fields)


def presets() -> dict[str, Architecture]:
    """The architectures that bear a name, by that name."""
    modules, kinds = (vit, hybrid, bit, cmt, maxvit, efficientnet), tuple(FAMILIES.values())
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, kinds) and not name.startswith("_")
    }


def preset(name: str) -> Architecture:
    """The architecture of that name; ValueError names those there are."""
    if name not in (known := presets()):
        raise ValueError(f"no model {name!r}; there are: {', '.join(known)}")
    return known[name]


def at_size(config: Architecture, size: int) -> Architecture:
    """The same architecture for pictures of another size; a MaxViT's windows grow with it, as its authors have them.

    ValueError names sizes that would do.
    """
    changed: dict[str, Any] = {"image_size": size}
    if isinstance(config, Maxvit) and size % config.stride == 0:
        changed["window"] = size // config.stride
    made = replace(config, **changed)
    made.check()
    return made
