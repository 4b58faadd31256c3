"""What a policy can reuse at most: nothing that is measured makes it reuse more, and something makes it reuse as much."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vdcache
from tests.support.thorough import THOROUGH
from vdcache.methods import PAB, TEACACHE_COEFFICIENTS, recipe
from vdcache.policies import AdaCache, Bounds, Codebook, MetricValue, MoReg, Threshold
from vdcache.policies.simulate import best_plans, lowest

numbers = st.floats(-100, 100).map(lambda x: round(x, 3))


def most(policy, steps):
    return sum(map(bool, best_plans(policy, steps)))


def play(policy, changes, motions=(), times=()):
    """How many steps are reused where step s is measured to change by `changes[s]`."""
    state, reused = policy.start(len(changes)), 0
    for step, change in enumerate(changes):
        motion = motions[step] if motions else None
        seen = (MetricValue("all/x", change, change, 1.0, motion, motion),) if step else None
        plan = policy.plan(state, step, times[: step + 1])
        if plan is None:
            state, plan = policy.decide(state, step, seen)
        reused += bool(plan)
        state = policy.observe(state, step, plan, None if plan else seen)
    return reused


@pytest.mark.parametrize("model", TEACACHE_COEFFICIENTS)
def test_of_a_polynomial_it_is_reached(model):
    """A polynomial need not be lowest at a change of nothing: of wan2.1-t2v-1.3b p(0) = .138 forbids any reuse below it."""
    policy = recipe(f"teacache-{model}-0.1").policy
    tried = [play(policy, [c / 1000] * 30) for c in range(0, 2000, 1 if THOROUGH else 4)]
    assert max(tried) <= most(policy, 30) and (max(tried) == most(policy, 30) or TEACACHE_COEFFICIENTS[model][0] < 0)


def test_by_hand():
    assert most(recipe("teacache-flux-0.25").policy, 30) > 0 and most(recipe("teacache-wan2.1-t2v-1.3b-0.1").policy, 30) == 28
    assert most(Threshold(0.5, True, (1.0, 0.0, 0.3)), 10) == 4  # p(c) = c² + .3 is at least .3: every second of eight
    assert most(Threshold(0.3, True, (1.0, 0.0, 0.3)), 10) == 0  # strictly below
    assert most(Threshold(0.1, True, (1.0, -2.0, 1.2)), 10) == 0 and most(Threshold(0.3, True, (1.0, -2.0, 1.2)), 10) == 4
    assert most(recipe("pab-latte").policy, 30) == 25  # all but every sixth, where all lie in the window


@given(st.lists(numbers, min_size=1, max_size=6), st.floats(0, 50))
def test_the_lowest_value_of_a_polynomial(coefficients, x):
    value = 0.0
    for c in coefficients:
        value = value * x + c
    assert lowest(coefficients) <= value + 1e-6 * (1 + abs(value))


@given(st.floats(0.01, 100), numbers, numbers)
def test_the_lowest_value_is_taken(a, b, c):
    at = max(0.0, -b / (2 * a))
    assert lowest((a, b, c)) == pytest.approx(a * at * at + b * at + c, rel=1e-9, abs=1e-9)
    assert lowest((0.0, 0.0, c)) == c and lowest((-a, b, c)) < -1e50


changes20 = st.lists(st.floats(0, 2), min_size=20, max_size=20)
motions20 = st.lists(st.floats(0, 2), min_size=20, max_size=20)
books = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(
    lambda r: Codebook(tuple((0.2 * (i + 1), x) for i, x in enumerate(r)))
)


@given(changes20, st.lists(numbers, max_size=5), st.floats(0, 2), st.booleans(), st.integers(0, 4), st.integers(0, 9))
def test_no_threshold_reuses_more(changes, polynomial, threshold, accumulate, row, total):
    policy = Threshold(threshold, accumulate, tuple(polynomial), Bounds(max_consecutive=row, max_total=total))
    assert play(policy, changes) <= most(policy, 20)


@given(changes20, motions20, books, st.sampled_from(["vdcache", "paper", "code"]), st.booleans())
def test_no_codebook_reuses_more(changes, motions, book, rule, moreg):
    """Rates need not fall with the change, and motion scales it."""
    policy = AdaCache(book, MoReg() if moreg else None, rule=rule)
    assert play(policy, changes, motions) <= most(policy, 20)


@given(st.sampled_from(sorted(PAB)), st.lists(st.floats(0, 1000), min_size=20, max_size=20))
def test_no_timesteps_reuse_more(model, times):
    policy = recipe(f"pab-{model}").policy
    assert play(policy, [0.0] * 20, times=sorted(times, reverse=True)) <= most(policy, 20)


def test_explain_and_a_pipeline_say_the_same():
    import torch

    from vdcache.pipelines.forecast import most_reused
    from vdcache.testing import TinyDiT

    args = torch.randn(1, 5, 4), torch.tensor([900.0]), torch.randn(1, 3, 4)
    for name in ("teacache-flux-0.25", "teacache-wan2.1-t2v-1.3b-0.1", "easycache-0.05", "adacache-fast", "every-3"):
        report = vdcache.explain(TinyDiT(3), *args, recipe=name)
        reused = most_reused(recipe(name).for_steps(30).policy, 30)
        assert [s for s, plan in enumerate(report.schedule) if plan] == reused and reused
        assert report.bound > 1 and math.isfinite(report.bound)
