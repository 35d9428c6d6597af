"""What is minimised beside the class: losses of patches, a teacher's word, hidden patches; formulas written out."""

import math
from dataclasses import replace
from itertools import product
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from pipeline.config import Augment, Config, Distillation, Suppression
from pipeline.data import mix
from pipeline.insight.smoothing import similarities, spreads
from pipeline.objectives import classify, distill, masked, patches
from pipeline.objectives.masked import Corruption, MaskedPatches, mean_colours
from pipeline.objectives.patches import (
    DIVERSE_VIT,
    FIRST_VERSION,
    RELEASED,
    THIRD_VERSION,
    PatchHead,
    Tokens,
    aligned,
    contrastive_loss,
    cosine_loss,
    initialise,
    mixing_loss,
    own_shares,
    patch_targets,
    similarity,
)

pytestmark = pytest.mark.timeout(300)

PUBLISHED = {
    "arXiv v1": FIRST_VERSION, "arXiv v3": THIRD_VERSION, "released": RELEASED, "Diverse-ViT": DIVERSE_VIT,
}  # fmt: skip
every_variant = pytest.mark.parametrize("choices", PUBLISHED.values(), ids=PUBLISHED)
CLASSES = 5
words = some.integers(0, 2**31)
sizes = some.integers(2, 6)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(batch: int = 4, grid: tuple[int, int] = (3, 4), width: int = 6, *, seed: int = 0) -> Tokens:
    first, last = numbers(2, batch, grid[0] * grid[1], width, seed=seed)
    return Tokens(first.requires_grad_(), last.clone().requires_grad_(), grid)


def labels(count: int) -> Tensor:
    return torch.arange(count)[:, None] * 3 % CLASSES


def value(tensor: Tensor) -> float:
    return float(tensor.detach())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def mixing_of(seed: int, pairs: int, side: int, *, mixup: float = 1.0) -> mix.Mixing:
    count = 2 * pairs
    draws = mix.draw(
        Augment(mixup=mixup, cutmix=1.0), np.arange(count), np.zeros(count, np.int64), seed=seed, side=side
    )
    assert draws is not None and draws.mixing is not None
    return draws.mixing


# --- cosine ---------------------------------------------------------------------------------------------------------


@given(some.integers(1, 3), sizes, some.integers(1, 5), some.booleans(), some.booleans(), words)
@settings(deadline=None, max_examples=60)
def test_every_similarity_is_the_mean_over_all_pairs_of_patches(
    batch: int, count: int, width: int, signed: bool, diagonal: bool, seed: int
) -> None:
    layer = numbers(batch, count, width, seed=seed)
    for picture, found in zip(layer, similarity(layer, signed=signed, diagonal=diagonal), strict=True):
        pairs = [cosine(picture[i], picture[j]) for i, j in product(range(count), repeat=2) if diagonal or i != j]
        assert value(found) == pytest.approx(np.mean(pairs if signed else np.abs(pairs)), abs=1e-12)


