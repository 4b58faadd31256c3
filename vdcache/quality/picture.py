"""What a person sees of a comparison: a table, a picture of the worst frame, a curve over frames."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdcache.quality.scores import Scores

__all__ = ["curve", "side_by_side", "table"]

GAP = 4  # pixels between pictures


def table(of: Scores) -> Any:
    """A rich table: overall, and the range over frames."""
    from rich.table import Table
    from rich.text import Text

    result = Table(box=None, pad_edge=False)
    for name in ("", "overall", "worst frame", "best frame"):
        result.add_column(name, justify="left" if not name else "right")
    for name, overall, frames, low_is_worse in (
        ("PSNR, dB", of.psnr, of.psnr_frames, True),
        ("SSIM", of.ssim, of.ssim_frames, True),
        ("LPIPS", of.lpips, of.lpips_frames, False),
    ):
        if overall is None:
            continue
        ends = (min(frames), max(frames)) if low_is_worse else (max(frames), min(frames))
        result.add_row(name, *(f"{v:.2f}" if "dB" in name else f"{v:.4f}" for v in (overall, *ends)))
    about = f"{of.frames} frames of {of.width} × {of.height}; largest difference {of.largest:.4g} of {of.data_range:.4g}"
    about += "; identical" if of.identical else f"; worst is frame {of.worst}"
    result.caption = Text("\n".join([about, *of.notes]))
    result.caption_justify = "left"
    return result


def side_by_side(of: Scores, path: str | Path) -> None:
    """The worst frame of both, and the difference, scaled so that the largest one is white."""
    import imageio.v3 as iio

    if of.reference is None or of.candidate is None:
        raise ValueError("this comparison was read from a file and has no frames")
    one, other = of.reference[of.worst], of.candidate[of.worst]
    difference = (one - other).abs()
    difference = difference / difference.max().clamp(min=1e-12)
    low, span = (0.0, 1.0) if of.data_range == 1 else (float(one.min()), of.data_range)
    pictures = [_rgb((p - low) / span) for p in (one, other)] + [_rgb(difference)]
    height = pictures[0].shape[0]
    gap = torch.full((height, GAP, 3), 255, dtype=torch.uint8)
    row = torch.cat([pictures[0], gap, pictures[1], gap, pictures[2]], 1)
    scale = max(1, 240 // height)
    row = row.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    iio.imwrite(path, row.numpy())


def _rgb(frame: Tensor) -> Tensor:
    """[C, H, W] in 0 … 1 as bytes [H, W, 3]; of other than three channels the mean."""
    frame = frame[:3] if frame.shape[0] in (3, 4) else frame.mean(0, keepdim=True).expand(3, -1, -1)
    return (frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)


def curve(of: Scores, path: str | Path | None = None) -> Any:
    """PSNR and SSIM over frames."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
    finite = [p if math.isfinite(p) else None for p in of.psnr_frames]
    axes.plot(range(of.frames), finite, color="#2b6cb0", marker="o", markersize=3, label="PSNR")  # type: ignore[arg-type]
    axes.set(xlabel="frame", ylabel="PSNR, dB", xlim=(-0.5, of.frames - 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    if of.ssim_frames:
        right = axes.twinx()
        right.plot(range(of.frames), of.ssim_frames, color="#dd6b20", marker="s", markersize=3, label="SSIM")
        right.set_ylabel("SSIM", color="#dd6b20")
        right.spines[["top", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return figure
