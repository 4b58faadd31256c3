"""Calibration in use: the first generation is the untouched model's, the next follow the schedule that belongs to them, and nothing
that goes wrong harms a generation."""

from __future__ import annotations

import itertools
import json
import math
import os
import warnings
from collections import Counter
from dataclasses import replace
from datetime import datetime

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vdcache
from tests.calibration.samplers import (
    OTHER,
    TEXT,
    UNEVEN,
    Skipping,
    ancestral,
    by_hand,
    clamped,
    euler,
    explicit,
    generate,
    kept,
    psnr,
    quiet,
    said,
    sigmas,
    small,
    time,
)
from tests.support.thorough import examples, in_turn, some
from vdcache import VdcacheWarning
from vdcache.calibration.auto_calibrator import AutoCalibrator
from vdcache.calibration.choose import Goal
from vdcache.calibration.trajectory_replay import RecordedRun
from vdcache.errors import ConfigError
from vdcache.testing import TinyDiT, latent

STEPS = 8
CALIBRATING = "no schedule is known for this model"


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Nothing is known yet."""
    torch._dynamo.reset()
    monkeypatch.setenv("VDCACHE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "schedules"


def made(model, num_steps=STEPS, **options):
    """Searches all at once, unless told otherwise."""
    return vdcache.compile(model, num_steps=num_steps, **{"inner": "eager", "search_share": math.inf, **options})


# --- the usual way -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [STEPS, None])
def test_first_generation_is_untouched_and_the_next_follow_what_it_taught(num_steps, folder):
    model = small()
    fast = made(model, num_steps)
    first, heard = said(generate, fast)
    assert torch.equal(first, generate(model)) and fast.vdcache.history.computed_steps() == list(range(STEPS))
    assert sum(CALIBRATING in h for h in heard) == 1 and "this generation is computed in full" in " ".join(heard)
    second, heard = said(generate, fast, 1)
    if num_steps is None:  # its length is known when the next begins, and that one follows at once
        assert sum("calibrated in" in h for h in heard) == 1
    (found,) = kept(folder)
    assert fast.vdcache.calibration == found
    assert fast.vdcache.history.computed_steps() == list(found.schedule.computed)
    assert 2 <= len(found.schedule.computed) <= STEPS // 2 and found.speedup >= 2
    torch.testing.assert_close(second, by_hand(model, found.schedule, 1))
    third, heard = said(generate, fast, 2)
    torch.testing.assert_close(third, by_hand(model, found.schedule, 2))
    assert not heard and len(kept(folder)) == 1


def test_it_is_the_default_of_the_string_door(folder):
    model = small()
    fast = torch.compile(model, backend="vdcache", options={"num_steps": STEPS, "inner": "eager", "search_share": math.inf})
    assert torch.equal(quiet(generate, fast), generate(model))
    (found,) = kept(folder)
    torch.testing.assert_close(quiet(generate, fast, 1), by_hand(model, found.schedule, 1))


def test_the_string_door_without_num_steps(folder):
    model = small()
    fast = torch.compile(model, backend="vdcache", options={"inner": "eager", "search_share": math.inf})
    assert torch.equal(quiet(generate, fast), generate(model))
    second = quiet(generate, fast, 1)
    (found,) = kept(folder)
    torch.testing.assert_close(second, by_hand(model, found.schedule, 1))


def test_a_new_session_follows_from_its_first_generation(folder):
    model = small()
    quiet(generate, made(model))
    (found,) = kept(folder)
    torch._dynamo.reset()
    again = made(small())  # the same weights in another object, as in another process
    result, heard = said(generate, again, 3)
    torch.testing.assert_close(result, by_hand(model, found.schedule, 3))
    assert again.vdcache.history.computed_steps() == list(found.schedule.computed)
    assert again.vdcache.calibration == found
    (taken,), (path,) = heard, folder.glob("*.json")  # which schedule, from when, for what, and how it is forgotten
    day = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    assert f"found on {day} for 2× speed" in taken and str(found.schedule) in taken and f"delete {path}" in taken
    assert "Solvers that ask at the same timesteps share it" in taken
    assert not said(generate, again, 4)[1]  # once
    again.vdcache.calibration.path.unlink()
    _, heard = said(generate, made(small()), 3)
    assert [CALIBRATING in h for h in heard] == [True, False] and [*folder.glob("*.json")] == [path]


def test_a_new_session_without_num_steps_follows_once_it_knows_them():
    model = small()
    quiet(generate, made(model))
    again = made(small(), None)
    assert torch.equal(quiet(generate, again, 3), generate(model, 3))
    result = quiet(generate, again, 4)
    torch.testing.assert_close(result, by_hand(model, again.vdcache.calibration.schedule, 4))


def test_a_new_session_without_num_steps_searches_nothing_that_is_known(folder):
    quiet(generate, made(small()))
    (before,) = folder.glob("*.json")
    again = made(small(), None)
    quiet(generate, again, 3)
    _, heard = said(generate, again, 4)
    assert not any("calibrated in" in h for h in heard) and [*folder.glob("*.json")] == [before]


@pytest.mark.parametrize("given", [True, False])
def test_explicit_begin_and_step(given, folder):
    model = small()
    fast = made(model, None)
    session = fast.vdcache

    def generation(seed, shift=1.0):
        session.begin(STEPS if given else None)
        x, levels = latent(seed), sigmas(STEPS, shift)
        with torch.no_grad():
            for now, after in itertools.pairwise(levels):
                session.step()
                x = x - (now - after) * fast(x, time(now), TEXT)
        return x

    assert torch.equal(quiet(generation, 0), generate(model))
    second = quiet(generation, 1)
    (found,) = kept(folder)
    # nobody reads the second timestep before its step is planned, so that one is computed whatever the schedule says
    followed = replace(found.schedule, computed=tuple(sorted({1, *found.schedule.computed})))
    assert session.history.computed_steps() == list(followed.computed)
    torch.testing.assert_close(second, by_hand(model, followed, 1))
    assert found.key.times == pytest.approx([1000 * s for s in sigmas(STEPS)[:-1]])


@pytest.mark.parametrize("num_steps", [STEPS, None])
def test_two_lanes_in_two_calls(num_steps, folder):
    model, lanes = small(), (TEXT, OTHER)
    fast = made(model, num_steps)
    assert torch.equal(quiet(generate, fast, texts=lanes), generate(model, texts=lanes))
    second = quiet(generate, fast, 1, texts=lanes)
    (found,) = kept(folder)
    assert found.schedule.psnr is not None and not found.note
    torch.testing.assert_close(second, by_hand(model, found.schedule, 1, texts=lanes))


def test_two_lanes_in_one_batch(folder):
    model, text = small(), torch.cat([TEXT, OTHER])
    fast = made(model)

    def both(of):
        def call(x, t, _):
            a, b = of(torch.cat([x, x]), t.expand(2), text).chunk(2)
            return b + 2 * (a - b)

        return call

    assert torch.equal(quiet(generate, both(fast)), generate(both(model)))
    (found,) = kept(folder)
    assert found.schedule.psnr is not None and not found.note
    quiet(generate, both(fast), 1)
    assert fast.vdcache.history.computed_steps() == list(found.schedule.computed)


def test_under_inference_mode_and_with_latents_written_into(folder):
    model = small()
    fast = made(model)

    def generation(of, seed=0):
        x, levels = latent(seed), sigmas(STEPS)
        with torch.inference_mode():
            x = x.clone()
            for now, after in itertools.pairwise(levels):
                x -= (now - after) * of(x, time(now), TEXT)
        return x

    assert torch.equal(quiet(generation, fast), generation(model))
    (found,) = kept(folder)
    assert found.schedule.psnr is not None and not found.note
    torch.testing.assert_close(quiet(generation, fast, 1), by_hand(model, found.schedule, 1))


def test_random_numbers_of_the_user_are_not_drawn():
    fast = made(small())
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    quiet(generate, fast)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_history_holds_what_the_user_ran():
    fast = made(small())
    quiet(generate, fast)
    assert [(r.generation, r.step) for r in fast.vdcache.history] == [(0, s) for s in range(STEPS)]


def test_a_recording_holds_what_the_user_ran():
    fast = torch.compile(small(), backend="vdcache", options={"num_steps": STEPS, "inner": "eager", "search_share": math.inf})
    with vdcache.record() as history:
        quiet(generate, fast)
    assert [(r.generation, r.step) for r in history] == [(0, s) for s in range(STEPS)]


# --- goals ---------------------------------------------------------------------------------------------------------------------


def test_goals_have_calibrations_of_their_own(folder):
    model = small()
    for goal in ({}, {"speedup": 1.5}, {"speedup": 3.0}, {"quality_db": 35.0}):
        fast = made(model, **goal)
        assert torch.equal(quiet(generate, fast), generate(model))
        found, before = fast.vdcache.calibration, len(kept(folder))
        result, heard = said(generate, fast)  # the generation that it was chosen on
        assert not heard and len(kept(folder)) == before
        assert found.speedup >= goal.get("speedup", 2.0 if not goal else 1)
        assert psnr(result, generate(model)) >= goal.get("quality_db", 30.0 if not goal else 0)
        assert psnr(result, generate(model)) == pytest.approx(found.schedule.psnr, abs=0.1)
    assert len(kept(folder)) == 4


def test_nothing_that_goes_as_it_should_is_a_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", VdcacheWarning)
        for session in range(2):  # calibrated by the first, taken from the disk by the second
            fast = made(small(), None if not session else STEPS)
            for seed in range(2):
                generate(fast, seed)
            assert fast.vdcache.calibration is not None and fast.vdcache.calibration.path in folder.iterdir()


def test_a_speed_that_no_schedule_of_these_steps_has_is_an_error_at_once():
    for reach in ({"num_steps": STEPS, "speedup": STEPS + 1.0}, {"num_steps": 1, "speedup": 1.5}):
        with pytest.raises(ConfigError, match=r"no schedule of \d steps is .* times faster: .* \d.00 times at most"):
            made(small(), **reach)
    made(small(), STEPS, speedup=float(STEPS))  # the model may cost nothing where it is reused
    made(small(), 1)  # the default has a floor, and computes every step where there is nothing to skip


def test_a_speed_that_reuse_does_not_give_is_said_after_one_step():
    fast, model = made(small(), None, speedup=float(STEPS)), small()
    steps = []

    def of(*args):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", VdcacheWarning)
                return fast(*args)
        except VdcacheWarning as warning:
            steps.append((fast.vdcache.step_index, str(warning)))
            return model(*args)

    fast.vdcache.begin(STEPS)  # known when it begins, as in a pipeline
    generate(of)
    ((step, text),) = steps
    assert step == 1 and "no schedule of 8 steps is 8 times faster: with a single computed step it is" in text


@pytest.mark.parametrize("goal", [{"speedup": 7.9}, {"quality_db": 149.0}], ids=str)
def test_a_goal_out_of_reach_computes_everything_and_says_so(goal):
    model = small()
    fast = made(model, **goal)
    first, heard = said(generate, fast)
    assert torch.equal(first, generate(model)) and any("no schedule was found" in h for h in heard)
    again, heard = said(generate, fast, 1)
    assert torch.equal(again, generate(model, 1)) and not heard
    strict = made(small(), strict=True, **goal)
    with pytest.raises(ConfigError, match=r"no schedule of 8 steps (is 7.9 times faster|reaches 149 dB)"):
        quiet(generate, strict)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(steps):
    model = small()
    fast = made(model, steps)
    for seed in range(3):
        result = quiet(generate, fast, seed, steps)
        found = fast.vdcache.calibration
        if seed and found is not None:
            torch.testing.assert_close(result, by_hand(model, found.schedule, seed, steps))
            assert fast.vdcache.history.computed_steps() == list(found.schedule.computed)
        else:
            assert torch.equal(result, generate(model, seed, steps))


@pytest.mark.parametrize("sampler", [ancestral, clamped])
def test_a_sampler_that_cannot_be_told_goes_by_the_table(sampler, folder):
    model = small()
    fast = made(model)
    assert torch.equal(quiet(generate, fast, sampler=sampler), generate(model, sampler=sampler))
    (found,) = kept(folder)
    assert "does not follow from latents and outputs" in found.note and found.schedule.psnr is None and not found.tried
    torch.testing.assert_close(quiet(generate, fast, 1, sampler=sampler), by_hand(model, found.schedule, 1, sampler=sampler))
    floor = made(small(), quality_db=30.0)
    result, heard = said(generate, floor, sampler=sampler)
    assert torch.equal(result, generate(model, sampler=sampler))
    assert any("cannot be tried" in h and "vdcache.calibrate(model, run, quality_db=" in h for h in heard)


# --- what a schedule belongs to ------------------------------------------------------------------------------------------------

OTHERS = {
    "steps": lambda fast, model: [generate(m, steps=6) for m in (fast(small(), 6), model)],
    "size": lambda fast, model: [generate(m, tokens=30) for m in (fast(small()), model)],
    "dtype": lambda fast, model: [generate(m, dtype=torch.bfloat16) for m in (fast(small().bfloat16()), model.bfloat16())],
    "weights": lambda fast, model: [generate(m) for m in (fast(small(1)), small(1))],
    "width": lambda fast, model: [generate(m) for m in (fast(small(dim=12)), small(dim=12))],
    "timesteps": lambda fast, model: [generate(m, shift=3.0) for m in (fast(small()), model)],
}


@pytest.mark.parametrize("what", OTHERS)
def test_others_are_not_followed(what, folder):
    quiet(generate, made(small()))
    (first,) = kept(folder)
    assert 1 not in first.schedule.computed  # where another shift shows first, the schedule would already reuse
    got, want = quiet(OTHERS[what], made, small())
    assert torch.equal(got, want)
    if what != "timesteps":
        assert len(kept(folder)) == 2


def test_another_shift_is_left_at_once_and_calibrated_next(folder):
    model = small()
    fast = made(model)
    quiet(generate, fast)
    result, heard = said(generate, fast, 1, shift=3.0)
    assert torch.equal(result, generate(model, 1, shift=3.0))
    assert any("the timesteps of this generation are not those of the calibration" in h for h in heard)
    assert torch.equal(quiet(generate, fast, 2, shift=3.0), generate(model, 2, shift=3.0))
    result = quiet(generate, fast, 3, shift=3.0)
    found = fast.vdcache.calibration
    assert found.key.times == pytest.approx([1000 * s for s in sigmas(STEPS, 3.0)[:-1]])
    torch.testing.assert_close(result, by_hand(model, found.schedule, 3, shift=3.0))
    assert len(kept(folder)) == 2


def test_shifts_that_come_and_go_are_calibrated_once_each():
    model = small()
    fast = made(model)
    for shift in (1.0, 1.0, 3.0, 3.0, 3.0, 1.0, 1.0, 1.0):
        quiet(generate, fast, shift=shift)
    results = []
    for shift in (3.0, 3.0, 3.0, 3.0):
        quiet(generate, fast, shift=shift)
        results.append(len(fast.vdcache.history.computed_steps()))
    assert results[-1] < STEPS


def test_weights_loaded_in_place_are_calibrated_anew(folder):
    model = small()
    fast = made(model)
    quiet(generate, fast)
    quiet(generate, fast)
    model.load_state_dict(small(5).state_dict())
    assert torch.equal(quiet(generate, fast), generate(small(5)))
    assert len(kept(folder)) == 2


@pytest.mark.parametrize("kind", ["qkv", "mlp"])
def test_weights_of_one_kind_of_layer_tell_models_apart(kind, folder):
    """As a fused LoRA changes them."""
    model, other = TinyDiT(blocks=6), TinyDiT(blocks=6)
    quiet(generate, made(model))
    for part in getattr(other, kind):
        linear = part if kind == "qkv" else part[2]
        linear.weight += 0.3 * latent(4, *linear.weight.shape)
    assert torch.equal(quiet(generate, made(other)), generate(other))
    assert len(kept(folder)) == 2


def test_sizes_that_come_and_go_are_calibrated_once_each(folder):
    model = small()
    fast = made(model)
    for tokens in (6, 5, 6, 5, 7):
        quiet(generate, fast, tokens=tokens)
    for seed, tokens in enumerate((6, 5, 7)):
        result, heard = said(generate, fast, seed, tokens=tokens)
        torch.testing.assert_close(result, by_hand(model, fast.vdcache.calibration.schedule, seed, tokens=tokens))
        assert not heard and f"1×{tokens}×4" in fast.vdcache.calibration.key.sizes


def test_sizes_are_calibrated_once_each(folder):
    fast = made(small())
    for tokens in (6, 5, 6):
        quiet(generate, fast, tokens=tokens)
    assert len(kept(folder)) == 2


def test_a_size_is_known_to_another_process_that_met_other_sizes_first(folder):
    quiet(generate, made(small()))
    torch._dynamo.reset()
    fast = made(small())
    for tokens in (5, 7):
        quiet(generate, fast, tokens=tokens)
    _, heard = said(generate, fast)
    assert not any(CALIBRATING in h for h in heard) and len(fast.vdcache.history.computed_steps()) < STEPS


def test_a_prompt_of_another_length_has_the_schedule_of_the_first(folder):
    model = small()
    fast = made(model)
    quiet(generate, fast)
    (found,) = kept(folder)
    longer = latent(97, 1, 7, 4)
    result, heard = said(generate, fast, 3, texts=(longer,))
    torch.testing.assert_close(result, by_hand(model, found.schedule, 3, texts=(longer,)))
    assert not heard and kept(folder) == [found]
    torch._dynamo.reset()
    again = made(small())  # another process, which meets the longer one first
    result, heard = said(generate, again, 4, texts=(longer,))
    torch.testing.assert_close(result, by_hand(model, found.schedule, 4, texts=(longer,)))
    assert ["taking the schedule" in h for h in heard] == [True] and kept(folder) == [found]


def test_a_near_size_begins_with_the_schedule_of_the_other(folder):
    """It is followed, and what is found on that generation takes its place; with a quality to keep only running tells."""
    model = small()
    fast = made(model)
    quiet(generate, fast)
    (first,) = kept(folder)
    result, heard = said(generate, fast, 1, tokens=5)
    torch.testing.assert_close(result, by_hand(model, first.schedule, 1, tokens=5))
    assert any("no schedule is known for 1×5×4:float32 1×3×4:float32: begun with the schedule of 1×6×4" in h for h in heard)
    found = fast.vdcache.calibration
    assert len(kept(folder)) == 2 and "1×5×4" in found.key.sizes and found.tried and not found.tentative and not found.note
    assert found.schedule.psnr is not None and found.schedule.psnr >= 30
    torch.testing.assert_close(quiet(generate, fast, 2, tokens=5), by_hand(model, found.schedule, 2, tokens=5))
    strict = made(small(), quality_db=35.0)
    quiet(generate, strict)
    assert torch.equal(quiet(generate, strict, 1, tokens=5), generate(model, 1, tokens=5))


def test_a_near_size_with_timesteps_of_its_own_is_calibrated_in_that_generation(folder):
    """Pipelines shift the timesteps by the number of tokens."""
    model = small()
    fast = made(model)
    quiet(generate, fast)
    result, heard = said(generate, fast, 1, tokens=5, shift=3.0)
    assert torch.equal(result, generate(model, 1, tokens=5, shift=3.0))
    assert not any("are not those of the calibration" in h for h in heard)
    found = fast.vdcache.calibration
    assert len(kept(folder)) == 2 and found.key.times == pytest.approx([1000 * s for s in sigmas(STEPS, 3.0)[:-1]])
    result = quiet(generate, fast, 2, tokens=5, shift=3.0)
    torch.testing.assert_close(result, by_hand(model, found.schedule, 2, tokens=5, shift=3.0))


def test_two_models_of_one_class_side_by_side():
    models = small(0), small(1)
    both = [made(m) for m in models]
    first = [quiet(generate, f, 0) for f in both]
    assert all(torch.equal(a, generate(m, 0)) for a, m in zip(first, models, strict=True))
    # their steps in turn
    x, levels = [latent(1), latent(2)], sigmas(STEPS)
    with torch.no_grad():
        for now, after in itertools.pairwise(levels):
            x = [y - (now - after) * f(y, time(now), TEXT) for y, f in zip(x, both, strict=True)]
    for i in (0, 1):
        found = both[i].vdcache.calibration
        torch.testing.assert_close(x[i], by_hand(models[i], found.schedule, i + 1))
    assert both[0].vdcache.calibration.key.model != both[1].vdcache.calibration.key.model


def test_two_models_at_the_string_door():
    models = small(0), small(1)
    both = [
        torch.compile(m, backend="vdcache", options={"num_steps": STEPS, "inner": "eager", "search_share": math.inf})
        for m in models
    ]
    for fast, model in zip(both, models, strict=True):
        assert torch.equal(quiet(generate, fast), generate(model))
    for fast in both:
        with vdcache.record() as history:
            quiet(generate, fast, 1)
        assert len({r.step for r in history if r.computed}) < STEPS


# --- what goes wrong -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", some([0, 1, 5, STEPS - 1], {0, 5}.__contains__))
def test_an_aborted_generation_teaches_nothing(after, folder):
    model = small()
    fast = made(model)
    with pytest.raises(KeyboardInterrupt):
        quiet(generate, fast, stop=after)
    assert not kept(folder)
    assert torch.equal(quiet(generate, fast, 1), generate(model, 1))
    (found,) = kept(folder)
    assert found.schedule.steps == STEPS and len(found.key.times) == STEPS
    torch.testing.assert_close(quiet(generate, fast, 2), by_hand(model, found.schedule, 2))


def test_an_aborted_second_lane_teaches_nothing(folder):
    model, lanes = small(), (TEXT, OTHER)
    fast = made(model)
    with pytest.raises(KeyboardInterrupt):
        quiet(generate, fast, texts=lanes, stop=2 * STEPS - 1)
    assert not kept(folder)
    assert torch.equal(quiet(generate, fast, 1, texts=lanes), generate(model, 1, texts=lanes))


def test_aborting_what_follows_harms_nothing(folder):
    model = small()
    fast = made(model)
    quiet(generate, fast)
    (found,) = kept(folder)
    with pytest.raises(KeyboardInterrupt):
        quiet(generate, fast, 1, stop=5)
    torch.testing.assert_close(quiet(generate, fast, 2), by_hand(model, found.schedule, 2))


def test_a_reset_forgets_the_generation_that_was_being_recorded(folder):
    model = small()
    fast = made(model, None)
    with pytest.raises(KeyboardInterrupt):
        quiet(generate, fast, stop=5)
    fast.vdcache.reset()
    assert torch.equal(quiet(generate, fast), generate(model)) and not kept(folder)
    quiet(generate, fast, 1)
    assert [c.schedule.steps for c in kept(folder)] == [STEPS]


@pytest.mark.xfail(
    strict=True,
    reason="without num_steps an aborted generation is calibrated as a whole one, and the next one follows its schedule",
)
def test_without_num_steps_an_aborted_generation_never_makes_a_longer_one_follow_it(folder):
    model = small()
    fast = made(model, None)
    with pytest.raises(KeyboardInterrupt):
        quiet(generate, fast, stop=5)
    assert torch.equal(quiet(generate, fast, 1), generate(model, 1))


def damaged(folder, text):
    for path in folder.glob("*.json"):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    "text",
    some(
        ["", "{}", "[]", "null", '{"key": null}', "\xff\xfe", b"\xff\xfe\x00", '{"key": {"times": 3}}'],
        {"", "[]", b"\xff\xfe\x00", '{"key": {"times": 3}}'}.__contains__,
    ),
)
def test_unreadable_files_are_measured_again(text, folder):
    model = small()
    quiet(generate, made(model))
    damaged(folder, text)
    fast = made(small())
    assert torch.equal(quiet(generate, fast), generate(model))
    (found,) = kept(folder)
    torch.testing.assert_close(quiet(generate, fast, 1), by_hand(model, found.schedule, 1))


@pytest.mark.parametrize("times", some([["a"] * STEPS, [1000.0], [None] * STEPS, "timesteps"], lambda t: len(t) != 1), ids=str)
def test_files_with_other_timesteps_harm_no_generation(times, folder):
    model = small()
    quiet(generate, made(model))
    (path,) = folder.glob("*.json")
    data = json.loads(path.read_text())
    data["key"]["times"] = times
    path.write_text(json.dumps(data))
    assert torch.equal(quiet(generate, made(small())), generate(model))


def test_a_folder_that_cannot_be_written_costs_no_generation(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VDCACHE_CACHE_DIR", str(tmp_path / "file"))
    model = small()
    fast = made(model)
    assert torch.equal(quiet(generate, fast), generate(model))
    quiet(generate, fast, 1)  # kept in memory, or computed in full


def test_a_model_that_returns_what_is_no_number_is_left_alone(folder):
    class Broken(TinyDiT):
        def forward(self, x, timestep, text):
            return super().forward(x, timestep, text) / (timestep[:, None, None] - 500)  # infinite in the middle

    model = Broken(blocks=1)
    fast = made(model)
    torch.testing.assert_close(quiet(generate, fast), generate(model), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(quiet(generate, fast), generate(model), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("call", "num_steps"), in_turn(UNEVEN, [STEPS, None]))
def test_steps_that_differ_in_their_calls_are_calibrated(call, num_steps, folder):
    """Guidance for half of a run (in two calls, or as a batch of two), reference tokens in the first step, skipped layers."""
    model = Skipping(blocks=2)
    fast = made(model, None)

    def generation(m, seed=0):
        if m is fast:
            m.vdcache.begin(num_steps)
        return explicit(call, STEPS)(m, seed)

    first, heard = said(generation, fast)
    assert torch.equal(first, generation(model))
    quiet(generation, fast, 1)
    result, more = said(generation, fast, 2)
    (found,) = kept(folder)
    assert found.schedule.psnr is not None and not found.note  # it was run again, not guessed
    assert len(fast.vdcache.history.computed_steps()) <= STEPS - 3 and psnr(result, generation(model, 2)) > 25
    assert not [h for h in heard + more if CALIBRATING not in h and "calibrated in" not in h]


def test_what_cannot_be_run_again_gets_the_schedule_of_the_table(folder):
    """Guidance that ends and a sampler that draws random numbers: the lane that is always there says which steps to compute."""
    model = small()
    fast = made(model, speedup=2.0)

    def generation(of, seed=0):
        def call(x, level):
            return sum(of(x, time(level), text) for text in ((TEXT, OTHER) if level > 0.5 else (TEXT,)))

        with torch.no_grad():
            return ancestral(call, latent(seed), sigmas(STEPS))

    assert torch.equal(quiet(generation, fast), generation(model))
    quiet(generation, fast, 1)
    (found,) = kept(folder)
    assert "chosen by the table of steps alone, because the sampler's update" in found.note
    assert set(fast.vdcache.history.computed_steps()) == set(found.schedule.computed) and found.speedup >= 2


def test_a_floor_that_nothing_is_known_to_keep_is_said(folder):
    """The default recipe, a sampler that cannot be run again, and a model whose steps are not predicted well by the table."""
    model, fast = small(), made(small())
    result, heard = said(generate, fast, sampler=ancestral)
    (found,) = kept(folder)
    assert torch.equal(result, generate(model, sampler=ancestral)) and len(found.schedule.computed) == STEPS
    (text,) = [
        h
        for h in heard
        if "no schedule of 8 steps is known to keep 30 dB, and every step is computed: chosen by the table" in h
    ]
    assert "draws random numbers" in text and "With speedup=… there is no such floor" in text
    _, again = said(generate, fast, 1, sampler=ancestral)
    assert not again
    _, taken = said(generate, made(small()), 1, sampler=ancestral)  # in another process
    assert any("every step is computed: chosen by the table" in h for h in taken)


def test_guidance_that_ends_with_the_last_step_is_calibrated_when_it_comes_again(folder):
    """A last step with fewer calls than the one before it may have been cut short."""
    model, fast = small(), made(small(), speedup=2.0)

    def generation(of, seed=0):
        def call(x, level):
            return sum(of(x, time(level), text) for text in ((TEXT, OTHER) if level > 0.2 else (TEXT,)))

        with torch.no_grad():
            return euler(call, latent(seed), sigmas(STEPS))

    for seed in range(2):
        assert torch.equal(quiet(generation, fast, seed), generation(model, seed)) and not kept(folder)
    quiet(generation, fast, 2)
    assert kept(folder) and len(fast.vdcache.history.computed_steps()) < STEPS


@pytest.mark.parametrize(("where", "num_steps"), in_turn(["latent", "output"], [STEPS, None]))
def test_one_generation_that_is_no_number_costs_one_generation(where, num_steps, folder):
    class Sometimes(TinyDiT):
        def forward(self, x, timestep, text):
            return super().forward(x, timestep, text) * (text[:, :1, :1] / text[:, :1, :1])  # 0 / 0 for a text of zeros

    model = Sometimes(blocks=1)
    fast = made(model, num_steps)

    def generation(of, seed, broken=False):
        texts = (torch.zeros_like(TEXT) if broken and where == "output" else TEXT,)
        x = latent(seed) * (math.nan if broken and where == "latent" else 1)
        with torch.no_grad():
            return euler(lambda x, level: of(x, time(level), texts[0]), x, sigmas(STEPS))

    _, heard = said(generation, fast, 0, broken=True)
    second, more = said(generation, fast, 1)
    assert torch.equal(second, generation(model, 1))
    (text,) = [h for h in heard + more if "taught nothing" in h]
    assert "because the model was given or gave NaN or infinity in step 0" in text and "the next one is tried" in text
    assert "INTERNAL ASSERT" not in " ".join(heard + more)
    quiet(generation, fast, 2)
    if num_steps is None:
        quiet(generation, fast, 3)
    assert kept(folder) and len(fast.vdcache.history.computed_steps()) < STEPS


def test_trouble_that_does_not_pass_is_tried_ever_more_rarely(folder):
    model, fast = small(), made(small())
    calibrating = Counter()

    class Counting(RecordedRun):
        def add(self, program, inputs, results, record):
            calibrating[record.generation] += 1
            super().add(program, inputs, results, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vdcache.calibration.auto_calibrator.RecordedRun", Counting)
        for _ in range(9):
            with torch.no_grad():
                quiet(euler, lambda x, level: fast(x, time(level), TEXT), latent(0) * math.nan, sigmas(STEPS))
    assert [*calibrating] == [0, 1, 3, 7]
    quiet(generate, fast, 1)
    assert not kept(folder)
    for seed in range(7):
        quiet(generate, fast, seed)
    assert kept(folder) and psnr(quiet(generate, fast, 8), generate(model, 8)) > 25


@pytest.mark.parametrize("goal", [{}, {"quality_db": 30.0}], ids=str)
def test_no_memory_for_running_it_again_is_tried_again(goal, folder, monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")

    model, fast = small(), made(small(), **goal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vdcache.calibration.trajectory_replay.Rerun.step", full)
        first, heard = said(generate, fast)
    assert torch.equal(first, generate(model)) and not kept(folder)
    assert any("taught nothing, because it cannot be run again: OutOfMemoryError: CUDA out of memory." in h for h in heard)
    quiet(generate, fast, 1)
    assert kept(folder)[0].schedule.psnr is not None


def test_running_it_again_that_never_works_goes_by_the_table(folder, monkeypatch):
    monkeypatch.setattr("vdcache.calibration.trajectory_replay.Rerun.step", lambda self: 1 / 0)
    fast = made(small(), speedup=2.0)
    for seed in range(5):
        quiet(generate, fast, seed)
    (found,) = kept(folder)
    assert found.note == "chosen by the table of steps alone, because ZeroDivisionError: division by zero"
    assert found.speedup >= 2 and fast.vdcache.history.computed_steps() == list(found.schedule.computed)


@pytest.mark.parametrize(
    ("steps", "num_steps", "same"),
    some(itertools.product([1, 2], [STEPS, None], [True, False]), lambda c: c[2] == ((c[0] == 1) == (c[1] is None))),
)
def test_a_warm_up_does_not_end_calibration(steps, num_steps, same, folder):
    """A first generation of one or two steps, with the first request's seed and timesteps or others."""
    model = small()
    fast = made(model, num_steps)

    def warm_up(of):
        with torch.no_grad():
            return euler(
                lambda x, level: of(x, time(level), TEXT), latent(1), sigmas(STEPS)[: steps + 1] if same else sigmas(steps)
            )

    assert torch.equal(quiet(warm_up, fast), warm_up(model))
    heard = []
    for seed in (1, 2, 3):
        result, more = said(generate, fast, seed)
        heard += more
    assert psnr(result, generate(model, 3)) > 25 and len(fast.vdcache.history.computed_steps()) < STEPS
    assert not any("no schedule was found" in h for h in heard)


