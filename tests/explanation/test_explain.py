"""`vdcache.explain`: what it says, that it computes nothing, and what it says of bad input."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import vdcache
from tests.support.thorough import some
from tests.zoo import ZOO, build
from vdcache.cli.main import app
from vdcache.errors import CaptureError, ConfigError
from vdcache.explanation.target import load
from vdcache.testing import TinyDiT, latent, time_of


def tiny(blocks: int = 2):
    return TinyDiT(blocks), (latent(0), time_of(0), latent(1, 1, 3, 4)), {}


@functools.cache
def explained(name: str, **more):
    torch._dynamo.reset()
    return vdcache.explain(build(name), **ZOO[name].call(0, 6), **more)


# layers and attention, and besides them convolutions and linear attention
@pytest.mark.parametrize("name", some(["wan", "flux", "sana", "pixart"], {"wan", "sana"}.__contains__))
def test_flops_are_those_of_torchs_own_counter(name):
    model = build(name)
    # the counter does not know the CPU's fused attention
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**ZOO[name].call(0, 6))
    assert explained(name).flops == counter.get_total_flops()


def test_branches_attentions_blocks_and_conditioning():
    report = explained("wan")
    assert report.count() == {"self-attention": 3, "cross-attention": 3, "mlp": 3}
    first = report.branches[0]
    assert (first.kind, first.stream, first.block, first.layout) == ("self-attention", 0, 0, "full")
    assert first.gate[0] and first.gate[1] and first.bytes == 48 * 24 * 4
    assert "transformer_wan.py:" in first.line and first.module == "blocks.0.attn1"
    (attention,) = first.attentions
    assert (attention.heads, attention.q_len, attention.kv_len, attention.head_dim) == (2, 48, 48, 12)
    assert attention.form == "sdpa" and attention.grid.frames == 3
    assert [b.shape for b in report.blocks] == [0, 0, 0] and [len(b.branches) for b in report.blocks] == [3, 3, 3]
    (stream,) = report.streams
    assert stream.role == "latent" and stream.shape == (1, 48, 24) and stream.inputs == ("hidden_states",)
    assert report.conditioning.timestep_inputs == ("timestep",)
    assert report.conditioning.timestep and report.conditioning.text and report.conditioning.constant
    assert 0.9 < report.coverage < 1
    assert not report.graphs[0].ends and report.refusals


def test_two_streams_and_where_their_tokens_lie():
    report = explained("flux")
    assert [s.role for s in report.streams] == ["latent", "text", "joint"]
    assert report.streams[2].parents == (0, 1)
    joint = next(b for b in report.branches if b.kind == "joint-attention").attentions[0]
    assert [(s.role, s.start, s.stop) for s in joint.spans] == [("text", 0, 6), ("latent", 6, 22)]
    assert [len(b.branches) for b in report.blocks] == [4, 4, 1, 1]
    assert [b.shape for b in report.blocks] == [0, 0, 1, 1]


def test_layouts_of_alternating_blocks():
    report = explained("latte")
    assert [b.layout for b in report.branches if b.kind == "self-attention"] == ["spatial", "temporal"] * 2
    assert [b.shape for b in report.blocks] == [0, 1, 0, 1]


def test_forms_of_attention():
    forms = {"sit": "matmul-softmax", "flex": "flex", "sana_original": "linear", "wan": "sdpa"}
    for name, form in forms.items():
        own = [a for a in explained(name).attentions if a.kind == "self"]
        assert own and {a.form for a in own} == {form}, name


def test_two_latents_of_two_modalities():
    report = explained("audio_video")
    assert len({s.inputs for s in report.streams}) == 2
    assert {s.role for s in report.streams} == {"latent"}


def test_a_14_billion_parameter_model_is_explained_without_weights():
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=4)  # all other sizes are those of the 14B model
        args = (torch.empty(1, 16, 21, 60, 104), torch.empty(1, dtype=torch.long), torch.empty(1, 512, 4096))
    report = vdcache.explain(model, *args, recipe="adacache-fast")
    assert report.branches[0].attentions[0].q_len == 21 * 30 * 52
    assert report.flops > 1e14 and report.cache_bytes == 2 * 21 * 30 * 52 * 5120 * 4
    assert report.conditioning.timestep_inputs == ("args[1]",)


RUNS = []


@torch.library.custom_op("vdcache_test::seen", mutates_args=())
def seen(x: torch.Tensor) -> torch.Tensor:
    RUNS.append(x.shape)
    return x.clone()


@seen.register_fake
def _(x):
    return torch.empty_like(x)


def test_nothing_is_computed():
    """An operation that counts its runs is traced and never run."""

    class Counted(TinyDiT):
        def forward(self, x, timestep, text):
            return super().forward(torch.ops.vdcache_test.seen(x), timestep, text)

    _model, args, _ = tiny()
    assert vdcache.explain(Counted(), *args).count() == {"self-attention": 2, "mlp": 2}
    assert not RUNS
    Counted()(*args)
    assert RUNS


def test_fake_tensors_will_do():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model, args, _ = tiny()
        assert vdcache.explain(model, *args).count() == {"self-attention": 2, "mlp": 2}


def test_a_compiled_model_is_seen_through_and_still_works():
    model, args, _ = tiny()
    compiled = torch.compile(model, backend="eager")
    want = model(*args)
    assert vdcache.explain(compiled, *args).model == "TinyDiT"
    assert torch.equal(compiled(*args), want)


def test_many_models_of_one_class_in_one_process():
    """Past Dynamo's recompile limit the model would run instead of being traced."""
    _, args, _ = tiny()
    for width in range(4, 24, 2):  # more than Dynamo compiles of one frame
        report = vdcache.explain(TinyDiT(1, width), *args)
        assert len(report.branches) == 2 and report.streams[0].shape[-1] == width


