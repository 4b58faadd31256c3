"""The picture of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw"]

FRONT, BACK, LINE = "#c05621", "#2b6cb0", "#4a5568"


def draw(profile: Any, path: str | Path | None = None) -> Any:
    """Figures 2 to 4 of ProfilingDiT for one profile, on one sheet; see `Profile.plot`, which calls this with itself."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    blocks, scores = profile.blocks, profile.block_scores
    known = [b for b in blocks if scores[b] == scores[b]] or list(blocks)
    most, least = max(known, key=scores.__getitem__), min(known, key=scores.__getitem__)
    figure = plt.figure(figsize=(11, 5.9), layout="constrained")
    top, bottom = (part for part in np.ravel(np.asarray(figure.subfigures(2, 1, height_ratios=(1, 2.1)), dtype=object)))
    _where_they_look(profile, top, most, least)
    left, right = bottom.subfigures(1, 2, width_ratios=(1.55, 1))
    heat, bars = left.subplots(1, 2, sharey=True, width_ratios=(2.2, 1))
    values = np.nanmean(profile.by_block(profile.scores), 0) if len(profile.series) > 1 else profile.by_block(profile.scores)[0]
    drawn = heat.imshow(
        values.T,
        aspect="auto",
        cmap="viridis",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(-0.5, values.shape[0] - 0.5, len(blocks) - 0.5, -0.5),
    )
    heat.set(xlabel="denoising step", ylabel="block", title="R at every step")
    heat.set_yticks(range(len(blocks)) if len(blocks) <= 24 else range(0, len(blocks), 5))
    left.colorbar(drawn, ax=heat, shrink=0.85, pad=0.02)
    spread = profile.over_series
    bars.barh(
        range(len(blocks)),
        [scores[b] for b in blocks],
        xerr=[spread[b] for b in blocks] if len(profile.series) > 1 else None,
        color=[FRONT if b in profile.foreground else BACK for b in blocks],
        error_kw={"elinewidth": 0.8, "ecolor": LINE},
    )
    chance = np.nanmean(profile.by_block(profile.shares), (0, 1))
    bars.plot(chance, range(len(blocks)), color=LINE, marker="|", linestyle="none", markersize=9, label="share of all tokens")
    bars.axvline(profile.threshold, color=LINE, linewidth=0.9, linestyle="--", label=f"τ = {profile.threshold:.2f}")
    bars.set(xlabel="R (± over prompts)", xlim=(0, 1))
    bars.set_title("foreground", color=FRONT, fontsize=10, loc="left")
    bars.set_title("background", color=BACK, fontsize=10, loc="right")
    left.legend(fontsize=8, loc="outside lower right", ncols=2, frameon=False)
    steps = right.subplots()
    _changes(profile, steps)
    for axis in (bars, steps):
        axis.spines[["top", "right"]].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return figure


def _where_they_look(profile: Any, whole_row: Any, most: int, least: int) -> None:
    """The prediction, and the attention that its tokens receive in the blocks that look most and least at the foreground."""
    frames = sorted({0, profile.grid[0] // 2, profile.grid[0] - 1})
    columns = [
        ("prediction (smoothed), foreground", None),
        (f"block {most} looks most at the foreground", most),
        (f"block {least} looks least at it", least),
    ]
    sheets = whole_row.subfigures(1, 3, wspace=0.02, width_ratios=(1, 1, 1.13))
    seen = [profile.by_block(np.moveaxis(profile.received, 0, -1))[..., profile.blocks.index(b)] for b in (most, least)]
    high = max(2.0, float(np.quantile(np.stack(seen), 0.99)))
    pictures = _smoothed(profile.picture)
    for sheet, (title, block) in zip(sheets, columns, strict=True):
        axes = sheet.subplots(1, len(frames), squeeze=False)[0]
        sheet.suptitle(title, fontsize=10, x=0.5)
        for axis, frame in zip(axes, frames, strict=True):
            extent = (0, profile.grid[2], profile.grid[1], 0)
            if block is None:
                at = frame * profile.picture.shape[0] // profile.grid[0]
                axis.imshow(pictures[at], extent=extent, interpolation="nearest")
                shade = np.where(profile.mask[frame][..., None], 0.0, [0.0, 0.0, 0.0, 0.45])  # the background lies in the dark
                axis.imshow(shade, extent=extent, interpolation="nearest")
            else:
                values = seen[0 if block == most else 1][frame]
                drawn = axis.imshow(values, extent=extent, cmap="magma", vmin=0, vmax=high, interpolation="nearest")
            _outline(axis, profile.mask[frame])
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"frame {frame}", fontsize=8)
        if sheet is sheets[-1]:
            bar = sheet.colorbar(drawn, ax=axes.tolist(), shrink=0.7, pad=0.02)
            bar.set_label("attention received / mean", fontsize=7)
            bar.ax.tick_params(labelsize=7)


def _changes(profile: Any, steps: Any) -> None:
    """How much the prediction changes from step to step."""
    distances = profile.distances
    if distances.size:
        at = np.arange(1, distances.shape[1] + 1)
        middle = np.nanmedian(distances, 0)
        steps.plot(at, middle, color=LINE, marker="o", markersize=3)
        if len(profile.series) > 1:
            low, up = np.nanquantile(distances, (0.1, 0.9), 0)
            steps.fill_between(at, low, up, color=LINE, alpha=0.2, linewidth=0)
        steps.set_ylim(bottom=0)
    steps.set(xlabel="denoising step", ylabel="‖v now − v before‖₁ / ‖v before‖₁", title="change of the prediction")


def _smoothed(picture: Any) -> Any:
    """A prediction is mostly noise; the eye sees more in its mean over neighbours. Stretched to the whole range of colours."""
    from scipy.ndimage import uniform_filter

    size = [max(1, n // 8) for n in picture.shape[1:3]]
    smooth = uniform_filter(picture, size=(min(3, picture.shape[0]), *size, 1), mode="nearest")
    low, high = np.quantile(smooth, (0.01, 0.99))
    return np.clip((smooth - low) / max(float(high - low), 1e-9), 0, 1)


def _outline(axis: Any, mask: Any) -> None:
    """The borders of a mask's tokens."""
    padded = np.pad(mask, 1)
    for y, x in zip(*np.nonzero(padded[1:, :] != padded[:-1, :]), strict=True):
        axis.plot((x - 1, x), (y, y), color="white", linewidth=1.4)
    for y, x in zip(*np.nonzero(padded[:, 1:] != padded[:, :-1]), strict=True):
        axis.plot((x, x), (y - 1, y), color="white", linewidth=1.4)