def test_steps_without_a_schedule_do_not_spoil_those_with_one(folder):
    """What is computed in full for want of a schedule has nothing to do with the timesteps of one that is known."""
    fast = made(small(), None)
    session = fast.vdcache

    def generation(levels, seed=0):
        session.begin(len(levels) - 1)
        with torch.no_grad():
            return euler(lambda x, s: fast(x, time(s), TEXT), latent(seed), levels)

    quiet(generation, sigmas(STEPS))
    quiet(generation, [0.5, 0])  # of one step: nothing to skip
    _, heard = said(generation, [0.5, 0])
    assert not heard
    _, heard = said(generation, sigmas(STEPS))
    assert not heard and len(session.history.computed_steps()) < STEPS


@pytest.mark.parametrize(
    "explicit",
    [
        False,
        True,
    ],
)
def test_a_slightly_other_shift_is_another(explicit, folder):
    model, steps = small(), 30
    fast = made(model, None)
    session = fast.vdcache

    def generation(of, seed, shift):
        x, levels = latent(seed), sigmas(steps, shift)
        with torch.no_grad():
            for now, after in itertools.pairwise(levels):
                if explicit and of is fast:
                    session.step()
                x = x - (now - after) * of(x, time(now), TEXT)
        return x

    for seed, shift in ((0, 3.0), (1, 5.0)):
        session.begin(steps)
        result = quiet(generation, fast, seed, shift)
    followed = [s for s in range(steps) if s not in session.history.computed_steps()]
    apart = [abs(a - b) / a for a, b in zip(sigmas(steps, 3.0), sigmas(steps, 5.0), strict=True) if a]
    assert all(apart[s] < 0.01 for s in followed), followed
    if explicit:
        assert torch.equal(result, generation(model, 1, 5.0))