def test_every_layer_has_the_similarity_that_is_worked_out_by_hand() -> None:
    right, left, up, slant = [2.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [1.0, 1.0]
    layers = [torch.tensor([[slant, right, up, left]]), torch.tensor([[left, right, slant, up]])]
    # Without the first token: cosines 0, -1, 0, and then 1/sqrt(2), 0, 1/sqrt(2).
    expected = [[-1 / 3], [math.sqrt(2) / 3]]
    assert similarities(layers, signed=True, prefix=1).tolist() == pytest.approx(np.array(expected))
    assert similarities(layers, signed=False, prefix=1).tolist() == pytest.approx(np.abs(expected))


def test_every_layer_of_a_pyramid_is_compared_within_itself() -> None:
    layers = [numbers(2, 16, 3), numbers(2, 4, 7, seed=1)]
    found = similarities(iter(layers), signed=False)
    assert found.shape == (2, 2) and torch.equal(found[1], similarity(layers[1], signed=False))


@pytest.mark.parametrize("signed", [True, False])
def test_equal_patches_are_wholly_alike_and_orthogonal_ones_not_at_all_whatever_their_length(signed: bool) -> None:
    length = torch.tensor([[1.0], [20.0], [0.3]])
    assert similarity((torch.ones(3) * length)[None], signed=signed).tolist() == pytest.approx([1.0])
    assert similarity((torch.eye(3) * length)[None], signed=signed).tolist() == pytest.approx([0.0])


def test_every_difference_that_bf16_keeps_counts_in_full() -> None:
    coarse = (1 + numbers(1, 50, 8) / 100).bfloat16()
    expected = similarity(coarse.float(), signed=False)
    assert torch.equal(similarity(coarse, signed=False), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity(coarse, signed=False), expected)


def test_every_patch_that_attends_evenly_is_smooth_and_prefix_tokens_do_not_matter() -> None:
    even, sharp = torch.full((1, 2, 4, 4), 0.25), torch.eye(4).expand(1, 2, 4, 4).clone()
    sharp[:, :, 0], sharp[:, :, :, 0] = 0.7, 0.1
    deviation = math.sqrt(1 / 3 - 1 / 9)  # of one 1 and two 0
    assert spreads([even, sharp], prefix=1).tolist() == pytest.approx(np.array([[0.0], [deviation]]))
    assert spreads([even])[0].tolist() == pytest.approx([0.0])


# --- contrast -------------------------------------------------------------------------------------------------------


def loop_of_contrast(choices: Suppression, seen: Tokens) -> float:
    """Picture by picture and patch by patch."""
    (rows, columns), total = seen.grid, 0.0
    count = rows * columns
    for first, last in zip(seen.first.detach(), seen.last.detach(), strict=True):
        if choices.normalised:
            first, last = (torch.stack([v / math.sqrt(v @ v) for v in layer]) for layer in (first, last))
        for i in range(count):
            others = [last[j] for j in range(count) if choices.negative == "all" or j != i]
            rivals = [sum(others) / len(others)]
            if choices.negative == "neighbourhood":
                near = [
                    last[j]
                    for j in range(count)
                    if j != i and abs(j // columns - i // columns) <= 3 and abs(j % columns - i % columns) <= 3
                ]
                rivals.append(sum(near) / 48)
            own = math.exp(first[i] @ last[i])
            total -= math.log(own / (own + sum(math.exp(first[i] @ rival) for rival in rivals)))
    return total / len(seen.first) / count


@pytest.mark.parametrize("negative", ["others", "all", "neighbourhood"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("grid", [(1, 2), (3, 4), (9, 5)])
def test_every_contrastive_loss_equals_a_loop_over_patches(
    negative: str, normalised: bool, grid: tuple[int, int]
) -> None:
    choices, seen = Suppression(negative=negative, normalised=normalised), tokens(2, grid, 3)
    assert value(contrastive_loss(choices, seen)) == pytest.approx(loop_of_contrast(choices, seen), rel=1e-9)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("negative", ["others", "all", "neighbourhood"])
def test_the_first_layer_learns_from_contrast_as_if_it_were_fixed_where_it_is_detached(
    detached: bool, negative: str
) -> None:
    seen = tokens()
    contrastive_loss(Suppression(detached=detached, negative=negative), seen).backward()
    assert seen.last.grad is not None and seen.last.grad.abs().sum((1, 2)).min() > 0
    assert detached == (seen.first.grad is None)
    free = tokens()
    contrastive_loss(Suppression(detached=False, negative=negative), free).backward()
    assert torch.equal(seen.last.grad, free.last.grad)  # type: ignore[arg-type]


def test_every_pair_of_layers_of_another_shape_is_refused_with_the_way_out() -> None:
    seen = Tokens(numbers(2, 16, 3), numbers(2, 4, 6), (2, 2))
    with pytest.raises(ValueError, match=r"16 x 3 and 4 x 6 .* coefficient to 0"):
        contrastive_loss(Suppression(), seen)
    zero = torch.zeros(())
    without = patches.loss(Suppression(contrastive=0.0, mixing=0.0), zero, seen, None)
    assert value(without) == pytest.approx(value(similarity(seen.last, signed=False).mean()))


# --- mixing ---------------------------------------------------------------------------------------------------------


@given(words, some.integers(1, 3), some.integers(1, 7), some.integers(1, 4), some.integers(0, 6))
@settings(deadline=None, max_examples=60)
def test_every_patch_is_the_pictures_own_as_far_as_its_pixels_are(
    seed: int, pairs: int, patch: int, places: int, left_over: int
) -> None:
    side = patch * places + left_over % patch
    mixing = mixing_of(seed, pairs, side)
    white_and_black = torch.tensor([1.0, 0.0]).repeat(pairs)[:, None, None, None].expand(-1, 3, side, side)
    seen = mix.applied(white_and_black, mix.Draws(mixing, None))[:, 0, : patch * places, : patch * places]
    share = seen.unflatten(2, (places, patch)).unflatten(1, (places, patch)).mean((2, 4)).flatten(1)  # of the white
    found = own_shares(mixing.weight, mixing.box, (places, places), patch)
    assert torch.allclose(found[::2], share[::2], atol=1e-6)
    assert torch.allclose(found[1::2], 1 - share[1::2], atol=1e-6)


@given(words, some.integers(1, 3), some.integers(1, 6), some.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_all_patches_together_show_what_the_picture_shows_whatever_is_mixed(
    seed: int, pairs: int, patch: int, places: int
) -> None:
    mixing, named = mixing_of(seed, pairs, patch * places), labels(2 * pairs)
    own = own_shares(mixing.weight, mixing.box, (places, places), patch)
    whole = own_shares(mixing.weight, mixing.box, (1, 1), patch * places)
    assert torch.allclose(whole[:, 0], mixing.share.repeat_interleave(2), atol=1e-6)
    expected = mix.targets(named, mix.Draws(mixing, None), CLASSES)
    assert torch.allclose(patch_targets(named, own, CLASSES).mean(1), expected, atol=1e-6)


def test_every_place_of_a_grid_that_is_not_square_is_covered_by_its_own_rows_and_columns() -> None:
    box = torch.tensor([[1, 4, 2, 3]])  # rows 1 to 3, column 2
    own = own_shares(torch.ones(1), box, (3, 2), 2)
    assert own[0].tolist() == own[1].tolist() == [1.0, 0.75, 1.0, 0.5, 1.0, 1.0]


@given(words, some.integers(1, 3), some.integers(1, 7), some.integers(1, 5), some.integers(0, 6))
@settings(deadline=None, max_examples=60)
def test_every_aligned_box_gives_each_patch_to_one_picture_and_lies_near_the_drawn_one(
    seed: int, pairs: int, patch: int, places: int, left_over: int
) -> None:
    side = patch * places + left_over % patch
    mixing, grid = mixing_of(seed, pairs, side, mixup=0.0), (places, places)
    box = aligned(mixing.box, grid, patch)
    own = own_shares(mixing.weight, box, grid, patch)
    assert set(own.unique().tolist()) <= {0.0, 1.0}
    assert (box - mixing.box.clamp(max=patch * places)).abs().max() <= patch / 2
    assert torch.equal(box, aligned(box, grid, patch))


def test_every_edge_goes_to_the_nearest_edge_of_a_patch_within_the_grid() -> None:
    box = torch.tensor([[1, 10, 2, 12], [7, 8, 0, 14]])
    assert aligned(box, (3, 2), 4).tolist() == [[0, 12, 4, 8], [8, 8, 0, 8]]


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.0, 0.5]])
def test_every_mixing_loss_equals_a_loop_over_patches(weights: list[float] | None) -> None:
    head, seen = PatchHead(6, CLASSES).double(), tokens()
    own, named = torch.rand(4, 12, generator=torch.Generator().manual_seed(5)), labels(4)
    weighed = None if weights is None else torch.tensor(weights)
    compared = patches.mixed(Suppression(), seen.last, named, own, head, CLASSES)
    total = 0.0
    for b, i in product(range(4), range(12)):
        logits = (head.weight @ seen.last[b, i] + head.bias).tolist()
        log_sum = math.log(sum(map(math.exp, logits)))
        mine, theirs = (log_sum - logits[int(named[k, 0])] for k in (b, b ^ 1))
        share = float(own[b, i])
        total += (share * mine + (1 - share) * theirs) * (1 if weights is None else weights[b])
    found = mixing_loss(compared, "softmax", 0.0, weighed)
    assert value(found) == pytest.approx(total / 48, rel=1e-5)


def test_every_region_is_classified_by_its_mean_patch_and_weighed_by_its_area() -> None:
    head, seen, named = PatchHead(6, CLASSES).double(), tokens(2), labels(2)
    inside = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 0]).bool()
    own = (~inside).double().expand(2, -1)
    total = 0.0
    for b, region in product(range(2), (inside, ~inside)):
        logits = head(seen.last[b, region].mean(0))
        whose = b ^ 1 if region is inside else b
        total -= value(region.double().mean() * log_softmax(logits, 0)[named[whose, 0]])
    compared = patches.mixed(RELEASED, seen.last, named, own, head, CLASSES)
    assert value(mixing_loss(compared, "softmax", 0.0)) == pytest.approx(total / 2, rel=1e-6)


