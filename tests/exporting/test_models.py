"""Real architectures, recipes of every kind and the shipped model as packages."""

from __future__ import annotations

import functools

import onnx
import pytest
import torch

import vdcache
from tests.exporting.packages import SCHEDULE, STEPS, call, inputs, model, times
from tests.support.thorough import some
from tests.zoo import ZOO, build
from vdcache.demo.fixed import generation, schedule
from vdcache.demo.model import DemoConfig, DemoDiT, with_positions
from vdcache.exporting.fixed import fixed
from vdcache.exporting.manifest import Manifest
from vdcache.testing import TinyDiT, latent, time_of

MODELS = ("wan", "cogvideox", "hunyuan_video", "latte", "flux", "sd3")


# text beside the latent, and text that is attended to with attention over time; the rest are put together of these
@pytest.mark.parametrize("name", some(MODELS, {"flux", "latte"}.__contains__))
def test_published_architectures(name, tmp_path):
    found, given = build(name), ZOO[name].call(0, 6)
    path = tmp_path / name
    manifest = vdcache.export(found, (), given, schedule=vdcache.Schedule(5, (0, 1, 3)), path=path)
    result = vdcache.verify(path, found, (), given)
    assert result.ok and result.largest < 2e-5
    sizes = {g.name: sum(g.operators.values()) for g in manifest.graphs}
    assert sizes["reuse_all"] * 5 < sizes["recompute"]
    own = sum(t.numel() * t.element_size() for t in {*found.parameters(), *found.buffers()})
    assert manifest.files["weights.bin"].bytes <= 1.05 * own + 64 * len(list(found.parameters())) + 4096
    for graph in manifest.graphs:
        onnx.checker.check_model(str(path / graph.file), full_check=True)


TAYLOR = vdcache.Recipe(
    "taylor-2",
    vdcache.policies.SchedulePolicy(vdcache.policies.StepList((0, 1, 2, 4, 7))),
    predictor=vdcache.predictors.Taylor(2),
)


@pytest.mark.parametrize(
    ("recipe", "graphs"),
    some(
        [("fora-3", 2), ("taylorseer-3-2", 2), ("delta-dit-2", 3), ("pab-latte", 4), ("always", 1), (TAYLOR, 2)],
        lambda case: case[0] not in ("fora-3", TAYLOR),
    ),
    ids=["fora", "taylorseer", "delta-dit", "pab", "always", "taylor"],
)
def test_recipes_that_follow_the_clock(recipe, graphs, tmp_path):
    args = (latent(0), time_of(0), latent(1, 1, 3, 4))
    found = TinyDiT(blocks=4, dim=16)
    path = tmp_path / "package"
    manifest = vdcache.export(
        found, args, schedule=recipe, num_steps=8, path=path, format="onnx-single" if graphs == 3 else "onnx"
    )
    assert len({s.plan for s in manifest.steps}) == graphs
    result = vdcache.verify(path, found, args)
    assert result.ok and len(result.calls) == 8


def test_attention_under_masks_is_made_of_standard_operators(tmp_path, monkeypatch):
    monkeypatch.setattr("vdcache.backends.lowering.PIECES", 1)  # as where a video has many frames
    torch.manual_seed(0)
    found = DemoDiT(DemoConfig(num_layers=1)).eval().requires_grad_(False)
    args = (with_positions(latent(0, 1, 3, 4, 8, 8)), torch.tensor([900.0]), torch.zeros(1, 5, 32))
    recipe = vdcache.Schedule(4, (0, 2)).recipe("masked").with_masks("frames:1")
    path = tmp_path / "masked"
    vdcache.export(found, args, schedule=recipe, path=path)
    masked = Manifest.read(path)
    assert all("::" not in name for graph in masked.graphs for name in graph.operators)
    assert masked.graph("recompute").operators["Softmax"] > 2  # one for each group of frames, and the text's
    assert vdcache.verify(path, found, args).ok
    none = vdcache.Schedule(4, (0, 2)).recipe("none").with_masks("skip")
    manifest = vdcache.export(found, args, schedule=none, path=tmp_path / "none")
    assert manifest.graph("recompute").operators["Softmax"] == 1  # the text's
    assert vdcache.verify(tmp_path / "none", found, args).ok


def test_arguments_in_another_order_and_a_predictor_of_ones_own(tmp_path):
    found = TinyDiT(blocks=2, dim=16)
    x, timestep, text = call()
    swapped = {"text": text, "timestep": timestep, "x": x}
    halfway = vdcache.predictors.Blended(lambda values, when: 0.5 * (values[0] + values[1]), 2)
    recipe = vdcache.Recipe("mine", vdcache.policies.SchedulePolicy(vdcache.policies.StepList((0, 1, 3))), predictor=halfway)
    vdcache.export(found, (), swapped, schedule=recipe, num_steps=6, path=tmp_path / "mine")
    with pytest.raises(vdcache.errors.ConfigError, match="could not keep its recipe"):
        vdcache.verify(tmp_path / "mine", found, (), swapped)
    assert vdcache.verify(tmp_path / "mine", found, (), swapped, recipe=recipe).largest < 1e-5


@pytest.fixture(scope="module")
def shipped():
    """The shipped model; all forms are assembled from what is captured and converted of it once."""
    from vdcache.exporting import exporter, to_onnx

    found, convert, models = generation(steps=8), to_onnx.convert, {}

    def converted(graph, *rest):
        if graph not in models:
            models[graph] = convert(graph, *rest)
        return models[graph].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "convert", converted)
        once = functools.cache(lambda: fixed(found[0], found[1], found[2], schedule(8)))
        patch.setattr(exporter, "fixed", lambda model, *rest: once() if model is found[0] else fixed(model, *rest))
        yield found


