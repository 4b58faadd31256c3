"""PSNR, SSIM and LPIPS of two videos, frame by frame and overall; torchmetrics does the metrics."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdcache.ir.errors import ConfigError
from vdcache.quality.frames import frames_of, readable

__all__ = ["Comparison", "compare"]

SSIM_WINDOW = 11


@dataclass(frozen=True)
class Comparison:
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
        plain = {k: v for k, v in asdict(_bare(self)).items() if k not in ("reference", "candidate")}
        plain["psnr"] = _finite(self.psnr)
        plain["psnr_frames"] = [_finite(p) for p in self.psnr_frames]
        return {"identical": self.identical, **plain}

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.rows(), indent=1))

    def __rich__(self) -> Any:
        from vdcache.quality.picture import table

        return table(self)

    def __str__(self) -> str:
        ssim = "" if self.ssim is None else f", SSIM {self.ssim:.4f}"
        lpips = "" if self.lpips is None else f", LPIPS {self.lpips:.4f}"
        return f"{self.frames} frames of {self.width} × {self.height}: PSNR {self.psnr:.2f} dB{ssim}{lpips}"

    def picture(self, path: str | Path) -> None:
        """The worst frame: reference, candidate, and their difference made visible."""
        from vdcache.quality.picture import side_by_side

        side_by_side(self, path)

    def curve(self, path: str | Path | None = None) -> Any:
        """PSNR and SSIM over frames; the matplotlib figure, also written to `path`."""
        from vdcache.quality.picture import curve

        return curve(self, path)


def compare(reference: Any, candidate: Any, *, layout: str = "", lpips: bool = True) -> Comparison:
    """Compare two videos, folders of pictures, pictures or tensors.

    Args:
        reference, candidate: as `vdcache.quality.frames.frames_of` takes them.
        layout: of tensors, where the shape does not say it.
        lpips: also LPIPS, where torchvision and its weights are on this machine; nothing is downloaded.

    Raises:
        ConfigError: something that cannot be read, or videos of unequal size or length.
    """
    both = {"the reference": reference, "the candidate": candidate}
    if missing := [f"{role}, {v}" for role, v in both.items() if isinstance(v, (str, Path)) and not Path(v).exists()]:
        raise ConfigError(f"there is no such file or folder: {'; '.join(missing)}")
    one, other = (_frames(role, value, layout) for role, value in both.items())
    if one.shape != other.shape:
        of = [f"{s[0]} frames of {s[1]} channels, {s[3]} × {s[2]}" for s in (one.shape, other.shape)]
        what = _remedy(tuple(one.shape), tuple(other.shape))
        raise ConfigError(
            f"the two cannot be compared frame by frame: the reference has {of[0]}, the candidate {of[1]}. {what}"
        )
    one, other, data_range = readable(one, other)
    largest = float((one - other).abs().max())
    data_range = data_range or 1.0
    psnr = [_psnr(a, b, data_range) for a, b in zip(one, other, strict=True)]
    notes: list[str] = []
    ssim = _ssim(one, other, data_range, notes)
    perceived = _lpips(one, other, notes) if lpips else ()
    return Comparison(
        frames=one.shape[0],
        height=one.shape[2],
        width=one.shape[3],
        psnr=_psnr(one, other, data_range),
        ssim=sum(ssim) / len(ssim) if ssim else None,
        lpips=sum(perceived) / len(perceived) if perceived else None,
        largest=largest,
        data_range=data_range,
        psnr_frames=tuple(psnr),
        ssim_frames=ssim,
        lpips_frames=perceived,
        worst=min(range(len(psnr)), key=psnr.__getitem__),
        notes=tuple(notes),
        reference=one,
        candidate=other,
    )


def _frames(role: str, source: Any, layout: str) -> Tensor:
    try:
        found = frames_of(source, layout)
    except ConfigError as error:
        raise ConfigError(f"{role}: {error}") from error
    if not (bad := ~found.isfinite()).any():
        return found
    first = int(bad.flatten(1).any(1).nonzero()[0])
    raise ConfigError(
        f"{role}: {int(bad.sum())} values are not finite (NaN or infinite), the first in frame {first}: look at how it was made, there is "
        "no quality to measure"
    )


def _remedy(one: tuple[int, ...], other: tuple[int, ...]) -> str:
    if one[1:] == other[1:]:
        least = min(one[0], other[0])
        return f"Generate both with one number of frames, or give tensors that are cut to the first {least} frames"
    if sorted(one) == sorted(other):
        return "The same sizes in another order: layout= (CLI: --layout) says which axis is which, for both"
    if one[2:] != other[2:]:
        return "Generate both at one size: resizing would be measured as well"
    return "Bring both to the same channels, as RGB"


def _psnr(one: Tensor, other: Tensor, data_range: float) -> float:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    if torch.equal(one, other):
        return math.inf
    return float(peak_signal_noise_ratio(other, one, data_range=data_range))


def _ssim(one: Tensor, other: Tensor, data_range: float, notes: list[str]) -> tuple[float, ...]:
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(one.shape[2:]) < SSIM_WINDOW:
        notes.append(f"no SSIM: frames of {one.shape[3]} × {one.shape[2]} are smaller than its window of {SSIM_WINDOW}")
        return ()
    each = structural_similarity_index_measure(other, one, data_range=data_range, reduction="none")
    return tuple(torch.as_tensor(each).tolist())


def _lpips(one: Tensor, other: Tensor, notes: list[str]) -> tuple[float, ...]:
    from importlib.util import find_spec

    if one.shape[1] != 3 or float(one.min()) < 0 or float(one.max()) > 1:
        notes.append("no LPIPS: it is for pictures of three channels")
        return ()
    weights = Path(torch.hub.get_dir()) / "checkpoints"
    if find_spec("torchvision") is None or not list(weights.glob("alexnet-*.pth")):
        notes.append(f"no LPIPS: it needs torchvision and the weights of AlexNet in {weights}, and downloads nothing by itself")
        return ()
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    return tuple(
        float(learned_perceptual_image_patch_similarity(b[None], a[None], net_type="alex", normalize=True))
        for a, b in zip(one, other.clamp(0, 1), strict=True)
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _bare(of: Comparison) -> Comparison:
    from dataclasses import replace

    return replace(of, reference=None, candidate=None)
