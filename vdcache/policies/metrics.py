"""From the sums that a variant returns to the measures that a policy reads.

Variants return sums, not ratios, so that the lanes of one step can be added up first: two calls of a batch of one then
measure exactly what one call of a batch of two would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MetricSpec", "MetricValue", "count_of", "measured"]


@dataclass(frozen=True)
class MetricSpec:
    """What the sums of one observation are: its name, its distance, its strides, its latent frames (0: no motion)."""

    name: str
    distance: str
    strides: tuple[int, ...] = ()
    frames: int = 0


@dataclass(frozen=True)
class MetricValue:
    """What was observed of one branch at one computed step, P its residual at the computed step before, R now.

    Args:
        change: ‖P − R‖ / ‖P‖ (L1, L2), 1 − cos(P, R), or |1 − ratio| of magnitudes.
        change_absolute: mean |P − R| (L1), root mean square (L2), else as `change`.
        size: mean |R| (L1), root mean square (L2, cosine); mean over tokens of ‖R‖ / ‖P‖ (magnitude).
        motion: mean over strides i of ‖R[i:] − R[:−i]‖₁ / (‖R[i:]‖₁ + ‖R[:−i]‖₁) over latent frames; None if not asked for.
        motion_absolute: mean over strides of mean |R[i:] − R[:−i]|.
    """

    name: str
    change: float
    change_absolute: float
    size: float = 0.0
    motion: float | None = None
    motion_absolute: float | None = None


def count_of(layout: MetricSpec) -> int:
    """How many sums an observation has."""
    return 3 + 3 * len(layout.strides)


def measured(layout: MetricSpec, sums: Sequence[float], elements: int) -> MetricValue:
    """The measures of one observation.

    Args:
        sums: as `passes.sums` lays them out, added over lanes.
        elements: how many numbers the value has, over all lanes.
    """
    first, second, third = sums[:3]
    rest = sums[3:]
    if layout.distance == "cosine":
        known = second * third > 0
        change = absolute = 1 - _ratio(first, math.sqrt(second * third)) if known else _ratio(second + third, second * third)
        size = math.sqrt(third / elements)
    elif layout.distance == "magnitude":
        size = _ratio(first, third)
        change = absolute = abs(1 - size)
    else:
        root = math.sqrt if layout.distance == "l2" else float
        change = _ratio(root(first), root(second))
        absolute, size = root(first / elements), root(third / elements)
    if not layout.strides:
        return MetricValue(layout.name, change, absolute, size)
    relative, means = [], []
    for at, stride in enumerate(layout.strides):
        difference, late, early = rest[3 * at : 3 * at + 3]
        relative.append(_ratio(difference, late + early))
        means.append(difference / (elements * (layout.frames - stride) / layout.frames))
    n = len(layout.strides)
    return MetricValue(layout.name, change, absolute, size, sum(relative) / n, sum(means) / n)


def _ratio(a: float, b: float) -> float:
    """a / b, where nothing over nothing is no change at all (a branch behind a closed gate)."""
    if b == 0:
        return 0.0 if a == 0 else math.inf
    return a / b
