"""Every method's policy, with the constants of `vdcache.methods`, against a literal restatement of the published rule: computed steps are the same, exactly.

Where a difference is meant, a test of its own says which.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.support import published_rules as rules
from tests.support.predicting import Predicting
from vdcache.methods import (
    MAGCACHE_RATIOS,
    PAB,
    TEACACHE_COEFFICIENTS,
    dbcache,
    delta_dit,
    easycache,
    fastercache,
    fbcache,
    fora,
    l2c,
    magcache,
    pab,
    recipe,
    seacache,
    smoothcache,
    taylorseer,
    teacache,
    tgate,
)
from vdcache.passes.predictors import predictor_of
from vdcache.policies import RECOMPUTE, BroadcastWindow, MagCache, MetricValue, Plan, SchedulePolicy, TimestepWindow

steps_st = st.integers(1, 60)
seeds = st.integers(0, 2**32)


def play(policy, num_steps, probe=None, measures=None, times=()):
    """The plans of a generation. `probe(step, computed)` and `measures(step, computed)` say what is measured, given the steps computed so far."""
    state = policy.start(num_steps)
    plans, computed = [], []
    for step in range(num_steps):
        plan = policy.plan(state, step, tuple(times[: step + 1]))
        if plan is None:
            state, plan = policy.decide(state, step, probe(step, computed))
        assert plan in policy.plans()
        seen = measures(step, computed) if measures and not plan else None
        if not plan:
            computed.append(step)
        state = policy.observe(state, step, plan, seen)
        plans.append(plan)
    return plans


def steps_of(plans, group="all"):
    return [s for s, p in enumerate(plans) if group not in p.reuse]


def one(change):
    return (MetricValue("all/probe", change, change),)


class Pairs:
    """Changes between pairs of steps. Coarse ones are sixteenths, so that ties happen and sums are exact."""

    def __init__(self, seed, coarse):
        self.random, self.coarse, self.known = random.Random(seed), coarse, {}

    def __call__(self, p, t):
        if (p, t) not in self.known:
            self.known[p, t] = self.random.randrange(6) / 16 if self.coarse else self.random.random() * 0.3
        return self.known[p, t]

    def probe(self, step, computed):
        return one(self(computed[-1], step))


class Changes(list):
    """Changes from one step to the next; what the step before computed plays no part."""

    def __init__(self, seed, n, coarse=False):
        self.random = random.Random(seed)
        super().__init__(self.random.randrange(6) / 16 if coarse else self.random.random() * 0.3 for _ in range(n))

    def probe(self, step, computed):
        return one(self[step])


thresholds = st.sampled_from([0.0, 1 / 16, 0.08, 1 / 8, 0.2, 5 / 16])

# ---- first-block and dual-block caches -------------------------------------------------------------------------------


@given(seeds, st.booleans(), thresholds, steps_st)
def test_fbcache(seed, coarse, threshold, n):
    """The published rule is inclusive (it recomputes above the threshold), ours is strict as everywhere: a tie recomputes."""
    r = Pairs(seed, coarse)
    want = rules.fbcache(r, math.nextafter(threshold, -1), n)
    assert steps_of(play(fbcache(threshold).policy, n, r.probe)) == want
    if not coarse:
        assert want == rules.fbcache(r, threshold, n)


@given(
    seeds,
    st.booleans(),
    thresholds,
    steps_st,
    st.integers(0, 12),
    st.integers(0, 4),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_dbcache(seed, coarse, threshold, n, warm_up, max_consecutive, max_total, limit):
    """No limit is 0 here, and −1 there; a threshold of 1 or more, which there always hits, is compared here as any other."""
    r = Pairs(seed, coarse)
    made = dbcache(1, 0, threshold, warm_up=warm_up, max_consecutive=max_consecutive, max_total=max_total, limit=limit)
    want = rules.dbcache(
        r,
        n,
        threshold,
        warmup=warm_up,
        max_cached=max_total or -1,
        max_continuous=max_consecutive or -1,
        max_accumulated=limit or None,
    )
    assert steps_of(play(made.policy, n, r.probe)) == want


@given(seeds, steps_st)
def test_dbcache_defaults_are_the_published_ones(seed, n):
    r = Pairs(seed, False)
    assert steps_of(play(dbcache().policy, n, r.probe)) == rules.dbcache(r, n)
    assert dbcache().passes[0].start == 8 and dbcache().passes[2].blocks == 8 and dbcache().passes[0].stop is None
    assert recipe("dbcache-8-0-0.08") == dbcache()


masks = [[int(m) for m in text] for own in rules.SCM.values() for text in own.values()]


@given(seeds, st.booleans(), thresholds, steps_st, st.sampled_from(masks), st.integers(0, 12))
def test_dbcache_with_a_mask(seed, coarse, threshold, n, mask, warm_up):
    assume(warm_up <= mask.index(0))
    r = Pairs(seed, coarse)
    made = dbcache(1, 0, threshold, warm_up=warm_up, mask=mask)
    assert steps_of(play(made.policy, n, r.probe)) == rules.dbcache(r, n, threshold, warmup=warm_up, mask=mask)


@given(seeds, st.sampled_from(masks))
@example(0, masks[-1])
def test_dbcache_cuts_its_warm_up_to_the_leading_ones_of_a_mask(seed, mask):
    r = Pairs(seed, False)
    n = len(mask)
    assert steps_of(play(dbcache(mask=mask, threshold=0.2).policy, n, r.probe)) == rules.dbcache(r, n, 0.2, mask=mask)


# ---- TeaCache, SeaCache ----------------------------------------------------------------------------------------------


@given(seeds, st.lists(st.floats(-5, 5), min_size=1, max_size=6), thresholds, steps_st, st.integers(1, 6), st.booleans())
def test_teacache(seed, coefficients, threshold, n, first, last):
    """Random polynomials, negative values among them."""
    change = Changes(seed, n)
    made = teacache(threshold, coefficients, first=first, last=int(last))
    want = rules.teacache(change, coefficients, threshold, n, first, None if last else n)
    assert steps_of(play(made.policy, n, change.probe)) == want


@given(seeds, st.booleans(), thresholds, steps_st)
def test_teacache_without_a_polynomial_adds_up_changes(seed, coarse, threshold, n):
    change = Changes(seed, n, coarse)
    assert steps_of(play(teacache(threshold).policy, n, change.probe)) == rules.teacache(change, (1.0, 0.0), threshold, n)


@pytest.mark.parametrize("model", [m for m in TEACACHE_COEFFICIENTS if not m.endswith("-ret")])
@given(seeds, st.sampled_from([0.05, 0.1, 0.25, 0.8]), st.sampled_from([2, 28, 30, 50]))
@settings(max_examples=10)
def test_teacache_of_a_model(model, seed, threshold, n):
    change = Changes(seed, n)
    made = recipe(f"teacache-{model}-{threshold}")
    want = rules.teacache(change, TEACACHE_COEFFICIENTS[model], threshold, n)
    assert steps_of(play(made.policy, n, change.probe)) == want
    assert made.passes[-1].reference_step == "step" and made.passes[-1].location == (
        "timestep" if model.startswith("wan") else "modulated"
    )


@pytest.mark.parametrize("model", [m for m in TEACACHE_COEFFICIENTS if m.endswith("-ret")])
@given(seeds, st.sampled_from([0.05, 0.1, 0.2]), st.sampled_from([2, 28, 30, 50]))
@settings(max_examples=10)
def test_teacache_with_retained_steps_computes_five_first_and_no_last(model, seed, threshold, n):
    change = Changes(seed, n)
    made = recipe(f"teacache-{model}-{threshold}")
    want = rules.teacache(change, TEACACHE_COEFFICIENTS[model], threshold, n, 5, n)
    assert steps_of(play(made.policy, n, change.probe)) == want


@given(seeds, st.booleans(), thresholds, steps_st)
def test_seacache(seed, coarse, threshold, n):
    """As for HunyuanVideo. Wan's script compares a filtered with an unfiltered signal after its forced steps: a slip that is not followed."""
    change = Changes(seed, n, coarse)
    made = seacache(threshold)
    assert steps_of(play(made.policy, n, change.probe)) == rules.seacache(change, threshold, n)
    assert (made.passes[-1].location, made.passes[-1].reference_step, made.passes[-1].filter) == ("modulated", "step", "wiener")


