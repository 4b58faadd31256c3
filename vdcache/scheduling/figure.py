"""The picture of a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vdcache.scheduling.calibration import Calibration

__all__ = ["draw"]

COMPUTED, REUSED, LINE, GREY = "#2b6cb0", "#e2e8f0", "#dd6b20", "#718096"


def draw(found: Calibration, path: str | Path | None = None) -> Any:
    """How well steps predict steps, which are computed, and what other numbers of computed steps would give."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    schedule, table = found.schedule, found.table
    steps = schedule.steps
    figure = plt.figure(figsize=(10.5, 5.2), layout="constrained")
    left, right = np.ravel(np.asarray(figure.subfigures(1, 2, width_ratios=(1, 1.15)), dtype=object))
    heat = left.subplots()
    shares = 100 * np.where(np.tri(steps, k=-1, dtype=bool).T, table.errors(0)[0], np.nan)
    drawn = heat.imshow(shares, cmap="viridis_r", origin="upper", interpolation="nearest", vmax=np.nanquantile(shares, 0.98))
    heat.set(xlabel="step that is reused", ylabel="step that was computed last", title="how far the blocks' sum has moved, %")
    left.colorbar(drawn, ax=heat, shrink=0.8, pad=0.02)
    computed = set(schedule.computed)
    last = 0
    for step in range(steps):
        last = step if step in computed else last
        if step not in computed:
            heat.add_patch(plt.Rectangle((step - 0.5, last - 0.5), 1, 1, fill=False, edgecolor=LINE, linewidth=1.2))
    rows, front = right.subplots(2, 1, height_ratios=(1, 3.2))
    shown = [schedule, *sorted((t for t in found.tried if t.computed != schedule.computed), key=lambda t: -(t.psnr or 0))][:6]
    for y, one in enumerate(shown):
        own = set(one.computed)
        rows.bar(
            range(steps),
            0.8,
            0.86,
            y - 0.4,
            color=[COMPUTED if s in own else REUSED for s in range(steps)],
            alpha=1 if not y else 0.45,
        )
        if one.psnr is not None:
            rows.text(steps, y, f"{one.psnr:.1f} dB", va="center", fontsize=8, color=COMPUTED if not y else GREY)
    rows.set(
        xlim=(-1, steps + 3), yticks=[0], yticklabels=["chosen"], title=f"{len(computed)} of {steps} steps, for {found.goal}"
    )
    rows.invert_yaxis()
    counts, decibels = zip(*found.front(), strict=True)
    front.plot(
        counts, decibels, color=GREY, marker=".", markersize=4, label="prediction of the blocks' sum, mean over reused steps"
    )
    if scored := [(len(t.computed), t.psnr) for t in found.tried if t.psnr is not None]:
        front.plot(*zip(*scored, strict=True), "o", color=COMPUTED, alpha=0.45, markersize=5, label="result, as run")
    if schedule.psnr is not None:
        front.plot(len(computed), schedule.psnr, "o", color=LINE, markersize=8, label="chosen")
    if found.goal.quality_db is not None:
        front.axhline(found.goal.quality_db, color=LINE, linewidth=0.9, linestyle="--", label="floor")
    front.set(xlabel="computed steps", ylabel="dB")
    front.grid(alpha=0.25)
    front.legend(frameon=False, fontsize=8, loc="lower right")
    for axis in (rows, front):
        axis.spines[["top", "right"]].set_visible(False)
    rows.spines["left"].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return figure
