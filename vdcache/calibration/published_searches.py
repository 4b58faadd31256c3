"""Published searches for the steps to compute, each by its own rule: DPCache, LeMiCa, MeanCache, CEM.

`choose` proposes by a table and decides by running. These decide by their tables alone, so that they can be compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np

from vdcache.calibration.choose import Runs, ScheduleScores
from vdcache.calibration.paths import Errors, Path, best_paths, cost_of
from vdcache.calibration.schedule import Prediction, Schedule
from vdcache.calibration.tables import StepTable
from vdcache.errors import ConfigError
from vdcache.util.checks import number, whole

__all__ = [
    "SEARCHES",
    "cem_steps",
    "dpcache_steps",
    "lemica_steps",
    "mean_errors",
    "meancache_steps",
    "search",
    "segment_errors",
]

FIRST = 3  # steps that DPCache always computes
GAMMA = 5.0  # of MeanCache: the power of an edge's weight
LONGEST = 10  # steps from one computed step to the next, in LeMiCa and CEM
SEARCHES = ("dpcache", "lemica", "meancache")

_Found = tuple[Any, tuple[int, ...]]  # what the edges of a list come to, and the list


def dpcache_steps(errors: Errors, computed: int, *, first: int = FIRST, exact: bool = False) -> Path:
    """The path-aware search of DPCache (arXiv 2602.22654): a skipped step costs what its prediction from the last two computed steps is
    wrong by.

    Its recurrence keeps one predecessor of every (count, step), so it may miss the best list; `exact` does not.

    Args:
        errors: [steps + 1, steps, steps], as `StepTable.errors` gives them.
        computed: how many steps are computed.
        first: steps that are computed in any case, from 0 on.

    Raises:
        ConfigError: more computed steps than there are, or fewer than `first`.
    """
    steps = errors.shape[1]
    _checked(computed, steps, first)
    if exact:
        allowed = errors.copy()
        allowed[:, :, :first] = np.where(np.isnan(allowed[:, :, :first]), np.nan, np.inf)
        return best_paths(allowed, computed)[0]
    lists = {first - 1: Path(0.0, tuple(range(first)))}  # by their last computed step

    def onward(path: Path, to: int) -> Path:
        i, j = (path.steps[-2] if len(path.steps) > 1 else -1), path.steps[-1]
        return Path(path.cost + float(errors[i + 1, j, j + 1 : to].sum()), (*path.steps, to))

    for count in range(first, computed):
        lists = {k: min(onward(path, k) for j, path in lists.items() if j < k) for k in range(count, steps)}
    best = min(onward(path, steps) for path in lists.values())
    return Path(best.cost, best.steps[:-1])


def lemica_steps(edges: np.ndarray, computed: int, *, longest: int | None = LONGEST) -> tuple[int, ...]:
    """The lexicographic minimax path of LeMiCa (arXiv 2511.00090): of all lists the one whose largest edge is smallest, then its second
    largest, and so on.

    Args:
        edges: [steps, steps + 1]; of computing step i and reusing it until j is at [i, j], where j = steps is the end.
        computed: how many steps are computed.
        longest: edge, in steps; None for any.

    Raises:
        ConfigError: no list of so many steps has edges that short.
    """
    # Adding one element to two sorted lists keeps their order, so one list for each (step, count) is enough.
    return _best(edges, computed, (), lambda held, edge: tuple(sorted((*held, edge), reverse=True)), longest)[1]


def meancache_steps(edges: np.ndarray, computed: int, *, gamma: float = GAMMA) -> tuple[int, ...]:
    """The peak-suppressed path of MeanCache (arXiv 2601.19961): at most so many computed steps with the least sum of edges to a power.

    Args:
        edges: as `lemica_steps` takes them; `mean_errors` gives MeanCache's.
        computed: how many steps are computed at most.
        gamma: the power; 1 is the shortest path, infinitely many LeMiCa's.

    Raises:
        ConfigError: more computed steps than there are.
    """
    if number(gamma, "gamma is a positive number") <= 0:
        raise ConfigError(f"gamma is a positive number; got {gamma!r}")
    powers = np.power(
        edges / max(np.nanmax(edges), 1e-30), gamma
    )  # of one scale, because the fifth power of small numbers is nothing
    return min(_best(powers, n, 0.0, lambda held, edge: held + edge) for n in range(1, computed + 1))[1]


def cem_steps(prior: np.ndarray, computed: int, *, spread: int = 1, power: int = 2, longest: int = LONGEST) -> tuple[int, ...]:
    """The steps of CEM (arXiv 2512.23258): the least sum of prior errors, with gaps near the mean; the first and the last are computed.

    Args:
        prior: [gaps, steps]; the error at a computed step of having reused for c steps before it is at [c, step].
        computed: how many steps are computed.
        spread: how far a gap may be from the mean one.
        power: of c, by which an error counts; 0, 1 or 2.
        longest: gap.

    Raises:
        ConfigError: no list of so many steps has such gaps.
    """
    steps = prior.shape[1]
    mean = round(steps / computed)
    edges = np.full((steps, steps + 1), np.inf)
    for j in range(1, steps):
        for gap in range(max(1, mean - spread), min(longest, mean + spread, j, len(prior)) + 1):
            edges[j - gap, j] = prior[gap - 1, j] * (gap - 1) ** power
    edges[steps - 1, steps] = 0.0
    return _best(edges, computed, 0.0, lambda held, edge: held + edge)[1]


def mean_errors(table: StepTable) -> np.ndarray:
    """Of every edge, how far the value of its first step is from the mean over the edge: [steps, steps + 1], in units of the value.

    MeanCache (K = 1) measures so how far the velocity at a step is from the average one until the next computed step, by the length of steps
    in time (of equal length where the table knows no timesteps). The table holds what all blocks add, not the velocity.
    """
    steps, products = table.steps, table.products
    lengths = np.abs(np.diff([*table.times, 0.0])) if table.times else np.ones(steps)
    edges = np.full((steps, steps + 1), np.nan)
    for i in range(steps):
        for j in range(i + 1, steps + 1):
            weights = np.zeros(steps)
            weights[i:j] = lengths[i:j] / lengths[i:j].sum()
            weights[i] -= 1
            edges[i, j] = np.sqrt(np.maximum(np.einsum("s,gst,t->g", weights, products, weights), 0)).mean()
    return edges


def segment_errors(runs: Runs, steps: int, *, longest: int = LONGEST) -> np.ndarray:
    """Of every edge up to `longest`, the mean absolute difference of what a generation ends with where nothing else is reused: [steps, steps + 1].

    LeMiCa's weights: a run for every edge and prompt.
    """
    edges = np.full((steps, steps + 1), np.inf)
    for i in range(steps):
        edges[i, i + 1] = 0.0
        for j in range(i + 2, min(steps, i + longest) + 1):
            schedule = Schedule(steps, (*range(i + 1), *range(j, steps)), order=0)
            found = [float((runs.of(schedule, p) - runs.wanted(p)).abs().mean()) for p in range(runs.prompts)]
            edges[i, j] = sum(found) / len(found)
    return edges


def search(method: str, table: StepTable, runs: Runs, computed: int, scored: ScheduleScores) -> Schedule:
    """The schedule that a published search finds, and the PSNR that a run of it has.

    Args:
        method: of `SEARCHES`.
        table: of the steps.
        runs: generations; LeMiCa runs one for every edge and prompt to choose.
        computed: how many steps are computed.
        scored: keeps the PSNR.

    Raises:
        ConfigError: more computed steps than there are.
    """
    if method == "dpcache":
        prediction = Prediction(1)
        steps = dpcache_steps(table.errors(prediction.rule), computed, first=min(FIRST, computed)).steps
    else:
        prediction = Prediction(0)
        if method == "lemica":  # before its many runs
            _checked(computed, table.steps, least=-(-table.steps // LONGEST))
        edges = mean_errors(table) if method == "meancache" else segment_errors(runs, table.steps)
        steps = meancache_steps(edges, computed) if method == "meancache" else lemica_steps(edges, computed)
    found = Schedule.of(table.steps, steps, prediction, error=cost_of(table.errors(prediction.rule), steps))
    return replace(found, psnr=mean(scored.psnr(runs, found, p) for p in range(runs.prompts)))


def _best(
    edges: np.ndarray, computed: int, nothing: Any, join: Callable[[Any, float], Any], longest: int | None = None
) -> _Found:
    """The best list of exactly so many computed steps, from 0 to the end, and what its edges come to."""
    steps = edges.shape[0]
    _checked(computed, steps)

    def onward(lists: dict[int, _Found], to: int) -> _Found | None:
        near = (i for i in lists if i < to and to - i <= (longest or math.inf) and np.isfinite(edges[i, to]))
        return min(((join(lists[i][0], float(edges[i, to])), (*lists[i][1], to)) for i in near), default=None)

    lists: dict[int, _Found] = {0: (nothing, (0,))}  # by their last computed step
    for count in range(1, computed):
        lists = {j: found for j in range(count, steps) if (found := onward(lists, j)) is not None}
    if (end := onward(lists, steps)) is None:
        near = "edges that short" if longest is None else f"edges of at most {longest} steps"
        raise ConfigError(f"no list of {computed} of {steps} steps has {near}")
    return end[0], end[1][:-1]


def _checked(computed: int, steps: int, least: int = 1) -> None:
    whole(computed, "the number of computed steps", least)
    if computed > steps:
        raise ConfigError(f"{computed} of {steps} steps cannot be computed")
