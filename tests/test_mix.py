"""What is done to a whole batch: normalising, erasing, mixing, and the loss of what comes out."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.special import betainc
from scipy.stats import kstest
from torch import Tensor
from torch.nn.functional import one_hot

from pipeline.config import Augment
from pipeline.data import mix
from pipeline.data.mix import Draws, Erasing, Mixing, applied, draw, normalised, targets
from pipeline.objectives.classify import loss
from pipeline.seed import mixed

pytestmark = pytest.mark.timeout(120)

ALL = Augment(mixup=0.8, cutmix=1.0, erase=0.6)
MIXUP, CUTMIX, ERASE = Augment(mixup=0.5), Augment(cutmix=1.0), Augment(erase=0.25)
CLASSES = 10

shares = some.sampled_from([0.0, 0.2, 1.0])
augments = some.builds(Augment, mixup=shares, cutmix=shares, erase=some.sampled_from([0.0, 0.3, 1.0]))
words = some.integers(0, 2**31)


def pixels(count: int, side: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(count).integers(0, 256, (count, side, side, 3), np.uint8))


def labels(count: int, most: int = 1) -> Tensor:
    """Some pictures have fewer labels than the most."""
    found = torch.arange(count * most).reshape(count, most) * 7 % CLASSES
    return torch.where((torch.arange(most) > 0) & (torch.arange(count)[:, None] % 3 > 0), -1, found)


def drawn(augment: Augment, count: int, side: int = 32, *, seed: int = 0, epoch: int = 0) -> Draws:
    found = draw(augment, np.arange(count), np.full(count, epoch), seed=seed, side=side)
    assert found is not None
    return found


def mixing_of(augment: Augment, count: int, side: int = 32, *, seed: int = 0) -> Mixing:
    found = drawn(augment, count, side, seed=seed).mixing
    assert found is not None
    return found


def erasing_of(augment: Augment, count: int, side: int = 32, *, seed: int = 0, epoch: int = 0) -> Erasing:
    found = drawn(augment, count, side, seed=seed, epoch=epoch).erasing
    assert found is not None
    return found


def noise_of(erasing: Erasing, count: int, side: int) -> Tensor:
    """What stands in the rectangles of otherwise empty pictures, in their order."""
    empty = torch.full((count, side, side, 3), torch.nan).permute(0, 3, 1, 2)
    found = applied(empty, Draws(None, erasing)).permute(0, 2, 3, 1)
    return found[~found.isnan()]


# --- batches --------------------------------------------------------------------------------------------------------


@given(
    augments, some.lists(some.integers(1, 4), min_size=1, max_size=5), some.integers(1, 3), some.integers(2, 19), words
)
@settings(deadline=None, max_examples=80)
def test_every_cut_of_a_batch_into_even_parts_gives_the_same_pictures_and_targets(
    augment: Augment, pairs: list[int], most: int, side: int, seed: int
) -> None:
    count = 2 * sum(pairs)
    sample, epoch = np.arange(count)[::-1] * 31, np.arange(count) // 5
    images, named = normalised(pixels(count, side)), labels(count, most)

    def made(first: int, end: int) -> tuple[Tensor, Tensor]:
        draws = draw(augment, sample[first:end], epoch[first:end], seed=seed, side=side)
        return applied(images[first:end], draws), targets(named[first:end], draws, CLASSES)

    ends = np.cumsum([0, *pairs]) * 2
    parts = [made(first, end) for first, end in pairwise(ends)]
    whole = made(0, count)
    assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
    assert torch.equal(whole[1], torch.cat([part[1] for part in parts]))


@given(augments, words)
@settings(deadline=None, max_examples=30)
def test_nothing_that_is_handed_in_is_changed_and_the_same_comes_out_again(augment: Augment, seed: int) -> None:
    sample, epoch = np.arange(8), np.zeros(8, np.int64)
    images = normalised(pixels(8, 9))
    before = images.clone()
    torch.manual_seed(0)
    first = applied(images, draw(augment, sample, epoch, seed=seed, side=9))
    torch.manual_seed(1)
    second = applied(images, draw(augment, sample, epoch, seed=seed, side=9))
    assert torch.equal(first, second) and torch.equal(images, before)
    assert (sample == np.arange(8)).all() and (epoch == 0).all()


@pytest.mark.parametrize("augment", [ALL, MIXUP, CUTMIX, ERASE])
def test_every_epoch_and_seed_has_pictures_of_its_own(augment: Augment) -> None:
    images = normalised(pixels(40, 16))
    made = [applied(images, drawn(augment, 40, 16, seed=s, epoch=e)) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert all(not torch.equal(made[a], made[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_nothing_is_drawn_where_nothing_is_asked_for_and_pictures_and_labels_stay_as_they_are() -> None:
    assert draw(Augment(layers=2), np.arange(3), np.zeros(3, np.int64), seed=0, side=8) is None
    images = normalised(pixels(3, 8))
    assert torch.equal(applied(images, None), images)
    assert targets(torch.tensor([[1, -1], [0, 2]]), None, 3).tolist() == [[0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("augment", [MIXUP, CUTMIX, ALL])
def test_every_batch_to_be_mixed_consists_of_pairs(augment: Augment) -> None:
    with pytest.raises(AssertionError, match="3 pictures"):
        drawn(augment, 3)
    assert erasing_of(Augment(erase=1.0), 3).picture.tolist() == [0, 1, 2]


@pytest.mark.parametrize("augment", [ALL, MIXUP, CUTMIX, Augment(erase=1.0)])
def test_every_tensor_can_be_on_a_device_that_cannot_be_asked(augment: Augment) -> None:
    draws = drawn(augment, 8, 16).to("meta", non_blocking=True)
    found = applied(normalised(pixels(8, 16).to("meta")), draws)
    assert found.shape == (8, 3, 16, 16) and found.dtype == torch.float32 and found.is_meta
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert targets(labels(8).to("meta"), draws, CLASSES).is_meta


def test_every_tensor_goes_along_to_a_device() -> None:
    draws = drawn(ALL, 8)
    assert draws.mixing and draws.erasing
    moved = draws.to("cpu")
    assert moved.mixing and moved.erasing and moved.erasing.pixels == draws.erasing.pixels
    for ours, theirs in zip((*draws.mixing, *draws.erasing[:3]), (*moved.mixing, *moved.erasing[:3]), strict=True):
        assert torch.equal(ours, theirs)


# --- normalising ----------------------------------------------------------------------------------------------------


@given(some.integers(1, 5), some.integers(1, 40))
@settings(deadline=None, max_examples=30)
def test_every_pixel_is_normalised_by_the_formula_and_stays_where_it_was_in_memory(count: int, side: int) -> None:
    images = pixels(count, side)
    found = normalised(images)
    expected = images.numpy().transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert found.dtype == torch.float32 and (found.numpy() == expected).all()
    assert found.permute(0, 2, 3, 1).is_contiguous() and found.is_contiguous(memory_format=torch.channels_last)


def test_black_is_minus_one_and_white_is_one() -> None:
    assert normalised(torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)).flatten().tolist() == pytest.approx(
        [-1, 1, -0.6]
    )


@pytest.mark.parametrize("augment", [ALL, MIXUP, CUTMIX, ERASE])
def test_every_change_leaves_channels_last(augment: Augment) -> None:
    found = applied(normalised(pixels(32, 16)), drawn(augment, 32, 16))
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)


# --- mixing ---------------------------------------------------------------------------------------------------------


@given(words, some.integers(1, 6), some.sampled_from([0.01, 0.2, 1.0, 5.0]))
@settings(deadline=None, max_examples=40)
def test_mixup_gives_both_of_every_pair_their_share_of_each_other(seed: int, pairs: int, shape: float) -> None:
    images = normalised(pixels(2 * pairs, 7))
    augment = Augment(mixup=shape)
    share = mixing_of(augment, 2 * pairs, 7, seed=seed).share
    assert ((share >= 0) & (share <= 1)).all()
    found = applied(images, drawn(augment, 2 * pairs, 7, seed=seed))
    for k, own in enumerate(share.tolist()):
        a, b = images[2 * k], images[2 * k + 1]
        torch.testing.assert_close(found[2 * k], own * a + (1 - own) * b)
        torch.testing.assert_close(found[2 * k + 1], own * b + (1 - own) * a)


def test_a_share_and_the_rest_give_the_same_pictures_as_if_the_larger_were_taken() -> None:
    draws = drawn(MIXUP, 12, 5)
    assert draws.mixing and (draws.mixing.share < 0.5).any()
    larger = torch.maximum(draws.mixing.share, 1 - draws.mixing.share)
    images = normalised(pixels(12, 5))
    ours = applied(images, draws)
    theirs = applied(images, Draws(draws.mixing._replace(weight=larger, share=larger), None))
    for mine, other in zip(ours.split(2), theirs.split(2), strict=True):
        if not torch.allclose(mine, other, atol=1e-6):
            torch.testing.assert_close(mine, other.flip(0))


@given(words, some.integers(1, 6), some.integers(1, 33), some.sampled_from([0.2, 1.0, 3.0]))
@settings(deadline=None, max_examples=60)
def test_the_share_of_every_cutmix_is_that_of_the_counted_pixels(
    seed: int, pairs: int, side: int, shape: float
) -> None:
    augment, count = Augment(cutmix=shape), 2 * pairs
    own = torch.arange(1, count + 1, dtype=torch.float32)[:, None, None, None]
    draws = drawn(augment, count, side, seed=seed)
    assert draws.mixing
    found = applied(own.expand(count, 3, side, side).contiguous(memory_format=torch.channels_last), draws)
    partner = own.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    assert ((found == own) | (found == partner)).all()
    counted = (found == own)[:, 0].flatten(1).sum(1) / side**2
    torch.testing.assert_close(counted, draws.mixing.share.repeat_interleave(2))


@given(
    some.floats(0, 1), some.floats(0, 1, exclude_max=True), some.floats(0, 1, exclude_max=True), some.integers(1, 400)
)
@settings(deadline=None)
def test_every_box_is_what_a_square_around_its_centre_has_within_the_picture(
    share: float, x: float, y: float, side: int
) -> None:
    top, bottom, left, right = mix._boxes(np.array([share]), np.array([x]), np.array([y]), side)[0].tolist()
    length = side * (1 - share) ** 0.5
    for centre, first, end in ((int(y * side), top, bottom), (int(x * side), left, right)):
        inside = [at for at in range(side) if at - centre < int(length) // 2 and centre - at <= int(length) // 2]
        assert list(range(first, end)) == (inside if int(length) > 1 else [])


def test_every_part_of_a_picture_is_met_by_boxes_as_often_as_its_mirror() -> None:
    top, bottom, left, right = mixing_of(CUTMIX, 8000, 224).box.unbind(1)
    there = (bottom > top) & (right > left)
    for first, end in ((top, bottom), (left, right)):
        middle = (first + end)[there]
        assert float((middle < 224).double().mean()) == pytest.approx(0.5, abs=0.03)
        assert float(middle.double().std()) > 50
    assert torch.stack([(top + bottom)[there], (left + right)[there]]).double().corrcoef()[0, 1].abs() < 0.06


@pytest.mark.parametrize("shape", [0.1, 0.8, 1.0, 4.0])
def test_the_shares_of_mixup_are_distributed_as_beta_says_whatever_its_parameter(shape: float) -> None:
    share = mixing_of(Augment(mixup=shape), 16000).share
    for limit in (0.001, 0.1, 0.4, 0.5, 0.8, 0.999):
        assert float((share < limit).double().mean()) == pytest.approx(betainc(shape, shape, limit), abs=0.02)


def test_each_pair_gets_one_of_both_kinds_equally_often_and_the_only_one_there_is_always() -> None:
    def cut(augment: Augment) -> float:
        found = mixing_of(augment, 4000, 64)
        assert ((found.weight == 1) | (found.box == 0).all(1)).all()
        return float((found.weight == 1).double().mean())

    assert cut(ALL) == pytest.approx(0.5, abs=0.05) and cut(MIXUP) == 0 and cut(CUTMIX) == 1


def test_the_mixing_of_a_pair_is_that_of_its_first_picture_whatever_the_second() -> None:
    sample, epoch = np.arange(20), np.arange(20) // 3
    ours = draw(ALL, sample, epoch, seed=3, side=32)
    odd = np.arange(20) % 2
    others = draw(ALL, sample + 1000 * odd, epoch + odd, seed=3, side=32)
    assert ours and others and ours.mixing and others.mixing
    assert all(torch.equal(mine, other) for mine, other in zip(ours.mixing, others.mixing, strict=True))


# --- targets --------------------------------------------------------------------------------------------------------


@given(augments, words, some.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_targets_sum_to_one_for_every_picture_with_one_label_whatever_is_mixed(
    augment: Augment, seed: int, pairs: int
) -> None:
    draws = draw(augment, np.arange(2 * pairs), np.zeros(2 * pairs, np.int64), seed=seed, side=16)
    found = targets(labels(2 * pairs), draws, CLASSES)
    torch.testing.assert_close(found.sum(1), torch.ones(2 * pairs))
    assert (found >= 0).all()


def test_every_target_is_the_share_of_its_own_labels_and_the_rest_of_its_partners() -> None:
    shares = torch.tensor([0.75, 0.25])
    mixing = Mixing(shares, torch.zeros(2, 4, dtype=torch.int64), shares)
    named = torch.tensor([[0, 1], [1, -1], [2, -1], [-1, -1]])
    expected = [[0.75, 1.0, 0.0], [0.25, 1.0, 0.0], [0.0, 0.0, 0.25], [0.0, 0.0, 0.75]]
    assert targets(named, Draws(mixing, None), 3).tolist() == expected


# --- erasing --------------------------------------------------------------------------------------------------------


@given(words, some.integers(1, 224))
@settings(deadline=None, max_examples=60)
def test_every_rectangle_is_within_its_picture_and_of_the_asked_area_and_shape(seed: int, side: int) -> None:
    draws = drawn(Augment(erase=1.0), 50, side, seed=seed)
    if draws.erasing is None:  # of a picture so small no part is small enough
        assert side < 4
        return
    top, bottom, left, right = draws.erasing.box.unbind(1)
    height, width = (bottom - top).double(), (right - left).double()
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= side).all() and (right <= side).all()
    assert (height > 0).all() and (width > 0).all() and (height < side).all() and (width < side).all()
    assert draws.erasing.pixels == int((height * width).sum())
    # A side is rounded by half a pixel at the most.
    assert ((height - 0.5) * (width - 0.5) <= side**2 / 3).all()
    assert ((height + 0.5) * (width + 0.5) >= 0.02 * side**2).all()
    assert ((height - 0.5) / (width + 0.5) <= 1 / 0.3).all() and ((height + 0.5) / (width - 0.5) >= 0.3).all()


def test_rectangles_are_as_frequent_as_asked_and_spread_over_area_shape_and_place() -> None:
    erasing = erasing_of(ERASE, 8000, 224)
    assert len(erasing.picture) / 8000 == pytest.approx(0.25, abs=0.02)
    top, bottom, left, right = erasing.box.double().unbind(1)
    height, width = bottom - top, right - left
    area, ratio = height * width / 224**2, height / width
    assert float(area.mean()) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert area.min() < 0.03 and area.max() > 0.32 and ratio.min() < 0.33 and ratio.max() > 3
    assert float(ratio.log().mean()) == pytest.approx(0, abs=0.06)
    assert (bottom == 224).any() and (right == 224).any() and (top == 0).any() and (left == 0).any()
    for begin, length in ((top, height), (left, width)):
        assert kstest(((begin + 0.5) / (224 - length + 1)).numpy(), "uniform").pvalue > 1e-3


def test_noise_stands_in_every_rectangle_and_nowhere_else() -> None:
    images, draws = normalised(pixels(20, 24)), drawn(Augment(erase=0.5), 20, 24)
    assert draws.erasing
    expected = torch.zeros(20, 24, 24, dtype=torch.bool)
    for picture, (top, bottom, left, right) in zip(
        draws.erasing.picture.tolist(), draws.erasing.box.tolist(), strict=True
    ):
        expected[picture, top:bottom, left:right] = True
    changed = applied(images, draws) != images
    # of 256 values one is met by chance about never
    assert torch.equal(changed.all(1), expected) and torch.equal(changed.any(1), expected)


def test_the_noise_is_normal_and_every_pixel_channel_picture_and_epoch_has_its_own() -> None:
    augment = Augment(erase=1.0)
    first = noise_of(erasing_of(augment, 64, 64), 64, 64)
    assert len(first) > 64 * 3 * 64**2 * 0.1 and kstest(first.double().numpy(), "norm").pvalue > 1e-3
    assert float(first.std()) == pytest.approx(1, abs=0.01) and float(first.mean()) == pytest.approx(0, abs=0.01)
    assert len(first.unique()) > 0.99 * len(first)
    by_channel = first.unflatten(0, (-1, 3))
    assert by_channel.T.corrcoef().fill_diagonal_(0).abs().max() < 0.03
    assert torch.stack([first[:-3], first[3:]]).corrcoef()[0, 1].abs() < 0.03
    same_box = erasing_of(augment, 64, 64)._replace(key=erasing_of(augment, 64, 64, epoch=1).key)
    again = noise_of(same_box, 64, 64)
    assert torch.stack([first, again]).corrcoef()[0, 1].abs() < 0.03


def test_the_noise_of_a_pixel_is_the_same_wherever_the_rectangle_begins() -> None:
    def noise(box: list[int]) -> Tensor:
        erasing = Erasing(torch.tensor([1]), torch.tensor([box]), torch.tensor([-5]), 0)
        area = (box[1] - box[0]) * (box[3] - box[2])
        found = applied(torch.zeros(2, 3, 16, 16), Draws(None, erasing._replace(pixels=area)))
        assert not found[0].any()
        return found[1, :, 4:6, 5:7]

    assert noise([4, 6, 5, 7]).all() and torch.equal(noise([4, 6, 5, 7]), noise([0, 11, 3, 16]))


@given(some.lists(some.tuples(some.integers(0, 2**64 - 1), some.integers(0, 2**40)), min_size=1, max_size=20))
@settings(deadline=None)
def test_the_device_draws_the_bits_that_every_other_place_draws(pairs: list[tuple[int, int]]) -> None:
    key, counter = (np.array(column, np.uint64) for column in zip(*pairs, strict=True))
    ours = mix._bits(torch.from_numpy(key.view(np.int64)), torch.from_numpy(counter.view(np.int64)))
    assert (ours.numpy().view(np.uint64) == mixed(key, counter)).all()


def test_a_picture_is_erased_before_it_is_mixed_so_that_its_partner_gets_its_noise() -> None:
    images, draws = normalised(pixels(6, 12)), drawn(replace(ALL, erase=1.0), 6, 12)
    separately = applied(applied(images, replace(draws, mixing=None)), replace(draws, erasing=None))
    assert torch.equal(applied(images, draws), separately)


# --- losses of mixed pictures ---------------------------------------------------------------------------------------

OBJECTIVES = ("sigmoid", "softmax")


def logits(count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(7).normal(size=(count, CLASSES)).astype(np.float32) * 3)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("most", [1, 3])
def test_labels_are_as_if_they_were_given_as_targets(objective: str, smoothing: float, most: int) -> None:
    by_label = loss(logits(9), labels(9, most), objective, smoothing)  # type: ignore[arg-type]
    by_target = loss(logits(9), targets(labels(9, most), None, CLASSES), objective, smoothing)  # type: ignore[arg-type]
    torch.testing.assert_close(by_label, by_target)


@given(words)
@settings(deadline=None, max_examples=30)
def test_smoothing_a_mixture_is_as_if_what_is_mixed_had_been_smoothed(seed: int) -> None:
    draws, named, s = drawn(ALL, 12, seed=seed), labels(12), 0.1
    assert draws.mixing
    own = draws.mixing.share.repeat_interleave(2)[:, None]
    hot = one_hot(named[:, 0], CLASSES).float()
    partner = hot.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    found = loss(logits(12), targets(named, draws, CLASSES), "softmax", s)
    smooth = [one * (1 - s) + s / CLASSES for one in (hot, partner)]
    expected = -((own * smooth[0] + (1 - own) * smooth[1]) * logits(12).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found, expected)
    found = loss(logits(12), targets(named, draws, CLASSES), "sigmoid", s)
    smooth = [one * (1 - 2 * s) + s for one in (hot, partner)]
    goal = own * smooth[0] + (1 - own) * smooth[1]
    z = logits(12)
    expected = -(goal * z.sigmoid().log() + (1 - goal) * (-z).sigmoid().log()).sum(1).mean()
    torch.testing.assert_close(found, expected)


def gradients(targets: Tensor, objective: str, weights: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Of the loss of the first `count` pictures, by the logits."""
    z = logits(len(targets))[:count].requires_grad_()
    value = loss(z, targets[:count], objective, 0.1, weights)  # type: ignore[arg-type]
    value.backward()
    assert z.grad is not None
    return value.detach(), z.grad


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("most", [0, 1, 3], ids=["shares", "one label", "several labels"])
def test_a_picture_of_weight_nothing_is_as_if_its_term_were_absent(objective: str, most: int) -> None:
    named = labels(8, most) if most else targets(labels(8), drawn(ALL, 8), CLASSES)
    weights = torch.tensor([1.0] * 6 + [0.0] * 2)
    value, found = gradients(named, objective, weights, 8)
    fewer, expected = gradients(named, objective, None, 6)
    assert not found[6:].any() and found[:6].any()
    torch.testing.assert_close(found[:6], expected * 6 / 8)
    torch.testing.assert_close(value, fewer * 6 / 8)
    whole, all_of_them = gradients(named, objective, None, 8)
    ones = gradients(named, objective, torch.ones(8), 8)
    assert torch.equal(whole, ones[0]) and torch.equal(all_of_them, ones[1])
    assert torch.equal(gradients(named, objective, torch.full((8,), 2.0), 8)[1], 2 * all_of_them)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("most", [0, 1, 3], ids=["shares", "one label", "several labels"])
