"""What a model keeps of a picture for its backward pass, counted by a forward pass without numbers."""

import torch
from torch import Tensor

from pipeline.architectures import Architecture
from pipeline.models.build import build


def kept_bytes(config: Architecture, pictures: int = 2) -> float:
    """Bytes that the forward pass of one picture keeps in fp32; the weights themselves are not counted.

    On torch's meta device, so that a model of any size is counted in a moment. `pictures` are passed, since a batch
    norm of one place needs two.
    """
    with torch.device("meta"):
        model = build(config, 0).train()
        images = torch.empty(pictures, 3, config.image_size, config.image_size)
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in known and tensor.numel() > 1:
            kept[storage] = tensor  # held, so that no other storage gets its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / pictures