# ---- EasyCache -------------------------------------------------------------------------------------------------------


class Loop:
    """A denoising loop in numbers: the next latent depends on what the model, or the cache, has returned."""

    def __init__(self, seed, n, width=5):
        self.random = random.Random(seed)
        self.drift = [[self.random.gauss(0, 0.05) for _ in range(width)] for _ in range(n)]
        self.x = [[self.random.gauss(0, 1) for _ in range(width)]]
        self.outputs, self.kept = {}, None

    def on_step(self, t, compute):
        x = self.x[t]
        if compute:
            self.outputs[t] = [math.tanh(1.3 * a) + 0.1 * t * d for a, d in zip(x, self.drift[t], strict=True)]
            self.kept = [o - a for o, a in zip(self.outputs[t], x, strict=True)]
        output = [a + k for a, k in zip(x, self.kept, strict=True)]
        self.x.append([a - 0.05 * o + d for a, o, d in zip(x, output, self.drift[t], strict=True)])

    def dx(self, s, t):
        return mean(abs(a - b) for a, b in zip(self.x[s], self.x[t], strict=True))

    def dout(self, p, t):
        return mean(abs(a - b) for a, b in zip(self.outputs[p], self.outputs[t], strict=True))

    def norm(self, p):
        return mean(abs(a) for a in self.outputs[p])


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@given(seeds, st.sampled_from([0.0, 0.025, 0.05, 0.2, 1.0]), steps_st, st.integers(1, 8))
def test_easycache_in_a_closed_loop(seed, threshold, n, first):
    reference, loop = Loop(seed, n), Loop(seed, n)
    want = rules.easycache(reference.dx, reference.dout, reference.norm, threshold, n, first, reference.on_step)

    policy = easycache(threshold, first=first).policy
    state, computed = policy.start(n), []
    for t in range(n):
        plan = policy.plan(state, t)
        if plan is None:
            state, plan = policy.decide(state, t, (MetricValue("all/probe.input", 0.0, loop.dx(t - 1, t)),))
        loop.on_step(t, not plan)
        seen = None
        if not plan:
            if computed:
                p = computed[-1]
                seen = (
                    MetricValue("all/observed.input", 0.0, loop.dx(p, t)),
                    MetricValue("all/observed.output", 0.0, loop.dout(p, t), loop.norm(t)),
                )
            computed.append(t)
        state = policy.observe(state, t, plan, seen)
    assert computed == want
    assert easycache().passes[-1].reference_step == "step" and easycache().policy.bounds.first == 5