def test_recipes_slots_variants_and_bound():
    report = explained("flux", recipe="every-3", num_steps=9)
    assert len(report.slots_before) == 10 and len(report.slots) == 3
    assert all(s.merged for s in report.slots) and sum(len(s.branches) for s in report.slots) == 10
    assert [v.reuse for v in report.variants] == [(), ("all",)]
    full, reuse = report.variants
    assert full.flops == report.flops and reuse.flops < 0.1 * full.flops
    assert [bool(p) for p in report.schedule] == [False, True, True, False, True, True, False, True, False]
    assert report.bound == pytest.approx(9 * full.flops / (4 * full.flops + 5 * reuse.flops))
    assert report.cache_bytes == sum(s.bytes for s in report.slots)


@pytest.mark.parametrize(
    ("goal", "computed", "text"),
    [({}, 4, "2× speed, 30 dB at least"), ({"speedup": 3.0}, 2, "3× speed"), ({"quality_db": 40.0}, 1, "40 dB")],
    ids=str,
)
def test_what_the_goal_of_the_default_recipe_means(goal, computed, text):
    model, args, _ = tiny()
    report = vdcache.explain(model, *args, recipe=vdcache.methods.auto(**goal), num_steps=10)
    assert sum(not plan for plan in report.schedule) == computed and report.goal == text
    assert report.bound >= goal.get("speedup", 2.0)
    shown = " ".join(str(report).split())
    assert f"goal {text}: {computed} of 10 steps computed, {report.bound:.2f}× at most" in shown and "1.00×" not in shown
    few = vdcache.explain(model, *args, recipe=vdcache.methods.auto(speedup=9.0), num_steps=2)
    assert few.bound == 1 and few.schedule == ((), ())


def test_a_recipe_that_finds_nothing_says_why():
    report = vdcache.explain(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4), recipe="every-2")
    assert "no value is added to what it was computed from" in report.nothing
    assert not report.slots and "finds nothing to cache" in str(report)


def test_graph_breaks_are_shown_with_the_line_and_shared_graphs_counted():
    report = explained("hunyuan_video15")
    assert len(report.graphs) == 3 and [g.again for g in report.graphs] == [0, 2, 0]
    assert "transformer_hunyuan_video15.py:" in report.graphs[0].ends_at
    assert "breaks" in str(report) and "runs 3 times" in str(report)


def test_networkx_holds_the_branches():
    import networkx

    graph = explained("flux").to_networkx()
    kinds = networkx.get_node_attributes(graph, "kind")
    assert sum(k == "joint-attention" for k in kinds.values()) == 4
    assert networkx.is_directed_acyclic_graph(graph) and nx_paths(graph, "g0.s0.start", "g0.s0.end")


def nx_paths(graph, start, end):
    import networkx

    return networkx.has_path(graph, start, end)


def test_what_dynamo_cannot_trace_is_read_through_export(monkeypatch):
    """Dynamo made to fail: the report is the same but for the reason, which is told."""
    import vdcache.explanation.reader as module

    def fails(*args):
        raise CaptureError("Dynamo is out of order")

    model, args, _ = tiny()
    want = vdcache.explain(model, *args)
    monkeypatch.setattr(module, "parts", fails)
    report = vdcache.explain(model, *args)
    assert report.count() == want.count() and report.flops == want.flops and report.coverage == want.coverage
    assert report.conditioning.timestep_inputs == ("timestep",) and "out of order" in str(report)


