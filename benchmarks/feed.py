"""How fast images are fed: ratios over named peers, on the same images and crops, in turns.

    python benchmarks/feed.py [--quick] [--peers PYTHON] [--only PART ...] [--count 2048] [--rounds 5]

Batches of 64 crops (area 0.08 to 1, mirrored or not, 224 x 224), shuffled, by two workers or threads, caches hot:
- `full`: photographs of about 500 x 375 (`photographs.py`); `small`: the same with a short side of 256;
- `same`: `full`, with our kernel behind the peers as well;
- `raw`: the encoded pictures of `full`, shuffled, by one process without workers (ours: one thread, 256 at a time); the
  `floor` reads them one by one by offsets that it knows, and does nothing else;
- `s3`: the same set from an S3 server on this machine, ours through an empty cache, webdataset by `pipe:curl`;
- `resume`: a run's first batch from a set of 14 million, at its beginning and in the middle of an epoch.

Peers: `webdataset` with the stock chain (Pillow decodes, bicubic, float32, normalised), MosaicML `streaming` and
`litdata` with the same chain, `pillow_loader` (a file a picture, Pillow, bicubic, uint8, as timm has it). Each is a
process of its own that lives through all rounds; the first round warms up, and in each the order is drawn anew.

--quick takes fewer rounds of fewer images, but for `raw` and `s3`, whose set always has 2,048: where there are fewer
they come several times, each with bytes of its own. Fewer would be another measurement: of 320 (25 MB) `raw` came to
0.28 of the floor in place of 0.52. Most of that is the floor's: so small a set stays in the processor's own cache, from
which the floor, which throws the bytes away, reads an image in 5 to 7 µs in place of 12; ours hands out 20 MB at a
time and gains nothing. The rest is ours, 27 µs in place of 24: what it does once an epoch for each lane (the order, the
look ahead) was shared by 5 images of a lane and not by 32.

A ratio is a median over the rounds, of pictures per CPU-second, the workers' included; the same by the clock has
`_wall` in its name. `s3_over_pipe_curl` is by the clock, and `s3_over_pipe_curl_cpu` by CPU-seconds. Times are worth
something on a quiet machine only; CPU time suffers less. `resume_seconds` is how much later the first batch comes
than after `fresh_seconds`, by the clock; `resume_cpu_seconds` how much more work it is.

PYTHON is an interpreter that has mosaicml-streaming and litdata beside all that this one has. Their dependencies do not
go together with ours; `benchmarks/peers/install.sh PEERS` makes PEERS/bin/python, which looks into our environment and
has no more than what they import. Without it these two are left out. All lies in a temporary folder (TMPDIR), about a
gigabyte, which should not be on a tmpfs: pages of a file system's cache are read faster. Last line: the figures as
JSON.
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
from peers.contest import BATCH, FILES, TARS, WRITE, Spent, Task, Turn, divide_rounds, report, take_turns, timed

ROOT = Path(__file__).resolve().parents[1]
FULL, SMALL, STORED, HUGE = "full", "small", "stored", "huge"
COUNT = 2048
"""Pictures of `full` and `small`, and always of `stored`, which has those of `full`, several times where need be."""
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
    "raw": Part("raw", STORED, ("ours", "webdataset", "streaming", "litdata", "floor")),
    "s3": Part("s3", STORED, ("ours", "webdataset")),
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
    count = given.count or (640 if given.quick else COUNT)
    if count % BATCH or count < BATCH:
        arguments.error(f"--count is {count}; it has to be a multiple of {BATCH}, so that batches make an epoch")
    rounds = given.rounds or (3 if given.quick else 5)
    with tempfile.TemporaryDirectory(prefix="vitscale-") as folder:
        report(*compete(Path(folder), given.only, rounds, count, given.peers))


def compete(
    folder: Path, parts: list[str], rounds: int, count: int, peers: str
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The ratios of these parts in each round, and their figures."""
    prepare(folder, {PARTS[name].pictures for name in parts}, count, peers)
    ratios: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    for name in parts:
        serving = store.serving(folder / "store", folder / STORED / TARS) if name == "s3" else nullcontext({})
        with serving as environment, ExitStack() as stack:
            contestants = {
                one: stack.enter_context(running(one, task(folder, name, one, environment), peers, environment))
                for one in PARTS[name].contestants
                if peers or one not in FOREIGN
            }
            spent = take_turns({one: contestant.turn for one, contestant in contestants.items()}, rounds)
        say(name, spent)
        ratios |= ratios_of(name, spent)
        figures |= figures_of(name, spent, folder)
    return ratios, figures


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
    if STORED in wanted:
        repeat(folder / FULL / FILES, folder / STORED / FILES, COUNT)
        sets.shard_set(sets.labelled(folder / STORED / FILES), folder / STORED / TARS, COUNT)
    for name in wanted & {FULL, STORED} if peers else ():
        for one in FOREIGN:
            with running(one, Task(WRITE, folder / name, "", folder / f"write-{name}-{one}"), peers, {}) as writer:
                writer.turn(0)


