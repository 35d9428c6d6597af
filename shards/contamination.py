"""The page that shows what of the test sets was found in a corpus: counts, settings, and the pictures themselves."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.image import Processing, Refused, process

SIDE = 96
"""Pixels along the longer side of a picture on the page."""

SHOWN = 60
"""Pairs of each test set that are shown."""


@dataclass(frozen=True)
class Pair:
    """A picture of the corpus and the one of a test set that it is a copy of."""

    key: str
    test_key: str
    distance: int
    """In bits, of the nearest hashes."""
    score: float
    """Of the pixels, 1 for the same."""
    exact: bool
    """Whether the digests are equal."""
    picture: bytes | NDArray[np.uint8] | None = None
    """Encoded, or pixels (height, width[, 3]), red first; None where it cannot be shown."""
    test_picture: bytes | NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class TestSet:
    """What was found of a test set."""

    __test__ = False  # no class of tests, whatever its name begins with

    pictures: int
    """In the test set."""
    exact: int
    """Of them in the corpus, byte for byte."""
    near: int
    """Of them in the corpus, changed."""
    removed: int
    """Pictures of the corpus that left it for this test set."""
    pairs: Sequence[Pair] = field(default=())


def page(title: str, settings: Mapping[str, object], sets: Mapping[str, TestSet], shown: int = SHOWN) -> str:
    """`contamination.html`: it loads nothing, all of its pictures are inside it, and it has no scripts.

    Of each test set the first `shown` pairs are drawn, in the order in which they are given.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Contamination of {escape(title)} · vitscale</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kind">vitscale · contamination of {escape(title)}</p>
<h1>{escape(_headline(sets))}</h1>
</header>
<section><h2>Test sets</h2>
{_counts(sets)}
<p class="note">Exact: the same bytes. Near: other bytes that show the same picture. Removed: pictures of the corpus,
copies of them within the corpus included; one that is in several test sets counts for each of them.</p>
</section>
<section><h2>Settings</h2>
{_settings(settings)}
</section>
{"".join(_gallery(name, found, shown) for name, found in sets.items() if found.pairs)}
</main>
</body>
</html>
"""


def _headline(sets: Mapping[str, TestSet]) -> str:
    if not sets:
        return "Held against no test set"
    found, pictures = (sum(of(each) for each in sets.values()) for of in (_found, lambda each: each.pictures))
    held = f"{len(sets)} test set" + ("s" if len(sets) > 1 else "")
    if not found:
        return f"None of the {pictures:,} pictures of {held} was found in the corpus"
    return f"{found:,} of the {pictures:,} pictures of {held} {'was' if found == 1 else 'were'} found in the corpus"


def _found(each: TestSet) -> int:
    return each.exact + each.near


def _counts(sets: Mapping[str, TestSet]) -> str:
    columns = ("test set", "pictures", "found", "share", "exact", "near", "removed")
    rows = [
        (name, f"{s.pictures:,}", f"{_found(s):,}", _share(s), f"{s.exact:,}", f"{s.near:,}", f"{s.removed:,}")
        for name, s in sets.items()
    ]
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return f'<table class="counts"><thead><tr>{head}</tr></thead><tbody>{_rows(rows, columns)}</tbody></table>'


def _share(each: TestSet) -> str:
    return f"{_found(each) / each.pictures:.2%}" if each.pictures else "-"


def _rows(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    drawn = ""
    for first, *rest in rows:
        cells = "".join(
            f'<td data-name="{column}">{escape(cell)}</td>' for column, cell in zip(columns[1:], rest, strict=True)
        )
        drawn += f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    return drawn


def _settings(settings: Mapping[str, object]) -> str:
    drawn = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in settings.items())
    return f"<dl>{drawn}</dl>"


def _gallery(name: str, found: TestSet, shown: int) -> str:
    pairs = found.pairs[:shown]
    told = f"{len(pairs):,} of {len(found.pairs):,} pairs" if len(pairs) < len(found.pairs) else f"{len(pairs):,} pairs"
    return f"""<section><h2>{escape(name)} <span class="quiet">{told if len(pairs) > 1 else "1 pair"}</span></h2>
