"""A package that is not what it was is refused, and the message names the file."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import onnx
import pytest

from tests.exporting.packages import call
from vdcache.errors import CacheStateError, ConfigError
from vdcache.exporting.manifest import Manifest, facts_of
from vdcache.runtime_onnx import OnnxRunner


def changed(path, **fields):
    data = json.loads((path / "manifest.json").read_text())
    data.update(fields)
    (path / "manifest.json").write_text(json.dumps(data))


def refused(path, message, **options):
    with pytest.raises(ConfigError, match=message):
        OnnxRunner(path, **options)


def test_a_changed_file(copy):
    data = bytearray((copy / "weights.bin").read_bytes())
    data[100] ^= 1
    (copy / "weights.bin").write_bytes(data)
    refused(copy, r"weights\.bin was changed: its SHA-256")
    OnnxRunner(copy, hashes=False)


def test_a_changed_graph(copy):
    data = (copy / "recompute.onnx").read_bytes()
    (copy / "recompute.onnx").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(copy, r"recompute\.onnx was changed")


@pytest.mark.parametrize("name", ["weights.bin", "reuse_all.onnx", "loop_000.onnx"])
def test_a_missing_file(copy, name):
    (copy / name).unlink()
    refused(copy, f"{name} is missing; .*manifest.json lists it")


def test_truncated_weights(copy):
    data = (copy / "weights.bin").read_bytes()
    (copy / "weights.bin").write_bytes(data[: len(data) // 2])
    refused(copy, rf"weights\.bin is truncated: it has {len(data) // 2} bytes, .* says {len(data)}", hashes=False)


def test_longer_weights(copy):
    with (copy / "weights.bin").open("ab") as file:
        file.write(b"\0")
    refused(copy, r"weights\.bin is longer than it was", hashes=False)


def test_a_later_version(copy):
    changed(copy, version=2)
    refused(copy, r"manifest\.json has version 2, and this vdcache reads version 1")


def test_no_package(tmp_path, copy):
    refused(tmp_path, "is no package: it has no manifest.json")
    (copy / "manifest.json").write_text("{")
    refused(copy, r"manifest\.json is no JSON")
    (copy / "manifest.json").write_text("{}")
    refused(copy, r"manifest\.json is no manifest of a package")


def test_a_field_that_is_missing_unknown_or_of_another_type(copy):
    data = json.loads((copy / "manifest.json").read_text())
    for change, message in (
        (lambda d: d.pop("opset"), "no field 'opset'"),
        (lambda d: d.update(more=1), "unknown field 'more'"),
        (lambda d: d.update(opset="20"), r"'manifest\.opset' is '20'"),
        (lambda d: d["inputs"][0].update(shape=[1, "x"]), r"'manifest\.inputs\[0\]\.shape\[1\]' is 'x'"),
        (lambda d: d["steps"][1].update(graph="gone"), "step 1 runs the graph 'gone', which is not listed"),
        (lambda d: d["graphs"][0]["writes"].update(new_cache_all_run_0="lost"), "uses the cache 'lost', which is not listed"),
        (lambda d: d["graphs"][0].update(results=["lost"]), "has no input or output 'lost'"),
        (lambda d: d["files"].pop("weights.bin"), r"'files' does not list 'weights\.bin'"),
        (lambda d: d.update(kind="tflite"), "kind 'tflite' in form 'plans'"),
    ):
        spoilt = json.loads(json.dumps(data))
        change(spoilt)
        (copy / "manifest.json").write_text(json.dumps(spoilt))
        refused(copy, message)


def test_a_shape_that_is_not_the_graphs(copy):
    data = json.loads((copy / "manifest.json").read_text())
    data["caches"][0]["shape"][1] += 1
    changed(copy, caches=data["caches"])
    refused(copy, r"reuse_all\.onnx: 'cache_all_run_0' has shape \[1, 6, 32\], and the manifest says \[1, 7, 32\]")


@pytest.mark.parametrize(
    "name", ["../weights.bin", "/etc/passwd", "a/../../b", "..\\weights.bin", "C:weights.bin", ""], ids=lambda n: repr(n)
)
def test_a_name_that_leaves_the_folder(copy, name):
    data = json.loads((copy / "manifest.json").read_text())
    data["files"][name] = data["files"]["weights.bin"]
    changed(copy, weights=name, files=data["files"])
    refused(copy, "leaves the package's folder")


def test_a_link_that_leaves_the_folder(copy):
    (copy / "weights.bin").rename(copy.parent / "elsewhere.bin")
    (copy / "weights.bin").symlink_to(copy.parent / "elsewhere.bin")
    refused(copy, r"weights\.bin is a link out of the package's folder")


def test_a_graph_whose_weights_lie_outside_the_folder(copy):
    """Even where the manifest was changed with it."""
    (copy.parent / "secret.bin").write_bytes((copy / "weights.bin").read_bytes())
    found = onnx.load(copy / "recompute.onnx", load_external_data=False)
    for initializer in found.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location":
                entry.value = "../secret.bin"
    (copy / "recompute.onnx").write_bytes(found.SerializeToString())
    files = json.loads((copy / "manifest.json").read_text())["files"]
    files["recompute.onnx"] = asdict(facts_of(copy / "recompute.onnx"))
    changed(copy, files=files)
    refused(copy, r"onnxruntime .* does not take .*recompute\.onnx: .*escapes")


def test_another_kind(copy):
    changed(copy, kind="pt2")
    refused(copy, "is a package of kind 'pt2', and OnnxRunner runs onnx")


def test_calls_are_checked(packages):
    runner = OnnxRunner(packages())
    x, t, text = (v.numpy() for v in call())
    given = {"x": x, "timestep": t, "text": text}
    with pytest.raises(CacheStateError, match=r"call runner\.begin\(\) and runner\.step\(\) first"):
        runner(given)
    with pytest.raises(CacheStateError, match=r"call runner\.begin\(\) first"):
        runner.step()
    with pytest.raises(ConfigError, match="is a schedule of 6 steps, and 30 are asked for"):
        runner.begin(30)
    runner.begin(6)
    runner.step()
    for wrong, message in (
        ({"x": x, "timestep": t}, "takes 'text' as well"),
        ({**given, "y": x}, "has no input 'y'; it takes x, timestep, text"),
        ({**given, "x": x[:, :-1]}, r"'x' has shape \[1, 5, 4\], and the package was made for \[1, 6, 4\]"),
        ({**given, "x": x.astype("float64")}, "'x' is float64, and the package was made for float32"),
    ):
        with pytest.raises(ConfigError, match=message):
            runner(wrong)
    runner({**given, "x": x.astype("float16")})  # nothing is lost
    with pytest.raises(CacheStateError, match="lane 0 was called in step 0 already"):
        runner(given)
    runner.step()
    with pytest.raises(CacheStateError, match="lane 'late' was left out in step 0"):
        runner(given, lane="late")
    for _ in range(4):
        runner.step()
    with pytest.raises(CacheStateError, match="is a schedule of 6 steps, and a further one is asked for"):
        runner.step()


def test_a_lane_that_misses_a_computed_step(packages):
    """Its cached tensors are those of an earlier step than the schedule says."""
    runner = OnnxRunner(packages())
    x, t, text = (v.numpy() for v in call())
    given = {"x": x, "timestep": t, "text": text}
    runner.begin()
    for _ in range(2):
        runner.step()
        runner(given)
        runner(given, lane="other")
    runner.step()
    runner(given)
    runner.step()
    with pytest.raises(CacheStateError, match="lane 'other' was left out in step 2"):
        runner(given, lane="other")


WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "networkx", "safetensors", "onnx", "jinja2"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
if sys.argv[2:]:
    from vdcache.cli.main import app

    app(["run", sys.argv[1], "--out", sys.argv[2]])
import numpy as np
from vdcache.runtime_onnx import OnnxRunner

runner = OnnxRunner(sys.argv[1])
with np.load(sys.argv[1] + "/inputs.npz") as given:
    result = runner.generate(dict(given))["output_0"]
print(runner.history.computed_steps(), len(runner.history), float(np.abs(result).max()))
assert "torch" not in sys.modules
"""


def test_it_runs_where_there_is_no_torch(package):
    from tests.exporting.packages import by_hand

    done = subprocess.run([sys.executable, "-c", WITHOUT, str(package)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps, count, size = done.stdout.strip().rpartition("] ")[0] + "]", *done.stdout.split()[-2:]
    assert steps == "[0, 2, 3]" and count == "12"
    assert float(size) == pytest.approx(float(by_hand().abs().max()), rel=1e-4)


def test_the_command_runs_where_there_is_no_torch(packages, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(packages()), str(tmp_path / "result.npz")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "6 calls computed" in done.stdout, done.stderr
    assert (tmp_path / "result.npz").is_file()


def test_reading_without_hashes_is_asked_for(copy):
    (copy / "inputs.npz").write_bytes((copy / "inputs.npz").read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match=r"inputs\.npz was changed"):
        Manifest.read(copy)
    assert Manifest.read(copy, hashes=False).form == "plans"