def repeat(files: Path, target: Path, count: int) -> None:
    """Link `count` files to those of a folder, from its first one again where it has fewer."""
    target.mkdir(parents=True)
    each = sorted(files.iterdir())
    for number in range(count):
        os.link(each[number % len(each)], target / f"{number:06}.jpg")


def task(folder: Path, part: str, contestant: str, environment: dict[str, str]) -> Task:
    """What a contestant has to do."""
    url = ""
    if part == "s3":
        url = store.curl(environment) if contestant == "webdataset" else store.URL
    what = contestant if part == "resume" else part
    return Task(what, folder / PARTS[part].pictures, url, folder / f"{part}-{contestant}")


def ratios_of(part: str, spent: dict[str, list[Spent]]) -> dict[str, list[float]]:
    """The ratios of a part in each round, by the names that they have in the JSON."""
    if part == "resume":
        return {}
    if part == "s3":
        return {
            "s3_over_pipe_curl": ratios(spent, "webdataset", "wall"),
            "s3_over_pipe_curl_cpu": ratios(spent, "webdataset", "cpu"),
        }
    name, others = PARTS[part].name, [one for one in spent if one != "ours"]
    by_processor = {f"{name}_over_{one}": ratios(spent, one, "cpu") for one in others}
    return by_processor | {f"{name}_over_{one}_wall": ratios(spent, one, "wall") for one in others}


def ratios(spent: dict[str, list[Spent]], other: str, by: str) -> list[float]:
    """How many pictures ours makes in the time in which the other makes one."""
    each = {name: [getattr(one, by) / one.pictures for one in spent[name]] for name in ("ours", other)}
    return divide_rounds(each[other], each["ours"])


def figures_of(part: str, spent: dict[str, list[Spent]], folder: Path) -> dict[str, float]:
    """What is no ratio, medians over the rounds."""
    if part == "resume":
        pairs = list(zip(spent["fresh"], spent["resumed"], strict=True))
        return {
            "resume_seconds": median(resumed.wall - fresh.wall for fresh, resumed in pairs),
            "resume_cpu_seconds": median(resumed.cpu - fresh.cpu for fresh, resumed in pairs),
            "fresh_seconds": median(fresh.wall for fresh, _ in pairs),
        }
    if part == "s3":
        gigabytes = sum(path.stat().st_size for path in (folder / STORED / TARS).glob("*.tar")) / 1e9
        return {
            "s3_megabytes_per_second": 1000 * gigabytes / median(one.wall for one in spent["ours"]),
            "s3_cpu_seconds_per_gb": median(one.cpu for one in spent["ours"]) / gigabytes,
        }
    return {}


def say(part: str, spent: dict[str, list[Spent]]) -> None:
    """Print the table of a part."""
    print(f"\n{part:<16}{'pictures/s':>12}{'per CPU-second':>16}   seconds (CPU-seconds) of each round")
    for name, turns in spent.items():
        wall, cpu = median(one.pictures / one.wall for one in turns), median(one.pictures / one.cpu for one in turns)
        rounds = "  ".join(f"{one.wall:.2f} ({one.cpu:.2f})" for one in turns)
        print(f"{name:<16}{wall:>12,.0f}{cpu:>16,.0f}   {rounds}", flush=True)


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
