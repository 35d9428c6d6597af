"""Compare the pretraining runs that MLflow holds: compute against accuracy, and what each is worth downstream.

    python jobs/compare.py --to report

prints the table and writes `report.html`, which needs no network to be looked at, with `report.csv`, `report.svg` and
`report.png` beside it.
"""

import sys
from dataclasses import dataclass

from pipeline.cli import parse, run


@dataclass(frozen=True)
class Compare:
    """Compare the pretraining runs that MLflow holds, in the terminal and on a page."""

    to: str
    """Folder or URL for the report."""
    tracking_uri: str = ""
    """Where MLflow is; the environment's MLFLOW_TRACKING_URI if empty, else a file in ~/.local/share/vitscale."""
    experiment: str = "vitscale"
    """Experiment of MLflow whose runs are compared."""


def main(argv: list[str]) -> None:
    """Print the tables, write the report and say where."""
    wanted = parse(Compare, argv)
    # Imported here, so that --help answers at once.
    from datetime import UTC, datetime

    from rich.console import Console

    from pipeline.insight.report import compare
    from pipeline.insight.words import show
    from pipeline.track.runs import read, tracking_uri

    uri = tracking_uri(wanted.tracking_uri or None)
    report = compare(read(uri, wanted.experiment))
    if not report.runs:
        raise ValueError(f"no pretraining run in experiment {wanted.experiment!r} of MLflow at {uri}")
    # Wide enough for every number, since a narrow terminal can wrap a line but not bring back what was cut.
    show(report, Console(width=max(Console().width, 110)))
    from pipeline.insight.page import write

    print(f"report: {write(report, wanted.to, uri, datetime.now(UTC))}")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