# ---- MagCache --------------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([0.0, 0.02, 0.06, 0.12, 0.24]), steps_st, st.integers(1, 6), st.floats(0, 1))
def test_magcache(seed, threshold, n, most, retention):
    ratios = [1.0, *(1 + random.Random(seed + i).uniform(-0.08, 0.04) for i in range(n - 1))]
    made = magcache(ratios, threshold=threshold, max_consecutive=most, retention=retention)
    assert steps_of(play(made.policy, n)) == rules.magcache(ratios, threshold, most, retention, n)


@pytest.mark.parametrize("model", rules.MAGCACHE)
def test_magcache_of_a_model(model):
    """The published lists, of the conditional lane for Wan, with each model's limits (METHODS.md V.1, the scripts). FLUX's script also always computes
    its eleventh step of 28, which ours does not."""
    limits = {"wan2.1-t2v-14b": (0.24, 6, 0.2), "flux": (0.24, 5, 0.1)}
    limits |= dict.fromkeys(("hunyuanvideo-720p", "hunyuanvideo-544p"), (0.24, 6, 0.2))
    threshold, most, retained = limits.get(model, (0.12, 4, 0.2))
    assert set(rules.MAGCACHE) == set(MAGCACHE_RATIOS)
    published = rules.MAGCACHE[model]
    own = published[::2] if model.startswith("wan") else published
    assert tuple(own) == MAGCACHE_RATIOS[model]
    for n in (len(own), 20, 25, 30, 33, 40, 50):
        found = steps_of(play(recipe(f"magcache-{model}").policy, n))
        assert found == rules.magcache(rules.nearest(own, n), threshold, most, retained, n)
        if model.startswith("wan"):
            both = [x for pair in zip(rules.nearest(published[::2], n), rules.nearest(published[1::2], n)) for x in pair]
            assert found == rules.magcache_wan(both, threshold, most, retained, n)[0]


