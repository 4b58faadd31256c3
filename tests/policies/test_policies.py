"""Policies against a literal re-statement of the paper's equations and of the reference code."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdcache.errors import ConfigError
from vdcache.methods import ADACACHE_CODEBOOKS, adacache, describe, recipe
from vdcache.policies import RECOMPUTE, AdaCache, Codebook, EveryN, MetricValue, MoReg
from vdcache.policies.adacache import AdaState

FAST = Codebook.of(ADACACHE_CODEBOOKS["fast"][30])


def play(policy, num_steps, changes, motions=None, before=None):
    """Run a policy over a generation; `changes[s]` is what would be measured if step s is computed."""
    state = policy.start(num_steps, before)
    computed = []
    for step in range(num_steps):
        plan = policy.plan(state, step)
        measures = None
        if plan == RECOMPUTE:
            motion = None if motions is None else motions[step]
            measures = (
                (MetricValue("x", changes[step], changes[step], motion=motion, motion_absolute=motion),) if computed else None
            )
            computed.append(step)
        state = policy.observe(state, step, plan, measures)
    return computed, state


def reference_code(num_steps, changes, book, motions=None, window=(4, 26), prev_moreg=1.0):
    """opensora's stdit3.py, restated: every block counts its forwards f from 1; numbers as there."""
    prev, rate, computed = 0, 1, []
    for f in range(1, num_steps + 1):
        if not (f == prev + rate or f in (1, num_steps - 1, num_steps)):
            continue
        computed.append(f - 1)
        if f > 1:
            metric = changes[f - 1] / rate
            if motions is not None and window[0] <= f <= window[1]:
                moreg = ((motions[f - 1] / 0.385) ** 8) / 1
                mograd = 10 * (moreg - prev_moreg) / rate
                prev_moreg = moreg
                metric = metric * (moreg + abs(mograd))
            for threshold, entry in list(book.items())[:-1]:
                if metric < threshold:
                    rate = entry
                    break
            else:
                rate = list(book.values())[-1]
        prev = f
    return computed, prev_moreg


changes30 = st.lists(st.floats(0.0, 2.0), min_size=30, max_size=30)
motions30 = st.lists(st.floats(0.2, 0.5), min_size=30, max_size=30)


@given(changes30)
def test_code_rule_is_the_reference_code(changes):
    book = ADACACHE_CODEBOOKS["fast"][30]
    assert play(AdaCache(FAST, rule="code"), 30, changes)[0] == reference_code(30, changes, book)[0]


@given(changes30, motions30)
def test_code_rule_with_motion_keeps_its_last_score_across_generations(changes, motions):
    book, policy = ADACACHE_CODEBOOKS["fast"][30], AdaCache(FAST, MoReg(), rule="code")
    first, state = play(policy, 30, changes, motions)
    want, prev = reference_code(30, changes, book, motions)
    assert first == want
    second, _ = play(policy, 30, changes, motions, before=state)
    assert second == reference_code(30, changes, book, motions, prev_moreg=prev)[0]


@given(changes30, motions30)
def test_vdcache_rule_uses_elapsed_steps_and_a_clean_state(changes, motions):
    policy = AdaCache(FAST, MoReg(), rule="vdcache")
    computed, state = play(policy, 30, changes, motions)
    last, rate, m_before, want = 0, 1, 1.0, [0]
    for step in range(1, 30):
        if step - last < rate and step < 28:
            continue
        k = step - last
        change = changes[step] / k
        if 4 <= step + 1 <= 26:
            m = (motions[step] / 0.385) ** 8
            change *= m + abs(10 * (m - m_before) / k)
            m_before = m
        rate = next((r for t, r in FAST.entries[:-1] if change < t), FAST.entries[-1][1])
        last = step
        want.append(step)
    assert computed == want
    assert play(policy, 30, changes, motions, before=state)[0] == computed, "no generation remembers another"


@given(changes30, motions30)
def test_paper_rule_is_equations_4_to_9(changes, motions):
    policy = AdaCache(FAST, MoReg(), rule="paper")
    computed, _ = play(policy, 30, changes, motions)
    last, rate, m_before, want = 0, 1, None, [0]
    for step in range(1, 30):
        if step - last < rate and step < 28:
            continue
        k = step - last
        c = changes[step] / k  # (4)
        m = motions[step]  # (7)
        mg = 0.0 if m_before is None else (m - m_before) / k  # (8)
        c = c * (m + mg)  # (9), signed
        rate = next((r for t, r in FAST.entries[:-1] if c < t), FAST.entries[-1][1])  # (5)
        m_before, last = m, step
        want.append(step)  # (6)
    assert computed == want


