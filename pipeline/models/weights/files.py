"""A file of weights, by whatever program it was written, as named tensors; nothing in it is run.

What a file is shows in its first bytes, whatever it is called.
"""

import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

READABLE = "what can be read is .npz, .safetensors and PyTorch's .pth, .pt or .bin"
# A checkpoint of a training run names its weights so; those that moved on average beside them are left.
_WEIGHTS = ("model", "state_dict")
# What DataParallel, torch.compile and Lightning put before every name.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# How torch names what a pickle wants called that is no tensor.
_ASKED = re.compile(r"GLOBAL ([\w.]+)")
# All that torch raises on the way through a pickle that was cut off or changed.
_DAMAGE = (RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError, AssertionError, struct.error)
_BEGINNINGS = (
    (b"\x89HDF", "an HDF5 file, say of Keras"),
    (b"\x93NUMPY", "a single array (.npy)"),
    (b"\x08", "perhaps an ONNX model"),
    (b"\x1f\x8b", "gzipped: unpack it first"),
)


class Named(NamedTuple):
    """The tensors of a file, and what else was in it."""

    tensors: dict[str, Tensor]
    left: tuple[str, ...]
    """Names of what is no tensor of the model: epochs, options, an optimizer's state, averages."""


def tensors(name: str, data: bytes) -> Named:
    """The tensors in the file `name` that holds `data`; ValueError says why it is no file of weights.

    A pickle is read only as far as it holds tensors and plain values: one that asks for anything else to be called
    is refused with what it asks for. Arrays of two bytes without a type are bfloat16, as JAX writes it.
    """
    if not data:
        raise ValueError(f"{name} is empty")
    if zipfile.is_zipfile(io.BytesIO(data)):
        members = zipfile.ZipFile(io.BytesIO(data)).namelist()
        if any(member.endswith(".npy") for member in members):
            return Named(_arrays(name, data), ())
        if any(member.endswith("data.pkl") for member in members):
            return _unwrapped(name, _unpickled(name, data))
        raise ValueError(f"{name} is an archive without weights; {READABLE}")
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        return Named(_safetensors(name, data), ())
    if data[:1] == b"\x80":
        return _unwrapped(name, _unpickled(name, data))
    said = next((what for start, what in _BEGINNINGS if data.startswith(start)), "of an unknown kind")
    raise ValueError(f"{name} is no file of weights but {said}; {READABLE}")


def _safetensors(name: str, data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def _arrays(name: str, data: bytes) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        for key in file.files:
            try:
                found[key] = _tensor(file[key])
            except (ValueError, TypeError, zipfile.BadZipFile) as error:
                raise ValueError(f"{name} is refused: its array {key!r} cannot be read ({error})") from error
    return found


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)


def _unpickled(name: str, data: bytes) -> Any:
    # Training scripts keep their command line, a Namespace of plain values, beside the weights.
    try:
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's protocol: what torch cannot read it says by an error
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = _ASKED.search(str(error))
        called = [asked[1]] if asked else _called(data)
        if not called:
            raise ValueError(f"{name} is damaged, or no file that torch.save wrote") from error
        raise ValueError(
            f"{name} is refused: reading it would run code ({', '.join(called)}), and only tensors are read; "
            "have who trusts it save the state_dict alone, best as .safetensors"
        ) from error
    except _DAMAGE as error:
        raise ValueError(f"{name} is damaged, or no file that torch.save wrote") from error


def _called(data: bytes) -> list[str]:
    """What a bare pickle, which torch.save did not write, wants imported; found without running it."""
    found: list[str] = []
    said: list[str] = []
    try:
        for operation, argument, _ in pickletools.genops(data):
            match operation.name:
                case "GLOBAL":
                    found.append(str(argument).replace(" ", "."))
                case "STACK_GLOBAL":
                    found.append(".".join(said[-2:]))
                case _ if isinstance(argument, str):
                    said.append(argument)
    except ValueError:
        pass  # torch reads other beginnings than pickle's own tools do
    return found


def _unwrapped(name: str, found: Any) -> Named:
    left: list[str] = []
    while isinstance(found, Mapping) and (key := next((k for k in _WEIGHTS if isinstance(found.get(k), Mapping)), "")):
        left += [str(other) for other in found if other != key]
        found = found[key]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{name} holds no state_dict but a {type(found).__name__}")
    left += [str(key) for key, value in found.items() if not isinstance(value, Tensor)]
    weights = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    while wrapper := next((w for w in _WRAPPERS if all(key.startswith(w) for key in weights)), ""):
        weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    return Named(weights, tuple(left))
