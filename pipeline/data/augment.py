"""RandAugment (Cubuk et al. 2020): what is done to a training picture after its crop, and the doing of it.

Two spaces, each with the operations, the scales and the rounding of its reference:

- `augreg`: of "How to train your ViT" (Steiner et al. 2022, section 3.3), big_vision's `pp/autoaugment.py`, which is
  the TPU EfficientNet's. Every layer is done, at one magnitude. What TensorFlow made of it is kept where it differs
  from what was meant: thresholds of Solarize wrap at 256 (big_vision, issue 110), and Contrast turns pictures towards
  the grey h w / 256 rather than towards their mean (which later versions of big_vision corrected).
- `deit`: of DeiT (Touvron et al. 2021, table 9), timm's `rand-m9-mstd0.5-inc1`. Every layer is done to half of the
  pictures, at a magnitude that varies, by Pillow's arithmetic.

Legend: n pictures, l layers, h w pixels, all pictures RGB and uint8.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import Augment
from pipeline.data.image import Pixels
from pipeline.seed import keys, uniform

Floats = NDArray[np.float64]
Row = tuple[float | np.float32, float | np.float32, float | np.float32]

NOTHING = -1
"""The operation of a layer that is left out."""

_GREY = (128, 128, 128)
_MEAN = (124, 116, 104)  # ImageNet's, as timm rounds it
_SCALE = 10.0
_DRAWS = 8  # of each layer
_DEVIATION = 0.5


class Changes(NamedTuple):
    """For n pictures and l layers what is done, in the order of the layers."""

    operation: NDArray[np.int64]
    """(n, l) place in `OPERATIONS`, or `NOTHING`."""
    argument: Floats
    """(n, l) degrees, pixels, slope, share of the side, factor, bits or level, as the operation takes it."""
    place: Floats
    """(n, l, 2) where a cutout's middle is: shares of width and height, in [0, 1)."""
    bicubic: NDArray[np.bool_]
    """(n, l) whether DeiT's geometry looks at sixteen pixels rather than at four."""


class Layer(NamedTuple):
    """One layer of one picture: an entry of each column of `Changes` but the first."""

    argument: float
    place: tuple[float, float]
    bicubic: bool


class Operation(NamedTuple):
    """What a magnitude and a sign (1 or -1) mean to an operation, and the operation itself, in place."""

    name: str
    argument: Callable[[Floats, Floats], Floats]
    change: Callable[[Pixels, Layer], None]


def random_changes(sample: NDArray[np.int64], epoch: NDArray[np.int64], *, seed: int, augment: Augment) -> Changes:
    """What is done to each picture: a function of (seed, epoch, sample), whatever is drawn beside it.

    Operations are drawn uniformly and with replacement. ValueError where a layer count or a magnitude has no meaning.
    """
    _check(augment)
    draws = _draws(sample, epoch, seed, augment.layers)
    deit = augment.space == "deit"
    space, first = (DEIT, len(AUGREG)) if deit else (AUGREG, 0)
    kind = (draws[..., 0] * len(space)).astype(np.int64)
    done = (draws[..., 1] < 0.5) | (not deit)
    sign = np.where(draws[..., 2] < 0.5, -1.0, 1.0)
    level = np.full(kind.shape, augment.magnitude)
    if deit:
        level = np.clip(level + _DEVIATION * _normal(draws[..., 3], draws[..., 4]), 0.0, _SCALE)
    argument = np.zeros(kind.shape)
    for one, operation in enumerate(space):
        here = done & (kind == one)
        argument[here] = operation.argument(level[here], sign[here])
    return Changes(np.where(done, first + kind, NOTHING), argument, draws[..., 5:7], draws[..., 7] < 0.5)


