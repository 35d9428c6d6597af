"""Weights that come from elsewhere compute what they computed there, and ours compute elsewhere what they do here.

Legend: b batch, t tokens, d width, h heads, e width of a head, m hidden width, p q sides of a patch, c channels.
"""

import io
import json
import os
import pickle
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy.ndimage import zoom
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from pipeline.architectures import (
    Architecture,
    Bit,
    Cmt,
    Efficientnet,
    Hybrid,
    Maxvit,
    Vit,
    at_size,
    described,
    family,
    preset,
    presets,
)
from pipeline.architectures.cmt import cmt_s
from pipeline.architectures.efficientnet import efficientnet_b0
from pipeline.models.build import build
from pipeline.models.weights import bit, exported, files, foreign, huggingface, npz, timm
from pipeline.models.weights.fit import Head, fitted, take
from shards.storage import Folder
from tests.gang import run_job
from tests.timm import load as module_of_timm

pytestmark = pytest.mark.timeout(300)
EXPORT = Path(__file__).resolve().parents[1] / "jobs" / "export.py"

SMALL = Vit(width=32, depth=2, heads=4, hidden=48, patch=5, image_size=20)
HYBRID = Hybrid(width=32, depth=1, heads=2, hidden=48, trunk=(2, 2, 2, 2), image_size=64)
VITS: dict[str, Vit] = {
    "plain": SMALL,
    "a tanh layer": replace(SMALL, representation=True),
    "erf": replace(SMALL, gelu="erf"),
    "mean of patches": replace(SMALL, pooling="gap"),
    "query that pools": replace(SMALL, pooling="map"),
    "class token without position": replace(SMALL, prefix_positions=False),
    "a hybrid": HYBRID,
    "a hybrid of a root alone": replace(HYBRID, trunk=(), patch=8),
}
OTHERS: dict[str, Architecture] = {
    "BiT": Bit(units=(1, 2, 1, 1), image_size=32),
    "CMT": replace(cmt_s, depths=(1, 1, 1, 1), image_size=64),
    "MaxViT": Maxvit(stem=32, widths=(32, 64), depths=(1, 1), window=2, image_size=16),
    "EfficientNet": replace(efficientnet_b0, image_size=32),
}
every_vit = pytest.mark.parametrize("config", VITS.values(), ids=VITS)
every_model = pytest.mark.parametrize("config", [*VITS.values(), *OTHERS.values()], ids=[*VITS, *OTHERS])


def made(config: Architecture, classes: int = 7, seed: int = 0) -> nn.Module:
    """A model in evaluation, all of whose numbers are drawn."""
    generator = torch.Generator().manual_seed(seed)
    model = build(config, classes).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.is_floating_point():
                # Standardised kernels may have any size; beside large ones the number that keeps their divisor from 0,
                # which is 1e-10 in BiT's code and 1e-8 in timm's, makes no difference.
                standardised = isinstance(config, Bit) and tensor.ndim == 4
                scale = 1 if standardised else (tensor[0].numel() if tensor.ndim > 1 else 4) ** -0.5
                tensor.normal_(std=scale, generator=generator)
    return model


