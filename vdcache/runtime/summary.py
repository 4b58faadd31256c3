"""What a person sees of a run: a table and a picture, both made from the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from vdcache.runtime.history import History, Record, any_computed
from vdcache.runtime.run_times import RunTimes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["steps_of", "summary_table", "timeline"]

WIDTH = 110  # of a table in a pipe or a file
COMPUTED, REUSED, LINE = "#2b6cb0", "#e2e8f0", "#dd6b20"


class Summarised(Protocol):
    """What a table tells of a session."""

    name: str
    history: History
    times: RunTimes

    @property
    def store(self) -> Any: ...

    @property
    def graphs(self) -> Any: ...


def steps_of(records: Sequence[Record]) -> list[list[Record]]:
    """The records of one generation, gathered by step."""
    steps: dict[int, list[Record]] = {}
    for record in records:
        steps.setdefault(record.step, []).append(record)
    return [steps[s] for s in sorted(steps)]


def summary_table(session: Summarised, generation: int = -1) -> Table:
    """What was computed, reused and why in one generation; with memory, and time beside a computed step's (by medians).

    It prints itself, by `print` and by rich.
    """
    records = session.history.generation(generation)
    steps = steps_of(records)
    table = _table(f"{session.name}: generation {records[0].generation if records else '–'}")
    named = len({name for step in steps for name in _groups(step)}) > 1
    told = [column for column in _columns(steps, named) if any(column[2])]  # one that says nothing of any step is left out
    for name, side, _ in told:
        table.add_column(name, justify=side)
    for row in zip(*(cells for _, _, cells in told), strict=True):
        table.add_row(*row)
    if steps:
        masks = (text for graph in session.graphs if (text := getattr(graph, "masks", "")))
        apart = dict.fromkeys(text for graph in session.graphs if (text := getattr(graph, "apart", "")))
        table.caption = "\n".join([*_totals(steps, session.store.peak_bytes), *session.times.lines(records), *masks, *apart])
        table.caption_justify = "left"
    return table


def _table(title: str) -> Any:
    """An empty table of rich's that `print` shows too."""
    from rich.console import Console
    from rich.table import Table

    class PrintedTable(Table):
        def __str__(self) -> str:
            console = Console(width=WIDTH)
            with console.capture() as out:
                console.print(self)
            return "\n".join(line.rstrip() for line in out.get().splitlines())

    return PrintedTable(title=title, title_justify="left")


def _columns(steps: Sequence[Sequence[Record]], named: bool) -> tuple[tuple[str, Any, list[str]], ...]:
    """Name, side and cells of each column.

    Args:
        named: say which groups of slots a step reused.
    """
    return (
        ("step", "right", [str(s[0].step) if s[0].step >= 0 else "–" for s in steps]),
        ("timestep", "right", [_number(s[0].timestep, "g") for s in steps]),
        ("lanes", "right", [str(len({r.lane for r in s})) for s in steps]),
        ("", "left", [_deed(s, named) for s in steps]),
        ("change", "right", [_number(next((m.change for m in (*s[0].measures, *s[0].probe)), None), ".4f") for s in steps]),
        ("ms", "right", [f"{1e3 * sum(r.seconds for r in s):.1f}" for s in steps]),
        ("why", "left", [next((r.why for r in s if r.why and (any_computed(s) or r.reused)), "") for s in steps]),
    )


def _totals(steps: Sequence[Sequence[Record]], peak_bytes: int) -> list[str]:
    """What a generation came to."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for step in steps:
        seconds[any_computed(step)].append(sum(r.seconds for r in step))
    lines = [f"{len(seconds[True])} of {len(steps)} steps computed"]
    if all(seconds.values()):  # medians: the first of a kind waits for its compiler
        one, other = median(seconds[True]), median(seconds[False])
        spent = one * len(seconds[True]) + other * len(seconds[False])
        lines.append(f"{one * len(steps) / spent:.2f}× over computing every step")
    return [*lines, f"{peak_bytes / 2**20:.2f} MiB of cache at most"]


def _groups(step: Sequence[Record]) -> set[str]:
    """What was reused in a step, by groups of slots."""
    return {slot.partition("/")[0] for record in step for slot in record.reused}


def _deed(step: Sequence[Record], named: bool) -> str:
    if any_computed(step):
        return "[bold]computed[/bold]"
    return f"[dim]reused {', '.join(sorted(_groups(step)))}[/dim]" if named else "[dim]reused[/dim]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def timeline(runs: Mapping[str, Sequence[Record]], path: str | Path | None = None) -> Any:
    """A picture of what was computed and what was reused at every step, with the metric beside it.

    Args:
        runs: a name and the records of one generation for each row.
        path: where the picture goes; its ending names the format.

    Returns the matplotlib figure.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    longest = max((len(steps_of(r)) for r in runs.values()), default=1)
    figure, all_axes = plt.subplots(
        len(runs),
        1,
        figsize=(max(7.0, 0.3 * longest + 2.6), 1.25 * len(runs) + 0.9),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    top = max((m.change for r in runs.values() for x in r for m in x.measures[:1] if m.change < float("inf")), default=0.0)
    for axes, (name, records) in zip(all_axes[:, 0], runs.items(), strict=True):
        steps = steps_of(records)
        computed = [any_computed(s) for s in steps]
        axes.bar(range(len(steps)), 1.0, width=0.9, color=[COMPUTED if c else REUSED for c in computed])
        axes.set(yticks=[], ylim=(0, 1), xlim=(-0.6, longest - 0.4))
        axes.set_ylabel(f"{name}\n{sum(computed)} of {len(steps)}", rotation=0, ha="right", va="center", fontsize=9)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        points = [(s[0].step, s[0].measures[0].change) for s in steps if s[0].measures]
        if points:
            metric = axes.twinx()
            metric.plot(*zip(*points, strict=True), color=LINE, marker="o", markersize=3, linewidth=1.2)
            metric.set_ylim(0, 1.1 * top or 1.0)
            metric.tick_params(axis="y", labelsize=7, colors=LINE)
            for side in ("top", "left", "bottom"):
                metric.spines[side].set_visible(False)
    all_axes[-1, 0].set_xlabel("denoising step")
    handles = [
        Patch(color=COMPUTED, label="computed"),
        Patch(color=REUSED, label="reused"),
        Line2D(
            [], [], color=LINE, marker="o", markersize=3, label="change of the observed branch since the last computed step"
        ),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return figure
