"""What is refused before anything is written, and the command line."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import vdcache
from tests.exporting.packages import SCHEDULE, STEPS, by_hand, call, inputs, loop, model
from tests.support.thorough import some
from vdcache.calibration.calibration import CalibrationKey
from vdcache.cli.main import app
from vdcache.exporting.fixed import recipe_of
from vdcache.exporting.manifest import Manifest
from vdcache.policies.goal import Goal
from vdcache.testing import TinyDiT


def export(tmp_path, **changed):
    given = {"model": model(), "args": call(), "schedule": SCHEDULE, "path": tmp_path / "package", **changed}
    return vdcache.export(given.pop("model"), given.pop("args"), **given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "tflite"}, "there is no format 'tflite'; there are onnx, onnx-single, onnx-unrolled, pt2, aoti"),
        ({"format": "pt2-single"}, "there is no format 'pt2-single'"),
        ({"schedule": [0, 2]}, "does not say how many steps there are: give num_steps"),
        ({"schedule": "every-3"}, "'every-3' does not say how many steps a generation has"),
        ({"schedule": "nope", "num_steps": 3}, "no recipe is called 'nope'"),
        ({"num_steps": 8}, "the schedule is for 6 steps, and num_steps is 8"),
        ({"schedule": "adacache-fast", "num_steps": 6}, "'adacache-fast' decides while it runs what to reuse"),
        ({"schedule": "fbcache-0.1", "num_steps": 6}, "'fbcache-0.1' decides while it runs what to reuse"),
        ({"schedule": "every-3", "num_steps": 1}, "'every-3' reuses nothing in a generation of 1 steps"),
        ({"format": "onnx-unrolled"}, "give loop and inputs"),
        ({"loop": loop}, "loop and inputs belong together"),
        ({"args": call()[0]}, r"args is a tuple of the model's positional inputs; got a tensor of 1×6×4: write \(x,\)"),
        ({"args": {"x": call()[0]}}, "positional inputs; got a dict; inputs by name are kwargs"),
        (
            {"args": call()[:2]},
            r"missing a required argument: 'text'; got a tensor of 1×6×4, a tensor of 1, and it is forward\(x, timestep, text\)",
        ),
        (
            {"args": call()[:2], "kwargs": {"txt": call()[2]}},
            "missing a required argument: 'text'; got .*txt=a tensor of 1×3×4",
        ),
        ({"kwargs": call()[2]}, "kwargs holds the model's inputs by name, as a dict; got a tensor of 1×3×4"),
        ({"model": TinyDiT}, "pass an instance, TinyDiT"),
        (
            {"loop": loop, "inputs": {"noize": call()[0]}},
            r"missing a required argument: 'noise'; got inputs noize, and it is loop\(model, noise, text\)",
        ),
        ({"loop": loop, "inputs": {**inputs(), "steps": call()[1]}}, "got an unexpected keyword argument 'steps'"),
        ({"loop": loop, "inputs": {**inputs(), "model": call()[1]}}, "multiple values for argument 'model'"),
        (
            {"loop": loop, "inputs": call()},
            "inputs holds the loop's tensors by the names of its arguments, as a dict; got a tuple",
        ),
        ({"loop": loop, "inputs": {**inputs(), "text": 3.0}}, "the loop's inputs are tensors; 'text' is float: bind it"),
        ({"loop": "loop", "inputs": inputs()}, r"loop is a function, loop\(model, \*\*inputs\); got 'loop'"),
        ({"loop": loop, "inputs": inputs(), "format": "pt2"}, "a loop is exported to ONNX alone"),
    ],
    ids=[
        *("format", "form", "list", "recipe", "name", "steps", "adaptive", "probing", "idle", "unrolled", "loop"),
        *("tensor", "by name", "too few", "other name", "kwargs", "class", "loop misspelt", "loop more", "loop model"),
        *("loop tuple", "loop number", "no loop", "torch loop"),
    ],
)
def test_refusals(tmp_path, changed, message):
    with pytest.raises(vdcache.errors.ConfigError, match=message):
        export(tmp_path, **changed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_an_export_that_goes_well_warns_of_nothing(tmp_path, format):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", UserWarning)
        export(tmp_path, format=format)


def test_a_table_for_another_number_of_steps():
    planned = vdcache.Recipe("table", vdcache.policies.PlanTable(((), ("all",), ())))
    assert recipe_of(planned)[1] == 3
    with pytest.raises(vdcache.errors.ConfigError, match="the table of plans is for 3 steps, and the generation has 5"):
        vdcache.export(model(), call(), schedule=planned, num_steps=5, path="nowhere")


def test_a_step_that_reuses_what_was_never_computed(tmp_path):
    class Late(vdcache.policies.Always):
        def plans(self):
            return (vdcache.Plan(), vdcache.Plan.of(["all"]))

        def plan(self, state, step, times=()):
            return vdcache.Plan.of(["all"])

    with pytest.raises(vdcache.errors.ConfigError, match=r"step 0 reuses all/run\.0, which no step before it has computed"):
        export(tmp_path, schedule=vdcache.Recipe("late", Late()), num_steps=3)


def test_a_model_without_anything_to_reuse(tmp_path):
    with pytest.raises(vdcache.errors.ConfigError, match="finds nothing to reuse in this model"):
        export(tmp_path, model=nn.Linear(4, 4), args=call()[:1])


def test_a_model_without_weights(tmp_path):
    kind = type(model())
    with torch.device("meta"):
        bare, args = kind(), tuple(torch.empty(v.shape) for v in call())
    with pytest.raises(vdcache.errors.ConfigError, match="TinyDiT is on the meta device, so it has no weights to export"):
        export(tmp_path, model=bare, args=args)


def odd_loop(model, noise, text):
    for _ in range(STEPS + 1):
        noise = noise - model(noise, torch.ones(1), text)
    return noise


def drawing_loop(model, noise, text):
    for _ in range(STEPS):
        noise = noise - model(noise + torch.randn_like(noise), torch.ones(1), text)
    return noise


def short_loop(model, noise, text):
    for _ in range(STEPS):
        noise = noise - model(noise, torch.ones(1), text[:, :1])
    return noise


def wasteful_loop(model, noise, text):
    for _ in range(STEPS):
        noise = noise - model(noise, torch.ones(1), text)
        model(noise, torch.zeros(1), text)
    return noise


def lacking_loop(model, noise, text):
    for _ in range(STEPS):
        noise = noise - model(noise, torch.ones(1))
    return noise


@pytest.mark.parametrize(
    ("around", "message"),
    [
        (odd_loop, "the loop calls the model 7 times, and the schedule has 6 steps"),
        (drawing_loop, "the loop draws at random"),
        (short_loop, r"the loop gives text as torch.float32 \[1, 1, 4\], and the model was exported with float32 \[1, 3, 4\]"),
        (wasteful_loop, "uses what 6 of its 12 calls of the model return"),
        (lacking_loop, "the loop calls the model wrongly: missing a required argument: 'text'"),
    ],
    ids=["calls", "draws", "shape", "waste", "arguments"],
)
def test_loops_that_are_refused(tmp_path, around, message):
    with pytest.raises(vdcache.errors.ConfigError, match=message):
        export(tmp_path, loop=around, inputs=inputs())
    assert not list(tmp_path.iterdir())


def test_a_model_that_writes_into_itself(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x, timestep, text):
            self.calls += 1
            return self.inner(x, timestep, text) + self.calls

    with pytest.raises(vdcache.errors.ConfigError, match="Counting writes into its inputs or buffers"):
        export(tmp_path, model=Counting())


def test_schedules_from_files_and_lists(tmp_path):
    SCHEDULE.to_json(tmp_path / "schedule.json")
    SCHEDULE.recipe().to_json(tmp_path / "recipe.json")
    found = vdcache.calibration.Calibration(CalibrationKey("m", STEPS, ""), Goal(speedup=2.0), SCHEDULE)
    found.to_json(tmp_path / "found.json")
    files = [tmp_path / f"{name}.json" for name in ("schedule", "recipe", "found")]
    for given in (SCHEDULE, found, str(files[0]), *files):
        recipe, steps = recipe_of(given)
        assert (recipe, steps) == (SCHEDULE.recipe(), STEPS)
    assert recipe_of([0, 2, 3], 6)[0].policy == SCHEDULE.recipe().policy
    with pytest.raises(vdcache.errors.ConfigError, match="there is no file 'gone\\.json'"):
        recipe_of("gone.json")


@pytest.mark.parametrize("form", some(["onnx", "onnx-unrolled"], "onnx-unrolled".__eq__))
def test_a_loop_with_tensors_of_its_own(form, tmp_path):
    _, _, text = call()
    sizes = torch.linspace(0.2, 0.1, 4)

    def own(model, noise):
        first = noise
        for step in range(4):
            noise = noise - sizes[step] * model(noise, torch.full((1,), 900.0 - step), text)
        return noise, first

    given = {"noise": call()[0]}
    path = tmp_path / "own"
    vdcache.export(model(), call(), schedule=[0, 2], num_steps=4, path=path, format=form, loop=own, inputs=given)
    found = vdcache.verify(path, model(), call(), loop=own, inputs=given)
    assert found.ok and found.largest < 1e-5 and found.psnr > 100


def test_a_compiled_model_and_a_function_export_as_what_they_are(tmp_path):
    fast = vdcache.compile(model(), "every-2", num_steps=6, inner="eager")
    manifest = export(tmp_path, model=fast, format="pt2")
    assert manifest.model == "TinyDiT"
    assert vdcache.verify(tmp_path / "package", fast, call()).largest == 0


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = "tests.exporting.packages:tiny"
    SCHEDULE.to_json("schedule.json")

    def run(*words):
        result = CliRunner().invoke(app, list(words))
        return result.exit_code, " ".join(result.output.split())

    code, text = run("export", target, "--schedule", "schedule.json", "--out", "package")
    assert code == 0 and "package: TinyDiT, onnx plans" in text and "reuse_all" in text, text
    code, text = run("export", target, "--schedule", "schedule.json", "--out", "package")
    assert code == 2 and "is there already; --overwrite replaces it" in text
    code, text = run("run", "package", "--out", "out/result.npz", "--threads", "1")
    assert code == 0 and "6 calls computed" in text and "6 calls reused" in text, text
    with np.load("out/result.npz") as found:
        wanted = by_hand().numpy()
        assert np.abs(found["output_0"] - wanted).max() < 1e-4 * np.abs(wanted).max()
    run("run", "package", "--draw", "noise", "--seed", "1")
    with np.load("result.npz") as drawn:
        assert np.abs(drawn["output_0"] - wanted).max() > 0.1
    assert "has no input 'nose'" in run("run", "package", "--draw", "nose")[1]
    assert "a video is [B, 3, T, H, W]" in run("run", "package", "--out", "result.gif")[1]
    assert run("run", "package", "--out", "result.mp4")[0] == 2
    code, text = run("verify", "package", target)
    assert code == 0 and "largest difference" in text and "the same" in text
    code, text = run("verify", "package", "tests.exporting.packages:nothing")
    assert code == 1 and "too large" in text and "DIFFERENT" in text
    assert repr(Manifest.read("package")).startswith("<package of TinyDiT: onnx plans, 2 graphs for 6 steps (3 computed), ")
    data = json.loads((tmp_path / "package/manifest.json").read_text())
    (tmp_path / "package/weights.bin").unlink()
    code, text = run("run", "package")
    assert code == 2 and "weights.bin is missing" in text and data["version"] == 1
    code, text = run("export", target, "--schedule", "0,2", "--steps", "5", "--out", "listed", "--format", "pt2")
    assert code == 0 and "pt2 plans" in text, text
