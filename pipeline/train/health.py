"""A run that falls ill: which of its steps are left out, which are spikes, and when it is to give up.

A step whose loss or gradient is not finite is left out: weights, optimizer and schedule are as if its batch had not
been there, and the position in the data goes on. What a step gave is looked at while the device is busy with the next
one, just before that changes the weights, so that nothing waits for it.
"""

import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline import config

NOT_FINITE, SPIKE = "not finite", "spike"
NAMED = 3  # keys of a step in one line

# Two fp32 numbers so near to each other are equal but for rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Sick:
    """A step that is sick: its number, counted from 0, why, and the loss and gradient norm that it gave, if known."""

    step: int
    why: str
    loss: float = math.nan
    gradient_norm: float = math.nan

    def to_json(self, keys: list[str]) -> bytes:
        """The step with the keys of its pictures; a number that is not finite stands there as a word."""
        given = {"loss": self.loss, "gradient_norm": self.gradient_norm}
        told = {name: value if math.isfinite(value) else str(value) for name, value in given.items()}
        return json.dumps({"step": self.step, "why": self.why, **told, "keys": keys}, indent=1).encode()

    @staticmethod
    def from_json(data: bytes) -> "Sick":
        """What `to_json` wrote, or a person who wants a step left out: `step` and `why` are enough."""
        told = json.loads(data)
        numbers = (float(told.get(name, math.nan)) for name in ("loss", "gradient_norm"))
        return Sick(int(told["step"]), str(told["why"]), *numbers)

    def __str__(self) -> str:
        return f"step {self.step:,} is {self.why} (loss {self.loss:.4g}, gradient norm {self.gradient_norm:.4g})"


class GoBack(Exception):
    """The run has to go back to before the step that it carries."""

    def __init__(self, sick: Sick) -> None:
        super().__init__(str(sick))
        self.sick = sick


class Window:
    """The last losses of a run, which say what would be too high: their mean and `sigmas` standard deviations.

    Losses that were too high count, too, once they are there: a run that has come to another level gets used to it.
    With fewer than half of `size` nothing is too high, nor with 0 `sigmas`.
    """

    def __init__(self, sigmas: float, size: int, losses: list[float] | None = None) -> None:
        self.sigmas = sigmas
        self.losses = deque(losses or (), maxlen=size)

    def add(self, loss: float) -> None:
        """Take the loss of the next step; what is not finite says nothing and is left aside."""
        if math.isfinite(loss):
            self.losses.append(loss)

    @property
    def limit(self) -> float | None:
        """A loss above it is a spike; None where that cannot be said."""
        count = len(self.losses)
        if not self.sigmas or 2 * count < self.losses.maxlen or not count:  # type: ignore[operator]
            return None
        mean = math.fsum(self.losses) / count
        deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in self.losses) / count)
        return mean + max(self.sigmas * deviation, _ROUNDING * abs(mean))


class Late:
    """Numbers on their way from a device: who asks waits for them alone, not for what the device was given since."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._there = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def numbers(self) -> list[float]:
        """The numbers; waits until they are there."""
        if self._there is not None:
            self._there.synchronize()
        return self._values.tolist()


@dataclass(frozen=True)
class _Taken:
    """A step whose update has been asked for: the mean loss, the gradient's norm, whether it was left out, and whether
    a process asks for the end, on their way; and the limit that held."""

    step: int
    given: Late
    limit: float | None


class Health:
    """Follows the steps of a run; every process sees the same.

    `left_out` are the steps that are not to be taken at all; `report` hears of each sick step, and whether it was left
    out; `keys` gives the keys of a step's pictures; `state` is that of a checkpoint.
    """

    def __init__(
        self,
        chosen: config.Health,
        left_out: dict[int, Sick],
        *,
        report: Callable[[Sick, bool], None],
        keys: Callable[[int], list[str]],
        state: dict[str, Any] | None = None,
    ) -> None:
        state = state or {"skipped": 0, "spikes": 0, "row": [], "losses": []}
        self.chosen, self._left_out, self._report, self._keys = chosen, left_out, report, keys
        self.skipped: int = state["skipped"]
        """Steps left out so far."""
        self.spikes: int = state["spikes"]
        """Spikes so far, whatever was done about them."""
        self.asked_to_stop = False
        """Whether a process has asked for the end."""
        self.to_undo: Sick | None = None
        """A step whose update has been made, but should not have been."""
        self._row: list[int] = list(state["row"])
        self._window = Window(chosen.sigmas, chosen.window, state["losses"])
        self._taken: _Taken | None = None

    def state(self) -> dict[str, Any]:
        """What a start from here has to know; every step taken has to be settled, and none to be undone."""
        assert self._taken is None and self.to_undo is None
        losses = list(self._window.losses)
        return {"skipped": self.skipped, "spikes": self.spikes, "row": list(self._row), "losses": losses}

    @property
    def guard(self) -> float | None:
        """The loss above which the update of the next step is left out; None where none is for its loss."""
        return self._window.limit if self.chosen.spike == "skip" else None

    def to_leave_out(self, step: int) -> Sick | None:
        """What is known of a step that is not to be taken, None for one that is."""
        return self._left_out.get(step)

    def pass_over(self, sick: Sick) -> None:
        """Count a step that was not taken as if it had been taken and left out."""
        self.settle()
        self._window.add(sick.loss)
        self._count(sick)

    def took(self, step: int, given: Tensor) -> None:
        """A step has been taken; `given` is (4): mean loss, gradient norm, left out or not, asked to stop or not."""
        assert self._taken is None or self.to_undo, "the step before it is settled first"
        self._taken = _Taken(step, Late(given), self._window.limit)

    def settle(self) -> None:
        """Judge the step taken last, if that is still to be done; waits until the device has finished it.

        ValueError where too many in a row are not finite. What follows a step that is to be undone is not judged.
        """
        if self._taken is None or self.to_undo:
            return
        taken, self._taken = self._taken, None
        loss, norm, skipped, asked = taken.given.numbers()
        self.asked_to_stop |= asked > 0
        high = taken.limit is not None and taken.limit < loss < math.inf
        # With a guard the gradient of a spike is not finite, since that is how its update is left out.
        sick = Sick(
            taken.step, SPIKE if high and (not skipped or self.chosen.spike == "skip") else NOT_FINITE, loss, norm
        )
        if not skipped and high and self.chosen.spike == "rollback":
            self.to_undo = sick
            return
        self._window.add(loss)
        if skipped:
            self._report(sick, True)
            self._count(sick)
            return
        self._row.clear()
        if high:
            self.spikes += 1
            self._report(sick, False)

    def _count(self, sick: Sick) -> None:
        self.skipped += 1
        if sick.why == SPIKE:
            self.spikes += 1
        if sick.why != NOT_FINITE:
            return
        self._row.append(sick.step)
        if len(self._row) > self.chosen.skips:
            told = "; ".join(f"step {step:,}: {listed(self._keys(step))}" for step in self._row)
            raise ValueError(
                f"{len(self._row)} steps in a row are not finite, more than health.skips {self.chosen.skips}: the "
                f"model or the machine is sick rather than a picture ({told}); what is noted of them under skipped/ "
                f"in the run's folder has to be removed for them to be tried again, with --change optim.lr=… if need be"
            )


def listed(keys: list[str]) -> str:
    """The first keys, and how many more there are."""
    more = len(keys) - NAMED
    return ", ".join(keys[:NAMED]) + (f" and {more:,} more" if more > 0 else "")
