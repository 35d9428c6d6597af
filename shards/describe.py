"""Says in words what a shard set holds, and shows some of it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any
from unicodedata import combining, normalize

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from shards.manifest import ShardSet

EXTREMES = 10
"""How many of the largest and of the smallest classes are named."""

_GAP = 6
_TEXT = 11
_AT_ONCE = 8


def describe(url: str) -> str:
    """What the set at `url` is and holds, a fact a line; the index is read one shard at a time.

    Quartiles are widths and heights that occur: the smallest that so many pictures do not exceed.
    """
    found = ShardSet(url)
    made, counted = found.manifest, _counted(found)
    lines = [
        made.name,
        _line("at", str(found.folder) + (f", its shards at {found.tars}" if made.tars else "")),
        _line("digest", made.root),
        _line("recipe", _words(made.recipe) or "none"),
        _line("pictures", f"{made.samples:,} in {_count(len(made.shards), 'shard')}, {_size(made.size)}"),
        *_sizes(counted),
        *_classes(counted, made.classes),
        _line("refused", _reasons(made.refused)),
        _line("removed", _reasons(made.removed)),
    ]
    return "\n".join(lines)


@dataclass
class _Counted:
    """Pictures by what the index says of them."""

    labels: Counter[int] = field(default_factory=Counter)
    unlabelled: int = 0
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    extensions: Counter[str] = field(default_factory=Counter)
    bytes: int = 0


def _counted(found: ShardSet) -> _Counted:
    counted = _Counted()
    for shard in range(len(found.manifest.shards)):
        rows = found.rows(shard)
        labels = rows["labels"].combine_chunks()
        counted.labels.update(_counts(labels.flatten()))
        counted.unlabelled += _counts(labels.value_lengths()).get(0, 0)
        counted.widths.update(_counts(rows["width"]))
        counted.heights.update(_counts(rows["height"]))
        counted.extensions.update(name.rpartition(".")[2].lower() for name in rows["member"].to_pylist())
        counted.bytes += int(rows["size"].to_numpy().sum(dtype=np.int64))
    return counted


def _counts(column: pa.ChunkedArray | pa.Array) -> dict[int, int]:
    return {pair["values"]: pair["counts"] for pair in column.value_counts().to_pylist()}


def _line(name: str, text: str) -> str:
    return f"{name:<12}{text}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(number: float) -> str:
    """Bytes as a person says them, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def _words(recipe: Mapping[str, Any]) -> str:
    """Names and values, one behind the other, then the groups; what is empty is left unsaid."""
    said = {name.replace("_", " "): value for name, value in recipe.items() if value not in (None, "", [], {})}
    groups = {name: value for name, value in said.items() if isinstance(value, dict)}
    plain = ", ".join(f"{name} {_value(value)}" for name, value in said.items() if name not in groups)
    return "; ".join([plain] * bool(plain) + [f"{name}: {_words(group)}" for name, group in groups.items()])


