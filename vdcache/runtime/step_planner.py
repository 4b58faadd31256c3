"""Which plan does every step follow? The policy, what it was told of the steps before, and how many steps a generation has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdcache.errors import ConfigError
from vdcache.policies.base import Always, Policy
from vdcache.policies.metrics import MetricSpec, MetricValue, count_of, measured
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.policies.weights import Position
from vdcache.runtime.agreement import SessionRanks
from vdcache.runtime.call import CompiledGraph, ProbeResult
from vdcache.runtime.history import Record
from vdcache.runtime.read import DeviceReads
from vdcache.runtime.session_warnings import SessionWarnings

__all__ = ["PendingSums", "StepPlan", "StepPlanner"]

MOST_LENGTHS = 64  # lengths of generations that are remembered


@dataclass
class PendingSums:
    """Sums of one call that the policy has not seen yet.

    Args:
        sums: float, on the device that computed them.
        layouts: what they are sums of, in order.
        elements: of each observed value.
        comparable: whether there was an earlier value to compare with.
    """

    sums: Tensor
    layouts: tuple[MetricSpec, ...]
    elements: tuple[int, ...]
    comparable: bool


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
        self._policy, self.prepare, self._ranks = policy, prepare, ranks
        self.turn = 0  # another number for every generation and every policy
        self.num_steps = self._given_steps = num_steps
        self._notices, self._reads = notices, reads
        self.generation = self.step = -1
        self.timestep: float | None = None
        self.timesteps: list[float] = []  # of this generation
        self.now = StepPlan()
        self._state: Any = None
        self._listed_by: Policy | None = None
        self._plans: dict[Plan, Plan] = {}  # of that policy
        self._lengths: dict[tuple[float, ...], int] = {}  # first two timesteps -> steps of the generation that began so
        self._pending: list[PendingSums] = []
        self._records: list[Record] = []  # of this step
        self.reused = False  # something was, in this generation

    @property
    def policy(self) -> Policy:
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = policy
        self.turn += 1

    def announce(self, num_steps: int | None) -> None:
        """How many steps every generation has from the next one on; None to learn it."""
        self.num_steps = self._given_steps = num_steps
        self.turn += 1

    def forget(self) -> None:
        """What ran so far teaches nothing."""
        self.step, self._state = -1, None
        self.num_steps = self._given_steps

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
        self._state = policy.start(self.num_steps, None) if self.num_steps is not None else None
        self.policy = policy

    @property
    def skips(self) -> bool:
        """Whether the policy ever reuses anything; if not, nothing depends on the number of steps."""
        return len(self.policy.plans()) > 1

    @property
    def is_last(self) -> bool:
        return self.num_steps is not None and self.step >= self.num_steps - 1

    # ---- generations and steps ---------------------------------------------------------------------------------------

    def begin_generation(self, *, said_by_caller: bool = False, mixed: bool = False) -> None:
        """Args: `mixed` where parts of a batch go on, so that nobody knows how long a generation is."""
        ran = self.step + 1
        if mixed:
            pass
        elif ran and self._given_steps is None:
            if self.num_steps is None and self.skips:
                self._notices.learnt(ran)
            elif ran != self.num_steps and self.skips:
                self._notices.other_length(ran, self.num_steps)
            self.num_steps = ran
            self._lengths[tuple(self.timesteps[:2])] = ran
            if len(self._lengths) > MOST_LENGTHS:
                del self._lengths[next(iter(self._lengths))]
        elif ran and ran < (self._given_steps or 0) and not said_by_caller and self.skips:
            self._notices.short(ran, self._given_steps)
        self._pending.clear()
        self._records, self.timesteps = [], []
        self.step, self.generation, self.now, self.reused = -1, self.generation + 1, StepPlan(), False
        self.turn += 1
        if self.num_steps is not None:
            self._start()

    def begin_step(self) -> bool:
        """Close the step before, and choose the plan of this one. Whether the step before was computed in full."""
        measures = self._measures()
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
        self._ranks.place = self.generation, self.step
        if self.step == 1 and self._given_steps is None:
            self._recall_length(measures)
        self.now = self._plan()
        return computed

    def _plan(self) -> StepPlan:
        if self.num_steps is None:
            return StepPlan(why="learning the number of steps")
        if self.step >= self.num_steps:
            if self.skips:
                self._notices.long(self.step + 1, self.num_steps)
            return StepPlan(why=f"beyond the {self.num_steps} steps that were announced")
        plan = self.policy.plan(self._state, self.step, tuple(self.timesteps))
        return StepPlan(undecided=True) if plan is None else StepPlan(self._listed(plan))

    def _recall_length(self, measures: tuple[MetricValue, ...] | None) -> None:
        """Runs of several lengths in turn: where an earlier one began with the same two timesteps, this one is as long."""
        steps = self._lengths.get(tuple(self.timesteps[:2]))
        if steps is None or steps == self.num_steps:
            return
        self.num_steps = steps
        self.turn += 1
        self._start()
        if self._state is not None:
            self._state = self.policy.observe(self._state, 0, RECOMPUTE, measures)

    def _start(self) -> None:
        """The policy for the number of steps, before its first step."""
        assert self.num_steps is not None
        if self.prepare is not None:
            self.policy = self.prepare(self.num_steps)
        try:
            self._state = self.policy.start(self.num_steps, self._state)
        except ConfigError as error:
            if self._given_steps is not None:
                raise
            # The number was learnt in the middle of a run, where an error would lose what the user has.
            self._notices.not_followed(error)
            self.policy = Always()
            self._state = self.policy.start(self.num_steps)

    def _listed(self, plan: Plan) -> Plan:
        """A plan of the policy's, if it is one of those for which the graphs were prepared."""
        if not plan.reuse:
            return plan
        if (found := self._plans_of_policy().get(plan)) is None:
            self._notices.unlisted(plan, tuple(self._plans))
            return RECOMPUTE
        return found

    def _plans_of_policy(self) -> dict[Plan, Plan]:
        if self._listed_by is not self.policy:
            self._listed_by, self._plans = self.policy, {p: p for p in self.policy.plans()}
        return self._plans

    @property
    def to_come(self) -> tuple[Plan, ...]:
        """What the steps of this generation may reuse; empty while nobody knows how many there are, because then nothing is."""
        return tuple(p for p in self._plans_of_policy() if p) if (self.num_steps or 0) > 1 else ()

    def _ran(self) -> Plan:
        """The plan that the step before really followed: reuse only if some call reused."""
        return self.now.plan if any(r.reused for r in self._records) or not self._records else RECOMPUTE

    # ---- what was measured -------------------------------------------------------------------------------------------

    def observe(self, pending: PendingSums) -> None:
        """Sums of a call of this step, which are read when the next one is planned."""
        self._pending.append(pending)

    def ran(self, record: Record) -> None:
        """A call of this step."""
        self._records.append(record)
        self.reused = self.reused or bool(record.reused)

    def unread(self) -> list[Tensor]:
        """The sums of this step, for who reads something else of the device anyway."""
        return [p.sums for p in self._pending]

    def told(self, numbers: Sequence[Sequence[float]]) -> None:
        """What was read, in the order of `unread`: these sums wait for no device any more."""
        for p, values in zip(self._pending, numbers, strict=True):
            p.sums = torch.tensor(values, dtype=torch.float64)

    def decide(self, graph: CompiledGraph, seen: ProbeResult, comparable: bool) -> None:
        """Choose the plan of the step by what was probed."""
        now, measures = self.now, None
        now.undecided = False
        if comparable and seen.sums is not None:
            layouts, elements = [p.layout for p in graph.probes], [v.numel() for v in seen.values]
            measures = self._of_all_ranks("probes", layouts, self._reads.read([seen.sums])[0], elements)
        elif self._ranks:
            self._ranks.total("probes", ())  # another rank may have something to compare with
        now.probe = measures
        self._state, plan = self.policy.decide(self._state, self.step, measures)  # type: ignore[attr-defined]
        now.plan = self._listed(plan)
        if not now.plan and measures and not all(math.isfinite(m.change) for m in measures):
            now.why = "what was probed is not a number"
            self._notices.probe_is_no_number()

    def _measures(self) -> tuple[MetricValue, ...] | None:
        """What the step before measured, lanes added up; None where a lane had nothing to compare with."""
        pending, self._pending = self._pending, []
        if not pending:
            return None
        numbers = self._reads.read([p.sums for p in pending])
        if not all(p.comparable for p in pending):
            if self._ranks:
                self._ranks.total("metrics", ())  # another rank may have something to compare with
            return None
        totals: dict[MetricSpec, list[float]] = {}
        elements: dict[MetricSpec, int] = {}
        for p, sums in zip(pending, numbers, strict=True):
            for layout, own, n in zip(p.layouts, _parts(p.layouts, sums), p.elements, strict=True):
                totals[layout] = [a + b for a, b in zip(totals.get(layout, [0.0] * len(own)), own, strict=True)]
                elements[layout] = elements.get(layout, 0) + n
        flat = [number for own in totals.values() for number in own]
        result = self._of_all_ranks("metrics", list(totals), flat, list(elements.values()))
        if result is None:
            return None
        if not all(math.isfinite(m.change) for m in result):
            self._notices.observed_is_no_number()
        return result

    def _of_all_ranks(
        self, topic: str, layouts: Sequence[MetricSpec], sums: Sequence[float], elements: Sequence[int]
    ) -> tuple[MetricValue, ...] | None:
        """The metrics of values that lie in parts on several ranks: sums are added up before anything is divided, so they are those of the
        whole, however unequal the parts. None where a rank has nothing to compare with."""
        if self._ranks:
            found = self._ranks.total(topic, [*sums, *elements])
            if found is None:
                return None
            sums, elements = found[: len(sums)], [round(n) for n in found[len(sums) :]]
        return tuple(measured(*each) for each in zip(layouts, _parts(layouts, sums), elements, strict=True))


def _parts(layouts: Sequence[MetricSpec], sums: Sequence[float]) -> Iterator[Sequence[float]]:
    """The sums of each metric, of all of them in a row."""
    at = 0
    for layout in layouts:
        yield sums[at : at + (count := count_of(layout))]
        at += count
