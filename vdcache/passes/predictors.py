"""What a reused slot is given: functions of what was kept at computed steps. They are traced into the variants.

A predictor is a frozen value with two functions of tensors. `store` says what a computed step leaves behind, `predict` what a
reused one puts in the place of the value. Both become part of the compiled graph, so a prediction costs no call of its own.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from vdcache.errors import ConfigError
from vdcache.passes.filters import sinusoids
from vdcache.util.fields import Bound, Checked, above, at_least, between
from vdcache.util.plugins import plugins

__all__ = [
    "LAST",
    "PREDICTORS",
    "Blended",
    "ByGroup",
    "Extrapolated",
    "Frequencies",
    "LastValue",
    "Predictor",
    "Scaled",
    "StepInfo",
    "Taylor",
    "predictor_of",
    "read_predictor",
]


class StepInfo(NamedTuple):
    """Where a step stands, as float32, 0-d tensors, so that no step compiles anything.

    Args:
        elapsed: steps since the group was last computed (in `store`: from that step to this one).
        computed: how many steps of this generation computed it before.
        step: the number of the step, counted from 0.
    """

    elapsed: Tensor
    computed: Tensor
    step: Tensor


@runtime_checkable
class Predictor(Protocol):
    """How the value of a reused slot follows from those of computed steps."""

    @property
    def tensors(self) -> int:
        """How many tensors a slot keeps."""

    def store(self, new: Tensor, previous: Sequence[Tensor], step_info: StepInfo) -> Sequence[Tensor]:
        """What a computed step leaves behind, `tensors` tensors of the shape of `new`.

        Args:
            new: the value of this step.
            previous: what the computed step before left, as many tensors; zeros where there was none (`step_info.computed` is 0 then).
        """

    def predict(self, cached: Sequence[Tensor], step_info: StepInfo) -> Tensor:
        """The value of a reused step, from what the last computed one left."""


@dataclass(frozen=True)
class LastValue:
    """The value of the last computed step, in its own type."""

    tensors = 1

    def store(self, new: Tensor, previous: Sequence[Tensor], step_info: StepInfo) -> tuple[Tensor]:
        return (new,)

    def predict(self, cached: Sequence[Tensor], step_info: StepInfo) -> Tensor:
        return cached[0]

    def __str__(self) -> str:
        return "last"


LAST = LastValue()


@dataclass(frozen=True)
class Taylor(Checked):
    """Taylor expansion over the computed steps (TaylorSeer, arXiv 2503.06923, equations 3 and 4).

    With Δ⁰F = F and ΔⁱF = (Δⁱ⁻¹F now − Δⁱ⁻¹F before) / k, k steps apart, a step x steps later is given Σ ΔⁱF · xⁱ / i!, over
    the orders for which enough steps were computed. Differences are formed and kept in float32.

    Args:
        order: highest order; 0 is the last value. A slot keeps `order` + 1 tensors.

    Raises:
        ConfigError: an order below 0 or above 4.
    """

    order: Annotated[int, between(0, 4)] = 1

    @property
    def tensors(self) -> int:
        return self.order + 1

    def store(self, new: Tensor, previous: Sequence[Tensor], step_info: StepInfo) -> list[Tensor]:
        cached = [new.float()]
        for i in range(self.order):
            # where too few steps were computed the order is left out, whatever zeros went in
            cached.append(
                (cached[i] - previous[i])
                * torch.where(step_info.computed > i, 1 / step_info.elapsed, torch.zeros_like(step_info.elapsed))
            )
        return cached

    def predict(self, cached: Sequence[Tensor], step_info: StepInfo) -> Tensor:
        value = cached[-1] * (1 / math.factorial(self.order))
        for i in reversed(range(self.order)):
            value = value * step_info.elapsed + cached[i] * (1 / math.factorial(i))
        return value

    def __str__(self) -> str:
        return f"taylor({self.order})"


@dataclass(frozen=True)
class Scaled(Checked):
    """The last value times a factor of the elapsed steps: factor ** elapsed (MagCache's ratio of magnitudes, arXiv 2506.09045,
    held constant).

    Args:
        factor: above 0.

    Raises:
        ConfigError: another factor.
    """

    factor: Annotated[float, above(0)] = 1.0

    tensors = 1

    def store(self, new: Tensor, previous: Sequence[Tensor], step_info: StepInfo) -> tuple[Tensor]:
        return (new,)

    def predict(self, cached: Sequence[Tensor], step_info: StepInfo) -> Tensor:
        return cached[0] * self.factor**step_info.elapsed

    def __str__(self) -> str:
        return f"scaled({self.factor:g})"


@dataclass(frozen=True)
class Extrapolated(Checked):
    """The last computed value and a share of its difference to the one before: a₁ + (a₁ − a₂) · w (FasterCache, arXiv
    2410.19355, equation 4).

    Args:
        weight: w where `ramp` is 0; else w = weight · (step − start) / ramp, which may grow over the run.
        start, ramp: steps, counted from 0.

    Raises:
        ConfigError: numbers that are none, or a negative ramp.
    """

    weight: float = 0.5
    start: int = 0
    ramp: Annotated[int, at_least(0)] = 0

    tensors = 2

    def store(self, new: Tensor, previous: Sequence[Tensor], step_info: StepInfo) -> list[Tensor]:
        new = new.float()
        return [new, torch.where(step_info.computed > 0, previous[0], new)]

    def predict(self, cached: Sequence[Tensor], step_info: StepInfo) -> Tensor:
        weight: Tensor | float = self.weight
        if self.ramp:
            weight = self.weight * (step_info.step - self.start) / self.ramp
        return cached[0] + (cached[0] - cached[1]) * weight

    def __str__(self) -> str:
        return f"extrapolated({self.weight:g}{f', {self.start}, {self.ramp}' if self.ramp else ''})"


Weight = Annotated[tuple[float, int, int], Bound(lambda weight: weight[0] > 0, noun="(weight above 0, first step, last step)")]


@dataclass(frozen=True)
class Frequencies(Checked):
    """A lane's difference to the other, its low and high frequencies weighted (FasterCache, arXiv 2410.19355, equations 6 and
    7).

    A disc of a fifth of the smaller side around frequency 0, over height and width, is low. A weight is raised to the number of
    elapsed steps, because the reference code multiplies what it keeps at every skipped step.

    Args:
        low, high: (weight, first step, last step) of either: the weight applies in these steps, counted from 0 and both
        inclusive, and is 1 elsewhere.
        share: radius of the disc, as a share of the smaller side.

    Raises:
        ConfigError: no such triples, or a share that is none.
    """

    low: Weight = (1.1, 0, 10**6)
    high: Weight = (1.1, 0, 10**6)
    share: Annotated[float, Bound(lambda v: 0 < v <= 1, " above 0 and at most 1")] = 0.2

    tensors = 1

    def store(self, new: Tensor, previous: Sequence[Tensor], step_info: StepInfo) -> tuple[Tensor]:
        return (new,)

    def predict(self, cached: Sequence[Tensor], step_info: StepInfo) -> Tensor:
        x = cached[0].float()
        rows, columns = x.shape[-2:]
        (y, height), (z, width) = (_centred(x, n) for n in (rows, columns))
        radius = torch.floor(torch.minimum(height, width) * self.share)
        inside = y.square()[:, None] + z.square()[None, :] <= radius.square()
        low, high = (self._weight(w, step_info).to(x.device) for w in (self.low, self.high))
        gain = torch.where(inside, low, high) / (height * width)
        (c, s), (d, t) = (
            sinusoids(x, rows),
            sinusoids(x, columns),
        )  # the transform as real matrices: it compiles and exports as any product
        real, imaginary = (c @ x @ d - s @ x @ t) * gain, -(s @ x @ d + c @ x @ t) * gain
        return c @ real @ d - s @ real @ t - (s @ imaginary @ d + c @ imaginary @ t)

    @staticmethod
    def _weight(weight: tuple[float, int, int], step_info: StepInfo) -> Tensor:
        """The weight to the power of how many of the elapsed steps it applies in."""
        value, first, last = weight
        start = torch.maximum(step_info.step - step_info.elapsed + 1, torch.full_like(step_info.step, float(first)))
        end = torch.minimum(step_info.step, torch.full_like(step_info.step, float(last)))
        return value ** (end - start + 1).clamp(min=0)

    def __str__(self) -> str:
        return f"frequencies({self.low}, {self.high}{f', {self.share:g}' if self.share != 0.2 else ''})"


def _centred(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Frequencies of n points in the order of the transform, as whole numbers around 0, and n."""
    ones = x.new_ones(n)
    k, size = ones.cumsum(0) - 1, ones.sum()
    return torch.where(2 * k < size, k, k - size), size