def test_a_region_without_patches_is_as_if_it_were_not_there() -> None:
    head, seen, named = PatchHead(6, CLASSES).double(), tokens(2), labels(2)
    compared = patches.mixed(RELEASED, seen.last, named, torch.ones(2, 12).double(), head, CLASSES)
    found = mixing_loss(compared, "softmax", 0.0)
    found.backward()
    expected = classify.loss(head(seen.last.mean(1)), named, "softmax", 0.0)
    assert value(found) == pytest.approx(value(expected)) and seen.last.grad is not None
    assert seen.last.grad.isfinite().all()


@pytest.mark.parametrize("objective", ["sigmoid", "softmax"])
def test_every_picture_that_is_not_mixed_teaches_its_patches_its_own_labels_by_whatever_objective(
    objective: Literal["sigmoid", "softmax"],
) -> None:
    logits = numbers(2, 3, CLASSES)
    named = torch.tensor([[1, 3], [2, -1]])
    compared = patches.Mixed(logits, patch_targets(named, torch.ones(2, 3), CLASSES), torch.full((2, 3), 1 / 3))
    expected = classify.loss(logits.flatten(0, 1), named.repeat_interleave(3, 0), objective, 0.1)
    assert value(mixing_loss(compared, objective, 0.1)) == pytest.approx(value(expected), rel=1e-6)


