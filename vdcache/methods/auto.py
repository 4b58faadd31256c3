"""vdcache-auto: which steps to compute is found on the model itself."""

from __future__ import annotations

import math

from vdcache.ir.checks import number
from vdcache.ir.errors import ConfigError
from vdcache.passes import MarkBranches, MergeSlots
from vdcache.passes.predictors import Taylor
from vdcache.recipe import Recipe
from vdcache.runtime.policies import Auto

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
    if speedup is not None and not math.inf > number(speedup, "speedup is how many times faster it is to be") >= 1:
        raise ConfigError(f"speedup is how many times faster a generation is to be, at least 1; got {speedup}")
    if quality_db is not None and not number(quality_db, "quality_db is a PSNR in dB") > 0:
        raise ConfigError(f"quality_db is a PSNR in dB, above 0; got {quality_db}")
    policy = Auto(speedup, quality_db) if speedup or quality_db else Auto(2.0, floor_db=FLOOR)
    source = "arXiv 2503.06923 (the predictor); the steps are searched"
    return Recipe("vdcache-auto", policy, (MarkBranches(), MergeSlots()), source, predictor=Taylor(1))
