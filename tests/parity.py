"""Whether two models that hold the same weights compute the same."""

from torch import Tensor, nn


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    """Within so much of the largest number."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).detach().abs().max()) <= tolerance * max(1e-6, float(theirs.detach().abs().max()))


def passed(model: nn.Module, pictures: Tensor, toward: Tensor) -> dict[str, Tensor]:
    """The logits of a model, and the gradients of their product with `toward`: of the pictures and by parameter."""
    given = pictures.clone().requires_grad_()
    logits = model(given)
    (logits * toward).sum().backward()
    slopes = {"pictures": given.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    reached = {name: slope for name, slope in slopes.items() if slope is not None}
    assert reached.keys() == slopes.keys()
    return {"logits": logits.detach(), **reached}
