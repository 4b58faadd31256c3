"""The examples run as they stand, with tiny parts; the notebook runs from top to bottom."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

import vdcache

EXAMPLES = Path(__file__).parents[2] / "examples"
# computed steps of each recipe, in runs of so many steps
RUNS = {
    "wan": ("every-3", 8, "4 of 8 steps computed"),
    "hunyuan_video": ("every-2", 6, "4 of 6 steps computed"),
    "cogvideox": ("fora-2", 6, "4 of 6 steps computed"),
    "flux": ("taylorseer-2-1", 8, "5 of 8 steps computed"),
    "own_dit": ("every-3", 8, "computed steps: 0 3 6 7"),
}


def run(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny", "--inner", "eager", *arguments])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch._dynamo.reset()
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore::vdcache.VdcacheWarning")
def test_example(name, monkeypatch, tmp_path, capsys):
    if name != "own_dit":
        pytest.importorskip("diffusers")
    recipe, steps, said = RUNS[name]
    out = tmp_path / "out.pt"
    run(name, monkeypatch, "--recipe", recipe, "--steps", str(steps), "--out", str(out))
    assert said in capsys.readouterr().out
    assert torch.load(out).isfinite().all()


def test_every_example_is_run():
    assert {p.stem for p in EXAMPLES.glob("*.py")} - {"tiny"} == set(RUNS)


def test_the_recipes_of_the_examples_exist():
    import re

    for name in RUNS:
        found = re.search(r'"--recipe", default="([^"]+)"', (EXAMPLES / f"{name}.py").read_text())
        assert found is not None and found[1] in str(vdcache.methods.recipe(found[1]).name)


def test_notebook(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs), "no timeline"
    printed = "".join(o.get("text", "") for o in outputs)
    assert "every-3 computed 9 of 24 steps" in printed and "PSNR" in printed
