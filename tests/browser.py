"""A page as a real browser draws it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest


def drawn(page: bytes, folder: Path, width: int) -> tuple[int, int]:
    """Width and height in pixels that a page needs in a window of this width; `folder` is for its files.

    The test is skipped where there is no browser.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if not browser:
        pytest.skip("no chromium or chrome on PATH")
    # The page is framed, since a browser's window may not become as narrow as a telephone; the frame says its width.
    (folder / "report.html").write_bytes(page)
    measure = "const d=f.contentDocument.documentElement;document.body.title=d.scrollWidth+' '+d.scrollHeight"
    (folder / "frame.html").write_text(
        f'<body><iframe id="f" src="report.html" width="{width}" height="3000" onload="{measure}" style="border:0">'
    )
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    flags += f" --disable-component-update --allow-file-access-from-files --user-data-dir={folder / 'profile'}"
    seen = subprocess.run(
        [browser, *flags.split(), f"--window-size={width + 100},3100", "--dump-dom", (folder / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
    ).stdout
    size = re.search(r'<body title="(\d+) (\d+)"', seen)
    assert size, seen[:500]
    return int(size[1]), int(size[2])
