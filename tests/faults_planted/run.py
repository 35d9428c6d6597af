"""Proves that the tests catch what they should: plants faults in a copy of the checkout, and runs the tests for each.

    .venv/bin/python tests/faults_planted/run.py [NAME ...] [--jobs N] [--list]

Each `*.patch` beside this file is one fault: a mistake that a person could make in the product. Its header says which
law of the README (section "What holds") it breaks and which tests catch it:

    Law: A metric of a step stands in MLflow once, also when the server was away.
    Caught by: tests/test_track.py::test_every_step_is_there_once_as_if_the_run_had_never_started_again

followed by a unified diff. `Caught by` holds what pytest takes, node ids and options such as `-k`, split as by a shell.

A fault is caught when at least one of its tests FAILS. An error at collection or in a fixture, a skip, or a run that
takes longer than --seconds is no catch. First all named tests have to pass in a copy without a fault. Prints a table;
the exit status is 1 where a test fails without a fault, a fault is not caught, or a patch does not apply any more.

No process of a test sees the checkout itself, whatever starts it: each copy has an interpreter of its own, whose path
begins with the copy and goes on with the packages of this interpreter's environment, but without its `.pth` files, by
which an editable installation is found.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import xml.etree.ElementTree as xml
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 900.0
"""For the tests of one fault."""
EXIT_SECONDS = 20.0
"""For the end of the process after that of its tests."""
BASELINE_SECONDS = 3600.0
"""For all named tests together, without a fault."""
WIDTH = 240
"""Characters of what is said of the first test that failed."""


@dataclass(frozen=True)
class Fault:
    """A patch, and what its header says."""

    path: Path
    law: str
    tests: tuple[str, ...]
    """Arguments of pytest."""

    @property
    def name(self) -> str:
        """By which it is asked for."""
        return self.path.stem


@dataclass(frozen=True)
class Outcome:
    """What came of the tests: how many of them in which way, how long they took, and what they printed."""

    passed: int
    failed: tuple[str, ...]
    """Each with what it says was wrong."""
    other: str
    """Errors, skips or the end of the time, in words; empty where there was none."""
    seconds: float
    said: str


def read_fault(path: Path) -> Fault:
    """The fault in a patch file; ValueError where its header lacks a line."""
    header = path.read_text().partition("\n--- ")[0]
    found = dict(re.findall(r"^(Law|Caught by): (.+)$", header, re.MULTILINE))
    if found.keys() != {"Law", "Caught by"}:
        raise ValueError(f"{path.name} needs the header lines `Law: …` and `Caught by: …`, each once, before its diff")
    return Fault(path, found["Law"], tuple(shlex.split(found["Caught by"])))


def copy_checkout(target: Path) -> None:
    """Copy all files that git knows or does not ignore, and the compiled modules; with their bytecode, made once."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    compiled = [path.name for path in ROOT.glob("*.so")]
    for name in filter(None, [*names, *compiled]):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    folders = [str(target / name) for name in ("pipeline", "shards", "jobs", "infra")]
    subprocess.run([sys.executable, "-m", "compileall", "-q", *folders], check=True)


