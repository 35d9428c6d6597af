"""The building keeps its floors: imports go down only, and each heavy dependency has its one door."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jobs", "pipeline", "shards")

# From the roof down. Those of one floor do not know each other, except on the lowest but one.
FLOORS = (
    {"jobs"},
    {"pipeline.search"},
    {"pipeline.large"},
    {"pipeline.launch"},
    {"pipeline.train", "pipeline.transfer", "pipeline.insight"},
    {"pipeline.data", "pipeline.models", "pipeline.objectives", "pipeline.optim", "pipeline.track"},
    {"pipeline.config", "pipeline.seed", "pipeline.world", "pipeline.cli", "pipeline.code", "pipeline.experiments"},
    {"pipeline.architectures"},
    {"shards"},
)
ROOM_MATES = FLOORS[6]

# The modules, as prefixes, that may import it.
DOORS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("pipeline.train.engine",),
    "ray": (
        "pipeline.launch",
        "pipeline.search",
        "pipeline.transfer.spare",
        "pipeline.transfer.workers",
        "shards.cluster",
    ),
    "mlflow": ("pipeline.track",),
    "webdataset": (),
    "torchvision": (),
}

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module(path: Path) -> str:
    """`pipeline.data.plan` for `pipeline/data/plan.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, wherever in the file; of `from a import b` both a and a.b."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=str(origin), names=names, level=0):
                yield origin
                yield from (f"{origin}.{name.name}" for name in names)
            case ast.ImportFrom(level=level) if level:
                raise AssertionError("a relative import, which this test does not follow")


def within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def home(name: str) -> tuple[int, str] | None:
    """The floor and the neighbour that a module belongs to; None for other people's."""
    if name == "pipeline":  # its docstring alone
        return FLOORS.index(ROOM_MATES), name
    for height, floor in enumerate(FLOORS):
        for one in floor:
            if within(name, one):
                return height, one
    return None


def wrong(name: str, tree: ast.AST) -> list[str]:
    """Imports of the module that go up, or over to a neighbour."""
    ours = home(name)
    theirs = [(other, home(other)) for other in imports(tree)]
    return [
        f"{name} imports {other}"
        for other, place in theirs
        if ours
        and place
        and place[1] != ours[1]
        and (place[0] < ours[0] or (place[0] == ours[0] and _strange(place[1])))
    ]


def _strange(neighbour: str) -> bool:
    return neighbour not in {"pipeline", *ROOM_MATES}


def through_walls(name: str, tree: ast.AST) -> list[str]:
    """Heavy dependencies that the module imports although it is not their door."""
    return [
        f"{name} imports {other}"
        for other in imports(tree)
        for heavy, doors in DOORS.items()
        if within(other, heavy) and not any(within(name, door) for door in doors)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_every_import_goes_down_and_every_heavy_one_through_its_door(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert [*wrong(module(path), tree), *through_walls(module(path), tree)] == []


def test_every_module_has_a_floor() -> None:
    assert [module(path) for path in SOURCES if not home(module(path))] == []


def test_every_door_is_used() -> None:
    used = {(name, heavy) for path in SOURCES for name in [module(path)] for heavy in _heavy(path)}
    for heavy, doors in DOORS.items():
        for door in doors:
            assert any(within(name, door) and found == heavy for name, found in used), f"{door} needs no {heavy}"


def _heavy(path: Path) -> set[str]:
    return {heavy for other in imports(ast.parse(path.read_text())) for heavy in DOORS if within(other, heavy)}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("pipeline.data.plan", "from pipeline.train.loop import train"),
        ("pipeline.models.vit", "def f():\n    from pipeline import optim"),
        ("pipeline.train.loop", "import pipeline.transfer.sweep"),
        ("pipeline.seed", "from pipeline.data import plan"),
        ("shards.pack", "import pipeline"),
        ("pipeline.launch", "import jobs.pretrain"),
        ("pipeline.train.run", "import ray.train"),
        ("pipeline.data.image", "import torchvision.io"),
        ("shards.pack", "import webdataset as wds"),
    ],
)
def test_every_import_that_climbs_is_seen(name: str, line: str) -> None:
    assert wrong(name, ast.parse(line)) or through_walls(name, ast.parse(line))


def test_every_floor_and_door_is_as_the_package_says_of_itself() -> None:
    said = pipeline.__doc__ or ""
    rows = re.findall(r"^    ( *[a-z., ]*?[a-z,])(?:  +.*)?$", said, re.MULTILINE)
    floors = [set(re.findall(r"[a-z]+", row)) - {"pipeline"} for row in rows if not row.startswith(" ")]
    for row in (row for row in rows if row.startswith(" ")):
        after = rows[: rows.index(row)]
        floors[sum(not other.startswith(" ") for other in after) - 1] |= set(re.findall(r"[a-z]+", row))
    assert floors == [{name.removeprefix("pipeline.") for name in floor} for floor in FLOORS]
    for heavy, doors in DOORS.items():
        for door in doors:
            assert f"`{door.removeprefix('pipeline.').replace('.', '/')}" in said and heavy in said
