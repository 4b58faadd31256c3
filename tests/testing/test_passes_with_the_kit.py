"""Every pass of vdcache under the testing kit alone, as people outside the project would test theirs."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from vdcache import analyze
from vdcache.errors import CaptureError, ContractError
from vdcache.ir import cache_guards
from vdcache.passes import (
    Canonicalise,
    DeadCode,
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
from vdcache.predictors import Taylor
from vdcache.testing import (
    WIDTH,
    Net,
    TinyDiT,
    assert_bit_identical,
    assert_pass,
    assert_predictor,
    assert_reaches,
    assert_refuses,
    assert_round_trip,
    assert_skipped,
    dump,
    latent,
    parse,
    residual_nets,
    run_pass,
    small_models,
    time_of,
    trace,
    variant,
)

X, W, G = torch.randn(3, WIDTH), torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
MARK = Pipeline((Canonicalise(), MarkBranches()))
MERGE = Pipeline((Canonicalise(), MarkBranches(), MergeSlots()))


# ---- canonicalise and dead-code --------------------------------------------------------------------------------------


def test_nodes_that_compute_nothing_go():
    before = """
%0 = input() : f32[2,4]
%1 = dropout(%0, 0.1, False)
%2 = alias(%1)
%3 = _to_copy(%2, dtype=torch.float32)
%4 = relu(%3)
%5 = slice(%4, 1, 0, 2)
%6 = slice(%4, 1, 2, 4)
%7 = concat([%5, %6], 1)
%8 = sin(%7)
return (%8)"""
    assert_pass(Canonicalise(), before, "%0 = input() : f32[2,4]\n%1 = relu(%0)\n%2 = sin(%1)\nreturn (%2)")


@pytest.mark.parametrize(
    "kept",
    [
        "%1 = dropout(%0, 0.5, True)\nreturn (%1)",  # in training it does something
        "%1 = clone(%0)\nreturn (%1)",  # the caller may write into it
        "%1 = _to_copy(%0, dtype=torch.float64)\n%2 = sin(%1)\nreturn (%2)",
        "%1 = slice(%0, 1, 2, 4)\n%2 = slice(%0, 1, 0, 2)\n%3 = cat([%1, %2], 1)\nreturn (%3)",  # in another order
        "%1 = slice(%0, 1, 2, 4)\n%2 = slice(%0, 1, 2, 4)\n%3 = cat([%1, %2], 1)\nreturn (%3)",  # one of them twice
        "%1 = sin(%0)\n%2 = slice(%1, 1, 0, 2)\n%3 = slice(%0, 1, 2, 4)\n%4 = cat([%2, %3], 1)\nreturn (%4)",  # of two tensors
        "%1 = rand([2])\nreturn (%0)",  # it moves the generator
    ],
)
def test_nodes_that_compute_something_stay(kept):
    text = f"%0 = input() : f32[2,4]\n{kept}"
    assert_pass(Canonicalise(), text, text)


def test_what_nothing_reads_goes_but_for_effects_and_marks():
    before = """
%0 = input() : f32[2]
%1 = sin(%0)
%2 = cos(%1)
%3 = rand([2])
%4 = observe(%1, 'all/o', 'l1', (), 0)
return (%0)"""
    after = before.replace("%2 = cos(%1)\n", "").replace("%3", "%2").replace("%4", "%3")
    assert_pass(DeadCode(), before, after)


# ---- mark-branches ---------------------------------------------------------------------------------------------------


def test_the_guard_stands_where_the_branch_is_added_and_nowhere_else():
    before = """
%0 = input() : f32[3,4]
%1 = parameter() : f32[4,4]
%2 = matmul(%0, %1)
%3 = add(%0, %2)
%4 = sum(%2)
return (%3, %4)"""
    after = """
