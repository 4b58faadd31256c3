"""What a person sees of a run: a table and a picture, both made from the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from vdcache.runtime.history import Record, any_computed

if TYPE_CHECKING:
    from rich.table import Table

    from vdcache.runtime.session import Session

__all__ = ["steps_of", "summary_table", "timeline"]

COMPUTED, REUSED, LINE = "#2b6cb0", "#e2e8f0", "#dd6b20"


def steps_of(records: Sequence[Record]) -> list[list[Record]]:
    """The records of one generation, gathered by step."""
    steps: dict[int, list[Record]] = {}
    for record in records:
        steps.setdefault(record.step, []).append(record)
    return [steps[s] for s in sorted(steps)]


def summary_table(session: Session, generation: int = -1) -> Table:
    """What was computed, reused and why in one generation; with memory, and time beside a computed step's.

    It prints itself, by `print` and by rich.
    """
    from rich.console import Console
    from rich.table import Table as RichTable

    class Table(RichTable):
        def __str__(self) -> str:
            console = Console(width=110)
            with console.capture() as out:
                console.print(self)
            return "\n".join(line.rstrip() for line in out.get().splitlines())

    records = session.history.generation(generation)
    steps = steps_of(records)
    computed = [s for s in steps if any_computed(s)]
    table = Table(title=f"{session.name}: generation {records[0].generation if records else '–'}", title_justify="left")
    for name, side in (
        ("step", "right"),
        ("timestep", "right"),
        ("lanes", "right"),
        ("", "left"),
        ("change", "right"),
        ("ms", "right"),
        ("why", "left"),
    ):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for step in steps:
        first = step[0]
        reused = not any_computed(step)
        table.add_row(
            str(first.step),
            "–" if first.timestep is None else f"{first.timestep:g}",
            str(len({r.lane for r in step})),
            "[dim]reused[/dim]" if reused else "[bold]computed[/bold]",
            f"{seen[0].change:.4f}" if (seen := first.measures or first.probe) else "",
            f"{1e3 * sum(r.seconds for r in step):.1f}",
            next((r.why for r in step if r.why and not (reused and r.computed)), ""),
        )
    if steps:
        times = [sum(r.seconds for r in s) for s in steps]
        one = median(sum(r.seconds for r in s) for s in computed) if computed else 0.0
        bound = (
            f", {one * len(steps) / sum(times):.2f}× over computing every step"
            if sum(times) and len(computed) < len(steps)
            else ""
        )
        table.caption = f"{len(computed)} of {len(steps)} steps computed{bound}; {session.store.peak_bytes / 2**20:.2f} MiB of cache at most"
        masks = [text for graph in session.graphs if (text := getattr(graph, "masks", ""))]
        table.caption = "\n".join([table.caption, *masks])
    return table


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
