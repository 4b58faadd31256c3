"""vdcache-auto: which steps to compute is found on the model itself."""

from __future__ import annotations

from vdcache.errors import ConfigError
from vdcache.methods.recipe import Recipe
from vdcache.passes import MarkBranches, MergeSlots
from vdcache.policies.base import Always
from vdcache.policies.goal import Goal
from vdcache.policies.weights import Taylor

__all__ = ["auto"]

FLOOR = 30.0  # dB: differences begin to be seen below


def auto(speedup: float | None = None, quality_db: float | None = None) -> Recipe:
    """The default recipe: what all blocks add, extrapolated from the last two computed steps, at the steps that the model, its
    solver and its number of steps ask for. They are searched after one uncached generation, and kept on disk.

    Args:
        speedup: how many times faster a generation is to be, by FLOPs of the model, at least 1.
        quality_db: the least PSNR of the final latents to the uncached ones, in dB of their range.

    With neither it is to be twice as fast, unless that leaves less than 30 dB: then as fast as 30 dB allow.

    Raises:
        ConfigError: both, or a number out of range.
    """
    if speedup is not None and quality_db is not None:
        raise ConfigError("speedup and quality_db are one or the other: a faster generation is a worse one")
    goal = Goal(speedup=2.0, floor_db=FLOOR) if speedup is quality_db is None else Goal(speedup=speedup, quality_db=quality_db)
    source = "arXiv 2503.06923 (the predictor); the steps are searched"
    return Recipe("vdcache-auto", Always(), (MarkBranches(), MergeSlots()), source, predictor=Taylor(1), goal=goal)