@pytest.mark.parametrize("have", [28, 40, 50])
def test_magcache_takes_the_nearest_ratio(have):
    """At three numbers of steps a fraction of exactly one half is met: the published code has it in binary and rounds the other way."""
    other = {(28, 99), (40, 75), (50, 71)}
    for n in range(2, 101):
        ratios = [1.0, *(1 + 0.001 * i for i in range(1, have))]
        policy = MagCache(tuple(ratios), threshold=0.03 * 50 / n, max_consecutive=3, retention=0.2)
        same = steps_of(play(policy, n)) == rules.magcache(rules.nearest(ratios, n), 0.03 * 50 / n, 3, 0.2, n)
        assert same or (have, n) in other


@given(seeds, st.integers(2, 60))
def test_magcache_for_hunyuanvideo_rounds_the_retained_steps_down_and_we_round(seed, n):
    ratios = [1.0, *(1 + random.Random(seed + i).uniform(-0.05, 0.05) for i in range(n - 1))]
    found = steps_of(play(magcache(ratios).policy, n))
    if int(0.2 * n) == int(0.2 * n + 0.5):
        assert found == rules.magcache(ratios, 0.12, 4, 0.2, n, half_up=False)


# ---- attention: PAB, T-GATE, FasterCache -----------------------------------------------------------------------------


def schedule(seed, n, whole=True):
    """Timesteps from 1000 down, all different."""
    found = random.Random(seed)
    times = found.sample(range(1, 1001), n) if whole else [found.uniform(0, 1000) for _ in range(n)]
    return sorted(times, reverse=True)


@given(seeds, st.booleans(), steps_st, st.integers(2, 8))
def test_pab_of_attention(seed, whole, n, distance):
    """Windows that begin and end at timesteps of the schedule; timesteps from 1 to 0 are the same ones."""
    times = schedule(seed, n, whole)
    window = tuple(sorted(random.Random(seed).sample(sorted({0, 1000, *times}), 2)))
    policy = pab(distance, window=window).policy
    want = rules.pab(times, distance, window)
    assert steps_of(play(policy, n, times=times), "spatial") == want
    if whole and times[0] > 1:
        assert steps_of(play(policy, n, times=[t / 1000 for t in times]), "spatial") == want


@given(seeds, st.integers(3, 60), st.integers(1, 5), st.integers(1, 4))
def test_pab_of_mlps(seed, n, keys, skip):
    """Keys that the schedule holds. Others are ignored there; here the first step below one stands for it, as the next test says."""
    times = schedule(seed, n)
    chosen = random.Random(seed).sample(times, min(keys, n))
    made = pab(2, mlp=(tuple(chosen), 4, skip))
    assert steps_of(play(made.policy, n, times=times), "mlp") == rules.pab_mlp(times, chosen, skip)


