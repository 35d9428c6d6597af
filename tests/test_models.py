"""What a model is, costs and minimises: exact counts, the paper's initialisation, formulas written out by hand."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline import seed
from pipeline.architectures.vit import Vit, vit_b16, vit_h14, vit_l16
from pipeline.config import Optim
from pipeline.models import flops
from pipeline.models.vit import Attention, VisionTransformer, initialise
from pipeline.objectives.classify import HEAD_BIAS, correct, loss, multi_hot
from pipeline.optim.schedule import learning_rate

SMALL = Vit(width=32, depth=2, heads=4, hidden=48, patch=5, image_size=23)  # three pixels are left over
CONFIGS = {
    "b16": (vit_b16, 1000),
    "l16": (vit_l16, 1000),
    "h14": (vit_h14, 1000),
    "b16 of ImageNet-21k": (replace(vit_b16, representation=True), 21_841),
    "small": (SMALL, 7),
    "small with a tanh layer": (replace(SMALL, representation=True), 7),
    "headless": (SMALL, 0),
}
every_config = pytest.mark.parametrize(("config", "classes"), CONFIGS.values(), ids=CONFIGS)


def built(config: Vit = SMALL, classes: int = 7, *, words: object = 0, head_bias: float = 0.0) -> VisionTransformer:
    model = VisionTransformer(config, classes)
    initialise(model, torch.Generator().manual_seed(seed.number(words)), head_bias=head_bias)
    return model


def images(count: int, config: Vit = SMALL) -> Tensor:
    return torch.randn(count, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))


# --- counts ---------------------------------------------------------------------------------------------------------


@every_config
def test_every_parameter_is_counted(config: Vit, classes: int) -> None:
    with torch.device("meta"):
        model = VisionTransformer(config, classes)
    assert sum(p.numel() for p in model.parameters()) == flops.parameters(config, classes)


@pytest.mark.parametrize(("config", "count"), [(vit_b16, 86_567_656), (vit_l16, 304_326_632), (vit_h14, 632_045_800)])
def test_every_model_of_the_paper_has_the_published_number_of_parameters(config: Vit, count: int) -> None:
    assert flops.parameters(config, 1000) == count


@every_config
def test_every_multiplication_that_torch_counts_is_counted(config: Vit, classes: int) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        VisionTransformer(config, classes).eval()(torch.empty(2, 3, config.image_size, config.image_size))
    assert 2 * 2 * flops.macs(config, classes) == pytest.approx(counter.get_total_flops(), rel=0.005)


# --- initialisation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_weight_begins_as_in_the_code_of_the_paper() -> None:
    config = Vit(width=128, depth=2, heads=4, hidden=256, patch=8, image_size=64, representation=True)
    model = built(config, 10, head_bias=HEAD_BIAS)
    assert model.head and not model.head.weight.any() and (model.head.bias == -10).all()
    assert float(model.pos_embed.std()) == pytest.approx(0.02, rel=0.05) and not model.cls_token.any()
    for layer, fan_in in ((model.patch_embed.proj, 3 * 8 * 8), (model.pre_logits, 128)):
        assert layer and float(layer.weight.std()) == pytest.approx(fan_in**-0.5, rel=0.03)
        assert float(layer.weight.abs().max()) <= 2 / 0.879 * fan_in**-0.5
        assert not layer.bias.any()
    for block in model.blocks:
        bounds = {
            block.attn.qkv: math.sqrt(3 / 128),  # each of the three is a square matrix of its own
            block.attn.proj: math.sqrt(3 / 128),
            block.mlp.fc1: math.sqrt(6 / (128 + 256)),
            block.mlp.fc2: math.sqrt(6 / (128 + 256)),
        }
        for layer, bound in bounds.items():
            furthest = float(layer.weight.abs().max())
            assert 0.99 * bound < furthest <= bound
            assert float(layer.weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert not block.attn.qkv.bias.any() and not block.attn.proj.bias.any()
        for layer in (block.mlp.fc1, block.mlp.fc2):
            assert float(layer.bias.std()) == pytest.approx(1e-6, rel=0.3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == name.endswith("weight")).all()


def test_every_weight_follows_from_the_generator_alone() -> None:
    torch.manual_seed(1)
    first = built(words="one").state_dict()
    torch.manual_seed(2)
    again, other = built(words="one").state_dict(), built(words="other").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if not torch.equal(first[name], other[name])]
    assert len(drawn) == 1 + 1 + SMALL.depth * 6  # patches, positions, four matrices and two biases a block


def test_every_new_model_gives_every_class_its_head_bias() -> None:
    assert torch.equal(built(head_bias=HEAD_BIAS)(images(3)), torch.full((3, 7), HEAD_BIAS))


# --- forward pass ---------------------------------------------------------------------------------------------------


def test_attention_is_as_if_written_out() -> None:
    attention = built().blocks[0].attn
    assert isinstance(attention, Attention)
    x = torch.randn(2, 17, SMALL.width, generator=torch.Generator().manual_seed(3))
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    each = SMALL.width // SMALL.heads
    heads = []
    for head in range(SMALL.heads):
        mine = slice(head * each, (head + 1) * each)
        shares = torch.softmax(q[..., mine] @ k[..., mine].mT / math.sqrt(each), dim=-1)
        heads.append(shares @ v[..., mine])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)), atol=1e-6, rtol=1e-6)


def headed(config: Vit) -> VisionTransformer:
    """With a head that lets through what is below it."""
    model = built(config)
    assert model.head
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(4))
    return model


@pytest.mark.parametrize("representation", [False, True])
def test_every_picture_of_a_batch_is_as_if_alone(representation: bool) -> None:
    model, many = headed(replace(SMALL, representation=representation)).eval(), images(5)
    together = model(many)
    for row, picture in zip(together, many, strict=True):
        torch.testing.assert_close(model(picture[None])[0], row, atol=1e-5, rtol=1e-5)
    assert float((together - together[0])[1:].abs().min(1).values.max()) > 1e-3


def test_every_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    model, plain = headed(replace(SMALL, dropout=0.3)), headed(SMALL)
    plain.load_state_dict(model.state_dict())
    many = images(4)
    assert torch.equal(model.eval()(many), plain.eval()(many))
    model.train()
    assert not torch.equal(model(many), model(many))
    torch.manual_seed(5)
    first = model(many)
    torch.manual_seed(5)
    assert torch.equal(model(many), first)


def test_every_pixel_of_a_whole_patch_counts_and_no_other() -> None:
    model = headed(SMALL).eval()
    pictures = images(1).requires_grad_()
    model(pictures).sum().backward()
    side = SMALL.grid * SMALL.patch
    assert pictures.grad is not None and pictures.grad[:, :, :side, :side].all()
    assert not pictures.grad[:, :, side:].any() and not pictures.grad[:, :, :, side:].any()


# --- objectives -----------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[2.0, -1.0, 0.5, -12.0], [0.0, 3.0, -2.0, 1.0], [-3.0, 0.1, 0.2, 0.3]])
SINGLE, SEVERAL = torch.tensor([[0], [3], [2]]), torch.tensor([[0, 2], [3, -1], [1, 2]])


def sigmoid_by_hand(logits: Tensor, labels: Tensor, smoothing: float) -> float:
    total = 0.0
    for row, mine in zip(logits.tolist(), labels.tolist(), strict=True):
        for c, z in enumerate(row):
            target = 1 - smoothing if c in mine else smoothing
            total += -target * math.log(1 / (1 + math.exp(-z))) - (1 - target) * math.log(1 / (1 + math.exp(z)))
    return total / len(logits)


def softmax_by_hand(logits: Tensor, labels: Tensor, smoothing: float) -> float:
    total = 0.0
    for row, mine in zip(logits.tolist(), labels.tolist(), strict=True):
        there = {c for c in mine if c >= 0}
        normaliser = math.log(sum(math.exp(z) for z in row))
        for c, z in enumerate(row):
            target = (1 - smoothing) * (c in there) / len(there) + smoothing / len(row)
            total -= target * (z - normaliser)
    return total / len(logits)


@pytest.mark.parametrize("labels", [SINGLE, SEVERAL], ids=["one label", "several labels"])
@pytest.mark.parametrize("smoothing", [0.0, 1e-4, 0.1])
def test_every_loss_is_as_if_summed_by_hand(labels: Tensor, smoothing: float) -> None:
    for objective, formula in (("sigmoid", sigmoid_by_hand), ("softmax", softmax_by_hand)):
        expected = formula(LOGITS, labels, smoothing)
        assert float(loss(LOGITS, labels, objective, smoothing)) == pytest.approx(expected, rel=1e-5)


def test_a_label_alone_is_as_if_it_were_one_of_several() -> None:
    padded = torch.cat([SINGLE, torch.full_like(SINGLE, -1)], dim=1)
    for objective in ("sigmoid", "softmax"):
        torch.testing.assert_close(loss(LOGITS, SINGLE, objective, 0.1), loss(LOGITS, padded, objective, 0.1))


def test_every_loss_of_half_precision_is_that_of_full_precision() -> None:
    half = LOGITS.bfloat16()
    for objective in ("sigmoid", "softmax"):
        assert loss(half, SEVERAL, objective, 0.1) == loss(half.float(), SEVERAL, objective, 0.1)


def test_every_label_that_is_there_is_hot_and_counts_as_right() -> None:
    assert multi_hot(SEVERAL, 4).tolist() == [[1, 0, 1, 0], [0, 0, 0, 1], [0, 1, 1, 0]]
    assert correct(LOGITS, SINGLE).tolist() == [True, False, False]
    assert correct(LOGITS, torch.tensor([[2, 0], [3, -1], [3, 1]])).tolist() == [True, False, True]


# --- learning rate --------------------------------------------------------------------------------------------------


def test_every_schedule_rises_from_nothing_to_its_peak_and_ends_where_it_says() -> None:
    optim = Optim(lr=0.3, warmup=10, end_lr=0.01)
    assert [learning_rate(optim, step, 100) for step in (0, 5, 10)] == pytest.approx([0, 0.15, 0.3])
    assert learning_rate(optim, 55, 100) == pytest.approx((0.3 + 0.01) / 2)
    assert learning_rate(optim, 100, 100) == pytest.approx(0.01)
    cosine = replace(optim, decay="cosine")
    assert learning_rate(cosine, 55, 100) == pytest.approx((0.3 + 0.01) / 2)
    assert learning_rate(cosine, 100, 100) == pytest.approx(0.01)
    assert learning_rate(replace(cosine, end_lr=0.0), 40, 100) == pytest.approx(0.3 * 0.75)
    constant = replace(optim, decay="constant", warmup=0)
    assert {learning_rate(constant, step, 100) for step in range(101)} == {0.3}


optims = st.builds(
    Optim,
    lr=st.floats(1e-6, 10),
    warmup=st.integers(0, 50),
    decay=st.sampled_from(["linear", "cosine", "constant"]),
    end_lr=st.floats(0, 1e-6),
)


@given(optims, st.integers(1, 200))
def test_no_rate_exceeds_the_peak_or_falls_below_nothing_whatever_the_schedule(optim: Optim, steps: int) -> None:
    rates = [learning_rate(optim, step, steps) for step in range(steps + 1)]
    assert all(0 <= rate <= optim.lr * (1 + 1e-12) for rate in rates)
    after = rates[optim.warmup :]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(after))


# --- chance ---------------------------------------------------------------------------------------------------------

words = st.lists(
    st.one_of(st.integers(), st.text(st.characters(codec="utf-8", exclude_characters="\x1f"))), min_size=1, max_size=4
)


@given(words, words)
def test_the_same_words_give_the_same_number_and_others_another(ours: list, theirs: list) -> None:
    assert seed.number(*ours) == seed.number(*ours)
    same = [str(word) for word in ours] == [str(word) for word in theirs]
    assert (seed.number(*ours) == seed.number(*theirs)) == same
    assert 0 <= seed.number(*ours) < 2**63


@given(words)
def test_every_order_of_the_words_gives_another_number(ours: list) -> None:
    turned = ours[1:] + ours[:1]
    same = [str(word) for word in turned] == [str(word) for word in ours]
    assert (seed.number(*turned) == seed.number(*ours)) == same


def test_every_release_draws_what_the_first_one_drew() -> None:
    assert seed.number("crop", 0, 1) == 8_525_908_652_782_683_849
    assert seed.permutation(8, "window", 0).tolist() == [0, 1, 6, 7, 3, 2, 5, 4]


@given(st.integers(0, 2**63 - 1))
def test_every_uniform_number_is_below_one_and_they_spread_evenly(key: int) -> None:
    drawn = seed.uniform(key, range(4000))
    assert ((drawn >= 0) & (drawn < 1)).all() and len(set(drawn.tolist())) == 4000
    assert abs(drawn.mean() - 1 / 2) < 6 * math.sqrt(1 / 12 / 4000)
    assert abs(((drawn - drawn.mean()) ** 2).mean() - 1 / 12) < 6 * math.sqrt(1 / 180 / 4000)


@given(st.integers(1, 500), words)
def test_every_permutation_holds_every_number_once(count: int, ours: list) -> None:
    found = seed.permutation(count, *ours)
    assert sorted(found.tolist()) == list(range(count))
    assert (found == seed.permutation(count, *ours)).all()
