"""split-at-probe: what lies on either side, that nothing is computed twice, and that both parts together are the graph."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from vdcache.errors import CaptureError, ConfigError
from vdcache.ir import dialect, dump, trace
from vdcache.ir.edit import inputs
from vdcache.ir.ops import SLICES, VIEWS, tensor_of
from vdcache.passes import Canonicalise, MarkBranches, MergeSlots, Pipeline, SplitAtProbe, head_io
from vdcache.passes.base import copy_meta
from vdcache.testing import WIDTH, Net, TinyDiT, guarded, latent, residual_nets, time_of

aten = torch.ops.aten
X, W = torch.randn(3, WIDTH), torch.randn(WIDTH, WIDTH)
GATE = torch.randn(WIDTH)


def net(x, w):
    x = x + x @ w
    return x + torch.relu(x @ w)


def put(graph, which, name="all/probe.x", distance="l1", reference_step="computed"):
    """Probe the node of this number among those that compute a tensor of floats, or of this name."""
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and not dialect.is_dialect(n) and tensor_of(n) is not None]
    nodes = [n for n in nodes if n.meta["val"].is_floating_point()]
    node = nodes[which % len(nodes)] if isinstance(which, int) else next(n for n in nodes if n.name == which)
    with graph.graph.inserting_after(node):
        mark = graph.graph.call_function(dialect.probe, (node, name, distance, reference_step))
    copy_meta(mark, "test", node)
    graph.recompile()
    return graph


def split(graph):
    """Head, tail, and what was refused for either."""
    parts = [Pipeline((SplitAtProbe(p),), verify=True, given=SplitAtProbe.requires).run(graph) for p in ("head", "tail")]
    (head, (first,)), (tail, (second,)) = parts
    head.graph.lint()
    tail.graph.lint()
    assert first.refusals == second.refusals
    return head, tail, [str(r) for r in first.refusals]


def run_apart(head, tail, *args):
    """Head, then tail, as a program runs them."""
    io = head_io(head)
    with torch.no_grad():
        out = head(*args, *(torch.zeros(v.shape, dtype=v.dtype) for v in io.previous_values))
        return tail(*args, *out[: len(io.carried)])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def work(graph):
    """Names of what is computed: all but inputs, marks, numbers, and what is a view or a part of something."""
    return {
        n.name
        for n in graph.graph.nodes
        if n.op == "call_function"
        and n.target not in VIEWS | SLICES
        and n.target is not aten.expand.default
        and not dialect.is_dialect(n)
        and not isinstance(n.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))
        and not str(n.meta.get("vdcache", "")).startswith("split-at-probe")
    }


def assert_nothing_twice(graph, head, tail):
    first, second = work(head), work(tail)
    assert not first & second, "computed in both parts"
    assert first | second == work(graph), "lost"


def test_head_and_tail():
    graph = put(guarded(net, X, W, more=(MergeSlots(),)), "add")
    head, tail, refused = split(graph)
    assert not refused
    assert_expected_inline(
        dump(head),
        """\
%0 = input() : f32[3,4]
%1 = input() : f32[4,4]
%2 = input() : f32[3,4]
%3 = matmul(%0, %1) : f32[3,4]
%4 = add(%0, %3) : f32[3,4]
%5 = _to_copy(%4, dtype=torch.float32) : f32[3,4]
%6 = _to_copy(%2, dtype=torch.float32) : f32[3,4]
%7 = sub(%6, %5) : f32[3,4]
%8 = abs(%7) : f32[3,4]
%9 = sum(%8) : f32[]
%10 = abs(%6) : f32[3,4]
%11 = sum(%10) : f32[]
%12 = abs(%5) : f32[3,4]
%13 = sum(%12) : f32[]
%14 = stack([%9, %11, %13]) : f32[3]
return (%4, %4, %14)""",
    )
    assert_expected_inline(
        dump(tail),
        """\
%0 = input() : f32[3,4]
%1 = input() : f32[4,4]
%2 = input() : f32[3,4]
%3 = matmul(%2, %1) : f32[3,4]
%4 = relu(%3) : f32[3,4]
%5 = add(%2, %4) : f32[3,4]
%6 = cache_guard(%5, 'all/run.0', %0) : f32[3,4]
return (%6)""",
    )
    io = head_io(head)
    assert io.probes == (("all/probe.x", "l1", "computed"),) and io.carried == ("add",)
    assert [v.shape for v in io.carried_values] == [v.shape for v in io.previous_values] == [X.shape]
    assert head_io(tail) == head_io(graph)


def test_views_at_the_frontier_are_repeated():
    def views(x, w):
        h = (x @ w).reshape(2, 6).t()
        return x + (h @ h.t()).sum() * (torch.relu(h[1:]).sum() + x @ w @ w)

    graph = put(guarded(views, X, W), "t")
    head, tail, _ = split(graph)
    assert_expected_inline(
        dump(head),
        """\
