"""How far a candidate is from a reference, as numbers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["Scores"]


@dataclass(frozen=True)
class Scores:
    """How far a candidate is from a reference.

    Args:
        frames, height, width: of both.
        psnr: in dB, over all frames at once; infinite where they are equal.
        ssim: mean over frames, −1 to 1; None where frames are smaller than its window of 11.
        lpips: mean over frames, 0 for equal; None with the reason in `notes`.
        largest: the largest difference of two values, on the scale of `data_range`.
        data_range: what the scale spans: 1 for pictures.
        psnr_frames, ssim_frames, lpips_frames: each frame's.
        worst: the frame of the lowest PSNR.
        notes: what was left out, and why.
    """

    frames: int
    height: int
    width: int
    psnr: float
    ssim: float | None
    lpips: float | None
    largest: float
    data_range: float
    psnr_frames: tuple[float, ...]
    ssim_frames: tuple[float, ...] = ()
    lpips_frames: tuple[float, ...] = ()
    worst: int = 0
    notes: tuple[str, ...] = ()
    reference: Tensor | None = field(default=None, repr=False, compare=False)
    candidate: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def identical(self) -> bool:
        """Whether every value is the same."""
        return self.largest == 0

    def rows(self) -> dict[str, Any]:
        """Plain numbers. An infinite PSNR is None, and `identical` says why."""
        plain = {
            k: v
            for k, v in asdict(replace(self, reference=None, candidate=None)).items()
            if k not in ("reference", "candidate")
        }
        plain["psnr"] = _finite(self.psnr)
        plain["psnr_frames"] = [_finite(p) for p in self.psnr_frames]
        return {"identical": self.identical, **plain}

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.rows(), indent=1))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
