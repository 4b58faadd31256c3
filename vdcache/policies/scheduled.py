"""Policies that follow a schedule: what every step reuses is known before the run. They measure nothing and never wait."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from vdcache.errors import ConfigError
from vdcache.policies.base import Deciding, Policy
from vdcache.policies.metrics import MetricValue
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.policies.steps import ScaledSteps, StepList, Steps
from vdcache.util.fields import Bound, Checked, at_least, between, one_of, some
from vdcache.util.slots import group_of

__all__ = ["CombinedPolicy", "MagCache", "PlanTable", "SchedulePolicy", "same_times", "scaled_to"]


@dataclass(frozen=True)
class SchedulePolicy(Checked):
    """A policy that follows a schedule: computed at its steps, reused in between.

    Args:
        when: the computed steps; a list of steps becomes `StepList`.
        groups: the groups of slots that are reused. Of several, one has its turn at a time (the others are computed).
        turn: "alternate", the next one after every computed step; "split", each for an equal share of the run after the
            warm-up (ProfilingDiT table 3); "together", all of them in every reused step.
        switch: for "split" of two groups, the share of the run after which the second one takes over; 0 for half of what
            follows the warm-up.
        shared: groups that are reused in every reused step, whichever of the others has its turn.

    Raises:
        ConfigError: no group, an unknown turn, a share that is none, a group that is shared and has turns.
    """

    when: Steps
    groups: Annotated[tuple[str, ...], some] = ("all",)
    turn: Annotated[str, one_of("alternate", "split", "together")] = "alternate"
    switch: Annotated[float, between(0, 1)] = 0.0
    shared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.when, Steps):
            object.__setattr__(self, "when", StepList(self.when))
        super().__post_init__()
        if both := [g for g in self.shared if g in self.groups]:
            raise ConfigError(f"a group is shared or has turns; {both[0]!r} is named for both")
        if self.switch and (self.turn != "split" or len(self.groups) != 2):
            raise ConfigError(f"switch is a share of the run, 0 to 1, for two groups with turn='split'; got {self.switch!r}")

    def plans(self) -> tuple[Plan, ...]:
        if self.turn == "together":
            return (RECOMPUTE, Plan.of([*self.groups, *self.shared]))
        return (RECOMPUTE, *(Plan.of([g, *self.shared]) for g in self.groups))

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
            if self.turn == "together":
                plans.append(Plan.of([*self.groups, *self.shared]))
                continue
            if self.switch:
                at = int(step >= round(self.switch * num_steps))
            elif self.turn == "split":
                at = (step - warm_up) * len(self.groups) // (num_steps - warm_up)
            else:
                at = segment % len(self.groups)
            plans.append(Plan.of([self.groups[at], *self.shared]))
        return tuple(plans)

    def plan(self, state: tuple[Plan, ...], step: int, times: Sequence[float] = ()) -> Plan:
        return state[step]

    def observe(self, state: Any, step: int, plan: Plan, measures: Sequence[MetricValue] | None) -> Any:
        return state


@dataclass(frozen=True)
class PlanTable(Checked):
    """A plan for every step, known before the run: tables of layers and steps, schedules that were searched.

    Args:
        reuse: for each step the groups of slots that it reuses.
        times: the timesteps that the table was made for, one a step; from the first other one on every step is computed. Not
            compared under explicit control, where nothing is read. Empty for any.

    Raises:
        ConfigError: no step, a first step that reuses, timesteps for another number of steps.
    """

    reuse: tuple[tuple[str, ...], ...]
    times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reuse:
            raise ConfigError("a table of plans has a row for every step; it is empty")
        if self.reuse[0]:
            raise ConfigError("the first step of a generation has nothing to reuse, and the table says that it reuses")
        if self.times and len(self.times) != len(self.reuse):
            raise ConfigError(f"a table of {len(self.reuse)} plans has a timestep for each; got {len(self.times)}")

    def plans(self) -> tuple[Plan, ...]:
        return tuple(dict.fromkeys([RECOMPUTE, *map(Plan.of, self.reuse)]))

    def start(self, num_steps: int, before: Any = None) -> int:
        if num_steps != len(self.reuse):
            raise ConfigError(f"the table of plans is for {len(self.reuse)} steps, and the generation has {num_steps}")
        return num_steps

    def plan(self, state: int, step: int, times: Sequence[float] = ()) -> Plan:
        return Plan.of(self.reuse[step]) if not self.times or same_times(self.times, times) else RECOMPUTE

    def observe(self, state: Any, step: int, plan: Plan, measures: Sequence[MetricValue] | None) -> Any:
        return state


def same_times(expected: Sequence[float], seen: Sequence[float]) -> bool:
    """Whether the timesteps so far are those that were expected, up to the rounding of 16-bit ones."""
    return all(abs(a - b) <= 0.0025 * abs(a) + 1e-4 for a, b in zip(expected, seen))


Ratios = Annotated[
    tuple[float, ...],
    Bound(
        lambda ratios: ratios and all(0 < r < math.inf for r in ratios),
        noun="the ratios of magnitudes of every step, all above 0, which vdcache.calibration.magnitudes(model, run) measures",
    ),
]


@dataclass(frozen=True)
class MagCache(Checked):
    """Reuse while the magnitude of the residual is known to have changed little (MagCache, arXiv 2506.09045).

    From a share of the run on, every step multiplies the ratio since the last computed step by its own γ, and adds |1 − ratio| to an error; it reuses while the
    error is within the threshold and no more than so many steps in a row were reused.

    Args:
        ratios: γ of every step, ‖r_t‖ / ‖r_{t−1}‖ of an uncached run, 1 first. For another number of steps the nearest ones are
            taken.
        threshold: largest error, inclusive.
        max_consecutive: most reused steps in a row (K).
        retention: share of the run that is computed first, 0 to 1.
        group: the group of slots that is reused.

    Raises:
        ConfigError: no ratios, or a number out of range.
    """

    ratios: Ratios
    threshold: Annotated[float, Bound(lambda v: v >= 0, " of at least 0")] = 0.12
    max_consecutive: Annotated[int, at_least(1)] = 4
    retention: Annotated[float, between(0, 1)] = 0.2
    group: str = "all"

    def plans(self) -> tuple[Plan, ...]:
        return (RECOMPUTE, Plan.of([self.group]))

    def start(self, num_steps: int, before: Any = None) -> tuple[Plan, ...]:
        n, have = num_steps, len(self.ratios)
        scale = (have - 1) / max(1, n - 1)
        own = self.ratios if have == n else [self.ratios[round(s * scale)] for s in range(n)]
        retained = max(1, int(n * self.retention + 0.5))
        plans, ratio, error, row = [], 1.0, 0.0, 0
        for step in range(n):
            ratio *= own[step]
            error += abs(1 - ratio)
            row += 1
            if step >= retained and error <= self.threshold and row <= self.max_consecutive:
                plans.append(Plan.of([self.group]))
            else:
                plans.append(RECOMPUTE)
                ratio, error, row = 1.0, 0.0, 0
        return tuple(plans)

    def plan(self, state: tuple[Plan, ...], step: int, times: Sequence[float] = ()) -> Plan:
        return state[step]

    def observe(self, state: Any, step: int, plan: Plan, measures: Sequence[MetricValue] | None) -> Any:
        return state


@dataclass(frozen=True)
class CombinedPolicy:
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

    def plan(self, state: tuple[Any, ...], step: int, times: Sequence[float] = ()) -> Plan:
        plans = [p.plan(s, step, times) for p, s in zip(self.policies, state, strict=True)]
        return _union(p for p in plans if p is not None)

    def observe(self, state: tuple[Any, ...], step: int, plan: Plan, measures: Sequence[MetricValue] | None) -> tuple[Any, ...]:
        found = []
        for policy, own in zip(self.policies, state, strict=True):
            groups = _groups(policy)
            seen = tuple(m for m in measures or () if group_of(m.name) in groups) or None
            found.append(policy.observe(own, step, Plan(plan.reuse & groups), seen))
        return tuple(found)


def _union(plans: Iterable[Plan]) -> Plan:
    return Plan(frozenset().union(*(p.reuse for p in plans)))


def _groups(policy: Policy) -> frozenset[str]:
    return _union(policy.plans()).reuse


def scaled_to(policy: Policy, num_steps: int) -> tuple[Policy, str]:
    """A policy for a number of steps, and what is other than it was made for ("" for nothing)."""
    if isinstance(policy, CombinedPolicy):
        each = [scaled_to(p, num_steps) for p in policy.policies]
        return CombinedPolicy(tuple(p for p, _ in each)), "; ".join(dict.fromkeys(said for _, said in each if said))
    when = policy.when if isinstance(policy, SchedulePolicy) else None
    if isinstance(policy, SchedulePolicy) and isinstance(when, ScaledSteps) and when.of_steps not in (0, num_steps):
        made_for, when = when.of_steps, when.scaled(num_steps)
        computed = when.computed(num_steps)
        steps = ", ".join(map(str, computed)) if len(computed) < num_steps else "all, so nothing is reused"
        said = f"its schedule was made for {made_for} steps and is scaled to {num_steps}: computed are {steps}"
        return replace(policy, when=when), said
    if isinstance(policy, MagCache) and (have := len(policy.ratios)) != num_steps:
        how = "stretched" if num_steps > have else "thinned out"
        said = (
            f"its curve of magnitudes was measured at {have} steps and is {how} to {num_steps} (the nearest values, as the authors' code does), "
            "while steps of another length change by another amount; vdcache.methods.magcache(vdcache.calibration.magnitudes(model, run)) measures your own"
        )
        return policy, said
    return policy, ""