%0 = input() : f32[3,4]
%1 = input() : f32[4,4]
%2 = input() : f32[6,2]
%3 = matmul(%0, %1) : f32[3,4]
%4 = view(%3, [2, 6]) : f32[2,6]
%5 = t(%4) : f32[6,2]
%6 = clone(%5, memory_format=torch.contiguous_format) : f32[6,2]
%7 = _to_copy(%6, dtype=torch.float32) : f32[6,2]
%8 = _to_copy(%2, dtype=torch.float32) : f32[6,2]
%9 = sub(%8, %7) : f32[6,2]
%10 = abs(%9) : f32[6,2]
%11 = sum(%10) : f32[]
%12 = abs(%8) : f32[6,2]
%13 = sum(%12) : f32[]
%14 = abs(%7) : f32[6,2]
%15 = sum(%14) : f32[]
%16 = stack([%11, %13, %15]) : f32[3]
return (%3, %6, %16)""",
    )
    assert_expected_inline(
        dump(tail),
        """\
%0 = input() : f32[3,4]
%1 = input() : f32[4,4]
%2 = input() : f32[3,4]
%3 = view(%2, [2, 6]) : f32[2,6]
%4 = t(%3) : f32[6,2]
%5 = t(%4) : f32[2,6]
%6 = matmul(%4, %5) : f32[6,6]
%7 = sum(%6) : f32[]
%8 = slice(%4, 0, 1, 9223372036854775807) : f32[5,2]
%9 = relu(%8) : f32[5,2]
%10 = sum(%9) : f32[]
%11 = matmul(%0, %1) : f32[3,4]
%12 = matmul(%11, %1) : f32[3,4]
%13 = add(%10, %12) : f32[3,4]
%14 = mul(%7, %13) : f32[3,4]
%15 = cache_guard(%14, 'all/s0.b0.mlp') : f32[3,4]
%16 = add(%0, %15) : f32[3,4]
return (%16)""",
    )
    assert head_io(head).carried == ("matmul",)
    assert same(run_apart(head, tail, X, W), graph(X, W))


def test_parts_of_one_value_are_views_too():
    """Of a split nothing but the whole is carried; a gather copies, and is carried itself."""

    def parts(x, w):
        a, b = (x @ w).chunk(2, -1)
        c = (x @ w)[torch.tensor([0, 2, 1])]
        return x + (a * b).sum() * c

    graph = put(guarded(parts, X, W), "index")
    head, tail, _ = split(graph)
    assert head_io(head).carried == ("index",) and same(run_apart(head, tail, X, W), graph(X, W))
    graph = put(guarded(parts, X, W), "mul")
    head, tail, _ = split(graph)
    assert head_io(head).carried == ("mul",)
    assert_nothing_twice(graph, head, tail)


@pytest.mark.parametrize(
    "twice",
    [
        lambda h: torch.var_mean(h, -1, keepdim=True),
        lambda h: torch.sort(h, -1),
        lambda h: torch.native_layer_norm(h, (WIDTH,), None, None, 1e-5),
        lambda h: torch.linalg.qr(h),
    ],
    ids=["var_mean", "sort", "native_layer_norm", "qr"],
)
def test_an_operation_of_several_results_is_computed_once(twice):
    def several(x, w):
        first, second = twice(x @ w)[:2]
        return x + (first * 2).sum() + (x @ w) * second.sum()

    graph = put(guarded(several, X, W), "mul")
    head, tail, _ = split(graph)
    assert same(run_apart(head, tail, X, W), graph(X, W))
    assert_nothing_twice(graph, head, tail)


def test_inputs_stay_what_they_are():
    graph = put(guarded(net, X, W), "add")
    given = [n.name for n in inputs(graph.graph)]
    for part in split(graph)[:2]:
        assert [n.name for n in inputs(part.graph)][: len(given)] == given


def test_two_probes_and_their_sums_in_order():
    graph = put(put(guarded(net, X, W), "matmul", "all/probe.a", "l2", "step"), "add", "all/probe.b", "cosine")
    head, tail, _ = split(graph)
    assert head_io(head).probes == (("all/probe.a", "l2", "step"), ("all/probe.b", "cosine", "computed"))
    previous = [torch.randn(3, WIDTH), torch.randn(3, WIDTH)]
    with torch.no_grad():
        *_, a, b, sums = head(X, W, *previous)
        torch.testing.assert_close((a, b), (X @ W, X + X @ W))
        want = [(previous[0] - a).square(), previous[0].square(), a.square(), previous[1] * b, previous[1] ** 2, b**2]
    torch.testing.assert_close(sums, torch.stack([v.sum() for v in want]))
    assert not dialect.probes(tail.graph) and same(run_apart(head, tail, X, W), graph(X, W))


def test_a_probe_of_an_input_has_an_empty_head():
    graph = guarded(net, X, W)
    given = inputs(graph.graph)
    with graph.graph.inserting_after(given[-1]):
        copy_meta(graph.graph.call_function(dialect.probe, (given[0], "all/probe.input", "l1", "step")), "test", given[0])
    head, tail, _ = split(graph)
    assert head_io(head).carried == () and not work(head) and work(tail) == work(graph)
    assert [n.name for n in inputs(tail.graph)] == [n.name for n in given]
    assert same(run_apart(head, tail, X, W), graph(X, W))


def test_what_is_probed_is_handed_out_dense():
    def turned(x, w):
        return x + (x @ w).t().t() @ w

    graph = put(guarded(turned, X, W), "t")
    head, tail, _ = split(graph)
    with torch.no_grad():
        *_, value, _ = head(X, W, torch.zeros(WIDTH, 3))
    assert value.is_contiguous() and torch.equal(value, (X @ W).t())
    assert same(run_apart(head, tail, X, W), graph(X, W))


@pytest.mark.parametrize(
    "noise",
    [
        lambda x: torch.bernoulli(x.sigmoid()),
        lambda x: torch.nn.functional.dropout(x, 0.5, True),
    ],
    ids=["bernoulli", "dropout"],
)
def test_random_numbers_cannot_be_drawn_in_another_order(noise):
    graph = put(guarded(lambda x, w: x + noise(x @ w) @ w, X, W), "matmul_1")
    for part in ("head", "tail"):
        with pytest.raises(CaptureError, match="cannot be moved before the rest"):
            Pipeline((SplitAtProbe(part),), given=SplitAtProbe.requires).run(graph)
    graph = put(guarded(lambda x, w: x + noise(x @ w) @ w, X, W), "matmul")
    assert split(graph), "after the probe they may be drawn"


def test_an_input_that_the_model_writes_into():
    """The new value crosses as any other; who runs the graph writes it back."""

    def writes(x, w):
        w.add_(1)
        return x + (x @ w) @ w

    graph = put(guarded(writes, X, W), "matmul")
    head, tail, _ = split(graph)
    assert same(run_apart(head, tail, X, W), graph(X, W)) and len(graph(X, W)) == 2
    assert tail.meta["vdcache"] == graph.meta["vdcache"]


def test_a_graph_without_a_probe_stays_as_it_is():
    graph = guarded(net, X, W)
    for part in ("head", "tail"):
        result, (step,) = Pipeline((SplitAtProbe(part),), verify=True, given=SplitAtProbe.requires).run(graph)
        assert step.rewrites == 0 and dump(result) == dump(graph)


def test_bad_options():
    with pytest.raises(ConfigError, match="part is 'head' or 'tail'; got 'middle'"):
        SplitAtProbe("middle")
    assert str(SplitAtProbe("head")) == "split-at-probe{part=head}"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("which", range(3, 60, 17))
def test_a_denoiser_at_any_value(which, dynamic):
    args = latent(0), time_of(0), latent(9, 1, 3, 4)
    model = TinyDiT()
    traced = trace(model, *args, dynamic=dynamic).graph
    graph, _ = Pipeline((Canonicalise(), MarkBranches(), MergeSlots()), verify=True).run(traced)
    given = [*model.state_dict(keep_vars=True).values()]
    assert len(given) + len(args) >= len(inputs(graph.graph))
    put(graph, which)
    head, tail, _ = split(graph)
    assert_nothing_twice(graph, head, tail)


@given(residual_nets(), st.integers(0, 200), st.booleans())
@settings(deadline=None, max_examples=10)
def test_any_net_at_any_value(net, which, merged):
    """Both parts, one after the other, are the graph bit for bit; nothing is computed twice, and nothing is lost."""
    graph = put(guarded(net, X, W, GATE, more=(MergeSlots(),) if merged else ()), which)
    head, tail, refused = split(graph)
    assert_nothing_twice(graph, head, tail)
    assert same(run_apart(head, tail, X, W, GATE), graph(X, W, GATE))
    left = {str(g.args[1]) for g in dialect.cache_guards(tail.graph)}
    assert len(left) + len(refused) == len(dialect.cache_guards(graph.graph))


def test_the_property_has_work_to_do():
    """Among the places of one net: cache guards before and after the probe, several values carried, a view repeated."""
    net = Net(
        (("", ("matmul",), "add", False), ("view", ("matmul", "view"), "gated", True), ("norm", ("matmul",), "add", False))
    )
    both, several, views = set(), set(), set()
    for which in range(12):
        head, tail, refused = split(put(guarded(net, X, W, GATE, verify=False), which))
        both.add(bool(refused) and bool(dialect.cache_guards(tail.graph)))
        several.add(len(head_io(head).carried) > 1)
        views.add(bool({n.name for n in head.graph.nodes} & {n.name for n in tail.graph.nodes if n.target in VIEWS}))
    assert both == several == views == {True, False}