def test_pab_finds_a_key_between_two_timesteps():
    assert rules.pab_mlp([900, 800, 700, 600, 500], [750], 2) == [0, 1, 2, 3, 4]
    plans = play(pab(2, mlp=((750,), 4, 2)).policy, 5, times=[900, 800, 700, 600, 500])
    assert steps_of(plans, "mlp") == [0, 1, 2], "700 is the first at or below 750"


@pytest.mark.parametrize("model", PAB)
@pytest.mark.parametrize("n", [30, 50, 100])
def test_pab_of_a_model(model, n):
    (spatial, temporal, cross), window, mlp = PAB[model]
    times = [round(1000 * (n - i) / n) for i in range(n)]
    if mlp:
        keys, _, skip = mlp
        times = sorted({*times, *keys}, reverse=True)  # the code looks keys up in the schedule
        n = len(times)
    plans = play(recipe(f"pab-{model}").policy, n, times=times)
    for group, distance in (("spatial", spatial), ("temporal", temporal), ("cross", cross)):
        assert steps_of(plans, group) == (rules.pab(times, distance, window) if distance else list(range(n)))
    assert steps_of(plans, "mlp") == (rules.pab_mlp(times, keys, skip) if mlp else list(range(n)))


def test_pab_constants():
    """VideoSys: distances of spatial, temporal and cross-attention, windows, and of MLPs the timesteps and how many steps they rest."""
    assert PAB["open-sora"] == ((2, 4, 6), (450, 930), ((864, 788, 676), 10, 2))
    assert PAB["cogvideox"] == ((2, 0, 0), (100, 850), None)
    assert PAB["latte"][2] == ((720, 640, 560, 480, 400), 10, 2)
    assert PAB["open-sora-plan"][2] == (tuple(range(738, 425, -24)), 14, 2)


def test_without_timesteps_steps_are_equally_long():
    policy = TimestepWindow(2, (450, 930))
    assert steps_of(play(policy, 20)) == rules.pab([1000 * (1 - s / 20) for s in range(20)], 2, (450, 930))
    assert steps_of(play(BroadcastWindow((800.0,), 2), 10)) == [0, 1, 2, 5, 6, 7, 8, 9]


@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 7), st.integers(1, 4), st.integers(0, 6))
def test_tgate(n, gate, interval, after, warm_up):
    """Which steps compute. What one lane of guidance alone would do after the gate is the caller's."""
    assume(gate <= n)
    made = tgate(gate, interval=interval, warm_up=warm_up, after=after, of_steps=n)
    want = rules.tgate(n, gate, interval, after, warm_up)
    plans = play(made.policy, n)
    assert {"cross": steps_of(plans, "cross"), "self": steps_of(plans, "self")} == want


def test_tgate_defaults():
    plans = play(recipe("t-gate-10").policy, 25)
    assert {g: steps_of(plans, g) for g in ("cross", "self")} == rules.tgate(25)
    assert all(p.gate == "pre" for p in tgate().passes)


@pytest.mark.parametrize(("model", "made_for"), [("open-sora", 30), ("latte", 50), ("cogvideox", 50)])
@given(seeds)
@settings(deadline=None, max_examples=10)
def test_fastercache(model, made_for, seed):
    """Steps and values. Both lanes run at every step here, so the kept batch is never smaller than the current one."""
    values = [random.Random(seed + i).gauss(0, 1) for i in range(made_for)]
    made = fastercache(model)
    computed = steps_of(play(made.policy, made_for), "attention")
    assert computed == rules.fastercache_attention(made_for, model)
    predictor = predictor_of(made.predictor, "attention")
    got, predicting = [], Predicting(predictor)
    for step, value in enumerate(values):
        if step in computed:
            predicting.computed(step, torch.tensor(value))
            got.append(value)
        else:
            got.append(predicting.predicted(step).item())
    assert got == pytest.approx(rules.fastercache_attention_values(values, made_for, model), rel=1e-5, abs=1e-5)


# ---- schedules -------------------------------------------------------------------------------------------------------


@given(steps_st, st.integers(1, 12))
def test_fora(n, interval):
    assert steps_of(play(fora(interval).policy, n)) == rules.fora(n, interval)


