"""Laws of the search for copies: what is found, what is not, what is done about it, and the page that shows it."""

import re
from collections.abc import Iterator
from hashlib import blake2b
from html.parser import HTMLParser
from io import BytesIO
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image, ImageOps

from benchmarks import dedup as pictures
from shards import dedup
from shards.contamination import Pair, TestSet, page
from shards.dedup import EXACT, NEAR, PAIRS, SCORED, TESTED, Index, against, confirmed, decide, same, united, within
from shards.fingerprint import PRINTS, VIEWS, fingerprint, fingerprints, hashed, mirrored, thumbnail, unpacked, wholes
from shards.sources import Picture

pytestmark = pytest.mark.timeout(60)

SCENES = 16


@pytest.fixture(scope="module")
def originals() -> list[np.ndarray]:
    return pictures.originals(SCENES)


@pytest.fixture(scope="module")
def corpus(originals: list[np.ndarray]) -> list[bytes]:
    return [pictures.jpeg(pixels, 95) for pixels in originals]


def prints(*found: bytes | np.ndarray) -> pa.Table:
    return fingerprints(Picture(str(number), data, ()) for number, data in enumerate(found))


def small(data: bytes | np.ndarray) -> np.ndarray:
    found = thumbnail(data)
    assert found is not None
    return found


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bits(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.bitwise_count(one ^ other)


# fingerprints


def test_every_row_is_the_fingerprint_of_its_picture_whatever_stands_beside_it(corpus: list[bytes]) -> None:
    some_pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    data = [*corpus * 8, b"no picture", some_pixels, b"", *corpus[:3]]
    table = prints(*data)
    assert table.schema == PRINTS and table.num_rows == len(data) > 256
    found = unpacked(table.slice(1))
    for number in (1, 255, 256, 257, len(data) - 5, len(data) - 1):
        one, row = fingerprint(data[number]), table.slice(number, 1).to_pylist()[0]
        assert one and (row["digest"], row["width"], row["height"]) == (one.digest, one.width, one.height)
        assert row["hashes"] == one.hashes.astype("<u8").tobytes() and np.array_equal(found[number - 1], one.hashes)
    for number in (len(data) - 6, len(data) - 4):
        row = table.slice(number, 1).to_pylist()[0]
        assert (row["hashes"], row["width"], fingerprint(data[number])) == (None, 0, None)
        assert row["digest"] == blake2b(data[number], digest_size=16).digest() and not found[number - 1].any()
    narrow = wholes(table.slice(1))
    assert np.array_equal(unpacked(narrow), found[:, :1]) and narrow["hashes"].null_count == 2


def test_no_pictures_have_an_empty_table() -> None:
    assert prints().schema == PRINTS and prints().num_rows == 0 and unpacked(prints()).shape == (0, VIEWS)
    assert within(prints()).num_rows == against(prints(), prints()).num_rows == 0


def test_the_first_hash_is_signs_of_the_cosine_transform_as_if_by_scipy(corpus: list[bytes]) -> None:
    from scipy.fft import dctn

    pixels = small(corpus[0])
    spectrum = dctn(pixels.astype(float))
    lowest = sorted(product(range(12), repeat=2), key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair))[1:65]
    wanted = sum(int(spectrum[pair] > 0) << place for place, pair in enumerate(lowest))
    assert int(hashed(pixels[None])[0, 0]) == wanted