@given(st.integers(1, 8), st.integers(1, 40))
def test_every_n(n, steps):
    computed, _ = play(EveryN(n), steps, [0.0] * steps)
    assert computed == [s for s in range(steps) if s % n == 0 or s == steps - 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_measure_that_is_no_number_recomputes(bad):
    computed, _ = play(AdaCache(FAST), 10, [bad] * 10)
    assert computed == list(range(10))
    computed, _ = play(AdaCache(FAST, MoReg(window=(1, 30))), 30, [0.01] * 30, [bad] * 10 + [0.3] * 20)
    assert computed[:11] == list(range(11)) and len(computed) < 30, "it recovers"


def test_codebooks_are_checked():
    with pytest.raises(ConfigError, match="thresholds ascending"):
        adacache([(0.2, 3), (0.1, 2)])
    with pytest.raises(ConfigError, match=r"rates whole steps of at least 1; got \(\(0.1, 2\), \(0.2, 0\)\)"):
        adacache({0.1: 2, 0.2: 0})
    with pytest.raises(ConfigError, match="at least one"):
        adacache([])
    with pytest.raises(ConfigError, match="published the codebooks fast, slow"):
        adacache("medium")
    with pytest.raises(ConfigError, match="rule is 'vdcache', 'paper' or 'code'; got 'papers'"):
        adacache(rule="papers")
    assert adacache([(0.1, 4), (0.2, 3), (0.3, 2), (1.0, 1)]).policy.codebook.rate(0.15) == 3
    assert adacache([(0.5, 2)]).policy.codebook.rate(99.0) == 2


def test_published_codebooks_by_steps():
    said = []
    fast = recipe("adacache-fast")
    assert dict(fast.for_steps(100, said.append).policy.codebook.entries) == ADACACHE_CODEBOOKS["fast"][100] and not said
    assert dict(fast.for_steps(30, said.append).policy.codebook.entries) == ADACACHE_CODEBOOKS["fast"][30] and not said
    half = fast.for_steps(15, said.append).policy.codebook
    assert [r for _, r in half.entries] == [3, 2, 2, 2, 1, 1] and "no codebook for 15 steps" in said[0]
    recipe("adacache-slow").for_steps(100, said.append)
    assert "no codebook for 100 steps; one for 100 that nobody published" in said[1]
    assert "30 and 100" not in describe("adacache-slow").constants and "30 and 100" in describe("adacache-fast").constants


@pytest.mark.parametrize("plus", ["", "+moreg"])
def test_slow_never_reuses_longer_than_fast(plus):
    slow, fast = recipe(f"adacache-slow{plus}"), recipe(f"adacache-fast{plus}")
    changes = [i / 200 for i in range(100)]
    for steps in range(3, 301):
        books = [r.for_steps(steps).policy.codebook for r in (slow, fast)]
        assert all(books[0].rate(c) <= books[1].rate(c) for c in changes), steps
    for steps in (30, 50, 65, 66, 67, 100, 150):  # published: 3 steps for 6, 2 for 5 … at 30
        still = [0.01] * steps
        computed = [len(play(r.for_steps(steps).policy, steps, still)[0]) for r in (slow, fast)]
        assert computed[0] > computed[1], "it is the slower one, not an equal one"


@pytest.mark.parametrize("layers", [1, 2])
def test_a_window_of_the_users_is_kept(layers):
    def motions(made):
        policy = made.for_steps(30).policy
        return [p.moreg for p in getattr(policy, "policies", [policy])]

    own = MoReg(window=(1, 30), scale=0.2)
    assert motions(adacache("fast", moreg=own, layers=layers)) == [own] * layers
    for motion in motions(adacache("fast", moreg=True, layers=layers)):
        assert [s for s in range(30) if motion.applies(s, 30)] == list(range(3, 26))
        assert [s for s in range(100) if motion.applies(s, 100)] == list(range(9, 90))


def test_the_printed_equations_have_no_window():
    quiet, loud = [0.1] * 30, [10.0] * 30  # by equation 9 a motion of 10 makes every change 10 times larger
    policy = adacache("fast", moreg=True, rule="paper").for_steps(30).policy
    computed, _ = play(policy, 30, quiet, loud)
    assert computed == list(range(30))
    windowed, _ = play(replace(policy, moreg=MoReg(window=(4, 26))), 30, quiet, loud)
    assert windowed != computed, "a window that the user gives holds under every rule"


def test_recipes_survive_json(tmp_path):
    for name in ("always", "every-4", "adacache-slow", "adacache-fast+moreg"):
        path = tmp_path / "r.json"
        text = recipe(name).to_json(path)
        assert recipe(name).from_json(text) == recipe(name).from_json(path) == recipe(name)
        assert name in str(recipe(name))


def test_a_change_on_a_threshold_belongs_to_the_next_entry():
    book = Codebook.of({0.1: 4, 0.2: 2, 1.0: 1})
    assert [book.rate(c) for c in (0.0999, 0.1, 0.1999, 0.2, 5.0)] == [4, 2, 2, 1, 1]


@pytest.mark.parametrize(("rule", "k"), [("code", 6), ("vdcache", 1), ("paper", 1)])
def test_a_change_is_shared_among_the_steps_that_the_rule_counts(rule, k):
    """At the end steps are computed before the rate has passed: the reference code divides by the rate all the same."""
    policy = AdaCache(Codebook.of({0.2: 6, 1.0: 1}), rule=rule)
    state = policy.observe(AdaState(10, last=7, rate=6), 8, RECOMPUTE, [MetricValue("all/x", 0.6, 0.6)])
    assert state.trace == ((8, pytest.approx(0.6 / k), 6 if k == 6 else 1),)