def make_interpreter(folder: Path, checkout: Path) -> Path:
    """Make an environment that imports from the checkout first, then this environment's packages; its interpreter."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    python = folder / "bin" / "python"
    place = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    packages = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    # A folder that is named in a .pth file is searched for modules, but not for further .pth files.
    (Path(place) / "copy.pth").write_text("\n".join([str(checkout), *packages]) + "\n")
    for script in Path(sys.executable).parent.iterdir():
        made = python.with_name(script.name)
        if made.exists() or not script.is_file():
            continue
        start, _, rest = script.read_bytes().partition(b"\n")
        if start.startswith(b"#!") and b"python" in start:
            made.write_bytes(f"#!{python}\n".encode() + rest)
            made.chmod(0o755)
        else:
            made.symlink_to(script)
    return python


def apply(patch: Path, checkout: Path) -> str:
    """Apply a patch to a copy; what git says where it does not apply."""
    # Without the ceiling git would take a repository above the copy for the one that is meant, and do nothing.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(checkout.parent)}
    done = subprocess.run(
        ["git", "apply", "-v", str(patch)], cwd=checkout, env=environment, capture_output=True, text=True
    )
    applied = done.returncode == 0 and "Applied patch" in done.stderr
    return "" if applied else " ".join(done.stderr.split()) or "git apply did nothing"


def run_tests(python: Path, checkout: Path, tests: list[str], seconds: float, *, first: bool) -> Outcome:
    """Run tests in a copy, up to the first that fails where that is enough."""
    report, began = checkout.parent / "report.xml", time.monotonic()
    command = [str(python), "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "VIRTUAL_ENV": str(python.parents[1])}
    environment["PATH"] = os.pathsep.join([str(python.parent), environment.get("PATH", "")])
    with (checkout.parent / "said.txt").open("w+") as said:
        process = subprocess.Popen(
            [*command, *(["-x"] if first else []), *tests],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            late = "" if wait(process, report, began + seconds) else f"not at its end after {seconds:.0f} s"
        finally:
            end_all(checkout.parent)
            process.wait()
        said.seek(0)
        text = said.read()
    took = time.monotonic() - began
    if late or not report.exists():
        return Outcome(0, (), late or f"pytest ended with {process.returncode}", took, text)
    return _outcome(report, took, text)


def _outcome(report: Path, seconds: float, said: str) -> Outcome:
    passed, failed, others = 0, [], dict[str, int]()
    for case in xml.parse(report).getroot().iter("testcase"):
        kinds = {each.tag for each in case} & {"failure", "error", "skipped"}
        passed += not kinds
        for failure in case.iter("failure"):
            failed.append(f"{case.get('name')}: {' '.join(failure.get('message', '').split())}")
        for kind in kinds - {"failure"}:
            others[kind] = others.get(kind, 0) + 1
    if not passed and not failed and not others:
        others["tests at all"] = 0
    return Outcome(passed, tuple(failed), ", ".join(f"{n} {kind}" for kind, n in others.items()), seconds, said)


def wait(process: subprocess.Popen, report: Path, until: float) -> bool:
    """Return when the tests have ended; whether they have in time.

    That is when their report is there: what a fault has left hanging in the process may keep it for ever.
    """
    while time.monotonic() < until:
        if process.poll() is not None:
            return True
        if report.exists():
            with suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_SECONDS)
            return True
        time.sleep(0.2)
    return False


def end_all(folder: Path) -> None:
    """Kill every process whose command or environment names the folder of a copy, whoever its parent is by now."""
    word, own = str(folder), os.getpid()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            told = [*process.cmdline(), *process.environ().values()]
            if process.pid != own and any(word in each for each in told):
                process.kill()


def run_fault(fault: Fault, clean: Path, seconds: float) -> tuple[Outcome, str]:
    """Plant a fault in a new copy of the clean one and run its tests; with what is wrong, empty where it is caught."""
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        checkout = Path(folder) / "copy"
        shutil.copytree(clean, checkout)
        if refused := apply(fault.path, checkout):
            return Outcome(0, (), "", 0.0, refused), "DOES NOT APPLY"
        python = make_interpreter(Path(folder) / "env", checkout)
        outcome = run_tests(python, checkout, list(fault.tests), seconds, first=True)
    return outcome, "" if outcome.failed else "NOT CAUGHT"


def run_baseline(faults: list[Fault], clean: Path) -> Outcome:
    """Run the tests of all faults in a copy without any; those that are named with options go one by one."""
    whole = list(dict.fromkeys(test for fault in faults if _plain(fault) for test in fault.tests))
    runs = [whole] * bool(whole) + [list(fault.tests) for fault in faults if not _plain(fault)]
    outcomes = []
    for tests in runs:
        with tempfile.TemporaryDirectory(prefix="fault-") as folder:
            checkout = Path(folder) / "copy"
            shutil.copytree(clean, checkout)
            python = make_interpreter(Path(folder) / "env", checkout)
            outcomes.append(run_tests(python, checkout, tests, BASELINE_SECONDS, first=False))
    return Outcome(
        sum(each.passed for each in outcomes),
        tuple(test for each in outcomes for test in each.failed),
        "; ".join(filter(None, (each.other for each in outcomes))),
        sum(each.seconds for each in outcomes),
        "\n".join(each.said for each in outcomes if each.failed or each.other),
    )


def _plain(fault: Fault) -> bool:
    """Whether its tests are node ids and nothing else."""
    return not any(word.startswith("-") for word in fault.tests)


def chosen(names: list[str]) -> list[Fault]:
    """The faults of these names, all where none is given; ValueError names one that is not there."""
    faults = {path.stem: path for path in sorted(HERE.glob("*.patch"))}
    if unknown := [name for name in names if name.removesuffix(".patch") not in faults]:
        raise ValueError(f"no fault {unknown[0]}; there are: {', '.join(faults)}")
    wanted = [faults[name.removesuffix(".patch")] for name in names] or list(faults.values())
    return [read_fault(path) for path in wanted]


def main() -> int:
    """Run the baseline and the faults; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="faults to plant, all if none is named")
    parser.add_argument("--jobs", type=int, default=1, help="faults that are tried at the same time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the tests of one fault")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a fault first")
    parser.add_argument("--list", action="store_true", help="print the laws and the faults against them, and end")
    given = parser.parse_args()
    faults = chosen(given.names)
    if given.list:
        for fault in sorted(faults, key=lambda fault: fault.law):
            print(f"{fault.law}\n    {fault.name}: {' '.join(fault.tests)}")
        return 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        clean = Path(folder) / "clean"
        copy_checkout(clean)
        sound = given.no_baseline or _tell_baseline(run_baseline(faults, clean))
        with ThreadPoolExecutor(given.jobs) as threads:
            caught = list(threads.map(lambda fault: _tell(fault, *run_fault(fault, clean, given.seconds)), faults))
    print(f"{sum(caught)} of {len(faults)} faults are caught{'' if sound else '; THE TESTS FAIL WITHOUT THEM'}")
    return 0 if sound and all(caught) else 1


def _tell_baseline(outcome: Outcome) -> bool:
    """Print how the tests ended without a fault; whether all is well."""
    sound = bool(outcome.passed) and not outcome.failed and not outcome.other
    print(f"without a fault: {outcome.passed} tests pass, {outcome.seconds:.0f} s", flush=True)
    if not sound:
        print(outcome.said, f"FAILED: {', '.join(outcome.failed) or 'none'}; {outcome.other}", sep="\n", flush=True)
    return sound


def _tell(fault: Fault, outcome: Outcome, wrong: str) -> bool:
    """Print a line of the table; whether the fault is caught."""
    by = outcome.failed[0] if outcome.failed else outcome.other
    print(f"{wrong or 'caught':14}  {fault.name:32}  {outcome.seconds:5.0f} s  {by[:WIDTH]}", flush=True)
    if wrong:
        print("\n".join(f"    {line}" for line in outcome.said.splitlines()[-30:]), flush=True)
    return not wrong


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
