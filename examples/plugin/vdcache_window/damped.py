"""A predictor: the last value and a damped share of its last change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdcache import ConfigError
from vdcache.passes.predictors import StepInfo


@dataclass(frozen=True)
class Damped:
    """F + damping · (F − F before) / k · x, where k steps lie between the two computed ones and x steps have passed since.

    Args:
        damping: 0 is the last value, 1 the straight line through both.

    Raises:
        ConfigError: a damping outside 0 to 1.
    """

    damping: float = 0.5

    tensors = 2  # no annotation: a constant of the class, not an option

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise ConfigError(f"damping lies between 0 and 1, got {self.damping}")

    def keep(self, fresh: Tensor, before: Sequence[Tensor], when: StepInfo) -> tuple[Tensor, Tensor]:
        fresh = fresh.float()
        change = (fresh - before[0]) / when.elapsed.clamp(min=1)
        return fresh, torch.where(when.computed > 0, change, torch.zeros_like(change))

    def predict(self, kept: Sequence[Tensor], when: StepInfo) -> Tensor:
        return kept[0] + self.damping * when.elapsed * kept[1]
