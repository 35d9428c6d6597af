"""Command lines from dataclasses, whose mistakes are answered in one line."""

import io
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import tyro

Kind = TypeVar("Kind")


def run(main: Callable[[], None]) -> None:
    """Call `main`; a mistake (ValueError, OSError) or a failed run (RuntimeError) is one line on stderr."""
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def parse(kind: type[Kind], argv: Sequence[str], *, default: Kind | None = None) -> Kind:
    """The dataclass `kind` from a command line, over the values of `default`; ValueError, of a line, for a mistake."""
    heard = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with redirect_stderr(heard):
            # Of several kinds of value a field has that of its default: the experiment says which.
            found, unknown = tyro.cli(
                kind,
                args=list(argv),
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),
                **extra,  # type: ignore[arg-type]
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_unboxed(heard.getvalue())) from None
    if unknown:
        raise ValueError(_unknown(kind, unknown[0], default))
    return found


def counts(text: str) -> range:
    """The numbers of processes that `8` or `2:8` means; ValueError, saying what would do, where it means none."""
    ends = text.split(":")
    if len(ends) > 2 or not all(end.isdecimal() for end in ends):
        raise ValueError(f"--processes is {text}: a number such as 8, or the fewest and the most, as in 2:8, is needed")
    least, most = int(ends[0]), int(ends[-1])
    if least > most:
        raise ValueError(f"--processes is {text}: the smaller number goes first, {most}:{least}")
    if not most:
        raise ValueError("--processes is 0; at least 1 is needed")
    return range(least, most + 1)


def _unboxed(text: str) -> str:
    """What tyro says in a box of several lines, as one."""
    lines = [re.sub(r"^[\u2500-\u257f|\s]+|[\u2500-\u257f|\s]+$|[-+]{3,}", "", line) for line in text.splitlines()]
    ends = ("For full helptext", "Argument helptext")
    said = list(itertools.takewhile(lambda line: not line.startswith(ends), filter(None, lines)))
    return " ".join(said[1:] if len(said) > 1 else said) or "the command line is wrong"


def _unknown(kind: type, option: str, default: Any) -> str:
    """`no option --optim.lrr in optim; it has: ...`, naming the fields of the innermost group that exists."""
    path = option.removeprefix("--").split("=")[0].replace("-", "_").split(".")
    group, where = (kind, default), []
    for name in path[:-1]:
        inside = _groups(*group).get(name)
        if inside is None:
            break
        group, where = inside, [*where, name]
    there = ".".join(where)
    names = ", ".join("--" + ".".join([*where, name]).replace("_", "-") for name in _options(*group))
    return f"no option {option}{' in ' + there if there else ''}; there are: {names}"


def _inside(kind: type, default: Any) -> dict[str, tuple[type, Any]]:
    """Fields that are dataclasses, by name: which, and what the default has there."""
    found: dict[str, tuple[type, Any]] = {}
    for name, hint in get_type_hints(kind).items():
        value = getattr(default, name, None)
        inside = type(value) if is_dataclass(value) else hint  # of several kinds, the default's
        if is_dataclass(inside):
            found[name] = (inside, value)  # type: ignore[assignment]
    return found


def _groups(kind: type, default: Any) -> dict[str, tuple[type, Any]]:
    """As `_inside`; the groups of a field without a prefix count as the outer one's."""
    found: dict[str, tuple[type, Any]] = {}
    for name, group in _inside(kind, default).items():
        found |= _groups(*group) if _flat(kind, name) else {name: group}
    return found


def _options(kind: type, default: Any) -> list[str]:
    found: list[str] = []
    inside = _inside(kind, default)
    for field in fields(kind):
        if group := inside.get(field.name):
            found += _options(*group) if _flat(kind, field.name) else [f"{field.name}.…"]
        else:
            found.append(field.name)
    return found


def _flat(kind: type, name: str) -> bool:
    """Whether the options of a field stand without its name before them."""
    hint = get_type_hints(kind, include_extras=True)[name]
    return any(getattr(mark, "name", None) == "" for mark in getattr(hint, "__metadata__", ()))
