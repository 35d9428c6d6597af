"""Laws of what a shard holds of a picture: plain bytes stay, everything else becomes plain or is refused by name."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image

from shards import area
from shards.header import Header, header
from shards.image import KEEP, MOST_PIXELS, Look, Processing, Refused, look, process
from tests.rings import count

pytestmark = pytest.mark.timeout(60)
WIDTH, HEIGHT = 90, 60


def scene(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Smooth colours, brighter to the right, redder to the bottom."""
    across, down = np.linspace(40, 220, width)[None], np.linspace(30, 200, height)[:, None]
    planes = [np.broadcast_to(one, (height, width)) for one in (down, across, 255 - across)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def saved(picture: Image.Image, form: str, **options: object) -> bytes:
    out = BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    with Image.open(BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def turned(orientation: int) -> dict[str, object]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


SIXTEEN = Image.fromarray(np.asarray(scene().convert("L")).astype(np.uint16) * 257)
MOVING = {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT))]}
PLAIN = {
    "jpeg": saved(scene(), "JPEG", quality=95),
    "progressive jpeg": saved(scene(), "JPEG", quality=95, progressive=True),
    "grey jpeg": saved(scene().convert("L"), "JPEG", quality=95),
    "png": saved(scene(), "PNG"),
    "grey png": saved(scene().convert("L"), "PNG"),
    "webp": saved(scene(), "WEBP", quality=95),
    "lossless webp": saved(scene(), "WEBP", lossless=True),
}
ODD = {
    "cmyk jpeg": saved(scene().convert("CMYK"), "JPEG", quality=95),
    "palette png": saved(scene().quantize(256), "PNG"),
    "rgba png": saved(scene().convert("RGBA"), "PNG"),
    "grey alpha png": saved(scene().convert("LA"), "PNG"),
    "sixteen bit png": saved(SIXTEEN, "PNG"),
    "gif": saved(scene(), "GIF"),
    "bmp": saved(scene(), "BMP"),
    "tiff": saved(scene(), "TIFF"),
    "sixteen bit tiff": saved(SIXTEEN, "TIFF"),
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("check", ["decode", "header"])
def test_every_plain_picture_keeps_its_bytes(kind: str, check: str) -> None:
    data = PLAIN[kind]
    extension = {"j": "jpg", "p": "png", "w": "webp"}[kind.split()[-1][0]]
    assert process(data, Processing(check=check)) == (data, Look(WIDTH, HEIGHT, extension))
    assert look(data) == Look(WIDTH, HEIGHT, extension)


@pytest.mark.parametrize("kind", ODD)
def test_every_odd_picture_becomes_a_plain_one_that_looks_the_same(kind: str) -> None:
    made = process(ODD[kind])
    assert isinstance(made, tuple)
    data, seen = made
    found = header(data)
    assert isinstance(found, Header) and found.plain
    assert seen == look(data) == Look(WIDTH, HEIGHT, "jpg" if "jpeg" in kind else "png")
    wanted = pixels(PLAIN["grey png"] if "sixteen" in kind or "grey" in kind else PLAIN["png"])
    assert abs(pixels(data) - wanted).mean() < (9 if kind in ("gif", "palette png") else 2)
    assert process(data) == made


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_every_turn_that_exif_asks_for_is_done_and_asked_for_no_more(form: str, orientation: int) -> None:
    given = saved(scene(), form, **turned(orientation))
    data, seen = process(given)  # type: ignore[misc]
    size = (WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH)
    assert seen[:2] == size == pixels(data).shape[1::-1]
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
    wanted = scene() if back is None else scene().transpose(Image.Transpose(back))
    assert abs(pixels(data) - np.asarray(wanted).astype(int)).mean() < 4
    assert Image.open(BytesIO(data)).getexif().get(0x0112, 1) == 1


def test_what_shines_through_is_white() -> None:
    clear = scene().convert("RGBA")
    clear.putalpha(0)
    data, _ = process(saved(clear, "PNG"))  # type: ignore[misc]
    assert pixels(data).min() == 255


def test_a_png_that_is_called_jpeg_is_packed_as_what_it_is() -> None:
    assert process(PLAIN["png"])[1].extension == "png"  # type: ignore[index]


def _huge(width: int, height: int) -> bytes:
    """A PNG of a few bytes that would decode to any number of pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def _rotten(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + b"\xff\x00\xff\xfe" * 4 + data[middle + 16 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Refused.EMPTY),
        (b"<html></html>", Refused.NOT_A_PICTURE),
        (PLAIN["jpeg"][: len(PLAIN["jpeg"]) // 2], Refused.TRUNCATED),
        (PLAIN["jpeg"][:20], Refused.TRUNCATED),
        (PLAIN["png"][: len(PLAIN["png"]) // 2], Refused.TRUNCATED),
        (PLAIN["webp"][: len(PLAIN["webp"]) // 2], Refused.TRUNCATED),
        (PLAIN["jpeg"][:2] + PLAIN["jpeg"][-2:] + b"\xff\xd9", Refused.DAMAGED),
        (_rotten(PLAIN["png"]), Refused.DAMAGED),
        (_huge(60_000, 60_000), Refused.TOO_LARGE),
        (saved(scene(), "GIF", **MOVING), Refused.ANIMATED),
        (saved(scene(), "WEBP", **MOVING), Refused.ANIMATED),
        (saved(scene(), "PNG", **MOVING), Refused.ANIMATED),
    ],
)
@pytest.mark.parametrize("check", ["decode", "header"])
@pytest.mark.parametrize("short_side", [0, 32])
def test_every_unusable_picture_is_refused_by_name(data: bytes, reason: Refused, check: str, short_side: int) -> None:
    assert process(data, Processing(short_side, check=check)) is reason


def test_decoding_finds_the_rot_in_a_jpeg_that_its_header_does_not_show() -> None:
    rng = np.random.default_rng(0)
    whole = saved(Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
    rotten = whole[: len(whole) // 2] + b"\xff" * 30 + whole[len(whole) // 2 + 30 :]
    assert isinstance(process(rotten, Processing(check="header")), tuple)
    assert process(rotten) is Refused.DAMAGED


@given(
    width=some.integers(1, 120),
    height=some.integers(1, 120),
    short_side=some.integers(1, 64),
    form=some.sampled_from(["jpeg", "webp"]),
    grey=some.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_every_scaled_picture_has_the_short_side_and_the_shape_and_smaller_ones_keep_their_bytes(
    width: int, height: int, short_side: int, form: str, grey: bool
) -> None:
    data = saved(scene(width, height).convert("L" if grey else "RGB"), "PNG")
    made, seen = process(data, Processing(short_side, form))  # type: ignore[arg-type,misc]
    assert (seen.width, seen.height) == pixels(made).shape[1::-1]
    if min(width, height) <= short_side:
        assert made == data
        return
    assert min(seen.width, seen.height) == short_side and seen.extension == ("jpg" if form == "jpeg" else "webp")
    scale = short_side / min(width, height)
    assert abs(seen.width - width * scale) <= 0.5 and abs(seen.height - height * scale) <= 0.5
    assert process(data, Processing(short_side, form)) == (made, seen)  # type: ignore[arg-type]


def test_scaling_averages_what_falls_into_a_pixel() -> None:
    board = np.indices((128, 128)).sum(0) % 2 * 255  # finer than the result can show
    data = saved(Image.fromarray(board.astype(np.uint8)), "PNG")
    made, _ = process(data, Processing(32))  # type: ignore[misc]
    assert abs(pixels(made) - 127.5).max() < 3


@given(
    height=some.integers(1, 90),
    width=some.integers(1, 90),
    shares=some.tuples(some.floats(0, 1), some.floats(0, 1)),
    colours=some.booleans(),
    seed=some.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_the_compiled_scaling_gives_the_bytes_of_the_one_in_numpy_and_the_means_of_areas(
    height: int, width: int, shares: tuple[float, float], colours: bool, seed: int
) -> None:
    assert area.vitscale_area is not None, "it is compiled by the installation"
    shape = (height, width, 3) if colours else (height, width)
    drawn = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    new = [1 + int((side - 1) * share) for side, share in zip((height, width), shares, strict=True)]
    made = area.shrink(drawn, *new)
    assert np.array_equal(made, area.reference(drawn, *new))
    # Each pixel as so many small ones that both grids fit.
    fine = drawn.astype(float).repeat(new[0], 0).repeat(new[1], 1)
    exact = fine.reshape(new[0], height, new[1], width, *shape[2:]).mean((1, 3))
    assert abs(made - exact).max() < 0.52


def test_scaling_up_is_refused_by_the_compiled_function() -> None:
    with pytest.raises(ValueError, match="sizes"):
        area.vitscale_area.shrink(bytes(12), bytearray(48), 2, 2, 3, 4, 4)  # type: ignore[union-attr]


@pytest.mark.soak
@given(data=some.binary(max_size=300), start=some.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"]))
@settings(max_examples=count(300, 10_000), deadline=None)
def test_no_bytes_whatever_make_a_picture_raise(data: bytes, start: bytes) -> None:
    made = process(start + data)
    assert isinstance(made, Refused | tuple)


@pytest.mark.soak
@given(kind=some.sampled_from([*PLAIN, *ODD]), cut=some.floats(0, 0.98), flip=some.integers(0, 10**6))
@settings(max_examples=count(200, 10_000), deadline=None)
def test_no_damage_whatever_makes_a_picture_raise(kind: str, cut: float, flip: int) -> None:
    whole = bytearray({**PLAIN, **ODD}[kind])
    whole[flip % len(whole)] ^= 0x55
    for data in (bytes(whole), bytes(whole[: int(len(whole) * cut)])):
        made = process(data, KEEP)
        assert isinstance(made, Refused | tuple)
        if isinstance(made, tuple):
            assert pixels(made[0]).shape[1::-1] == (made[1].width, made[1].height)


@pytest.mark.parametrize("wrong", [{"short_side": -1}, {"quality": 0}, {"quality": 101}])
def test_a_processing_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Processing(**wrong)  # type: ignore[arg-type]


def test_too_many_pixels_are_refused_from_the_header_alone() -> None:
    side = int(MOST_PIXELS**0.5) + 1
    assert process(_huge(side, side)) is Refused.TOO_LARGE