def _value(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case list() | tuple():
            return " + ".join(map(_value, value))
    return str(value)


def _sizes(counted: _Counted) -> list[str]:
    total = counted.widths.total()
    if not total:
        return []
    shares = (f"{name} {count / total:.1%}" for name, count in _descending(counted.extensions))
    return [
        _line("formats", f"{', '.join(shares)}; {_size(counted.bytes / total)} a picture"),
        _line("width", _spread(counted.widths)),
        _line("height", _spread(counted.heights)),
    ]


def _spread(counts: Mapping[int, int]) -> str:
    first, second, third = (quantile(counts, share / 4) for share in (1, 2, 3))
    return f"{min(counts)} to {max(counts)} pixels, quartiles {first}, {second}, {third}"


def quantile(counts: Mapping[int, int], share: float) -> int:
    """The smallest of the counted numbers that this share, from 0 to 1, of all do not exceed."""
    numbers = sorted(counts)
    below = np.cumsum([counts[number] for number in numbers])
    return numbers[int(np.searchsorted(below, share * below[-1]))]


def _descending(counts: Mapping[Any, int]) -> list[tuple[Any, int]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _classes(counted: _Counted, classes: tuple[str, ...]) -> list[str]:
    present = [(_class(label, classes), count) for label, count in _descending(counted.labels)]
    empty = len(set(range(len(classes))) - set(counted.labels))
    total = max(len(classes), len(present))
    facts = [f"{total:,}", f"{empty:,} empty" if empty else "none empty"]
    if counted.unlabelled:
        facts.append(f"{_count(counted.unlabelled, 'picture')} of no class")
    lines = [_line("classes", ", ".join(facts))]
    if len(present) <= 2 * EXTREMES:
        return lines + _listed("", present)
    return [*lines, *_listed("largest", present[:EXTREMES]), *_listed("smallest", present[-EXTREMES:])]


def _class(label: int, classes: tuple[str, ...]) -> str:
    return classes[label] if label < len(classes) else f"{label}"


def _listed(title: str, pairs: list[tuple[str, int]]) -> list[str]:
    width = max((len(f"{count:,}") for _, count in pairs), default=0)
    titles = [title, *[""] * len(pairs)]
    return [
        _line(f"  {word}", f"{count:>{width},}  {name}") for word, (name, count) in zip(titles, pairs, strict=False)
    ]


def _reasons(counts: Mapping[str, int]) -> str:
    if not counts:
        return "none"
    return f"{sum(counts.values()):,}: " + ", ".join(f"{reason} {count:,}" for reason, count in _descending(counts))


def contact_sheet(url: str, count: int = 64, side: int = 112) -> bytes:
    """A PNG of `count` pictures, or of all if they are fewer, evenly spaced over the set at `url`.

    They stand in their order, row by row, in squares of `side` pixels, with the names of their classes beneath. The
    same set gives the same sheet. Only the rows of the shards that hold them, and their own bytes, are read.
    """
    if count < 1 or side < 16:
        raise ValueError(f"a contact sheet has 1 picture of 16 pixels at least, not {count} of {side}")
    found = ShardSet(url)
    if not found.manifest.samples:
        raise ValueError(f"{found.folder} holds no picture to show")
    chosen = list(_rows(found, evenly(found.manifest.samples, count)))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        pictures = pool.map(lambda row: _picture(found, row, side), chosen)
        names = [_names(row["labels"], found.manifest.classes) for row in chosen]
        return sheet(zip(pictures, names, strict=True), len(chosen), side)


def evenly(total: int, count: int) -> NDArray[np.int64]:
    """Numbers below `total`, ascending, each in the middle of one of `count` equal parts; all where they are fewer."""
    count = min(total, count)
    return (2 * np.arange(count, dtype=np.int64) + 1) * total // (2 * count)


def _rows(found: ShardSet, numbers: NDArray[np.int64]) -> Iterable[dict[str, Any]]:
    shards = np.searchsorted(found.first + found.counts, numbers, side="right")
    for shard in np.unique(shards).tolist():
        places = numbers[shards == shard] - found.first[shard]
        yield from found.rows(shard).take(pa.array(places)).to_pylist()


def _names(labels: list[int], classes: tuple[str, ...]) -> str:
    return ", ".join(_class(label, classes) for label in labels) or "no class"


def _picture(found: ShardSet, row: dict[str, Any], side: int) -> Image.Image:
    name = found.manifest.shards[row["shard"]].name
    data = found.tars.read(name, row["offset"], row["offset"] + row["size"])
    try:
        with Image.open(BytesIO(data)) as picture:
            return ImageOps.contain(picture.convert("RGB"), (side, side), Image.Resampling.BOX)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise
        raise ValueError(f"{found.tars}/{name}: {row['member']} does not decode ({error}): verify the set") from error


def sheet(captioned: Iterable[tuple[Image.Image, str]], count: int, side: int) -> bytes:
    """A PNG of `count` pictures no larger than `side` pixels, row by row, each with a line beneath it."""
    columns = math.ceil(math.sqrt(count))
    across, down = side + _GAP, side + _TEXT + 2 * _GAP
    size = columns * across + _GAP, math.ceil(count / columns) * down + _GAP
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(_TEXT)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, name) in enumerate(captioned):
        left, top = _GAP + number % columns * across, _GAP + number // columns * down
        sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
        draw.text((left, top + side + 1), _fitting(name, font, side), "black", font)
    data = BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()


def _fitting(text: str, font: Any, width: int) -> str:
    """As much of one line as is not wider than so many pixels, in the letters that Pillow's own font has."""
    letters = "".join(letter for letter in normalize("NFKD", text) if not combining(letter))
    text = " ".join(letters.encode("ascii", "replace").decode().split())
    if font.getlength(text) <= width:
        return text
    return next(
        (cut for end in range(len(text), 0, -1) if font.getlength(cut := f"{text[:end].rstrip()}...") <= width), ""
    )
