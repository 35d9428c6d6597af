"""From a JPEG's bytes to a crop: the pixels of a full decode, scaled well, and damage that is named and harmless."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from io import BytesIO

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.data import decode
from pipeline.data.decode import crop_picture, cut_from
from pipeline.data.image import central_crops, scale
from tests.rings import count

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]

compiled = pytest.mark.skipif(decode.vitscale_crop is None, reason="the kernel has not been compiled")
WIDTH, HEIGHT = 150, 117
KINDS: list[dict[str, object]] = [
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"subsampling": 2, "progressive": True},
    {"subsampling": 2, "restart_marker_blocks": 3},
    {"mode": "L"},
    {"mode": "L", "progressive": True},
]


@cache
def natural(width: int, height: int) -> Pixels:
    """Coloured noise whose spectrum falls as a photograph's does."""
    random = np.random.default_rng(0)
    distance = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width)
    spectrum = np.fft.fft2(random.normal(size=(4, height, width))) / np.maximum(distance, 1) ** 1.2
    noise = np.fft.ifft2(spectrum).real
    noise /= noise.std((1, 2), keepdims=True)
    return np.clip(128 + 45 * noise[0, ..., None] + 15 * noise[1:].transpose(1, 2, 0), 0, 255).astype(np.uint8)


def encoded(pixels: Pixels, mode: str = "RGB", **how: object) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **{"quality": 90, **how})
    return file.getvalue()


@cache
def file_of(kind: int) -> bytes:
    return encoded(natural(WIDTH, HEIGHT), **KINDS[kind])  # type: ignore[arg-type]


def opened(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data)).convert("RGB")


def crop(data: bytes, box: Box, width: int, height: int, *, mirrored: bool = False, antialiased: bool = True) -> Pixels:
    out = np.empty((height, width, 3), np.uint8)
    crop_picture(data, *box, out, mirrored=mirrored, antialiased=antialiased)
    return out


def by_kernel(data: bytes, box: Box, width: int, height: int) -> Pixels:
    """Without anything to fall back on."""
    out = np.empty((height, width, 3), np.uint8)
    decode.vitscale_crop.crop(data, out, *box, height, width, False, True)  # type: ignore[union-attr]
    return out


def decibels(a: Pixels, b: Pixels) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9)))


def similarity(a: Pixels, b: Pixels) -> float:
    """SSIM (Wang et al. 2004) over blocks of 8 x 8 of the mean of the channels."""

    def blocks(pixels: Pixels) -> NDArray[np.float64]:
        grey = pixels.mean(2)[: len(pixels) // 8 * 8, : pixels.shape[1] // 8 * 8]
        return grey.reshape(len(grey) // 8, 8, -1, 8).swapaxes(1, 2).reshape(-1, 64)

    x, y = blocks(a), blocks(b)
    mean_x, mean_y, var_x, var_y = x.mean(1), y.mean(1), x.var(1), y.var(1)
    both = ((x - mean_x[:, None]) * (y - mean_y[:, None])).mean(1)
    one, two = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mean_x * mean_y + one) / (mean_x**2 + mean_y**2 + one)
    return float((light * (2 * both + two) / (var_x + var_y + two)).mean())


@st.composite
def boxes(draw: st.DrawFn, width: int = WIDTH, height: int = HEIGHT) -> Box:
    w, h = draw(st.integers(1, width)), draw(st.integers(1, height))
    return draw(st.integers(0, width - w)), draw(st.integers(0, height - h)), w, h


@compiled
@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(KINDS) - 1), boxes(), st.booleans())
def test_the_pixels_of_every_box_are_those_of_the_full_decode(kind: int, box: Box, mirrored: bool) -> None:
    left, top, width, height = box
    whole = np.asarray(opened(file_of(kind)))[top : top + height, left : left + width]
    ours = by_kernel(file_of(kind), box, width, height)
    assert (ours == whole).all()
    again = crop(file_of(kind), box, width, height, mirrored=mirrored)
    assert (again == (ours[:, ::-1] if mirrored else ours)).all()


@compiled
@settings(max_examples=100, deadline=None)
@given(boxes(), st.integers(1, 80), st.integers(1, 80), st.booleans())
def test_a_mirrored_crop_is_the_mirror_of_the_crop_whatever_the_scale(
    box: Box, width: int, height: int, antialiased: bool
) -> None:
    straight = crop(file_of(2), box, width, height, antialiased=antialiased)
    mirrored = crop(file_of(2), box, width, height, mirrored=True, antialiased=antialiased)
    assert (mirrored == straight[:, ::-1]).all()