# `make test` exports the shipped model once, in the demo
@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("form", ["onnx", "onnx-single", "onnx-unrolled"])
def test_the_shipped_model(form, shipped, tmp_path):
    found, args, kwargs, loop, inputs = shipped
    path = tmp_path / form
    manifest = vdcache.export(found, args, kwargs, schedule=schedule(8), path=path, format=form, loop=loop, inputs=inputs)
    result = vdcache.verify(path, found, args, kwargs, loop=loop, inputs=inputs)
    assert result.ok and result.largest < 1e-4 and result.psnr > 60
    weights = sum(p.numel() * p.element_size() for p in found.parameters())
    assert sum(f.bytes for f in manifest.files.values()) <= 1.05 * weights + 2 * 5e6
    for graph in manifest.graphs:
        onnx.checker.check_model(str(path / graph.file), full_check=True)


def test_the_shipped_schedule_scales():
    assert len(schedule().computed) == 11 and schedule().steps == 30
    assert schedule(12).steps == 12 and schedule(12).computed[0] == 0 and len(schedule(12).computed) < 12


def test_a_model_in_half_precision(tmp_path):
    found = TinyDiT(blocks=2, dim=16).half()
    args = tuple(v.half() if v.ndim > 1 else v for v in call())
    vdcache.export(found, args, schedule=[0, 2], num_steps=4, path=tmp_path / "half")
    assert {c.dtype for c in Manifest.read(tmp_path / "half").caches} == {"float16"}
    result = vdcache.verify(tmp_path / "half", found, args)
    assert result.ok and 1e-4 < result.largest < result.tolerance == pytest.approx(5e-3, rel=0.05), (
        "its roundings are no faults"
    )
    assert not vdcache.verify(tmp_path / "half", found, args, tolerance=1e-5).ok
    with pytest.raises(
        vdcache.errors.ConfigError, match=r"is torch\.bfloat16, which numpy does not have: export the model in float32"
    ):
        vdcache.export(found.bfloat16(), tuple(v.bfloat16() for v in args), schedule=[0], num_steps=2, path=tmp_path / "brain")


@pytest.mark.parametrize("format", ["pt2", "aoti"])
def test_torchs_own_formats(format, tmp_path):
    path = tmp_path / format
    scheduled = vdcache.Schedule(6, (0, 1, 3))
    found = TinyDiT(blocks=1, dim=32)
    manifest = vdcache.export(found, call(), schedule=scheduled, path=path, format=format)
    result = vdcache.verify(path, found, call())
    assert result.ok and (format == "aoti" or result.largest == 0)  # exported programs are the very operations
    weights = sum(p.numel() * p.element_size() for p in found.parameters())
    assert manifest.files["weights.safetensors"].bytes <= 1.05 * weights + 8192
    for graph in manifest.graphs:
        assert manifest.files[graph.file].bytes < 3e6
        assert graph.weights and set(graph.weights) <= set(graph.inputs)
    from vdcache.exporting.to_torch import TorchRunner
    from vdcache.runtime_onnx import OnnxRunner

    with pytest.raises(vdcache.errors.ConfigError, match=f"of kind '{format}', and OnnxRunner runs onnx"):
        OnnxRunner(path)
    (path / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(vdcache.errors.ConfigError, match=r"weights\.safetensors is truncated"):
        TorchRunner(path)


@pytest.mark.parametrize("form", some(["onnx", "onnx-unrolled"], "onnx-unrolled".__eq__))
def test_a_loop_that_updates_its_input_in_place(form, tmp_path):
    """It got a second output, which verify died of, and verify wrote into the caller's tensor."""

    def in_place(model, noise, text):
        for step in range(STEPS):
            noise.sub_(0.1 * model(noise, times(step), text))
        return noise

    def pure(model, noise, text):
        for step in range(STEPS):
            noise = noise - 0.1 * model(noise, times(step), text)
        return noise

    given, before = inputs(), inputs()
    path = tmp_path / "package"
    manifest = vdcache.export(model(), call(), schedule=SCHEDULE, path=path, format=form, loop=in_place, inputs=given)
    assert [v.name for v in manifest.loop.outputs] == ["output_0"]
    for loop in (in_place, pure):
        result = vdcache.verify(path, model(), call(), loop=loop, inputs=given)
        assert result.ok and result.psnr > 100
    assert all(torch.equal(given[n], before[n]) for n in given)
    with pytest.raises(vdcache.errors.ConfigError, match="the loop returns 2 tensors, and the package 1"):
        vdcache.verify(path, model(), call(), loop=lambda *a, **k: (pure(*a, **k), given["noise"]), inputs=given)


class Rotary(TinyDiT):
    """A complex table, as a buffer or as an input."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("table", torch.polar(torch.ones(6, 2), torch.arange(12.0).reshape(6, 2)))

    def forward(self, x, timestep, text, table=None):
        table = self.table if table is None else table
        turned = torch.view_as_complex(x.unflatten(-1, (2, 2))) * table.unsqueeze(0)
        return super().forward(torch.view_as_real(turned).flatten(-2), timestep, text)


@pytest.mark.parametrize("given", [False, True], ids=["buffer", "input"])
def test_complex_rotary_tables(given, tmp_path):
    found = Rotary(blocks=2, dim=16)
    args = (*call(), found.table.clone()) if given else call()
    with pytest.raises(
        vdcache.errors.CaptureError, match=r"complex numbers \('table'\), which ONNX does not have: .*format='pt2'"
    ):
        vdcache.export(found, args, schedule=[0, 2], num_steps=4, path=tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    vdcache.export(found, args, schedule=[0, 2], num_steps=4, path=tmp_path / "pt2", format="pt2")
    assert vdcache.verify(tmp_path / "pt2", found, args).ok
