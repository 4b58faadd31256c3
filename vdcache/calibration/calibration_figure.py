"""The picture of a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vdcache.calibration.schedule import Schedule
from vdcache.calibration.tables import StepTable
from vdcache.policies.goal import Goal
from vdcache.policies.weights import Newton

__all__ = ["draw"]

COMPUTED, REUSED, LINE, GREY = "#2b6cb0", "#e2e8f0", "#dd6b20", "#718096"
ROWS = 6  # schedules that are shown step by step


class Drawn(Protocol):
    """What is drawn of a calibration."""

    @property
    def goal(self) -> Goal: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def table(self) -> StepTable: ...
    @property
    def tried(self) -> tuple[Schedule, ...]: ...
    @property
    def front(self) -> Any: ...


def draw(found: Drawn, path: str | Path | None = None) -> Any:
    """How well steps predict steps, which are computed, and what other numbers of computed steps would give."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 6), layout="constrained")
    left, right = np.ravel(np.asarray(figure.subfigures(1, 2, width_ratios=(1, 1.15)), dtype=object))
    _changes(left, found)
    rows, results, predicted = right.subplots(3, 1, height_ratios=(1, 1.5, 1.2))
    _schedules(rows, found)
    _results(results, found)
    _predicted(predicted, found)
    predicted.sharex(results)
    predicted.set_xlim(0, found.schedule.steps + 1)
    results.tick_params(labelbottom=False)
    for axis in (rows, results, predicted):
        axis.spines[["top", "right"]].set_visible(False)
    rows.spines["left"].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return figure


def _changes(figure: Any, found: Drawn) -> None:
    """From every step to every later one, how much of what the blocks add has changed; and which of these the schedule accepts."""
    from matplotlib.patches import Rectangle

    steps, computed = found.schedule.steps, set(found.schedule.computed)
    axis = figure.subplots()
    shares = 100 * np.where(np.tri(steps, k=-1, dtype=bool).T, found.table.errors(Newton(0))[0], np.nan)
    highest = np.nanquantile(shares, 0.98) if steps > 1 else 1.0
    drawn = axis.imshow(shares, cmap="viridis_r", origin="upper", interpolation="nearest", vmin=0, vmax=highest)
    axis.set(xlabel="step that is reused", ylabel="step that was computed last")
    axis.set_title("how far what the blocks add has moved, %", fontsize=11)
    figure.colorbar(drawn, ax=axis, shrink=0.8, pad=0.02)
    last, boxes = 0, []
    for step in range(steps):
        last = step if step in computed else last
        if step not in computed:
            boxes.append(Rectangle((step - 0.5, last - 0.5), 1, 1, fill=False, edgecolor=LINE, linewidth=1.2))
            axis.add_patch(boxes[-1])
    if boxes:
        axis.legend(boxes[:1], ["accepted by the chosen schedule"], loc="lower left", frameon=False, fontsize=8)


def _schedules(axis: Any, found: Drawn) -> None:
    """The chosen schedule and the best of the others that were run: which steps each computes."""
    chosen, steps = found.schedule, found.schedule.steps
    others = sorted((t for t in found.tried if t.computed != chosen.computed), key=lambda t: -(t.psnr or 0))
    shown = [chosen, *others[: ROWS - 1]]
    for y, one in enumerate(shown):
        own = set(one.computed)
        color = [COMPUTED if s in own else REUSED for s in range(steps)]
        axis.bar(range(steps), 0.8, 0.86, y - 0.4, color=color, alpha=1 if not y else 0.45)
        if one.psnr is not None:
            axis.text(steps, y, f"{one.psnr:.1f} dB", va="center", fontsize=8, color=COMPUTED if not y else GREY)
    names = ["chosen", *(f"{len(one.computed)} steps" for one in shown[1:])]
    axis.set_yticks(range(len(shown)), names, fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.set_xticks(range(0, steps, max(1, round(steps / 6))))
    axis.set_xlim(-1, steps * 1.1)
    axis.set_xlabel("denoising step (blue: computed)", fontsize=9)
    axis.set_title(f"{len(chosen.computed)} of {steps} steps, for {found.goal}", fontsize=11)
    axis.set_ylim(max(len(shown), 3) - 0.5, -0.5)


def _results(axis: Any, found: Drawn) -> None:
    """What was measured: the final latents of the schedules that were run against the uncached ones."""
    chosen, floor = found.schedule, found.goal.quality_db or found.goal.floor_db
    others = [(len(t.computed), t.psnr) for t in found.tried if t.psnr is not None and t.computed != chosen.computed]
    if others:
        axis.plot(*zip(*others, strict=True), "o", color=COMPUTED, alpha=0.45, markersize=5, label="others that were run")
    if chosen.psnr is not None:
        axis.plot(len(chosen.computed), chosen.psnr, "o", color=LINE, markersize=8, label="chosen")
    if floor:
        axis.axhline(floor, color=LINE, linewidth=0.9, linestyle="--", label="least that is allowed")
    if chosen.psnr is None and not others:
        axis.text(0.5, 0.5, "no schedule was run", transform=axis.transAxes, ha="center", color=GREY)
        axis.set_yticks([])
    else:
        axis.legend(frameon=False, fontsize=8, loc="best")
        axis.margins(y=0.15)
    axis.set_ylabel("PSNR, dB", fontsize=9)
    axis.set_title("measured: the result against the uncached one", fontsize=10)
    axis.grid(alpha=0.25)


def _predicted(axis: Any, found: Drawn) -> None:
    """What the table says of every number of computed steps; another quantity than the PSNR of a result."""
    computed = len(found.schedule.computed)
    counts, decibels = zip(*found.front(), strict=True)
    shares = 100 * 10 ** (-np.asarray(decibels) / 20)
    axis.plot(counts, shares, color=GREY, marker=".", markersize=4)
    if computed in counts:
        axis.plot(computed, shares[counts.index(computed)], "o", color=LINE, markersize=8)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("computed steps", fontsize=9)
    axis.set_ylabel("error, %", fontsize=9)
    axis.set_title("predicted: error of what the blocks add, mean over reused steps", fontsize=10)
    axis.grid(alpha=0.25)
