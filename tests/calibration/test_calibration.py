"""Calibrations as values: text, files, pictures, and what they hold for."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vdcache
from vdcache import Schedule
from vdcache.calibration import Calibration
from vdcache.calibration.calibration import CalibrationKey, find, folder, keep, key_of, weights_of
from vdcache.calibration.choose import Goal
from vdcache.errors import ConfigError
from vdcache.runtime.session import Session
from vdcache.testing import TinyDiT, latent, time_of

TIMES = (1000.0, 750.0, 500.0, 250.0)


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    monkeypatch.setenv("VDCACHE_CACHE_DIR", str(tmp_path / "cache"))


def one(computed=(0, 2), times=TIMES, model="m", sizes="1×6×4:float32", goal=None, steps=4, **more):
    r = np.random.default_rng(0).standard_normal((1, steps, 9)).cumsum(1)
    products = np.einsum("gsd,gtd->gst", r, r)
    return Calibration(
        key=CalibrationKey(model, steps, sizes, times),
        goal=goal or Goal(speedup=2.0),
        schedule=Schedule(steps, computed, 1, 0.25, 33.0),
        products=tuple(tuple(map(tuple, g)) for g in products.tolist()),
        tried=(Schedule(steps, computed, 1, psnr=33.0), Schedule(steps, (0, 1), 1, psnr=None)),
        **{"reuse_cost": 0.1, "seconds": 1.5, "versions": {"vdcache": "0"}, **more},
    )


# --- text, files, pictures -----------------------------------------------------------------------------------------------------


@given(
    st.sets(st.integers(1, 9)),
    st.none() | st.floats(-50, 150),
    st.text(max_size=9),
    st.just([]) | st.lists(st.floats(0, 1e3), min_size=10, max_size=10),
    st.sampled_from([Goal(computed=3), Goal(speedup=1.7), Goal(quality_db=41.5), Goal(speedup=2.0, floor_db=30.0)]),
)
def test_json_round_trip(rest, psnr, note, times, goal):
    found = one((0, *sorted(rest)), tuple(times), steps=10, goal=goal, note=note)
    found = replace(found, schedule=replace(found.schedule, psnr=psnr))
    assert Calibration.from_json(found.to_json()) == found
    np.testing.assert_array_equal(Calibration.from_json(found.to_json()).table.products, found.table.products)


def test_json_through_a_file(tmp_path):
    text = one().to_json(tmp_path / "found.json")
    assert (tmp_path / "found.json").read_text() == text and Calibration.from_json(tmp_path / "found.json") == one()


WRONG = ["nonsense", "[]", "3", "null", "{}", '{"key": {}}', Schedule(4, (0,)).to_json()]


@pytest.mark.parametrize("text", WRONG)
def test_json_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ConfigError, match=r"this is no calibration: it was not written by Calibration.to_json"):
        Calibration.from_json(tmp_path / "other.json")


def test_as_text():
    found = one(note="a note")
    assert str(found) == (
        "█·█·  2 of 4 steps, order 1, result at 33.0 dB (measured)\n"
        "for 2× speed: 1.82× by FLOPs; 4 steps of 1×6×4:float32\n"
        "2 schedules were run in 2 s\n"
        "a note"
    )
    assert found.speedup == pytest.approx(4 / 2.2)


def test_the_front_falls_with_fewer_steps():
    found = one(steps=10, computed=(0, 3), times=())
    front = found.front()
    assert [c for c, _ in front] == list(range(1, 10)) and all(math.isfinite(d) for _, d in front)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
@pytest.mark.parametrize(
    "found",
    [one(), one(steps=2, computed=(0,), times=()), one(goal=Goal(quality_db=30.0)), replace(one(), tried=())],
    ids=["usual", "two steps", "floor", "nothing tried"],
)
def test_pictures_are_written(found, ending, tmp_path, recwarn):
    path = tmp_path / f"picture.{ending}"
    found.draw(path)
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(starts) and path.stat().st_size > 4000
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_a_picture_shows_what_was_found():
    found = replace(one(goal=Goal(quality_db=30.0)), tried=(*one().tried, Schedule(4, (0, 1, 2), 1, psnr=35.0)))
    figure = found.draw()
    axes = [a for a in figure.axes if a.get_title() or a.get_xlabel()]
    texts = " ".join([t for a in axes for t in (a.get_title(), a.get_xlabel(), a.get_ylabel())])
    assert "2 of 4 steps, for 30 dB" in texts and "computed steps" in texts
    labels = {t.get_text() for a in figure.axes if a.get_legend() for t in a.get_legend().get_texts()}
    assert {"chosen", "least that is allowed", "others that were run", "accepted by the chosen schedule"} <= labels
    measured, predicted = (next(a for a in figure.axes if a.get_title().startswith(w)) for w in ("measured", "predicted"))
    assert measured.get_ylabel() == "PSNR, dB" and predicted.get_ylabel() == "error, %"  # two quantities, two axes
    assert measured.get_xlim() == predicted.get_xlim() == (0, found.schedule.steps + 1)
    others, chosen, _ = (list(zip(*line.get_data(), strict=True)) for line in measured.lines)
    assert others == [(3, 35.0)] and chosen == [(2, 33.0)]
    (curve, _) = predicted.lines
    assert list(curve.get_ydata()) == pytest.approx([100 * 10 ** (-d / 20) for _, d in found.front()])


def test_a_picture_of_all_steps_is_drawn(tmp_path):
    one((0, 1, 2, 3)).draw(tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 4000


# --- kept and found ------------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_found():
    assert find(one().key, one().goal) is None
    path = keep(one())
    assert path.parent == folder() and find(one().key, one().goal) == one()
    begun = replace(one().key, times=TIMES[:1])
    assert find(begun, one().goal) == one()


@pytest.mark.parametrize(
    "other",
    [
        {"model": "n"},
        {"sizes": "1×5×4:float32"},
        {"times": (999.0, 600.0, 300.0, 100.0)},
        {"times": (900.0, 750.0, 500.0, 250.0)},
        {"goal": Goal(speedup=2.5)},
        {"goal": Goal(quality_db=2.0)},
        {"goal": Goal(speedup=2.0, floor_db=30.0)},
        {"goal": Goal(computed=2)},
        {"steps": 5, "times": (*TIMES, 0.0)},
    ],
    ids=str,
)
def test_others_are_not_found(other):
    keep(one())
    asked = one(**other)
    assert find(asked.key, asked.goal) is None


def test_the_newest_wins_and_other_timesteps_stand_beside():
    first, second = one(), one((0, 1), times=(1000.0, 600.0, 300.0, 100.0))
    for age, found in ((100, first), (50, second)):
        path = keep(found)
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert len([*folder().iterdir()]) == 2
    assert find(first.key, first.goal) == first and find(second.key, first.goal) == second
    assert find(replace(first.key, times=TIMES[:1]), first.goal) == second
    keep(replace(first, note="again"))
    assert find(replace(first.key, times=TIMES[:1]), first.goal).note == "again" and len([*folder().iterdir()]) == 2


@pytest.mark.parametrize("text", [*WRONG, "", "\x00"])
def test_foreign_files_beside_are_passed_over(text):
    path = keep(one())
    beside = path.with_name(path.stem.rsplit("-", 1)[0] + "-other.json")
    beside.write_text(text)
    beside.with_name(beside.stem + "2.json").mkdir()
    assert find(one().key, one().goal) == one()


def leaves(data, path=()):
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, (*path, key))
    yield path


def changed(data, path, value):
    return {**data, path[0]: changed(data[path[0]], path[1:], value)} if path else value


def test_a_file_with_anything_in_it_is_found_whole_or_not_at_all():
    whole = json.loads(one().to_json())
    path = keep(one())
    wrong = []
    for at in leaves(whole):
        for value in (None, "x", -1, [], ["x"], [0], [math.nan], {"a": 1}):
            path.write_text(json.dumps(changed(whole, at, value)))
            try:
                found = find(one().key, one().goal)
                if found is not None:
                    found.schedule.policy(found.key.times).start(4)
                    Session(found.schedule.policy(found.key.times), 4)
                    str(found)
            except Exception as error:  # noqa: BLE001
                wrong.append((at, value, repr(error)))
    assert not wrong


# --- keys ----------------------------------------------------------------------------------------------------------------------


def programs(model, *calls):
    seen = []
    fast = vdcache.compile(model, Schedule(2, (0,)).recipe(), inner="eager")
    fast.vdcache.recorder = lambda program, inputs, results, kept, entry: seen.append((program, list(inputs)))
    for call in calls:
        fast(*call)
    return seen


CALL = latent(0), time_of(0), latent(1, 1, 3, 4)


def test_a_key_is_the_same_in_another_process():
    import torch

    keys = []
    for _ in range(2):
        torch._dynamo.reset()
        ((program, inputs),) = programs(TinyDiT(blocks=1), CALL)
        keys.append(key_of(program, inputs, 4))
    assert keys[0] == keys[1] and keys[0].sizes == "1×6×4:float32 1×3×4:float32" and keys[0].steps == 4


def test_every_parameter_tells_models_apart():
    import torch

    torch._dynamo.reset()
    model = TinyDiT(blocks=2)
    ((program, inputs),) = programs(model, CALL)
    want, same = key_of(program, inputs, 4), []
    for name, parameter in model.named_parameters():
        parameter += 0.1
        if key_of(program, inputs, 4) == want:
            same.append(name)
        parameter -= 0.1
    assert not same


def test_complex_parameters_count_with_both_parts():
    """A rotary table: the imaginary part is not thrown away, and torch has nothing to warn of."""
    table = torch.polar(torch.ones(2, 3), torch.arange(6.0).reshape(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weights_of([table]) == weights_of([table.clone()]) == weights_of([table.conj().conj()])
        assert weights_of([table]) != weights_of([table.conj()])
        assert weights_of([torch.ones(2, dtype=torch.complex64)]) != weights_of([torch.ones(2)])
