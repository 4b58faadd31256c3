"""Calibration in use: the first generation runs uncached and is recorded, the schedule is searched, and the next ones follow it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vdcache.calibration.calibration import Calibration, CalibrationKey, find, keep, key_of, time_of
from vdcache.calibration.choose import ScheduleScores, choose
from vdcache.calibration.tables import StepTable, StepTableBuilder
from vdcache.calibration.trajectory_replay import RecordedRun, TrajectoryReplay, TrajectoryReplays
from vdcache.errors import ConfigError, VdcacheError
from vdcache.policies.base import Always
from vdcache.policies.goal import Goal
from vdcache.policies.plan import RECOMPUTE
from vdcache.policies.scheduled import same_times
from vdcache.runtime.history import Record
from vdcache.runtime.session import Session

__all__ = ["AutoCalibrator", "cost_of_reuse"]

ORDER = 1  # of the recipe's predictor
FEW_STEPS = 4  # leave nothing to skip
TRIES = 3  # generations that cannot be run again for reasons that may pass, before the table decides alone


class _Passing(ConfigError):
    """What is wrong with one generation alone: another one may be calibrated."""


@dataclass
class _Run:
    """One uncached generation as it goes."""

    recording: RecordedRun
    gathering: StepTableBuilder
    calls: list[int] = field(default_factory=list)  # of each step
    programs: dict[Any, None] = field(default_factory=dict)  # the graphs that ran


class AutoCalibrator:
    """A session's recorder that finds its schedule.

    Where a calibration is known for the model, number of steps, sizes and timesteps, it is followed. Else one generation runs
    uncached; when it ends, candidates are run on what was recorded (at most two generations' worth), the best is kept on disk
    and followed from the next generation on. Whatever goes wrong, the user's generation is computed in full. What cannot be run again
    gets the table's best. After trouble that may pass (NaN, memory) the next generation is tried, then ever rarer ones; only a goal that the model
    cannot reach is given up.

    Args:
        session: whose policy it sets.
        goal: speed or quality.
        strict: what cannot be done is an error.
        say: is given what went wrong, once by a key.
        tell: is given what is done, once by a key.
    """

    def __init__(
        self, session: Session, goal: Goal, *, strict: bool, warn: Callable[[str, str], None], log: Callable[[str, str], None]
    ) -> None:
        self._session, self._goal, self._strict, self._warn, self._log = session, goal, strict, warn, log
        self._generation: int | None = None
        self._now: _Run | None = None  # the generation that is recorded
        self._following: Calibration | None = None  # in this generation
        self._key = CalibrationKey("", 0, "")  # of this generation, without timesteps
        self._times: list[float] = []  # of this generation's steps, as far as they are known
        self._seen: dict[CalibrationKey, tuple[float, ...]] = {}  # timesteps of the last generation of each key
        self._found: list[Calibration] = []  # by this session, should the disk take none
        self._hopeless: set[CalibrationKey] = set()
        self._tries: dict[CalibrationKey, tuple[int, int]] = {}  # generations that failed, and the one that is tried next
        self._cut: set[CalibrationKey] = set()  # of which a generation ended with fewer calls than a step has
        self._before: set[Any] = set()  # graphs of which nobody knows the step
        self.calibration: Calibration | None = None  # the last that was found
        session.prepare = lambda steps: Always()

    def __call__(
        self, program: Any, inputs: Sequence[Any], results: Sequence[Any], kept: dict[str, Tensor], record: Record
    ) -> None:
        if not self._session.follows(program):  # it runs before the step is known, and is computed whatever the plan
            self._before.add(program)
            return
        new = record.generation != self._generation
        if new:
            self._end()
        if record.step == len(self._times) and (self._now or new or record.timestep is not None or record.step < 2):
            self._times.append(time_of(program, inputs, record.timestep))  # else it would wait for the device
        if new:
            self._begin(program, inputs, record)
        if self._now is None:
            self._check(record.step)
        else:
            self._record(self._now, program, inputs, results, kept, record)

    def _record(
        self, run: _Run, program: Any, inputs: Sequence[Any], results: Sequence[Any], kept: dict[str, Tensor], record: Record
    ) -> None:
        """Take one call of the generation that is recorded; the last one finds the schedule."""
        while len(run.calls) <= record.step:
            run.calls.append(0)
        if record.step == 1 and not run.calls[1] and not self._reachable(run):
            return
        run.gathering.add(record.step, record.lane, {n: kept[n] for n in program.slots if n in kept})
        run.calls[record.step] += 1
        run.programs[program] = None
        if self._before:
            run.recording.unfit = "the model runs as several graphs"
        run.recording.add(program, inputs, results, record)
        steps = self._session.num_steps
        if record.step == 0 and run.calls[0] == 1:
            unknown = "no schedule is known for this model, number of steps and size"
            if steps is None:
                unknown = "no schedule is known for this model while nobody says how many steps there will be (num_steps)"
            size = (run.gathering.will_hold() + run.recording.bytes * (steps or 50)) / 2**20
            self._log(
                f"calibrating {self._key}",
                f"vdcache: {unknown}: this generation is computed in full and keeps "
                f"{size:.0f} MiB beside. When it ends, schedules are tried on it, once, for about the time of two generations; from then on the best "
                f"is followed ({self._goal}).",
            )
        if steps is not None and record.step == steps - 1 and run.calls[-1] == run.calls[max(0, steps - 2)]:
            self._finish()

    def _end(self) -> None:
        """A generation has ended, or was given up."""
        run, steps = self._now, self._session.num_steps
        if self._times:
            self._seen[self._key] = tuple(self._times)
        if run is not None and steps == len(run.calls):
            # Its length was not known before, or its last step was called less often than the one before it: cut short, unless it comes again.
            if run.calls[-1] >= run.calls[max(0, steps - 2)] or self._key in self._cut:
                self._finish()
            else:
                self._cut.add(self._key)
        elif run is not None and len(run.calls) < (steps or 0):
            self._warn(
                f"short {self._key}",
                f"vdcache: a generation that was to calibrate ended after {len(run.calls)} of {steps} steps, and taught nothing; the next "
                f"one is tried. If this is its real number, pass num_steps={len(run.calls)}.",
            )
        self._now, self._following, self._times = None, None, []

    def _begin(self, program: Any, inputs: Sequence[Any], record: Record) -> None:
        """Follow what is known, or record."""
        self._generation = record.generation
        steps = self._session.num_steps
        self._key = key_of(program, inputs, steps or 0)
        if self._key in self._hopeless or record.generation < self._tries.get(self._key, (0, 0))[1]:
            return
        expected = self._seen.get(self._key, ())
        if not same_times(expected, self._times):
            expected = tuple(self._times)
        self._following = self._known(expected or tuple(self._times)) if steps is not None else None
        if self._following is not None:
            self._take(self._following)
            schedule = self._following.schedule
            if (
                record.timestep is None and schedule.steps > 1
            ):  # what this generation's second timestep is, its second step tells
                schedule = replace(schedule, computed=tuple(sorted({1, *schedule.computed})))
            self._session.follow(schedule.policy(self._following.key.times))
        else:
            self._now = _Run(RecordedRun(), StepTableBuilder(steps))

    def _known(self, times: Sequence[float]) -> Calibration | None:
        """What was found before for this generation's key, by this session or any other, if its timesteps begin so."""
        wanted = replace(self._key, times=tuple(times))
        own = (c for c in reversed(self._found) if replace(c.key, times=()) == self._key and same_times(c.key.times, times))
        return next(own, None) or find(wanted, self._goal)

    def _take(self, known: Calibration) -> None:
        """From now on this one is followed; one that is not of this session's own is announced."""
        self.calibration = known
        if any(known is own for own in self._found):
            return
        self._found.append(known)
        self._log(
            f"taken {known.key}",
            f"vdcache: taking the schedule that was found {_when(known.path)}for {known.goal}, which was kept for this model, number of steps, "
            f"size and timesteps:\n{known.schedule}\nSolvers that ask at the same timesteps share it. To calibrate anew, as for another solver, "
            f"delete {known.path}",
        )
        self._say_if_nothing_is_reused(known)

    def _check(self, step: int) -> None:
        """A calibration whose timesteps are not those of this generation is left."""
        left = self._following
        if left is None or step >= len(self._times) or same_times(left.key.times, self._times):
            return
        self._following = None
        self._session.follow(Always())
        self._warn(
            f"other timesteps {left.key}",
            f"vdcache: the timesteps of this generation are not those of the calibration from step {step} on (another solver, "
            "or another shift): the rest is computed in full, and the next generation is calibrated where nothing fits it.",
        )

    def _finish(self) -> None:
        run, self._now = self._now, None
        assert run is not None
        self._key = key = replace(self._key, steps=len(run.calls))  # which was not known before
        self._seen[key] = tuple(self._times)
        try:
            if (known := self._known(self._times)) is not None:
                self._take(known)
                return
            self.calibration = self._calibrated(run)
        except Exception as error:  # it is the user's generation, and it is done: nothing here may lose it
            if self._strict:
                raise
            self._give_up(error)
            return
        try:
            self.calibration = replace(self.calibration, path=keep(self.calibration))
            where = f"kept in {self.calibration.path}"
        except OSError as error:
            where = f"not kept for other processes: {error}"
        self._found.append(self.calibration)
        self._log(f"calibrated {key}", f"vdcache: calibrated in {self.calibration.seconds:.1f} s: {self.calibration}\n{where}")
        self._say_if_nothing_is_reused(self.calibration)

    def _say_if_nothing_is_reused(self, found: Calibration) -> None:
        """A floor that no list of steps is known to keep; few steps leave nothing to skip, and that is no trouble."""
        steps, floor = found.key.steps, found.goal.floor_db
        if floor and steps > FEW_STEPS and len(found.schedule.computed) == steps:
            best = max((t.psnr for t in found.tried if t.psnr is not None), default=None)
            why = found.note or ("nothing was tried" if best is None else f"the best that was tried gives {best:.1f} dB")
            self._warn(
                f"full {found.key}",
                f"vdcache: no schedule of {steps} steps is known to keep {floor:g} dB, and every step is computed: {why}. With "
                "speedup=… there is no such floor, and the best that is known is followed.",
            )

    def _reachable(self, run: _Run) -> bool:
        """Whether any schedule can be as fast as is asked: the first step has shown what reuse costs."""
        steps = self._session.num_steps
        if steps is None or self._goal.speedup is None:
            return True
        try:
            self._goal.count(steps, cost_of_reuse([*run.programs, *self._before]))
        except ConfigError as error:
            self._now = None
            if self._strict:
                raise
            self._give_up(error)
            return False
        return True

    def _give_up(self, error: Exception) -> None:
        """No schedule was found for what has this key; after trouble that may pass another generation is tried."""
        if isinstance(error, VdcacheError) and not isinstance(error, _Passing):
            self._hopeless.add(self._key)
            self._warn(f"hopeless {self._key}", f"vdcache: no schedule was found, and every step is computed: {_words(error)}")
            return
        failed = self._tries.get(self._key, (0, 0))[0] + 1
        self._tries[self._key] = failed, (self._generation or 0) + 2 ** (failed - 1)
        self._warn(
            f"passing {self._key}",
            f"vdcache: a generation that was to calibrate taught nothing, because {_words(error)}. Until one does, every step is computed: the "
            "next one is tried, and after further trouble ever rarer ones.",
        )

    def _calibrated(self, run: _Run) -> Calibration:
        began = time.perf_counter()
        table = StepTable(np.stack([run.gathering.products()]), run.gathering.bytes)
        wrong = [step for step, own in enumerate(table.products[0].diagonal()) if not np.isfinite(own)]
        if (step := run.recording.not_finite()) is not None or wrong:
            raise _Passing(
                f"the model was given or gave NaN or infinity in step {min([*wrong[:1], *([] if step is None else [step])])}"
            )
        cost = cost_of_reuse([*run.programs, *self._before])
        scored, tried, note = ScheduleScores(), False, ""
        options: dict[str, Any] = {"orders": [ORDER], "reuse_cost": cost, "scored": scored}
        try:
            rerun = TrajectoryReplay(run.recording)
            tried = True
            schedule = choose(table, TrajectoryReplays([rerun]), self._goal, **options)
        except Exception as error:
            may_pass = not isinstance(error, VdcacheError)  # no memory, for one
            if tried and not may_pass:
                raise  # what was run says that the goal is out of reach
            if may_pass and self._tries.get(self._key, (0, 0))[0] < TRIES - 1:
                raise _Passing(f"it cannot be run again: {_words(error)}") from error
            if self._goal.quality_db is not None:
                raise (_Passing if may_pass else ConfigError)(
                    f"which schedule keeps {self._goal.quality_db:g} dB cannot be tried, because {_words(error)}. "
                    "vdcache.calibrate(model, run, quality_db=…) tries it with your own loop"
                ) from error
            note = f"chosen by the table of steps alone, because {_words(error)}"
            schedule = choose(table, None, self._goal, **options)
        key = replace(self._key, times=tuple(self._times))
        return Calibration.of(key, self._goal, schedule, table, scored, reuse_cost=cost, began=began, note=note)


def _words(error: Exception) -> str:
    """Why, in a line. Errors of others are named by their kind: their text alone often says nothing."""
    first = str(error).strip().partition("\n")[0]
    return first if first and isinstance(error, VdcacheError) else f"{type(error).__name__}: {first}".rstrip(": ")


def _when(path: Path | None) -> str:
    """When a file was written; "" where it is gone."""
    try:
        return f"on {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M} " if path is not None else ""
    except OSError:
        return ""


def cost_of_reuse(programs: Iterable[Any]) -> float:
    """What a step that reuses everything costs, as a share of a computed one, by FLOPs of all graphs of a model."""
    reused = computed = 0
    for program in programs:
        plan = next((p for p in program.variants.plans if p), RECOMPUTE)
        reused, computed = reused + program.variants.flops(plan), computed + program.variants.flops(RECOMPUTE)
    return reused / max(1, computed)