def test_every_own_head_begins_small_and_alike_for_the_same_words_and_drops_only_in_training() -> None:
    heads = [PatchHead(64, 50, 0.5) for _ in range(2)]
    for head in heads:
        initialise(head, torch.Generator().manual_seed(3))
    assert torch.equal(heads[0].weight, heads[1].weight) and not heads[0].bias.any()
    assert value(heads[0].weight.std()) == pytest.approx(0.02, rel=0.05)
    inputs = torch.ones(1, 2, 64)
    assert not torch.equal(heads[0](inputs)[:, 0], heads[0](inputs)[:, 1])
    assert torch.equal(heads[0].eval()(inputs)[:, 0], heads[0](inputs)[:, 1])
    assert heads[0].undecayed() < dict(heads[0].named_parameters()).keys()


# --- all of them ----------------------------------------------------------------------------------------------------


def total_of(choices: Suppression, seen: Tokens, weights: Tensor | None = None, *, head: nn.Module) -> Tensor:
    count, places = seen.last.shape[:2]
    own = (torch.arange(places) % 3 / 2).expand(count, -1)
    named = labels(count)
    mixed = patches.mixed(choices, seen.last, named, own, head, CLASSES)
    classified = classify.loss(head(seen.last.mean(1)), named, "softmax", 0.0, weights)
    return patches.loss(choices, classified, seen, mixing_loss(mixed, "softmax", 0.0, weights), weights)


@every_variant
def test_every_loss_is_added_with_its_coefficient_and_read_as_chosen(choices: Suppression) -> None:
    seen, classified, mixing = tokens(), torch.tensor(2.0), torch.tensor(3.0)
    found = value(patches.loss(choices, classified, seen, mixing))
    whole = (2 + 12 * 3) / 13 if choices is DIVERSE_VIT else 2 + 3
    alike = value(similarity(seen.last, signed=choices.signed, diagonal=choices.diagonal).mean())
    confused = loop_of_contrast(choices, seen)
    assert found == pytest.approx(whole + choices.cosine * alike + choices.contrastive * confused, rel=1e-6)
    assert value(cosine_loss(choices, seen.last)) == pytest.approx(alike)


def test_every_coefficient_of_zero_leaves_its_loss_out() -> None:
    seen, classified = tokens(1, (1, 1)), torch.tensor(2.0)  # of one patch, which has no pairs
    nothing = Suppression(cosine=0.0, contrastive=0.0, mixing=0.0)
    assert patches.loss(nothing, classified, seen, None) is classified
    assert value(patches.loss(replace(nothing, mixing=0.5), classified, seen, torch.tensor(3.0))) == 3.5


