"""`vdcache.calibrate`: codebooks by hand, thresholds against what really runs, schedules that are found again, and searches that are
interrupted."""

from __future__ import annotations

import functools
import io
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import vdcache
from tests.calibration.samplers import TEXT, euler, generate, multistep, sigmas, time
from tests.support.thorough import in_turn, some
from vdcache import Recipe, VdcacheWarning
from vdcache.calibration import Calibration, Thresholds
from vdcache.calibration.choose import BUDGET
from vdcache.calibration.loop import SamplingLoop
from vdcache.errors import CacheStateError, ConfigError
from vdcache.testing import TinyDiT, latent

STEPS = 10
SEEDS = (0, 3)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    torch._dynamo.reset()
    monkeypatch.setenv("VDCACHE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "schedules"


def small(seed=0, dim=8):
    return TinyDiT(blocks=1, dim=dim, seed=seed)


def final(model, seed=0, steps=STEPS, **options):
    return generate(model, seed, steps, **options)


def calibrate(model, recipe=None, run=final, **options):
    options = {"prompts": SEEDS, "inner": "eager", "console": Console(file=io.StringIO()), **options}
    return vdcache.calibrate(model, run, recipe, **options)


@functools.cache
def adacached():
    """Thresholds of AdaCache on the usual generations."""
    return calibrate(small(), "adacache-fast")


def changes_by_hand(model, seeds=SEEDS, steps=STEPS):
    """Of the branch that AdaCache observes, the attention of the only block: ‖now − before‖₁ / ‖before‖₁ of each two steps."""
    found = []
    for seed in seeds:
        x, before, own = latent(seed), None, []
        for level, after in zip(sigmas(steps), sigmas(steps)[1:], strict=False):
            gates = model.time(model.sinusoids(time(level), x.dtype))[:, None].chunk(2, -1)
            h = model.inp(x) + model.text(TEXT).mean(1, keepdim=True)
            q, k, v = model.qkv[0](h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            now = gates[0] * torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            if before is not None:
                own.append(((now - before).abs().sum() / before.abs().sum()).item())
            before = now
            x = x - (level - after) * model(x, time(level), TEXT)
        found.append(own)
    return found


# --- codebooks (supplement A.2 of AdaCache) ------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_range_is_that_of_neighbouring_uncached_steps():
    changes = changes_by_hand(small())
    assert all(len(c) == STEPS - 1 for c in changes)
    assert adacached().steps == STEPS and len(adacached().seen) == len(SEEDS)
    assert adacached().range == pytest.approx((min(map(min, changes)), max(map(max, changes))), rel=1e-4)
    for seen, own in zip(adacached().seen, changes, strict=True):
        assert seen.changes() == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("rates", [(6, 5, 4, 3, 2, 1), (3, 1), (4,), (1, 2, 3)])
def test_the_range_is_split_uniformly(rates):
    low, high = adacached().range
    entries = adacached().codebook(rates).entries
    assert [r for _, r in entries] == list(rates)
    width = (high - low) / len(rates)
    assert [t for t, _ in entries] == pytest.approx([low + width * (i + 1) for i in range(len(rates))])
    made = adacached().with_rates(*rates)
    assert made.policy.codebook.entries == entries and made.books == () and made.passes == adacached().base.passes
    assert made.for_steps(STEPS) == made  # no codebook of another number of steps takes its place
    assert Recipe.from_json(made.to_json()) == made


def test_rates_are_changed_without_another_run():
    runs = []
    found = calibrate(small(), "adacache-slow", lambda m, seed: runs.append(seed) or final(m, seed))
    assert runs == list(SEEDS)  # one uncached generation a prompt
    shares = [found.expected(found.with_rates(*rates)).mean for rates in ((9, 9, 9), (3, 2, 1), (1, 1, 1))]
    assert runs == list(SEEDS) and shares == sorted(shares) and shares[-1] == 1 and shares[0] < 0.6


@pytest.mark.parametrize("rates", [(), (0,), (2, -1), (1.5,), ("3",)])
def test_rates_that_are_none_are_refused(rates):
    with pytest.raises(ConfigError):
        adacached().with_rates(*rates)


@pytest.mark.parametrize("rates", [(6, 5, 4, 3, 2, 1), (5, 2), (9,)])
def test_what_is_expected_is_nearly_what_happens(rates):
    """Each prompt as it really runs: a cached generation drifts, so a step more or less."""
    made, model = adacached().with_rates(*rates), small()
    expected, shares = adacached().expected(made), []
    for seed in SEEDS:
        fast = vdcache.compile(model, made, num_steps=STEPS, inner="eager")
        final(fast, seed)
        shares.append(len(fast.vdcache.history.computed_steps()) / STEPS)
    assert expected.low <= expected.mean <= expected.high and (expected.low + expected.high) / 2 == pytest.approx(expected.mean)
    assert expected.mean == pytest.approx(sum(shares) / 2, abs=1.01 / STEPS)


def test_expected_of_another_scope_is_refused():
    with pytest.raises(ConfigError, match="measures something else"):
        adacached().expected(vdcache.methods.fbcache(0.1))
    with pytest.raises(ConfigError, match="has no single threshold: with_rates"):
        adacached().for_speedup(2.0)


# --- thresholds ----------------------------------------------------------------------------------------------------------------

POLICIES = {
    "teacache": vdcache.methods.teacache(0.1),
    "easycache": vdcache.methods.easycache(0.05, first=2),
    "fbcache": vdcache.methods.fbcache(0.08),
}


@pytest.mark.parametrize("name", POLICIES)
def test_thresholds_for_a_speed(name):
    model = TinyDiT(blocks=2)
    found = calibrate(model, POLICIES[name])
    with pytest.raises(ConfigError, match="has no codebook of rates"):
        found.with_rates(2, 1)
    for speedup in (1.2, 1.5):
        made = found.for_speedup(speedup)
        share, cost = found.expected(made).mean, found.reuse_cost
        assert 1 / (share + (1 - share) * cost) >= speedup - 1e-6
        most = max(c for c in range(1, STEPS) if STEPS / (c + (STEPS - c) * cost) >= speedup)
        slower = replace(made, policy=replace(made.policy, threshold=made.policy.threshold * 0.999))
        assert found.expected(slower).mean > most / STEPS  # no smaller threshold skips as many whole steps
    with pytest.raises(
        ConfigError, match=r"no threshold makes '.*' 9 times faster; its bounds allow \d\.\d\d times|no schedule"
    ):
        found.for_speedup(9.0)
    text = str(found)
    assert POLICIES[name].name in text and "as given" in text and "changes from step to step" in text


def test_magcache_has_its_ratios_measured():
    found = calibrate(small(), vdcache.methods.magcache((1.0,) * STEPS))
    ratios = vdcache.calibration.magnitudes(small(), final, prompts=SEEDS, inner="eager")
    assert found.base.policy.ratios == pytest.approx(ratios) and found.steps == STEPS
    assert "magcache" in str(found)


@pytest.mark.parametrize("recipe", ["adacache-fast", POLICIES["easycache"], POLICIES["teacache"]], ids=["ada", "easy", "tea"])
def test_thresholds_through_json(recipe, tmp_path):
    found = calibrate(TinyDiT(blocks=2), recipe)
    text = found.to_json(tmp_path / "found.json")
    for again in (Thresholds.from_json(text), Thresholds.from_json(tmp_path / "found.json")):
        assert again == found and str(again) == str(found)
        assert again.expected() == found.expected()
    assert Thresholds.from_json(text).to_json() == text


@pytest.mark.parametrize("text", ["nonsense", "[]", "3", "null", "{}", '{"recipe": 3, "seen": [], "reuse_cost": 0}'])
def test_json_of_something_else_holds_no_thresholds(text, tmp_path):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ConfigError, match="this holds no thresholds"):
        Thresholds.from_json(tmp_path / "other.json")


@pytest.mark.parametrize("recipe", ["every-2", "always"])
def test_recipes_without_thresholds_are_refused(recipe):
    with pytest.raises(ConfigError, match="measures nothing on this model, so it has no threshold to calibrate"):
        calibrate(small(), recipe)


def test_generations_of_unequal_length_are_refused():
    with pytest.raises(ConfigError, match=r"the generations have \[6, 8\] steps; calibrate one number of steps at a time"):
        calibrate(small(), "adacache-fast", lambda m, steps: final(m, 0, steps), prompts=(6, 8))


def test_few_steps_have_a_codebook_or_say_why():
    """Of two steps and one prompt there is one change, and no range."""
    found = calibrate(small(), "adacache-fast", lambda m: final(m, 0, 2), prompts=None)
    assert found.range[0] == found.range[1]
    with pytest.raises(ConfigError, match="range"):
        found.with_rates(3, 2, 1)


# --- refusals ------------------------------------------------------------------------------------------------------------------


def test_what_does_not_go_together_is_refused(tmp_path):
    model = small()
    for goal in ({"speedup": 2.0}, {"quality_db": 30.0}):
        with pytest.raises(ConfigError, match="leave out the goal"):
            calibrate(model, "adacache-fast", **goal)
    with pytest.raises(ConfigError, match="path is for vdcache-auto"):
        calibrate(model, "adacache-fast", path=tmp_path / "x.json")
    with pytest.raises(ConfigError, match="one or the other"):
        calibrate(model, speedup=2.0, quality_db=30.0)
    with pytest.raises(ConfigError, match="adacash"):
        calibrate(model, "adacash")
    for prompts, message in (("cat", r"give \['cat'\]"), ([], "prompts is empty")):
        for recipe in (None, "adacache-fast"):
            with pytest.raises(ConfigError, match=message):
                calibrate(model, recipe, prompts=prompts)


def test_runs_that_go_past_the_model_are_refused():
    model = small()
    for recipe in (None, "adacache-fast"):
        with pytest.raises(CacheStateError, match=r"calibrate: run\(model\) did not call the model"):
            calibrate(model, recipe, lambda m, seed: final(model, seed))


def test_a_run_that_is_not_seeded_is_refused():
    seeds = iter(range(100))
    with pytest.raises(CacheStateError, match="seed it"):
        calibrate(small(), None, lambda m, seed: final(m, next(seeds)))


def test_goals_out_of_reach_name_the_best():
    with pytest.raises(ConfigError, match=r"no schedule of 10 steps is 40 times faster: with a single computed step it is \d"):
        calibrate(small(), speedup=40.0)
    with pytest.raises(
        ConfigError, match=r"no schedule of 10 steps reaches 148 dB; the best reached is \d+\.\d dB with \d of 10"
    ):
        calibrate(small(), quality_db=148.0)


# --- schedules -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal", "num_steps"),
    some(
        [({"speedup": 2.0}, STEPS), ({"quality_db": 30.0}, STEPS), ({}, STEPS), ({"speedup": 1.5}, STEPS)],
        lambda case: case[0].get("speedup") != 1.5,
    ),
    ids=["speedup", "quality", "default", "slow"],
)
def test_what_is_calibrated_is_followed_from_the_first_generation(goal, num_steps, folder):
    model = small()
    found = calibrate(model, **goal)
    assert isinstance(found, Calibration) and found.schedule.steps == found.key.steps == STEPS
    assert found.key.times == pytest.approx([1000 * s for s in sigmas(STEPS)[:-1]])
    assert found.speedup >= goal.get("speedup", 1) and found.schedule.psnr >= goal.get("quality_db", 0)
    torch._dynamo.reset()
    fast = vdcache.compile(small(), num_steps=num_steps, inner="eager", **goal)
    with warnings.catch_warnings():
        warnings.simplefilter("error", VdcacheWarning)
        result = final(fast, 5)
    assert fast.vdcache.history.computed_steps() == list(found.schedule.computed)
    own = vdcache.compile(small(), found.schedule.recipe(), num_steps=STEPS, inner="eager")
    assert torch.equal(result, final(own, 5))
    assert fast.vdcache.calibration == found


