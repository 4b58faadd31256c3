"""From a table of steps to one schedule: candidates are run, the better ones on more prompts, within a budget of generations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from torch import Tensor

from vdcache.calibration.schedule import PREDICTIONS, Prediction, Schedule, candidates, candidates_up_to, first_of_each
from vdcache.calibration.tables import StepTable
from vdcache.errors import CacheStateError, ConfigError
from vdcache.policies.goal import Goal
from vdcache.util.psnr import psnr

__all__ = ["BUDGET", "MOST", "Runs", "ScheduleScores", "choose", "psnr_of"]

MOST = 20  # candidates of one number of computed steps that are run
BUDGET = 2.0  # generations a prompt for running candidates, after the uncached one
LOSSLESS = 150.0  # dB
TRUSTED = 0.1  # relative error of the blocks' sum, mean over reused steps, that is taken unseen


class Runs(Protocol):
    """Generations that can be run under a schedule, over and over, each with its own start."""

    @property
    def prompts(self) -> int: ...

    def of(self, schedule: Schedule, prompt: int) -> Tensor:
        """What the generation ends with."""

    def wanted(self, prompt: int) -> Tensor:
        """What it ends with when every step is computed."""


@dataclass
class ScheduleScores:
    """What was run so far: the PSNR of every schedule on every prompt that it was tried on. Handed in again, it is not run again.

    Args:
        known: by computed steps, prediction and prompt.
        tick: told what is being run, for progress bars.
        keep: told after every run.
        agreed: the error of a run, as a share of the largest value squared, for all ranks that have made it together.
    """

    known: dict[tuple[tuple[int, ...], Prediction, int], float] = field(default_factory=dict)
    tick: Callable[[str], None] = lambda text: None
    keep: Callable[[ScheduleScores], None] = lambda scored: None
    agreed: Callable[[float], float] | None = None

    def psnr(self, runs: Runs, schedule: Schedule, prompt: int) -> float:
        key = schedule.computed, schedule.prediction, prompt
        if key not in self.known:
            self.tick(
                f"{len(schedule.computed)} of {schedule.steps} steps, {schedule.prediction.rule}, {schedule.scope}, prompt {prompt + 1}"
            )
            found = psnr_of(runs.of(schedule, prompt), runs.wanted(prompt))
            if self.agreed is not None:
                error = self.agreed(10 ** (-found / 10))
                found = -10 * math.log10(error) if error > 0 else LOSSLESS if error == 0 else -math.inf
            self.known[key] = found
            self.keep(self)
        return self.known[key]


def choose(
    table: StepTable,
    runs: Runs | None,
    goal: Goal,
    *,
    predictions: Sequence[Prediction] = PREDICTIONS,
    tries: int | None = None,
    reuse_cost: float = 0.0,
    scored: ScheduleScores | None = None,
    work: float = BUDGET,
) -> Schedule:
    """The best schedule that is known of: by the table, and by running its best candidates.

    The candidates run on the first prompt, the better half of them on the next, and so on, so that all runs together take at most
    `work` generations a prompt.

    Args:
        runs: None to go by the table alone.
        tries: how many candidates are run; None for as many as the budget allows, at most `MOST`; 0 for none.

    Raises:
        ConfigError: a goal that cannot be reached, with the best that can.
    """
    scored = scored or ScheduleScores()
    if goal.quality_db is None:
        count = goal.count(table.steps, reuse_cost)
        found = candidates(table, count, predictions)
        if count == table.steps or (not goal.floor_db and (runs is None or tries == 0)):
            return found[0]
        if runs is None:
            return _trusted(table, count, predictions)
        budget = work * runs.prompts
        if not goal.floor_db:
            best = _nearest(runs, found, scored, tries, budget, reuse_cost)
            if best.psnr == -math.inf:
                raise ConfigError(f"every schedule of {count} of {table.steps} steps that was tried gives what is not a number")
            return best
        if (_nearest(runs, found, scored, 1, budget).psnr or 0) >= goal.floor_db:
            return _nearest(runs, found, scored, tries, budget, reuse_cost)
        try:
            return _fewest(table, runs, goal.floor_db, predictions, scored, tries, reuse_cost, work, above=count)
        except ConfigError:  # few steps leave little to skip
            return Schedule(table.steps, tuple(range(table.steps)), order=predictions[-1].order, psnr=LOSSLESS)
    if runs is None or tries == 0:
        raise ConfigError(f"whether a schedule keeps {goal.quality_db:g} dB is only known by running it")
    return _fewest(table, runs, goal.quality_db, predictions, scored, tries, reuse_cost, work)


def _trusted(table: StepTable, count: int, predictions: Sequence[Prediction]) -> Schedule:
    """Nothing can be run: at least so many computed steps that what is reused is predicted well."""
    for ranked in candidates_up_to(table, table.steps, predictions)[count - 1 :]:
        best = ranked[0]
        if best.error <= TRUSTED * (table.steps - len(best.computed)):
            return best
    raise AssertionError("computing every step has no error")


def _work(computed: int, steps: int, reuse_cost: float) -> float:
    """What a run takes, as a share of an uncached one."""
    return (computed + (steps - computed) * reuse_cost) / steps


def _nearest(
    runs: Runs,
    tried: Sequence[Schedule],
    scored: ScheduleScores,
    tries: int | None,
    budget: float,
    reuse_cost: float = 0.0,
) -> Schedule:
    """The candidate whose results are nearest to the uncached ones."""
    share = _work(len(tried[0].computed), tried[0].steps, reuse_cost)

    def rounds(first: int) -> list[int]:
        return [max(1, -(-first // 2**p)) for p in range(runs.prompts)]

    fits = [n for n in range(1, MOST + 1) if sum(rounds(n)) * share <= budget]
    first = max([1, *fits]) if tries is None else tries
    left = _of_the_best_prediction(runs, tried, scored, first, asked=tries is not None)
    for prompt, many in enumerate(rounds(len(left))):
        left = left[:many]
        scores = {one: [scored.psnr(runs, one, p) for p in range(prompt + 1)] for one in left}
        left.sort(key=lambda one: -float(np.mean(scores[one])))
    return replace(left[0], psnr=float(np.mean(scores[left[0]])))


def _of_the_best_prediction(
    runs: Runs, tried: Sequence[Schedule], scored: ScheduleScores, many: int, *, asked: bool
) -> list[Schedule]:
    """So many candidates: the first one of each prediction, and then others of the one that was best on the first prompt. The table ranks
    the lists of one prediction, but not predictions among each other. Where there are few runs, lists matter more: at 17 of 30 steps on the
    second trained model the third list of one prediction was 2 to 3 dB better than the first of any.

    Args:
        asked: the number was asked for.
    """
    heads = first_of_each(tried)
    if not asked and many <= 2 * len(heads):
        return [one for one in tried if one.prediction == tried[0].prediction][:many]
    if not 1 < len(heads) < many:
        return list(tried[:many])
    best = max(heads, key=lambda one: scored.psnr(runs, one, 0))
    rest = [one for one in tried if one.prediction == best.prediction and one is not best]
    return [*heads, *rest][:many]


def _fewest(
    table: StepTable,
    runs: Runs,
    quality: float,
    predictions: Sequence[Prediction],
    scored: ScheduleScores,
    tries: int | None,
    reuse_cost: float,
    work: float,
    above: int = 0,
) -> Schedule:
    """The fewest computed steps that reach a quality: found on the first prompt, then seen on all.

    How good a number of steps will be is told from those that were run: PSNR falls by 20 log10 of the predicted error.
    """
    steps, many = table.steps, tries or 1
    ranked = dict(enumerate(candidates_up_to(table, max(1, steps - 1), predictions), start=1))
    left = work * runs.prompts - sum(_work(len(c), steps, reuse_cost) for c, *_ in scored.known)
    seen: dict[int, Schedule] = {}
    low, high = above, steps  # what is known to fail, and to be good enough

    def cost(count: int, prompts: int) -> float:
        return prompts * many * _work(count, steps, reuse_cost)

    middle = (low + high) // 2
    while high - low > 1:
        if tries is None and cost(middle, 1) + cost(max(middle, high % steps), runs.prompts - 1) > left:
            break
        left -= cost(middle, 1)
        seen[middle] = near = _nearest(_First(runs), ranked[middle], scored, many, math.inf)
        good = (near.psnr or 0) >= quality
        low, high = (low, middle) if good else (middle, high)
        shift = (near.psnr or 0) + 20 * math.log10(max(near.error, 1e-12))
        guessed = [c for c in range(low + 1, high) if shift - 20 * math.log10(max(ranked[c][0].error, 1e-12)) >= quality]
        middle = min(guessed, default=high - 1)
    while high < steps:  # the first prompt may be an easy one
        seen[high] = _nearest(runs, ranked[high], scored, many, math.inf)
        if (seen[high].psnr or 0) >= quality:
            return seen[high]
        left -= cost(high, runs.prompts - 1)
        high += 1
        if tries is None and cost(high, runs.prompts) > left:
            break
    best = max(seen.values(), key=lambda s: -math.inf if s.psnr is None else s.psnr, default=None)
    reached = f"{best.psnr:.1f} dB with {len(best.computed)} of {steps} steps" if best is not None else "nothing"
    untried = "" if low >= steps - 1 or high < steps else f" (more than {max(low, above)} computed steps were not tried)"
    raise ConfigError(f"no schedule of {steps} steps reaches {quality:g} dB; the best reached is {reached}{untried}")


class _First:
    """The first prompt alone."""

    def __init__(self, runs: Runs) -> None:
        self.of, self.wanted = runs.of, runs.wanted
        self.prompts = 1


def psnr_of(a: Tensor, b: Tensor) -> float:
    """In dB of the range of `b`; −∞ where it is not a number, at most 150.

    Raises:
        CacheStateError: tensors of different shapes.
    """
    if a.shape != b.shape:
        raise CacheStateError(
            f"a generation ends with {tuple(a.shape)} once and {tuple(b.shape)} another time; seed it, keep its sizes"
        )
    a, b = a.float(), b.float()
    spread = max(float(b.max() - b.min()), 1e-15)  # a constant has no range
    return psnr(float((a - b).square().mean()), spread, cap=LOSSLESS)