def pictures(config: Architecture, count: int = 3) -> Tensor:
    shape = (count, 3, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return model.double().eval()(images)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> bool:
    return ours.shape == theirs.shape and float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance


# --- vision_transformer's arrays, written and computed by hand --------------------------------------------------------

Arrays = dict[str, np.ndarray]


def drawn(*, representation: bool = False, pool: str = "token", seed: int = 0) -> Arrays:
    """Arrays as the first Flax names them, of a model of two blocks."""
    draw = np.random.default_rng(seed)
    d, h, e, m, p, n, classes = 32, 4, 8, 48, 5, 16, 7

    def array(*shape: int) -> np.ndarray:
        return draw.normal(0, 0.3, shape).astype(np.float32)

    def attention(name: str) -> Arrays:
        made = {f"{name}/{part}/kernel": array(d, h, e) for part in ("query", "key", "value")}
        made |= {f"{name}/{part}/bias": array(h, e) for part in ("query", "key", "value")}
        return made | {f"{name}/out/kernel": array(h, e, d), f"{name}/out/bias": array(d)}

    def norm(name: str) -> Arrays:
        return {f"{name}/scale": array(d), f"{name}/bias": array(d)}

    def mlp(name: str) -> Arrays:
        first = {f"{name}/Dense_0/kernel": array(d, m), f"{name}/Dense_0/bias": array(m)}
        return first | {f"{name}/Dense_1/kernel": array(m, d), f"{name}/Dense_1/bias": array(d)}

    arrays = {"embedding/kernel": array(p, p, 3, d), "embedding/bias": array(d)}
    arrays["Transformer/posembed_input/pos_embedding"] = array(1, n + (pool == "token"), d)
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        arrays |= norm(f"{block}/LayerNorm_0") | attention(f"{block}/MultiHeadDotProductAttention_1")
        arrays |= norm(f"{block}/LayerNorm_2") | mlp(f"{block}/MlpBlock_3")
    arrays |= norm("Transformer/encoder_norm")
    arrays |= {"head/kernel": array(d, classes), "head/bias": array(classes)}
    if pool == "token":
        arrays["cls"] = array(1, 1, d)
    if pool == "map":
        arrays |= {"MAPHead_0/probe": array(1, 1, d)} | attention("MAPHead_0/MultiHeadDotProductAttention_0")
        arrays |= norm("MAPHead_0/LayerNorm_0") | mlp("MAPHead_0/MlpBlock_0")
    if representation:
        arrays |= {"pre_logits/kernel": array(d, d), "pre_logits/bias": array(d)}
    return arrays


def computed(arrays: Arrays, images: Tensor) -> Tensor:
    """The logits that vision_transformer's equations give, straight from such arrays."""
    get = {name: torch.from_numpy(array).double() for name, array in arrays.items()}

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], get[f"{name}/scale"], get[f"{name}/bias"], 1e-6)

    def attention(name: str, asks: Tensor, x: Tensor) -> Tensor:
        q, k, v = (
            torch.einsum("btd,dhe->bhte", of, get[f"{name}/{part}/kernel"]) + get[f"{name}/{part}/bias"][:, None]
            for part, of in (("query", asks), ("key", x), ("value", x))
        )
        shares = torch.softmax(torch.einsum("bhte,bhse->bhts", q, k) / q.shape[-1] ** 0.5, -1)
        return torch.einsum("bhts,bhse,hed->btd", shares, v, get[f"{name}/out/kernel"]) + get[f"{name}/out/bias"]

    def mlp(name: str, x: Tensor) -> Tensor:
        x = gelu(x @ get[f"{name}/Dense_0/kernel"] + get[f"{name}/Dense_0/bias"], approximate="tanh")
        return x @ get[f"{name}/Dense_1/kernel"] + get[f"{name}/Dense_1/bias"]

    side = get["embedding/kernel"].shape[0]
    patches = images.unfold(2, side, side).unfold(3, side, side)  # b c y x p q
    x = torch.einsum("bcyxpq,pqcd->byxd", patches, get["embedding/kernel"]) + get["embedding/bias"]
    x = x.flatten(1, 2)
    if "cls" in get:
        x = torch.cat([get["cls"].expand(len(x), -1, -1), x], dim=1)
    x = x + get["Transformer/posembed_input/pos_embedding"]
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        y = norm(f"{block}/LayerNorm_0", x)
        x = x + attention(f"{block}/MultiHeadDotProductAttention_1", y, y)
        x = x + mlp(f"{block}/MlpBlock_3", norm(f"{block}/LayerNorm_2", x))
    x = norm("Transformer/encoder_norm", x)
    if "MAPHead_0/probe" in get:
        name = "MAPHead_0/MultiHeadDotProductAttention_0"
        x = attention(name, get["MAPHead_0/probe"].expand(len(x), -1, -1), x)
        x = x + mlp("MAPHead_0/MlpBlock_0", norm("MAPHead_0/LayerNorm_0", x))
        x = x[:, 0]
    else:
        x = x[:, 0] if "cls" in get else x.mean(1)
    if "pre_logits/kernel" in get:
        x = torch.tanh(x @ get["pre_logits/kernel"] + get["pre_logits/bias"])
    return x @ get["head/kernel"] + get["head/bias"]


def linen(arrays: Arrays) -> Arrays:
    numbers = {"Attention_1": "Attention_0", "LayerNorm_2": "LayerNorm_1", "MlpBlock_3": "MlpBlock_0"}
    return {re.sub("|".join(numbers), lambda found: numbers[found[0]], name): a for name, a in arrays.items()}


def on_top(arrays: Arrays) -> Arrays:
    return {name.replace("Transformer/posembed_input/", ""): array for name, array in arrays.items()}


def stacked(arrays: Arrays) -> Arrays:
    made = {name: array for name, array in arrays.items() if "encoderblock" not in name}
    inside = [name.split("encoderblock_0/")[1] for name in arrays if "encoderblock_0/" in name]
    blocks = {name: [arrays[f"Transformer/encoderblock_{i}/{name}"] for i in range(2)] for name in inside}
    return made | {f"Transformer/encoderblock/{name}": np.stack(layers) for name, layers in blocks.items()}


def under(prefix: str, **others: np.ndarray) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {prefix + name: array for name, array in arrays.items()} | others


def unchanged(arrays: Arrays) -> Arrays:
    return arrays


