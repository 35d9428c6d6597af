"""What is done to a whole batch on the device: normalising, random erasing, mixup and CutMix.

What is drawn is drawn here, on the CPU, from (purpose, seed, epoch, sample); what is applied knows no chance. Pictures
2k and 2k + 1 of a batch are a pair, mixed with each other alone: a batch that is cut at even places gives the same
pictures, whatever the number of processes and the size of the micro-batches.

Legend: n pictures, p pairs of them, r of them with a rectangle, t pixels in rectangles, s side in pixels, m labels a
picture at the most, c classes; boxes are (top, bottom, left, right), the first of each within, the second beyond.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import Augment
from pipeline.seed import keys as seed_keys
from pipeline.seed import mixed, uniform

_ATTEMPTS = 10
_AREA = (0.02, 1 / 3)
_RATIO = (0.3, 1 / 0.3)
_NOISE = 1 << 32
"""Counter of the noise's key among the numbers of a picture; the rectangle is drawn from those before it."""


class Mixing(NamedTuple):
    """How the pictures of p pairs are mixed; both of a pair alike."""

    weight: Tensor
    """(p) float32: of a picture's own pixels outside of the box; the partner's have the rest."""
    box: Tensor
    """(p, 4) int64: where all is the partner's; without pixels for mixup."""
    share: Tensor
    """(p) float32: of a picture's own labels."""


class Erasing(NamedTuple):
    """The rectangles of r pictures in which noise stands for the picture."""

    picture: Tensor
    """(r) int64: place of the picture in the batch."""
    box: Tensor
    """(r, 4) int64."""
    key: Tensor
    """(r) int64: what decides the noise."""
    pixels: int
    """In all the rectangles together; a number of the host, so that nobody waits for the device to tell."""


@dataclass(frozen=True, eq=False)
class Draws:
    """What chance has in store for n pictures; None for what is not asked for or meets none of them."""

    mixing: Mixing | None
    erasing: Erasing | None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Draws":
        """The same on a device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        mixing, erasing = self.mixing, self.erasing
        if mixing is not None:
            mixing = Mixing(*map(moved, mixing))
        if erasing is not None:
            erasing = Erasing(moved(erasing.picture), moved(erasing.box), moved(erasing.key), erasing.pixels)
        return Draws(mixing, erasing)


def draw(
    augment: Augment, sample: NDArray[np.int64], epoch: NDArray[np.int64], *, seed: int, side: int
) -> Draws | None:
    """What happens to pictures of `side` pixels, of the numbers `sample` (n) in their epochs `epoch` (n).

    Mixing is drawn for a pair, by (seed, epoch, sample) of its first picture; n is even where it is asked for. A
    rectangle is drawn for each picture by its own. None where nothing is asked for.
    """
    wants_mixing = augment.mixup > 0 or augment.cutmix > 0
    if not wants_mixing and augment.erase <= 0:
        return None
    assert not wants_mixing or len(sample) % 2 == 0, f"{len(sample)} pictures are not pairs"
    mixing = _mixing(augment, seed_keys("mix", seed, epoch[::2], sample[::2]), side) if wants_mixing else None
    return Draws(mixing, _erasing(augment.erase, seed_keys("erase", seed, epoch, sample), side))


def normalised(images: Tensor) -> Tensor:
    """(n, s, s, 3) of uint8 to (n, 3, s, s) of float32 in [-1, 1], in the same order of memory: channels last."""
    return images.float().div_(127.5).sub_(1).permute(0, 3, 1, 2)


def applied(images: Tensor, draws: Draws | None) -> Tensor:
    """Normalised pictures (n, 3, s, s), float32, erased and then mixed (the order of DeiT); `images` stay as they are.

    `draws` are on the device of the pictures, which is never waited for. Channels last stay channels last.
    """
    if draws is None:
        return images
    pixels = images.permute(0, 2, 3, 1)  # n s s 3
    if draws.erasing is not None:
        pixels = _erased(pixels, draws.erasing)
    if draws.mixing is not None:
        pixels = _mixed(pixels, draws.mixing)
    return pixels.permute(0, 3, 1, 2)


def targets(labels: Tensor, draws: Draws | None, classes: int) -> Tensor:
    """The share (n, c) that each class has in the pictures, of `labels` (n, m) with -1 where there are fewer.

    Ones and zeros without mixing. With it a picture's labels have its share, its partner's the rest, and a class of
    both has the sum: rows add up to 1 where each picture has one label.
    """
    hot = torch.zeros(len(labels), classes + 1, device=labels.device)
    hot = hot.scatter_(1, labels.where(labels >= 0, classes), 1.0)[:, :classes]
    if draws is None or draws.mixing is None:
        return hot
    return _weighed(hot, draws.mixing.share[:, None, None])


def _mixing(augment: Augment, keys: NDArray[np.uint64], side: int) -> Mixing:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), each for half of the pairs where both are given.

    AugReg takes the larger of a share and the rest: with both pictures of a pair made, that gives the same two.
    """
    from scipy.special import betaincinv  # takes a fifth of a second to import, which other runs do without

    kind, level, x, y = uniform(keys[:, None], np.arange(4)).T
    cut = (kind < (0.5 if augment.mixup > 0 else 1.0)) & (augment.cutmix > 0)
    shape = np.where(cut, augment.cutmix, augment.mixup)
    drawn = betaincinv(shape, shape, level)
    box = _boxes(drawn, x, y, side) * cut[:, None]
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    columns = np.where(cut, 1.0, drawn), np.where(cut, 1 - area / side**2, drawn)
    weight, share = (torch.from_numpy(column.astype(np.float32)) for column in columns)
    return Mixing(weight, torch.from_numpy(box), share)


