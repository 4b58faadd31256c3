"""ONNX packages compute what PyTorch computes under the same schedule, hold what they say, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch

import vdcache
from tests.exporting.packages import SCHEDULE, STEPS, by_hand, call, exported, inputs, loop, model
from vdcache.exporting.manifest import Manifest
from vdcache.runtime_onnx import OnnxRunner


def arrays(seed=3):
    return {n: v.numpy() for n, v in inputs(seed).items()}


def largest(found, wanted):
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_the_whole_generation_is_the_one_by_hand(package):
    runner = OnnxRunner(package)
    result = runner.generate(arrays())["output_0"]
    assert largest(result, by_hand().numpy()) < 1e-5
    assert runner.history.computed_steps() == list(SCHEDULE.computed)


def test_nothing_crosses_generations(package):
    runner = OnnxRunner(package)
    first = runner.generate(arrays(3))["output_0"]
    other = runner.generate(arrays(4))["output_0"]
    assert largest(other, by_hand(4).numpy()) < 1e-5
    assert np.array_equal(runner.generate(arrays(3))["output_0"], first)
    assert largest(first, other) > 0.1


def test_every_step_is_pytorchs(package):
    found = vdcache.verify(package, model(), call(), loop=loop, inputs=inputs())
    assert found.ok and found.largest < 1e-5 and found.psnr > 100
    assert [c.step for c in found.calls] == [s for s in range(STEPS) for _ in range(2)]
    assert "the same" in str(found)


def test_another_model_is_told_apart(packages):
    from tests.exporting.packages import nothing

    other, args, _, around, given = nothing()
    found = vdcache.verify(packages(), other, args, loop=around, inputs=given)
    assert not found.ok and found.largest > 1e-2 and "DIFFERENT" in str(found)


def test_history_is_the_sessions(packages):
    runner = OnnxRunner(packages())
    runner.generate(arrays())
    fast = vdcache.compile(model(), SCHEDULE.recipe(), num_steps=STEPS, inner="eager")
    session = fast.vdcache
    session.begin(STEPS)
    calls = 0

    def told(*args):
        nonlocal calls
        if calls % 2 == 0:
            session.step()
        calls += 1
        return fast(*args)

    with torch.no_grad():
        loop(told, **inputs())
    facts = lambda history: [(r.step, r.lane, r.plan, r.reused, r.computed) for r in history]  # noqa: E731
    assert facts(runner.history) == facts(session.history)
    assert all(r.seconds > 0 for r in runner.history)


def test_a_run_that_was_left_early_leaves_nothing(packages):
    runner = OnnxRunner(packages())
    x, t, text = (v.numpy() for v in call())
    given = {"x": x, "timestep": t, "text": text}
    runner.begin()
    for _ in range(2):
        runner.step()
        runner({**given, "x": 5 * x})
    runner.begin()
    runner.step()
    fresh = OnnxRunner(packages())
    fresh.begin()
    fresh.step()
    assert np.array_equal(runner(given)[0], fresh(given)[0])
    runner.step()
    fresh.step()
    assert np.array_equal(runner(given)[0], fresh(given)[0])


def test_the_manifest_reads_back(package):
    manifest = Manifest.read(package)
    assert manifest.recipe == SCHEDULE.recipe().to_json() and manifest.versions["torch"] == torch.__version__
    assert [v.name for v in manifest.inputs] == ["x", "timestep", "text"]
    assert [c.slot for c in manifest.caches] == ["all/run.0"]
    assert [s.plan for s in manifest.steps] == [() if s in SCHEDULE.computed else ("all",) for s in range(STEPS)]
    listed = {p.name for p in package.iterdir()} - {"manifest.json"}
    assert set(manifest.files) == listed


def models_of(package):
    return {p.name: onnx.load(p, load_external_data=False) for p in sorted(package.glob("*.onnx"))}


def test_shapes_are_static_and_operators_standard(package):
    manifest = Manifest.read(package)
    for name, found in models_of(package).items():
        onnx.checker.check_model(str(package / name), full_check=True)
        for value in (*found.graph.input, *found.graph.output):
            assert all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim), value.name
        own = {f.name for f in found.functions}
        assert {o.domain for o in found.opset_import} <= {"", "vdcache.variants"}
        nodes = [*nodes_of(found.graph), *(n for f in found.functions for n in f.node)]
        assert all(n.domain == "" or (n.domain == "vdcache.variants" and n.op_type in own) for n in nodes)
        assert all(o.version == manifest.opset for o in found.opset_import if o.domain == "")
        if graph := next((g for g in manifest.graphs if g.file == name), None):
            assert sum(graph.operators.values()) == len(nodes)
            assert set(graph.operators) == {f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes}


def nodes_of(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


def test_skipped_means_gone(packages):
    found = models_of(packages())
    assert sum(n.op_type == "Softmax" for n in found["recompute.onnx"].graph.node) == 2
    assert not any(n.op_type == "Softmax" for n in found["reuse_all.onnx"].graph.node)
    assert len(found["reuse_all.onnx"].graph.node) * 3 < len(found["recompute.onnx"].graph.node)


def test_a_reusing_graph_reads_nothing_of_what_it_skips(copy):
    """Weights that only the computing graph has become NaN, and reused steps do not notice."""
    found = models_of(copy)
    places = {
        name: {
            (e["offset"], e["length"])
            for i in m.graph.initializer
            for e in [{x.key: int(x.value) for x in i.external_data if x.key != "location"}]
            if e
        }
        for name, m in found.items()
    }
    only = places["recompute.onnx"] - places["reuse_all.onnx"]
    assert len(only) > 6
    x, t, text = (v.numpy() for v in call())
    given = {"x": x, "timestep": t, "text": text}

    def run(spoil):
        runner = OnnxRunner(copy, hashes=False)
        runner.begin()
        results = []
        for step in range(2):
            runner.step()
            results.append(runner(given)[0])
            if spoil and not step:
                data = bytearray((copy / "weights.bin").read_bytes())
                for offset, length in only:
                    data[offset : offset + length] = b"\xff" * length
                (copy / "weights.bin").write_bytes(data)
                kept = runner._lanes
                runner = OnnxRunner(copy, hashes=False)
                runner.begin()
                runner.step()
                assert np.isnan(runner(given)[0]).any()
                runner._lanes = kept
        return results

    plain, spoilt = run(False), run(True)
    assert np.array_equal(plain[1], spoilt[1]) and np.isfinite(spoilt[1]).all()


def test_one_graph_takes_the_plan_and_returns_every_cache(packages):
    (graph,) = Manifest.read(packages("onnx-single")).graphs
    found = models_of(packages("onnx-single"))[graph.file]
    choices = [n for n in found.graph.node if n.op_type == "If"]
    assert len(choices) == 1 and graph.numbers["plan"] == "int64"
    assert set(graph.writes.values()) == {c.name for c in Manifest.read(packages("onnx-single")).caches}
    for branch in (a.g for a in choices[0].attribute):
        assert len(branch.output) == len(graph.outputs) and not branch.initializer
        made = {o for n in branch.node for o in n.output}
        assert {o.name for o in branch.output} <= made


def test_the_whole_loop_has_no_control_flow_and_each_variant_once(packages):
    found = models_of(packages("onnx-unrolled"))["loop.onnx"]
    kinds = [n.op_type for n in (*found.graph.node, *(n for f in found.functions for n in f.node))]
    assert not {"If", "LoopSpec", "Scan"} & set(kinds)
    assert sorted(f.name for f in found.functions) == ["recompute", "reuse_all"]
    assert kinds.count("recompute") == 2 * len(SCHEDULE.computed)
    assert kinds.count("reuse_all") == 2 * (STEPS - len(SCHEDULE.computed))
    assert {v.name for v in found.graph.input} == {"noise", "text"}


def test_weights_lie_once(package):
    weights = sum(p.numel() * p.element_size() for p in model().parameters())
    size = (package / "weights.bin").stat().st_size
    assert size <= 1.05 * weights + 2048 and size >= weights
    rest = sum(p.stat().st_size for p in package.glob("*.onnx"))
    assert rest < 200_000


def test_tied_weights_lie_once(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()
            self.first = torch.nn.Linear(4, 4)
            self.second = torch.nn.Linear(4, 4)
            self.second.load_state_dict(self.first.state_dict())  # equal in content, not one tensor
            self.requires_grad_(False)

        def forward(self, x, timestep, text):
            return self.second(self.inner(self.first(x), timestep, text))

    manifest = vdcache.export(Tied(), call(), schedule=SCHEDULE, path=tmp_path / "tied")
    alone = sum(p.numel() * 4 for p in model().parameters())
    assert manifest.files["weights.bin"].bytes <= alone + 20 * 4 + 2048


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def stop(doing):
        if doing.startswith("hashing"):
            assert any(tmp_path.iterdir()) and not (tmp_path / "package").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exported(tmp_path / "package", on_progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_package_is_replaced_only_when_asked_and_only_by_a_whole_one(copy):
    before = json.loads((copy / "manifest.json").read_text())
    with pytest.raises(vdcache.errors.ConfigError, match="is there already; overwrite=True replaces it"):
        exported(copy)

    def stop(doing):
        if doing.startswith("hashing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exported(copy, overwrite=True, on_progress=stop)
    assert json.loads((copy / "manifest.json").read_text()) == before
    (copy / "manifest.json").unlink()
    with pytest.raises(vdcache.errors.ConfigError, match="and it is no package"):
        exported(copy, overwrite=True)
