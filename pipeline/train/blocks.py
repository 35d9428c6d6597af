"""What is done to the blocks of a model before it is trained: compiled, or computed a second time rather than kept.

Both change a block's `forward` in place. Its parameters keep their names, and hooks on it see what they always do.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.build import blocks_of
from pipeline.train.norms import BatchNorm, uncounted


def wrap(model: nn.Module, *, compiled: bool, recompute: bool) -> None:
    """Compile the blocks, or let them keep only what they are given (Chen et al. 2016, section 4.1), or both."""
    blocks = blocks_of(model)
    if compiled:
        # All blocks share one code, and after so many variants of it (shapes, rates, modes) torch compiles no more.
        settings: Any = torch._dynamo.config
        settings.recompile_limit = max(settings.recompile_limit, 4 * len(blocks))
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.leave_uncompiled()
    for block in blocks:
        if compiled:
            block.forward = torch.compile(block.forward)
        if recompute:
            block.forward = _recomputing(block)


def _recomputing(block: nn.Module) -> partial:
    """The block's `forward`, which draws the same dropout both times, and whose batch norms count the first."""

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), uncounted(block)

    return partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
