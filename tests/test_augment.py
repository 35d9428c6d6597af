"""RandAugment: what is drawn for a picture, and that it is done as its references do it."""

import math
from collections import Counter
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import Augment
from pipeline.data.augment import AUGREG, DEIT, NOTHING, OPERATIONS, Changes, Layer, Operation, change, random_changes
from pipeline.data.image import Pixels
from tests.timm import load

pytestmark = pytest.mark.timeout(120)


SPACES = {"augreg": (AUGREG, 0, 10.0), "deit": (DEIT, len(AUGREG), 9.0)}
SAMPLES, EPOCH = np.arange(20_000), np.zeros(20_000, np.int64)
SHAPES = [(1, 1), (2, 5), (5, 2), (3, 3), (40, 57), (57, 40)]
ODD = st.tuples(st.integers(1, 33), st.integers(1, 33))
SIGNS = st.sampled_from([-1.0, 1.0])


def named(space: tuple[Operation, ...], name: str) -> Operation:
    return next(operation for operation in space if operation.name == name)


def argument(operation: Operation, level: float, sign: float = 1.0) -> float:
    return operation.argument(np.array([level]), np.array([sign])).item()


def done(operation: Operation, picture: Pixels, argument: float, *, bicubic: bool = False) -> Pixels:
    out = picture.copy()
    operation.change(out, Layer(argument, (0.5, 0.5), bicubic))
    return out


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def scene() -> Pixels:
    """Slopes, an area of one colour, and no channel that reaches all values."""
    y, x, channel = np.mgrid[:61, :83, :3]
    picture = ((7 * y + 13 * x + 31 * channel + x * y // 9) % 251).astype(np.uint8)
    picture[10:30, 20:50] = (200, 90, 13)
    return picture


def drawn(
    space: str, sample: np.ndarray = SAMPLES, epoch: np.ndarray = EPOCH, layers: int = 2, seed: int = 0
) -> Changes:
    augment = Augment(layers=layers, magnitude=SPACES[space][2], space=space)  # type: ignore[arg-type]
    return random_changes(sample, epoch, seed=seed, augment=augment)


TOGETHER = {space: drawn(space) for space in SPACES}


@pytest.mark.parametrize("space", SPACES)
@given(chosen=st.lists(st.integers(0, 19_999), max_size=6), other=st.integers(0, 3))
def test_what_is_done_to_a_picture_is_the_same_whatever_it_is_drawn_with(
    space: str, chosen: list[int], other: int
) -> None:
    together = TOGETHER[space]
    epoch = np.array([other * (i % 2) for i in range(len(chosen))], np.int64)
    apart = drawn(space, np.array(chosen, np.int64), epoch)
    for a, b in zip(together, apart, strict=True):
        assert (a[chosen][epoch == 0] == b[epoch == 0]).all()


@pytest.mark.parametrize("space", SPACES)
def test_every_epoch_seed_and_layer_has_draws_of_its_own(space: str) -> None:
    def kinds(seed: int, epoch: int) -> np.ndarray:
        return drawn(space, epoch=EPOCH + epoch, seed=seed).operation

    for a, b in ((kinds(0, 0), kinds(0, 1)), (kinds(0, 0), kinds(1, 0)), np.moveaxis(kinds(0, 0), 1, 0)[:, None]):
        assert 0.5 < (a != b).mean() < 0.97


@pytest.mark.parametrize("space", SPACES)
def test_every_operation_is_drawn_about_as_often_as_the_others_in_every_layer(space: str) -> None:
    operations, first, _ = SPACES[space]
    for layer in drawn(space).operation.T:
        counts = Counter(layer.tolist())
        left_out = counts.pop(NOTHING, 0) / len(layer)
        assert left_out == pytest.approx(0.5 if space == "deit" else 0.0, abs=0.015)
        assert set(counts) == set(range(first, first + len(operations)))
        expected = (1 - left_out) * len(layer) / len(operations)
        assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in counts.values())


def test_whatever_the_first_layer_is_the_second_is_independent_of_it() -> None:
    pairs = Counter(map(tuple, drawn("augreg").operation.tolist()))
    assert len(pairs) == len(AUGREG) ** 2 and max(pairs.values()) < 2 * min(pairs.values())


@pytest.mark.parametrize("space", SPACES)
def test_every_signed_operation_goes_both_ways_equally_often(space: str) -> None:
    changes = drawn(space)
    for which, operation in enumerate(OPERATIONS):
        values = changes.argument[changes.operation == which]
        if len(values) and operation.name[:5] in ("Rotat", "Shear", "Trans"):
            assert (values > 0).mean() == pytest.approx(0.5, abs=0.08)


def test_every_magnitude_of_augreg_is_the_one_asked_for_and_deits_are_normal_around_it() -> None:
    changes = drawn("augreg")
    assert set(np.abs(changes.argument[changes.operation == AUGREG.index(named(AUGREG, "Rotate"))])) == {30.0}
    changes = drawn("deit")
    levels = np.abs(changes.argument[changes.operation == OPERATIONS.index(named(DEIT, "Rotate"))]) / 3
    assert levels.max() == 10.0 and 0.005 < (levels == 10.0).mean() < 0.045  # beyond two deviations they are clipped
    assert levels.mean() == pytest.approx(9.0, abs=0.06) and levels.std() == pytest.approx(0.5, abs=0.05)
    low = random_changes(SAMPLES, EPOCH, seed=0, augment=Augment(layers=1, magnitude=0.0, space="deit"))
    slopes = low.argument[low.operation == OPERATIONS.index(named(DEIT, "ShearX"))]
    assert 0.4 < (slopes == 0).mean() < 0.6


def test_half_of_all_filters_are_bicubic_and_every_cutout_has_a_place_of_its_own() -> None:
    changes = drawn("deit")
    assert changes.bicubic.mean() == pytest.approx(0.5, abs=0.02)
    assert (changes.place >= 0).all() and (changes.place < 1).all()
    assert changes.place.mean((0, 1)) == pytest.approx([0.5, 0.5], abs=0.02)
    assert len(np.unique(changes.place)) > 70_000


@pytest.mark.parametrize("space", SPACES)
def test_no_layers_change_nothing_whatever_the_picture(space: str) -> None:
    picture = noise(9, 7)
    changes = drawn(space, layers=0)
    assert all(column.shape[:2] == (len(SAMPLES), 0) for column in changes)
    change(picture, changes, 3)
    assert (picture == noise(9, 7)).all()


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_change_is_done_in_place_layer_after_layer_whatever_the_shape(space: str, shape: tuple[int, int]) -> None:
    changes = drawn(space, SAMPLES[:80], EPOCH[:80], layers=3)
    batch = np.stack([noise(*shape, seed) for seed in range(80)])
    for i in range(80):
        change(batch[i], changes, i)
        expected = noise(*shape, i)
        for layer, which in enumerate(changes.operation[i]):
            if which != NOTHING:
                x, y = changes.place[i, layer]
                how = Layer(changes.argument[i, layer].item(), (x, y), bool(changes.bicubic[i, layer]))
                OPERATIONS[which].change(expected, how)
        assert (batch[i] == expected).all()
    assert batch.dtype == np.uint8 and batch.flags.c_contiguous
    if min(shape) > 3:
        assert np.mean([(batch[i] != noise(*shape, i)).any() for i in range(80)]) > 0.75


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        (Augment(layers=-1), "layers is -1"),
        (Augment(layers=2, magnitude=-0.1), "magnitude is -0.1; .* at least 0 and below 22.5"),
        (Augment(layers=2, magnitude=22.5), "below 22.5"),
        (Augment(layers=2, magnitude=math.nan), "nan"),
        (Augment(layers=2, magnitude=10.5, space="deit"), "magnitude is 10.5; .* deit it is from 0 to 10"),
    ],
)
def test_every_setting_without_a_meaning_is_refused_by_name(augment: Augment, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        random_changes(SAMPLES[:1], EPOCH[:1], seed=0, augment=augment)


# DeiT, against timm


@cache
def timms() -> Any:
    return load("timm.data.auto_augment")


def by_timm(operation: Operation, picture: Pixels, level: float, sign: float, bicubic: bool) -> tuple[float, Pixels]:
    """The argument and the picture that timm makes of a level."""
    how = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timms(), "_randomly_negate", lambda value: sign * value)
        to_argument = timms().LEVEL_TO_ARG[operation.name]
        arguments = to_argument(level, {}) if to_argument else ()
    made = timms().NAME_TO_OP[operation.name](
        Image.fromarray(picture), *arguments, fillcolor=(124, 116, 104), resample=how
    )
    return (arguments or (0.0,))[0], np.asarray(made)