@every_variant
def test_a_batch_is_as_if_its_pairs_came_one_by_one_and_a_weight_of_zero_as_if_a_picture_had_no_gradient(
    choices: Suppression,
) -> None:
    head = PatchHead(6, CLASSES).double()
    seen = tokens()
    whole = total_of(choices, seen, head=head)
    parts = [total_of(choices, seen, torch.tensor(w), head=head) for w in ([2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0])]
    assert value(whole) == pytest.approx(sum(map(value, parts)) / 2, rel=1e-5)
    parts[0].backward()
    assert seen.last.grad is not None and not seen.last.grad[2:].any() and seen.last.grad[:2].any()


@every_variant
def test_every_variant_moves_patches_apart_where_it_is_followed(choices: Suppression) -> None:
    """Descent on the tokens themselves, from patches that are nearly equal; every patch its own start."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 16, 8, generator=generator)
    last = (torch.ones(2, 16, 8) + 0.1 * torch.randn(2, 16, 8, generator=generator)).requires_grad_()
    before = value(similarity(last, signed=True).mean())
    for _ in range(30):
        total = patches.loss(replace(choices, mixing=0.0), torch.zeros(()), Tokens(first, last, (4, 4)), None)
        (gradient,) = torch.autograd.grad(total, last)
        last = (last - gradient / gradient.norm()).detach().requires_grad_()
    assert value(similarity(last, signed=True).mean()) < before - 0.1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cosine": -1.0}, "cosine is -1.0"),
        ({"mixing": math.nan}, "mixing is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"averaged": True, "unit": "regions"}, "needs unit 'patches'"),
    ],
)
def test_every_choice_that_makes_no_sense_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Suppression(**wrong)  # type: ignore[arg-type]


def test_every_picture_of_one_patch_is_refused_where_patches_are_compared() -> None:
    seen = tokens(2, (1, 1))
    for call in (lambda: similarity(seen.last, signed=True), lambda: contrastive_loss(Suppression(), seen)):
        with pytest.raises(ValueError, match="smaller patches"):
            call()


# --- distillation ---------------------------------------------------------------------------------------------------


def test_every_hard_loss_takes_the_teachers_likeliest_class_for_the_truth() -> None:
    student, teacher, weights = numbers(4, CLASSES), numbers(4, CLASSES, seed=1), torch.tensor([1.0, 0.0, 2.0, 1.0])
    expected = 0.0
    for ours, theirs, weight in zip(student.tolist(), teacher.tolist(), weights.tolist(), strict=True):
        expected += weight * (math.log(sum(map(math.exp, ours))) - ours[int(np.argmax(theirs))]) / 4
    found = distill.loss(Distillation(alpha=0.3), torch.tensor(2.0), student, teacher, weights)
    assert value(found) == pytest.approx(0.7 * 2 + 0.3 * expected, rel=1e-6)


@given(some.floats(0.5, 5), some.floats(0, 1), words)
@settings(deadline=None, max_examples=40)
def test_every_soft_loss_is_the_divergence_of_softened_classes(temperature: float, alpha: float, seed: int) -> None:
    student, teacher = numbers(3, CLASSES, seed=seed), numbers(3, CLASSES, seed=seed + 1)
    expected = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = ([math.exp(z / temperature) for z in logits] for logits in (ours, theirs))
        for i in range(CLASSES):
            expected += p[i] / sum(p) * math.log(p[i] / sum(p) / (q[i] / sum(q))) * temperature**2 / 3
    choices = Distillation("", "soft", alpha, temperature)
    found = distill.loss(choices, torch.tensor(2.0), student, teacher)
    assert value(found) == pytest.approx((1 - alpha) * 2 + alpha * expected, rel=1e-4, abs=1e-6)


def test_every_soft_loss_by_numbers_is_that_of_the_papers_code() -> None:
    student, teacher = numbers(3, CLASSES), numbers(3, CLASSES, seed=1)
    ours, theirs = log_softmax(student / 3, 1), log_softmax(teacher / 3, 1)
    summed = kl_div(ours, theirs, reduction="sum", log_target=True) * 9 / student.numel()
    found = distill.loss(Distillation("", "soft", 1.0, 3.0, "numbers"), torch.zeros(()), student, teacher)
    assert value(found) == pytest.approx(float(summed), rel=1e-5)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_every_teacher_is_as_if_it_were_fixed_and_every_student_learns(kind: Literal["hard", "soft"]) -> None:
    student, teacher = numbers(3, CLASSES).requires_grad_(), numbers(3, CLASSES, seed=1).requires_grad_()
    distill.loss(Distillation(kind=kind), torch.zeros(()), student, teacher).backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum(1).min() > 0


def test_every_student_that_says_what_its_teacher_says_has_nothing_to_learn_from_it() -> None:
    same = numbers(3, CLASSES)
    assert value(distill.loss(Distillation("", "soft", 1.0, 2.0), torch.tensor(9.0), same, same + 1)) == pytest.approx(
        0, abs=1e-6
    )


def test_every_teacher_of_other_classes_and_every_odd_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher gives 7 classes .* 5 for 3"):
        distill.loss(Distillation(), torch.zeros(()), numbers(3, 5), numbers(3, 7))
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        Config("x", 3, distillation=Distillation(alpha=1.5)).check(1)
    with pytest.raises(ValueError, match="temperature is 0"):
        Config("x", 3, distillation=Distillation(temperature=0.0)).check(1)


# --- masked patches -------------------------------------------------------------------------------------------------


def drawn(samples: list[int], count: int = 10, *, seed: int = 0, epoch: int = 0) -> Corruption:
    return masked.draw(np.array(samples), np.full(len(samples), epoch), count, seed=seed)


@given(some.lists(some.integers(0, 10**9), min_size=1, max_size=5), some.integers(2, 20), words, some.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_what_is_corrupted_follows_from_seed_epoch_and_sample_whatever_the_batch(
    samples: list[int], count: int, seed: int, epoch: int
) -> None:
    epochs = epoch + np.arange(len(samples)) % 2
    together = masked.draw(np.array(samples), epochs, count, seed=seed)
    for i, sample in enumerate(samples):
        alone = drawn([sample], count, seed=seed, epoch=int(epochs[i]))
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))
    assert together.place.shape == (len(samples), count // 2)
    assert (together.place.diff(dim=1) > 0).all() and together.place.min() >= 0 and together.place.max() < count
    assert together.source.min() >= 0 and together.source.max() < count


def test_every_word_changes_what_is_corrupted() -> None:
    found = [drawn([7], 196), drawn([8], 196), drawn([7], 196, seed=1), drawn([7], 196, epoch=1)]
    assert len({tuple(one.place[0].tolist()) for one in found}) == 4


def test_eight_of_ten_corrupted_patches_are_hidden_and_one_is_another_wherever_they_are() -> None:
    pictures, count = 4000, 4
    found = drawn(list(range(pictures)), count)
    total = pictures * count // 2
    exchanged = ~found.masked & (found.source != found.place)
    for share, times in ((0.8, found.masked.sum()), (0.1, exchanged.sum())):
        assert abs(int(times) - share * total) < 5 * math.sqrt(share * (1 - share) * total)
    assert torch.equal(found.source[found.masked], found.place[found.masked])
    often = found.place.flatten().bincount(minlength=count)
    assert (often - pictures / 2).abs().max() < 5 * math.sqrt(pictures / 4)
    steps = ((found.source - found.place) % count)[exchanged].bincount(minlength=count)[1:]
    assert (steps - steps.float().mean()).abs().max() < 5 * math.sqrt(float(steps.float().mean()))


def test_every_patch_is_drawn_for_itself() -> None:
    found = drawn([0], 400)
    exchanged = ~found.masked & (found.source != found.place)
    assert len(found.source[exchanged].unique()) > int(exchanged.sum()) // 2 > 5
    assert 0 < int(found.masked.sum()) < found.masked.numel()


def test_every_share_that_hides_nothing_or_all_is_refused() -> None:
    for share in (0.05, 1.0):
        with pytest.raises(ValueError, match="of 10 patches"):
            masked.draw(np.arange(2), np.zeros(2, np.int64), 10, seed=0, share=share)


def test_every_mean_colour_is_the_one_worked_out_by_hand() -> None:
    picture = torch.zeros(1, 5, 4, 3, dtype=torch.uint8)  # two by two patches of 2, and a row left over
    picture[0, :2, :2] = torch.tensor([255, 0, 31])  # 7, 0, 0
    picture[0, :2, 2:] = torch.tensor([32, 64, 96])  # 1, 2, 3
    picture[0, 2:4, :2, 0] = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8)  # a mean of 127.5: 3
    picture[0, 2:4, 2:, 2] = torch.tensor([[31, 32], [32, 32]], dtype=torch.uint8)  # 31.75: 0
    picture[0, 4] = 255
    assert mean_colours(picture, 2).tolist() == [[7 * 64, 64 + 2 * 8 + 3, 3 * 64, 0]]


@given(some.integers(1, 4), some.integers(1, 3), some.integers(1, 3), words)
@settings(deadline=None, max_examples=40)
def test_every_mean_colour_equals_a_loop_over_patches(patch: int, rows: int, columns: int, seed: int) -> None:
    shape = (2, rows * patch, columns * patch, 3)
    pictures = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
    found = mean_colours(pictures, patch)
    for b, i in product(range(2), range(rows * columns)):
        top, left = i // columns * patch, i % columns * patch
        mean = pictures[b, top : top + patch, left : left + patch].numpy().reshape(-1, 3).astype(np.int64).mean(0)
        red, green, blue = np.floor(mean / 32).astype(int).tolist()
        assert int(found[b, i]) == 64 * red + 8 * green + blue < masked.COLOURS


def prediction(width: int = 6) -> MaskedPatches:
    module = MaskedPatches(width)
    masked.initialise(module, torch.Generator().manual_seed(2))
    return module.double()


def test_every_patch_is_shown_as_it_was_drawn() -> None:
    module, embedded, how = prediction(), numbers(40, 10, 6), drawn(list(range(40)))
    found = module.corrupted(embedded, how)
    for b in range(40):
        expected = embedded[b].clone()
        for place, hidden, source in zip(how.place[b], how.masked[b], how.source[b], strict=True):
            expected[place] = module.mask if hidden else embedded[b, source]
        assert torch.equal(found[b], expected.detach())


def test_every_corrupted_patch_and_no_other_is_predicted_and_counts() -> None:
    module, embedded, how = prediction(), numbers(4, 10, 6), drawn(list(range(4)))
    nn.init.normal_(module.head.weight)
    colours = torch.arange(40).reshape(4, 10) * 12
    mixer = numbers(10, 10, seed=4)
    logits = module(embedded, lambda shown: mixer @ shown, how)
    tokens, total = mixer @ module.corrupted(embedded, how), 0.0
    for b, k in product(range(4), range(5)):
        place = how.place[b, k]
        total -= value(log_softmax(module.head(tokens[b, place]), 0)[colours[b, place]])
    assert value(masked.loss(logits, colours, how)) == pytest.approx(total / 20, rel=1e-5)
    others = (colours + 1).scatter(1, how.place, colours.gather(1, how.place))
    assert masked.loss(logits, others, how) == masked.loss(logits, colours, how)


def test_every_weight_of_a_picture_scales_its_loss_and_parts_of_a_batch_add_up() -> None:
    logits, colours, how = numbers(4, 5, 512), torch.arange(40).reshape(4, 10), drawn(list(range(4)))
    whole = masked.loss(logits, colours, how)
    parts = [masked.loss(logits, colours, how, torch.tensor(w)) for w in ([1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0])]
    assert value(whole) == pytest.approx(sum(map(value, parts)), rel=1e-6)


def test_a_hidden_patch_teaches_the_mask_and_not_its_own_embedding() -> None:
    module, how = prediction(), drawn([0])
    nn.init.normal_(module.head.weight)
    embedded = numbers(1, 10, 6).requires_grad_()
    masked.loss(module(embedded, torch.tanh, how), torch.zeros(1, 10, dtype=torch.int64), how).backward()
    assert embedded.grad is not None and module.mask.grad is not None and module.mask.grad.any()
    shown = set(how.source[0][~how.masked[0]].tolist())
    assert {i for i in range(10) if embedded.grad[0, i].any()} == shown  # an encoder that mixes no places


def test_every_colour_is_as_likely_as_any_other_before_training() -> None:
    module, how = prediction(), drawn([0, 1])
    logits = module(numbers(2, 10, 6), lambda shown: shown, how)
    assert value(masked.loss(logits, torch.zeros(2, 10, dtype=torch.int64), how)) == pytest.approx(math.log(512))
    assert value(prediction(2000).mask.std()) == pytest.approx(0.02, rel=0.1)
    assert module.undecayed() < dict(module.named_parameters()).keys()
