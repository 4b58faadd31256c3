"""merge-slots: runs of branches become one slot; what ends a run."""

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings

from tests.support.thorough import examples
from vdcache.ir import dump, trace
from vdcache.ir.dialect import cache_guards
from vdcache.passes import Canonicalise, DeadCode, MarkBranches, MergeSlots, Pipeline, Specialise, variant_io
from vdcache.testing import WIDTH, assert_reaches, assert_skipped, guarded, residual_nets, run_variant

X, W, G = torch.randn(3, WIDTH), torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)


def merged(fn, *args):
    return guarded(fn, *args, more=(MergeSlots(),))


def slots(graph):
    return [str(g.args[1]) for g in cache_guards(graph.graph)]


def refusals(fn, *args):
    _, steps = Pipeline((Canonicalise(), MarkBranches(), MergeSlots())).run(trace(fn, *args).graph)
    return [str(r) for r in steps[-1].refusals]


def test_two_branches_make_one_slot():
    def net(x, w):
        x = x + x @ w
        return x + torch.relu(x @ w)

    assert_expected_inline(
        dump(merged(net, X, W)),
        """\
%0 = input() : f32[3,4]
%1 = input() : f32[4,4]
%2 = matmul(%0, %1) : f32[3,4]
%3 = add(%0, %2) : f32[3,4]
%4 = matmul(%3, %1) : f32[3,4]
%5 = relu(%4) : f32[3,4]
%6 = add(%3, %5) : f32[3,4]
%7 = cache_guard(%6, 'all/run.0', %0) : f32[3,4]
return (%7)""",
    )


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
        """\
add:
  the run ends here: 'sum_1' (aten.sum.default) reads the stream at this place in a reused step""",
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
        """\
add_1:
  a run starts here: 'layer_norm' (aten.layer_norm.default) is no cast, view or constant term""",
    )


def test_a_step_dependent_term_between_ends_the_run():
    """A control signal that changes every step must not be frozen into the slot (a VACE complaint)."""

    def net(x, w, hint):
        x = x + x @ w
        x = x + hint
        return x + x @ w

    assert slots(merged(net, X, W, torch.randn(3, WIDTH))) == ["all/s0.b0.other", "all/s0.b1.other"]


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
@settings(deadline=None, max_examples=examples(60, 25))
def test_merging_keeps_numbers_and_skips_the_same(net):
    plain, graph = trace(net, X, W, G).graph, merged(net, X, W, G)
    with torch.no_grad():
        want = plain(X, W, G)
        for a, b in zip(want, graph(X, W, G), strict=True):
            assert torch.equal(a, b)
    if cache_guards(graph.graph):
        assert_skipped(graph, X, W, G)
    assert len(slots(graph)) <= net.works()

    given_facts = frozenset(Specialise.requires)
    full, _ = Pipeline((Specialise(), DeadCode()), verify=True, given=given_facts).run(graph)
    reuse, _ = Pipeline((Specialise(reuse=frozenset({"all"})), DeadCode()), verify=True, given=given_facts).run(graph)
    outputs = run_variant(full, X, W, G)
    kept = dict(zip(variant_io(full).saves, outputs[len(want) :], strict=True))
    again = run_variant(reuse, X, W, G, extra=[kept[s] for s in variant_io(reuse).reads])
    for a, b, c in zip(want, outputs, again, strict=False):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)


def test_the_generator_reaches_merging():
    assert_reaches(residual_nets(), lambda net: "all/run.0" in slots(merged(net, X, W, G)))


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
