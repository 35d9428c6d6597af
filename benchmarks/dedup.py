"""How many copies of pictures are found, how many different pictures are taken for copies, and what the search costs.

    python benchmarks/dedup.py [--quick]

The pictures are scenes of our own making (coloured noise whose spectrum falls as a photograph's does, skies and
grounds, textured things) and pieces of the two photographs that scikit-learn brings. Copies are made as pictures are
changed on their way through the web. Hard negatives are what is alike without being a copy: pieces of a photograph that
overlap by half, a scene in which one thing has moved. Last line: the figures as JSON.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import count, islice

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from shards import dedup
from shards.fingerprint import PRINTS, VIEWS, fingerprints, thumbnail
from shards.sources import Picture

Pixels = NDArray[np.uint8]
Random = np.random.Generator


def jpeg(pixels: Pixels, quality: int = 90) -> bytes:
    """By Pillow, an encoder that the package itself does not use."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def resized(pixels: Pixels, width: int, height: int) -> Pixels:
    """By Pillow's Lanczos filter, the web's usual one."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def half(pixels: Pixels, random: Random) -> bytes:
    return jpeg(resized(pixels, pixels.shape[1] // 2, pixels.shape[0] // 2))


def tiny(pixels: Pixels, random: Random) -> bytes:
    """As CIFAR has it."""
    return encoded_png(resized(pixels, 32, 32))


def encoded_png(pixels: Pixels) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def cropped(pixels: Pixels, random: Random, keep: float = 0.9) -> bytes:
    height, width = (round(length * keep) for length in pixels.shape[:2])
    top, left = random.integers(0, pixels.shape[0] - height + 1), random.integers(0, pixels.shape[1] - width + 1)
    return jpeg(pixels[top : top + height, left : left + width])


def grey(pixels: Pixels, random: Random) -> bytes:
    return jpeg(np.asarray(Image.fromarray(pixels).convert("L")))


def captioned(pixels: Pixels, random: Random) -> bytes:
    """A strip of 12 % of the height below the picture, with some words in it."""
    height, width = pixels.shape[:2]
    strip = np.full((round(0.12 * height), width, 3), random.choice([0, 255]), np.uint8)
    ink = [int(255 - strip[0, 0, 0])] * 3
    words = "".join(random.choice(list("abcdefghij klmnop"), width // 10))
    cv2.putText(strip, words, (8, len(strip) - len(strip) // 3), cv2.FONT_HERSHEY_SIMPLEX, len(strip) / 50, ink, 1)
    return jpeg(np.concatenate([pixels, strip]))


COPIES: dict[str, Callable[[Pixels, Random], bytes]] = {
    "half the size": half,
    "32 x 32 pixels": tiny,
    "JPEG at quality 60": lambda pixels, random: jpeg(pixels, 60),
    "crop to 90 % of each side": cropped,
    "crop to 90 % of the area": lambda pixels, random: cropped(pixels, random, 0.9**0.5),
    "mirrored": lambda pixels, random: jpeg(pixels[:, ::-1]),
    "grey": grey,
    "caption strip of 12 %": captioned,
    "mirrored, quality 60": lambda pixels, random: jpeg(pixels[:, ::-1], 60),
}
"""Ways in which a copy differs from its original."""


def noise(random: Random, height: int, width: int, fall: float) -> NDArray[np.float32]:
    """(height, width), about normal, of a spectrum whose amplitude falls as frequency to the power of `fall`."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / max(height, width))
    field = np.fft.irfft2(np.fft.rfft2(random.standard_normal((height, width))) / frequency**fall, (height, width))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def scene(number: int, moved: bool = False) -> Pixels:
    """Scene of this number, (height, width, 3); or the same with its last thing at another place."""
    random = np.random.default_rng([8, number])
    width, height = (int(side) for side in random.choice([[400, 300], [300, 400], [500, 375], [320, 320], [375, 250]]))
    sky, ground, tint = random.uniform(20, 235, (3, 3))
    share = np.clip((np.arange(height) / height - random.uniform(0.2, 0.8)) * random.uniform(1, 12) + 0.5, 0, 1)
    canvas = (sky + share[:, None, None] * (ground - sky) + np.zeros((height, width, 1))).astype(np.float32)
    canvas += noise(random, height, width, random.uniform(0.9, 1.5))[..., None] * random.uniform(5, 35)
    canvas += noise(random, height, width, 1.2)[..., None] * (tint - 128) * 0.15
    things = int(random.integers(2, 12))
    for thing in range(things):
        _draw(canvas, random, moved and thing == things - 1)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _draw(canvas: NDArray[np.float32], random: Random, elsewhere: bool) -> None:
    """One thing: a patch of an outline, with a colour and a texture."""
    height, width = canvas.shape[:2]
    centre, other = random.uniform(0.15, 0.85, (2, 2)) * (width, height)
    reach = random.uniform(0.06, 0.3) * min(width, height)
    angles = np.sort(random.uniform(0, 2 * np.pi, int(random.integers(3, 14))))
    radii = reach * random.uniform(0.5, 1.2, len(angles))
    if elsewhere:  # far enough that a person sees it
        centre = other if np.hypot(*(other - centre)) > reach else (centre + (width, height) * np.array(0.5)) % width
    outline = centre + np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [np.rint(outline).astype(np.int32)], 255, cv2.LINE_AA)
    texture = noise(random, height, width, random.uniform(0.3, 1.5))[..., None] * random.uniform(2, 30)
    colour = random.uniform(0, 255, 3) + texture
    opacity = (mask / np.float32(255))[..., None]
    canvas *= 1 - opacity
    canvas += (opacity * colour).astype(np.float32)


