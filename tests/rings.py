"""How often a test tries what it states: a few times in `make test`, many times in `make soak`."""

import os

SOAK = bool(os.environ.get("VITSCALE_SOAK"))


def count(gate: int, soak: int) -> int:
    """The number of kills, restarts or inputs; a test that asks for it is marked `soak`."""
    return soak if SOAK else gate