%0 = input() : f32[3,4]
%1 = parameter() : f32[4,4]
%2 = matmul(%0, %1)
%3 = cache_guard(%2, 'all/s0.b0.other')
%4 = add(%0, %3)
%5 = sum(%2)
return (%4, %5)"""
    assert_pass(MarkBranches(), before, after)


def test_two_branches_of_one_kind_have_slots_of_their_own():
    text = """
%0 = input() : f32[3,4]
%1 = parameter() : f32[4,4]
%2 = matmul(%0, %1)
%3 = add(%0, %2)
%4 = matmul(%3, %1)
%5 = add(%3, %4)
return (%5)"""
    out = dump(run_pass(MarkBranches(), text).graph)
    assert "'all/s0.b0.other'" in out and out.count("cache_guard(") == 2


def test_gate_and_sum_in_one_operation():
    before = """
%0 = input() : f32[3,4]
%1 = parameter() : f32[4,4]
%2 = matmul(%0, %1)
%3 = addcmul(%0, %2, %2)
%4 = relu(%3)
return (%4)"""
    after = before.replace(
        "%4 = relu(%3)\nreturn (%4)", "%4 = cache_guard(%3, 'all/s0.b0.other', %0)\n%5 = relu(%4)\nreturn (%5)"
    )
    assert_pass(MarkBranches(), before, after)


def test_before_the_gate():
    before = """
%0 = input() : f32[3,4]
%1 = parameter() : f32[4,4]
%2 = input() : f32[4]
%3 = matmul(%0, %1)
%4 = mul(%3, %2)
%5 = add(%0, %4)
return (%5)"""
    after = """
%0 = input() : f32[3,4]
%1 = parameter() : f32[4,4]
%2 = input() : f32[4]
%3 = matmul(%0, %1)
%4 = cache_guard(%3, 'all/s0.b0.other')
%5 = mul(%4, %2)
%6 = add(%0, %5)
return (%6)"""
    assert_pass(MarkBranches(gate="pre"), before, after)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("%2 = relu(%0)\n%3 = add(%0, %2)", "no matrix product, convolution or attention"),
        ("%2 = matmul(%0, %1)\n%4 = rand_like(%2)\n%3 = add(%0, %4)", "has an effect besides its value"),
        (
            "%2 = matmul(%0, %1)\n%4 = unsqueeze(%2, 0)\n%5 = expand(%4, [2, 4, 4])\n%3 = add(%0, %5)",
            "is broadcast to the shape",
        ),
    ],
)
def test_what_is_no_branch(line, reason):
    assert_refuses(MarkBranches(), f"%0 = input() : f32[4,4]\n%1 = parameter() : f32[4,4]\n{line}\nreturn (%3)", reason)


@given(residual_nets())
@example(Net((("", ("matmul",), "add", True), ("", ("matmul",), "gated", False), ("scale", ("matmul",), "addcmul", False))))
@example(
    Net(
        (
            ("", ("matmul",), "alpha", False),
            ("cast", ("matmul", "cast"), "swapped", True),
            ("constant", ("matmul",), "add", False),
        )
    )
)
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
def test_any_net(net):
    """Marked and merged: bit for bit the same, skippable, and a reused step on the input that was kept gives the same again."""
    plain = trace(net, X, W, G).graph
    for pipeline in (MARK, MERGE):
        marked = run_pass(pipeline, plain).graph
        assert_bit_identical(plain, marked, X, W, G)
        if cache_guards(marked.graph):
            assert_skipped(marked, X, W, G)
        assert_round_trip(marked)
        assert_reuse_gives_the_same(marked, X, W, G)


def assert_reuse_gives_the_same(marked, *inputs):
    full, reuse = variant(marked), variant(marked, ["all"])
    with torch.no_grad():
        want, outputs = marked(*inputs), full(*inputs)
        assert_bit_identical(marked, lambda *x: full(*x)[: len(want)], *inputs)
        from vdcache.passes import variant_io

        kept = dict(zip(variant_io(full).saves, outputs[len(want) :], strict=True))
        got = reuse(*inputs, *[kept[s] for s in variant_io(reuse).reads])
        torch.testing.assert_close(list(got), list(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outcome", ["rewrites", "refusals"])
@pytest.mark.parametrize("pipeline", [MARK, MERGE], ids=["mark", "merge"])
def test_the_generator_reaches(pipeline, outcome):
    assert_reaches(residual_nets(), lambda net: getattr(run_pass(pipeline, trace(net, X, W, G).graph), outcome))


# ---- merge-slots -----------------------------------------------------------------------------------------------------

RUN = """
%0 = input() : f32[3,4]
%1 = parameter() : f32[4,4]
%2 = input() : f32[3,4]
%3 = matmul(%0, %1)
%4 = cache_guard(%3, 'all/a')
%5 = add(%0, %4)
%6 = BETWEEN
%7 = matmul(%6, %1)
%8 = cache_guard(%7, 'all/b')
%9 = add(%6, %8)
return (%9)"""


def test_a_run_is_one_slot_from_its_start():
    before = RUN.replace("%6 = BETWEEN\n", "").replace("%6", "%5")
    after = """
