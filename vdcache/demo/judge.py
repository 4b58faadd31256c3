"""Did a generated video do as told? Read off the pixels, by rules that know nothing of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdcache.demo.conditions import COLOURS, DIRECTIONS, Condition

__all__ = ["Judgement", "judge", "motion"]


@dataclass(frozen=True)
class Judgement:
    """Share of videos whose sprite has the colour, and of those that should move, the direction that was asked for."""

    colour: float
    direction: float
    videos: int
    moving: int


def judge(videos: Tensor, conditions: Sequence[Condition]) -> Judgement:
    """Judge videos [B, 3, T, H, W] in [−1, 1].

    The sprite is where the colour is least grey; its colour is the nearest of the palette, its direction that of the shift of
    its centre from the first to the last third of the frames.
    """
    rgb = ((videos.float() + 1) / 2).clamp(0, 1)
    vivid = rgb.amax(1) - rgb.amin(1)  # [B, T, H, W]
    weight = (vivid - 0.3).clamp(min=0) + 1e-6
    palette = torch.tensor(list(COLOURS.values()), device=rgb.device)
    colour = (rgb * weight[:, None]).sum((2, 3, 4)) / weight.sum((1, 2, 3))[:, None]
    nearest = torch.cdist(colour, palette).argmin(1).tolist()
    shift = _shift(weight)
    right_colour = sum(list(COLOURS)[n] == c.colour for n, c in zip(nearest, conditions, strict=True))
    right_way, moving = 0, 0
    for (dy, dx), c in zip(shift.tolist(), conditions, strict=True):
        if c.speed == "still":
            continue
        moving += 1
        way = max(DIRECTIONS, key=lambda name: dy * DIRECTIONS[name][0] + dx * DIRECTIONS[name][1])
        right_way += way == c.direction
    return Judgement(right_colour / len(conditions), right_way / max(moving, 1), len(conditions), moving)


def _shift(weight: Tensor) -> Tensor:
    """Shift of the weighted centre from the first to the last third of the frames: [B, 2] (down, right), in pixels."""
    _, frames, height, width = weight.shape
    rows = torch.arange(height, device=weight.device).view(1, 1, -1, 1)
    cols = torch.arange(width, device=weight.device).view(1, 1, 1, -1)
    mass = weight.sum((2, 3))
    centre = torch.stack([(weight * rows).sum((2, 3)) / mass, (weight * cols).sum((2, 3)) / mass], -1)  # [B, T, 2]
    third = max(1, frames // 3)
    return centre[:, -third:].mean(1) - centre[:, :third].mean(1)


def motion(videos: Tensor) -> Tensor:
    """How much videos move: mean absolute difference of neighbouring frames, [B]."""
    return (videos[:, :, 1:] - videos[:, :, :-1]).abs().mean((1, 2, 3, 4))