# --- whatever comes ------------------------------------------------------------------------------------------------------------

MODELS = 2
EVENTS = st.tuples(
    st.integers(0, MODELS - 1),
    st.sampled_from([5, 8]),
    st.sampled_from([5, 6]),
    st.sampled_from([1.0, 1.0, 3.0]),
    st.booleans(),
)


@pytest.fixture(scope="module")
def pair():
    """Two models of one class, compiled once for all histories; what they learn is forgotten before each."""
    models = [small(seed) for seed in range(MODELS)]
    return models, [made(m, None) for m in models]


@settings(max_examples=examples(25, 10), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(EVENTS, min_size=4, max_size=10), said_steps=st.booleans(), number=st.integers(0, 10**9))
def test_every_generation_is_plain_or_follows_its_own_schedule(pair, tmp_path, events, said_steps, number):
    os.environ["VDCACHE_CACHE_DIR"] = str(tmp_path / str(number))
    models, both = pair
    for fast in both:
        session = fast.vdcache
        session.num_steps = None
        session.recorder = AutoCalibrator(
            session,
            Goal(speedup=2.0, floor_db=30.0),
            share=math.inf,
            strict=False,
            warn=lambda key, text: None,
            log=lambda key, text: None,
        )
        session.reset()
    keys = {}  # of each model, which are its own
    for seed, (which, steps, tokens, shift, abort) in enumerate(events):
        model, fast = models[which], both[which]
        if said_steps:
            fast.vdcache.begin(steps)
        if abort:
            with pytest.raises(KeyboardInterrupt):
                quiet(generate, fast, seed, steps, shift, tokens=tokens, stop=steps // 2)
            if not said_steps:
                fast.vdcache.reset()  # as vdcache asks of who does not say the steps
            continue
        result = quiet(generate, fast, seed, steps, shift, tokens=tokens)
        reused = [r.step for r in fast.vdcache.history.generation() if r.reused]
        if not reused:
            assert torch.equal(result, generate(model, seed, steps, shift, tokens=tokens))
            continue
        found = fast.vdcache.calibration
        assert keys.setdefault(found.key.model, which) == which and f"1×{tokens}×4" in found.key.sizes
        expected = [1000 * s for s in sigmas(steps, shift)[:-1]]
        if found.schedule.steps != steps:  # the number of the generation before, where nobody said it
            assert not said_steps
        elif found.key.times == pytest.approx(expected, rel=0.01):
            # One that was begun with the schedule of another size has found its own by now.
            followed = replace(found.schedule, computed=tuple(fast.vdcache.history.computed_steps()))
            torch.testing.assert_close(result, by_hand(model, followed, seed, steps, shift, tokens=tokens))
        for s in reused:
            assert found.key.times[: s + 1] == pytest.approx(expected[: s + 1], rel=0.0101)
