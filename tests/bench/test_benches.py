"""Every bench runs: its first row, in a tiny form, or where none is cheap its command line."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vdcache

pytest.importorskip("diffusers")

from bench.common import Bench
from bench.second_model.network import untrained
from bench.solvers import generate
from tests.support.thorough import some
from vdcache.demo import fixed
from vdcache.demo.model import DemoConfig, DemoDiT
from vdcache.demo.run import Row

ROOT = Path(__file__).parents[2]
BENCHES = sorted(p.stem for p in (ROOT / "bench").glob("*.py") if p.stem not in ("__init__", "common"))


def small(*args, num_layers=2):
    """In the place of the shipped model, or of a bench's own."""
    torch.manual_seed(0)
    return DemoDiT(DemoConfig(num_layers=num_layers)).eval().requires_grad_(False)


DEMO_ROW = Row("adacache-fast", 10, 30, 1.0, 2.8, 29.0, 0.85, 2.25, 10.0)
# Of each bench: its arguments, what is other than in a run that counts, and what must be installed.
FIRST_ROW = {
    "analysis": ((), {"DEPTHS": (1,)}, ()),
    "calibrating": (("--inner", "eager"), {"STEPS": 6, "load_model": small}, ()),
    "coverage": (("--models", "pixart"), {}, ("cache_dit",)),
    "demo": ((), {"run_demo": lambda out, rounds: [DEMO_ROW]}, ()),
    "exact": (("--only", "shares", "--models", "pixart"), {}, ()),
    "export": (
        ("--rounds", "1", "--no-aoti"),
        {"STEPS": 2, "FORMS": ("onnx",), "generation": lambda steps: fixed.generation(steps=steps, model=small(num_layers=1))},
        ("onnx", "onnxruntime"),
    ),
    "methods": (("--videos", "1"), {"STEPS": 2}, ("cache_dit",)),
    "moreg": (("--videos", "1"), {"STEPS": 3, "load_model": small}, ("torchmetrics",)),
    "outlined": (("--models", "tiny", "--pairs", "2"), {}, ()),
    "passes": ((), {"DEPTHS": (1,), "compile_now": lambda graph, inputs, options: None}, ()),
    "peers": ((), {}, ("cache_dit",)),
    "profilingdit": (("--picture", "profile.png"), {"STEPS": 2, "load_model": small}, ("skimage", "matplotlib")),
    "schedules": (
        ("--videos", "1", "--solvers", "euler"),
        {"STEPS": 2, "load_model": small, "converged": functools.partial(generate, steps=2)},
        (),
    ),
    "second": (
        ("--images", "1", "--inner", "eager"),
        {"STEPS": 2, "LADDER": (1,), "CONVERGED": ("unipc", 2), "load": untrained},
        (),
    ),
    "solvers": (("--videos", "1"), {"CONVERGED": ("unipc", 2), "load_model": small}, ()),
    "tiles": (("--only", "kernel"), {"PAPER": {8: {4: 1.25}, 24: {}, 13: {}}}, ("matplotlib",)),
}
# Their first rows take minutes, or they have a test below.
BY_COMMAND_LINE = ("compile_time", "gpu_session", "kernels", "mutation", "steps", "thorough")


class Enough(Exception):
    """The first row is there."""


def test_every_bench_is_run():
    assert sorted([*FIRST_ROW, *BY_COMMAND_LINE]) == BENCHES


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::vdcache.VdcacheWarning")
@pytest.mark.parametrize("name", FIRST_ROW)
def test_the_first_row(name, tmp_path, monkeypatch):
    given, other, needed = FIRST_ROW[name]
    for module in needed:
        pytest.importorskip(module)
    bench, rows = importlib.import_module(f"bench.{name}"), []

    def row(self, case, value, unit, *more, **details):
        rows.append(float(value))
        raise Enough

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Bench, "row", row)
    if name == "schedules":  # its baseline would wait for Inductor
        monkeypatch.setattr(torch, "compile", lambda model, **how: model)
    for attribute, value in other.items():
        assert hasattr(bench, attribute), f"bench.{name} has no {attribute} any more"
        monkeypatch.setattr(bench, attribute, value)
    monkeypatch.setattr(sys, "argv", [name, *given])
    torch._dynamo.reset()
    with pytest.raises(Enough):
        bench.main()
    assert len(rows) == 1


@pytest.mark.parametrize("name", BY_COMMAND_LINE)
def test_the_command_line(name, monkeypatch, capsys):
    bench = importlib.import_module(f"bench.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        bench.main()
    assert "usage:" in capsys.readouterr().out


@pytest.mark.slow
def test_every_row_of_steps(tmp_path, monkeypatch):
    """README's host times come from here."""
    from bench import steps

    monkeypatch.setattr(
        sys, "argv", ["steps", "--blocks", "1", "--rounds", "1", "--inner", "eager", "--json", str(tmp_path / "rows.json")]
    )
    steps.main()
    rows = {r["case"]: r for r in json.loads((tmp_path / "rows.json").read_text())}
    assert len(rows) == 7 and all(r["value"] >= 0 for r in rows.values())
    # what does not depend on this machine holds here too
    assert all(r["holds"] for case, r in rows.items() if "syncs" in case or "cached bytes" in case)


def test_every_planted_bug_has_its_place():
    """The bench of mutations ends at the first bug whose text is not where it was."""
    from bench.mutation import BUGS

    lost = [f"{b.file}: {b.what}" for b in BUGS if (Path(vdcache.__file__).parent / b.file).read_text().count(b.old) != 1]
    assert not lost
    # pytest fails where it is given no file, and a bug would then count as caught
    assert not {t for b in BUGS for t in b.tests if not (ROOT / t).exists()}
    assert all(b.tests for b in BUGS)


@pytest.mark.slow
@pytest.mark.parametrize("section", some(["all", "host"], "host".__eq__))
def test_the_gpu_session_runs_without_a_gpu(section, tmp_path):
    """Its sections are fenced, so that a bug in one shows in its rows alone."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)  # the kernel, interpreted, would take minutes, and has tests of its own
    command = [sys.executable, "-m", "bench.gpu_session", "--tiny", "--out", str(tmp_path)]
    command += [] if section == "all" else ["--only", section]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert not [r for r in rows if "error" in r or r["case"] == "failed"]
    wanted = {"model", "attention", "host"} if section == "all" else {section}
    assert {r["section"] for r in rows if "skipped" not in r} >= wanted
