"""Show what a run was given.

    python jobs/show.py batch RUN --step 81204 --sheet step.png

lists the pictures of that step, counted from 0, and draws them as they were cropped: for looking into a spike of the
loss. RUN is the run's folder or URL; `--shards SET` says where its shard set lies, if it has been moved.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import parse, run


@dataclass(frozen=True)
class Show:
    """Show the pictures of a step."""

    step: int
    """Which step, counted from 0."""
    sheet: str = ""
    """PNG file to draw the pictures into."""
    shards: str = ""
    """Folder or URL of the run's shard set, where it is no more where it was."""
    side: int = 112
    """Pixels of a picture on the sheet."""


def main(argv: list[str]) -> None:
    """Do what the first word says."""
    match argv:
        case [] | ["-h" | "--help", *_]:
            print(__doc__)
        case ["batch", folder, *options] if not folder.startswith("-"):
            batch(folder, parse(Show, options))
        case _:
            raise ValueError("show takes the word batch and the run's folder, then --step")


def batch(folder: str, wanted: Show) -> None:
    """List the pictures of a step, and draw them."""
    # Imported here, so that --help answers at once.
    from PIL import Image

    from pipeline.insight.batch import batch
    from shards.describe import sheet

    shown = list(batch(folder, wanted.step, wanted.shards))
    width = max(len(one.key) for one in shown)
    for one in shown:
        print(f"{one.shard}  {one.key:<{width}}  {', '.join(one.classes)}")
    if wanted.sheet:
        size = (wanted.side, wanted.side)
        drawn = ((Image.fromarray(one.pixels).resize(size), ", ".join(one.classes)) for one in shown)
        Path(wanted.sheet).write_bytes(sheet(drawn, len(shown), wanted.side))
        print(f"sheet: {wanted.sheet}")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
