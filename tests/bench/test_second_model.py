"""The second model: its weights are those of its definition, it does as told, and its solvers solve one equation."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDIMScheduler

from bench.second_model import classifier, train
from bench.second_model.network import SCHEDULE, SOLVERS, generate, psnr_of, scheduler, signal, untrained
from bench.second_model.scenes import TEXT_DIM, WORDS, draw, encode, random_scenes, unconditional

ROOT = Path(__file__).parents[2]
SCENES = random_scenes(12, torch.Generator().manual_seed(3), held_out=True)


def gaussian(hidden_states, timestep, **other):
    """The exact noise where images are Gaussian noise of deviation 1/2."""
    kept, added = signal()[timestep[0]]
    return (hidden_states * added / (0.25 * kept**2 + added**2),)


def test_scenes_are_held_out_in_either_order():
    seen = random_scenes(200, torch.Generator().manual_seed(0))
    held = random_scenes(40, torch.Generator().manual_seed(0), held_out=True)
    turned = [type(s)(s.texture, s.tint, s.shapes[::-1]) for s in held]
    assert all(s.held_out for s in [*held, *turned]) and not any(s.held_out for s in seen)
    assert {len(s.shapes) for s in held} == {1, 2}


def test_tokens_say_which_colour_belongs_to_which_shape_and_the_bag_of_words_does_not():
    scene = next(s for s in SCENES if len(s.shapes) == 2 and s.shapes[0][1] != s.shapes[1][1])
    (p, a, s), (q, b, t) = scene.shapes
    other = type(scene)(scene.texture, scene.tint, ((p, b, s), (q, a, t)))
    tokens, bag = encode([scene, other])
    assert tokens.shape == (2, WORDS, TEXT_DIM) and not torch.equal(tokens[0], tokens[1]) and torch.equal(bag[0], bag[1])
    assert [t.shape for t in unconditional(2)] == [tokens.shape, bag.shape]


def test_images_are_drawn_in_range_and_from_the_generator_alone():
    first, again = (draw(SCENES, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again) and first.abs().max() <= 1 and first.shape == (12, 3, 32, 32)


def test_the_schedule_ends_where_a_little_signal_is_left():
    kept, added = signal().unbind(1)
    assert 0.05 < kept[-1] < 0.07 and kept[0] > 0.999
    torch.testing.assert_close(kept**2 + added**2, torch.ones_like(kept))


def test_ddim_is_that_of_diffusers():
    theirs = DDIMScheduler(**SCHEDULE, clip_sample=False)
    theirs.set_timesteps(30)
    ours = scheduler("ddim", 30)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x = y = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(ours.timesteps):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        x = ours.step(noise, t, x, return_dict=False)[0]
        y = theirs.step(noise, t, y, return_dict=False)[0]
    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [7, 9, 11, 13, 17, 30])
def test_every_solver_is_asked_from_the_last_timestep_on(solver, steps):
    timesteps = scheduler(solver, steps).timesteps.tolist()
    assert timesteps[0] == 959 and timesteps == sorted(set(timesteps), reverse=True)
    assert timesteps == scheduler("ddim", steps).timesteps.tolist()


def test_all_solvers_go_to_one_image():
    ends = {solver: generate(gaussian, SCENES[:1], solver=solver, steps=240) for solver in SOLVERS}
    few = {solver: generate(gaussian, SCENES[:1], solver=solver, steps=10) for solver in SOLVERS}
    for solver in SOLVERS:
        assert psnr_of(ends[solver], ends["unipc"])[0] > 40, solver
    near = {solver: psnr_of(few[solver], ends["unipc"])[0] for solver in SOLVERS}
    assert near["dpm++2m"] > near["ddim"] and near["unipc"] > near["ddim"]


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match=r"solver must be one of ddim, dpm\+\+2m, unipc; got 'heun'"):
        generate(gaussian, SCENES[:1], solver="heun")


def test_weights_of_another_definition_are_refused(tmp_path, monkeypatch):
    train.save(untrained().state_dict(), tmp_path / "w.safetensors", 1)
    assert not train.load(tmp_path / "w.safetensors").training
    monkeypatch.setitem(train.TRAINING, "steps", 1)
    with pytest.raises(ValueError, match="was trained for the definition"):
        train.load(tmp_path / "w.safetensors")


def test_the_trained_model_does_as_told():
    """The committed weights, with fewer scenes and steps than `python -m bench.second_model.classifier check`."""
    verdict = classifier.judge(generate(train.load(), SCENES, solver="unipc", steps=16, seed=500), SCENES)
    assert verdict.passes, verdict


def test_the_whole_check_was_passed():
    rows = {r["case"]: r for r in json.loads((ROOT / "bench" / "results" / "second_model.json").read_text())}
    assert rows["words shown as asked for"]["must"] == f">= {classifier.MUST_SHOW}"
    assert (
        all(r["holds"] for r in rows.values() if r["must"])
        and "50 steps of ddim, 128" in rows["words shown as asked for"]["pipeline"]
    )


def test_the_weights_are_small_and_not_in_the_wheel():
    assert sum(p.stat().st_size for p in train.ASSETS.iterdir()) < 8e6
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert packages == {"include": ["vdcache*"]}


def test_the_classifier_reads_drawn_images():
    verdict = classifier.on_drawn(classifier.load_classifier(), 128)
    assert verdict.words >= classifier.MUST_READ and verdict.empty >= classifier.MUST_READ


def test_the_classifier_tells_what_is_wrong():
    images = draw(SCENES, torch.Generator().manual_seed(1))
    assert classifier.judge(images, SCENES).passes
    assert not classifier.judge(images.flip(0), SCENES).passes