def test_micro_batches_add_up_to_the_batch_whatever_the_weights(objective: str, most: int) -> None:
    named = labels(12, most) if most else targets(labels(12), drawn(ALL, 12), CLASSES)
    weights = torch.tensor([1.0, 0, 0, 0, 2, 1, 1, 1, 0, 1, 1, 0.5])
    whole = loss(logits(12), named, objective, 0.1, weights)  # type: ignore[arg-type]
    cut = zip(logits(12).split(4), named.split(4), weights.split(4), strict=True)
    parts = [loss(z, goal, objective, 0.1, weight) for z, goal, weight in cut]  # type: ignore[arg-type]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_form_of_a_picture_without_a_label_adds_nothing_to_the_softmax(smoothing: float) -> None:
    alone = torch.tensor([[3], [-1]])
    forms = [alone, torch.cat([alone, torch.full_like(alone, -1)], 1), targets(alone, None, CLASSES)]
    expected = loss(logits(2)[:1], alone[:1], "softmax", smoothing) / 2
    for form in forms:
        z = logits(2).requires_grad_()
        value = loss(z, form, "softmax", smoothing)
        value.backward()
        torch.testing.assert_close(value.detach(), expected)
        assert z.grad is not None and not z.grad[1].any() and z.grad[0].any()


def test_the_softmax_takes_shares_as_if_they_summed_to_one_whatever_they_sum_to() -> None:
    goal = targets(labels(6), drawn(ALL, 6), CLASSES)
    torch.testing.assert_close(loss(logits(6), goal, "softmax", 0.1), loss(logits(6), 3 * goal, "softmax", 0.1))
