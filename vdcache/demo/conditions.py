"""What a demo video shows, as words, and as the tokens that the network reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["BACKGROUNDS", "COLOURS", "DIRECTIONS", "SHAPES", "SPEEDS", "Condition", "encode", "unconditional"]

SHAPES = ("disc", "square", "triangle", "cross")
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.10, 0.75, 0.15),
    "cyan": (0.10, 0.80, 0.90),
    "blue": (0.15, 0.20, 0.95),
    "magenta": (0.90, 0.15, 0.85),
}
# (down, right) in pixels: rows grow downwards.
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
# pixels a frame
SPEEDS = {"still": 0.0, "slow": 0.9, "fast": 1.6}
BACKGROUNDS = ("flat", "stripes", "checks", "clouds")

_VOCABULARY = [*SHAPES, *COLOURS, *DIRECTIONS, *SPEEDS, *BACKGROUNDS]
_TEXT_DIM = 32


@dataclass(frozen=True)
class Condition:
    """One video in words. Raises ValueError for a word that does not exist."""

    shape: str = "disc"
    colour: str = "red"
    direction: str = "right"
    speed: str = "fast"
    background: str = "stripes"

    def __post_init__(self) -> None:
        known = {"shape": SHAPES, "colour": COLOURS, "direction": DIRECTIONS, "speed": SPEEDS, "background": BACKGROUNDS}
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}; got {getattr(self, name)!r}")

    def words(self) -> tuple[str, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def __str__(self) -> str:
        motion = "standing still" if self.speed == "still" else f"moving {self.direction}, {self.speed}"
        return f"a {self.colour} {self.shape} {motion}, on {self.background}"


def encode(conditions: Sequence[Condition]) -> Tensor:
    """Tokens of the conditions: float32 [B, 5, 32], one token a word, one-hot and of unit mean square."""
    index = torch.tensor([[_VOCABULARY.index(w) for w in c.words()] for c in conditions])
    # unit mean square is what linear layers are initialised for: plain one-hot tokens are hardly heard at first
    return torch.nn.functional.one_hot(index, _TEXT_DIM).float() * _TEXT_DIM**0.5


def unconditional(batch: int) -> Tensor:
    """What the network reads where the condition was dropped: zeros, float32 [B, 5, 32]."""
    return torch.zeros(batch, len(fields(Condition)), _TEXT_DIM)
