"""Policies that decide inside a step, when a probe of the graph has run: thresholds on how much something changed.

All are pure, as every policy is. Steps count from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from vdcache.policies.metrics import MetricValue
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.util.fields import Bound, Checked, at_least

__all__ = ["Bounds", "EasyCache", "EasyState", "Threshold", "ThresholdState"]


@dataclass(frozen=True)
class Bounds(Checked):
    """What every threshold is bounded by.

    Args:
        first, last: steps at either end that are always computed. `first` is at least 1.
        max_consecutive: longest run of reused steps; 0 for no limit.
        max_total: most reused steps of a generation; 0 for no limit.
        mask: 1 for steps that are always computed, 0 for others; none past its end.

    Raises:
        ConfigError: no whole numbers, or fewer than one first step.
    """

    first: Annotated[int, at_least(1)] = 1
    last: Annotated[int, at_least(0)] = 1
    max_consecutive: Annotated[int, at_least(0)] = 0
    max_total: Annotated[int, at_least(0)] = 0
    mask: tuple[Annotated[int, Bound(lambda v: v in (0, 1), noun="1 (computed) or 0")], ...] = ()

    def forces(self, step: int, num_steps: int, row: int, total: int) -> bool:
        """Whether a step is computed whatever the probe says, after `row` reused steps in a row and `total` in all."""
        return (
            step < self.first
            or step >= num_steps - self.last
            or bool(self.max_consecutive and row >= self.max_consecutive)
            or bool(self.max_total and total >= self.max_total)
            or (step < len(self.mask) and self.mask[step] == 1)
        )


@dataclass(frozen=True)
class ThresholdState:
    """Steps of the generation, the change added up since the last computed step, and reused steps in a row and in all."""

    num_steps: int
    change: float = 0.0
    row: int = 0
    total: int = 0
    seen: float = 0.0
    trace: tuple[tuple[int, float], ...] = ()  # (step, change as compared)


@dataclass(frozen=True)
class Threshold(Checked):
    """Reuse while what is probed has changed less than a threshold.

    With `accumulate` the changes of the steps since the last computed one are added up (TeaCache, arXiv 2411.19108, equation 7;
    SeaCache), each first put through the polynomial; without, the one change since then is compared (first-block caches).

    Args:
        threshold: reused below it, strictly; at least 0.
        accumulate: add up.
        polynomial: coefficients, the highest power first; empty for none.
        bounds: what is computed in any case.
        limit: changes that were looked at, added up over the generation and never forgotten; from there on every step is
            computed. 0 for none.
        group: the group of slots that is reused.

    Raises:
        ConfigError: a threshold below 0 or no number.
    """

    threshold: Annotated[float, at_least(0)]
    accumulate: bool = False
    polynomial: tuple[float, ...] = ()
    bounds: Bounds = field(default_factory=Bounds)
    limit: Annotated[float, at_least(0)] = 0.0
    group: str = "all"

    def plans(self) -> tuple[Plan, ...]:
        return (RECOMPUTE, Plan.of([self.group]))

    def start(self, num_steps: int, before: Any = None) -> ThresholdState:
        return ThresholdState(num_steps)

    def plan(self, state: ThresholdState, step: int, times: Sequence[float] = ()) -> Plan | None:
        if self.limit and state.seen >= self.limit:
            return RECOMPUTE
        return RECOMPUTE if self.bounds.forces(step, state.num_steps, state.row, state.total) else None

    def decide(self, state: ThresholdState, step: int, probe: Sequence[MetricValue] | None) -> tuple[ThresholdState, Plan]:
        if not probe:
            return state, RECOMPUTE
        change = sum(m.change for m in probe) / len(probe)
        if self.polynomial:
            value = 0.0
            for coefficient in self.polynomial:
                value = value * change + coefficient
            change = value
        if self.accumulate:
            change += state.change
        seen = state.seen + max(0.0, change) if self.limit else 0.0
        state = replace(state, change=change, seen=seen, trace=(*state.trace, (step, change)))
        return state, Plan.of([self.group]) if change < self.threshold else RECOMPUTE

    def observe(self, state: ThresholdState, step: int, plan: Plan, measures: Sequence[MetricValue] | None) -> ThresholdState:
        if plan:
            return replace(state, row=state.row + 1, total=state.total + 1)
        return replace(state, change=0.0, row=0)


@dataclass(frozen=True)
class EasyState:
    """As `ThresholdState`, with the rate at which the output follows the input, and the size of the last computed output."""

    num_steps: int
    error: float = 0.0
    rate: float | None = None
    size: float | None = None
    row: int = 0
    total: int = 0
    trace: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class EasyCache(Checked):
    """Reuse while the predicted change of the output is small (EasyCache, arXiv 2507.02860).

    The probe is the input x, against the step before; input x and output v are observed at computed steps. With p the last
    computed step and q the one before, k = ‖v_p − v_q‖ / ‖x_p − x_q‖, every step adds k · ‖x_t − x_{t−1}‖ / ‖v_p‖ to an error;
    the step is reused while it stays below the threshold. Norms are means of absolute values.

    Args:
        threshold: reused below it, strictly; at least 0.
        bounds: what is computed in any case; the published warm-up is 5 to 10 steps.
        group: the group of slots that is reused.

    Raises:
        ConfigError: a threshold below 0 or no number.
    """

    threshold: Annotated[float, at_least(0)]
    bounds: Bounds = field(default_factory=lambda: Bounds(first=5))
    group: str = "all"

    def plans(self) -> tuple[Plan, ...]:
        return (RECOMPUTE, Plan.of([self.group]))

    def start(self, num_steps: int, before: Any = None) -> EasyState:
        return EasyState(num_steps)

    def plan(self, state: EasyState, step: int, times: Sequence[float] = ()) -> Plan | None:
        return RECOMPUTE if self.bounds.forces(step, state.num_steps, state.row, state.total) else None

    def decide(self, state: EasyState, step: int, probe: Sequence[MetricValue] | None) -> tuple[EasyState, Plan]:
        if not probe or state.rate is None or not state.size:
            return state, RECOMPUTE
        error = state.error + state.rate * probe[0].change_absolute / state.size
        state = replace(state, error=error, trace=(*state.trace, (step, error)))
        return state, Plan.of([self.group]) if error < self.threshold else RECOMPUTE

    def observe(self, state: EasyState, step: int, plan: Plan, measures: Sequence[MetricValue] | None) -> EasyState:
        if plan:
            return replace(state, row=state.row + 1, total=state.total + 1)
        state = replace(state, error=0.0, row=0)
        if measures is None:
            return state
        of = {m.name.rpartition("observed.")[2]: m for m in measures}
        if "input" not in of or "output" not in of:
            return state
        moved = of["input"].change_absolute
        rate = of["output"].change_absolute / moved if moved > 0 else state.rate
        return replace(state, rate=rate, size=of["output"].size)