def test_the_psnr_is_that_of_the_schedule_on_the_prompts():
    found, model = calibrate(small(), speedup=2.0), small()
    scores = []
    for seed in SEEDS:
        own = vdcache.compile(model, found.schedule.recipe(), num_steps=STEPS, inner="eager")
        a, b = final(own, seed), final(model, seed)
        scores.append(10 * math.log10((b.max() - b.min()).item() ** 2 / (a - b).square().mean().item()))
    assert found.schedule.psnr == pytest.approx(sum(scores) / 2, abs=1e-3)
    assert max(t.psnr for t in found.tried if len(t.computed) == len(found.schedule.computed)) >= found.schedule.psnr - 1e-9


@pytest.mark.parametrize(("prompts", "goal"), in_turn([1, 3], [{"speedup": 2.0}, {}, {"speedup": 1.2}]))
def test_it_costs_at_most_three_generations_a_prompt(prompts, goal):
    with vdcache.record() as history:
        calibrate(small(), prompts=range(prompts), **goal)
    computed = len({(r.generation, r.step) for r in history if r.computed})
    assert computed <= (1 + BUDGET) * prompts * STEPS


def test_a_quality_costs_at_most_three_generations_a_prompt():
    with vdcache.record() as history:
        calibrate(small(), prompts=[0], quality_db=45.0)
    assert len({(r.generation, r.step) for r in history if r.computed}) <= 3 * STEPS


