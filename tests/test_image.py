"""Bytes to pixels: what is decoded, and how it is cut."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pipeline.data.image import central_crops, cut, decode, placed_crops, random_crops

SIZES = np.full(2000, 200), np.full(2000, 120)
SAMPLES, EPOCH = np.arange(2000), np.zeros(2000, np.int64)


def encoded(kind: str, mode: str = "RGB") -> bytes:
    pixels = np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8)
    data = BytesIO()
    Image.fromarray(pixels).convert(mode).save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind in ("PNG", "JPEG", "WEBP") for mode in ("RGB", "L")] + [("JPEG", "CMYK")],
)
def test_every_format_decodes_to_what_pillow_says(kind: str, mode: str) -> None:
    data = encoded(kind, mode)
    ours, theirs = decode(data), np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    assert ours.shape == theirs.shape and ours.dtype == np.uint8
    # decoders of JPEG and WebP may round differently
    assert np.abs(ours.astype(int) - theirs).max() <= (0 if kind == "PNG" else 4)


@pytest.mark.parametrize("data", [b"", b"not a picture", encoded("JPEG")[:100], encoded("PNG")[:60]])
def test_what_is_no_picture_is_refused_whatever_it_is(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)


def test_every_crop_is_within_its_picture_and_has_the_asked_area_and_shape() -> None:
    crops = random_crops(*SIZES, SAMPLES, EPOCH, seed=0, area=0.05, flip=True)
    assert (crops.left >= 0).all() and (crops.left + crops.width <= 200).all()
    assert (crops.top >= 0).all() and (crops.top + crops.height <= 120).all()
    share, ratio = crops.width * crops.height / 24_000, crops.width / crops.height
    whole = share == 1  # no draw fitted
    assert (share >= 0.04).all() and ((ratio[~whole] > 0.7) & (ratio[~whole] < 1.42)).all()
    assert share.mean() == pytest.approx(0.4, abs=0.1) and crops.mirrored.mean() == pytest.approx(0.5, abs=0.05)


def test_the_crop_of_a_picture_is_the_same_whatever_it_is_drawn_with() -> None:
    together = random_crops(*SIZES, SAMPLES, EPOCH, seed=0, area=0.05, flip=True)
    some = [3, 1999, 77]
    apart = random_crops(SIZES[0][some], SIZES[1][some], SAMPLES[some], EPOCH[some], seed=0, area=0.05, flip=True)
    for a, b in zip(together, apart, strict=True):
        assert (a[some] == b).all()


def test_every_epoch_and_seed_has_crops_of_its_own() -> None:
    def left(seed: int, epoch: int) -> np.ndarray:
        return random_crops(*SIZES, SAMPLES, EPOCH + epoch, seed=seed, area=0.05, flip=True).left

    assert (left(0, 0) != left(0, 1)).mean() > 0.9 and (left(0, 0) != left(1, 0)).mean() > 0.9


def test_a_placed_crop_has_its_share_of_every_side() -> None:
    crops = placed_crops(*SIZES, SAMPLES, EPOCH, seed=0, share=6 / 7, flip=False)
    assert (crops.width == round(200 * 6 / 7)).all() and (crops.height == round(120 * 6 / 7)).all()
    assert not crops.mirrored.any() and len(np.unique(crops.left)) > 20
    assert (crops.left + crops.width <= 200).all() and (crops.top + crops.height <= 120).all()


def test_the_middle_is_in_the_middle() -> None:
    crops = central_crops(np.array([256, 300]), np.array([300, 256]), share=7 / 8)
    assert crops.width.tolist() == crops.height.tolist() == [224, 224]
    assert crops.left.tolist() == [16, 38] and crops.top.tolist() == [38, 16]
    height, width = (sides.ravel() for sides in np.mgrid[1:40, 1:40])
    crops = central_crops(width, height, share=7 / 8)
    for before, kept, side in ((crops.left, crops.width, width), (crops.top, crops.height, height)):
        assert set((side - kept - 2 * before).tolist()) == {0, 1}, "as much is left out behind it as before"


def test_a_cut_without_scaling_is_the_pixels_themselves_and_a_mirrored_one_their_mirror() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    crops = central_crops(np.array([30, 30]), np.array([20, 20]), share=1.0)._replace(mirrored=np.array([False, True]))
    out = np.empty((20, 20, 3), np.uint8)
    cut(picture, crops, 0, out)
    assert (out == picture[:, 5:25]).all()
    cut(picture, crops, 1, out)
    assert (out == picture[:, 5:25][:, ::-1]).all()