def test_every_operation_of_deit_is_timms_in_timms_order() -> None:
    theirs = timms().rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    assert [operation.name for operation in DEIT] == [operation.name for operation in theirs.ops]
    assert {(operation.prob, operation.magnitude, operation.magnitude_std) for operation in theirs.ops} == {
        (0.5, 9, 0.5)
    }
    assert theirs.num_layers == 2 and theirs.choice_weights is None  # uniformly, with replacement


@pytest.mark.parametrize("operation", DEIT, ids=lambda operation: operation.name)
@settings(max_examples=25, deadline=None)
@given(
    size=ODD,
    level=st.one_of(st.floats(0, 9.99), st.sampled_from([0.0, 0.1, 5.0, 9.0])),
    sign=SIGNS,
    bicubic=st.booleans(),
    span=st.sampled_from([1, 9, 256]),
)
def test_every_operation_of_deit_is_timms_to_the_last_bit_whatever_the_picture(
    operation: Operation, size: tuple[int, int], level: float, sign: float, bicubic: bool, span: int
) -> None:
    picture = (noise(*size).astype(int) * span // 256 + 100 // span).astype(np.uint8)
    expected, theirs = by_timm(operation, picture, level, sign, bicubic)
    ours = argument(operation, level, sign)
    assert ours == expected
    assert (done(operation, picture, ours, bicubic=bicubic) == theirs).all()


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("level", [10.0, 8.75, 2.0])
@pytest.mark.parametrize(
    "operation", [one for one in DEIT if not one.name.startswith("Post")], ids=lambda one: one.name
)
def test_every_operation_of_deit_is_timms_on_a_scene_too(
    operation: Operation, level: float, sign: float, bicubic: bool
) -> None:
    for picture in (scene(), np.ascontiguousarray(scene().transpose(1, 0, 2))):
        expected, theirs = by_timm(operation, picture, level, sign, bicubic)
        assert argument(operation, level, sign) == expected
        assert (done(operation, picture, expected, bicubic=bicubic) == theirs).all()


@pytest.mark.parametrize("slope", [0.5, -0.5, 1 / 3, 1e-15, -1e-15, 2 - 2.0**-50, -2 + 2.0**-50, 2 / 3 - 2.0**-52])
@pytest.mark.parametrize("bicubic", [False, True])
def test_a_shear_is_pillows_as_well_where_rounding_decides_between_neighbours(slope: float, bicubic: bool) -> None:
    how = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    picture = noise(120, 90)
    image = Image.fromarray(picture)
    sheared = [
        image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=(124, 116, 104))
        for matrix in ((1, slope, 0, 0, 1, 0), (1, 0, 0, slope, 1, 0))
    ]
    for name, expected in zip(("ShearX", "ShearY"), sheared, strict=True):
        assert (done(named(DEIT, name), picture, slope, bicubic=bicubic) == np.asarray(expected)).all()


