"""Policies that go by the timestep: attention that is broadcast within a window of the noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from vdcache.policies.metrics import MetricValue
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.util.fields import Checked, ascending, at_least, between, some

__all__ = ["BroadcastWindow", "TimestepWindow"]


@dataclass(frozen=True)
class TimestepWindow(Checked):
    """Recompute every n-th step, and every step outside a window of timesteps (Pyramid Attention Broadcast, arXiv 2408.12588).

    The grid counts from step 0, in and out of the window.

    Args:
        n: distance of computed steps within the window.
        window: (low, high); a step may reuse where low < timestep < high. Timesteps count from 1000 (noise) to 0, and those of
            models that take them from 1 to 0 are brought to that. Where no timestep is known (explicit control), steps are
            taken as equally long.
        group: the group of slots that is reused.

    Raises:
        ConfigError: n below 1, or no window.
    """

    n: Annotated[int, at_least(1)]
    window: Annotated[tuple[float, float], ascending] = (0, 1000)
    group: str = "all"

    def plans(self) -> tuple[Plan, ...]:
        return (RECOMPUTE, Plan.of([self.group])) if self.n > 1 else (RECOMPUTE,)

    def start(self, num_steps: int, before: Any = None) -> int:
        return num_steps

    def plan(self, state: int, step: int, times: Sequence[float] = ()) -> Plan:
        low, high = self.window
        inside = low < timesteps(times, step, state)[step] < high
        return Plan.of([self.group]) if step % self.n and inside else RECOMPUTE

    def observe(self, state: Any, step: int, plan: Plan, measures: Sequence[MetricValue] | None) -> Any:
        return state


@dataclass(frozen=True)
class BroadcastWindow(Checked):
    """Recompute everywhere but in the few steps after certain timesteps (the MLPs of Pyramid Attention Broadcast).

    Args:
        keys: timesteps, 1000 to 0. The first step at or below one is computed, and the `skip` steps after it reuse.
        skip: how many.
        group: the group of slots that is reused.

    Raises:
        ConfigError: no key, or skip below 1.
    """

    keys: Annotated[tuple[Annotated[float, between(0, 1000)], ...], some]
    skip: Annotated[int, at_least(1)] = 2
    group: str = "all"

    def plans(self) -> tuple[Plan, ...]:
        return (RECOMPUTE, Plan.of([self.group]))

    def start(self, num_steps: int, before: Any = None) -> int:
        return num_steps

    def plan(self, state: int, step: int, times: Sequence[float] = ()) -> Plan:
        known = timesteps(times, step, state)
        ends = [next((s for s, t in enumerate(known) if t <= key), None) for key in self.keys]
        starts = [s for s in ends if s is not None]
        reuse = step not in starts and any(s < step <= s + self.skip for s in starts)
        return Plan.of([self.group]) if reuse else RECOMPUTE

    def observe(self, state: Any, step: int, plan: Plan, measures: Sequence[MetricValue] | None) -> Any:
        return state


def timesteps(times: Sequence[float], step: int, num_steps: int) -> list[float]:
    """The timesteps of steps 0 to `step`, from 1000 to 0; equally long steps where they are not known."""
    if len(times) <= step:
        return [1000 * (1 - s / num_steps) for s in range(step + 1)]
    factor = 1000.0 if max(times) <= 1 else 1.0
    return [t * factor for t in times]
