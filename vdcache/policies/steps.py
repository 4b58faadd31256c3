"""Which steps of a generation are computed, known before the run: lists, grids, intervals, gates."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Annotated

from vdcache.errors import ConfigError
from vdcache.util.fields import Checked, ascending, at_least, between, one_of, some

__all__ = ["EveryNth", "GrowingIntervals", "LeadingSteps", "LinearIntervals", "ScaledSteps", "StepList", "Steps", "TGateSteps"]


@dataclass(frozen=True)
class StepList(Checked):
    """Computed steps as a list, counted from 0. Every step before the first of them is computed as well (the warm-up).

    Args:
        steps: ascending.
        of_steps: the number of steps that the list was made for, to which it is scaled in proportion; 0 to take it as it is.

    Raises:
        ConfigError: an empty list, steps that do not ascend or are negative.
    """

    steps: Annotated[tuple[Annotated[int, at_least(0)], ...], some, ascending]
    of_steps: int = 0

    def computed(self, num_steps: int) -> tuple[int, ...]:
        """The computed steps of a generation.

        Raises:
            ConfigError: the list names a step that the generation does not have.
        """
        if self.of_steps and self.of_steps != num_steps:
            return self.scaled(num_steps).computed(num_steps)
        if self.steps[-1] >= num_steps:
            raise ConfigError(
                f"the schedule computes step {self.steps[-1]} (counted from 0), and the generation has {num_steps} steps: "
                "give a list for this number of steps, or say of_steps=… so that it is scaled"
            )
        return (*range(self.steps[0]), *self.steps)

    def scaled(self, num_steps: int) -> StepList:
        """The same list for another number of steps."""
        factor = num_steps / (self.of_steps or num_steps)
        return StepList(tuple(sorted({min(num_steps - 1, round(s * factor)) for s in self.steps})), num_steps)


@dataclass(frozen=True)
class LinearIntervals(Checked):
    """Intervals between computed steps that change linearly over the run (ProfilingDiT equations 11, 12 and 15).

    After `warm_up` computed steps, step s₀ = warm_up is computed, and after a computed step s the next one is s + T(s), with
    T(s) = T_max − (T_max − T_min)(s − s₀)/(S − s₀) rounded to the nearest whole number, halves up, and at least 1. S is the
    number of steps.

    Args:
        warm_up: steps at the beginning that are all computed.
        t_max, t_min: the interval at the first and towards the last step.
        order: "decreasing", the paper's; "increasing", the same gaps in reverse order ("inverse" in its table 4);
            "even", as many computed steps at equal distances ("average").
        of_steps: the number of steps that the constants were chosen for, to which they are scaled in proportion; 0 to take
            them as they are.

    Raises:
        ConfigError: an interval below 1, t_max below t_min, a negative warm-up, an unknown order.
    """

    warm_up: Annotated[int, at_least(0)]
    t_max: Annotated[float, at_least(1)]
    t_min: Annotated[float, at_least(1)]
    order: Annotated[str, one_of("decreasing", "increasing", "even")] = "decreasing"
    of_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.t_max >= self.t_min:
            raise ConfigError(f"t_max is an interval in steps, at least t_min={self.t_min:g}; got {self.t_max}")

    def interval(self, step: int, num_steps: int) -> int:
        """T(step), rounded."""
        exact = self.t_max - (self.t_max - self.t_min) * (step - self.warm_up) / (num_steps - self.warm_up)
        return max(1, math.floor(exact + 0.5))

    def computed(self, num_steps: int) -> tuple[int, ...]:
        """The computed steps of a generation.

        Raises:
            ConfigError: the warm-up leaves no step.
        """
        if self.of_steps and self.of_steps != num_steps:
            return self.scaled(num_steps).computed(num_steps)
        if self.warm_up >= num_steps:
            raise ConfigError(
                f"a warm-up of {self.warm_up} steps leaves nothing to reuse in a generation of {num_steps}: give a smaller warm_up"
            )
        steps = [self.warm_up]
        while (after := steps[-1] + self.interval(steps[-1], num_steps)) < num_steps:
            steps.append(after)
        if self.order == "increasing":
            gaps = [b - a for a, b in itertools.pairwise([*steps, num_steps])]
            steps = list(itertools.accumulate(reversed(gaps[1:]), initial=self.warm_up))
        elif self.order == "even":
            steps = [self.warm_up + i * (num_steps - self.warm_up) // len(steps) for i in range(len(steps))]
        return (*range(self.warm_up), *steps)

    def scaled(self, num_steps: int) -> LinearIntervals:
        """The same schedule for another number of steps."""
        factor = num_steps / (self.of_steps or num_steps)
        warm_up = min(num_steps - 1, round(self.warm_up * factor))
        return replace(
            self, warm_up=warm_up, t_max=max(1.0, self.t_max * factor), t_min=max(1.0, self.t_min * factor), of_steps=num_steps
        )


@dataclass(frozen=True)
class EveryNth(Checked):
    """Every n-th step, and some at either end.

    Args:
        n: distance of computed steps.
        first, last: steps at either end that are computed as well.
        offset: the first step of the grid.
        from_end: count the grid from the last step instead (FORA's code counts steps downwards).
        of_steps: the number of steps that `first` and `last` were chosen for, to which they are scaled in proportion (n is
            kept); 0 to take them as they are.

    Raises:
        ConfigError: n below 1, a negative number of steps.
    """

    n: Annotated[int, at_least(1)]
    first: Annotated[int, at_least(0)] = 1
    last: Annotated[int, at_least(0)] = 0
    offset: Annotated[int, at_least(0)] = 0
    from_end: bool = False
    of_steps: int = 0

    def computed(self, num_steps: int) -> tuple[int, ...]:
        """The computed steps of a generation."""
        if self.of_steps and self.of_steps != num_steps:
            return self.scaled(num_steps).computed(num_steps)
        at = (num_steps - 1 if self.from_end else self.offset) % self.n
        return tuple(s for s in range(num_steps) if s % self.n == at or s < max(1, self.first) or s >= num_steps - self.last)

    def scaled(self, num_steps: int) -> EveryNth:
        """The same grid for another number of steps."""
        factor = num_steps / (self.of_steps or num_steps)
        return replace(self, first=round(self.first * factor), last=round(self.last * factor), of_steps=num_steps)


@dataclass(frozen=True)
class GrowingIntervals(Checked):
    """Intervals that grow with every computed step (Spectrum, arXiv 2603.01623, as its code has it).

    After the warm-up a step is computed if the number of reused ones before it, and itself, is a multiple of the window rounded down;
    then the window grows.

    Args:
        warm_up: steps at the beginning that are all computed.
        window: the first interval.
        growth: what every computed step after the warm-up adds to it.

    Raises:
        ConfigError: a warm-up or window below 1, a negative growth.
    """

    warm_up: Annotated[int, at_least(1)] = 5
    window: Annotated[float, at_least(1)] = 2.0
    growth: Annotated[float, at_least(0)] = 0.75

    def computed(self, num_steps: int) -> tuple[int, ...]:
        """The computed steps of a generation."""
        steps = list(range(min(self.warm_up, num_steps)))
        window, reused = self.window, 0
        for step in range(self.warm_up, num_steps):
            if (reused + 1) % math.floor(window) == 0:
                steps.append(step)
                window, reused = round(window + self.growth, 3), 0
            else:
                reused += 1
        return tuple(steps)


@dataclass(frozen=True)
class LeadingSteps(Checked):
    """The first steps of a run, and none after them.

    Args:
        share: of the run, rounded down; the first step is always computed.

    Raises:
        ConfigError: no share.
    """

    share: Annotated[float, between(0, 1)]

    def computed(self, num_steps: int) -> tuple[int, ...]:
        """The computed steps of a generation."""
        return tuple(range(max(1, int(num_steps * self.share))))


@dataclass(frozen=True)
class TGateSteps(Checked):
    """The steps of T-GATE (arXiv 2404.02747) for self-attention: up to the gate every `interval`-th, from there every
    `after`-th.

    Args:
        gate: steps before the gate closes; its last one is computed.
        interval: distance of computed steps before the gate, on a grid from step 0.
        warm_up: steps at the beginning that are all computed, and the one after them.
        after: distance of computed steps after the gate.
        of_steps: the number of steps that the constants were chosen for; 0 to take them as they are.

    Raises:
        ConfigError: a number below 1.
    """

    gate: Annotated[int, at_least(1)]
    interval: Annotated[int, at_least(1)] = 1
    warm_up: Annotated[int, at_least(0)] = 0
    after: Annotated[int, at_least(1)] = 1
    of_steps: int = 0

    def computed(self, num_steps: int) -> tuple[int, ...]:
        """The computed steps of a generation."""
        if self.of_steps and self.of_steps != num_steps:
            return self.scaled(num_steps).computed(num_steps)
        before = [s for s in range(min(self.gate - 1, num_steps)) if s <= self.warm_up or s % self.interval == 0]
        after = [s for s in range(self.gate, num_steps) if s % self.after == 0]
        return (*before, *range(self.gate - 1, min(self.gate, num_steps)), *after)

    def scaled(self, num_steps: int) -> TGateSteps:
        """The same gate for another number of steps."""
        return replace(self, gate=max(1, round(self.gate * num_steps / (self.of_steps or num_steps))), of_steps=num_steps)


ScaledSteps = StepList | LinearIntervals | EveryNth | TGateSteps  # that may be made for a number of steps
Steps = ScaledSteps | GrowingIntervals | LeadingSteps  # what says which steps are computed