def test_no_bits_are_black_as_every_pillow_had_it_that_took_none() -> None:
    posterize = named(DEIT, "PosterizeIncreasing")
    assert argument(posterize, 10.0) == 0 and not done(posterize, scene(), 0.0).any()


# AugReg, against TensorFlow's formulas and what it made of them


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Rotate", (0, 30, 45, 60)),
        ("Posterize", (1, 4, 6, 8)),  # at 0 it is none, of which TensorFlow makes one
        ("Solarize", (0, 0, 128, 0)),  # of 0, 256, 384 and 512
        ("SolarizeAdd", (0, 110, 165, 220)),
        ("Cutout", (0, 40, 60, 80)),
        ("TranslateX", (0, 100, 150, 200)),
        ("TranslateY", (0, 100, 150, 200)),
        ("ShearX", (0, 0.3, 0.45, 0.6)),
        ("ShearY", (0, 0.3, 0.45, 0.6)),
        *((name, (0.1, 1.9, 2.8, 3.7)) for name in ("Color", "Contrast", "Brightness", "Sharpness")),
    ],
)
def test_every_scale_of_augreg_goes_on_beyond_its_end(name: str, arguments: tuple[float, ...]) -> None:
    operation = named(AUGREG, name)
    found = [argument(operation, level) for level in (0.0, 10.0, 15.0, 20.0)]
    assert found == pytest.approx(arguments)
    if name[:5] in ("Rotat", "Shear", "Trans"):
        assert argument(operation, 15.0, -1.0) == pytest.approx(-arguments[2])


