"""Schedules: which steps are computed, known before the run, and policies made of them. They measure nothing and never wait.

The step intervals of ProfilingDiT (arXiv 2504.03140, section 3.3), lists of steps, and policies side by side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vdcache.ir.checks import number, whole_numbers
from vdcache.ir.errors import ConfigError
from vdcache.runtime.measures import Measured
from vdcache.runtime.plan import RECOMPUTE, Plan
from vdcache.runtime.policies import Deciding, Policy

__all__ = ["Intervals", "Listed", "Scheduled", "Together", "scaled_to"]


@dataclass(frozen=True)
class Listed:
    """Computed steps as a list, counted from 0. Every step before the first of them is computed as well (the warm-up).

    Args:
        steps: ascending.
        of_steps: the number of steps that the list was made for, to which it is scaled in proportion; 0 to take it as it is.

    Raises:
        ConfigError: an empty list, steps that do not ascend or are negative.
    """

    steps: tuple[int, ...]
    of_steps: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", whole_numbers(self.steps, "the computed steps"))
        if not self.steps:
            raise ConfigError("a list of computed steps holds at least one step")
        if self.steps[0] < 0 or any(not a < b for a, b in itertools.pairwise(self.steps)):
            raise ConfigError(f"computed steps ascend and count from 0; got {list(self.steps)}")

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

    def scaled(self, num_steps: int) -> Listed:
        """The same list for another number of steps."""
        factor = num_steps / (self.of_steps or num_steps)
        return Listed(tuple(sorted({min(num_steps - 1, round(s * factor)) for s in self.steps})), num_steps)


ORDERS = ("decreasing", "increasing", "even")


@dataclass(frozen=True)
class Intervals:
    """Intervals between computed steps that change linearly over the run (ProfilingDiT equations 11, 12 and 15).

    After `warm_up` computed steps, step s₀ = warm_up is computed, and after a computed step s the next one is s + T(s), with
    T(s) = T_max − (T_max − T_min)(s − s₀)/(S − s₀) rounded to the nearest whole number, halves up, and at least 1. S is the number of
    steps.

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

    warm_up: int
    t_max: float
    t_min: float
    order: str = "decreasing"
    of_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("warm_up", "t_max", "t_min"):
            number(getattr(self, name), f"{name} of the intervals is a number of steps")
        if self.warm_up < 0 or self.warm_up != int(self.warm_up):
            raise ConfigError(f"warm_up is a whole number of steps, at least 0; got {self.warm_up}")
        if not self.t_min >= 1:
            raise ConfigError(f"t_min is an interval in steps, at least 1; got {self.t_min}")
        if not self.t_max >= self.t_min or math.isinf(self.t_max):
            raise ConfigError(f"t_max is an interval in steps, at least t_min={self.t_min:g}; got {self.t_max}")
        if self.order not in ORDERS:
            raise ConfigError(f"intervals have no order {self.order!r}; there are {', '.join(ORDERS)}")

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

    def scaled(self, num_steps: int) -> Intervals:
        """The same schedule for another number of steps."""
        factor = num_steps / (self.of_steps or num_steps)
        warm_up = min(num_steps - 1, round(self.warm_up * factor))
        return replace(
            self, warm_up=warm_up, t_max=max(1.0, self.t_max * factor), t_min=max(1.0, self.t_min * factor), of_steps=num_steps
        )


TURNS = ("alternate", "split")


