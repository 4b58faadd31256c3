"""When to recompute: pure functions of what was measured.

A policy is a frozen value. Its state is another one, handed in and out, so that a run can be replayed from its history.
No policy ever touches a tensor. Steps count from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

from vdcache.policies.metrics import MetricValue
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.util.fields import Checked, at_least

__all__ = ["Always", "Deciding", "EveryN", "Policy"]


@runtime_checkable
class Policy(Protocol):
    """Chooses the plan of every step.

    `plans()` lists every plan that `plan` can return, so the number of variants is known before a run. A policy that needs to
    see something of the step itself has a further method, `decide` (`Deciding`).
    """

    def plans(self) -> tuple[Plan, ...]: ...

    def start(self, num_steps: int, before: Any = None) -> Any:
        """The state at the beginning of a generation; `before` is the final state of the generation before, if any."""

    def plan(self, state: Any, step: int, times: Sequence[float] = ()) -> Plan | None:
        """The plan of `step`, from what was observed up to the step before; None to `decide` when the probe is known.

        Args:
            times: the timesteps of this generation as the model was given them (the largest one of a batch), that of `step`
                last; empty under explicit control, where nothing is read.
        """

    def observe(self, state: Any, step: int, plan: Plan, measures: Sequence[MetricValue] | None) -> Any:
        """The state after `step` ran with `plan`; `measures` is None where nothing comparable was computed."""


@runtime_checkable
class Deciding(Policy, Protocol):
    """A policy that decides inside a step, when the probe of the graph has run."""

    def decide(self, state: Any, step: int, probe: Sequence[MetricValue] | None) -> tuple[Any, Plan]:
        """The state and the plan, given what the probe measured; None where there is nothing to compare with."""


@dataclass(frozen=True)
class Always:
    """Recompute every step: the untouched model, with the same step tracking and history."""

    def plans(self) -> tuple[Plan, ...]:
        return (RECOMPUTE,)

    def start(self, num_steps: int, before: Any = None) -> int:
        return num_steps

    def plan(self, state: int, step: int, times: Sequence[float] = ()) -> Plan:
        return RECOMPUTE

    def observe(self, state: int, step: int, plan: Plan, measures: Sequence[MetricValue] | None) -> int:
        return state


@dataclass(frozen=True)
class EveryN(Checked):
    """Recompute at steps 0, n, 2n … and the last; reuse a group of slots in between.

    Raises ConfigError for n below 1.
    """

    n: Annotated[int, at_least(1)]
    group: str = "all"

    def plans(self) -> tuple[Plan, ...]:
        return (RECOMPUTE, Plan.of([self.group])) if self.n > 1 else (RECOMPUTE,)

    def start(self, num_steps: int, before: Any = None) -> int:
        return num_steps

    def plan(self, state: int, step: int, times: Sequence[float] = ()) -> Plan:
        return RECOMPUTE if step % self.n == 0 or step >= state - 1 else Plan.of([self.group])

    def observe(self, state: int, step: int, plan: Plan, measures: Sequence[MetricValue] | None) -> int:
        return state