MADE_BY_TENSORFLOW = {
    ("AutoContrast", 0.0): 0xA219D61B,
    ("Brightness", 0.5): 0x69DBDAC4,
    ("Brightness", 3.7): 0xE876E3C1,
    ("Color", 0.5): 0x1A399F7D,
    ("Color", 1.9): 0x63FC8B43,
    ("Color", 3.7): 0x8F834CD6,
    ("Contrast", 0.5): 0x14236C4D,
    ("Contrast", 1.9): 0x2203265F,
    ("Equalize", 0.0): 0xCF69E766,
    ("Posterize", 1.0): 0x65E0BCE2,
    ("Rotate", -60.0): 0x99B77159,
    ("Rotate", 17.5): 0x02F5A4A9,
    ("Rotate", 30.0): 0xA06C7214,
    ("Sharpness", 0.5): 0xA256587F,
    ("Sharpness", 1.9): 0xBBE4BDD2,
    ("Sharpness", 3.7): 0xAC8D3214,
    ("ShearX", -0.6): 0xE5F9A79C,
    ("ShearX", 0.123): 0x4900F91A,
    ("ShearX", 0.3): 0xB9A763C9,
    ("ShearY", -0.6): 0x0F429FA9,
    ("ShearY", 0.123): 0x343072E1,
    ("ShearY", 0.3): 0x7209C7E1,
    ("Solarize", 0.0): 0x43D5B86E,
    ("TranslateX", -12.5): 0x2F76B1D1,
    ("TranslateX", 25.0): 0xAFA90163,
    ("TranslateX", 100.0): 0x3877D4B0,
    ("TranslateY", -12.5): 0x4959038E,
    ("TranslateY", 25.0): 0xCC3E7D48,
    ("TranslateY", 100.0): 0x3877D4B0,
}
"""CRC-32 of what TensorFlow 2.12 and its addons 0.21 made of `scene()`, without oneDNN, which adds in another order."""


@pytest.mark.parametrize(("name", "argument"), MADE_BY_TENSORFLOW)
def test_every_operation_of_augreg_makes_the_bytes_that_tensorflow_made(name: str, argument: float) -> None:
    assert crc32(done(named(AUGREG, name), scene(), argument).tobytes()) == MADE_BY_TENSORFLOW[name, argument]


def blended(start: np.ndarray, picture: Pixels, factor: float) -> Pixels:
    """In fp32, clipped, and cut to whole numbers."""
    a, b = start.astype(np.float32), picture.astype(np.float32)
    return np.clip(a + np.float32(factor) * (b - a), 0, 255).astype(np.uint8)


