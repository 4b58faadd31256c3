"""What a policy is told to do from one uncached generation, against what it does: on latents that no output touches, so that cached and
uncached runs are given the same."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import vdcache
from tests.calibration.samplers import sigmas
from tests.support.thorough import some
from vdcache import Recipe
from vdcache.calibration.metric_log import MetricRecorder, replayed
from vdcache.demo.model import DemoConfig, DemoDiT
from vdcache.errors import ConfigError
from vdcache.policies.adacache import Codebook
from vdcache.policies.metrics import MetricSpec
from vdcache.testing import latent

STEPS = 16
SMALL = DemoConfig(
    num_attention_heads=1,
    attention_head_dim=16,
    in_channels=3,
    text_dim=4,
    freq_dim=16,
    ffn_dim=16,
    num_layers=3,
    patch_size=(1, 2, 2),
)
TEXTS = latent(98, 1, 3, 4), latent(99, 1, 3, 4)


@functools.cache
def model():
    torch.manual_seed(0)
    return DemoDiT(SMALL).eval().requires_grad_(False)


@functools.cache
def path(seed):
    """Latents of a generation that goes its way whatever the model says: fast, slow, fast."""
    a, b, c = (latent(3 * seed + i, 1, 3, 3, 4, 4) for i in range(3))
    at = np.cumsum(np.random.default_rng(seed).choice([0.02, 0.1, 0.5], STEPS))
    return [a * float(np.cos(s)) + b * float(np.sin(s)) + 0.2 * c * float(np.sin(3 * s)) for s in at]


def run(fast, seed, lanes=1):
    with torch.no_grad():
        for level, x in zip(sigmas(STEPS), path(seed), strict=False):
            for text in TEXTS[:lanes]:
                fast(x, torch.tensor([1000 * level]), text)


KINDS = {
    "adacache": vdcache.methods.adacache("fast"),
    "adacache-paper": vdcache.methods.adacache("fast", rule="paper"),
    "adacache-code": vdcache.methods.adacache("fast", rule="code"),
    "adacache-l2": vdcache.methods.adacache("fast", distance="l2"),
    "adacache-cosine": vdcache.methods.adacache("fast", distance="cosine"),
    "adacache-blocks": vdcache.methods.adacache("fast", blocks=(0, 2)),
    "adacache-moreg": vdcache.methods.adacache("fast", moreg=True),
    "adacache-moreg-paper": vdcache.methods.adacache("fast", moreg=True, rule="paper"),
    "adacache-layers": vdcache.methods.adacache("fast", layers=2),
    "fbcache": vdcache.methods.fbcache(0.1),
    "dbcache": vdcache.methods.dbcache(1, 1, 0.1, warm_up=2, max_consecutive=3),
    "dbcache-limit": vdcache.methods.dbcache(1, 0, 0.1, warm_up=1, limit=1.0),
    "teacache": vdcache.methods.teacache(0.1),
    "teacache-polynomial": vdcache.methods.teacache(0.1, (3.0, -1.0, 0.5, 0.01)),
    "teacache-timestep": vdcache.methods.teacache(0.1, location="timestep"),
    "seacache": vdcache.methods.seacache(0.1),
    "seacache-input": vdcache.methods.seacache(0.1, location="input"),
    "easycache": vdcache.methods.easycache(0.05, first=3),
}


@functools.cache
def measured(kind, lanes=1):
    return vdcache.calibrate(
        model(), lambda m, seed: run(m, seed, lanes), KINDS[kind], prompts=[0, 1], inner="eager", console=Console(quiet=True)
    )


def variations(kind, seen):
    """The recipe with other thresholds, between those of what was measured."""
    recipe = replace(KINDS[kind].for_steps(STEPS), books=())
    changes = sorted(seen.changes())
    between = [(changes[i] + changes[i + 1]) / 2 for i in (len(changes) // 5, len(changes) // 2, 4 * len(changes) // 5)]
    if kind.startswith("adacache"):
        absolute = [m.change_absolute for own in seen.pairs.values() for m in own.values()]
        of = sorted(absolute) if "paper" in kind else changes
        low, high = of[len(of) // 4], of[3 * len(of) // 4]
        books = [
            Codebook(((low, a), ((low + high) / 2, b), (high, c), (9e9, 1))) for a, b, c in ((6, 4, 2), (3, 2, 1), (2, 5, 3))
        ]
        if kind == "adacache-layers":
            return [
                replace(
                    recipe,
                    policy=replace(recipe.policy, policies=tuple(replace(p, codebook=b) for p in recipe.policy.policies)),
                )
                for b in books
            ]
        return [replace(recipe, policy=replace(recipe.policy, codebook=b)) for b in books]
    factors = (
        (1.0, 1.7, 3.1)
        if recipe.policy.__class__.__name__ == "EasyCache" or "teacache" in kind or "seacache" in kind
        else (1.0,)
    )
    return [replace(recipe, policy=replace(recipe.policy, threshold=f * t)) for t in between for f in factors]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(kind):
    return vdcache.compile(model(), KINDS[kind], num_steps=STEPS, inner="eager", strict=True)


def really(fast, recipe, seed, lanes=1):
    """The groups that each step reused under the policy of a recipe that differs in its thresholds alone."""
    session = fast.vdcache
    session.policy, session.prepare = recipe.policy, lambda steps: recipe.policy
    session.begin(STEPS)
    run(fast, seed, lanes)
    found = [frozenset()] * STEPS
    for r in session.history.generation():
        assert bool(r.reused) == bool(r.plan) and not r.why
        found[r.step] = r.plan.reuse
    return found


# one of every policy and place; other rules and distances of the same policy are left to `make thorough`
A_FEW = {"adacache-paper", "adacache-layers", "dbcache-limit", "teacache-timestep", "seacache-input", "easycache"}


@pytest.mark.parametrize("kind", some(KINDS, A_FEW.__contains__))
def test_replayed_is_what_really_happens(kind):
    thresholds, different, fast = measured(kind), set(), compiled(kind)
    for seed in (0, 1):
        seen = thresholds.seen[seed]
        assert seen.steps == STEPS and seen.times == pytest.approx([1000 * s for s in sigmas(STEPS)[:-1]])
        own = variations(kind, seen)
        for recipe in own[seed::2][:1] if kind != "adacache-layers" else own[:1]:
            plans = [p.reuse for p in replayed(recipe.policy, seen)]
            assert plans == really(fast, recipe, seed), recipe.policy
            different.add(tuple(plans))
    assert len(different) > 1  # thresholds matter here, and so does what is seen
    assert any(any(p) and not all(p[1:]) for p in different)


@pytest.mark.parametrize("kind", some(["adacache-moreg", "teacache", "fbcache"], lambda kind: kind != "teacache"))
def test_lanes_are_added_up(kind):
    seen, fast = measured(kind, 2).seen[1], compiled(kind)
    for recipe in variations(kind, seen)[:2]:
        assert [p.reuse for p in replayed(recipe.policy, seen)] == really(fast, recipe, 1, 2)


def test_schedules_and_every_n_need_nothing_measured():
    seen = measured("fbcache").seen[0]
    assert [bool(p) for p in replayed(vdcache.Schedule(STEPS, (0, 3, 9)).policy(), seen)] == [
        s not in (0, 3, 9) for s in range(STEPS)
    ]


def test_expected_counts_steps_of_which_some_part_is_computed():
    found = measured("adacache-layers")
    recipe = variations("adacache-layers", found.seen[0])[0]
    plans = [replayed(recipe.policy, s) for s in found.seen]
    shares = [sum(len(p.reuse) < 2 for p in own) / STEPS for own in plans]
    got = found.expected(recipe)
    assert (got.low, got.high) == (min(shares), max(shares)) and got.mean == pytest.approx(sum(shares) / 2)


# --- watching ------------------------------------------------------------------------------------------------------------------


def test_measures_by_hand():
    watching, values = MetricRecorder(4), [latent(s, 2, 3, 5) for s in range(4)]
    layouts = [MetricSpec("a/observed.x", d) for d in ("l1",)] + [
        MetricSpec("a/observed.y", "l2"),
        MetricSpec("a/observed.z", "cosine"),
    ]
    for v in values:
        watching.add(0, {f"a/observed.{k}": v for k in "xyz"}, layouts, ())
    seen = watching.measures()
    for (early, late), m in seen.pairs["a/observed.x"].items():
        p, r = values[early].double(), values[late].double()
        assert m.change == pytest.approx(((p - r).abs().sum() / p.abs().sum()).item(), rel=1e-5)
        assert m.change_absolute == pytest.approx((p - r).abs().mean().item(), rel=1e-5)
        own = seen.pairs["a/observed.y"][early, late]
        assert own.change == pytest.approx(((p - r).norm() / p.norm()).item(), rel=1e-5)
        own = seen.pairs["a/observed.z"][early, late]
        assert own.change == pytest.approx(1 - ((p * r).sum() / p.norm() / r.norm()).item(), rel=1e-4)
    assert set(seen.pairs["a/observed.x"]) == {(a, b) for b in range(4) for a in range(b)}
    assert len(seen.changes()) == 3 * 3 and watching.bytes == 3 * 4 * 30 * 4


def test_lanes_of_unequal_length_are_refused():
    watching = MetricRecorder(4)
    layouts = [MetricSpec("a/observed.x", "l1")]
    watching.add(0, {"a/observed.x": latent(0)}, layouts, ())
    watching.add(0, {"a/observed.x": latent(0)}, layouts, ())
    watching.add(1, {"a/observed.x": latent(0)}, layouts, ())
    with pytest.raises(ConfigError, match=r"was seen in \[1, 2\] steps: every lane must have it at every step"):
        watching.measures()
    with pytest.raises(ConfigError, match=r"was seen in \[\] steps"):
        MetricRecorder().measures()


# --- what happened, as a table -------------------------------------------------------------------------------------------------


def histories(recipe, seeds=(0, 1, 2)):
    fast = vdcache.compile(model(), recipe, num_steps=STEPS, inner="eager")
    for seed in seeds:
        fast.vdcache.begin()
        run(fast, seed)
    return fast.vdcache.history


@pytest.mark.parametrize(
    "kind", some(["adacache", "adacache-layers", "fbcache", "easycache"], {"adacache-layers", "easycache"}.__contains__)
)
def test_recipe_following_is_the_majority_without_a_metric(kind):
    recipe = variations(kind, measured(kind).seen[0])[1]
    history = histories(recipe)
    fixed = recipe.following(history)
    wanted = []
    for step in range(STEPS):
        plans = [next(r.plan.reuse for r in history if (r.generation, r.step) == (g, step)) for g in range(3)]
        wanted.append({x for x in frozenset().union(*plans) if sum(x in p for p in plans) >= 2})
    assert [set(row) for row in fixed.policy.reuse] == wanted and not wanted[0]
    assert Recipe.from_json(fixed.to_json()) == fixed and fixed.name == f"{recipe.name}-fixed"
    torch._dynamo.reset()
    fast = vdcache.compile(model(), fixed, num_steps=STEPS, inner="eager", strict=True)
    run(fast, 5)
    assert [set(r.plan.reuse) for r in fast.vdcache.history] == wanted
    assert not any(r.measures or r.probe or r.why for r in fast.vdcache.history)
    with pytest.raises(ConfigError, match="for 16 steps, and the generation has 8"):
        vdcache.compile(model(), fixed, num_steps=8, inner="eager")


def test_of_one_generation_the_table_does_just_that():
    recipe = variations("fbcache", measured("fbcache").seen[0])[1]
    history = histories(recipe, (1,))
    assert [bool(r) for r in recipe.following(history).policy.reuse] == [bool(r.reused) for r in history]


def test_schedule_from_history_is_the_median():
    recipe = variations("adacache", measured("adacache").seen[0])[1]
    history = histories(recipe)
    for seeds in ((0, 1, 2), (0, 1), (1,)):
        computed = [history.computed_steps(g) for g in seeds]
        found = vdcache.Schedule.from_history(
            history if len(seeds) == 3 else [r for r in history if r.generation in seeds], order=1
        )
        votes = [sum(s in c for c in computed) for s in range(STEPS)]
        assert found.computed == tuple(s for s in range(STEPS) if 2 * votes[s] >= len(seeds))
        assert found.steps == STEPS and found.order == 1


def test_histories_that_make_no_table_are_refused():
    recipe = variations("adacache-layers", measured("adacache-layers").seen[0])[0]
    history = histories(recipe, (0, 1))
    with pytest.raises(ConfigError, match=r"reuses layers\d, layers\d apart|reuses layers\d apart"):
        vdcache.Schedule.from_history(history)
    for derive in (recipe.following, vdcache.Schedule.from_history):
        with pytest.raises(ConfigError, match="holds no call"):
            derive([])
    plain = variations("adacache", measured("adacache").seen[0])[0]
    records = list(histories(plain, (0, 1)))
    for derive in (plain.following, vdcache.Schedule.from_history):
        with pytest.raises(ConfigError, match=r"whole generations of one length; these have \[13, 16\] steps"):
            derive(records[:-3])
        with pytest.raises(ConfigError, match="whole generations of one length"):
            derive([r for r in records if r.step != 4])


def test_a_table_follows_its_timesteps_alone():
    times = [1000 * s for s in sigmas(STEPS)[:-1]]
    schedule = vdcache.Schedule(STEPS, (0, 2, 9))
    recipe = replace(schedule.recipe(), policy=schedule.policy(times))
    assert Recipe.from_json(recipe.to_json()) == recipe
    fast = vdcache.compile(model(), recipe, num_steps=STEPS, inner="eager", strict=True)
    for other, computed in (({}, [0, 2, 9]), ({9: 433.0}, [0, 2, *range(9, STEPS)]), ({1: 900.0}, list(range(STEPS)))):
        fast.vdcache.reset()
        with torch.no_grad():
            for step, x in enumerate(path(0)):
                fast(x, torch.tensor([other.get(step, times[step])]), TEXTS[0])
        assert fast.vdcache.history.computed_steps() == computed
    fast.vdcache.begin()
    for x in path(0):  # explicit control reads nothing
        fast.vdcache.step()
        with torch.no_grad():
            fast(x, torch.tensor([7.0]), TEXTS[0])
    assert fast.vdcache.history.computed_steps() == [0, 2, 9]
    for wrong in ([1.0], ["a"] * STEPS):
        with pytest.raises(ConfigError):
            schedule.policy(wrong)