STEP, TEXT = (
    {"opt/state/step": np.zeros(1)},
    {"params/txt/Embed_0/embedding": np.zeros((3, 4)), "params/t": np.zeros(1)},
)
LAYOUTS: dict[str, tuple[dict[str, Any], list[Callable[[Arrays], Arrays]], list[str]]] = {
    "AugReg": ({}, [unchanged], []),
    "the paper's ImageNet-21k": ({"representation": True}, [unchanged], []),
    "an optimizer's target": ({}, [under("opt/target/", **STEP)], ["opt/state/step"]),
    "parameters": ({}, [under("params/")], []),
    "linen": ({}, [linen, under("params/")], []),
    "one stack of blocks": ({}, [linen, stacked, under("params/")], []),
    "one stack of the first Flax": ({}, [stacked], []),
    "mean of patches": ({"pool": "gap"}, [linen, on_top, under("params/")], []),
    "MAP head": ({"pool": "map"}, [linen, on_top, under("params/")], []),
    "MAP head over a stack": ({"pool": "map"}, [linen, on_top, stacked, under("params/")], []),
    "the images' tower": ({"pool": "map"}, [linen, on_top, under("params/img/", **TEXT)], list(TEXT)),
}


def of_arrays(arrays: Arrays) -> foreign.Foreign:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return foreign.read("weights.npz", file.getvalue())


def loaded(found: foreign.Foreign, classes: int = 7) -> tuple[nn.Module, Architecture]:
    config = foreign.architecture(found)
    state, report = fitted(found.weights, config, classes, head="taken")
    assert not report.missing and not report.resized and len(report.taken) == len(state)
    model = build(config, classes)
    model.load_state_dict(state)
    return model, config


@pytest.mark.parametrize(("kind", "steps", "left"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_arrays_computes_what_its_equations_do(kind: dict, steps: list, left: list[str]) -> None:
    arrays = drawn(**kind)
    written = arrays
    for step in steps:
        written = step(written)
    found = of_arrays(written)
    model, config = loaded(found)
    assert isinstance(config, Vit) and (config.heads, config.hidden, config.image_size) == (4, 48, 20)
    assert close(logits(model, pictures(config)), computed(arrays, pictures(config)), 1e-10)
    assert sorted(found.left) == sorted(left)


def test_every_position_of_patches_alone_is_as_if_the_class_token_had_one_of_zeros() -> None:
    arrays = drawn()
    table = arrays["Transformer/posembed_input/pos_embedding"]
    table[:, 0] = 0
    model, config = loaded(of_arrays(linen(arrays) | {"Transformer/posembed_input/pos_embedding": table[:, 1:]}))
    assert isinstance(config, Vit) and not config.prefix_positions
    assert close(logits(model, pictures(config)), computed(arrays, pictures(config)), 1e-10)
    found = of_arrays(arrays | {"Transformer/posembed_input/pos_embedding": table[:, 1:]})
    state, _ = fitted(found.weights, SMALL, 7)
    assert not state["pos_embed"][:, 0].any() and torch.equal(state["pos_embed"][:, 1:], torch.from_numpy(table[:, 1:]))


def test_a_position_of_the_class_token_may_as_well_be_added_to_it() -> None:
    arrays = drawn()
    model = build(replace(SMALL, prefix_positions=False), 7)
    take(model, of_arrays(arrays).weights, replace(SMALL, prefix_positions=False))
    assert close(logits(model, pictures(SMALL)), computed(arrays, pictures(SMALL)), 1e-6)


def test_every_number_of_bfloat16_arrives_whatever_numpy_calls_it() -> None:
    arrays = drawn()
    halved = {name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}
    raw = {name: tensor.view(torch.int16).numpy().view("V2") for name, tensor in halved.items()}
    model, config = loaded(of_arrays(raw))
    rounded = {name: tensor.float().numpy() for name, tensor in halved.items()}
    assert close(logits(model, pictures(config)), computed(rounded, pictures(config)), 1e-10)


def test_every_norm_of_an_old_hybrid_is_as_if_it_were_a_vector() -> None:
    arrays = npz.write(made(HYBRID).state_dict(), HYBRID)
    old = {
        name: array.reshape(1, 1, 1, -1) if re.search(r"gn\w*/(scale|bias)$", name) else array
        for name, array in arrays.items()
    }
    assert sum(array.ndim != arrays[name].ndim for name, array in old.items()) > 10
    assert same(of_arrays(old).weights, of_arrays(arrays).weights)


# --- there and back -------------------------------------------------------------------------------------------------


@every_vit
def test_every_transformer_comes_back_from_npz_as_it_was(config: Vit) -> None:
    state = made(config).state_dict()
    found = foreign.read("x", npz.packed(npz.write(state, config)))
    assert same(found.weights, {name: tensor for name, tensor in state.items()}) and not found.left
    assert found.heads == config.heads
    assert foreign.architecture(found) == replace(config, gelu="tanh")


def test_every_resnet_comes_back_from_npz_as_it_was() -> None:
    config = OTHERS["BiT"]
    state = made(config).state_dict()
    found = foreign.read("x", npz.packed(bit.write(state)))
    assert same(found.weights, state) and not found.left
    assert foreign.architecture(found) == replace(config, image_size=224)


def written_by(way: str, state: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    match way:
        case "safetensors":
            return save(state)
        case "a state_dict":
            torch.save(state, file)
        case "an older format":
            torch.save(state, file, _use_new_zipfile_serialization=False)
        case "a checkpoint":
            beside = {"optimizer": {"state": {}}, "epoch": 3, "args": Namespace(lr=0.1), "model_ema": state}
            torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}, **beside}, file)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["safetensors", "a state_dict", "an older format", "a checkpoint"])
