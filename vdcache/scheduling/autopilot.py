"""Calibration in use: the first generation runs uncached and is recorded, the schedule is searched, and the next ones follow it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from vdcache.ir.errors import ConfigError
from vdcache.runtime.history import Record
from vdcache.runtime.plan import RECOMPUTE
from vdcache.runtime.policies import Always
from vdcache.runtime.read import read
from vdcache.runtime.schedules import same_times
from vdcache.runtime.session import Session
from vdcache.scheduling.calibration import Calibration, Key, find, keep, key_of, solver_of, versions
from vdcache.scheduling.choose import Goal, Scored, choose
from vdcache.scheduling.rerun import Recording, Rerun, Reruns
from vdcache.scheduling.schedule import Schedule
from vdcache.scheduling.table import Gathering, StepTable

__all__ = ["Autopilot", "cost_of_reuse", "tried"]

ORDER = 1  # of the recipe's predictor


@dataclass
class _Run:
    """One uncached generation as it goes."""

    key: Key
    recording: Recording
    gathering: Gathering
    times: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)  # of each step
    inputs: Sequence[Any] = ()
    programs: dict[Any, None] = field(default_factory=dict)  # the graphs that ran

    @property
    def whole(self) -> bool:
        """Whether the last step was called as often as the first."""
        return len(self.calls) > 0 and self.calls[-1] == self.calls[0]


class Autopilot:
    """A session's recorder that finds its schedule.

    Where a calibration is known for the model, number of steps, sizes and timesteps, it is followed. Else one generation runs
    uncached; when it ends, candidates are run on what was recorded (at most two generations' worth), the best is kept on disk
    and followed from the next generation on. Whatever goes wrong, the user's generation is computed in full.

    Args:
        session: whose policy it sets.
        goal: speed or quality.
        strict: what cannot be done is an error.
        say: told once, by a key.
    """

    def __init__(self, session: Session, goal: Goal, *, strict: bool, say: Callable[[str, str], None]) -> None:
        self._session, self._goal, self._strict, self._say = session, goal, strict, say
        self._generation: int | None = None
        self._now: _Run | None = None
        self._keys: dict[tuple[int, int], Key] = {}  # by graph and parameters: what does not change with the run
        self._misfits: set[Key] = set()  # calibrations whose timesteps turned out to be others
        self._hopeless: set[Key] = set()
        self._before: set[Any] = set()  # graphs of which nobody knows the step
        self.calibration: Calibration | None = None  # in force, or the last that was
        session.prepare = lambda steps: Always()

    def __call__(
        self, program: Any, inputs: Sequence[Any], results: Sequence[Any], kept: dict[str, Tensor], record: Record
    ) -> None:
        if not self._session.follows(program):  # it runs before the step is known, and is computed whatever the plan
            self._before.add(program)
            return
        if record.generation != self._generation:
            self._begin(program, inputs, record)
        run = self._now
        if run is None:
            self._check(program, inputs, record)
            return
        while len(run.calls) <= record.step:
            run.calls.append(0)
            run.times.append(self._time(program, inputs, record))
        run.gathering.add(record.lane, run.calls[record.step], {n: kept[n] for n in program.slots if n in kept})
        run.calls[record.step] += 1
        run.programs[program] = None
        if self._before:
            run.recording.unfit = "the model runs as several graphs"
        run.recording.add(program, inputs, results, record)
        run.inputs = inputs
        steps = self._session.num_steps
        if record.step == 0 and run.calls[0] == 1:
            size = (run.gathering.will_hold() + run.recording.bytes * (steps or 50)) / 2**20
            self._say(
                f"calibrating {run.key}",
                f"vdcache: no schedule is known for this model, number of steps and size: this generation is computed in full and keeps "
                f"{size:.0f} MiB beside. When it ends, schedules are tried on it, once, for about the time of two generations; from then on the best "
                f"is followed ({self._goal}).",
            )
        if steps is not None and record.step == steps - 1 and run.whole:
            self._finish()

    def _begin(self, program: Any, inputs: Sequence[Any], record: Record) -> None:
        """A generation starts: finish what the one before left, and follow what is known."""
        session = self._session
        if self._now is not None and session.num_steps == len(self._now.calls) and self._now.whole:
            self._finish()  # its length was not known before
        elif (run := self._now) is not None and len(run.calls) < (session.num_steps or 0):
            self._say(
                f"short {run.key}",
                f"vdcache: a generation that was to calibrate ended after {len(run.calls)} of {session.num_steps} steps, and taught nothing. "
                f"If this is its real number, pass num_steps={len(run.calls)}.",
            )
        self._now, self._generation = None, record.generation
        key = self._key(program, inputs, (self._time(program, inputs, record),))
        if replace(key, times=()) in self._hopeless:
            return
        if session.num_steps is not None and (found := find(key, self._goal, self._misfits)) is not None:
            self.calibration = found
            session.follow(found.schedule.policy(found.key.times))
            return
        self._now = _Run(key, Recording(program), Gathering(session.num_steps))

    def _check(self, program: Any, inputs: Sequence[Any], record: Record) -> None:
        """A calibration whose timesteps are not those of this generation is left."""
        followed = self.calibration
        explicit = record.timestep is None
        if followed is None or record.step >= len(followed.key.times) or (explicit and record.step > 1):
            return
        if not same_times(followed.key.times[record.step : record.step + 1], [self._time(program, inputs, record)]):
            self._misfits.add(followed.key)
            self._session.follow(Always())
            self._say(
                f"other timesteps {followed.key}",
                f"vdcache: the timesteps of this generation are not those of the calibration from step {record.step} on (another solver, "
                "or another shift): the rest is computed in full, and the next generation is calibrated.",
            )

    def _key(self, program: Any, inputs: Sequence[Any], times: tuple[float, ...]) -> Key:
        who = id(program), next((id(inputs[i]) for i in program.static), 0)
        steps = self._session.num_steps or 0
        if who not in self._keys:
            self._keys[who] = key_of(program, inputs, steps)
        return replace(self._keys[who], steps=steps, times=times, sizes=key_of(program, inputs, steps).sizes)

    @staticmethod
    def _time(program: Any, inputs: Sequence[Any], record: Record) -> float:
        """The timestep: of the clock, or read where the caller keeps the clock."""
        if record.timestep is not None:
            return record.timestep
        value = next((inputs[i] for i in program.clocks), 0.0)
        return max(read([value])[0][0]) if isinstance(value, Tensor) else float(value)

    def _finish(self) -> None:
        run, self._now = self._now, None
        assert run is not None
        key = replace(run.key, steps=len(run.calls), times=())
        try:
            self.calibration = self._calibrated(run)
        except Exception as error:  # noqa: BLE001: it is the user's generation, and it is done: nothing here may lose it
            if self._strict:
                raise
            self._hopeless.add(key)
            self._say(
                f"hopeless {key}",
                f"vdcache: no schedule was found, and every step is computed: {error or type(error).__name__}",
            )
            return
        where = keep(self.calibration)
        self._say(
            f"calibrated {key}", f"vdcache: calibrated in {self.calibration.seconds:.0f} s: {self.calibration}\nkept in {where}"
        )

    def _calibrated(self, run: _Run) -> Calibration:
        began = time.perf_counter()
        table = StepTable(np.stack([run.gathering.products()]), run.gathering.bytes)
        steps, cost = table.steps, cost_of_reuse([*run.programs, *self._before])
        rerun, note = None, ""
        try:
            rerun = Rerun(run.recording, run.inputs)
        except ConfigError as error:
            if self._goal.quality_db is not None:
                raise ConfigError(
                    f"which schedule keeps {self._goal.quality_db:g} dB cannot be tried, because {error}. "
                    "vdcache.calibrate(model, run, quality_db=…) tries it with your own loop"
                ) from error
            note = f"chosen by the table of steps alone, because {error}"
        scored = Scored()
        schedule = choose(table, Reruns([rerun]) if rerun else None, self._goal, orders=[ORDER], reuse_cost=cost, scored=scored)
        solver = solver_of(rerun.solver) if rerun else ""
        return Calibration(
            key=replace(run.key, steps=steps, times=tuple(run.times), solver=solver),
            goal=self._goal,
            schedule=schedule,
            products=tuple(tuple(map(tuple, g)) for g in table.products.tolist()),
            tried=tried(scored, steps),
            reuse_cost=cost,
            seconds=time.perf_counter() - began,
            note=note,
            versions=versions(),
        )


def cost_of_reuse(programs: Iterable[Any]) -> float:
    """What a step that reuses everything costs, as a share of a computed one, by FLOPs of all graphs of a model."""
    reused = computed = 0
    for program in programs:
        plan = next((p for p in program.plans if p), RECOMPUTE)
        reused, computed = reused + program.flops(plan), computed + program.flops(RECOMPUTE)
    return reused / max(1, computed)


def tried(scored: Scored, steps: int) -> tuple[Schedule, ...]:
    """Every schedule that was run, with its mean PSNR."""
    by: dict[tuple[tuple[int, ...], int], list[float]] = {}
    for (computed, order, _), psnr in scored.known.items():
        by.setdefault((computed, order), []).append(psnr)
    return tuple(
        Schedule(steps, computed, order, psnr=float(np.mean(v)) if np.isfinite(v).all() else None)
        for (computed, order), v in by.items()
    )
