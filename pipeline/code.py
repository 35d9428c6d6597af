"""Which code this is."""

import os
import subprocess
from pathlib import Path


def version() -> str:
    """The commit of the code, with `-dirty` where the tree differs from it; jobs are told it by `VITSCALE_CODE`."""
    if told := os.environ.get("VITSCALE_CODE"):
        return told
    asked = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude",
        "*",
    ]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
