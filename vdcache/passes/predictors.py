"""What a reused slot is given: functions of what was kept at computed steps. They are traced into the variants.

A predictor is a frozen value with two functions of tensors. `keep` says what a computed step leaves behind, `predict` what a reused
one puts in the place of the value. Both become part of the compiled graph, so a prediction costs no call of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vdcache.ir.errors import ConfigError

__all__ = ["LAST", "LastValue", "Predictor", "Scaled", "Taylor"]


@runtime_checkable
class Predictor(Protocol):
    """How the value of a reused slot follows from those of computed steps.

    `elapsed` and `count` are float32, 0-d tensors, so that no step compiles anything: steps since the last computed one, and how many were
    computed in this generation before.
    """

    @property
    def tensors(self) -> int:
        """How many tensors a slot keeps."""

    def keep(self, fresh: Tensor, before: Sequence[Tensor], elapsed: Tensor, count: Tensor) -> Sequence[Tensor]:
        """What a computed step leaves behind, `tensors` tensors of the shape of `fresh`.

        Args:
            fresh: the value of this step.
            before: what the computed step before left, as many tensors; zeros where there was none (`count` is 0 then).
            elapsed: steps from that one to this.
        """

    def predict(self, kept: Sequence[Tensor], elapsed: Tensor, count: Tensor) -> Tensor:
        """The value of a step that comes `elapsed` steps after the last computed one, from what that one left."""


@dataclass(frozen=True)
class LastValue:
    """The value of the last computed step, in its own type."""

    tensors = 1

    def keep(self, fresh: Tensor, before: Sequence[Tensor], elapsed: Tensor, count: Tensor) -> tuple[Tensor]:
        return (fresh,)

    def predict(self, kept: Sequence[Tensor], elapsed: Tensor, count: Tensor) -> Tensor:
        return kept[0]

    def __str__(self) -> str:
        return "last"


LAST = LastValue()


@dataclass(frozen=True)
class Taylor:
    """Taylor expansion over the computed steps (TaylorSeer, arXiv 2503.06923, equations 3 and 4).

    With Δ⁰F = F and ΔⁱF = (Δⁱ⁻¹F now − Δⁱ⁻¹F before) / k, k steps apart, a step x steps later is given Σ ΔⁱF · xⁱ / i!, over the orders for which
    enough steps were computed. Differences are formed and kept in float32.

    Args:
        order: highest order; 0 is the last value. A slot keeps `order` + 1 tensors.

    Raises:
        ConfigError: an order below 0 or above 4.
    """

    order: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.order, int) or not 0 <= self.order <= 4:
            raise ConfigError(f"a Taylor expansion has an order of 0 to 4; got {self.order!r}")

    @property
    def tensors(self) -> int:
        return self.order + 1

    def keep(self, fresh: Tensor, before: Sequence[Tensor], elapsed: Tensor, count: Tensor) -> list[Tensor]:
        kept = [fresh.float()]
        for i in range(self.order):
            # where too few steps were computed the order is left out, whatever zeros went in
            kept.append((kept[i] - before[i]) * torch.where(count > i, 1 / elapsed, torch.zeros_like(elapsed)))
        return kept

    def predict(self, kept: Sequence[Tensor], elapsed: Tensor, count: Tensor) -> Tensor:
        value = kept[-1] * (1 / math.factorial(self.order))
        for i in reversed(range(self.order)):
            value = value * elapsed + kept[i] * (1 / math.factorial(i))
        return value

    def __str__(self) -> str:
        return f"taylor({self.order})"


@dataclass(frozen=True)
class Scaled:
    """The last value times a factor of the elapsed steps: factor ** elapsed (MagCache's ratio of magnitudes, arXiv 2506.09045, held constant).

    Args:
        factor: above 0.

    Raises:
        ConfigError: another factor.
    """

    factor: float = 1.0

    tensors = 1

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ConfigError(f"a value is scaled by a factor above 0; got {self.factor}")

    def keep(self, fresh: Tensor, before: Sequence[Tensor], elapsed: Tensor, count: Tensor) -> tuple[Tensor]:
        return (fresh,)

    def predict(self, kept: Sequence[Tensor], elapsed: Tensor, count: Tensor) -> Tensor:
        return kept[0] * self.factor**elapsed

    def __str__(self) -> str:
        return f"scaled({self.factor:g})"