@dataclass(frozen=True)
class Blended(Checked):
    """A function of the values of the last computed steps: for methods that mix several of them.

    Args:
        blend: blend(values, when) with the newest value first; where fewer steps were computed than asked for, the oldest one
            is repeated. Called once, when a variant is traced.
        tensors: how many values are kept, 1 to 8.

    Raises:
        ConfigError: no function, or another number of values.
    """

    blend: Callable[[Sequence[Tensor], StepInfo], Tensor]
    tensors: Annotated[int, between(1, 8)] = 2

    def store(self, new: Tensor, previous: Sequence[Tensor], step_info: StepInfo) -> list[Tensor]:
        new = new.float() if self.tensors > 1 else new
        return [new, *(torch.where(step_info.computed > 0, b, new) for b in previous[: self.tensors - 1])]

    def predict(self, cached: Sequence[Tensor], step_info: StepInfo) -> Tensor:
        return self.blend(cached, step_info)

    def __str__(self) -> str:
        return f"blended({getattr(self.blend, '__name__', 'function')}, {self.tensors})"


@dataclass(frozen=True)
class ByGroup:
    """A predictor for each of several groups, and one for the rest.

    Args:
        groups: (group, predictor) pairs.
        other: of every other group.

    Raises:
        ConfigError: no such pairs.
    """

    groups: tuple[tuple[str, Predictor], ...]
    other: Predictor = LAST

    def __post_init__(self) -> None:
        pairs = self.groups if isinstance(self.groups, tuple) else (self.groups,)
        if not all(isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in pairs):
            raise ConfigError(f"predictors of groups are (group, predictor) pairs; got {self.groups!r}")
        if wrong := next((p for p in (*(p for _, p in self.groups), self.other) if not isinstance(p, Predictor)), None):
            raise ConfigError(f"{wrong!r} is no predictor: it has no 'tensors', 'store' and 'predict'")

    def __str__(self) -> str:
        groups = ", ".join(f"({group!r}, {p})" for group, p in self.groups)
        return f"by_group(({groups}{',' if len(self.groups) == 1 else ''}), {self.other})"


