r"""How fast pictures are fed: ratios over named peers, on the same pictures and crops, in turns.

    python benchmarks/feed.py [--quick] [--peers PYTHON] [--only PART ...] [--count 2048] [--rounds 5]

Batches of 64 crops (area 0.08 to 1, mirrored or not, 224 x 224), shuffled, by two workers or threads, caches hot:
- `full`: photographs of about 500 x 375 (`photographs.py`); `small`: the same with a short side of 256;
- `same`: `full`, with our kernel behind the peers as well;
- `raw`: the encoded pictures of `full`, shuffled, by one process without workers (ours: one thread, 256 at a time); the
  `floor` reads them one by one by offsets that it knows, and does nothing else;
- `s3`: those of `full` from an S3 server on this machine, ours through an empty cache, webdataset by `pipe:curl`;
- `resume`: a run's first batch from a set of 14 million, at its beginning and in the middle of an epoch.

Peers: `webdataset` with the stock chain (Pillow decodes, bicubic, float32, normalised), MosaicML `streaming` and
`litdata` with the same chain, `pillow_loader` (a file a picture, Pillow, bicubic, uint8, as timm has it). Each is a
process of its own that lives through all rounds; the first round warms up, and in each the order is drawn anew.

A ratio is a median over the rounds, of pictures per CPU-second, the workers' included; the same by the clock has
`_wall` in its name. `s3_over_pipe_curl` is by the clock, and `s3_over_pipe_curl_cpu` by CPU-seconds. Times are worth
something on a quiet machine only; CPU time suffers less. `resume_seconds` is how much later the first batch comes
than after `fresh_seconds`, by the clock; `resume_cpu_seconds` how much more work it is.

PYTHON is an interpreter that has mosaicml-streaming and litdata beside all that this one has. Their dependencies do not
go together with ours, so it looks into our environment and gets no more than what they import:

    python -m venv PEERS
    python -c "import site; print(site.getsitepackages()[0])" > PEERS/lib/python3.11/site-packages/ours.pth
    PEERS/bin/pip install --no-deps mosaicml-streaming litdata scikit-image lightning-utilities obstore s3transfer \
        boto3==OUR_BOTOCORE tifffile catalogue zstd brotli python-snappy cramjam transformers tokenizers regex

Without it these two are left out. All lies in a temporary folder (TMPDIR), about a gigabyte, which should not be on a
tmpfs: pages of a file system's cache are read faster. Last line: the figures as JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

from peers import sets, store
from peers.contest import BATCH, FILES, TARS, WRITE, Spent, Task, Turn, timed

from pipeline.seed import permutation

ROOT = Path(__file__).resolve().parents[1]
FULL, SMALL, HUGE = "full", "small", "huge"
FOREIGN = ("streaming", "litdata")


class Part(NamedTuple):
    """A race: what its ratios are called, which pictures it is about, and who takes part."""

    name: str
    pictures: str
    contestants: tuple[str, ...]


PARTS = {
    "full": Part("full", FULL, ("ours", "webdataset", "streaming", "litdata", "pillow_loader")),
    "small": Part("small", SMALL, ("ours", "webdataset", "pillow_loader")),
    "same": Part("same_decoder", FULL, ("ours", "webdataset", "streaming", "litdata")),
    "raw": Part("raw", FULL, ("ours", "webdataset", "streaming", "litdata", "floor")),
    "s3": Part("s3", FULL, ("ours", "webdataset")),
    "resume": Part("resume", HUGE, ("fresh", "resumed")),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="fewer pictures and rounds")
    arguments.add_argument("--peers", default="", help="an interpreter with mosaicml-streaming and litdata")
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts")
    arguments.add_argument("--count", type=int, default=0, help="pictures")
    arguments.add_argument("--rounds", type=int, default=0)
    arguments.add_argument("--contestant", default="", help=argparse.SUPPRESS)
    arguments.add_argument("--task", default="", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.contestant:
        serve(given.contestant, given.task)
        return
    count = given.count or (320 if given.quick else 2048)
    if count % BATCH or count < BATCH:
        arguments.error(f"--count is {count}; it has to be a multiple of {BATCH}, so that batches make an epoch")
    rounds = given.rounds or (2 if given.quick else 5)
    with tempfile.TemporaryDirectory(prefix="vitscale-") as folder:
        figures = compete(Path(folder), given.only, rounds, count, given.peers)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def compete(folder: Path, parts: list[str], rounds: int, count: int, peers: str) -> dict[str, float]:
    """All figures of these parts."""
    prepare(folder, {PARTS[name].pictures for name in parts}, count, peers)
    figures: dict[str, float] = {}
    for name in parts:
        serving = store.serving(folder / "store", folder / FULL / TARS) if name == "s3" else nullcontext({})
        with serving as environment, ExitStack() as stack:
            contestants = {
                one: stack.enter_context(running(one, task(folder, name, one, environment), peers, environment))
                for one in PARTS[name].contestants
                if peers or one not in FOREIGN
            }
            spent = take_turns(contestants, rounds)
        found = figures_of(name, spent, folder)
        say(name, spent, found)
        figures |= found
    return figures


def prepare(folder: Path, wanted: set[str], count: int, peers: str) -> None:
    """Make the pictures that are wanted, in every form that somebody reads."""
    if HUGE in wanted:
        sets.huge(folder / HUGE)
    if wanted == {HUGE}:
        return
    make = [peers or sys.executable, ROOT / "benchmarks" / "photographs.py", folder / "made", "--count", str(count)]
    done = subprocess.run(make, env=surroundings(), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("no photographs")
    print(done.stdout.strip(), flush=True)
    for name in (FULL, SMALL):
        (folder / name).mkdir()
        (folder / "made" / name).rename(folder / name / FILES)
        sets.shard_set(sets.labelled(folder / name / FILES), folder / name / TARS, count)
    for one in FOREIGN if peers and FULL in wanted else ():
        with running(one, Task(WRITE, folder / FULL, "", folder / f"write-{one}"), peers, {}) as writer:
            writer.turn(0)


def task(folder: Path, part: str, contestant: str, environment: dict[str, str]) -> Task:
    """What a contestant has to do."""
    url = ""
    if part == "s3":
        url = store.curl(environment) if contestant == "webdataset" else store.URL
    what = contestant if part == "resume" else part
    return Task(what, folder / PARTS[part].pictures, url, folder / f"{part}-{contestant}")


def take_turns(contestants: "dict[str, Contestant]", rounds: int) -> dict[str, list[Spent]]:
    """What each contestant spent in each round; the first round, which warms up, is left out."""
    spent: dict[str, list[Spent]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for i in permutation(len(contestants), "round", number).tolist():
            name = list(contestants)[i]
            found = contestants[name].turn(number)
            if number:
                spent[name].append(found)
    return spent


def figures_of(part: str, spent: dict[str, list[Spent]], folder: Path) -> dict[str, float]:
    """The medians of a part, by the names that they have in the JSON."""
    if part == "resume":
        pairs = list(zip(spent["fresh"], spent["resumed"], strict=True))
        return {
            "resume_seconds": median(resumed.wall - fresh.wall for fresh, resumed in pairs),
            "resume_cpu_seconds": median(resumed.cpu - fresh.cpu for fresh, resumed in pairs),
            "fresh_seconds": median(fresh.wall for fresh, _ in pairs),
        }
    if part == "s3":
        gigabytes = sum(path.stat().st_size for path in (folder / FULL / TARS).glob("*.tar")) / 1e9
        return {
            "s3_over_pipe_curl": ratio(spent, "webdataset", "wall"),
            "s3_over_pipe_curl_cpu": ratio(spent, "webdataset", "cpu"),
            "s3_megabytes_per_second": 1000 * gigabytes / median(one.wall for one in spent["ours"]),
            "s3_cpu_seconds_per_gb": median(one.cpu for one in spent["ours"]) / gigabytes,
        }
    name, others = PARTS[part].name, [one for one in spent if one != "ours"]
    by_processor = {f"{name}_over_{one}": ratio(spent, one, "cpu") for one in others}
    return by_processor | {f"{name}_over_{one}_wall": ratio(spent, one, "wall") for one in others}


def ratio(spent: dict[str, list[Spent]], other: str, by: str) -> float:
    """How many pictures ours makes in the time in which the other makes one."""

    def each(one: Spent) -> float:
        return getattr(one, by) / one.pictures

    return median(each(theirs) / each(ours) for ours, theirs in zip(spent["ours"], spent[other], strict=True))


def say(part: str, spent: dict[str, list[Spent]], found: dict[str, float]) -> None:
    """Print the table of a part and what follows from it."""
    print(f"\n{part:<16}{'pictures/s':>12}{'per CPU-second':>16}   seconds (CPU-seconds) of each round")
    for name, turns in spent.items():
        wall, cpu = median(one.pictures / one.wall for one in turns), median(one.pictures / one.cpu for one in turns)
        rounds = "  ".join(f"{one.wall:.2f} ({one.cpu:.2f})" for one in turns)
        print(f"{name:<16}{wall:>12,.0f}{cpu:>16,.0f}   {rounds}")
    for name, value in found.items():
        print(f"  {name} {value:.3g}", flush=True)


class Contestant:
    """A process that takes a turn when it is told to."""

    def __init__(self, name: str, process: "subprocess.Popen[str]", log: Path) -> None:
        self.name, self.process, self.log = name, process, log

    def turn(self, number: int) -> Spent:
        """What the turn took; SystemExit, with the end of what it had to say, where the contestant fails."""
        assert self.process.stdin and self.process.stdout
        try:
            print(number, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            sys.exit(f"{self.name} failed:\n{self.log.read_text()[-3000:]}")
        return Spent(*json.loads(answer))


@contextmanager
def running(name: str, work: Task, peers: str, environment: dict[str, str]) -> Iterator[Contestant]:
    """A contestant in a process of its own, which ends with the block."""
    python, log = peers if name in FOREIGN else sys.executable, work.aside.with_suffix(".log")
    command = [python, __file__, "--contestant", name, "--task", json.dumps(work, default=str)]
    with log.open("wb") as said:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
        process = subprocess.Popen(command, env=surroundings() | environment, text=True, **pipes)
    try:
        yield Contestant(name, process, log)
        with suppress(subprocess.TimeoutExpired):  # one that does not want to end is ended
            process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()


def surroundings() -> dict[str, str]:
    """The environment of all processes: this project, one thread for arithmetic."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def serve(name: str, work: str) -> None:
    """Be a contestant: take a turn for each line that comes in, and answer with what it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    part, pictures, url, aside = json.loads(work)
    turn = turns(name, Task(part, Path(pictures), url, Path(aside)))
    for line in sys.stdin:
        print(json.dumps(timed(turn, int(line))), file=answers, flush=True)


def turns(name: str, work: Task) -> Turn:
    """What a contestant does; only one that takes part is imported."""
    match name:
        case "webdataset":
            from peers import stock_webdataset as contestant
        case "streaming":
            from peers import stock_streaming as contestant
        case "litdata":
            from peers import stock_litdata as contestant
        case "pillow_loader":
            from peers import pillow_loader as contestant
        case "floor":
            from peers import floor as contestant
        case _:
            from peers import ours as contestant
    return contestant.turns(work)


if __name__ == "__main__":
    main()
