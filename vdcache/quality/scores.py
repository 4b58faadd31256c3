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
        frames: number of frames.
        height, width: size of a frame.
        psnr: PSNR in dB over all frames together; infinite if the two are equal.
        ssim: mean SSIM of the frames, −1 to 1; None if a frame is smaller than SSIM's window of 11.
        lpips: mean LPIPS of the frames, 0 if equal; None if it was not computed (`notes` has the reason).
        largest: the largest difference of two values, on the scale of `data_range`.
        data_range: range of the scale: 1 for pictures.
        psnr_frames: PSNR of each frame.
        ssim_frames: SSIM of each frame.
        lpips_frames: LPIPS of each frame.
        worst: index of the frame with the lowest PSNR.
        notes: scores that were left out, with reasons.
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
        """The scores as a dictionary of plain numbers. An infinite PSNR is None; `identical` is then true."""
        plain = {
            k: v
            for k, v in asdict(replace(self, reference=None, candidate=None)).items()
            if k not in ("reference", "candidate")
        }
        plain["psnr"] = _finite(self.psnr)
        plain["psnr_frames"] = [_finite(p) for p in self.psnr_frames]
        return {"identical": self.identical, **plain}

    def to_json(self, path: str | Path) -> None:
        """Write `rows()` as JSON."""
        Path(path).write_text(json.dumps(self.rows(), indent=1))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
