"""What a schedule that is searched on the model is to reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from vdcache.errors import ConfigError
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.util.fields import Checked, above, at_least

__all__ = ["Goal"]


@dataclass(frozen=True)
class Goal(Checked):
    """What a schedule is for: exactly one of the three.

    Args:
        computed: how many steps may be computed.
        speedup: how many times faster a generation is to be, by FLOPs of the model, at least 1.
        quality_db: the least PSNR of the final latents to the uncached ones, in dB of their range.
        floor_db: with a speed-up, a PSNR below which more steps are computed, and it is slower; 0 for none.

    Raises:
        ConfigError: none, several, or a number out of range.
    """

    computed: Annotated[int, at_least(1)] | None = None
    speedup: Annotated[float, at_least(1)] | None = None
    quality_db: Annotated[float, above(0)] | None = None
    floor_db: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [n for n in ("computed", "speedup", "quality_db") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ConfigError(f"a schedule is for one of computed, speedup and quality_db; got {', '.join(given) or 'none'}")

    def plans(self) -> tuple[Plan, ...]:
        """Every plan that a schedule may have."""
        return (RECOMPUTE, Plan.of(["all"]))

    def count(self, steps: int, reuse_cost: float = 0.0) -> int:
        """How many of `steps` may be computed, where a reused one costs `reuse_cost` of a computed one: with a floor all of them,
        where they are too few to be so much faster.

        Raises:
            ConfigError: more than there are, or a speed-up that reuse does not give.
        """
        if self.computed is not None:
            if self.computed > steps:
                raise ConfigError(f"{self.computed} computed steps were asked for, and a generation has {steps}")
            return self.computed
        assert self.speedup is not None
        if reuse_cost >= 1:
            raise ConfigError("nothing is saved where steps are reused")
        found = math.floor((steps / self.speedup - reuse_cost * steps) / (1 - reuse_cost) + 1e-9)
        if found < 1:
            if self.floor_db and reuse_cost * self.speedup < 1:  # more steps would do: a warm-up of one is no trouble
                return steps
            best = steps / (1 + reuse_cost * (steps - 1))
            raise ConfigError(
                f"no schedule of {steps} steps is {self.speedup:g} times faster: with a single computed step it is {best:.2f} times{'' if reuse_cost else ' at most'}"
            )
        return found

    def __str__(self) -> str:
        if self.computed is not None:
            return f"{self.computed} computed steps"
        floor = f", {self.floor_db:g} dB at least" if self.floor_db else ""
        return f"{self.speedup:g}× speed{floor}" if self.speedup is not None else f"{self.quality_db:g} dB"