class ReadsItsInput(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum().item() > 0 else x.nope


def test_bad_input_says_what_to_do():
    with pytest.raises(CaptureError, match=rf"ReadsItsInput cannot be traced, at {__file__}:\d+"):
        vdcache.explain(ReadsItsInput(), torch.zeros(2, device="meta"))
    with pytest.raises(CaptureError, match="runs no tensor operation"):
        vdcache.explain(lambda x: 3, torch.zeros(2))
    with pytest.raises(ConfigError, match="takes a module or a function"):
        vdcache.explain(3)
    with pytest.raises(ConfigError, match="no recipe is called"):
        vdcache.explain(nn.Linear(2, 2), torch.zeros(1, 2), recipe="adacash")
    model, args, _ = tiny()
    with pytest.raises(CaptureError, match="missing"):
        vdcache.explain(model, args[0])


def test_a_model_without_attention_has_branches_all_the_same():
    report = explained("dico")
    assert report.branches and not report.attentions and report.count().keys() <= {"mlp", "other"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nonsense", "is not package.module:function"),
        ("no_such_package:f", "there is no module 'no_such_package'"),
        ("tests.explanation.test_explain:nope", "'nope' does not exist in tests.explanation.test_explain; there are"),
        ("tests.explanation.test_explain:ZOO", "'ZOO' is not a function"),
        ("tests.explanation.test_explain:returns_a_model", "returns a TinyDiT; it returns"),
        ("tests.explanation.test_explain:returns_text", r"returns \(a TinyDiT, a Tensor, a dict\)"),
        ("tests.explanation.test_explain:fails", "fails: ZeroDivisionError"),
    ],
)
def test_bad_targets(target, message):
    with pytest.raises(ConfigError, match=message):
        load(target)


def returns_a_model():
    return TinyDiT()


def returns_text():
    return TinyDiT(), latent(0), {}


def fails():
    return 1 / 0


def test_the_command_line(tmp_path):
    result = CliRunner().invoke(
        app,
        ["explain", "tests.explanation.test_explain:tiny", "--recipe", "every-2", "--html", str(tmp_path / "a" / "page.html")],
    )
    assert result.exit_code == 0, result.output
    assert "2 self-attention, 2 mlp" in result.output and "bound" in result.output
    assert (tmp_path / "a" / "page.html").read_text().startswith("<!doctype html>")
    result = CliRunner().invoke(app, ["explain", "nonsense"])
    assert result.exit_code == 2


@pytest.mark.slow
def test_the_command_line_finds_modules_in_the_working_directory(tmp_path):
    (tmp_path / "mine.py").write_text("import torch\ndef f():\n    return torch.nn.Linear(2, 2), (torch.zeros(1, 2),), {}\n")
    command = [str(Path(sys.executable).with_name("vdcache")), "explain", "mine:f"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "no residual branch" in done.stdout


def test_the_shipped_example_and_the_version():
    result = CliRunner().invoke(app, ["explain", "vdcache.demo.model:example"])
    assert result.exit_code == 0 and "8 self-attention, 8 cross-attention, 8 mlp" in result.output
    assert vdcache.__version__ in CliRunner().invoke(app, ["--version"]).output


def test_a_page_that_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["explain", "vdcache.demo.model:example", "--html", str(tmp_path / "file" / "page.html")])
    assert result.exit_code == 2 and "self-attention" not in result.output


def test_a_report_is_no_wall_of_data():
    report = vdcache.explain(TinyDiT(8), latent(0), time_of(0), latent(1, 1, 3, 4), recipe="every-2")
    assert repr(report) == "<Report on TinyDiT: 1 graph, 16 branches, recipe 'every-2'; print it>" and len(str(report)) > 200


def test_a_model_without_flops_has_a_page(tmp_path):
    class Relu(torch.nn.Module):
        def forward(self, x):
            return x.relu()

    report = vdcache.explain(Relu(), torch.randn(2, 4), recipe="always")
    assert "Nothing can be skipped: no addition is a residual branch." in str(report).replace("\n", " ")
    report.to_html(tmp_path / "page.html")
    assert "–</b><span>at most" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("steps", [0, -1, True, 1.5, "3"])
def test_a_number_of_steps_that_is_none(steps):
    with pytest.raises(vdcache.errors.ConfigError, match="num_steps is the number of denoising steps, at least 1"):
        vdcache.explain(TinyDiT(), latent(0), time_of(0), latent(9, 1, 3, 4), num_steps=steps)
