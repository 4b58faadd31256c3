"""Looking at passes while they run: words in the environment or around code, files of every graph, torch's own logs."""

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vdcache
from vdcache.ir.graph_files import load_graph
from vdcache.passes import Canonicalise, MarkBranches, MergeSlots, Pipeline
from vdcache.passes.watching import Debug, current
from vdcache.testing import TinyDiT, latent, parse, time_of

TEXT = """
%0 = input() : f32[3,4]
%1 = parameter() : f32[4,4]
%2 = matmul(%0, %1)
%3 = add(%0, %2)
%4 = relu(%3)
%5 = add(%3, %4)
return (%5)"""
PIPELINE = Pipeline((Canonicalise(), MarkBranches(), MergeSlots()))


@dataclass(frozen=True)
class Fails(vdcache.Pass):
    name: ClassVar[str] = "fails"

    def run(self, graph):
        raise KeyError("missing")


@dataclass(frozen=True)
class Lies(vdcache.Pass):
    name: ClassVar[str] = "lies"

    def run(self, graph):
        graph.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)[0].target = torch.ops.aten.sin.default
        return vdcache.PassResult(graph, 0)


def test_changed_refusals_and_timing(capsys):
    with vdcache.debug("changed", "refusals,timing"):
        PIPELINE.run(parse(TEXT))
    said = capsys.readouterr().err
    assert "vdcache: mark-branches changed\n" in said and "+%3 = cache_guard(%2, 'all/s0.b0.other') : f32[3,4]" in said
    assert "%6 (add_1): no matrix product, convolution or attention between 'add' and 'relu'" in said
    assert "ms     1 rewrites  mark-branches" in said
    assert "canonicalise changed" not in said
    PIPELINE.run(parse(TEXT))
    assert capsys.readouterr().err == ""


def test_verify_holds_whoever_runs_the_pipeline():
    """A pass of another package always; vdcache's own, which its tests verify, where it is asked for."""
    own = type("Own", (Lies,), {"__module__": "vdcache.passes.own"})()
    Pipeline((own,)).run(parse(TEXT))
    said = "reports no rewrites, but the graph has changed"
    with pytest.raises(vdcache.errors.ContractError, match=said):
        Pipeline((Lies(),)).run(parse(TEXT))
    with vdcache.debug("verify"), pytest.raises(vdcache.errors.ContractError, match=said):
        Pipeline((own,)).run(parse(TEXT))


def test_files_of_every_graph_and_of_a_failure(tmp_path):
    with vdcache.debug(f"dump:{tmp_path}"):
        PIPELINE.run(parse(TEXT))
        with pytest.raises(vdcache.errors.ContractError, match=r"'fails' failed at test_watching\.py:34: KeyError") as error:
            Pipeline((Canonicalise(), Fails())).run(parse(TEXT))
    good, bad = sorted(p for p in tmp_path.iterdir())
    assert sorted(p.name for p in good.iterdir()) == [
        "00_before.txt",
        "01_canonicalise.txt",
        "02_mark-branches.txt",
        "03_merge-slots.txt",
    ]
    assert "cache_guard(" in (good / "02_mark-branches.txt").read_text()
    saved = load_graph(bad / "failed_fails.txt")
    assert saved.pipeline == f"{__name__}:Fails"
    assert f"to see it again: vdcache opt {bad / 'failed_fails.txt'}" in error.value.__notes__


def test_the_environment_says_the_same(monkeypatch):
    monkeypatch.setenv("VDCACHE_DEBUG", "timing, dump:graphs")
    with vdcache.debug("verify"):
        assert current() == Debug(timing=True, verify=True, dump="graphs")
    assert current() == Debug(timing=True, dump="graphs")
    monkeypatch.setenv("VDCACHE_DEBUG", "chnaged")
    with pytest.raises(
        vdcache.errors.ConfigError, match="has no word 'chnaged'; there are changed, refusals, timing, verify, dump:DIR"
    ):
        PIPELINE.run(parse(TEXT))
    for wrong in ("dump", "verify:x"):
        with pytest.raises(vdcache.errors.ConfigError, match="has no word"), vdcache.debug(wrong):
            pass


@pytest.mark.parametrize("strict", [True, False])
def test_a_pass_that_fails_breaks_no_model(strict):
    """Where another package's pass fails, the model runs as torch.compile would run it, and its name is said."""
    torch._dynamo.reset()
    model = TinyDiT()
    compiled = vdcache.compile(model, "every-2", pipeline=[Fails()], num_steps=4, inner="eager", strict=strict)
    call = (latent(0), time_of(0), latent(1))
    with torch.no_grad():
        if strict:
            with pytest.raises(vdcache.errors.ContractError, match=r"'fails' failed at test_watching\.py:34: KeyError"):
                compiled(*call)
        else:
            with pytest.warns(vdcache.VdcacheWarning, match=r"'fails' failed at test_watching\.py:34: KeyError"):
                assert torch.equal(compiled(*call), model(*call))


def test_a_pipeline_may_be_given_by_value_or_as_text():
    for pipeline in (
        "mark-branches{kinds=mlp}",
        (MarkBranches(kinds=("mlp",)),),
        Pipeline((Canonicalise(), MarkBranches(kinds=("mlp",)))),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(
            TinyDiT(), backend="vdcache", options={"recipe": "every-2", "pipeline": pipeline, "num_steps": 4, "inner": "eager"}
        )
        with torch.no_grad(), vdcache.record() as history:
            for step in range(2):
                compiled(latent(step), time_of(step), latent(9))
        assert [s.rpartition(".")[2] for s in history[-1].reused] == ["mlp", "mlp"]
    for wrong, message in (("nope", "no pass is called 'nope'"), (["mlp"], "a pipeline is made of passes, and got 'mlp'")):
        with pytest.raises(vdcache.errors.ConfigError, match=message):
            vdcache.compile(TinyDiT(), "every-2", pipeline=wrong)
    with pytest.raises(vdcache.errors.ContractError, match="'merge-slots' requires guarded"):
        vdcache.compile(TinyDiT(), "every-2", pipeline="merge-slots")


@pytest.mark.parametrize(("setting", "debug"), [pytest.param("vdcache", False, marks=pytest.mark.thorough), ("+vdcache", True)])
def test_torch_logs(setting, debug):
    program = (
        "import torch, vdcache\nfrom vdcache.passes import *\n"
        f"Pipeline((Canonicalise(), MarkBranches())).run(vdcache.parse({TEXT!r}))\n"
    )
    env = {**os.environ, "TORCH_LOGS": setting}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mark-branches: 1 rewrites, 1 refusals" in done.stderr
    assert ("+%3 = cache_guard(%2" in done.stderr) == debug