@every_model
def test_every_model_is_read_from_every_file_of_pytorch(config: Architecture, way: str) -> None:
    state = {name: tensor.contiguous() for name, tensor in made(config).state_dict().items()}
    found = foreign.read("x", written_by(way, state))
    assert found.layout == "timm" and same(found.weights, state)
    assert found.left == (("optimizer", "epoch", "args", "model_ema") if way == "a checkpoint" else ())
    again, report = fitted(found.weights, config, 7, head="taken")
    assert same(again, state) and set(report.taken) == set(state) and not report.left


SHOWN = {name: config for name, config in {**VITS, **OTHERS}.items() if name not in ("CMT", "EfficientNet")}


@pytest.mark.parametrize("config", SHOWN.values(), ids=SHOWN)
def test_every_architecture_shows_in_its_weights(config: Architecture) -> None:
    heads = getattr(config, "heads", 0)
    shown = foreign.architecture(foreign.Foreign("timm", made(config).state_dict(), (), heads=heads))
    match config:
        case Hybrid():
            config = replace(config, gelu="erf", standardisation="variance", trunk_epsilon=1e-5)
        case Vit():
            config = replace(config, gelu="erf")
        case Bit():
            config = replace(config, image_size=224)
    assert shown == config


@pytest.mark.parametrize("name", ["vit_h14", "deit_ti16_distilled", "r50_l32", "bit_r101x1", "cmt_xs", "maxvit_t_384"])
def test_every_published_architecture_shows_in_its_weights(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        weights = build(config, 1000).state_dict()
    shown = foreign.architecture(foreign.Foreign("timm", weights, ()))
    with torch.device("meta"):
        again = build(shown, 1000).state_dict()
    assert {name: w.shape for name, w in again.items()} == {name: w.shape for name, w in weights.items()}
    assert shown.image_size == config.image_size


def test_every_architecture_is_as_its_description_has_it() -> None:
    for config in presets().values():
        about = json.loads(json.dumps({"architecture": family(config), "model": asdict(config)}))
        assert described(about["architecture"], about["model"]) == config
    with pytest.raises(ValueError, match="no architecture 'swin'; there are: vit, hybrid"):
        described("swin", {})


# --- timm -------------------------------------------------------------------------------------------------------------

# What timm has under a name, small where the name allows it.
TIMM: dict[str, Architecture] = {
    **{name: config for name, config in VITS.items() if config.__class__ is Vit and not config.representation},
    "registers": replace(SMALL, registers=2),
    "fixed positions": replace(SMALL, positions="sincos2d", pooling="gap"),
    "two heads": replace(SMALL, distillation=True, gelu="erf"),
    "hidden width just above a quotient": replace(SMALL, width=36, heads=6, hidden=59),
    "hybrid": replace(HYBRID, standardisation="variance", trunk_epsilon=1e-5, gelu="erf"),
    "root alone": replace(HYBRID, trunk=(), patch=8, standardisation="variance", trunk_epsilon=1e-5),
    "BiT-R50x1": Bit(image_size=48),
    "MaxViT-T": Maxvit(window=2, image_size=64),
    "MaxViT-T of another window": Maxvit(window=2, bias_window=3, image_size=64),
    "EfficientNet-B0": replace(efficientnet_b0, image_size=48),
    "EfficientNet-B0 of PyTorch": replace(efficientnet_b0, image_size=48, padding="symmetric", epsilon=1e-5),
}
every_timm = pytest.mark.parametrize("config", TIMM.values(), ids=TIMM)


@pytest.mark.slow
@every_timm
def test_every_model_computes_in_timm_what_it_does_here(config: Architecture, tmp_path: Path) -> None:
    model = made(config)
    weights, left = timm.write(model.state_dict(), config)
    assert not left
    (tmp_path / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    (tmp_path / "config.json").write_text(json.dumps(timm.description(config, 7, [0.5] * 3, [0.5] * 3)))
    ours = logits(model, pictures(config))
    create = module_of_timm("timm").create_model
    name, settings = timm.model(config, 7)
    by_name = create(name, checkpoint_path=str(tmp_path / "model.safetensors"), **settings)
    assert close(ours, logits(by_name, pictures(config)))
    by_folder = create(f"local-dir:{tmp_path}", pretrained=True)
    assert close(ours, logits(by_folder, pictures(config)))


@pytest.mark.slow
@every_timm
def test_every_model_of_timm_computes_here_what_it_does_there(config: Architecture) -> None:
    if isinstance(config, Maxvit):
        config = replace(config, bias_window=None)
    if isinstance(config, Vit):
        config = replace(
            config, positions="learned", prefix_positions=config.positions == "learned" and config.prefix_positions
        )
    name, settings = timm.model(config, 7)
    torch.manual_seed(0)
    theirs = module_of_timm("timm").create_model(name, **settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_((1 if isinstance(config, Bit) else 0.05) * torch.randn_like(parameter))
    model = build(config, 7)
    report = take(model, timm.read(theirs.state_dict()), config, head="taken")
    assert not report.left and not report.missing and not report.resized
    assert close(logits(model, pictures(config)), logits(theirs, pictures(config)))


def test_a_model_with_a_tanh_layer_has_the_same_features_in_timm(tmp_path: Path) -> None:
    config = VITS["a tanh layer"]
    model = made(config)
    weights, left = timm.write(model.state_dict(), config)
    assert set(left) == {"pre_logits.weight", "pre_logits.bias", "head.weight", "head.bias"}
    (tmp_path / "x.safetensors").write_bytes(save(weights))
    name, settings = timm.model(config, 7)
    theirs = module_of_timm("timm").create_model(name, checkpoint_path=str(tmp_path / "x.safetensors"), **settings)
    tokens = model.double().forward_features(pictures(config)).tokens  # type: ignore[operator]
    assert close(tokens[:, 0].detach(), logits(theirs, pictures(config)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "settings"),
    [
        ("vit_base_patch16_224", SMALL, {}),
        ("vit_base_patch16_224", VITS["query that pools"], {}),
        ("vit_small_r26_s32_224", TIMM["hybrid"], {}),
        ("vit_tiny_r_s16_p8_224", TIMM["root alone"], {}),
        ("resnetv2_50x1_bit", TIMM["BiT-R50x1"], {}),
    ],
)
def test_every_npz_of_ours_is_read_by_timm(name: str, config: Architecture, settings: dict, tmp_path: Path) -> None:
    model = made(config)
    arrays = bit.write(model.state_dict()) if isinstance(config, Bit) else npz.write(model.state_dict(), config)  # type: ignore[arg-type]
    (tmp_path / "x.npz").write_bytes(npz.packed(arrays))
    theirs = module_of_timm("timm").create_model(name, **timm.model(config, 7)[1])
    theirs.load_pretrained(str(tmp_path / "x.npz"))
    assert close(logits(model, pictures(config)), logits(theirs, pictures(config)))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (cmt_s, "timm has no CMT"),
        (Bit(factor=2), "there are: resnetv2_50x1_bit, resnetv2_50x3_bit"),
        (replace(HYBRID, trunk=(1, 1)), "there are: vit_tiny_r_s16_p8_224"),
        (replace(SMALL, epsilon=1e-5), "LayerNorms with 1e-6, this one with 1e-05"),
        (Maxvit(window=7, image_size=448), "by windows of 14, not of 7"),
        (Maxvit(depths=(1, 1, 1, 1)), "there are: tiny, small"),
        (Efficientnet(width=3.0), "EfficientNet-B0 to B7"),
    ],
)
def test_every_model_that_timm_lacks_is_refused(config: Architecture, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        timm.model(config, 10)


# --- Hugging Face -----------------------------------------------------------------------------------------------------

HF = {name: VITS[name] for name in ("plain", "erf", "a tanh layer")}


def hugging(config: Vit, folder: Path) -> nn.Module:
    """A model, written to a folder in Hugging Face's layout."""
    model = made(config)
    weights, left = huggingface.write(model.state_dict(), config)
    assert set(left) == ({"head.weight", "head.bias"} if config.representation else set())
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(huggingface.description(config, 7)))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(huggingface.preprocessing(config, [0.5] * 3, [0.5] * 3))
    )
    return model


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, imported as if no test had put hollow modules in torchvision's place."""
    monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if type(one).__module__ != "tests.timm"])
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("config", HF.values(), ids=HF)
def test_every_model_computes_in_transformers_what_it_does_here(config: Vit, tmp_path: Path, transformers: Any) -> None:
    model = hugging(config, tmp_path)
    kind = transformers.ViTModel if config.representation else transformers.ViTForImageClassification
    theirs, said = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        answer = theirs.double().eval()(pictures(config))
    if config.representation:
        assert isinstance(model.head, nn.Linear)
        ours = logits(model, pictures(config))
        assert close(ours, model.head(answer.pooler_output).detach())
    else:
        assert close(logits(model, pictures(config)), answer.logits)
        assert theirs.config.num_labels == 7


