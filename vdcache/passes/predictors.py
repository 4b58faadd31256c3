"""What a reused slot is given: functions of what was kept at computed steps. They are traced into the variants.

Most predictors are weighted sums of the last values, with rules for the weights that know no tensors (`policies.weights`); one graph,
`Ring`, serves them all. What is no such sum is a frozen value with two functions of tensors: `store` says what a computed step
leaves behind, `predict` what a reused one puts in the place of the value. Both become part of the compiled graph, so a prediction
costs no call of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from vdcache.errors import ConfigError
from vdcache.passes.filters import sinusoids
from vdcache.policies.weights import RULES, STEP_INFO, Numbers, Position, RingWeights, WeightRule
from vdcache.util.fields import Bound, Checked, between
from vdcache.util.plugins import plugins

__all__ = [
    "LAST",
    "PREDICTORS",
    "AnyPredictor",
    "Blended",
    "ByGroup",
    "Frequencies",
    "LastValue",
    "Predictor",
    "Ring",
    "StepInfo",
    "as_told",
    "depends_on_steps",
    "graph_of",
    "numbers_of",
    "predictor_of",
    "read_predictor",
]


class StepInfo(NamedTuple):
    """Where a step stands, as float32, 0-d tensors, so that no step compiles anything (`policies.weights.StepNumbers`).

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


AnyPredictor = Predictor | WeightRule


class Ring:
    """The graph of every predictor that is a weighted sum (`policies.weights`): the newest value in its own type, and the differences of
    successive ones. Weights for those (`ring_weights`) are inputs of the variants.

    Differences are formed in float32 and kept in bfloat16, float32 for values of 32 bits: they are small beside the value, which
    loses nothing.

    Args:
        tensors: how many values a slot keeps.
    """

    def __init__(self, tensors: int) -> None:
        self.tensors = tensors

    def kept_type(self, place: int, own: torch.dtype) -> torch.dtype:
        """In what type the tensor at a place is kept."""
        return own if place == 0 or own.itemsize > 2 else torch.bfloat16

    def store(self, new: Tensor, previous: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        new = new.to(previous[0].dtype) if previous else new  # what is kept and what the next difference is from are one value
        if self.tensors == 1:
            return [new]
        moved = _wide(new) - _wide(previous[0])
        # Behind a value that was no number the next one stands alone.
        moved = torch.where(moved.isfinite(), moved, torch.zeros_like(moved)).to(self.kept_type(1, new.dtype))
        return [new, moved, *previous[1 : self.tensors - 1]]

    def predict(self, cached: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        total = _wide(cached[0]) * weights[0]
        for value, weight in zip(cached[1:], weights[1:], strict=True):
            total = total + _wide(value) * weight
        return total


def _wide(value: Tensor) -> Tensor:
    """In at least float32."""
    return value.float() if value.dtype.itemsize < 4 else value


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

    groups: tuple[tuple[str, AnyPredictor], ...]
    other: AnyPredictor = LAST

    def __post_init__(self) -> None:
        pairs = self.groups if isinstance(self.groups, tuple) else (self.groups,)
        if not all(isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in pairs):
            raise ConfigError(f"predictors of groups are (group, predictor) pairs; got {self.groups!r}")
        if wrong := next((p for p in (*(p for _, p in self.groups), self.other) if not isinstance(p, AnyPredictor)), None):
            raise ConfigError(
                f"{wrong!r} is no predictor: it has neither 'tensors' and 'weights' nor 'tensors', 'store' and 'predict'"
            )

    def __str__(self) -> str:
        groups = ", ".join(f"({group!r}, {p})" for group, p in self.groups)
        return f"by_group(({groups}{',' if len(self.groups) == 1 else ''}), {self.other})"


PREDICTORS: dict[str, Callable[..., Any]] = {
    "last": LastValue,
    **RULES,
    "frequencies": Frequencies,
    "by_group": ByGroup,
}


def read_predictor(text: str) -> AnyPredictor | ByGroup:
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
    if not isinstance(found, (Predictor, WeightRule, ByGroup)):
        raise ConfigError(f"{text!r} is no predictor; there are {', '.join(kinds)}")
    return found


def predictor_of(predictor: AnyPredictor | ByGroup, group: str) -> AnyPredictor:
    """The predictor of a group's slots."""
    return dict(predictor.groups).get(group, predictor.other) if isinstance(predictor, ByGroup) else predictor


def graph_of(predictor: AnyPredictor) -> Predictor:
    """What becomes part of the graphs: the predictor itself, or the ring of one that is a weighted sum."""
    return Ring(predictor.tensors) if isinstance(predictor, WeightRule) else predictor  # type: ignore[return-value]


def numbers_of(predictor: AnyPredictor) -> Numbers:
    """What the graph of a predictor is told of the step."""
    return RingWeights(predictor) if isinstance(predictor, WeightRule) else STEP_INFO


def as_told(graph: Predictor, numbers: Sequence[Any]) -> Any:
    """The numbers that a graph is told of the step, in the form that its functions take."""
    return numbers if isinstance(graph, Ring) else StepInfo(*numbers)


def depends_on_steps(predictor: AnyPredictor) -> bool:
    """Whether what it predicts depends on which steps were computed, and not on the kept values alone."""
    if isinstance(predictor, LastValue):
        return False
    if not isinstance(predictor, WeightRule):
        return True
    steps, other = ([Position(s) for s in at] for at in ((9, 7, 6, 4, 2, 1), (7, 6, 4, 2, 1, 0)))
    now = Position(11)
    return list(predictor.weights(now, steps)) != list(predictor.weights(now, other))
