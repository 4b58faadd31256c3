"""Where the foreground of a video is, seen in what a diffusion model predicts for it.

ProfilingDiT (arXiv 2504.03140, section 3.2) takes the model's noise prediction, brings its channels down to three by principal
components, looks at that as at a picture, and has SAM2 cut the picture into foreground and background. `principal_picture` is
the first half. For the second there are `Sam2`, which needs weights, and `Otsu`, which needs none.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vdcache.errors import ConfigError

__all__ = ["Otsu", "Sam2", "Segmenter", "principal_picture"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Segmenter(Protocol):
    """Cuts pictures into foreground and background."""

    def __call__(self, picture: Tensor) -> Tensor:
        """float32 [F, H, W, 3] in [0, 1] to bool [F, H, W]; True is foreground."""
        ...


def principal_picture(prediction: Tensor) -> Tensor:
    """The three principal components of a prediction's channels, as colours.

    The components are those of all positions of all frames together. They share one scale, 0.5 being the mean, so that a
    component with little in it stays pale: colours are as far apart as the predictions are. A component's sign is such that
    its largest loading is positive.

    Args:
        prediction: noise or velocity of one video, [C, F, H, W], floating point.

    Returns float32 [F, H, W, 3] in [0, 1]. Components that do not exist (fewer than three channels, constant channels) are 0.5.

    Raises ConfigError if the shape is another, or if there is a NaN or an infinity.
    """
    if prediction.ndim != 4 or not prediction.is_floating_point() or not prediction.numel():
        raise ConfigError(
            f"the prediction must be floating point [C, F, H, W] and not empty; got {prediction.dtype} {list(prediction.shape)}"
        )
    if not prediction.isfinite().all():
        raise ConfigError("the prediction holds NaN or infinite values, so it has no principal components")
    channels = prediction.shape[0]
    values = prediction.detach().double().flatten(1)
    largest = values.abs().max()
    if largest > 0:
        values = values / largest
    values = values - values.mean(1, keepdim=True)
    # on the CPU, so that a picture does not depend on which solver the device has
    _, vectors = torch.linalg.eigh((values @ values.T / values.shape[1]).cpu())
    vectors = vectors.flip(1)[:, :3]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    components = vectors.T.to(values.device) @ values
    spread = components.abs().max()
    # what rounding leaves of a constant must not be blown up to a picture
    components = components / spread if spread > 1e-12 else torch.zeros_like(components)
    picture = F.pad(components, (0, 0, 0, 3 - min(channels, 3)))
    picture = (0.5 + 0.5 * picture).clamp(0, 1)
    return picture.T.reshape(*prediction.shape[1:], 3).float()


@dataclass(frozen=True)
class Otsu:
    """Foreground without a network: what differs most in colour from the rim of the picture.

    1. Blur. The background's colour is the median over the rim of all frames; split the blurred pixels by their distance to it.
    2. Fisher's discriminant of the two classes is the direction of colour that tells them apart best, clear of texture and noise.
    3. Project the picture itself onto it and denoise that by total variation, as strongly as its noise asks for. This keeps edges.
    4. Split again: what lies on the far side is foreground. Patches and holes of less than `speck` of a frame are dropped.

    Both splits are Otsu's with three classes. A foreground is often small, and two classes then rather halve the background.
    The middle class (texture, soft edges) goes to the class whose mean is nearer.

    Foreground may be darker or brighter than the background, but it has to leave more than half of the rim free, and to be of
    about one colour. There is nearly always a foreground, even in noise; a constant picture has none.

    Args:
        blur: standard deviation of the blur of step 1, as a share of the picture's shorter side; along time it is one frame.
        denoise: weight of the total variation, in standard deviations of the noise.
        speck: smallest patch, summed over its frames, as a share of one frame's area.
    """

    blur: float = 0.06
    denoise: float = 1.0
    speck: float = 0.01

    def __post_init__(self) -> None:
        for name in ("blur", "denoise", "speck"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"Otsu's {name} must be a number from 0; got {value}")

    def __call__(self, picture: Tensor) -> Tensor:
        """float32 [F, H, W, 3] in [0, 1] to bool [F, H, W]. ConfigError for another shape, NaN, or without scikit-image."""
        filters, restoration = _skimage("filters"), _skimage("restoration")
        pixels: Array = _checked(picture).cpu().double().numpy()
        side = self.blur * min(pixels.shape[1:3])
        blurred: Array = filters.gaussian(pixels, sigma=(1.0, side, side, 0.0), mode="nearest", channel_axis=None)
        mask = np.zeros(pixels.shape[:3], bool)
        rim = np.concatenate([blurred[:, [0, -1]].reshape(-1, 3), blurred[:, :, [0, -1]].reshape(-1, 3)])
        rough = _upper(np.linalg.norm(blurred - np.median(rim, axis=0), axis=-1))
        direction = _discriminant(blurred[rough], blurred[~rough]) if rough.any() else np.zeros(3)
        if direction.any():
            scalar = pixels @ direction
            weight = self.denoise * _noise(scalar)
            if weight > 0:
                scalar = restoration.denoise_tv_chambolle(scalar, weight=weight)
            smallest = self.speck * mask[0].size
            mask = ~_without_specks(~_without_specks(_upper(scalar), smallest), smallest)
        return torch.from_numpy(mask).to(picture.device)


@dataclass(frozen=True)
class Sam2:
    """Foreground by SAM2, as in the paper: each frame alone, prompted by the box around what `prompt` finds in it.

    A frame in which `prompt` finds nothing has no foreground. Of the masks that the model offers, the one counts that the model
    itself expects to be best. It runs in its own dtype, on its own device.

    Args:
        model: a `transformers.Sam2Model` with weights, for example `Sam2Model.from_pretrained("facebook/sam2.1-hiera-tiny")`.
        prompt: what finds the boxes.

    Raises ConfigError if `model` is something else.
    """

    model: Any
    prompt: Segmenter = Otsu()

    def __post_init__(self) -> None:
        config = getattr(self.model, "config", None)
        prompts = getattr(config, "prompt_encoder_config", None)
        if (
            not isinstance(self.model, torch.nn.Module)
            or not hasattr(config, "vision_config")
            or not hasattr(prompts, "image_size")
        ):
            raise ConfigError(
                f"Sam2 takes a transformers.Sam2Model, with its vision_config and prompt_encoder_config; got {self.model!r:.80}. "
                'Load one first: Sam2(Sam2Model.from_pretrained("facebook/sam2.1-hiera-tiny"))'
            )

    def __call__(self, picture: Tensor) -> Tensor:
        """float32 [F, H, W, 3] in [0, 1] to bool [F, H, W]. ConfigError for another shape, of the picture or of what `prompt` returns, and for NaN."""
        frames = _checked(picture)
        rough = self.prompt(picture)
        if rough.shape != frames.shape[:3]:
            raise ConfigError(f"prompt must return a mask {list(frames.shape[:3])} for this picture; got {list(rough.shape)}")
        mask = torch.zeros(frames.shape[:3], dtype=torch.bool, device=picture.device)
        for index in rough.flatten(1).any(1).nonzero().flatten().tolist():
            mask[index] = self._frame(frames[index], rough[index]).to(mask.device)
        return mask

    @torch.no_grad()
    def _frame(self, frame: Tensor, rough: Tensor) -> Tensor:
        """One frame [H, W, 3] with a rough mask [H, W], not empty, to bool [H, W]."""
        weight = next(self.model.parameters())
        height, width = rough.shape
        wanted = self.model.config.prompt_encoder_config.image_size
        size: tuple[int, int] = (wanted, wanted) if isinstance(wanted, int) else (wanted[0], wanted[1])
        # what transformers' image processor does, which would need torchvision
        mean, std = (frame.new_tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        resized = F.interpolate(frame.permute(2, 0, 1)[None], size, mode="bilinear", antialias=True)
        image = ((resized - mean) / std).to(weight)
        rows, cols = rough.any(1).nonzero().flatten(), rough.any(0).nonzero().flatten()
        down, right = size[0] / height, size[1] / width
        left, top = cols[0].item() * right, rows[0].item() * down
        box = frame.new_tensor([left, top, (cols[-1].item() + 1) * right, (rows[-1].item() + 1) * down])
        out = self.model(pixel_values=image, input_boxes=box.view(1, 1, 4).to(weight.device), multimask_output=True)
        best = out.pred_masks[0, 0, out.iou_scores[0, 0].argmax()].float()
        return F.interpolate(best[None, None], (height, width), mode="bilinear")[0, 0] > 0


def _checked(picture: Tensor) -> Tensor:
    """The picture in float32. ConfigError if it is not [F, H, W, 3] of finite numbers."""
    if picture.ndim != 4 or picture.shape[-1] != 3 or not picture.numel():
        raise ConfigError(f"a picture must be [F, H, W, 3] and not empty; got {list(picture.shape)}")
    if not picture.isfinite().all():
        raise ConfigError("the picture holds NaN or infinite values")
    return picture.detach().float()


def _skimage(part: str) -> Any:
    try:
        return importlib.import_module(f"skimage.{part}")
    except ImportError as error:
        raise ConfigError("finding the foreground needs scikit-image: pip install 'vdcache[profile]'") from error


def _upper(values: Array) -> Mask:
    """Where values are in the upper class: Otsu with three classes, the middle one going where it is nearer. Empty for a constant."""
    spread = np.ptp(values)
    if spread < 1e-5:
        return np.zeros(values.shape, bool)
    levels = np.rint((values - values.min()) * (255 / spread)).astype(np.intp)
    counts = np.bincount(levels.ravel(), minlength=256)
    if np.count_nonzero(counts) < 3:
        return levels > 0
    low, high = _skimage("filters").threshold_multiotsu(classes=3, hist=(counts, np.arange(256)))
    parts = (levels <= low, (levels > low) & (levels <= high), levels > high)
    bottom, middle, top = (levels[part].mean() for part in parts)
    return levels > (high if middle - bottom < top - middle else low)


def _discriminant(foreground: Array, background: Array) -> Array:
    """Fisher's discriminant of colours [n, 3] and [m, 3]: the unit vector [3] from background to foreground; 0 if they are equal."""
    within = sum(np.cov(c.T, bias=True) * len(c) for c in (foreground, background)) / (len(foreground) + len(background))
    # a component without any spread must not get an infinite say
    ridge = max(0.05 * np.trace(within) / 3, 1e-9)
    apart = foreground.mean(0) - background.mean(0)
    direction = np.linalg.solve(within + ridge * np.eye(3), apart)
    return direction / np.linalg.norm(direction) if np.abs(apart).max() > 1e-6 else np.zeros(3)


def _noise(values: Array) -> float:
    """Standard deviation of white noise in [F, H, W], from the median of second differences; 0 if frames are too small for any."""
    bends = [np.abs(np.diff(values, 2, axis=axis)).ravel() for axis in (1, 2)]
    every = np.concatenate(bends)
    return float(np.median(every)) / (0.6745 * 6**0.5) if every.size else 0.0


def _without_specks(mask: Mask, smallest: float) -> Mask:
    """The mask [F, H, W] without its patches, connected in space and time, of fewer than `smallest` pixels."""
    labels = _skimage("measure").label(mask, connectivity=1)
    keep = np.bincount(labels.ravel()) >= smallest
    keep[0] = False
    return keep[labels]
