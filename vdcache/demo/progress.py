"""How far the demo is: bars on a terminal, lines in a file or a pipe."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Stage", "Stages"]


class Stages:
    """The stages of a run, one after the other.

    Args:
        console: where they are shown.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bars = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._began = time.perf_counter()

    def __enter__(self) -> Stages:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bars is not None:
            self.bars.stop()

    def stage(self, name: str, total: int | None = None) -> Stage:
        """What is done next, in `total` pieces."""
        return Stage(self, name, self.bars.add_task(name, total=total) if self.bars is not None else None)

    def line(self, text: str) -> None:
        """What a bar would show, with the time since the run began; nothing where there are bars."""
        if self.bars is None:
            self.console.print(f"{time.perf_counter() - self._began:6.0f} s  {escape(text)}", highlight=False, soft_wrap=True)


class Stage:
    """One stage, made by `Stages.stage`."""

    def __init__(self, stages: Stages, name: str, task: TaskID | None) -> None:
        self._stages, self._name, self._task = stages, name, task

    def now(self, what: str = "", where: str = "") -> None:
        """What is worked on from here on.

        Args:
            where: how far that is, for lines; bars show it themselves.
        """
        text = ": ".join(filter(None, (self._name, what)))
        if self._stages.bars is not None and self._task is not None:
            self._stages.bars.update(self._task, description=text)
        self._stages.line(f"{text} ({where})" if where else text)

    def done(self, pieces: int = 1) -> None:
        """So many more pieces are finished."""
        if self._stages.bars is not None and self._task is not None:
            self._stages.bars.advance(self._task, pieces)