def change(picture: Pixels, changes: Changes, i: int) -> None:
    """Do to a picture (h, w, 3), contiguous, in place, what `changes` says of picture `i`."""
    assert picture.flags.c_contiguous and picture.dtype == np.uint8 and picture.shape[2:] == (3,), "RGB, row after row"
    for layer, which in enumerate(changes.operation[i].tolist()):
        if which != NOTHING:
            x, y = changes.place[i, layer].tolist()
            argument, bicubic = changes.argument[i, layer].item(), changes.bicubic[i, layer].item()
            OPERATIONS[which].change(picture, Layer(argument, (x, y), bicubic))


def _check(augment: Augment) -> None:
    layers, magnitude = augment.layers, augment.magnitude
    if layers < 0:
        raise ValueError(f"augment.layers is {layers}; it is at least 0, and 0 changes nothing")
    # From 22.5 on, Posterize would keep nine bits, and TensorFlow refuses to shift by less than none.
    if augment.space == "augreg" and not 0 <= magnitude < 22.5:
        raise ValueError(f"augment.magnitude is {magnitude}; for augment.space augreg it is at least 0 and below 22.5")
    if augment.space == "deit" and not 0 <= magnitude <= _SCALE:
        raise ValueError(f"augment.magnitude is {magnitude}; for augment.space deit it is from 0 to {_SCALE:g}")


def _draws(sample: NDArray[np.int64], epoch: NDArray[np.int64], seed: int, layers: int) -> Floats:
    counters = np.arange(layers * _DRAWS).reshape(layers, _DRAWS)
    return uniform(keys("augment", seed, epoch, sample)[:, None, None], counters)  # n, l, draws


def _normal(first: Floats, second: Floats) -> Floats:
    """A standard normal number of two uniform ones (Box and Muller 1958)."""
    exact = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
    # Logarithms differ between machines in their last digit; what is drawn must not.
    return np.asarray(exact.round(6), np.float64)


# What both references do alike


def _look_up(picture: Pixels, table: NDArray[Any]) -> None:
    """Replace each value by what the table (256), or that of its channel (256, 3), says; it is cut to whole numbers."""
    values = np.clip(table, 0, 255).astype(np.uint8)
    cv2.LUT(picture, values.reshape(1, 256, -1), picture)


def _blend(start: Pixels, picture: Pixels, factor: float) -> None:
    """Go from `start` towards the picture, and beyond it where the factor is above 1; fp32, clipped and cut.

    Pillow's blend is TensorFlow's: start + factor * (picture - start), rounded once a term.
    """
    blended = Image.blend(_bytes(start), _bytes(picture), factor)
    picture[:] = np.asarray(blended).reshape(picture.shape)


def _bytes(picture: Pixels) -> Image.Image:
    """The same memory as a grey picture three times as wide: Pillow keeps four bytes for a pixel of three."""
    height, width, _ = picture.shape
    return Image.frombuffer("L", (3 * width, height), picture, "raw", "L", 0, 1)


def _thrice(plane: Pixels) -> Pixels:
    """A plane (h, w) as all three channels of a picture."""
    return cv2.merge([plane] * 3).astype(np.uint8, copy=False)


def _blend_from_grey(grey: int, picture: Pixels, factor: float) -> None:
    """`_blend` from a picture of one grey."""
    start = np.float32(grey)
    _look_up(picture, start + np.float32(factor) * (np.arange(256, dtype=np.float32) - start))


def _brightness(picture: Pixels, layer: Layer) -> None:
    _blend_from_grey(0, picture, layer.argument)


def _sharpness(picture: Pixels, layer: Layer, *, smooth: Callable[[Pixels], Pixels]) -> None:
    """Away from, or towards, a picture smoothed by the kernel ((1 1 1) (1 5 1) (1 1 1)) / 13, whose rim stays."""
    start = picture.copy()
    if min(picture.shape[:2]) > 2:
        start[1:-1, 1:-1] = smooth(picture)
    _blend(start, picture, layer.argument)


def _invert(picture: Pixels, _: Layer) -> None:
    np.bitwise_not(picture, out=picture)


