"""What all commands share: where they print, and how they end.

A command ends with 0 where it did what it was asked, with 1 where it did and the answer is no (`verify` finds a difference,
`opt` a pass that breaks something, `try` a computed step that is not the model's), with 2 where it could not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vdcache.errors import VdcacheError

__all__ = ["FAILED", "NO", "console", "needs", "print_json", "spinner", "told"]

NO, FAILED = 1, 2


def console(stderr: bool = False) -> Console:
    """Standard output or error; of a pipe or a file, as wide as what is printed, unless COLUMNS says otherwise."""
    found = Console(stderr=stderr)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found = Console(stderr=stderr, width=10_000)
    return found


@contextmanager
def told() -> Iterator[None]:
    """What cannot be done is one red line on standard error, and a status of 2."""
    try:
        yield
    except (VdcacheError, OSError) as error:
        console(stderr=True).print(options_for_arguments(str(error)), style="red", markup=False, highlight=False)
        raise typer.Exit(FAILED) from error


def options_for_arguments(message: str) -> str:
    """A message of the library, in which arguments of functions are named, for a person who gives options."""
    for pattern, option in (
        (r"\bnum_steps=(\d+)", r"--steps \1"),
        (r"\bnum_steps\b", "--steps"),
        (r"\boverwrite=True\b", "--overwrite"),
    ):
        message = re.sub(pattern, option, message)
    return message


def needs(extra: str, *modules: str) -> None:
    """End the command where a package that it needs is not installed.

    Args:
        extra: what pip installs them by.
    """
    from importlib.util import find_spec

    if missing := [m for m in modules if find_spec(m) is None]:
        console(stderr=True).print(f"This needs {', '.join(missing)}: pip install {extra}", style="red", markup=False)
        raise typer.Exit(FAILED)


def print_json(rows: Iterable[Mapping[str, Any]] | Mapping[str, Any]) -> None:
    """Rows as JSON on standard output."""
    typer.echo(json.dumps(rows if isinstance(rows, Mapping) else list(rows), indent=1, ensure_ascii=False))


@contextmanager
def spinner() -> Iterator[Callable[[str], None]]:
    """What is being done, and since when, on standard error; a pipe gets a line each."""
    out = console(stderr=True)
    if not out.is_terminal:
        yield lambda doing: out.print(doing, markup=False, highlight=False)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda doing: progress.update(task, description=doing)