def test_the_mirrored_hash_of_every_view_is_the_hash_of_the_mirrored_view(corpus: list[bytes]) -> None:
    pixels = np.stack([small(data) for data in corpus[:SCENES]])
    turned = hashed(np.ascontiguousarray(pixels[:, :, ::-1])).reshape(-1, 5, 5)
    order = [0, 4, 3, 2, 1]  # a window at the left becomes one at the right
    expected = mirrored(hashed(pixels)).reshape(-1, 5, 5)[:, :, order]
    assert bits(turned, expected).mean() < 0.1 and bits(turned, hashed(pixels).reshape(-1, 5, 5)).mean() > 20
    assert np.array_equal(mirrored(mirrored(expected)), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_every_format_of_a_picture_has_its_hash(kind: str, originals: list[np.ndarray]) -> None:
    image = Image.fromarray(originals[0])
    one, other = fingerprint(saved(image, kind)), fingerprint(originals[0])
    assert one and other and (one.width, one.height) == image.size == (other.width, other.height)
    assert bits(one.hashes[:1], other.hashes[:1])[0] <= 3


def test_every_kind_of_jpeg_has_the_hash_of_what_is_seen(originals: list[np.ndarray]) -> None:
    image = Image.fromarray(originals[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = saved(image, "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(lying)))
    cmyk = saved(image.convert("CMYK"), "JPEG")
    for data, wanted in ((lying, upright), (cmyk, image), (saved(image.convert("L"), "JPEG"), image)):
        one, other = fingerprint(data), fingerprint(np.asarray(wanted))
        assert one and other and (one.width, one.height) == wanted.size
        assert bits(one.hashes[:1], other.hashes[:1])[0] <= 3


def test_a_flat_picture_has_no_copy_but_its_own_bytes() -> None:
    grey, blue = Image.new("RGB", (90, 70), (127, 127, 127)), Image.new("RGB", (90, 70), (0, 0, 255))
    noisy = np.full((70, 90), 99, np.uint8) + np.random.default_rng(0).integers(0, 3, (70, 90), np.uint8)
    flat = [saved(grey, "PNG"), saved(grey, "JPEG"), saved(blue, "PNG"), saved(grey, "PNG"), noisy, noisy[:, ::-1]]
    table = prints(*flat)
    assert not unpacked(table).any() and table["hashes"].null_count == 0
    wanted = {"number": 3, "of": 0, "distance": 0, "exact": True}
    assert within(table).to_pylist() == [wanted]
    assert against(table.slice(0, 1), table.slice(3, 1), first=3).to_pylist() == [wanted]


# search


def every_pair(hashes: np.ndarray, queries: np.ndarray, radius: int) -> list[tuple[int, int, int]]:
    far = bits(queries[:, None], hashes[None]).astype(int)
    far[(queries == 0)[:, None] | (hashes == 0)[None]] = 65
    return [(int(q), int(n), int(far[q, n])) for q, n in np.argwhere(far <= radius)]


def listed(index: Index, queries: np.ndarray, radius: int) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in index.near(queries, radius)), strict=True))


words = some.one_of(some.integers(0, 2**64 - 1), some.sampled_from([0, 1, 2**64 - 1, 2**63, 0x0F0F]))


@given(hashes=some.lists(words, max_size=60), queries=some.lists(words, max_size=20), radius=some.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_every_pair_within_the_radius_is_found_once_and_no_other(
    hashes: list[int], queries: list[int], radius: int
) -> None:
    held = np.array(hashes, np.uint64)
    asked = np.array(queries, np.uint64)
    assert listed(Index(held), asked, radius) == every_pair(held, asked, radius)


@given(seed=some.integers(0, 2**32), radius=some.integers(0, 10), count=some.integers(1, 3000))
@settings(max_examples=25, deadline=None)
def test_every_near_hash_is_found_wherever_its_bits_differ(seed: int, radius: int, count: int) -> None:
    random = np.random.default_rng(seed)
    held = random.integers(0, 2**64, count, np.uint64)
    asked = held[random.integers(0, count, 40)]
    for number in range(len(asked)):
        for place in random.permutation(64)[: random.integers(0, radius + 3)]:
            asked[number] ^= np.uint64(1) << np.uint64(place)
    assert listed(Index(held), asked, radius) == every_pair(held, asked, radius)


def test_the_pieces_in_which_a_search_is_done_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    held = random.integers(0, 2**64, 2000, np.uint64)
    held[:700] = held[0]  # one value more often than a piece is large
    asked = held[::7] ^ np.uint64(5)
    wanted = listed(Index(held), asked, 6)
    monkeypatch.setattr(dedup, "_AT_ONCE", 97)
    assert listed(Index(held), asked, 6) == wanted == every_pair(held, asked, 6)


def table(hashes: np.ndarray, digests: list[int] | None = None) -> pa.Table:
    """Fingerprints of these hashes, (n, v), with these or with different digests."""
    named = range(len(hashes)) if digests is None else digests
    raw = [row.astype("<u8").tobytes() for row in hashes]
    columns = [
        pa.array([n.to_bytes(16, "big") for n in named], pa.binary(16)),
        *[pa.array([9] * len(raw), pa.int32())] * 2,
    ]
    return pa.Table.from_arrays([*columns, pa.array(raw, pa.binary(8 * VIEWS))], schema=PRINTS)


def near_views(test: np.ndarray, corpus: np.ndarray, radius: int) -> dict[tuple[int, int], int]:
    """By trying all views of all pictures."""
    found: dict[tuple[int, int], int] = {}
    for c, t in product(range(len(corpus)), range(len(test))):
        ways = [bits(turned[0], corpus[c]) for turned in (test[t], mirrored(test[t]))]
        ways += [bits(turned, corpus[c][0]) for turned in (test[t], mirrored(test[t]))]
        if min(way.min() for way in ways) <= radius:
            found[c, t] = int(min(way.min() for way in ways))
    return found


def test_every_view_of_either_picture_mirrored_or_not_makes_a_candidate() -> None:
    random = np.random.default_rng(0)
    test, corpus = random.integers(1, 2**64, (12, VIEWS), np.uint64), random.integers(1, 2**64, (30, VIEWS), np.uint64)
    for number in range(24):  # half of them by a view of the test picture, half by one of the corpus's
        view, of = random.integers(VIEWS), number % len(test)
        seen, place = ((test[of, view], 0), (test[of, 0], view))[number % 2]
        turned = mirrored(np.array([seen]))[0] if number % 3 == 0 else seen
        corpus[number, place] = turned ^ np.uint64(random.integers(0, 2**9) << 20)
    wanted = near_views(test, corpus, 8)
    assert len(wanted) >= 22
    found = against(table(test), table(corpus, list(range(100, 130))), 8, first=1000)
    assert found.schema == PAIRS
    told = zip(*(found[name].to_pylist() for name in ("number", "of", "distance")), strict=True)
    assert [((n - 1000, of), d) for n, of, d in told] == sorted(wanted.items())


def test_a_corpus_in_pieces_has_the_candidates_of_the_whole(corpus: list[bytes]) -> None:
    whole, test = prints(*corpus), dedup.hold(prints(*corpus[::-2]))
    pieces = [against(test, whole.slice(start, 7), first=start) for start in range(0, len(corpus), 7)]
    assert pa.concat_tables(pieces).equals(against(test, whole)) and sum(piece.num_rows for piece in pieces) >= 20


@given(seed=some.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_the_groups_within_a_corpus_are_those_of_every_pair(seed: int) -> None:
    random = np.random.default_rng(seed)
    known = random.integers(1, 2**64, 6, np.uint64)
    whole = known[random.integers(0, 6, 40)] ^ (np.uint64(1) << random.integers(0, 64, 40, np.uint64))
    whole[random.integers(0, 40, 10)] = known[0]
    whole = np.where(random.random(40) < 0.3, mirrored(whole), whole)
    hashes = np.concatenate([whole[:, None], random.integers(1, 2**64, (40, VIEWS - 1), np.uint64)], 1)
    digests = random.integers(0, 35, 40).tolist()
    pairs = within(table(hashes, digests), 2)
    far = np.minimum(bits(whole[:, None], whole[None]), bits(whole[:, None], mirrored(whole)[None]))
    alike = np.array(digests)[:, None] == np.array(digests)[None]
    first = np.array([digests.index(digest) == number for number, digest in enumerate(digests)])
    every = [(a, b) for a in range(40) for b in range(a) if alike[a, b] or (far[a, b] <= 2 and first[a] and first[b])]
    assert groups(40, rows(pairs)) == groups(40, every)
    assert pairs.equals(within(wholes(table(hashes, digests)), 2))
    assert set(rows(pairs)) <= set(every) and rows(pairs) == sorted(set(rows(pairs)))
    assert [row["exact"] for row in pairs.to_pylist()] == [bool(alike[pair]) for pair in rows(pairs)]


def rows(pairs: pa.Table) -> list[tuple[int, int]]:
    return pictures.rows(pairs)


def groups(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    """The lowest number of each one's group, by going over the pairs until nothing changes."""
    lowest = list(range(count))
    while True:
        before = list(lowest)
        for one, other in pairs:
            lowest[one] = lowest[other] = min(lowest[one], lowest[other])
        if lowest == before:
            return lowest


def test_what_is_there_a_thousand_times_has_no_thousand_squared_pairs() -> None:
    hashes = np.full((1000, VIEWS), 0x1234567, np.uint64)
    for digests in (None, [7] * 1000):
        pairs = within(table(hashes, digests))
        assert pairs.num_rows <= 2000 and groups(1000, rows(pairs)) == [0] * 1000


# copies

RECALL = {
    "half the size": 0.97,
    "32 x 32 pixels": 0.92,
    "JPEG at quality 60": 0.92,
    "crop to 90 % of each side": 0.92,
    "crop to 90 % of the area": 0.9,
    "mirrored": 0.97,
    "grey": 0.97,
    "caption strip of 12 %": 0.9,
    "mirrored, quality 60": 0.92,
}
"""What `benchmarks/dedup.py` measures, with a margin for the few pictures that there are here."""


@pytest.mark.parametrize("name", RECALL)
def test_of_every_kind_of_copy_most_are_found_and_nothing_else(
    name: str, originals: list[np.ndarray], corpus: list[bytes]
) -> None:
    random = np.random.default_rng([11, list(RECALL).index(name)])
    copies = [pictures.COPIES[name](pixels, random) for pixels in originals]
    _, found = pictures.matched(corpus, copies)
    assert set(RECALL) == set(pictures.COPIES) and all(number == of for number, of in rows(found))
    assert found.num_rows >= RECALL[name] * len(originals)


@pytest.mark.slow
def test_what_is_alike_is_no_copy() -> None:
    alike = list(pictures.lookalikes(16))
    ones, others = ([pictures.jpeg(pair[side]) for pair in alike] for side in (0, 1))
    # Only partners: pieces of one photograph that are no partners may lie almost over each other.
    near, taken = ([n for n, of in rows(table) if n == of] for table in pictures.matched(ones, others))
    assert len(near) >= 5 and all(number >= len(alike) - 16 for number in taken)
    assert len(taken) <= 3


def test_the_score_of_a_picture_with_itself_is_one_whichever_way_round(corpus: list[bytes]) -> None:
    pixels = np.stack([small(data) for data in corpus[:SCENES]])
    assert np.allclose(dedup.scores(pixels, pixels), 1, atol=1e-4)
    assert np.allclose(dedup.scores(pixels, np.ascontiguousarray(pixels[:, :, ::-1])), 1, atol=1e-4)
    assert dedup.scores(pixels, np.roll(pixels, 1, 0)).max() < 0.8
    assert same(pixels[0], pixels[1]) == dedup.scores(pixels[:1], pixels[1:2])[0]
    assert len(dedup.scores(pixels[:0], pixels[:0])) == 0


def test_a_patch_lowers_the_score_by_far_more_than_noise_everywhere(corpus: list[bytes]) -> None:
    pixels, random = small(corpus[0]), np.random.default_rng(0)
    noise = np.clip(pixels + random.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
    patched = pixels.copy()
    patched[20:32, 20:32] = 255 - patched[20:32, 20:32]
    assert same(pixels, noise) > dedup.THRESHOLD > 0.8 > same(pixels, patched)


@pytest.mark.parametrize("side", [20, 32, 44])
def test_a_picture_that_fills_a_part_of_another_is_no_copy_of_it(side: int) -> None:
    ring = np.hypot(*(np.indices((64, 64)) - 31.5))
    one = np.clip(255 - 8 * ring, 0, 255).astype(np.uint8)
    part, edge = np.zeros((64, 64), np.uint8), (64 - side) // 2
    part[edge : 64 - edge, edge : 64 - edge] = np.asarray(Image.fromarray(one).resize((side, side)))
    assert same(one, part) < dedup.THRESHOLD and same(part, one) < dedup.THRESHOLD < same(one, one)


@given(seed=some.integers(0, 2**32), width=some.integers(1, 40), shift=some.integers(-20, 20))
@settings(max_examples=30, deadline=None)
def test_every_two_thumbnails_have_a_score_of_at_most_one(seed: int, width: int, shift: int) -> None:
    random = np.random.default_rng(seed)
    one = np.zeros((64, 64), np.uint8)
    one[20 : 20 + width, 22 : 22 + width] = random.integers(0, 256)
    others = np.stack([np.roll(one, shift, 1), one // 2, random.integers(0, 256, (64, 64), np.uint8), one * 0])
    found = dedup.scores(np.stack([one] * 4), others)
    assert np.isfinite(found).all() and found.max() <= 1


def test_equal_bytes_are_copies_whatever_their_score() -> None:
    pairs = scored((3, 1, 0, True, 0.0), (4, 1, 2, False, 0.95), (5, 1, 2, False, 0.5)).select(PAIRS.names)
    found = confirmed(pairs, np.array([0.0, 0.95, 0.5], np.float32))
    assert found.schema == SCORED and found["number"].to_pylist() == [3, 4]
    assert found["score"].to_pylist() == pytest.approx([1.0, 0.95])


# decisions


def scored(*links: tuple[int, int, int, bool, float]) -> pa.Table:
    columns = list(zip(*links, strict=True)) or [()] * len(SCORED)
    return pa.Table.from_arrays(
        [pa.array(column, f.type) for column, f in zip(columns, SCORED, strict=True)], schema=SCORED
    )


def test_the_lowest_of_every_group_is_kept_and_takes_the_labels() -> None:
    inside = scored((5, 2, 0, True, 1.0), (7, 5, 3, False, 0.95), (8, 7, 1, False, 0.97), (9, 4, 2, False, 0.93))
    found = decide(10, inside, {}, "merge").to_pylist()
    told = [(row["number"], row["reason"], row["of"], row["into"], row["distance"]) for row in found]
    assert told == [(5, EXACT, 2, 2, 0), (7, NEAR, 2, 2, 1), (8, NEAR, 2, 2, 1), (9, NEAR, 4, 4, 2)]
    assert all(row["test_set"] is None for row in found)
    assert decide(10, inside, {}, "drop")["into"].null_count == 4
    labels = pa.array([[n, 0] for n in range(10)], pa.list_(pa.int32()))
    wanted = [[n, 0] for n in range(10)]
    wanted[2], wanted[4] = [0, 2, 5, 7, 8], [0, 4, 9]
    assert united(labels, decide(10, inside, {})).to_pylist() == wanted
    assert united(pa.chunked_array([labels]), decide(10, inside, {}, "drop")).equals(labels)


def test_with_a_picture_of_a_test_set_its_whole_group_leaves() -> None:
    inside = scored((5, 2, 0, True, 1.0), (7, 5, 3, False, 0.95), (9, 4, 2, False, 0.93))
    tested = {"a/test": scored((7, 30, 4, False, 0.92)), "b/val": scored((5, 40, 2, False, 0.96), (1, 8, 0, True, 1.0))}
    found = decide(10, inside, tested).to_pylist()
    told = [(row["number"], row["reason"], row["test_set"], row["of"], row["into"]) for row in found]
    assert told == [
        (1, TESTED, "b/val", 8, None),
        (2, TESTED, "b/val", 40, None),
        (5, TESTED, "b/val", 40, None),
        (7, TESTED, "a/test", 30, None),
        (9, NEAR, None, 4, 4),
    ]


@given(seed=some.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_every_picture_stays_or_leaves_once_whatever_the_order_of_the_pairs(seed: int) -> None:
    random = np.random.default_rng(seed)
    pairs = [tuple(sorted(random.choice(20, 2, replace=False).tolist())) for _ in range(random.integers(0, 12))]
    links = [(b, a, int(random.integers(5)), bool(random.random() < 0.3), 0.95) for a, b in dict.fromkeys(pairs)]
    hits = dict.fromkeys(random.integers(0, 20, random.integers(0, 4)).tolist())
    tests = [(number, int(random.integers(9)), 1, False, 0.95) for number in hits]
    found = decide(20, scored(*links), {"t": scored(*tests)})
    lowest = groups(20, [(a, b) for a, b, *_ in links])
    tainted = {lowest[number] for number, *_ in tests}
    leaving = [n for n in range(20) if lowest[n] in tainted or lowest[n] != n]
    assert found["number"].to_pylist() == leaving
    assert [row["reason"] == TESTED for row in found.to_pylist()] == [lowest[n] in tainted for n in leaving]
    backwards = decide(20, scored(*links[::-1]), {"t": scored(*tests[::-1])})
    assert backwards.equals(found)


def test_an_unknown_mode_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="mode is 'keep'; it is 'merge' or 'drop'"):
        decide(1, SCORED.empty_table(), {}, "keep")  # type: ignore[arg-type]


# the page


class Read(HTMLParser):
    """What a page links to, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def some_pairs(count: int) -> Iterator[Pair]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 200, 3), np.uint8)
    for number in range(count):
        yield Pair(f"key-{number}", f"test<{number}>", number % 9, 0.9, number % 2 == 0, pictures.jpeg(pixels), pixels)


def test_the_page_holds_every_count_and_the_first_pairs_and_needs_nothing_else() -> None:
    sets = {"one/val": TestSet(50_000, 12, 1_893, 2_400, list(some_pairs(9))), "two & three": TestSet(880, 0, 0, 0)}
    text = page("corpus <x>", {"radius": "8 bits"}, sets, shown=4)
    read = Read(text)
    assert not read.open and "script" not in read.tags and read.tags.count("li") == 4 and len(read.links) == 8
    assert all(link.startswith("data:image/jpeg;base64,") for link in read.links)
    assert "1,905 of the 50,880 pictures of 2 test sets were found" in text and "4 of 9 pairs" in text
    for told in ("50,000", "1,893", "2,400", "3.81%", "two &amp; three", "corpus &lt;x&gt;", "8 bits", "test&lt;3&gt;"):
        assert told in text
    assert "key-3" in text and "key-4" not in text and "url(" not in text and "prefers-color-scheme: dark" in text


def test_the_pictures_of_a_page_are_small_whatever_they_were() -> None:
    import base64

    pair = next(some_pairs(1))
    text = page("x", {}, {"t": TestSet(1, 1, 0, 1, [pair])})
    for data in re.findall(r"base64,([^\"]+)", text):
        with Image.open(BytesIO(base64.b64decode(data))) as image:
            assert image.size == (96, 19)
    broken = page("x", {}, {"t": TestSet(1, 1, 0, 1, [Pair("a", "b", 0, 1.0, True, b"broken")])})
    assert broken.count("not shown") == 2 and "<img" not in broken


def test_a_corpus_without_test_pictures_says_so() -> None:
    assert "None of the 7 pictures of 1 test set was found" in page("x", {}, {"t": TestSet(7, 0, 0, 0)})
    assert "Held against no test set" in page("x", {}, {})