@compiled
@pytest.mark.parametrize("kind", [{"subsampling": 0}, {"subsampling": 2}, {"subsampling": 2, "progressive": True}])
@pytest.mark.parametrize("size", [(224, 224), (96, 160), (64, 64), (24, 24)])
def test_every_crop_is_nearly_what_pillow_makes_of_it(kind: dict[str, object], size: tuple[int, int]) -> None:
    data, random = encoded(natural(500, 375), **kind), np.random.default_rng(0)  # type: ignore[arg-type]
    whole = opened(data)
    for _ in range(12):
        width, height = random.integers(100, 500).item(), random.integers(100, 375).item()
        left, top = random.integers(0, 501 - width).item(), random.integers(0, 376 - height).item()
        theirs = whole.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR)
        ours = by_kernel(data, (left, top, width, height), *size)
        assert decibels(ours, np.asarray(theirs)) >= 50
        assert similarity(ours, np.asarray(theirs)) >= 0.998


@compiled
@settings(max_examples=60, deadline=None)
@given(boxes(), st.integers(1, 120), st.integers(1, 120))
def test_without_antialiasing_it_is_opencvs_bilinear_whatever_the_scale(box: Box, width: int, height: int) -> None:
    ours, theirs = crop(file_of(1), box, width, height, antialiased=False), np.empty((height, width, 3), np.uint8)
    scale(np.asarray(opened(file_of(1))), *box, theirs, antialiased=False)
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@compiled
def test_the_kernel_and_what_stands_in_for_it_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    data, random = encoded(natural(500, 375), subsampling=2), np.random.default_rng(1)
    sizes = random.integers((100, 100), (500, 375), (40, 2))
    some = [(random.integers(0, 501 - w).item(), random.integers(0, 376 - h).item(), w, h) for w, h in sizes.tolist()]
    ours = [crop(data, box, 224, 224, mirrored=True) for box in some]
    monkeypatch.setattr(decode, "vitscale_crop", None)
    theirs = [crop(data, box, 224, 224, mirrored=True) for box in some]
    near = [decibels(*both) for both in zip(ours, theirs, strict=True)]
    assert min(near) >= 35 and np.median(near) >= 38


@settings(max_examples=60, deadline=None)
@given(boxes(), st.integers(1, 90), st.integers(1, 90), st.integers(0, 255), st.booleans())
def test_a_flat_picture_stays_flat_whatever_the_box_and_the_size(
    box: Box, width: int, height: int, shade: int, antialiased: bool
) -> None:
    data = encoded(np.full((HEIGHT, WIDTH, 3), shade, np.uint8), quality=100)
    assert (crop(data, box, width, height, antialiased=antialiased) == np.asarray(opened(data))[0, 0]).all()


@settings(max_examples=60, deadline=None)
@given(boxes(), st.integers(4, 90), st.integers(4, 90), st.booleans())
def test_a_gradient_stays_one_whatever_the_box_and_the_size(box: Box, width: int, height: int, mirrored: bool) -> None:
    left, _, kept, _ = box
    ramp = np.repeat(np.linspace(20, 220, WIDTH)[None, :, None], 3, 2).repeat(HEIGHT, 0).round().astype(np.uint8)
    got = crop(encoded(ramp, quality=98, subsampling=0), box, width, height, mirrored=mirrored).astype(float)
    place = np.clip(left + (np.arange(width) + 0.5) / width * kept - 0.5, 0, WIDTH - 1)
    expected = 20 + 200 * place / (WIDTH - 1)
    # at its edges a crop has neighbours on one side alone
    allowed = 3 + 200 / (WIDTH - 1) * max(1, kept / width) / 2
    assert np.abs(got - (expected[::-1] if mirrored else expected)[None, :, None]).max() <= allowed