@pytest.mark.parametrize("config", HF.values(), ids=HF)
def test_every_model_of_transformers_computes_here_what_it_does_there(
    config: Vit, tmp_path: Path, transformers: Any
) -> None:
    torch.manual_seed(0)
    settings = transformers.ViTConfig(**huggingface.description(config, 7))
    kind = transformers.ViTModel if config.representation else transformers.ViTForImageClassification
    theirs = kind(settings).eval()
    theirs.save_pretrained(tmp_path)
    beside = json.loads((tmp_path / "config.json").read_text())
    found = foreign.read("model.safetensors", (tmp_path / "model.safetensors").read_bytes(), beside)
    assert foreign.architecture(found) == config
    model, _ = loaded(found, classes=0 if config.representation else 7)
    with torch.no_grad():
        answer = theirs.double()(pictures(config))
    assert close(logits(model, pictures(config)), answer.pooler_output if config.representation else answer.logits)


def fifth(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that transformers' fifth release has inside."""
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    made: dict[str, Tensor] = {}
    for name, weight in weights.items():
        name = name.replace("encoder.layer.", "layers.")
        name = re.sub(r"attention\.attention\.(query|key|value)", lambda found: f"attention.{parts[found[1]]}", name)
        name = name.replace("attention.output.dense", "attention.o_proj")
        name = name.replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")
        made[name] = weight
    return made


@pytest.mark.parametrize("names", [unchanged, fifth])
@pytest.mark.parametrize("config", HF.values(), ids=HF)
def test_every_name_of_hugging_face_comes_back(config: Vit, names: Callable, tmp_path: Path) -> None:
    model = hugging(config, tmp_path)
    weights = names(load((tmp_path / "model.safetensors").read_bytes()))
    weights["vit.embeddings.mask_token"] = torch.zeros(1, 1, 32)
    found = foreign.read("x", save(weights), json.loads((tmp_path / "config.json").read_text()))
    kept = {
        name: w for name, w in model.state_dict().items() if not (config.representation and name.startswith("head."))
    }
    assert same(found.weights, kept) and found.left == ("vit.embeddings.mask_token",)
    assert foreign.architecture(found) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pooling": "gap"}, "no pooling gap"),
        ({"registers": 2, "distillation": True}, "no registers 2, no distillation True"),
    ],
)
def test_every_model_that_hugging_face_lacks_is_refused(change: dict, said: str) -> None:
    config = replace(SMALL, **change)
    with pytest.raises(ValueError, match=said):
        huggingface.write(made(config).state_dict(), config)
    with pytest.raises(ValueError, match="no trunk of convolutions"):
        huggingface.write(made(HYBRID).state_dict(), HYBRID)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"model_type": "swin"}, "of type 'swin'; only 'vit' is read"),
        ({"model_type": "vit", "hidden_act": "relu"}, "hidden_act 'relu'; there are: gelu"),
        ({"model_type": "vit", "image_size": [224, 192]}, "only squares are read"),
    ],
)
def test_every_description_of_another_model_is_refused(described: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        huggingface.architecture(described)


# --- ONNX -------------------------------------------------------------------------------------------------------------


WRITTEN = {name: {**VITS, **OTHERS}[name] for name in ("a tanh layer", "query that pools", "a hybrid", *OTHERS)}
"""One of each kind of graph: the others differ in sizes, or in an operation that one of these has, too."""


@pytest.mark.slow
@pytest.mark.parametrize("config", WRITTEN.values(), ids=WRITTEN)
def test_every_model_computes_as_onnx_what_it_does_here_for_any_number_of_pictures(
    config: Architecture, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from pipeline.models.weights.onnx import write

    model = made(config)
    write(model, config.image_size, tmp_path / "x.onnx")
    onnx.checker.check_model(tmp_path / "x.onnx", full_check=True)
    session = runtime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        images = pictures(config, count).float()
        with torch.no_grad():
            ours = model(images)
        (theirs,) = session.run(None, {"images": images.numpy()})
        assert close(ours, torch.from_numpy(theirs), 1e-4)


# --- fitting ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 12), st.booleans())
def test_every_grid_of_positions_is_interpolated_as_by_the_papers_code(before: int, after: int, prefix: bool) -> None:
    config = Vit(width=8, depth=1, heads=1, hidden=8, patch=2, image_size=2 * before, prefix_positions=prefix)
    state = {name: tensor.detach() for name, tensor in made(config).state_dict().items()}
    resized, report = fitted(state, replace(config, image_size=2 * after), 7)
    table = state["pos_embed"][0].numpy()
    own, places = table[:prefix], table[prefix:].reshape(before, before, 8)
    expected = np.asarray(zoom(places, (after / before, after / before, 1), order=1)).reshape(-1, 8)
    found = resized["pos_embed"][0].numpy()
    assert np.array_equal(found[:prefix], own)
    np.testing.assert_allclose(found[prefix:], expected, atol=1e-5)
    changed = ((1, len(table), 8), (1, len(found), 8))
    assert [(one.before, one.after) for one in report.resized] == ([changed] if before != after else [])


@pytest.mark.parametrize("name", ["CMT", "MaxViT"])
def test_every_table_of_biases_follows_the_size_of_the_pictures(name: str) -> None:
    config = OTHERS[name]
    larger = at_size(config, 2 * config.image_size)
    model, grown = made(config), build(larger, 7)
    report = take(grown, model.state_dict(), larger)
    assert report.resized and not report.left and not report.missing
    if isinstance(config, Cmt):  # which interpolates by itself
        images = pictures(larger)
        assert close(logits(grown, images), logits(model, images))


def test_every_architecture_is_made_for_another_size_or_says_which_do() -> None:
    assert at_size(Maxvit(), 384) == replace(Maxvit(), window=12, image_size=384)
    assert at_size(SMALL, 40) == replace(SMALL, image_size=40)
    with pytest.raises(ValueError, match="672"):
        at_size(Maxvit(), 680)
    with pytest.raises(ValueError, match="192 or 224"):
        at_size(cmt_s, 200)


HEADS: list[tuple[int, Head, bool]] = [(7, "if it fits", True), (5, "if it fits", False), (7, "fresh", False)]


@pytest.mark.parametrize(("classes", "head", "kept"), HEADS)
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, distillation=True), *OTHERS.values()], ids=str)
def test_every_head_is_taken_where_it_fits_and_else_zeros(config: Any, classes: int, head: Head, kept: bool) -> None:
    state = made(config).state_dict()
    heads = {name for name in state if re.fullmatch(r"(head|head_dist|head\.fc|classifier)\.(weight|bias)", name)}
    assert len(heads) == (4 if getattr(config, "distillation", False) else 2)
    found, report = fitted(state, config, classes, head=head)
    for name in state:
        if name in heads and not kept:
            assert not found[name].any() and len(found[name]) == classes
        else:
            assert torch.equal(found[name], state[name])
    assert set(report.left) == set(report.missing) == (set() if kept else heads)
    assert set(report.taken) | set(report.left) == set(state)
    said = "\n".join(report.lines())
    assert ("zeros, since the file has none that fit" in said) != kept
    build(config, classes).load_state_dict(found)