@settings(deadline=None, max_examples=25)
@given(size=ODD, factor=st.floats(0.1, 4.1))
@example(size=(15, 17), factor=0.5)  # one pixel short of the next grey
@example(size=(280, 270), factor=0.5)  # more pixels than there are greys for
def test_every_enhancement_is_a_blend_whatever_the_factor(size: tuple[int, int], factor: float) -> None:
    picture = noise(*size)
    starts = {
        "Brightness": np.zeros_like(picture),
        "Contrast": np.full_like(picture, min(255, size[0] * size[1] // 256)),
    }
    for name, start in starts.items():
        assert (done(named(AUGREG, name), picture, factor) == blended(start, picture, factor)).all()
    weights = np.array([0.2989, 0.587, 0.114])
    exact = (picture / 255 * weights).sum(-1) * 255.5
    clear = np.abs(exact - np.rint(exact)) > 1e-4  # where fp32 could not cut to another whole number
    start = np.repeat(exact.astype(np.uint8)[..., None], 3, axis=2)
    assert (done(named(AUGREG, "Color"), picture, factor) == blended(start, picture, factor))[clear].all()


@settings(deadline=None, max_examples=25)
@given(size=ODD, factor=st.floats(0.1, 4.1))
def test_sharpness_looks_at_nine_pixels_and_leaves_the_rim_as_it_is_whatever_the_size(
    size: tuple[int, int], factor: float
) -> None:
    picture = noise(*size)
    start, pixels = picture.copy(), picture.astype(np.float32)
    for y in range(1, size[0] - 1):
        for x in range(1, size[1] - 1):
            total = np.zeros(3, np.float32)
            for dy in range(3):
                for dx in range(3):
                    weight = np.float32(5 if dy == dx == 1 else 1) / np.float32(13)
                    total += pixels[y + dy - 1, x + dx - 1] * weight
            start[y, x] = total.astype(np.uint8)
    assert (done(named(AUGREG, "Sharpness"), picture, factor) == blended(start, picture, factor)).all()


def nearest(picture: Pixels, matrix: np.ndarray) -> Pixels:
    """Pixel by pixel: where the matrix (2, 3) sends it, a half rounded away from 0, grey beyond."""
    a = matrix.astype(np.float32)
    height, width, _ = picture.shape
    out = np.full_like(picture, 128)
    for y in range(height):
        for x in range(width):
            u, v = (float(row[0] * np.float32(x) + row[1] * np.float32(y) + row[2]) for row in a)
            u, v = (math.copysign(math.floor(abs(w) + 0.5), w) for w in (u, v))
            if 0 <= u < width and 0 <= v < height:
                out[y, x] = picture[int(v), int(u)]
    return out


@settings(deadline=None, max_examples=25)
@given(size=ODD, level=st.sampled_from([0.0, 0.05, 1.0, 2.5, 10.0, 20.0]) | st.floats(0, 22.4), sign=SIGNS)
def test_every_movement_takes_the_nearest_pixel_whatever_the_level(
    size: tuple[int, int], level: float, sign: float
) -> None:
    picture = noise(*size)
    rotation, slope = sign * level * 3.0, sign * level * 0.03
    cos, sin = (np.float32(f(np.float32(math.radians(rotation)).item())) for f in (math.cos, math.sin))
    bottom, right = np.float32(size[0] - 1), np.float32(size[1] - 1)
    left, top = (right - (cos * right - sin * bottom)) / 2, (bottom - (sin * right + cos * bottom)) / 2
    shift = argument(named(AUGREG, "TranslateX"), level, sign)
    matrices = {
        "Rotate": ([[cos, -sin, left], [sin, cos, top]], rotation),
        "ShearX": ([[1, slope, 0], [0, 1, 0]], slope),
        "ShearY": ([[1, 0, 0], [slope, 1, 0]], slope),
        "TranslateX": ([[1, 0, shift], [0, 1, 0]], shift),
        "TranslateY": ([[1, 0, 0], [0, 1, shift]], shift),
    }
    for name, (matrix, value) in matrices.items():
        assert (done(named(AUGREG, name), picture, value) == nearest(picture, np.array(matrix))).all(), name


def test_a_place_just_below_a_half_is_rounded_down_whatever_is_added() -> None:
    picture, below = noise(2, 6), float(np.nextafter(np.float32(0.5), np.float32(0)))
    sheared = nearest(picture, np.array([[1, below, 0], [0, 1, 0]]))
    assert (sheared[1, 0] == picture[1, 0]).all()
    assert (done(named(AUGREG, "ShearX"), picture, below) == sheared).all()


@given(value=st.integers(0, 255), level=st.floats(0, 22.49))
def test_every_value_is_inverted_cut_or_raised_by_itself(value: int, level: float) -> None:
    picture = np.full((2, 3, 3), value, np.uint8)
    bits, threshold, more = int(level / 10 * 4), int(level / 10 * 256) % 256, int(level / 10 * 110)
    kept = min(7, 8 - bits)  # TensorFlow shifts by no more
    expected = {
        "Invert": 255 - value,
        "Posterize": value >> kept << kept,
        "Solarize": value if value < threshold else 255 - value,
        "SolarizeAdd": min(255, value + more) if value < 128 else value,
    }
    for name, wanted in expected.items():
        operation = named(AUGREG, name)
        assert (done(operation, picture, argument(operation, level)) == wanted).all(), name


@pytest.mark.parametrize("place", [(0.0, 0.0), (0.5, 0.25), (0.999, 0.999), (0.2, 0.9)])
@pytest.mark.parametrize("reach", [0, 1, 7, 40, 80])
def test_a_cutout_is_a_square_around_its_place_as_far_as_the_picture_goes(
    place: tuple[float, float], reach: int
) -> None:
    picture, out = scene(), scene()
    named(AUGREG, "Cutout").change(out, Layer(float(reach), place, False))
    x, y = int(place[0] * 83), int(place[1] * 61)
    v, u = np.mgrid[:61, :83]
    inside = (u >= x - reach) & (u < x + reach) & (v >= y - reach) & (v < y + reach)
    assert (out[inside] == 128).all() and (out[~inside] == picture[~inside]).all()


@pytest.mark.parametrize("space", [AUGREG, DEIT])
@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_every_channel_of_one_value_stays_as_it_is(space: tuple[Operation, ...], name: str) -> None:
    picture = np.broadcast_to(np.array([0, 131, 255], np.uint8), (40, 30, 3)).copy()
    assert (done(named(space, name), picture, 0.0) == picture).all()