@pytest.mark.soak
@compiled
def test_every_mutated_file_is_decoded_or_refused_and_the_next_one_is_as_if_nothing_had_been() -> None:
    random, refused, good = (
        np.random.default_rng(0),
        0,
        [by_kernel(file_of(k), (9, 8, 120, 90), 64, 48) for k in (2, 3)],
    )
    turns = count(300, 10_000)
    for turn in range(turns):
        data = bytearray(file_of((2, 3)[turn % 2]))
        for place in random.integers(2, len(data), random.integers(1, 20)):
            data[place] = random.integers(0, 256)
        if turn % 3 == 0:
            del data[random.integers(0, len(data)) :]
        try:
            by_kernel(bytes(data), (9, 8, 120, 90), 64, 48)
        except ValueError as error:
            refused += 1
            assert str(error)
    assert refused > turns / 2
    assert all(
        (by_kernel(file_of(k), (9, 8, 120, 90), 64, 48) == whole).all() for k, whole in zip((2, 3), good, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(KINDS) - 1), st.floats(0, 0.999), boxes())
def test_a_file_whose_end_is_missing_is_refused_whatever_the_box(kind: int, kept: float, box: Box) -> None:
    data = file_of(kind)[: int(kept * (len(file_of(kind)) - 2))]
    with pytest.raises(ValueError):
        crop(data, box, 8, 8)
    if decode.vitscale_crop is not None:
        with pytest.raises(ValueError):
            by_kernel(data, box, 8, 8)


@compiled
def test_what_is_wrong_is_said() -> None:
    kernel = decode.vitscale_crop
    assert kernel is not None
    with pytest.raises(ValueError, match="Premature end"):
        by_kernel(file_of(2)[:-2], (0, 0, 8, 8), 8, 8)
    with pytest.raises(ValueError, match="Not a JPEG"):
        by_kernel(b"GIF89a", (0, 0, 8, 8), 8, 8)
    with pytest.raises(kernel.Unsupported):
        by_kernel(encoded(natural(40, 30), "CMYK"), (0, 0, 8, 8), 8, 8)
    for box in ((WIDTH - 3, 0, 8, 8), (0, HEIGHT, 8, 1), (0, 0, 2**40, 8), (-1, 0, 8, 8), (0, 0, 0, 8)):
        with pytest.raises(ValueError, match="the box"):
            by_kernel(file_of(2), box, 8, 8)
        with pytest.raises(ValueError, match="the box"):
            crop(file_of(2), box, 8, 8)
    with pytest.raises(ValueError, match="the size"):
        kernel.crop(file_of(2), bytearray(100), 0, 0, 8, 8, 8, 8, False, True)


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("WEBP", "RGB"), ("PNG", "L"), ("JPEG", "CMYK")])
def test_a_crop_of_every_other_kind_of_picture_is_one_of_its_pixels(kind: str, mode: str) -> None:
    file = BytesIO()
    Image.fromarray(natural(40, 30)).convert(mode).save(file, kind)
    whole = np.asarray(opened(file.getvalue()))
    got = crop(file.getvalue(), (5, 6, 20, 10), 20, 10)
    assert np.abs(got.astype(int) - whole[6:16, 5:25]).max() <= 4  # decoders of WebP may round differently


def test_a_cut_is_the_crop_of_its_number() -> None:
    crops = central_crops(np.array([1, WIDTH]), np.array([1, HEIGHT]), share=0.5)
    crops = crops._replace(mirrored=np.array([False, True]))
    out = np.empty((32, 32, 3), np.uint8)
    cut_from(file_of(2), crops, 1, out)
    box = crops.left.item(1), crops.top.item(1), crops.width.item(1), crops.height.item(1)
    assert (out == crop(file_of(2), box, 32, 32, mirrored=True)).all()


@compiled
def test_the_bytes_are_the_same_whatever_the_threads() -> None:
    some = [(kind, (left, 9, 90, 80)) for kind in range(len(KINDS)) for left in range(40)]

    def one(which: tuple[int, Box]) -> bytes:
        return by_kernel(file_of(which[0]), which[1], 56, 48).tobytes()

    alone = [one(which) for which in some]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, some)) == alone


@compiled
def test_no_memory_is_kept_however_many_pictures_are_decoded_or_refused() -> None:
    def many(count: int) -> None:
        for turn in range(count):
            data = file_of(turn % len(KINDS))
            by_kernel(data, (3, 4, 140, 100), 64, 64)
            with pytest.raises(ValueError):
                by_kernel(data[: len(data) // 2] + b"\xff\xd9", (3, 4, 140, 110), 64, 64)

    many(200)
    before = psutil.Process().memory_info().rss
    many(2000)
    assert psutil.Process().memory_info().rss - before < 20e6