def photographs() -> list[Pixels]:
    """Those of scikit-learn, (427, 640, 3) each: a temple in China, and a flower."""
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images)


def pieces() -> list[Pixels]:
    """Disjoint pieces of the photographs, (142, 160, 3) each."""
    return [
        photograph[top : top + 142, left : left + 160]
        for photograph in photographs()
        for top in (0, 142, 284)
        for left in range(0, 640, 160)
    ]


def lookalikes(scenes: int) -> Iterator[tuple[Pixels, Pixels]]:
    """Hard negatives: overlapping pieces of a photograph, and scenes in which a thing has moved."""
    for photograph in photographs():
        for top, left in ((0, 0), (0, 200), (107, 0), (107, 240)):
            whole = photograph[top : top + 320, left : left + 400]
            yield whole[:, :266], whole[:, 133:399]
            yield whole[:213], whole[106:319]
    both = ((scene(number), scene(number, moved=True)) for number in count())
    yield from islice((pair for pair in both if _seen(*pair)), scenes)


def _seen(one: Pixels, other: Pixels) -> bool:
    """Whether a person would see a difference: two things that lie under others are no different picture."""
    return bool((cv2.absdiff(one, other).max(-1) > 40).mean() > 0.01)


def originals(scenes: int) -> list[Pixels]:
    """Different pictures."""
    return [scene(number) for number in range(scenes)] + pieces()


def prints(encoded: list[bytes]) -> pa.Table:
    return fingerprints(Picture(str(number), data, ()) for number, data in enumerate(encoded))


def thumbnails(encoded: list[bytes]) -> Pixels:
    found = [thumbnail(data) for data in encoded]
    return np.stack([each for each in found if each is not None])


def matched(corpus: list[bytes], test: list[bytes]) -> tuple[pa.Table, pa.Table]:
    """Candidates between two lists of pictures, and those that their pixels confirm."""
    pairs = dedup.against(prints(test), prints(corpus))
    number, of = pairs["number"].to_numpy(), pairs["of"].to_numpy()
    return pairs, dedup.confirmed(pairs, dedup.scores(thumbnails(corpus)[number], thumbnails(test)[of]))


def quality(scenes: int) -> dict[str, float]:
    """Copies of one kind at a time are held against all originals: right pairs are those of equal number."""
    pictures = originals(scenes)
    corpus = [jpeg(pixels, 95) for pixels in pictures]
    print(f"\n{len(pictures)} originals ({scenes} scenes, {len(pictures) - scenes} pieces of photographs)\n")
    print("| copy | candidates | found | wrong pairs | recall | of the photographs' |\n|---|---|---|---|---|---|")
    figures, right, wrong = {}, 0, 0
    for kind, (name, change) in enumerate(COPIES.items()):
        random = np.random.default_rng([9, kind])
        pairs, found = matched(corpus, [change(pixels, random) for pixels in pictures])
        hits = [number == of for number, of in rows(found)]
        real = sum(number == of and number >= scenes for number, of in rows(found)) / (len(pictures) - scenes)
        right, wrong = right + sum(hits), wrong + len(hits) - sum(hits)
        figures[name] = sum(hits) / len(pictures)
        print(f"| {name} | {len(pairs)} | {sum(hits)} | {len(hits) - sum(hits)} | {figures[name]:.3f} | {real:.3f} |")
    figures |= {"recall": right / len(pictures) / len(COPIES), "precision": right / (right + wrong)}
    print(f"\nrecall over all {figures['recall']:.4f}, precision {figures['precision']:.4f}")
    return figures


