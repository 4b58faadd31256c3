"""Passes on a whole small model, and those that cut a graph in two: with the testing kit alone, as other packages test theirs."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests.support.nets import assert_reuse_gives_the_same
from vdcache import analyze
from vdcache.errors import CaptureError, ContractError
from vdcache.ir import cache_guards
from vdcache.passes import (
    Canonicalise,
    MarkBranches,
    MarkOutput,
    MergeSlots,
    Observe,
    Pass,
    PassResult,
    Pipeline,
    Probe,
    Specialise,
    SplitAtProbe,
    TileAttention,
)
from vdcache.testing import (
    TinyDiT,
    assert_bit_identical,
    assert_pass,
    assert_round_trip,
    assert_skipped,
    dump,
    latent,
    run_pass,
    small_models,
    time_of,
    trace,
)


@pytest.fixture(scope="module")
def tiny():
    return run_pass(Canonicalise(), trace(TinyDiT(), latent(0), time_of(0), latent(1)).graph).graph


@pytest.mark.parametrize(
    "a_pass", [MarkOutput(), MarkOutput(base="zero"), Observe(), Probe(), Probe(location="modulated")], ids=str
)
def test_marks_change_no_number(tiny, a_pass):
    result = run_pass(a_pass, tiny)
    assert result.rewrites == 1
    assert_bit_identical(tiny, result.graph)
    if cache_guards(result.graph.graph):
        assert_skipped(result.graph)
    assert_round_trip(result.graph)


def test_the_output_is_guarded_with_the_latent_as_base(tiny):
    graph = run_pass(MarkOutput(), tiny).graph
    latent_number = next(i for i, n in enumerate(graph.graph.nodes) if n.name == graph.meta["vdcache.analysis"].latent)
    last = dump(graph).splitlines()[-2]
    assert f"'all/output', %{latent_number})" in last and last.startswith("%") and "cache_guard(" in last
    assert_reuse_gives_the_same(graph, *TinyDiT().state_dict().values(), latent(0), time_of(0), latent(1))


def test_head_and_tail_compute_what_the_whole_does(tiny):
    probed = run_pass(Pipeline((MarkBranches(), MergeSlots(), Probe()), given=frozenset(MarkBranches.requires)), tiny).graph
    head, tail = (run_pass(SplitAtProbe(part), probed) for part in ("head", "tail"))
    assert any("computed before the policy can decide" in reason for r in tail.refusals for reason in r.reasons) or (
        dump(tail.graph).count("cache_guard(") == 1
    )
    inputs = [*TinyDiT().state_dict().values(), latent(0), time_of(0), latent(1)]
    with torch.no_grad():
        *carried, value, sums = head.graph(*inputs, torch.zeros(1, 6, 8))
        assert torch.equal(tail.graph(*inputs, *carried)[0], tiny(*inputs)[0])
        assert sums.shape == (3,) and torch.isclose(sums[2], value.abs().sum())
    assert "probe(" not in dump(head.graph) + dump(tail.graph)
    assert "cache_guard(" not in dump(head.graph)
    for part in (probed, head.graph, tail.graph):
        assert_round_trip(part)


def test_a_guard_in_the_head_goes_and_is_said():
    text = """
%0 = input() : f32[3,4]
%1 = relu(%0)
%2 = cache_guard(%1, 'all/early')
%3 = add(%0, %2)
%4 = probe(%3, 'all/p', 'l1', 'step')
%5 = sin(%3)
%6 = cache_guard(%5, 'all/late')
return (%6)"""
    for part, marks in (("head", ["all/early", "all/late"]), ("tail", ["all/early"])):
        result = run_pass(SplitAtProbe(part), text)
        assert [str(r) for r in result.refusals] == ["cache_guard: it is computed before the policy can decide"], part
        assert not any(f"'{m}'" in dump(result.graph) for m in marks), "what is left of it would be left out, and is not"
    tail = run_pass(SplitAtProbe("tail"), text).graph
    assert_pass(SplitAtProbe("tail"), text, tail)
    assert_skipped(tail)


def test_a_head_with_an_effect_is_refused():
    text = """
%0 = input() : f32[4]
%1 = rand_like(%0)
%2 = probe(%1, 'all/p', 'l1', 'step')
return (%0)"""
    with pytest.raises(CaptureError, match="cannot be moved before the rest"):
        run_pass(SplitAtProbe("head"), text)


def test_masks_leave_out_what_they_say():
    case = small_models()["demo"]
    graph, inputs = case.graph()
    before = run_pass(Canonicalise(), graph).graph
    dense = run_pass(TileAttention(("frames:3",)), before)  # every frame is a reference
    assert dense.rewrites == 3
    with torch.no_grad():
        want = before(*inputs)[0]
        torch.testing.assert_close(dense.graph(*inputs)[0], want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(run_pass(TileAttention(("frames:1",)), before).graph(*inputs)[0], want, rtol=1e-3)
    assert_round_trip(dense.graph)


def test_facts_are_asked_before_a_pass_runs():
    with pytest.raises(ContractError, match="after reading the graph is not canonical"):
        run_pass(MarkBranches(), "%0 = input() : f32[2]\n%1 = alias(%0)\nreturn (%1)")


def test_what_the_anatomy_says_is_read_anew_where_it_was_changed(tiny):
    """Whoever wrote the pass: no pass has to say that it changed a branch or an attention."""
    before = run_pass(Canonicalise(), tiny).graph
    sites = [a.node for a in analyze(before).attentions]
    reuse = Pipeline((MarkBranches(), Specialise(reuse=frozenset({"all"}))), given=MarkBranches.requires)
    for a_pass in (TileAttention(("frames:1",), grid=(3, 1, 2)), reuse):
        after = run_pass(a_pass, before).graph
        assert not {a.node for a in analyze(after).attentions} & set(sites)

    @dataclass(frozen=True)
    class NoAttention(Pass):
        name: ClassVar[str] = "no-attention"

        def run(self, graph):
            node = next(n for n in graph.graph.nodes if n.name == sites[0])
            node.replace_all_uses_with(node.args[2])
            graph.graph.erase_node(node)
            return PassResult(graph, 1)

    after = run_pass(NoAttention(), before).graph
    assert sites[0] not in {a.node for a in analyze(after).attentions}
