"""The search for a schedule in pieces: a recorded generation is run again a few steps at a time, whenever its model runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from vdcache.calibration.choose import BUDGET, ScheduleScores, choose
from vdcache.calibration.schedule import Prediction, Schedule
from vdcache.calibration.tables import StepTable
from vdcache.calibration.trajectory_replay import Rerun, TrajectoryReplay
from vdcache.policies.base import Always, Policy
from vdcache.policies.goal import Goal
from vdcache.policies.weights import WeightRule

__all__ = ["PiecewiseSearch"]

PATIENCE = 2  # generations in which a weight is not there


class _Run(NamedTuple):
    """A generation with these steps computed and the others predicted so.

    Args:
        rule: None where every step is computed.
    """

    policy: Policy
    computed: Sequence[int]
    rule: WeightRule | None = None


class _Unknown(Exception):
    """`choose` asks how a run ends that has not been made."""

    def __init__(self, run: _Run) -> None:
        self.run = run


class _Seen:
    """One generation, as `choose` takes it: what has been run is known, and asking for anything else stops it."""

    prompts = 1

    def __init__(self, replay: TrajectoryReplay, times: tuple[float, ...]) -> None:
        self._replay, self._times = replay, times
        self.results: dict[_Run, Tensor] = {}

    def of(self, schedule: Schedule, prompt: int) -> Tensor:
        if not self._replay.knows_its_end:
            raise _Unknown(_Run(Always(), range(schedule.steps)))
        run = _Run(schedule.policy(self._times), schedule.computed, schedule.prediction.rule)
        if (found := self.results.pop(run, None)) is None:
            raise _Unknown(run)
        return found

    def wanted(self, prompt: int) -> Tensor:
        return self._replay.wanted()


@dataclass
class _Allowance:
    """How many computed steps may be run again.

    Args:
        left: within this generation.
        open: now.
    """

    left: float = 0.0
    open: float = 0.0

    def begin(self, most: float) -> None:
        """A generation begins; what is less than one step is saved up for one."""
        self.left = most if most >= 1 else min(1.0, self.left + most)
        self.open = min(1.0, self.left)

    def take(self, cost: float) -> None:
        self.left, self.open = self.left - cost, self.open - cost


@dataclass
class PiecewiseSearch:
    """What `choose` does, a few steps of a generation at a time.

    `choose` is asked again and again; it always asks for the same runs in the same order. Where it asks for one that has not been made, that
    one is made, a step at a time.

    Args:
        replay: the generation that the candidates are run on.
        table: of its steps.
        goal: what the schedule is for.
        reuse_cost: of a reused step, as a share of a computed one.
        predictions: of the predictors that are tried.
    """

    replay: TrajectoryReplay
    table: StepTable
    goal: Goal
    reuse_cost: float
    predictions: Sequence[Prediction]
    scored: ScheduleScores = field(default_factory=ScheduleScores)
    seconds: float = 0.0
    found: Schedule | None = None  # what was chosen, when the search is over
    _allowed: _Allowance = field(default_factory=_Allowance)
    _waits: bool = False  # for a weight
    _waited: int = 0  # generations that ended so
    _rerun: Rerun | None = None
    _run: _Run = field(default_factory=lambda: _Run(Always(), ()))  # that `_rerun` makes

    def __post_init__(self) -> None:
        self._seen = _Seen(self.replay, self.table.times)
        # Where the recording does not tell how the generation ends, that is one whole run. Of the runs for a quality none can be spared.
        spared = not self.replay.knows_its_end and self.goal.quality_db is None
        self._work = BUDGET - spared

    @property
    def steps_per_call(self) -> float:
        """Steps of a generation for each call of the model."""
        return len(self.replay.steps) / sum(map(len, self.replay.steps))

    def saw(self, program: Any, inputs: Sequence[Any]) -> None:
        """A graph of the model runs: its weights are here."""
        self.replay.programs.saw(program, inputs)

    @property
    def is_lost(self) -> bool:
        """Whether a graph of the generation is gone or has other weights now, so that it can never be run again."""
        return self._waited > PATIENCE or self.replay.programs.changed or not self.replay.programs.are_alive

    def begin(self, most: float) -> None:
        """A generation begins, in which as many computed steps may be run again."""
        self._waited += self._waits
        self._allowed.begin(most)

    def advance(self, share: float) -> bool:
        """Go on with as many computed steps of those that this generation has. Returns whether anything was run to its end.

        Raises:
            ConfigError: no schedule reaches the goal.
        """
        self._allowed.open += share
        began, ended = time.perf_counter(), False
        try:
            while self.found is None and self._step():
                ended = ended or self._rerun is None
            self._waits = False
        except ReferenceError:
            self._waits = True  # until the graph that has this weight has run again
        finally:
            if self._rerun is not None:
                self._rerun.rest()
            self.seconds += time.perf_counter() - began
        return ended

    def _step(self) -> bool:
        """Run one step, or begin the next run. Returns whether that was allowed."""
        if self._rerun is None:
            try:
                self.found = choose(
                    self.table,
                    self._seen,
                    self.goal,
                    scored=self.scored,
                    reuse_cost=self.reuse_cost,
                    work=self._work,
                    predictions=self.predictions,
                )
                return True
            except _Unknown as unknown:
                self._run = unknown.run
            self._rerun = Rerun(self.replay, self._run.policy, self._run.rule)
        rerun = self._rerun
        cost = 1.0 if rerun.at in self._run.computed else self.reuse_cost
        if min(self._allowed.left, self._allowed.open) < cost - 1e-9:
            return False
        try:
            rerun.step()
        except ReferenceError:
            raise
        except BaseException:  # it has stopped halfway through a step, and is begun again
            self._rerun = None
            raise
        self._allowed.take(cost)
        if rerun.is_over:
            self._rerun = None
            if isinstance(self._run.policy, Always):
                self.replay.ended(rerun.result)
            else:
                self._seen.results[self._run] = rerun.result
        return True

    def best_so_far(self, than: Schedule) -> Schedule | None:
        """The best of what was run, where it keeps what is asked with fewer computed steps than another schedule; else None."""
        least, steps = self.goal.quality_db or self.goal.floor_db, self.table.steps
        count = 1 if self.goal.quality_db else self.goal.count(steps, self.reuse_cost)
        good = [
            Schedule.of(steps, computed, prediction, psnr=psnr)
            for (computed, prediction, _), psnr in self.scored.known.items()
            if psnr >= least and count <= len(computed) < len(than.computed)
        ]
        return min(good, key=lambda s: (len(s.computed), -(s.psnr or 0)), default=None)