def hard(scenes: int) -> dict[str, float]:
    """How many pairs that are alike are taken for copies."""
    pairs = [(jpeg(one), jpeg(other)) for one, other in lookalikes(scenes)]
    alike = len(pairs) - scenes
    ones, others = ([pair[side] for pair in pairs] for side in (0, 1))
    taken = matched(ones, others)
    figures = {}
    for name, low, high in (("overlapping by half", 0, alike), ("one thing moved", alike, len(pairs))):
        near, false = (sum(low <= n < high and n == of for n, of in rows(table)) for table in taken)
        figures[name] = false / (high - low)
        print(f"{name}: {false} of {high - low} pairs taken for copies ({near} by their hashes)")
    return figures


def rows(pairs: pa.Table) -> list[tuple[int, int]]:
    return list(zip(pairs["number"].to_pylist(), pairs["of"].to_pylist(), strict=True))


def held(hashes: NDArray[np.uint64], random: Random) -> pa.Table:
    """Fingerprints, (n, views) of any number of views, of pictures that there are not."""
    count, views = hashes.shape
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), count, [None, pa.py_buffer(raw)])
        for size, raw in ((16, random.bytes(16 * count)), (8 * views, hashes.astype("<u8").tobytes()))
    ]
    sides = pa.array(np.full(count, 256, np.int32))
    return pa.table([columns[0], sides, sides, columns[1]], PRINTS.names)


def planted(random: Random, count: int, known: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Evenly spread hashes (count, views), every hundredth row one of `known`, less up to so many bits."""
    hashes = random.integers(0, 2**64, (count, known.shape[1]), np.uint64)
    places = np.arange(0, count, 100)
    copies = known[random.integers(0, len(known), len(places))]
    for _ in range(bits):
        copies ^= np.uint64(1) << random.integers(0, 64, (len(places), 1), np.uint64)
    hashes[places] = copies
    return hashes


def scaling(tests: int, least: int) -> dict[str, float]:
    """Seconds of the search for a piece of a corpus, twice and four times as much of it."""
    random = np.random.default_rng(10)
    known = random.integers(0, 2**64, (tests, VIEWS), np.uint64)
    test = dedup.hold(held(known, random))
    name = f"against {tests:,} test pictures"
    work = [held(planted(random, least * times, known, dedup.RADIUS), random) for times in (1, 2, 4)]
    figures = measured("against", name, lambda corpus: dedup.against(test, corpus), work)
    work = [held(planted(random, least * times, known[:, :1], 1), random) for times in (10, 20, 40)]
    return figures | measured("within", "within", dedup.within, work)


def measured(key: str, name: str, work: Callable[[pa.Table], pa.Table], corpora: list[pa.Table]) -> dict[str, float]:
    sizes = [corpus.num_rows for corpus in corpora]
    work(corpora[0].slice(0, 100))  # what is done once is not counted
    seconds, found = [], []
    for corpus in corpora:
        start = time.perf_counter()
        found.append(work(corpus).num_rows)
        seconds.append(time.perf_counter() - start)
    slope = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    told = ", ".join(f"{n:,}: {s:.1f} s ({f:,} pairs)" for n, s, f in zip(sizes, seconds, found, strict=True))
    print(f"{name}: {told}; slope {slope:.2f}")
    return {f"{key}_slope": slope, f"{key}_microseconds": seconds[-1] / sizes[-1] * 1e6}


def speed(pictures: int) -> dict[str, float]:
    """Pictures a second of one core, and candidates a second."""
    cv2.setNumThreads(1)
    encoded = [jpeg(scene(number), 90) for number in range(16)]
    start = time.perf_counter()
    prints([encoded[number % 16] for number in range(pictures)])
    made = pictures / (time.perf_counter() - start)
    small = thumbnails(encoded)[np.arange(pictures // 4) % 16]
    start = time.perf_counter()
    dedup.scores(small, small[::-1])
    scored = len(small) / (time.perf_counter() - start)
    print(f"one core: {made:,.0f} fingerprints/s of JPEGs of about 400 x 300, {scored:,.0f} candidates/s verified")
    return {"fingerprints_per_second": round(made), "scores_per_second": round(scored)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="fewer images; as many test images")
    quick = parser.parse_args().quick
    figures = quality(60 if quick else 1000) | hard(30 if quick else 400) | speed(200 if quick else 2000)
    figures |= scaling(500_000, 10_000 if quick else 100_000)
    print(json.dumps({name: round(figure, 4) for name, figure in figures.items()}))


if __name__ == "__main__":
    main()
