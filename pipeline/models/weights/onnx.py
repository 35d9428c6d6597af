"""A model as ONNX, for any number of pictures of its configured size.

Needs the packages onnx and onnxscript, which the project does not depend on.
"""

import logging
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

OPSET = 20
"""The first with GELU as an operator of its own, in both its forms."""


def write(model: nn.Module, size: int, path: Path) -> None:
    """Write the model, in evaluation, to `path`: `images` (b, 3, size, size) to `logits` (b, c), b free.

    Weights of more than 2 GB, which an ONNX file cannot hold, are put beside it. ValueError says which packages lack.
    """
    if lacking := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ValueError(f"ONNX is written by packages that are not there: pip install {' '.join(lacking)}")
    # Two pictures: with one, a batch of one would be taken for a number of the model.
    example = torch.zeros(2, 3, size, size)
    shapes = ({0: torch.export.Dim("pictures")},)
    # The exporter writes attention out, which lies in memory as that of the plain kernel does, and no other's.
    with warnings.catch_warnings(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.export.export(model.eval(), (example,), dynamic_shapes=shapes, strict=True)
        made = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["logits"], verbose=False
        )
    assert made is not None
    _keep_padding(made.model)
    made.save(path)


def _keep_padding(model: Any) -> None:
    """Pad with next to nothing, not nothing, before a maximum.

    onnxruntime (1.31) makes zeros before a MaxPool part of it, whose own padding never wins: BiT's stem then differs.
    """
    ir = import_module("onnx_ir")
    graph = model.graph
    for number, node in enumerate(graph):
        if node.op_type == "Pad" and any(user.op_type == "MaxPool" for out in node.outputs for user, _ in out.uses()):
            name = f"next_to_nothing_{number}"
            least = ir.Value(name=name, const_value=ir.tensor(torch.tensor(torch.finfo().tiny).numpy(), name=name))
            graph.register_initializer(least)
            node.resize_inputs(max(3, len(node.inputs)))
            node.replace_input_with(2, least)
