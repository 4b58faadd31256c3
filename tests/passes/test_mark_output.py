"""mark-output: the output that belongs to the latent is guarded, with the latent as its base where they are of one form."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from tests.zoo import ZOO, build, graph_of
from vdcache.errors import ConfigError
from vdcache.ir import dialect, dump
from vdcache.ir.capture import trace
from vdcache.passes import Canonicalise, DeadCode, MarkOutput, Pipeline, Specialise, variant_io
from vdcache.testing import TinyDiT, latent, run_variant, time_of, values_of

X, W = torch.randn(1, 6, 4), torch.randn(4, 4)
GIVEN = frozenset(Specialise.requires)


def marked(graph, **options):
    found, steps = Pipeline((Canonicalise(), MarkOutput(**options)), verify=True).run(graph)
    return found, [str(r) for r in steps[-1].refusals]


def variant(graph, reuse=()):
    result, _ = Pipeline((Specialise(reuse=frozenset(reuse)), DeadCode()), verify=True, given=GIVEN).run(graph)
    return result


def net(x, w):
    return x + torch.relu(x @ w)


def test_a_reused_step_is_one_addition():
    graph, refused = marked(trace(net, X, W).graph)
    assert not refused
    assert_expected_inline(
        dump(graph),
        """\
%0 = input() : f32[1,6,4]
%1 = input() : f32[4,4]
%2 = matmul(%0, %1) : f32[1,6,4]
%3 = relu(%2) : f32[1,6,4]
%4 = add(%0, %3) : f32[1,6,4]
%5 = cache_guard(%4, 'all/output', %0) : f32[1,6,4]
return (%5)""",
    )
    assert_expected_inline(
        dump(variant(graph, {"all"})),
        """\
%0 = input() : f32[1,6,4]
%1 = input() : f32[4,4]
%2 = input() : f32[1,6,4]
%3 = add(%0, %2) : f32[1,6,4]
return (%3)""",
    )
    full = run_variant(variant(graph), X, W)
    assert torch.equal(full[0], net(X, W)) and torch.equal(full[1], net(X, W) - X)
    other = torch.randn(1, 6, 4)
    assert torch.equal(run_variant(variant(graph, {"all"}), other, W, extra=full[1:])[0], other + full[1])


def test_without_a_base_the_output_itself_is_kept():
    graph, refused = marked(trace(net, X, W).graph, base="zero", group="whole")
    assert not refused and [(g.args[1], len(g.args)) for g in dialect.cache_guards(graph.graph)] == [("whole/output", 2)]
    assert_expected_inline(
        dump(variant(graph, {"whole"})),
        """\
%0 = input() : f32[1,6,4]
%1 = input() : f32[4,4]
%2 = input() : f32[1,6,4]
return (%2)""",
    )


def output(name):
    with torch.no_grad():
        out = build(name)(**ZOO[name].call(3, 6))
    return out[0] if isinstance(out, tuple) else getattr(out, "sample", out)


@pytest.mark.parametrize(("name", "channels"), [("wan", 4), ("demo", 3), ("wan_i2v", 4), ("flux", None), ("cogvideox", None)])
@torch.no_grad()
def test_published_classes(name, channels):
    """The base is the latent, without the channels that hold conditions; what is kept is the difference."""
    graph, given = graph_of(name)
    found, refused = marked(graph)
    assert not refused
    (cache_guard,) = dialect.cache_guards(found.graph)
    values = values_of(found, given)
    x = ZOO[name].call(3, 6)["hidden_states"]
    base = x if channels is None else x[:, :channels]
    assert torch.equal(values[cache_guard.args[0].name], output(name)) and torch.equal(values[cache_guard.args[2].name], base)
    full = variant(found)(*given)
    assert variant_io(variant(found)).saves == ("all/output",)
    assert torch.equal(full[0], output(name)) and torch.equal(full[1], output(name) - base)
    reused = variant(found, {"all"})
    assert sum(n.op == "call_function" for n in reused.graph.nodes) <= 2, "an addition, and a slice of the latent"


@pytest.mark.parametrize("name", ["latte", "pixart"])
@torch.no_grad()
def test_an_output_of_another_shape_is_kept_itself(name):
    """Latte and PixArt return a variance as well, as more channels."""
    graph, given = graph_of(name)
    found, (why,) = marked(graph)
    assert "the output itself is kept" in why and "the output is (1, 8" in why
    (cache_guard,) = dialect.cache_guards(found.graph)
    assert len(cache_guard.args) == 2 and torch.equal(values_of(found, given)[cache_guard.args[0].name], output(name))
    assert not [n for n in variant(found, {"all"}).graph.nodes if n.op == "call_function"]


def test_of_several_outputs_the_one_of_the_latents_form():
    tiny = TinyDiT()

    def model(x, t, text):
        out = tiny(x, t, text)
        return text * 2, out, out.mean()

    args = latent(0), time_of(0), latent(9, 1, 3, 4)
    found, refused = marked(trace(model, *args).graph)
    assert not refused
    (cache_guard,) = dialect.cache_guards(found.graph)
    results = found.graph.output_node().args[0]
    assert results[1] is cache_guard and len(results) == 3
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(found(*args), model(*args), strict=True))


def test_another_type_is_kept_itself():
    graph, (why,) = marked(trace(lambda x, w: net(x, w).double(), X, W).graph)
    assert "torch.float64, the latent (1, 6, 4) torch.float32" in why
    assert [len(g.args) for g in dialect.cache_guards(graph.graph)] == [2]


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda x, w: (x @ w).relu(), "no input was found that the model returns an update of"),
        (lambda x, w: int(x.shape[0]), "the graph returns no tensor"),
    ],
)
def test_refusals(fn, why):
    plain, _ = Pipeline((Canonicalise(),)).run(trace(fn, X, W).graph)
    graph, (refused,) = marked(trace(fn, X, W).graph)
    assert why in refused and dump(graph) == dump(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "latent"}, "base is 'input' or 'zero'; got 'latent'"),
        ({"base": None}, "base is 'input' or 'zero'; got None"),
        ({"base": 1}, "got 1"),
        ({"group": ""}, "group"),
        ({"group": "a/b"}, "group"),
        ({"group": 3}, "group"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        MarkOutput(**options)


def test_the_text_reads_back():
    pipeline = Pipeline((Canonicalise(), MarkOutput("zero", "whole")))
    assert Pipeline.parse(str(pipeline)) == pipeline and str(MarkOutput()) == "mark-output"


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "hunyuan_video"])
@torch.no_grad()
def test_hidden_states_are_guarded_behind_the_last_block(name):
    """Reusing them leaves no attention, and the head of the model runs on what was kept."""
    graph, inputs = graph_of(name)
    found, refusals = marked(graph, location="hidden")
    (guard,) = dialect.cache_guards(found.graph)
    assert guard.args[1:] == ("all/hidden",) and not refusals
    reuse, compute = variant(found, ["all"]), variant(found)
    assert not any("attention" in str(n.target) for n in reuse.graph.nodes)
    assert variant_io(compute).saves == ("all/hidden",)
    *results, kept = run_variant(compute, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(run_variant(reuse, *inputs, extra=[kept]), results, strict=True))
