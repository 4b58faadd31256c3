"""Published searches against brute force, and against the worked examples of their papers."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import vdcache
from vdcache.calibration import StepTable
from vdcache.calibration.choose import ScheduleScores
from vdcache.calibration.paths import best_paths, cost_of
from vdcache.calibration.published_searches import (
    SEARCHES,
    cem_steps,
    dpcache_steps,
    lemica_steps,
    mean_errors,
    meancache_steps,
    search,
    segment_errors,
)
from vdcache.errors import ConfigError
from vdcache.testing import TinyDiT, latent, time_of

SEEDS = st.integers(0, 2**32 - 1)
STEPS = 7
TEXT = latent(99, 1, 3, 4)
QUIET = Console(quiet=True)


def lists(computed, steps=STEPS, first=1):
    """Every list of so many computed steps that begins with the first ones."""
    return [(*range(first), *rest) for rest in itertools.combinations(range(first, steps), computed - first)]


def edges_of(edges, path):
    return [edges[i, j] for i, j in itertools.pairwise((*path, edges.shape[0]))]


def random_errors(seed, of_two=True):
    """Errors from two computed steps, or from the last one alone."""
    rng = np.random.default_rng(seed)
    errors = np.full((STEPS + 1, STEPS, STEPS), np.nan)
    for j in range(STEPS):
        for s in range(j + 1, STEPS):
            errors[: j + 1, j, s] = rng.random(j + 1) if of_two else rng.random()
    return errors


@given(SEEDS, st.integers(3, STEPS))
def test_dpcache_against_brute_force(seed, computed):
    """The exact search is the best of all lists; the recurrence is where a cost depends on the last computed step alone."""
    errors = random_errors(seed)
    best = min(cost_of(errors, path) for path in lists(computed, first=3))
    exact, found = dpcache_steps(errors, computed, exact=True), dpcache_steps(errors, computed)
    assert exact.cost == pytest.approx(best) and cost_of(errors, exact.steps) == pytest.approx(best)
    assert found.cost == pytest.approx(cost_of(errors, found.steps)) and found.cost >= best - 1e-12
    alone = random_errors(seed, of_two=False)
    assert dpcache_steps(alone, computed).cost == pytest.approx(dpcache_steps(alone, computed, exact=True).cost)
    assert found.steps[:3] == (0, 1, 2) and len(found.steps) == computed


def test_the_recurrence_of_dpcache_misses_what_its_predecessor_hides():
    """It keeps, of all lists that end at a step, the one that is best so far, though another one predicts the rest better."""
    missed = [
        s for s in range(200) if dpcache_steps(random_errors(s), 5).cost > dpcache_steps(random_errors(s), 5, exact=True).cost
    ]
    assert missed


@given(SEEDS, st.integers(1, STEPS))
def test_lemica_against_brute_force(seed, computed):
    """Few different weights, so that many lists tie at their largest edge."""
    edges = np.random.default_rng(seed).integers(0, 4, (STEPS, STEPS + 1)).astype(float)
    best = min(tuple(sorted(edges_of(edges, path), reverse=True)) for path in lists(computed))
    assert tuple(sorted(edges_of(edges, lemica_steps(edges, computed, longest=None)), reverse=True)) == best


@pytest.mark.parametrize(("better", "worse"), [((5, 1, 1), (5, 2, 0)), ((4, 4, 4), (5, 0, 0))])
def test_lemica_by_the_examples(better, worse):
    """Two lists of three computed steps, 0 1 2 and 0 3 4, that share no edge."""
    edges = np.full((5, 6), 99.0)
    edges[0, 1], edges[1, 2], edges[2, 5] = better
    edges[0, 3], edges[3, 4], edges[4, 5] = worse
    assert lemica_steps(edges, 3) == (0, 1, 2)


def test_lemica_keeps_to_its_longest_edge():
    edges = np.zeros((6, 7))
    assert max(np.diff((*lemica_steps(edges, 3, longest=2), 6))) == 2
    with pytest.raises(ConfigError, match="no list of 2 of 6 steps has edges of at most 2 steps"):
        lemica_steps(edges, 2, longest=2)


@given(SEEDS, st.integers(1, STEPS), st.sampled_from([1.0, 2.0, 5.0]))
def test_meancache_against_brute_force(seed, computed, gamma):
    edges = np.random.default_rng(seed).random((STEPS, STEPS + 1))
    best = min(sum(e**gamma for e in edges_of(edges, p)) for n in range(1, computed + 1) for p in lists(n))
    found = meancache_steps(edges, computed, gamma=gamma)
    assert sum(e**gamma for e in edges_of(edges, found)) == pytest.approx(best) and len(found) <= computed


@pytest.mark.parametrize(("gamma", "want"), [(1.0, (0, 1)), (1.70, (0, 1)), (1.72, (0, 2)), (2.0, (0, 2)), (5.0, (0, 2))])
def test_meancache_by_the_example(gamma, want):
    """Weights (3, 0) against (2, 2): the switch is at gamma = ln 2 / ln 1.5 = 1.71."""
    edges = np.full((3, 4), 99.0)
    edges[0, 1], edges[1, 3], edges[0, 2], edges[2, 3] = 3, 0, 2, 2
    assert meancache_steps(edges, 2, gamma=gamma) == want


def test_meancache_measures_the_mean_velocity():
    """By hand, from values of which the table has products alone."""
    values, times = (
        torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        (1.0, 0.9, 0.6, 0.3, 0.1),
    )
    edges = mean_errors(StepTable((values @ values.T).numpy()[None], times=times))
    lengths = torch.tensor([0.1, 0.3, 0.3, 0.2, 0.1], dtype=torch.float64)
    for i, j in ((0, 1), (0, 3), (1, 5), (4, 5)):
        mean = (values[i:j] * lengths[i:j, None]).sum(0) / lengths[i:j].sum()
        assert edges[i, j] == pytest.approx(float((mean - values[i]).norm()), abs=1e-7)


def test_cem_by_its_example():
    """Errors that are the same at every step, and grow with what is reused: equal gaps. The last step is computed."""
    prior = np.tile(np.arange(10.0)[:, None], (1, 13))
    assert cem_steps(prior, 5) == (0, 3, 6, 9, 12)
    with pytest.raises(ConfigError, match="no list of 12 of 13"):
        cem_steps(prior, 12, spread=0)


class Generations:
    """What a generation ends with is the number of reused steps, and a sign for every prompt."""

    def __init__(self):
        self.prompts, self.ran = 2, []

    def wanted(self, prompt):
        return torch.zeros(3)

    def of(self, schedule, prompt):
        self.ran.append(schedule.computed)
        return torch.full((3,), (schedule.steps - len(schedule.computed)) * (1.0 - 2 * prompt))


def test_lemica_weighs_an_edge_by_a_run():
    runs = Generations()
    edges = segment_errors(runs, 4, longest=3)
    assert edges[0, 2] == 1 and edges[1, 4] == 2 and edges[2, 3] == 0 and math.isinf(edges[0, 4])
    assert set(runs.ran) == {(0, 2, 3), (0, 3), (0, 1, 3), (0, 1), (0, 1, 2)}


@pytest.mark.parametrize("method", SEARCHES)
def test_a_schedule_by_a_published_search(method):
    values = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).cumsum(0)
    found = search(method, StepTable((values @ values.T).numpy()[None]), Generations(), 4, ScheduleScores())
    assert len(found.computed) == 4 and found.computed[0] == 0 and found.error > 0
    assert found.psnr is not None and found.order == (1 if method == "dpcache" else 0)


def sample(model, seed):
    x = latent(seed)
    with torch.no_grad():
        for step in range(6):
            x = x - model(x, time_of(step), TEXT) / 6
    return x


@pytest.mark.parametrize("method", SEARCHES)
def test_a_published_search_on_a_model(method):
    torch._dynamo.reset()
    found = vdcache.search_schedule(TinyDiT(), sample, 4, prompts=[1], method=method, inner="eager", console=QUIET)
    assert len(found.computed) == 4 and found.psnr > 10
    fast = vdcache.compile(TinyDiT(), found.recipe(), num_steps=6, inner="eager")
    sample(fast, 1)
    assert fast.vdcache.history.computed_steps() == list(found.computed)


def test_a_published_search_says_what_it_takes():
    with pytest.raises(ConfigError, match="method is auto, dpcache, lemica, meancache; got 'lpips'"):
        vdcache.search_schedule(TinyDiT(), sample, 4, method="lpips")
    with pytest.raises(ConfigError, match="method='lemica' takes computed=… or speedup=…: it has no rule for a quality"):
        vdcache.search_schedule(TinyDiT(), sample, quality_db=30, method="lemica")
    with pytest.raises(ConfigError, match="it takes no orders=, scopes= or tries="):
        vdcache.search_schedule(TinyDiT(), sample, 4, method="meancache", orders=(0,))


def test_lemica_refuses_before_its_runs():
    runs = Generations()
    with pytest.raises(ConfigError, match="the number of computed steps"):
        search("lemica", StepTable(np.eye(14)[None]), runs, 1, ScheduleScores())
    assert not runs.ran


def test_no_more_steps_than_there_are():
    with pytest.raises(ConfigError, match="9 of 7 steps cannot be computed"):
        dpcache_steps(random_errors(0), 9)
    assert best_paths(random_errors(0), STEPS)[0].cost == 0
