"""One file for each run worth repeating: its docstring says command, cost and expected result; it holds `config`."""

from importlib import import_module
from pathlib import Path

from pipeline.config import Config


def known() -> list[str]:
    """The names of the experiments."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def load(name: str) -> Config:
    """The configuration of an experiment; ValueError names those there are."""
    if name not in known():
        raise ValueError(f"no experiment {name!r}; there are: {', '.join(known())}")
    return import_module(f"{__name__}.{name}").config


def summary(name: str) -> str:
    """The first sentence of an experiment's docstring."""
    return (import_module(f"{__name__}.{name}").__doc__ or "").strip().splitlines()[0]


def listing() -> str:
    """All of them, a line each, for who asks for help."""
    return "Experiments:\n" + "\n".join(f"    {name:16} {summary(name)}" for name in known())
