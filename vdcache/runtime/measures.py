"""From the sums that a variant returns to the measures that a policy reads.

Variants return sums, not ratios, so that the lanes of one step can be added up first: two calls of a batch of one then
measure exactly what one call of a batch of two would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Layout", "Measured", "count_of", "measured"]


@dataclass(frozen=True)
class Layout:
    """What the sums of one observation are: its name, its distance, its strides, its latent frames (0: no motion)."""

    name: str
    distance: str
    strides: tuple[int, ...] = ()
    frames: int = 0


@dataclass(frozen=True)
class Measured:
    """What was observed of one branch at one computed step, P its residual at the computed step before, R now.

    Args:
        change: ‖P − R‖ / ‖P‖ (L1, L2), or 1 − cos(P, R).
        change_absolute: mean |P − R| (L1), root mean square (L2), or 1 − cos.
        motion: mean over strides i of ‖R[i:] − R[:−i]‖₁ / (‖R[i:]‖₁ + ‖R[:−i]‖₁) over latent frames; None if not asked for.
        motion_absolute: mean over strides of mean |R[i:] − R[:−i]|.
    """

    name: str
    change: float
    change_absolute: float
    motion: float | None = None
    motion_absolute: float | None = None


def count_of(layout: Layout) -> int:
    """How many sums an observation has."""
    return (3 if layout.distance == "cosine" else 2) + 3 * len(layout.strides)


def measured(layout: Layout, sums: Sequence[float], elements: int) -> Measured:
    """The measures of one observation.

    Args:
        sums: as `specialise` lays them out, added over lanes. L1: Σ|P−R|, Σ|P|. L2: the same squared. Cosine: Σ P·R, Σ P², Σ R².
            Then for each stride Σ|R[i:]−R[:−i]|, Σ|R[i:]|, Σ|R[:−i]|.
        elements: how many numbers the residual has, over all lanes.
    """
    if layout.distance == "cosine":
        dot, then, now = sums[:3]
        change = absolute = 1 - _ratio(dot, math.sqrt(then * now)) if then * now > 0 else _ratio(then + now, then * now)
        rest = sums[3:]
    else:
        difference, size = sums[:2]
        root = math.sqrt if layout.distance == "l2" else float
        change = _ratio(root(difference), root(size))
        absolute = root(difference / elements)
        rest = sums[2:]
    if not layout.strides:
        return Measured(layout.name, change, absolute)
    relative, means = [], []
    for at, stride in enumerate(layout.strides):
        difference, late, early = rest[3 * at : 3 * at + 3]
        relative.append(_ratio(difference, late + early))
        means.append(difference / (elements * (layout.frames - stride) / layout.frames))
    n = len(layout.strides)
    return Measured(layout.name, change, absolute, sum(relative) / n, sum(means) / n)


def _ratio(a: float, b: float) -> float:
    """a / b, where nothing over nothing is no change at all (a branch behind a closed gate)."""
    if b == 0:
        return 0.0 if a == 0 else math.inf
    return a / b