def _boxes(share: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64], side: int) -> NDArray[np.int64]:
    """Boxes (p, 4) that leave about `share` of a picture, around uniform centres, cut off at its edges.

    Yun et al. 2019, section 3 and its code, which rounds half of the box's side down.
    """
    half = (side * np.sqrt(1 - share)).astype(np.int64) // 2
    row, column = (y * side).astype(np.int64), (x * side).astype(np.int64)
    return np.stack([row - half, row + half, column - half, column + half], 1).clip(0, side)


def _erasing(share: float, keys: NDArray[np.uint64], side: int) -> Erasing | None:
    """Random erasing (Zhong et al. 2020) of about `share` of the pictures, with the constants of timm and DeiT."""
    chosen = np.flatnonzero(uniform(keys, 0) < share)
    box, fits = _rectangles(keys[chosen], side)
    chosen, box = chosen[fits], box[fits]
    if not len(chosen):
        return None
    pixels = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    key = mixed(keys[chosen], np.array([_NOISE])).view(np.int64)
    return Erasing(torch.from_numpy(chosen), torch.from_numpy(box), torch.from_numpy(key), int(pixels.sum()))


def _rectangles(keys: NDArray[np.uint64], side: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each key the first rectangle of ten draws that is smaller than a picture, and whether there is one."""
    draws = uniform(keys[:, None], np.arange(1, 4 * _ATTEMPTS + 1))
    share, shape, x, y = draws.reshape(-1, _ATTEMPTS, 4).transpose(2, 0, 1)  # r, attempts each
    area = (_AREA[0] + share * (_AREA[1] - _AREA[0])) * side**2
    ratio = np.exp(np.log(_RATIO[0]) + shape * (np.log(_RATIO[1]) - np.log(_RATIO[0])))
    height = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    width = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (np.minimum(height, width) > 0) & (np.maximum(height, width) < side)
    first = (np.arange(len(keys)), fits.argmax(1))
    height, width = height[first], width[first]
    top, left = (y[first] * (side - height + 1)).astype(np.int64), (x[first] * (side - width + 1)).astype(np.int64)
    return np.stack([top, top + height, left, left + width], 1), fits.any(1)


def _erased(pixels: Tensor, erasing: Erasing) -> Tensor:
    """Pixels (n, s, s, 3) with noise of N(0, 1) in the rectangles, decided by a picture's key and a pixel's place."""
    side = pixels.shape[1]
    top, bottom, left, right = erasing.box.unbind(1)
    width = right - left
    count = (bottom - top) * width
    which = torch.repeat_interleave(count, output_size=erasing.pixels)  # t
    before = torch.arange(erasing.pixels, device=pixels.device) - (count.cumsum(0) - count)[which]
    pixel = (top[which] + before // width[which]) * side + left[which] + before % width[which]
    noise = _noise(erasing.key[which], pixel)  # t 3
    place = erasing.picture[which] * side**2 + pixel
    return pixels.flatten(0, 2).index_copy(0, place, noise).view(pixels.shape)


def _noise(key: Tensor, pixel: Tensor) -> Tensor:
    """Three numbers of N(0, 1) for each of t keys and pixels, by Box and Muller 1958 from 24 bits each way."""
    bits = _bits(key[:, None], 3 * pixel[:, None] + torch.arange(3, device=pixel.device))
    radius = ((_shifted(bits, 40) + 1) * 2.0**-24).log().mul(-2).sqrt()
    turn = (bits & 0xFFFFFF) * 2.0**-24
    return radius * (turn * (2 * torch.pi)).cos()


def _bits(key: Tensor, counter: Tensor) -> Tensor:
    """`pipeline.seed.mixed` on the device: int64 that hold the same bits, since overflow wraps in both."""
    state = key + (counter + 1) * _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, by: int) -> Tensor:
    """Shifted right as if without a sign."""
    return (state >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64)


def _mixed(pixels: Tensor, mixing: Mixing) -> Tensor:
    """Pixels (n, s, s, 3), each the weighed sum of its own and its partner's."""
    at = torch.arange(pixels.shape[1], device=pixels.device)
    top, bottom, left, right = mixing.box.unbind(1)
    rows = (at >= top[:, None]) & (at < bottom[:, None])  # p s
    columns = (at >= left[:, None]) & (at < right[:, None])
    own = mixing.weight[:, None, None].masked_fill(rows[:, :, None] & columns[:, None, :], 0.0)  # p s s
    return _weighed(pixels, own[:, None, :, :, None])


def _weighed(both: Tensor, own: Tensor) -> Tensor:
    """(n, ...) of pairs: each times `own` (p, 1, ...), plus its partner times the rest."""
    pairs = both.unflatten(0, (-1, 2))
    partners = pairs.flip(1).mul_(1 - own)
    return pairs.mul(own).add_(partners).flatten(0, 1)
