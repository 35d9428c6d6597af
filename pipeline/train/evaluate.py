"""How good a model is on a set of pictures: every picture counts once, and what only fills a batch not at all."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.data.loader import Batch
from pipeline.objectives.classify import correct, loss
from pipeline.train.objective import to_device


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], config: Config, device: torch.device, total: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """`accuracy` (share of pictures whose likeliest class is a label of theirs) and `loss`, over all pictures.

    Each process gives its share of the batches; `total` sums over the processes.
    """
    assert config.objective != "masked", "which has no classes to be right about"
    training, dtype = model.training, next(model.parameters()).dtype
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        given = to_device(batch, device, config.classes)
        logits = model(given.images.to(dtype))
        value = loss(logits, given.labels, config.objective, config.smoothing, given.weights) * len(logits)
        right = correct(logits, given.labels) * given.weights
        sums += torch.stack([right.sum(), value, given.weights.sum()]).double()
    model.train(training)
    right, losses, count = total(sums).tolist()
    return {"accuracy": right / count, "loss": losses / count, "count": count}
