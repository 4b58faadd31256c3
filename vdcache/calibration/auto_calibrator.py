"""Calibration in use: the first generation runs uncached and is recorded; the next ones follow a schedule while a better one is searched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vdcache.calibration.calibration import Calibration, CalibrationKey, key_of, time_of
from vdcache.calibration.choose import ScheduleScores, choose
from vdcache.calibration.known import KnownCalibrations
from vdcache.calibration.piecewise_search import PiecewiseSearch
from vdcache.calibration.schedule import PREDICTIONS, Schedule
from vdcache.calibration.tables import StepTable, StepTableBuilder
from vdcache.calibration.trajectory_replay import RecordedRun, TrajectoryReplay
from vdcache.errors import ConfigError, VdcacheError
from vdcache.policies.base import Always
from vdcache.policies.goal import Goal
from vdcache.policies.plan import RECOMPUTE
from vdcache.policies.scheduled import same_times
from vdcache.runtime.history import Record
from vdcache.runtime.session import Session

__all__ = ["AutoCalibrator", "cost_of_reuse"]

CACHED = PREDICTIONS[1:]  # those that the recipe's graphs keep the values for
FEW_STEPS = 4  # leave nothing to skip
SEARCHES = 4  # that go on at one time
SESSIONS = 3  # that begin a search which none of them ends
TRIES = 3  # generations that cannot be run again for reasons that may pass, before the table decides alone


class _Passing(ConfigError):
    """What is wrong with one generation alone: another one may be calibrated."""


@dataclass
class _Run:
    """A generation that is recorded, as it goes.

    Args:
        table: of its steps, where it follows a schedule; else it is gathered.
    """

    recording: RecordedRun
    gathering: StepTableBuilder
    table: StepTable | None = None
    reused: bool = False  # something of it was
    at_once: bool = False  # the whole search runs when it ends
    calls: list[int] = field(default_factory=list)  # of each step
    programs: dict[Any, None] = field(default_factory=dict)  # the graphs that ran


@dataclass
class _Generation:
    """The generation that runs now.

    Args:
        key: without timesteps.
        times: of its steps, as far as they are known.
        run: where it is recorded.
        following: whose schedule it follows.
    """

    number: int | None = None
    key: CalibrationKey = field(default_factory=lambda: CalibrationKey("", 0, ""))
    times: list[float] = field(default_factory=list)
    run: _Run | None = None
    following: Calibration | None = None


class AutoCalibrator:
    """A session's recorder that finds its schedule.

    Where a calibration is known for the model, number of steps, sizes and timesteps, it is followed. Else one generation runs
    uncached; when it ends, the table of its steps names a first schedule, and candidates are run on what was recorded, a few steps of them
    within each later generation. What is found is kept on disk, and followed from the next generation on. Whatever goes wrong, the user's
    generation is computed in full. What cannot be run again gets the table's best. After trouble that may pass (NaN, memory) a later
    generation is tried, ever more rarely; only a goal that the model cannot reach is given up.

    Args:
        session: whose policy it sets.
        goal: speed or quality.
        share: how much the search may add to one generation, as a share of an uncached one (at least one step); `math.inf`
            searches all at once, when the first generation ends.
        strict: what cannot be done is an error.
        warn: is given what went wrong, once by a key.
        log: is given what is done, once by a key.
    """

    def __init__(
        self,
        session: Session,
        goal: Goal,
        *,
        share: float,
        strict: bool,
        warn: Callable[[str, str], None],
        log: Callable[[str, str], None],
    ) -> None:
        self._session, self._goal, self._share, self._strict, self._warn = session, goal, share, strict, warn
        self._ranks = session.ranks
        self._log = lambda key, message: log(key, message) if self._ranks.is_first else None  # one rank speaks for all
        self._now = _Generation()
        self._seen: dict[CalibrationKey, tuple[float, ...]] = {}  # timesteps of the last generation of each key
        self._known = KnownCalibrations(goal, session.ranks)
        self._searches: dict[CalibrationKey, PiecewiseSearch] = {}  # that go on, by the key of what is followed meanwhile
        self._closed: set[CalibrationKey] = set()  # for which no schedule is searched any more
        self._tries: dict[CalibrationKey, tuple[int, int]] = {}  # generations that failed, and the one that is tried next
        self._cut: set[CalibrationKey] = set()  # of which a generation ended with fewer calls than a step has
        self._before: set[Any] = set()  # graphs of which nobody knows the step
        session.prepare = lambda steps: Always()

    def freeze(self, like: AutoCalibrator | None = None) -> None:
        """From now on every generation follows what is known now, to this one or to another; what nothing is known for is computed in full."""
        self._known.freeze(like._known if like is not None else None)
        self._searches.clear()
        self._now.run = None

    @property
    def frozen(self) -> bool:
        """Whether nothing is searched any more, and what is known is followed."""
        return self._known.frozen

    @property
    def calibration(self) -> Calibration | None:
        """The last that was found."""
        return self._known.last

    def __call__(
        self, program: Any, inputs: Sequence[Any], results: Sequence[Any], kept: dict[str, Tensor], record: Record
    ) -> None:
        if self._ranks.apart:  # every step is computed
            self._searches.clear()
            self._now.run = None
            return
        if not self._session.follows(program):  # it runs before the step is known, and is computed whatever the plan
            self._before.add(program)
            return
        new = record.generation != self._now.number
        if new:
            self._end()
        now = self._now
        if record.step == len(now.times) and (now.run or new or record.timestep is not None or record.step < 2):
            now.times.append(time_of(program, inputs, record.timestep))  # else it would wait for the device
        if new:
            self._begin(program, inputs, record)
        if now.following is not None:
            self._check(record.step)
            self._go_on(program, inputs)
        if now.run is not None:
            self._record(now.run, program, inputs, results, kept, record)

    # ---- one generation ------------------------------------------------------------------------------------------

    def _begin(self, program: Any, inputs: Sequence[Any], record: Record) -> None:
        """Follow what is known, or record."""
        now, steps = self._now, self._session.num_steps
        now.number, now.key = record.generation, self._key(key_of(program, inputs, steps or 0))
        if now.key in self._closed:
            return
        expected = self._seen.get(now.key, ())
        if not expected or not same_times(expected, now.times):
            expected = tuple(now.times)
        now.following = None if steps is None else self._known_for(expected) or self._of_a_near_size(expected)
        if (found := now.following) is not None:
            self._take(found)
            schedule = found.schedule
            if record.timestep is None and schedule.steps > 1:
                # What this generation's second timestep is, its second step tells.
                schedule = replace(schedule, computed=tuple(sorted({1, *schedule.computed})))
            self._session.follow(schedule.policy(found.key.times), schedule.prediction.rule)
            if not found.tentative:
                self._searches.pop(found.key, None)  # another session was faster
            elif (search := self._searches.get(found.key)) is not None:
                search.begin(self._share * found.key.steps)
        if self.frozen or record.generation < self._tries.get(now.key, (0, 0))[1]:
            return
        if found is None:
            now.run = _Run(RecordedRun(), StepTableBuilder(steps))
        elif found.tentative and found.key not in self._searches:
            # It was taken from the disk, or its search had trouble: it goes on from a generation that follows it.
            too_short = found.searches >= SESSIONS
            if too_short and len(found.schedule.computed) < found.key.steps:
                note = f"{SESSIONS} sessions have begun to search for a better one, and none was long enough: vdcache.calibrate does it at once"
                self._keep(replace(found, tentative=False, note=note))
                return
            now.run = _Run(RecordedRun(uncached=False), StepTableBuilder(steps), found.table, at_once=too_short)
            if too_short:  # else these would compute every step for ever
                self._log(
                    f"at once {found.key}",
                    f"vdcache: {SESSIONS} sessions have begun to search for a schedule, and none was long enough. It is done at once when this "
                    "generation ends, for about the time of three.",
                )

    def _record(
        self, run: _Run, program: Any, inputs: Sequence[Any], results: Sequence[Any], kept: dict[str, Tensor], record: Record
    ) -> None:
        """Take one call of the generation that is recorded; the last one begins the search."""
        while len(run.calls) <= record.step:
            run.calls.append(0)
        if record.step == 1 and not run.calls[1] and not self._reachable(run):
            return
        run.reused = run.reused or bool(record.reused)
        if not run.reused:
            run.gathering.add(record.step, record.lane, {n: kept[n] for n in program.slots if n in kept})
        run.calls[record.step] += 1
        run.programs[program] = None
        if self._before:
            run.recording.unfit = "the model runs as several graphs"
        run.recording.add(program, inputs, results, record)
        steps = self._session.num_steps
        if record.step == 0 and run.calls[0] == 1 and run.table is None:
            self._say_that_it_calibrates(run)
        if steps is not None and record.step == steps - 1 and run.calls[-1] == run.calls[max(0, steps - 2)]:
            self._finish()

    def _end(self) -> None:
        """A generation has ended, or was given up."""
        now, steps = self._now, self._session.num_steps
        if now.times:
            self._seen[now.key] = tuple(now.times)
        if (run := now.run) is not None and steps == len(run.calls):
            # Its length was not known before, or its last step was called less often than the one before it: cut short, unless it comes again.
            if run.calls[-1] >= run.calls[max(0, steps - 2)] or now.key in self._cut:
                self._finish()
            else:
                self._cut.add(now.key)
        elif run is not None and len(run.calls) < (steps or 0):
            self._warn(
                f"short {now.key}",
                f"vdcache: a generation that was to calibrate ended after {len(run.calls)} of {steps} steps, and taught nothing; the next "
                f"one is tried. If this is its real number, pass num_steps={len(run.calls)}.",
            )
        self._now = _Generation()

    def _finish(self) -> None:
        """A whole generation was recorded."""
        now = self._now
        run, now.run = now.run, None
        assert run is not None
        now.key = replace(now.key, steps=len(run.calls))  # which was not known before
        self._seen[now.key] = tuple(now.times)
        if run.table is None and (known := self._known_for(now.times)) is not None:
            self._take(known)
            return
        try:
            self._start_search(run)
        except Exception as error:  # it is the user's generation, and it is done: nothing here may lose it
            if self._strict:
                raise
            self._give_up(error, now.key)

    def _known_for(self, times: Sequence[float]) -> Calibration | None:
        """What is known for this generation, if its timesteps begin so."""
        return self._known.of(replace(self._now.key, times=tuple(times)))

    # ---- what ranks that run the model together have in common -----------------------------------------------------

    def _key(self, own: CalibrationKey) -> CalibrationKey:
        """The key of the first rank: a part of the weights or of the latent looks otherwise on each."""
        model, steps, sizes, latent = self._ranks.first("key", [own.model, own.steps, own.sizes, own.latent])
        return CalibrationKey(model, steps, sizes, latent=latent)

    def _table(self, gathering: StepTableBuilder) -> StepTable:
        """Of the whole values, of which each rank has seen a part."""
        products = self._ranks.together("table", gathering.products)
        flat = self._ranks.total("products", products.flatten().tolist())
        if flat is None:
            raise _Passing("the ranks have seen unequal parts of it")
        return StepTable(np.array(flat).reshape(1, *products.shape), gathering.bytes)

    def _of_a_near_size(self, times: Sequence[float]) -> Calibration | None:
        """What is followed until the search for this size has found its own, if anything is."""
        begun = self._known.begun_for(replace(self._now.key, times=tuple(times)))
        if begun is not None:
            self._known.follow(begun)
            self._log(
                f"near {begun.key}", f"vdcache: no schedule is known for {begun.key.sizes}: {begun.note}\n{begun.schedule}"
            )
        return begun

    def _take(self, known: Calibration) -> None:
        """From now on this one is followed; one that is not of this session's own is announced."""
        self._known.last = known
        if self._known.own(known.key) is known:
            return
        self._known.follow(known)
        self._log(
            f"taken {known.key}",
            f"vdcache: taking the schedule that was found {_when(known.path)}for {known.goal}, which was kept for this model, number of steps, "
            f"size and timesteps:\n{known.schedule}\nSolvers that ask at the same timesteps share it. To calibrate anew, as for another solver, "
            f"delete {known.path}",
        )
        if not known.tentative:
            self._say_if_nothing_is_reused(known)

    def _check(self, step: int) -> None:
        """A calibration whose timesteps are not those of this generation is left."""
        now = self._now
        left = now.following
        if left is None or step >= len(now.times) or same_times(left.key.times, now.times):
            return
        if (other := self._known_for(now.times)) is not None and other is not left:
            now.following, now.run = other, None
            self._take(other)
            self._session.follow(other.schedule.policy(other.key.times), other.schedule.prediction.rule)
            return
        now.following = None
        self._session.follow(Always())
        if now.run is not None and not left.searches and not now.run.reused:  # another size may have other timesteps
            self._known.forget(left)
            now.run.table, now.run.recording.uncached = None, True
            return
        now.run = None
        self._warn(
            f"other timesteps {left.key}",
            f"vdcache: the timesteps of this generation are not those of the calibration from step {step} on (another solver, "
            "or another shift): the rest is computed in full, and the next generation is calibrated where nothing fits it.",
        )

    # ---- the search ----------------------------------------------------------------------------------------------

    def _start_search(self, run: _Run) -> None:
        """Begin to look for a schedule on a generation that was recorded; one that is good by the table alone is followed meanwhile.

        Raises:
            ConfigError: the goal is out of reach, or this generation teaches nothing.
        """
        began, now = time.perf_counter(), self._now
        key = replace(now.key, times=tuple(now.times)) if now.following is None else now.following.key
        table = run.table or replace(self._table(run.gathering), times=key.times)
        wrong = [step for step, own in enumerate(table.products[0].diagonal()) if not np.isfinite(own)]
        step = run.recording.not_finite()
        if self._ranks.any("not finite", step is not None) or wrong:
            raise _Passing(
                f"the model was given or gave NaN or infinity in step {min([*wrong[:1], *([] if step is None else [step])], default='?')}"
            )
        cost = cost_of_reuse([*run.programs, *self._before])
        try:
            replay = self._ranks.together("replay", lambda: TrajectoryReplay(run.recording))
        except (VdcacheError, RuntimeError, MemoryError) as error:
            if now.following is not None and isinstance(error, VdcacheError):
                note = f"it stays as it was, because {_words(error)}"
                self._keep(replace(now.following, tentative=False, note=note))
                return
            self._go_by_the_table(key, table, cost, error, began)
            return
        search = PiecewiseSearch(replay, table, self._goal, cost, CACHED)
        search.seconds = time.perf_counter() - began
        if self._ranks:  # the results of a run lie in parts on all ranks
            search.scored.agreed = lambda error: self._ranks.mean("error", error)
        self._searches[key] = search
        while len(self._searches) > SEARCHES:
            del self._searches[next(iter(self._searches))]
        try:
            if self._share == math.inf or run.at_once:
                search.begin(math.inf)
                self._advance(key, search, math.inf)
            if key not in self._searches:
                return  # it is over
            if now.following is None:
                self._follow_meanwhile(key, search)
            else:
                self._keep(replace(now.following, searches=now.following.searches + 1))
        except Exception:
            self._searches.pop(key, None)
            raise

    def _follow_meanwhile(self, key: CalibrationKey, search: PiecewiseSearch) -> None:
        """Take the best by the table until something better has been run; where only running tells, every step is computed."""
        try:
            schedule = choose(search.table, None, self._goal, predictions=CACHED, reuse_cost=search.reuse_cost)
        except ConfigError:
            if self._goal.quality_db is None:
                raise
            schedule = Schedule(search.table.steps, tuple(range(search.table.steps)))
        self._found_one(key, search, schedule, tentative=True)

    def _go_on(self, program: Any, inputs: Sequence[Any]) -> None:
        """Run a piece of the search that belongs to this generation, whose model runs now."""
        following = self._now.following
        if following is None or (search := self._searches.get(following.key)) is None:
            return
        search.saw(program, inputs)
        key = following.key
        if self._ranks.any(
            "lost", search.is_lost
        ):  # Dynamo has let go of a graph, or there are other weights: it goes on from another generation
            del self._searches[key]
            return
        try:
            self._advance(key, search, self._share * search.steps_per_call)
        except Exception as error:
            self._searches.pop(key, None)
            if self._strict:
                raise
            self._give_up(error, replace(key, times=()))

    def _advance(self, key: CalibrationKey, search: PiecewiseSearch, allowed: float) -> None:
        """Let a search go on, and take what it has found."""
        try:
            ended = self._ranks.together("search", lambda: search.advance(allowed))
        except Exception as error:
            if isinstance(error, VdcacheError):
                raise  # what was run says that the goal is out of reach
            self._searches.pop(key, None)
            self._go_by_the_table(key, search.table, search.reuse_cost, error, time.perf_counter() - search.seconds)
            return
        if search.found is not None:
            del self._searches[key]
            self._found_one(key, search, search.found)
        elif ended and self._now.following is not None:
            following = self._known.own(key)
            if following is not None and (better := search.best_so_far(following.schedule)) is not None:
                self._found_one(key, search, better, tentative=True)

    def _go_by_the_table(self, key: CalibrationKey, table: StepTable, cost: float, error: Exception, began: float) -> None:
        """A generation cannot be run again.

        Raises:
            ConfigError: a later one may be, or the goal takes it.
        """
        may_pass = not isinstance(error, VdcacheError)  # no memory, for one
        if may_pass and self._tries.get(replace(key, times=()), (0, 0))[0] < TRIES - 1:
            raise _Passing(f"it cannot be run again: {_words(error)}") from error
        if self._goal.quality_db is not None:
            raise (_Passing if may_pass else ConfigError)(
                f"which schedule keeps {self._goal.quality_db:g} dB cannot be tried, because {_words(error)}. "
                "vdcache.calibrate(model, run, quality_db=…) tries it with your own loop"
            ) from error
        note = f"chosen by the table of steps alone, because {_words(error)}"
        schedule = choose(table, None, self._goal, predictions=CACHED, reuse_cost=cost)
        self._keep(Calibration.of(key, self._goal, schedule, table, ScheduleScores(), reuse_cost=cost, began=began, note=note))

    def _found_one(self, key: CalibrationKey, search: PiecewiseSearch, schedule: Schedule, *, tentative: bool = False) -> None:
        began = time.perf_counter() - search.seconds
        note = "the search goes on within later generations" if tentative else ""
        before = self._known.own(key)
        self._keep(
            Calibration.of(
                key,
                self._goal,
                schedule,
                search.table,
                search.scored,
                reuse_cost=search.reuse_cost,
                began=began,
                note=note,
                tentative=tentative,
                searches=before.searches if before is not None else 1,
            )
        )

    def _keep(self, found: Calibration) -> None:
        """Follow a calibration from the next generation on, and keep it for other processes."""
        before = self._known.own(found.key)
        if found.tentative and (ended := self._known.on_disk(found.key)) is not None and not ended.tentative:
            self._searches.pop(found.key, None)  # another session was faster
            self._take(ended)
            return
        found, where = self._known.save(found)
        self._known.last = found
        self._known.follow(found)
        told = f"vdcache: calibrated in {found.seconds:.1f} s: {found}\n{where}"
        if before is not None and before.schedule.computed != found.schedule.computed:
            told = f"vdcache: another schedule is followed from the next generation on.\n{found}\n{where}"
        elif before is not None:
            told = f"vdcache: the schedule that is followed stays.\n{found}\n{where}"
        self._log(f"calibrated {found.key} {found.schedule} {found.tentative}", told)
        if not found.tentative:
            self._say_if_nothing_is_reused(found)

    # ---- what is said --------------------------------------------------------------------------------------------

    def _say_that_it_calibrates(self, run: _Run) -> None:
        steps = self._session.num_steps
        unknown = "no schedule is known for this model, number of steps and size"
        if steps is None:
            unknown = "no schedule is known for this model while nobody says how many steps there will be (num_steps)"
        size = (run.gathering.will_hold() + run.recording.bytes * (steps or 50)) / 2**20
        when = "When it ends, schedules are tried on it, once, for about the time of two generations; from then on the best is followed"
        if self._share < math.inf:
            when = (
                f"The next ones follow a schedule, while others are tried on this one, for about the time of two generations in all and at most "
                f"{self._share:.0%} of one within each; the best is followed then"
            )
        self._log(
            f"calibrating {self._now.key}",
            f"vdcache: {unknown}: this generation is computed in full and keeps {size:.0f} MiB beside. {when} ({self._goal}).",
        )

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
            self._now.run = None
            if self._strict:
                raise
            self._give_up(error, self._now.key)
            return False
        return True

    def _give_up(self, error: Exception, key: CalibrationKey) -> None:
        """No schedule was found for what has this key; after trouble that may pass another generation is tried."""
        if isinstance(error, VdcacheError) and not isinstance(error, _Passing):
            self._closed.add(key)
            self._known.forget_tentative(key)
            self._warn(f"hopeless {key}", f"vdcache: no schedule was found, and every step is computed: {_words(error)}")
            return
        failed = self._tries.get(key, (0, 0))[0] + 1
        self._tries[key] = failed, (self._now.number or 0) + 2 ** (failed - 1)
        meanwhile = "the schedule that is known is followed" if self._now.following is not None else "every step is computed"
        self._warn(
            f"passing {key}",
            f"vdcache: a generation that was to calibrate taught nothing, because {_words(error)}. Until one does, {meanwhile}: the "
            "next one is tried, and after further trouble ever rarer ones.",
        )


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