<ul class="pairs">{"".join(map(_pair, pairs))}</ul>
</section>
"""


def _pair(pair: Pair) -> str:
    kind = "exact" if pair.exact else "near"
    figures = (
        "the same bytes"
        if pair.exact
        else f"{pair.distance} bit{'s' if pair.distance != 1 else ''} apart, score {pair.score:.3f}"
    )
    return f"""<li class="{kind}"><div class="two">{_drawn("corpus", pair.key, pair.picture)}
{_drawn("test set", pair.test_key, pair.test_picture)}</div><p><strong>{kind}</strong> · {figures}</p></li>
"""


def _drawn(where: str, key: str, picture: bytes | NDArray[np.uint8] | None) -> str:
    small = None if picture is None else _encoded(picture)
    name = escape(key)
    image = f'<img src="{small}" alt="">' if small else '<span class="none">not shown</span>'
    return f'<figure>{image}<figcaption><span class="quiet">{where}</span> <code>{name}</code></figcaption></figure>'


def _encoded(picture: bytes | NDArray[np.uint8]) -> str | None:
    """A small JPEG as a data URI; None for what does not decode."""
    pixels = _pixels(picture)
    if pixels is None:
        return None
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Enlarged pictures keep their pixels visible: of some data sets that is how small they are.
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    file = BytesIO()
    Image.fromarray(small).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _pixels(picture: bytes | NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    if not isinstance(picture, bytes):
        return picture
    plain = process(picture, Processing(check="header"))
    if isinstance(plain, Refused):
        return None
    found = cv2.imdecode(np.frombuffer(plain[0], np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if found is None else np.asarray(found, np.uint8)


_STYLE = """
:root {
  --ink: #1f2328; --quiet: #646a73; --grid: #e9e6df; --paper: #fdfcf9; --line: #d9d5cb; --accent: #1b5e9e;
  --exact: #a1470f; --wash: #f5f2ea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8e6e1; --quiet: #a2a5aa; --grid: #2c2f33; --paper: #17191c; --line: #3a3d42; --accent: #79b0e8;
    --exact: #eba26f; --wash: #1f2226;
  }
}
* { box-sizing: border-box; }
html { background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%; }
body { margin: 0; font: 1rem/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4.5rem) clamp(1.1rem, 4vw, 2.5rem) 5rem; }
h1, h2 { font-family: Charter, "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, "DejaVu Serif", serif;
  font-weight: 600; line-height: 1.2; text-wrap: balance; }
h1 { font-size: clamp(1.65rem, 4.4vw, 2.6rem); margin: .35rem 0 .9rem; letter-spacing: -.012em; max-width: 24em; }
h2 { font-size: 1.4rem; margin: 0 0 1.1rem; }
.kind, .quiet { color: var(--quiet); }
.kind { margin: 0; font-size: .9rem; }
h2 .quiet { font: .875rem system-ui, "Segoe UI", Arial, sans-serif; margin-left: .4rem; }
.note { color: var(--quiet); font-size: .875rem; max-width: 44rem; margin: .9rem 0 0; }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
section { margin-top: clamp(2.2rem, 5vw, 3.4rem); padding-top: 1.6rem; border-top: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .5rem; text-align: right; vertical-align: baseline; border-bottom: 1px solid var(--grid); }
th:first-child { padding-left: 0; text-align: left; }
td:last-child, th:last-child { padding-right: 0; }
thead th { color: var(--quiet); font-weight: 400; font-size: .82rem; border-bottom-color: var(--line); }
tbody th { font-weight: 600; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem; margin: 0; font-size: .92rem; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
.pairs { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.pairs li { background: var(--wash); border-left: 3px solid var(--accent); padding: .8rem .9rem .6rem; }
.pairs li.exact { border-left-color: var(--exact); }
.pairs p { margin: .45rem 0 0; font-size: .82rem; font-variant-numeric: tabular-nums; }
.pairs strong { color: var(--accent); }
.pairs .exact strong { color: var(--exact); }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; }
figure { margin: 0; min-width: 0; }
figure img, .none { display: flex; width: 96px; height: 96px; object-fit: contain; object-position: left bottom; }
.none { align-items: center; justify-content: center; border: 1px dashed var(--line); color: var(--quiet);
  font-size: .78rem; }
figcaption { font-size: .78rem; line-height: 1.35; margin-top: .35rem; }
figcaption .quiet { display: block; }
@media (max-width: 44rem) {
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody { display: block; }
  tr { display: block; padding: .8rem 0; border-bottom: 1px solid var(--line); }
  tbody th, td { display: flex; justify-content: space-between; gap: 1.5rem; border: 0; padding: .14rem 0; }
  td::before { content: attr(data-name); color: var(--quiet); }
}
@media print { .pairs li { break-inside: avoid; } }
"""
