"""merge-slots: runs of branches become one slot; what ends a run."""

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import HealthCheck, example, given, settings

from tests.support.nets import assert_reuse_gives_the_same, marked_net
from tests.support.thorough import examples
from vdcache.ir import cache_guards
from vdcache.passes import Canonicalise, DeadCode, MarkBranches, MergeSlots, Pipeline, Specialise, variant_io
from vdcache.testing import (
    WIDTH,
    Net,
    assert_pass,
    assert_reaches,
    assert_refuses,
    assert_skipped,
    dump,
    guarded,
    residual_nets,
    run_pass,
    trace,
)

X, W, G = torch.randn(3, WIDTH), torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
MERGE = Pipeline((Canonicalise(), MarkBranches(), MergeSlots()))


def merged(fn, *args):
    return guarded(fn, *args, more=(MergeSlots(),))


def slots(graph):
    return [str(g.args[1]) for g in cache_guards(graph.graph)]


def refusals(fn, *args):
    _, steps = MERGE.run(trace(fn, *args).graph)
    return [str(r) for r in steps[-1].refusals]


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
    """A control signal that changes every step must not be frozen into the slot (a VACE complaint)."""
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


def test_views_between_are_repeated_on_the_base():
    def net(x, w):
        x = (x + x @ w).reshape(2, 6)
        return x + (x.reshape(3, WIDTH) @ w).reshape(2, 6)

    assert_expected_inline(
        dump(merged(net, X, W)),
        """\
%0 = input() : f32[3,4]
%1 = input() : f32[4,4]
%2 = matmul(%0, %1) : f32[3,4]
%3 = add(%0, %2) : f32[3,4]
%4 = view(%3, [2, 6]) : f32[2,6]
%5 = view(%4, [3, 4]) : f32[3,4]
%6 = matmul(%5, %1) : f32[3,4]
%7 = view(%6, [2, 6]) : f32[2,6]
%8 = add(%4, %7) : f32[2,6]
%9 = reshape(%0, [2, 6]) : f32[2,6]
%10 = cache_guard(%8, 'all/run.0', %9) : f32[2,6]
return (%10)""",
    )


def test_constants_between_are_part_of_the_slot():
    def net(x, w):
        x = x + x @ w
        x = x + torch.ones(WIDTH)
        return x + x @ w

    assert slots(merged(net, X, W)) == ["all/run.0"]


def test_a_value_that_is_still_read_ends_the_run():
    def net(x, w):
        x = x + x @ w
        y = x + x @ w
        return y + y @ w, x.sum()

    assert slots(merged(net, X, W)) == ["all/s0.b0.other", "all/run.0"]
    assert_expected_inline(
        "\n".join(refusals(net, X, W)),
        """add: the run ends here: 'sum_1' (aten.sum.default) reads the stream at this place in a reused step""",
    )


def test_norms_and_scales_between_end_the_run():
    def net(x, w):
        x = x + x @ w
        x = torch.nn.functional.layer_norm(x, (WIDTH,))
        x = x + x @ w
        return x + x @ w

    assert slots(merged(net, X, W)) == ["all/s0.b0.other", "all/run.0"]
    assert_expected_inline(
        "\n".join(refusals(net, X, W)),
        """add_1: a run starts here: 'layer_norm' (aten.layer_norm.default) is no cast, view or constant term""",
    )


def test_16_bit_streams_keep_16_bit_slots():
    def net(x, w):
        for _ in range(3):
            x = (x.float() + (x @ w).float() * 0.5).to(torch.bfloat16)
        return x

    graph = merged(net, X.bfloat16(), W.bfloat16())
    assert slots(graph) == ["all/run.0"]
    reuse, _ = Pipeline((Specialise(reuse=frozenset({"all"})), DeadCode()), given=frozenset(Specialise.requires)).run(graph)
    assert variant_io(reuse).read_values[0].dtype == torch.bfloat16


def test_a_cast_to_the_type_of_an_earlier_value_reads_nothing_of_it():
    """Seen in Wan: x = (x.float() + gate * mlp).type_as(x) at the end of a run held on to the stream inside it: two slots for one."""

    def net(x, w):
        x = x + x @ w
        x = (x.float() + (x @ w).float() * 0.5).type_as(x)
        return torch.nn.functional.layer_norm(x.float(), (WIDTH,))

    assert slots(merged(net, X.bfloat16(), W.bfloat16())) == ["all/run.0"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reuse_of_a_16_bit_stream_is_off_by_one_rounding(dtype):
    """The kept difference is rounded once and so is the sum: at most 1 ulp of the largest value in between."""

    def net(x, w):
        for _ in range(4):
            x = (x.float() + torch.relu(x @ w).float() * 0.5).to(dtype)
        return x

    x, w = X.to(dtype), W.to(dtype)
    graph = merged(net, x, w)
    given_facts = frozenset(Specialise.requires)
    full, _ = Pipeline((Specialise(), DeadCode()), given=given_facts).run(graph)
    reuse, _ = Pipeline((Specialise(reuse=frozenset({"all"})), DeadCode()), given=given_facts).run(graph)
    out, kept = full(x, w)
    (again,) = reuse(x, w, kept)
    ulp = torch.finfo(dtype).eps * torch.stack([out.abs(), kept.abs(), x.abs()]).amax(0).float()
    assert ((again.float() - out.float()).abs() <= ulp).all()


@given(residual_nets(5))
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
@settings(deadline=None, max_examples=examples(60, 25), suppress_health_check=list(HealthCheck))
def test_merging_keeps_numbers_and_skips_the_same(net):
    assert len(slots(marked_net(MERGE, net, X, W, G))) <= net.works()


def test_the_generator_reaches_merging():
    assert_reaches(residual_nets(), lambda net: "all/run.0" in slots(merged(net, X, W, G)))


def test_the_generator_reaches_what_ends_a_run():
    assert_reaches(residual_nets(), lambda net: refusals(net, X, W, G))


def matmuls(graph):
    from vdcache.ir.ops import is_work

    return sum(map(is_work, graph.graph.nodes))


def reuse_all(fn, *args):
    marked = merged(fn, *args)
    given_facts = frozenset(Specialise.requires)
    return Pipeline((Specialise(reuse=frozenset({"all"})), DeadCode()), given=given_facts).run(marked)[0]


def test_a_value_for_a_long_skip_is_reused_too():
    """The stream after the first branch is kept for the end: there the run is cut, and both parts are gone in a reused step."""

    def net(x, w):
        x = early = x + torch.relu(x @ w)
        x = x + torch.sigmoid(x @ w)
        return torch.cat([x, early], -1)

    reuse = reuse_all(net, X, W)
    assert len(variant_io(reuse).reads) == 2 and matmuls(reuse) == 0


def test_sums_that_hold_their_gate_merge_and_are_gone():
    def net(x, w, g):
        for _ in range(3):
            x = torch.addcmul(x, g, torch.relu(x @ w))
        return x

    reuse = reuse_all(net, X, W, G)
    assert len(variant_io(reuse).reads) == 1 and matmuls(reuse) == 0


def test_views_of_a_start_that_lies_otherwise_in_memory():
    def net(x, w):
        x = x.t().contiguous().t()  # the start: columns first
        x = torch.lerp(x, torch.relu(x @ w), 0.5).contiguous()
        return x.view(-1) + torch.relu(x @ w).view(-1)

    assert matmuls(reuse_all(net, X, W)) == 0