@dataclass(frozen=True)
class Scheduled:
    """A policy that follows a schedule: computed at its steps, reused in between.

    Args:
        when: the computed steps; a list of steps becomes `Listed`.
        groups: the groups of slots that are reused. Of several, one has its turn at a time (the others are computed).
        turn: "alternate", the next one after every computed step; "split", each for an equal share of the run after the
            warm-up (ProfilingDiT table 3).

    Raises:
        ConfigError: no group, or an unknown turn.
    """

    when: Listed | Intervals
    groups: tuple[str, ...] = ("all",)
    turn: str = "alternate"

    def __post_init__(self) -> None:
        if not isinstance(self.when, (Listed, Intervals)):
            object.__setattr__(self, "when", Listed(self.when))
        if isinstance(self.groups, str):
            raise ConfigError(f"groups is a list of names; got {self.groups!r}: ({self.groups!r},)")
        if not self.groups:
            raise ConfigError("a scheduled policy reuses at least one group of slots")
        if self.turn not in TURNS:
            raise ConfigError(f"groups have no turn {self.turn!r}; there are {', '.join(TURNS)}")

    def plans(self) -> tuple[Plan, ...]:
        return (RECOMPUTE, *(Plan.of([g]) for g in self.groups))

    def start(self, num_steps: int, before: Any = None) -> tuple[Plan, ...]:
        computed = set(self.when.computed(num_steps))
        warm_up = next(s for s in range(num_steps + 1) if s not in computed)
        plans: list[Plan] = []
        segment = -1
        for step in range(num_steps):
            if step in computed:
                plans.append(RECOMPUTE)
                continue
            segment += not plans or not plans[-1]
            if self.turn == "split":
                at = (step - warm_up) * len(self.groups) // (num_steps - warm_up)
            else:
                at = segment % len(self.groups)
            plans.append(Plan.of([self.groups[at]]))
        return tuple(plans)

    def plan(self, state: tuple[Plan, ...], step: int, timestep: float | None = None) -> Plan:
        return state[step]

    def observe(self, state: Any, step: int, plan: Plan, measures: Sequence[Measured] | None) -> Any:
        return state


@dataclass(frozen=True)
class Together:
    """Policies side by side, each for slots of its own: a step reuses what any of them reuses.

    Raises:
        ConfigError: none, or a group that two of them reuse.
    """

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        if not self.policies:
            raise ConfigError("policies side by side are at least one")
        if wrong := [p for p in self.policies if isinstance(p, Deciding)]:
            raise ConfigError(f"{type(wrong[0]).__name__} decides by a probe, and such a policy cannot stand beside others")
        groups = [g for p in self.policies for g in _groups(p)]
        if twice := [g for g in groups if groups.count(g) > 1]:
            raise ConfigError(f"two policies reuse the group {twice[0]!r}; give each its own group of slots")

    def plans(self) -> tuple[Plan, ...]:
        return tuple(dict.fromkeys(_union(c) for c in itertools.product(*(p.plans() for p in self.policies))))

    def start(self, num_steps: int, before: Any = None) -> tuple[Any, ...]:
        known = before or (None,) * len(self.policies)
        return tuple(p.start(num_steps, b) for p, b in zip(self.policies, known, strict=True))

    def plan(self, state: tuple[Any, ...], step: int, timestep: float | None = None) -> Plan:
        plans = [p.plan(s, step, timestep) for p, s in zip(self.policies, state, strict=True)]
        return _union(p for p in plans if p is not None)

    def observe(self, state: tuple[Any, ...], step: int, plan: Plan, measures: Sequence[Measured] | None) -> tuple[Any, ...]:
        return tuple(
            p.observe(s, step, Plan(plan.reuse & _groups(p)), measures) for p, s in zip(self.policies, state, strict=True)
        )


def _union(plans: Iterable[Plan]) -> Plan:
    return Plan(frozenset().union(*(p.reuse for p in plans)))


def _groups(policy: Policy) -> frozenset[str]:
    return _union(policy.plans()).reuse


def scaled_to(policy: Policy, num_steps: int) -> tuple[Policy, str]:
    """A policy for a number of steps, and what was changed to that end ("" for nothing)."""
    if isinstance(policy, Together):
        each = [scaled_to(p, num_steps) for p in policy.policies]
        return Together(tuple(p for p, _ in each)), "; ".join(dict.fromkeys(said for _, said in each if said))
    if isinstance(policy, Scheduled) and policy.when.of_steps not in (0, num_steps):
        when = policy.when.scaled(num_steps)
        computed = when.computed(num_steps)
        steps = ", ".join(map(str, computed)) if len(computed) < num_steps else "all, so nothing is reused"
        said = f"its schedule was made for {policy.when.of_steps} steps and is scaled to {num_steps}: computed are {steps}"
        return replace(policy, when=when), said
    return policy, ""
