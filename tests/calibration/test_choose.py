"""From a table to one schedule, with generations that are made up: budgets, floors against brute force, what is no number."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vdcache import Schedule
from vdcache.calibration import StepTable
from vdcache.calibration.choose import BUDGET, MOST, ScheduleScores, choose, psnr_of
from vdcache.calibration.schedule import Prediction
from vdcache.errors import ConfigError
from vdcache.policies.goal import Goal

STEPS = 12
SEEDS = st.integers(0, 2**32 - 1)


def table_of(seed=0, steps=STEPS, generations=1):
    """What blocks add along a smooth path."""
    rng = np.random.default_rng(seed)
    s = np.linspace(0, 1, steps)[:, None]
    sinusoids = [np.sin(2 * np.pi * rng.uniform(0.2, 1.2, 7) * s + rng.uniform(0, 6, 7)) for _ in range(generations)]
    r = np.stack(sinusoids) + 3
    return StepTable(np.einsum("gsd,gtd->gst", r, r))


class Fake:
    """Runs whose result is as far from the wanted one as `decibels(schedule, prompt)` says."""

    def __init__(self, decibels, prompts=1):
        self.decibels, self.prompts, self.ran = decibels, prompts, []
        self.full = torch.linspace(0, 1, 64)

    def wanted(self, prompt):
        return self.full

    def of(self, schedule, prompt):
        assert 0 <= prompt < self.prompts
        self.ran.append((schedule, prompt))
        found = self.decibels(schedule, prompt)
        if not math.isfinite(found):
            return self.full * math.nan
        signs = torch.ones(64)
        signs[::2] = -1
        return (self.full.double() + signs * 10 ** (-found / 20)).float()

    @property
    def generations(self):
        """What was run, in whole generations, as far as computed steps cost."""
        return sum(len(s.computed) / s.steps for s, _ in self.ran)


def monotone(seed):
    """Better with more computed steps, whatever they are; no two counts alike."""
    rises = np.random.default_rng(seed).uniform(0.5, 12, STEPS + 1).cumsum()
    return lambda schedule, prompt: float(rises[len(schedule.computed)])


# --- goals ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "goal",
    [
        {},
        {"computed": 3, "speedup": 2.0},
        {"speedup": 2.0, "quality_db": 30.0},
        *({"speedup": s} for s in (0, 0.99, -2, math.nan, math.inf, "2")),
        *({"quality_db": q} for q in (0, -3, math.nan, "30")),
        *({"computed": c} for c in (0, -1, 1.5, "3")),
    ],
    ids=str,
)
def test_goals_that_are_none_are_refused(goal):
    with pytest.raises(ConfigError):
        Goal(**goal)


@given(st.integers(1, 60), st.floats(1, 30), st.floats(0, 0.9))
def test_the_count_is_the_most_that_is_fast_enough(steps, speedup, cost):
    def faster(computed):
        return steps / (computed + (steps - computed) * cost)

    fits = [c for c in range(1, steps + 1) if faster(c) >= speedup * (1 - 1e-9)]
    if not fits:
        with pytest.raises(ConfigError, match=f"with a single computed step it is {faster(1):.2f} times"):
            Goal(speedup=speedup).count(steps, cost)
        return
    found = Goal(speedup=speedup).count(steps, cost)
    assert faster(found) >= speedup * (1 - 1e-6)
    assert found == max(fits) or faster(found + 1) < speedup * (1 + 1e-6)


def test_more_computed_steps_than_there_are_are_refused():
    with pytest.raises(ConfigError, match="13 computed steps were asked for, and a generation has 12"):
        choose(table_of(), None, Goal(computed=13))


def test_a_reuse_that_saves_nothing_is_refused():
    with pytest.raises(ConfigError):
        Goal(speedup=2.0).count(8, 1.0)


def test_a_quality_needs_runs():
    with pytest.raises(ConfigError, match="whether a schedule keeps 30 dB is only known by running it"):
        choose(table_of(), None, Goal(quality_db=30.0))


# --- what is run ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, STEPS), st.integers(1, 6), SEEDS)
def test_the_budget_holds_and_the_best_that_was_run_wins(computed, prompts, seed):
    def decibels(schedule, prompt):
        return 20 + 20 * np.random.default_rng([seed, prompt, *schedule.computed, schedule.order]).random()

    runs, scored = Fake(decibels, prompts), ScheduleScores()
    found = choose(table_of(seed), runs, Goal(computed=computed), scored=scored)
    assert len(found.computed) == computed
    if computed == STEPS:
        assert not runs.ran
        return
    tried = {(s.computed, s.order) for s, _ in runs.ran}
    assert len(tried) <= MOST == 20 and runs.generations <= BUDGET * prompts == 2.0 * prompts
    assert len(runs.ran) == len({(s.computed, s.order, p) for s, p in runs.ran}) == len(scored.known)
    through = [s for s, p in runs.ran if p == prompts - 1]
    means = [np.mean([decibels(s, p) for p in range(prompts)]) for s in through]
    assert found.psnr == pytest.approx(max(means), abs=0.05)
    best = through[int(np.argmax(means))]
    assert (found.computed, found.order) == (best.computed, best.order)
    assert all((s, p) in runs.ran for s in through for p in range(prompts))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, STEPS - 1), st.integers(1, 3), SEEDS)
def test_what_is_known_is_not_run_again(computed, prompts, seed):
    scored = ScheduleScores()
    first = choose(table_of(seed), Fake(monotone(seed), prompts), Goal(computed=computed), scored=scored)
    again = Fake(monotone(seed), prompts)
    assert choose(table_of(seed), again, Goal(computed=computed), scored=scored) == first and not again.ran


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 4))
def test_an_interrupted_search_goes_on_where_it_was(seed, after):
    def decibels(schedule, prompt):
        return 20 + 20 * np.random.default_rng([seed, prompt, *schedule.computed]).random()

    class Interrupted(Fake):
        def of(self, schedule, prompt):
            if len(self.ran) == after:
                raise KeyboardInterrupt
            return super().of(schedule, prompt)

    whole, scored = Fake(decibels, 2), ScheduleScores()
    want = choose(table_of(seed), whole, Goal(speedup=2.0))
    with pytest.raises(KeyboardInterrupt):
        choose(table_of(seed), Interrupted(decibels, 2), Goal(speedup=2.0), scored=scored)
    rest = Fake(decibels, 2)
    assert choose(table_of(seed), rest, Goal(speedup=2.0), scored=scored) == want
    assert rest.ran == whole.ran[after:]


# --- the fewest steps that are good enough -------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(1, 80), st.integers(1, 3))
@example(0, 51.0, 1)  # three counts take the budget, and the fourth is not run
def test_the_fewest_steps_are_those_of_brute_force_within_the_budget(seed, floor, prompts):
    decibels, runs = monotone(seed), Fake(monotone(seed), prompts)
    good = [c for c in range(1, STEPS) if decibels(Schedule(STEPS, tuple(range(c))), 0) >= floor + 0.01]
    edge = any(abs(decibels(Schedule(STEPS, tuple(range(c))), 0) - floor) < 0.01 for c in range(1, STEPS))
    if edge:
        return
    found, said = None, ""
    try:
        found = choose(table_of(seed), runs, Goal(quality_db=floor))
    except ConfigError as error:
        said = str(error)
    if found is None:
        most = max(len(s.computed) for s, _ in runs.ran)
        best = decibels(Schedule(STEPS, tuple(range(most))), 0)
        text = f"reaches {floor:g} dB; the best reached is {best:.1f} dB with {most} of 12 steps"
        if most < STEPS - 1:  # the next one was too dear
            text += f" (more than {most} computed steps were not tried)"
            assert runs.generations + (STEPS - 1) / STEPS * prompts > BUDGET * prompts
        assert text in said and best < floor
        return
    computed = len(found.computed)
    assert computed >= min(good) and found.psnr >= floor
    assert not any(min(good) <= len(s.computed) < computed for s, _ in runs.ran)
    assert computed == min(good) or runs.generations + (computed - 1) / STEPS > BUDGET * prompts


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0, 80))
def test_a_floor_is_kept_where_a_speed_would_break_it(seed, floor):
    decibels, runs = monotone(seed), Fake(monotone(seed))
    at = [decibels(Schedule(STEPS, tuple(range(c))), 0) for c in range(1, STEPS)]
    if any(abs(d - floor) < 0.01 for d in at):
        return
    found = choose(table_of(seed), runs, Goal(speedup=2.0, floor_db=floor))
    enough = [c for c, d in enumerate(at, start=1) if d >= floor and c >= 6]
    fewest, computed = min(enough) if enough else STEPS, len(found.computed)
    assert computed == STEPS or at[computed - 1] >= floor
    assert runs.generations <= BUDGET
    if computed != fewest:  # only where there was nothing left to look further with
        assert computed > fewest and runs.generations + (computed - 1) / STEPS > BUDGET


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_without_a_floor_the_speed_is_kept_whatever_it_costs(seed):
    found = choose(table_of(seed), Fake(lambda s, p: 3.0), Goal(speedup=2.0))
    assert len(found.computed) == 6 and found.psnr == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize("goal", [Goal(quality_db=45.0), Goal(speedup=2.0, floor_db=45.0)], ids=str)
def test_floors_keep_the_budget_too(goal):
    worst = 0.0
    for seed in range(20):
        runs = Fake(monotone(seed), 2)
        with contextlib.suppress(ConfigError):
            choose(table_of(seed), runs, goal)
        worst = max(worst, runs.generations / 2)
    assert worst <= BUDGET


def test_by_the_table_alone_a_floor_asks_for_small_errors():
    for seed in range(10):
        table = table_of(seed)
        found = choose(table, None, Goal(speedup=4.0, floor_db=30.0), predictions=[Prediction(1)])
        reused = STEPS - len(found.computed)
        assert len(found.computed) >= 3 and found.error <= 0.1 * reused and found.psnr is None


def test_a_table_of_no_likeness_computes_everything():
    table = StepTable(np.eye(STEPS)[None])
    assert choose(table, None, Goal(speedup=2.0, floor_db=30.0)).computed == tuple(range(STEPS))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(steps):
    table = table_of(steps=steps)
    found = choose(table, Fake(lambda s, p: 60.0 * len(s.computed)), Goal(speedup=1.0))
    assert found.computed == tuple(range(steps))
    if steps > 1:
        assert choose(table, Fake(lambda s, p: 60.0), Goal(quality_db=30.0)).computed == (0,)
    with pytest.raises(ConfigError, match=f"no schedule of {steps} steps reaches 30 dB; the best reached is"):
        choose(table, Fake(lambda s, p: 10.0), Goal(quality_db=30.0))


# --- what is no number ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 4), max_size=4), st.integers(1, 3), SEEDS)
def test_what_is_no_number_never_wins_where_a_number_does(broken, prompts, seed):
    """Some of the candidates break, at one prompt or another."""
    order = {}

    def decibels(schedule, prompt):
        number = order.setdefault((schedule.computed, schedule.order), len(order))
        return math.nan if number in broken and prompt == number % prompts else 30.0 - number

    runs = Fake(decibels, prompts)
    found = choose(table_of(seed), runs, Goal(computed=3))
    through = [s for s, p in runs.ran if p == prompts - 1]
    whole = [s for s in through if all(math.isfinite(decibels(s, p)) for p in range(prompts))]
    if whole:
        assert math.isfinite(found.psnr) and (found.computed, found.order) in {(s.computed, s.order) for s in whole}


@pytest.mark.parametrize("prompts", [1, 2])
def test_where_every_candidate_breaks_none_is_followed(prompts):
    runs = Fake(lambda s, p: math.nan, prompts)
    try:
        found = choose(table_of(), runs, Goal(speedup=2.0))
    except ConfigError:
        return
    assert found.computed == tuple(range(STEPS))


def test_where_every_candidate_breaks_a_floor_computes_everything():
    found = choose(table_of(), Fake(lambda s, p: math.nan), Goal(speedup=2.0, floor_db=30.0))
    assert found.computed == tuple(range(STEPS))
    with pytest.raises(ConfigError, match="no schedule of 12 steps reaches 30 dB"):
        choose(table_of(), Fake(lambda s, p: math.nan), Goal(quality_db=30.0))


def test_psnr_by_hand():
    b = torch.tensor([0.0, 4.0, 2.0, 1.0])
    assert psnr_of(b + 0.4, b) == pytest.approx(20, abs=1e-4)
    assert psnr_of(b, b) == 150 and psnr_of(b * math.nan, b) == psnr_of(b / 0, b) == psnr_of(b, b / 0) == -math.inf
    assert psnr_of(b.bfloat16(), b.double()) == 150