@given(steps_st, st.integers(1, 10), st.integers(1, 4))
def test_taylorseer(n, interval, first):
    """A generation no longer than the first steps has nothing to reuse, and is refused."""
    assume(n >= first)
    made = taylorseer(interval, 1, first=first)
    assert steps_of(play(made.policy, n)) == rules.taylorseer(n, interval, first)
    assert taylorseer(interval, 1) == recipe(f"taylorseer-{interval}-1")


@given(st.integers(5, 60), st.integers(2, 8), st.integers(0, 4), st.integers(1, 3))
def test_taylorseer_uses_as_many_orders_as_published(n, interval, order, first):
    """Of every reused step. After three first steps the published code has order 1, where three values would allow 2: ours uses 2 until the next computed step."""
    computed = rules.taylorseer(n, interval, first)
    published = rules.taylorseer_orders(computed, order, first)
    ours = {t: min(order, count) for count, t in enumerate(computed)}  # Taylor: an order more for each value
    for t in computed:
        reused_after = t + 1 < n and t + 1 not in computed
        if reused_after and not (first == 3 and order >= 2):
            assert ours[t] == published[t]
        elif reused_after:
            assert ours[t] in (published[t], published[t] + 1)


@given(st.integers(1, 60), st.integers(1, 8), st.floats(0.1, 0.9))
def test_delta_dit(n, interval, switch):
    plans = play(delta_dit(interval, switch=switch).policy, n)
    want = [Plan.of([left]) if left else RECOMPUTE for left in rules.deltadit(n, interval, round(switch * n))]
    assert plans == want


@given(seeds, st.integers(4, 60), st.sampled_from([0.0, 0.08, 0.18, 0.35]))
def test_smoothcache(seed, n, alpha):
    """The greedy schedule of a calibration, as the list that the published files hold."""
    numbers = random.Random(seed)
    lists = {}
    for kind in ("attn1", "attn2", "ff"):
        errors = [[numbers.uniform(0, 0.4) for _ in range(n - k)] for k in (1, 2, 3)]
        lists[kind] = rules.smoothcache(errors, alpha, n)
    plans = play(smoothcache({k: [int(s in v) for s in range(n)] for k, v in lists.items()}).policy, n)
    for kind, group in (("attn1", "attn"), ("attn2", "cross"), ("ff", "mlp")):
        assert steps_of(plans, group) == lists[kind]


@given(seeds, st.integers(1, 20), st.integers(1, 4), st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_l2c(seed, half, blocks, threshold):
    numbers, n = random.Random(seed), 2 * half
    scores = [[numbers.choice([0.0, 0.1, 0.5, numbers.random()]) for _ in range(2 * blocks)] for _ in range(n)]
    plans = play(l2c(scores, threshold).policy, n)
    for plan, computed in zip(plans, rules.l2c(scores, threshold, n), strict=True):
        skipped = set(range(2 * blocks)) - computed
        assert plan.reuse == {f"b{m // 2}.{'mlp' if m % 2 else 'attention'}" for m in skipped}


def test_the_oracles_reach_both_outcomes():
    """The comparisons above prove nothing where everything, or nothing, is reused."""
    r, change = Pairs(0, False), Changes(0, 30)
    loop = Loop(0, 30)
    for computed in (
        rules.fbcache(r, 0.1, 30),
        rules.dbcache(r, 30, 0.1),
        rules.teacache(change, (1.0, 0.0), 0.2, 30),
        rules.easycache(loop.dx, loop.dout, loop.norm, 0.2, 30, 5, loop.on_step),
        *(rules.magcache(rules.nearest(own, 30), 0.12, 4, 0.2, 30) for own in rules.MAGCACHE.values()),
    ):
        assert 1 < len(computed) < 30 and any(b - a > 1 for a, b in itertools.pairwise(computed))
    assert isinstance(fora(3).policy, SchedulePolicy)