def test_a_head_on_a_tanh_layer_is_not_taken_without_it() -> None:
    state = made(VITS["a tanh layer"]).state_dict()
    found, report = fitted(state, SMALL, 7)
    assert not found["head.weight"].any()
    assert set(report.left) == {"head.weight", "head.bias", "pre_logits.weight", "pre_logits.bias"}
    with pytest.raises(ValueError, match="stands on a tanh layer that the model does not have"):
        fitted(state, SMALL, 7, head="taken")


def test_a_class_token_is_left_where_the_model_has_none() -> None:
    _, report = fitted(made(SMALL).state_dict(), VITS["mean of patches"], 7)
    assert set(report.left) == {"cls_token", "the class token's position"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s | {"blocks.0.ls1.gamma": torch.ones(32)}, "unknown to the model: blocks.0.ls1.gamma"),
        (lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, "lacking: norm.bias"),
        (lambda s: s | {"norm.bias": torch.ones(31)}, "of another shape: norm.bias 31, not 32"),
        (lambda s: s | {"pos_embed": torch.ones(1, 20, 32)}, "pos_embed has 20 positions"),
        (
            lambda s: s | {"pos_embed": torch.ones(1, 17, 31)},
            "of another shape: pos_embed 1 x 17 x 31, not 1 x 17 x 32",
        ),
    ],
)
def test_every_misfit_is_named(change: Callable, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fitted(change(made(SMALL).state_dict()), SMALL, 7)


def test_a_head_of_other_classes_is_refused_where_it_was_asked_for() -> None:
    with pytest.raises(ValueError, match="it has 7 classes, the model 5"):
        fitted(made(SMALL).state_dict(), SMALL, 5, head="taken")
    with pytest.raises(ValueError, match="there is none in the file"):
        fitted(made(SMALL, classes=0).state_dict(), SMALL, 5, head="taken")


# --- files ------------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("way", ["torch", "older torch", "pickle", "npz"])
def test_no_code_in_a_file_is_run(way: str, tmp_path: Path) -> None:
    bomb, file = {"model": Bomb(tmp_path / "gone off")}, io.BytesIO()
    match way:
        case "torch":
            torch.save(bomb, file)
        case "older torch":
            torch.save(bomb, file, _use_new_zipfile_serialization=False)
        case "pickle":
            file.write(pickle.dumps(bomb))
        case "npz":
            np.savez(file, np.array(bomb, dtype=object))
    with pytest.raises(ValueError, match=r"bomb\.pth is refused") as error:
        files.tensors("bomb.pth", file.getvalue())
    assert not (tmp_path / "gone off").exists()
    assert way == "npz" or re.search(r"would run code \((posix|os)\.system\)", str(error.value))


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


WRONG = {
    "empty": (b"", "is empty"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "one array": (npy(), "a single array"),
    "text": (b"not weights" * 9, "of an unknown kind; what can be read is .npz"),
    "cut off": (save({"x": torch.zeros(100)})[:-7], "is damaged"),
    "no weights": (written_by("a state_dict", {}), "holds no state_dict"),
}


@pytest.mark.parametrize(("data", "said"), WRONG.values(), ids=WRONG)
def test_every_file_of_another_kind_is_refused_with_what_it_is(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=f"^x .*{said}"):
        files.tensors("x", data)


@given(st.integers(0, 400), st.sampled_from(["safetensors", "a state_dict", "an older format", "npz"]))
def test_every_file_that_was_cut_off_is_a_line_of_error(cut: int, way: str) -> None:
    weights = {"a": torch.arange(30.0), "b": torch.ones(2, 3)}
    data = npz.packed({k: v.numpy() for k, v in weights.items()}) if way == "npz" else written_by(way, weights)
    with pytest.raises(ValueError, match=r"^x "):
        files.tensors("x", data[: max(0, len(data) - 1 - cut)])


def test_what_a_file_does_not_tell_is_asked_for() -> None:
    found = foreign.read("x", save({k: v.contiguous() for k, v in made(SMALL).state_dict().items()}))
    with pytest.raises(ValueError, match="how many heads a width of 32 has: name the model"):
        foreign.architecture(found)
    hugged = foreign.read("x", save(huggingface.write(made(SMALL).state_dict(), SMALL)[0]))
    with pytest.raises(ValueError, match=r"by a config\.json, which is not beside them"):
        foreign.architecture(hugged)


def test_every_unknown_layout_is_refused_with_its_names() -> None:
    found = foreign.read("x", save({"layers.0.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"names in the file \(layers\.0\.weight"):
        foreign.architecture(found)


# --- the command ------------------------------------------------------------------------------------------------------


def export(*words: object) -> str:
    """What the command prints, run in this process."""
    found = spec_from_file_location("export_command", EXPORT)
    assert found and found.loader
    command = module_from_spec(found)
    found.loader.exec_module(command)
    with redirect_stdout(io.StringIO()) as printed:
        command.main([str(word) for word in words])
    return printed.getvalue()


def put(folder: Path, config: Architecture) -> dict[str, Tensor]:
    """A run's folder with an export of a model in it."""
    state = made(config).state_dict()
    place = Folder(str(folder)) / "export"
    exported.put(place, state, config, 7, mean=[0.5] * 3, std=[0.5] * 3, source={})
    return state


SENT = {"npz": "x.npz", "hf": "hf", "timm": "timm"}


@pytest.mark.parametrize(("form", "to"), SENT.items())
def test_what_the_command_sends_it_fetches_as_it_was(form: str, to: str, tmp_path: Path) -> None:
    state = put(tmp_path / "run", config := SMALL)
    said = export(tmp_path / "run", "--to", tmp_path / to, "--format", form)
    file = tmp_path / to if form == "npz" else tmp_path / to / "model.safetensors"
    assert f"written: {file}" in said
    assert "taken: 32 tensors" in export("--from", file, "--to", tmp_path / "back")
    found = exported.find(str(tmp_path / "back"))
    assert same(found.weights(), state) and found.config == config and found.classes == 7
    assert found.about["mean"] == found.about["std"] == [0.5, 0.5, 0.5]
    assert found.about["source"]["digest"] == sha256(file.read_bytes()).hexdigest()


def test_what_the_command_fetches_is_for_the_size_and_the_classes_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(npz.packed(npz.write(made(SMALL).state_dict(), SMALL)))
    said = export("--from", tmp_path / "x.npz", "--size", 40, "--classes", 3, "--to", tmp_path / "to")
    assert "resized: pos_embed from 1 x 17 x 32 to 1 x 65 x 32" in said
    assert "left: head.weight, head.bias" in said and "zeros" in said
    found = exported.find(str(tmp_path / "to"))
    assert (found.config.image_size, found.classes) == (40, 3)
    build(found.config, 3).load_state_dict(found.weights())


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("--to", "x"), "export takes a run's folder first, or --from and a file"),
    (("nowhere", "--to", "x", "--format", "npz"), "holds no export/model.json"),
    (("--from", "nowhere.npz", "--to", "x"), "nowhere.npz does not exist"),
    (
        ("--from", "run/export/model.safetensors", "--to", "x", "--model", "vit_b17"),
        "no model 'vit_b17'; there are: vit_",
    ),
    (("run", "--to", "x", "--format", "hf"), "Hugging Face's ViT has no trunk of convolutions"),
    (("run", "--to", "x", "--format", "tf"), "tf"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_every_mistake_of_the_command_is_named_and_writes_nothing(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "run", HYBRID)
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        export(*words)
    assert not (tmp_path / "x").exists()


def test_every_mistake_of_the_command_is_a_line(tmp_path: Path) -> None:
    done = run_job("export.py", tmp_path, "--to", "x", "--format", "npz")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "holds no export" in done.stderr


def test_every_damaged_export_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "run", SMALL)
    file = tmp_path / "run" / "export" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="is damaged: its digest is not the recorded one"):
        exported.find(str(tmp_path / "run")).weights()