def test_the_memory_is_said_before_it_is_held():
    text = io.StringIO()
    calibrate(small(), console=Console(file=text, width=200))
    assert text.getvalue().count("keeps") == 1 and "calibrate keeps 0.0 MiB a step and lane" in text.getvalue()


def explicit(model, seed=0, shift=1.0):
    session = getattr(model, "vdcache", None)
    if session is not None:
        session.begin(STEPS)

    def call(x, level):
        if session is not None:
            session.step()
        return model(x, time(level), TEXT)

    with torch.no_grad():
        return euler(call, latent(seed), sigmas(STEPS, shift))


def test_explicit_control_keeps_the_timesteps_too():
    found = calibrate(small(), None, explicit)
    assert found.key.times == pytest.approx([1000 * s for s in sigmas(STEPS)[:-1]])
    fast = vdcache.compile(small(), num_steps=STEPS, inner="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VdcacheWarning)
        assert torch.equal(explicit(fast, 1, 3.0), explicit(small(), 1, 3.0))


@pytest.mark.parametrize("sampler", [euler, multistep])
def test_any_sampler_is_calibrated_with_its_own_loop(sampler):
    found = calibrate(small(), None, lambda m, seed: final(m, seed, sampler=sampler), speedup=2.0)
    assert found.schedule.psnr > 15 and not found.note


# --- interrupted and resumed ---------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def counted(stop=None, run=final):
    """A run that counts, and breaks off in the middle of one of its generations."""
    ran = []

    def sampled(model, seed):
        ran.append(seed)
        if len(ran) == stop:

            class Breaking:
                calls = 0

                def __call__(self, *args):
                    Breaking.calls += 1
                    if Breaking.calls == STEPS // 2:
                        raise Stop
                    return model(*args)

            return run(Breaking(), seed)
        return run(model, seed)

    return sampled, ran


def same(a, b):
    return replace(a, seconds=0) == replace(b, seconds=0)


@functools.cache
def uninterrupted():
    run, ran = counted()
    return calibrate(small(), None, run, speedup=2.0), tuple(ran)


@pytest.mark.parametrize("stop", some([1, 2, 3, 5, 7], {1, 3, 7}.__contains__))
def test_interrupted_and_resumed_gives_the_same(stop, tmp_path):
    whole, ran = uninterrupted()
    assert len(ran) > stop
    path, model = tmp_path / "kept.json", small()
    run, before = counted(stop)
    with pytest.raises(Stop):
        calibrate(model, None, run, speedup=2.0, path=path)
    torch._dynamo.reset()
    run, after = counted()
    resumed = calibrate(small(), None, run, speedup=2.0, path=path)
    assert same(resumed, whole)
    # Of what was run before, only uncached results that others are compared with run again.
    assert len(before) - 1 + len(after) <= len(ran) + len(SEEDS)
    run, again = counted()
    assert same(calibrate(small(), None, run, speedup=2.0, path=path), whole) and not again


def test_another_goal_from_the_same_file_runs_no_prompt_uncached_twice(tmp_path):
    path = tmp_path / "kept.json"
    calibrate(small(), None, speedup=2.0, path=path)
    scored = len(json.loads(path.read_text())["scored"])
    found = calibrate(small(), None, speedup=1.5, path=path)
    assert same(found, calibrate(small(), None, speedup=1.5)) or found.schedule == calibrate(small(), speedup=1.5).schedule
    assert len(json.loads(path.read_text())["scored"]) > scored


def test_a_half_written_file_of_another_model_is_refused(tmp_path):
    path = tmp_path / "kept.json"
    run, _ = counted(2)
    with pytest.raises(Stop):
        calibrate(small(), None, run, speedup=2.0, path=path)
    for other in (small(1), small(dim=12)):
        with pytest.raises(ConfigError, match="was measured with another model"):
            calibrate(other, None, speedup=2.0, path=path)
    with pytest.raises(ConfigError, match="was measured with another model or other sizes"):
        calibrate(small(), None, lambda m, seed: final(m, seed, tokens=5), speedup=2.0, path=path)


@pytest.mark.parametrize("other", [lambda: small(1), lambda: small(dim=12)], ids=["weights", "width"])
def test_a_whole_file_of_another_model_is_refused(other, tmp_path):
    path = tmp_path / "kept.json"
    calibrate(small(), None, speedup=2.0, path=path)
    with pytest.raises(ConfigError, match="was measured with another model"):
        calibrate(other(), None, speedup=2.0, path=path)


def test_a_file_of_other_prompts_is_refused(tmp_path):
    path = tmp_path / "kept.json"
    calibrate(small(), None, speedup=2.0, path=path, prompts=(0, 3))
    with pytest.raises(ConfigError, match="prompts"):
        calibrate(small(), None, speedup=2.0, path=path, prompts=(5, 6))


def test_a_file_of_more_prompts_is_refused(tmp_path):
    path = tmp_path / "kept.json"
    calibrate(small(), None, speedup=2.0, path=path)
    with pytest.raises(ConfigError, match=r"is of the prompts \[0, 3\]; given are \[0, 3, 4\]"):
        calibrate(small(), None, speedup=2.0, path=path, prompts=(0, 3, 4))


@pytest.mark.xfail(
    strict=True,
    reason="a file says for which model and prompts it is, not for which sampler: where all is measured already, nothing runs",
)
def test_a_file_of_another_sampler_is_refused_or_measured_again(tmp_path):
    path = tmp_path / "kept.json"
    calibrate(small(), None, speedup=2.0, path=path)
    other = lambda m, seed: final(m, seed, shift=5.0)  # noqa: E731
    try:
        found = calibrate(small(), None, other, speedup=2.0, path=path)
    except ConfigError:
        return
    assert found.key.times == pytest.approx([1000 * s for s in sigmas(STEPS, 5.0)[:-1]])


@pytest.mark.parametrize("text", ["nonsense", "{}", "[]", '{"prompts": 2, "products": 3, "scored": []}', "null"])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    path = tmp_path / "kept.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        calibrate(small(), None, path=path)
    assert path.read_text() == text  # not overwritten


def test_a_loop_without_a_path_writes_nothing(tmp_path):
    loop = SamplingLoop(small(), final, [0], "test")
    assert loop.table().steps == STEPS and not [*tmp_path.iterdir()]
    loop.forget()