def _posterize(picture: Pixels, layer: Layer) -> None:
    np.bitwise_and(picture, np.uint8(0xFF00 >> int(layer.argument) & 0xFF), out=picture)


def _solarize(picture: Pixels, layer: Layer) -> None:
    values = np.arange(256)
    _look_up(picture, np.where(values < layer.argument, values, 255 - values))


def _solarize_add(picture: Pixels, layer: Layer) -> None:
    values = np.arange(256)
    _look_up(picture, np.where(values < 128, values + layer.argument, values))


def _equalize(picture: Pixels, _: Layer) -> None:
    table = np.empty((256, 3), np.int64)
    for channel in range(3):
        counts = cv2.calcHist([picture], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        before = np.cumsum(counts) - counts
        table[:, channel] = (before + step // 2) // step if step else np.arange(256)
    _look_up(picture, table)


def _autocontrast(picture: Pixels, _: Layer, *, kind: type[np.floating]) -> None:
    """Spread each channel over all values; Pillow counts in fp64, TensorFlow in fp32."""
    values, table = np.arange(256, dtype=kind), np.empty((256, 3), kind)
    for channel, plane in enumerate(cv2.split(picture)):
        low, high = kind(plane.min()), kind(plane.max())
        scale = kind(255) / (high - low) if high > low else kind(1)
        table[:, channel] = values * scale + -low * scale if high > low else values
    _look_up(picture, table)


# AugReg's, by TensorFlow's arithmetic


def _grey_tensorflow(picture: Pixels) -> Pixels:
    """`tf.image.rgb_to_grayscale`: weights in fp32, one channel after another, cut to whole numbers."""
    red, green, blue = (plane.astype(np.float32) * np.float32(1 / 255) for plane in cv2.split(picture))
    total = red * np.float32(0.2989)
    total += green * np.float32(0.587)
    total += blue * np.float32(0.114)
    total *= np.float32(255.5)
    return total.astype(np.uint8)


def _color_tensorflow(picture: Pixels, layer: Layer) -> None:
    _blend(_thrice(_grey_tensorflow(picture)), picture, layer.argument)


def _contrast_tensorflow(picture: Pixels, layer: Layer) -> None:
    grey = min(255, picture.shape[0] * picture.shape[1] // 256)
    _blend_from_grey(grey, picture, layer.argument)


def _smooth_tensorflow(picture: Pixels) -> Pixels:
    """(h - 2, w - 2, 3), summed in fp32 row after row of the kernel, and cut to whole numbers."""
    height, width, _ = picture.shape
    pixels = picture.astype(np.float32).ravel()
    heavy = pixels * (np.float32(5) / np.float32(13))
    light = np.multiply(pixels, np.float32(1) / np.float32(13), out=pixels)
    # In one piece, over the ends of rows too: what is summed there is left out at the end.
    count = (height - 2) * width * 3 - 6
    total = np.empty((height - 2) * width * 3, np.float32)
    total[count:] = 0
    sums = total[:count]
    sums[:] = light[:count]
    for y, x in ((0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)):
        start = (y * width + x) * 3
        sums += (heavy if (y, x) == (1, 1) else light)[start : start + count]
    return total.astype(np.uint8).reshape(height - 2, width, 3)[:, :-2]


def _cutout(picture: Pixels, layer: Layer) -> None:
    """A grey square of twice `argument` a side, as much of it as lies in the picture."""
    height, width, _ = picture.shape
    x, y, reach = int(layer.place[0] * width), int(layer.place[1] * height), int(layer.argument)
    picture[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach] = 128


def _rotate_tensorflow(picture: Pixels, layer: Layer) -> None:
    """About the middle of the picture, as `contrib.image.rotate`: its matrix is worked out in fp32."""
    radians = float(np.float32(layer.argument * (math.pi / 180)))
    cos, sin = np.float32(math.cos(radians)), np.float32(math.sin(radians))
    right, bottom = np.float32(picture.shape[1] - 1), np.float32(picture.shape[0] - 1)
    left = (right - (cos * right - sin * bottom)) / np.float32(2)
    top = (bottom - (sin * right + cos * bottom)) / np.float32(2)
    _take_nearest(picture, ((cos, -sin, left), (sin, cos, top)))


def _shear_x_tensorflow(picture: Pixels, layer: Layer) -> None:
    _take_nearest(picture, ((1, layer.argument, 0), (0, 1, 0)))


def _shear_y_tensorflow(picture: Pixels, layer: Layer) -> None:
    _take_nearest(picture, ((1, 0, 0), (layer.argument, 1, 0)))


def _translate_x_tensorflow(picture: Pixels, layer: Layer) -> None:
    if layer.argument.is_integer():
        _shift(picture, 1, int(layer.argument))
    else:
        _take_nearest(picture, ((1, 0, layer.argument), (0, 1, 0)))


def _translate_y_tensorflow(picture: Pixels, layer: Layer) -> None:
    if layer.argument.is_integer():
        _shift(picture, 0, int(layer.argument))
    else:
        _take_nearest(picture, ((1, 0, 0), (0, 1, layer.argument)))


def _shift(picture: Pixels, axis: int, pixels: int) -> None:
    """Take each pixel from so many pixels further along the axis; grey from beyond the picture."""
    side = picture.shape[axis]
    start, end = min(max(0, pixels), side), max(min(side, side + pixels), 0)
    before, after = max(0, -pixels), max(0, pixels)
    ((top, bottom), (left, right)) = ((before, after), (0, 0)) if axis == 0 else ((0, 0), (before, after))
    within = picture[start:end] if axis == 0 else picture[:, start:end]
    if not within.size:
        picture[:] = _GREY[0]
        return
    picture[:] = cv2.copyMakeBorder(within, top, bottom, left, right, cv2.BORDER_CONSTANT, value=_GREY)


def _take_nearest(picture: Pixels, matrix: tuple[Row, Row]) -> None:
    """Each pixel from where the matrix sends it, in fp32, a half rounded away from 0; grey from beyond the picture.

    `contrib.image.transform`: the place is rounded first and looked for in the picture then.
    """
    height, width, _ = picture.shape
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    places = np.empty((height, width, 2), np.int16)
    # The largest number below a half: added to another fp32 number it rounds as a half should.
    half = np.nextafter(np.float32(0.5), np.float32(0))
    for axis, row in enumerate(matrix):
        a, b, c = np.array(row, np.float32)
        at = (a * x)[None, :] + (b * y)[:, None]
        at += c
        at += np.copysign(half, at)
        places[..., axis] = at
    border = {"borderMode": cv2.BORDER_CONSTANT, "borderValue": _GREY}
    picture[:] = cv2.remap(picture, places, np.empty(0), cv2.INTER_NEAREST, **border)


# DeiT's, by Pillow's arithmetic


def _color_pillow(picture: Pixels, layer: Layer) -> None:
    grey = np.asarray(Image.fromarray(picture).convert("L"))
    _blend(_thrice(grey), picture, layer.argument)


def _contrast_pillow(picture: Pixels, layer: Layer) -> None:
    grey = np.asarray(Image.fromarray(picture).convert("L"))
    mean = int(int(grey.sum(dtype=np.int64)) / grey.size + 0.5)
    _blend_from_grey(mean, picture, layer.argument)


def _smooth_pillow(picture: Pixels) -> Pixels:
    """(h - 2, w - 2, 3), to the nearest whole number; a thirteenth never is a half."""
    total = cv2.boxFilter(picture, cv2.CV_16U, (3, 3), normalize=False)[1:-1, 1:-1]
    total += picture[1:-1, 1:-1].astype(np.uint16) << 2
    total += np.uint16(6)
    total //= np.uint16(13)
    return total.astype(np.uint8)


def _rotate_pillow(picture: Pixels, layer: Layer) -> None:
    how = Image.Resampling.BICUBIC if layer.bicubic else Image.Resampling.BILINEAR
    picture[:] = np.asarray(Image.fromarray(picture).rotate(layer.argument, how, fillcolor=_MEAN))


def _shear_x_pillow(picture: Pixels, layer: Layer) -> None:
    _slide(picture, layer.argument, 0.0, layer.bicubic)


def _shear_y_pillow(picture: Pixels, layer: Layer) -> None:
    _slide_down(picture, layer.argument, 0.0, layer.bicubic)


def _translate_x_pillow(picture: Pixels, layer: Layer) -> None:
    _slide(picture, 0.0, layer.argument * picture.shape[1], layer.bicubic)


def _translate_y_pillow(picture: Pixels, layer: Layer) -> None:
    _slide_down(picture, 0.0, layer.argument * picture.shape[0], layer.bicubic)


def _slide_down(picture: Pixels, slope: float, offset: float, bicubic: bool) -> None:
    turned = cv2.transpose(picture).astype(np.uint8, copy=False)
    _slide(turned, slope, offset, bicubic)
    cv2.transpose(turned, picture)


def _slide(picture: Pixels, slope: float, offset: float, bicubic: bool) -> None:
    """Take each pixel from `slope` times its row plus `offset` pixels further right.

    Pillow's affine transform where rows stay rows, to the last bit: it interpolates in fp64 between whole rows too,
    which adds nothing but time.
    """
    height, width, _ = picture.shape
    rows = height if slope else 1  # without a slope all rows are alike
    at = (np.arange(width) + 0.5)[None, :] + (slope * (np.arange(rows) + 0.5))[:, None]
    at += offset
    outside = (at < 0) | (at >= width)
    at -= 0.5
    first = np.floor(at[:, :1])
    # How far behind the pixel on its left: rounding can make that 1, but no more, and 1 is the next pixel itself.
    at -= first + np.arange(width)
    planes = cv2.split(_neighbours(picture, first.astype(np.int16)))
    moved = [(_cubic if bicubic else _linear)(plane.astype(np.float64), at) for plane in planes]
    for plane, mean in zip(moved, _MEAN, strict=True):
        np.copyto(plane, np.uint8(mean), where=outside)
    cv2.merge(moved, picture)


def _neighbours(picture: Pixels, first: NDArray[np.int16]) -> Pixels:
    """(h, w + 3, 3): rows that begin one pixel before `first` (h or 1, 1), and go on with the rim beyond it."""
    height, width, _ = picture.shape
    if len(first) == 1:
        start, end = first.item() - 1, first.item() + width + 2
        within = picture[:, max(start, 0) : min(end, width)]
        return _bordered(within, max(-start, 0), max(end - width, 0))
    places = np.empty((height, width + 3, 2), np.int16)
    np.add(first, np.arange(-1, width + 2, dtype=np.int16), out=places[..., 0])
    places[..., 1] = np.arange(height)[:, None]
    found = cv2.remap(picture, places, np.empty(0), cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    return found.astype(np.uint8, copy=False)


def _bordered(picture: Pixels, left: int, right: int) -> Pixels:
    return cv2.copyMakeBorder(picture, 0, 0, left, right, cv2.BORDER_REPLICATE).astype(np.uint8, copy=False)


def _linear(near: Floats, at: Floats) -> Pixels:
    left, right = near[:, 1:-2], near[:, 2:-1]
    value = right - left
    value *= at
    value += left
    return value.astype(np.uint8)


def _cubic(near: Floats, at: Floats) -> Pixels:
    """Keys' convolution with a = -1, as a polynomial in the way Pillow writes it."""
    a, b, c, d = near[:, :-3], near[:, 1:-2], near[:, 2:-1], near[:, 3:]
    value = d - c
    slope = a - b
    value -= slope
    slope -= value
    value *= at
    value += slope
    value *= at
    value += np.subtract(c, a, out=slope)
    value *= at
    value += b
    return np.clip(value, 0, 255, out=value).astype(np.uint8)


# What a level and a sign mean


def _no_argument(level: Floats, _: Floats) -> Floats:
    return np.zeros_like(level)


def _signed(most: float) -> Callable[[Floats, Floats], Floats]:
    """Up to `most` at a level of 10, to either side."""
    return lambda level, sign: sign * (level / _SCALE * most)


def _whole(most: float) -> Callable[[Floats, Floats], Floats]:
    """Up to `most` at a level of 10, cut to a whole number."""
    return lambda level, _: np.trunc(level / _SCALE * most)


def _enhanced(level: Floats, _: Floats) -> Floats:
    return level / _SCALE * 1.8 + 0.1


def _enhanced_either_way(level: Floats, sign: Floats) -> Floats:
    return np.maximum(0.1, 1.0 + sign * (level / _SCALE * 0.9))


def _kept_bits(level: Floats, _: Floats) -> Floats:
    """TensorFlow shifts by no more than seven places, so one bit stays where none was asked for."""
    return np.maximum(1.0, np.trunc(level / _SCALE * 4))


AUGREG = (
    Operation("AutoContrast", _no_argument, partial(_autocontrast, kind=np.float32)),
    Operation("Equalize", _no_argument, _equalize),
    Operation("Invert", _no_argument, _invert),
    Operation("Rotate", _signed(30.0), _rotate_tensorflow),
    Operation("Posterize", _kept_bits, _posterize),
    Operation("Solarize", lambda level, _: np.trunc(level / _SCALE * 256) % 256, _solarize),
    Operation("Color", _enhanced, _color_tensorflow),
    Operation("Contrast", _enhanced, _contrast_tensorflow),
    Operation("Brightness", _enhanced, _brightness),
    Operation("Sharpness", _enhanced, partial(_sharpness, smooth=_smooth_tensorflow)),
    Operation("ShearX", _signed(0.3), _shear_x_tensorflow),
    Operation("ShearY", _signed(0.3), _shear_y_tensorflow),
    Operation("TranslateX", _signed(100.0), _translate_x_tensorflow),
    Operation("TranslateY", _signed(100.0), _translate_y_tensorflow),
    Operation("Cutout", _whole(40), _cutout),
    Operation("SolarizeAdd", _whole(110), _solarize_add),
)
"""Pixels for translations and cutout, degrees, and as many bits as are kept: fewer at a lower magnitude."""

DEIT = (
    Operation("AutoContrast", _no_argument, partial(_autocontrast, kind=np.float64)),
    Operation("Equalize", _no_argument, _equalize),
    Operation("Invert", _no_argument, _invert),
    Operation("Rotate", _signed(30.0), _rotate_pillow),
    Operation("PosterizeIncreasing", lambda level, _: 4 - np.trunc(level / _SCALE * 4), _posterize),
    Operation("SolarizeIncreasing", lambda level, _: 256 - np.trunc(level / _SCALE * 256), _solarize),
    Operation("SolarizeAdd", _whole(110), _solarize_add),
    Operation("ColorIncreasing", _enhanced_either_way, _color_pillow),
    Operation("ContrastIncreasing", _enhanced_either_way, _contrast_pillow),
    Operation("BrightnessIncreasing", _enhanced_either_way, _brightness),
    Operation("SharpnessIncreasing", _enhanced_either_way, partial(_sharpness, smooth=_smooth_pillow)),
    Operation("ShearX", _signed(0.3), _shear_x_pillow),
    Operation("ShearY", _signed(0.3), _shear_y_pillow),
    Operation("TranslateXRel", _signed(0.45), _translate_x_pillow),
    Operation("TranslateYRel", _signed(0.45), _translate_y_pillow),
)
"""Translations are shares of the side; every operation but the first three grows stronger with the magnitude."""

OPERATIONS = AUGREG + DEIT
