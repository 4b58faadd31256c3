"""PSNR, SSIM and LPIPS of two videos, frame by frame and overall; torchmetrics does the metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdcache.errors import ConfigError
from vdcache.quality import picture
from vdcache.quality.frames import frames_of, readable
from vdcache.quality.scores import Scores

__all__ = ["Comparison", "compare"]

SSIM_WINDOW = 11


@dataclass(frozen=True)
class Comparison(Scores):
    """The result of `vdcache.compare`: scores that print themselves, and draw the worst frame and the curve over frames."""

    def __rich__(self) -> Any:
        return picture.table(self)

    def __str__(self) -> str:
        ssim = "" if self.ssim is None else f", SSIM {self.ssim:.4f}"
        lpips = "" if self.lpips is None else f", LPIPS {self.lpips:.4f}"
        return f"{self.frames} frames of {self.width} × {self.height}: PSNR {self.psnr:.2f} dB{ssim}{lpips}"

    def picture(self, path: str | Path) -> None:
        """Write a picture of the worst frame: reference, candidate, and their amplified difference."""
        picture.side_by_side(self, path)

    def curve(self, path: str | Path | None = None) -> Any:
        """Draw PSNR and SSIM over frames; returns the matplotlib figure, and writes it to `path` if one is given."""
        return picture.curve(self, path)


def compare(reference: Any, candidate: Any, *, layout: str = "", lpips: bool = True) -> Comparison:
    """Compare two videos, folders of pictures, pictures or tensors.

    Args:
        reference, candidate: each a video or picture file, a folder of pictures in the order of their names, a tensor file (.pt,
            .npy, .safetensors), a tensor or array, or a list of pictures as pipelines return them. A batch of one counts as its
            only video.
        layout: order of the axes of tensors: TCHW, CTHW, THWC, CHW or HWC. Default: read from the shape.
        lpips: whether to compute LPIPS as well, if torchvision and its weights are on this machine. Nothing is downloaded.

    Raises:
        ConfigError: one of the two cannot be read, or their sizes or lengths differ.
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

    # Of the data range, not of the reference's own, as papers state it for pictures: from the library that gives SSIM and LPIPS.
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