%0 = input() : f32[3,4]
%1 = parameter() : f32[4,4]
%2 = input() : f32[3,4]
%3 = matmul(%0, %1)
%4 = add(%0, %3)
%5 = matmul(%4, %1)
%6 = add(%4, %5)
%7 = cache_guard(%6, 'all/run.0', %0)
return (%7)"""
    assert_pass(MergeSlots(), before, after)


@pytest.mark.parametrize(
    ("between", "reason"),
    [("add(%5, %2)", "is no cast, view or constant term"), ("mul(%5, 0.5)", "is no cast, view or constant term")],
)
def test_what_changes_with_the_step_ends_a_run(between, reason):
    assert_refuses(MergeSlots(), RUN.replace("BETWEEN", between), reason)


def test_a_value_that_is_still_read_ends_a_run():
    text = RUN.replace("%6 = BETWEEN\n", "").replace("%6", "%5").replace("return (%9)", "return (%9, %5)")
    assert_refuses(MergeSlots(), text, "reads the stream at this place in a reused step")


def test_a_sum_with_a_factor_is_no_link():
    text = RUN.replace("%6 = BETWEEN\n", "").replace("%6", "%5").replace("add(%5, %8)", "add(%5, %8, alpha=0.5)")
    result = run_pass(MergeSlots(), text)
    assert result.rewrites == 0 and "'all/b'" in dump(result.graph)


def test_a_run_through_casts_keeps_the_type_of_its_end():
    text = """
%0 = input() : f32[3,4]
%1 = parameter() : f64[4,4]
%2 = parameter() : f32[4,4]
%3 = matmul(%0, %2)
%4 = cache_guard(%3, 'all/a')
%5 = add(%0, %4)
%6 = _to_copy(%5, dtype=torch.float64)
%7 = matmul(%6, %1)
%8 = cache_guard(%7, 'all/b')
%9 = add(%6, %8)
return (%9)"""
    graph = run_pass(MergeSlots(), text).graph
    assert "all/run.0" in dump(graph)
    assert_skipped(graph)
    assert_reuse_gives_the_same(graph, X, W.double(), W)


# ---- specialise ------------------------------------------------------------------------------------------------------

GUARDED = """
%0 = input() : f32[3,4]
%1 = parameter() : f32[4,4]
%2 = matmul(%0, %1)
%3 = cache_guard(%2, 'all/a'BASE)
%4 = relu(%3)
return (%4)"""


@pytest.mark.parametrize("base", ["", ", %0"])
def test_plans(base):
    text = GUARDED.replace("BASE", base)
    saved = "%4 = sub(%2, %0)\n%5 = relu(%2)\nreturn (%5, %4)"
    after = "%0 = input() : f32[3,4]\n%1 = parameter() : f32[4,4]\n%2 = matmul(%0, %1)\n"
    after += saved.replace("%5", "%6").replace("%4", "%3").replace("%6", "%4") if base else "%3 = relu(%2)\nreturn (%3, %2)"
    assert dump(variant(text)) == dump(parse(after))
    reused = "%0 = input() : f32[3,4]\n%1 = parameter() : f32[4,4]\n%2 = input() : f32[3,4]\n"
    reused += "%3 = add(%0, %2)\n%4 = relu(%3)\nreturn (%4)" if base else "%3 = relu(%2)\nreturn (%3)"
    assert dump(variant(text, ["all"])) == dump(parse(reused))


def test_groups_are_reused_apart():
    text = GUARDED.replace("BASE", "").replace("%4 = relu(%3)", "%5 = relu(%3)\n%4 = cache_guard(%5, 'other/b')")
    assert "relu" in dump(variant(text, ["all"])) and "matmul" not in dump(variant(text, ["all"]))
    assert dump(variant(text, ["other"])).endswith("return (%2)") and "matmul" not in dump(variant(text, ["other"]))
    assert "matmul" in dump(variant(text, ["nothing"]))


def test_what_is_kept_is_dense_and_of_its_type():
    text = """