PREDICTORS: dict[str, Callable[..., Any]] = {
    "last": LastValue,
    "taylor": Taylor,
    "scaled": Scaled,
    "extrapolated": Extrapolated,
    "frequencies": Frequencies,
    "by_group": ByGroup,
}


def read_predictor(text: str) -> Predictor | ByGroup:
    """The predictor that prints as `text`: "last", "taylor(1)", or the class of an installed package, "Damped(damping=0.3)".

    Raises:
        ConfigError: no such predictor, or one of a function, which no text holds.
    """
    kinds = PREDICTORS | {kind.value.__name__: kind.value for kind in plugins("vdcache.predictors")}

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Name) and node.id in kinds:
            return kinds[node.id]()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
            return kinds[node.func.id](*map(value, node.args), **{str(k.arg): value(k.value) for k in node.keywords})
        if isinstance(node, ast.Tuple):
            return tuple(map(value, node.elts))
        return ast.literal_eval(node)

    try:
        found = value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError) as error:
        raise ConfigError(f"{text!r} is no predictor that a text can name; there are {', '.join(kinds)}") from error
    if not isinstance(found, (Predictor, ByGroup)):
        raise ConfigError(f"{text!r} is no predictor; there are {', '.join(kinds)}")
    return found


def predictor_of(predictor: Predictor | ByGroup, group: str) -> Predictor:
    """The predictor of a group's slots."""
    return dict(predictor.groups).get(group, predictor.other) if isinstance(predictor, ByGroup) else predictor
