"""Training videos, drawn on the spot: a coloured sprite that moves over a textured grey background."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from vdcache.demo.conditions import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SPEEDS, Condition

__all__ = ["FRAMES", "SIZE", "all_conditions", "draw", "random_conditions"]

FRAMES, SIZE = 8, 24  # frames; pixels a side


def all_conditions() -> list[Condition]:
    """Every combination of words (a still sprite has one direction): 864."""
    return [
        Condition(*words)
        for words in itertools.product(SHAPES, COLOURS, DIRECTIONS, SPEEDS, BACKGROUNDS)
        if not (words[3] == "still" and words[2] != "right")
    ]


def random_conditions(count: int, generator: torch.Generator) -> list[Condition]:
    """`count` conditions, every word drawn uniformly."""

    def pick(words: Sequence[str]) -> list[str]:
        return [words[int(i)] for i in torch.randint(len(words), (count,), generator=generator)]

    columns = (SHAPES, tuple(COLOURS), tuple(DIRECTIONS), tuple(SPEEDS), BACKGROUNDS)
    return [Condition(*words) for words in zip(*(pick(c) for c in columns), strict=True)]


def draw(conditions: Sequence[Condition], generator: torch.Generator, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    """Videos of the conditions, with random place, size and texture.

    Returns (video, foreground): float32 [B, 3, frames, SIZE, SIZE] in [-1, 1], and the sprite's mask, bool
    [B, frames, SIZE, SIZE].
    """
    b = len(conditions)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=generator)

    def by_word(table: dict[str, Tensor], name: str) -> Tensor:
        return torch.stack([table[getattr(c, name)] for c in conditions])

    rows = torch.arange(SIZE).view(1, 1, SIZE, 1) + 0.5
    cols = torch.arange(SIZE).view(1, 1, 1, SIZE) + 0.5

    # A path begins a little behind the middle and leads towards the edge, so that where a sprite is tells where it goes: a path
    # centred in time is the same for both ways but for time itself, and a small network took very long to tell them apart.
    step = torch.stack([SPEEDS[c.speed] * torch.tensor(DIRECTIONS[c.direction], dtype=torch.float32) for c in conditions])
    when = torch.arange(frames) - 0.2 * (frames - 1)
    path = SIZE / 2 + uniform(-3.5, 3.5, 1, 2) * (1 - 0.7 * (step.abs()[:, None] > 1)) + step[:, None] * when[None, :, None]
    dy, dx = rows - path[..., 0].view(b, frames, 1, 1), cols - path[..., 1].view(b, frames, 1, 1)
    radius = uniform(3.8, 4.8).view(b, 1, 1, 1)
    edge = {  # below zero is inside; 1 unit a pixel, so that a clamp draws soft borders
        "disc": (dy**2 + dx**2).sqrt() - radius,
        "square": torch.maximum(dy.abs(), dx.abs()) - 0.85 * radius,
        "triangle": torch.maximum(dy - 0.8 * radius, 1.8 * dx.abs() - dy - 0.9 * radius),
        "cross": torch.minimum(
            torch.maximum(dy.abs() - radius, dx.abs() - 0.38 * radius),
            torch.maximum(dx.abs() - radius, dy.abs() - 0.38 * radius),
        ),
    }
    which = torch.tensor([SHAPES.index(c.shape) for c in conditions]).view(1, b, 1, 1, 1).expand(1, b, frames, SIZE, SIZE)
    signed = torch.stack([edge[s].expand(b, frames, SIZE, SIZE) for s in SHAPES]).gather(0, which)[0]
    alpha = (0.5 - signed).clamp(0, 1)

    angle, phase = uniform(0, torch.pi).view(b, 1, 1), uniform(0, 2 * torch.pi).view(b, 1, 1)
    y, x = rows[:, 0], cols[:, 0]
    wave = torch.sin(2 * torch.pi / 8 * (y * angle.sin() + x * angle.cos()) + phase)
    cell = uniform(3, 5).view(b, 1, 1)
    checks = torch.sign(torch.sin(torch.pi / cell * y + phase) * torch.sin(torch.pi / cell * x + phase))
    clouds = torch.nn.functional.interpolate(
        torch.randn(b, 1, 5, 5, generator=generator), size=(SIZE, SIZE), mode="bicubic", align_corners=True
    )[:, 0]
    textures = {"flat": torch.zeros_like(clouds), "stripes": wave, "checks": checks, "clouds": clouds.clamp(-1.5, 1.5)}
    kind = torch.tensor([BACKGROUNDS.index(c.background) for c in conditions]).view(1, b, 1, 1).expand(1, b, SIZE, SIZE)
    texture = torch.stack([textures[k] for k in BACKGROUNDS]).gather(0, kind)[0]
    grey = uniform(0.35, 0.65).view(b, 1, 1) + uniform(0.10, 0.18).view(b, 1, 1) * texture
    tint = 1 + uniform(-0.06, 0.06, 3).view(b, 3, 1, 1)
    back = (grey[:, None] * tint)[:, :, None]

    colour = by_word({k: torch.tensor(v) for k, v in COLOURS.items()}, "colour").view(b, 3, 1, 1, 1)
    video = back + alpha[:, None] * (colour - back)
    return (2 * video - 1).clamp(-1, 1), alpha > 0.5