%0 = input() : bf16[3,4]
%1 = parameter() : bf16[4,4]
%2 = matmul(%0, %1)
%3 = t(%2)
%4 = cache_guard(%3, 'all/a')
%5 = relu(%4)
return (%5)"""
    assert "clone(%3, memory_format=torch.contiguous_format)" in dump(variant(text))
    reuse = variant(text, ["all"], Taylor(1))
    assert "f32[4,3]" in dump(reuse)
    assert_round_trip(reuse)  # what follows the prediction has the type that it had: types are worked out anew


def test_observations_are_measured_where_their_group_is_computed():
    text = """
%0 = input() : f32[3,4]
%1 = parameter() : f32[4,4]
%2 = matmul(%0, %1)
%3 = cache_guard(%2, 'all/a')
%4 = add(%0, %3)
%5 = observe(%2, 'all/o', 'l1', (), 0)
return (%4)"""
    full = dump(variant(text))
    assert "observe" not in full and "stack" in full and full.count("sum(") == 3
    assert "sum(" not in dump(variant(text, ["all"]))


def test_what_the_model_writes_is_written():
    text = """
%0 = input() : f32[4]
%1 = parameter() : f32[1]
%2 = add(%1, 1)
%3 = mul(%0, 2)
return (%2 -> %1, %3)"""
    graph = variant(text)
    assert "copy_.default(%1, %2)" in dump(graph) and dump(graph).endswith("return (%3)")


# ---- passes on a whole model -----------------------------------------------------------------------------------------


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


def test_the_observed_value_has_the_streams_type():
    """Also where gate and sum are computed in float32: what is kept takes the bytes of the stream."""
    text = """
%0 = input() : bf16[1,6,4]
%1 = parameter() : bf16[4,4]
%2 = input() : f32[4]
%3 = linear(%0, %1)
%4 = _to_copy(%3, dtype=torch.float32)
%5 = mul(%4, %2)
%6 = _to_copy(%0, dtype=torch.float32)
%7 = add(%6, %5)
%8 = _to_copy(%7, dtype=torch.bfloat16)
return (%8)"""
    result = run_pass(Observe(kind="other"), text)
    (line,) = (x for x in dump(result.graph).splitlines() if "observe(" in x)
    assert line.endswith("bf16[1,6,4]")
    assert_round_trip(result.graph)


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
        assert [str(r) for r in result.refusals] == ["cache_guard:\n  it is computed before the policy can decide"], part
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


def test_taylor_of_squares():
    """Of 1, 4, 9, 16: exact differences once enough steps were computed, and nothing of what never was."""
    assert [float(x[0, 0]) for x in assert_predictor(Taylor(1))] == [1, 7, 14, 23]
    for order in (2, 3):
        assert [float(x[0, 0]) for x in assert_predictor(Taylor(order))] == pytest.approx([1, 7, 15, 24])


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
