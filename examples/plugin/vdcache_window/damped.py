"""A predictor: the last value and a damped share of its last change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdcache.errors import ConfigError
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

    def store(self, new: Tensor, previous: Sequence[Tensor], step_info: StepInfo) -> tuple[Tensor, Tensor]:
        new = new.float()
        change = (new - previous[0]) / step_info.elapsed.clamp(min=1)
        return new, torch.where(step_info.computed > 0, change, torch.zeros_like(change))

    def predict(self, cached: Sequence[Tensor], step_info: StepInfo) -> Tensor:
        return cached[0] + self.damping * step_info.elapsed * cached[1]
