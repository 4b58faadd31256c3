"""Which plan does every step follow? The policy, what it was told of the steps before, and how many steps a generation has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vdcache.errors import ConfigError
from vdcache.policies.base import Always, Policy
from vdcache.policies.metrics import MetricValue
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.policies.weights import Position
from vdcache.runtime.agreement import SessionRanks
from vdcache.runtime.call import CompiledGraph, ProbeResult
from vdcache.runtime.generation_length import GenerationLength
from vdcache.runtime.history import Record
from vdcache.runtime.read import DeviceReads
from vdcache.runtime.session_warnings import SessionWarnings
from vdcache.runtime.step_metrics import StepMetrics

__all__ = ["StepPlan", "StepPlanner"]


@dataclass
class StepPlan:
    """What a step is to do.

    Args:
        plan: what it reuses.
        why: why not more, where that is no choice of the policy's.
        undecided: the plan waits for a probe.
        probe: what was probed at this step.
    """

    plan: Plan = RECOMPUTE
    why: str = ""
    undecided: bool = False
    probe: tuple[MetricValue, ...] | None = None


class StepPlanner:
    """The plan of every step, one generation after another.

    Args:
        policy, num_steps, prepare: as `Session` is given them.
        ranks: with whom what was measured is added up.
    """

    def __init__(
        self,
        policy: Policy,
        num_steps: int | None,
        prepare: Callable[[int], Policy] | None,
        notices: SessionWarnings,
        reads: DeviceReads,
        ranks: SessionRanks,
    ) -> None:
        self.prepare, self._notices = prepare, notices
        self.length = GenerationLength(num_steps, notices)
        self.metrics = StepMetrics(notices, reads, ranks)
        self.turn = 0  # another number for every generation and every policy
        self.policy = policy
        self.generation = self.step = -1
        self.timestep: float | None = None
        self.timesteps: list[float] = []  # of this generation
        self.now = StepPlan()
        self._state: Any = None
        self._records: list[Record] = []  # of this step
        self.reused = False  # something was, in this generation

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = policy
        self._plans: dict[Plan, Plan] | None = None
        self.turn += 1

    def announce(self, num_steps: int | None) -> None:
        """How many steps every generation has from the next one on; None to learn it."""
        self.length.announce(num_steps)
        self.turn += 1

    def forget(self) -> None:
        """What ran so far teaches nothing."""
        self.step, self._state = -1, None
        self.length.forget()

    @property
    def position(self) -> Position:
        """Where the step stands."""
        return self.placed(Position(self.step, self.timestep))

    def placed(self, at: Position) -> Position:
        """Where a step stands: as it was told or read, else where the policy's own timesteps say."""
        known = getattr(self.policy, "times", ()) if at.timestep is None else ()
        return Position(at.step, known[at.step]) if 0 <= at.step < len(known) else at

    def follow(self, policy: Policy) -> None:
        """From the next step on, this policy decides.

        Raises:
            ConfigError: it is not for this number of steps.
        """
        steps = self.length.steps
        self._state = policy.start(steps, None) if steps is not None else None
        self.policy = policy

    @property
    def skips(self) -> bool:
        """Whether the policy ever reuses anything; if not, nothing depends on the number of steps."""
        return len(self.policy.plans()) > 1

    @property
    def is_last(self) -> bool:
        steps = self.length.steps
        return steps is not None and self.step >= steps - 1

    # ---- generations and steps ---------------------------------------------------------------------------------------

    def begin_generation(self, *, said_by_caller: bool = False, mixed: bool = False) -> None:
        """Args: `mixed` where parts of a batch go on, so that nobody knows how long a generation is."""
        if (ran := self.step + 1) and not mixed:
            self.length.ended(ran, self.timesteps, skips=self.skips, said_by_caller=said_by_caller)
        self.metrics.clear()
        self._records, self.timesteps = [], []
        self.step, self.generation, self.now, self.reused = -1, self.generation + 1, StepPlan(), False
        self.turn += 1
        if self.length.steps is not None:
            self._start(self.length.steps)

    def begin_step(self) -> bool:
        """Close the step before, and choose the plan of this one. Whether the step before was computed in full."""
        measures = self.metrics.of_step()
        computed = False
        if self.step >= 0:
            for record in self._records:
                record.measures = measures or ()
            if self._state is not None:
                self._state = self.policy.observe(self._state, self.step, self._ran(), measures)
            computed = any(r.computed and not r.plan.reuse for r in self._records)
        self._records = []
        if self.timestep is not None:
            self.timesteps.append(self.timestep)
        self.step += 1
        if self.step == 1 and self.length.recall(self.timesteps) and (steps := self.length.steps) is not None:
            self.turn += 1
            self._start(steps)
            if self._state is not None:
                self._state = self.policy.observe(self._state, 0, RECOMPUTE, measures)
        self.now = self._plan()
        return computed

    def _plan(self) -> StepPlan:
        if (steps := self.length.steps) is None:
            return StepPlan(why="learning the number of steps")
        if self.step >= steps:
            if self.skips:
                self._notices.long(self.step + 1, steps)
            return StepPlan(why=f"beyond the {steps} steps that were announced")
        plan = self.policy.plan(self._state, self.step, tuple(self.timesteps))
        return StepPlan(undecided=True) if plan is None else StepPlan(self._listed(plan))

    def _start(self, num_steps: int) -> None:
        """The policy for the number of steps, before its first step."""
        if self.prepare is not None:
            self.policy = self.prepare(num_steps)
        try:
            self._state = self.policy.start(num_steps, self._state)
        except ConfigError as error:
            if self.length.announced is not None:
                raise
            # The number was learnt in the middle of a run, where an error would lose what the user has.
            self._notices.not_followed(error)
            self.policy = Always()
            self._state = self.policy.start(num_steps)

    def _listed(self, plan: Plan) -> Plan:
        """A plan of the policy's, if it is one of those for which the graphs were prepared."""
        if not plan.reuse:
            return plan
        plans = self._plans_of_policy()
        if (found := plans.get(plan)) is None:
            self._notices.unlisted(plan, tuple(plans))
            return RECOMPUTE
        return found

    def _plans_of_policy(self) -> dict[Plan, Plan]:
        if self._plans is None:
            self._plans = {p: p for p in self.policy.plans()}
        return self._plans

    @property
    def to_come(self) -> tuple[Plan, ...]:
        """What the steps of this generation may reuse; empty while nobody knows how many there are, because then nothing is."""
        return tuple(p for p in self._plans_of_policy() if p) if (self.length.steps or 0) > 1 else ()

    def _ran(self) -> Plan:
        """The plan that the step before really followed: reuse only if some call reused."""
        return self.now.plan if any(r.reused for r in self._records) or not self._records else RECOMPUTE

    def ran(self, record: Record) -> None:
        """A call of this step."""
        self._records.append(record)
        self.reused = self.reused or bool(record.reused)

    def decide(self, graph: CompiledGraph, seen: ProbeResult, comparable: bool) -> None:
        """Choose the plan of the step by what was probed."""
        now, measures = self.now, self.metrics.of_probes(graph, seen, comparable)
        now.undecided = False
        now.probe = measures
        self._state, plan = self.policy.decide(self._state, self.step, measures)  # type: ignore[attr-defined]
        now.plan = self._listed(plan)
        if not now.plan and measures and not all(math.isfinite(m.change) for m in measures):
            now.why = "what was probed is not a number"
            self._notices.probe_is_no_number()
