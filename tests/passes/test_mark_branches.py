"""mark-branches: where cache guards go, what is refused, and that the numbers do not move."""

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import example, given, settings

from tests.support.thorough import examples
from vdcache.errors import ConfigError
from vdcache.ir import dump, trace
from vdcache.ir.dialect import cache_guards
from vdcache.passes import Canonicalise, MarkBranches, Pipeline
from vdcache.testing import WIDTH, Net, assert_reaches, assert_skipped, guarded, residual_nets

X, W, G = torch.randn(3, WIDTH), torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)


def test_a_branch_is_guarded_where_it_is_added():
    graph = guarded(lambda x, w: x + torch.relu(x @ w), X, W)
    assert_expected_inline(
        dump(graph),
        """\
%0 = input() : f32[3,4]
%1 = input() : f32[4,4]
%2 = matmul(%0, %1) : f32[3,4]
%3 = relu(%2) : f32[3,4]
%4 = cache_guard(%3, 'all/s0.b0.other') : f32[3,4]
%5 = add(%0, %4) : f32[3,4]
return (%5)""",
    )


def test_a_gate_outside_the_stream_may_be_left_out_of_the_slot():
    graph, _ = Pipeline((Canonicalise(), MarkBranches(gate="pre")), verify=True).run(
        trace(lambda x, w, g: x + g * torch.relu(x @ w), X, W, G).graph
    )
    assert_expected_inline(
        dump(graph),
        """\
%0 = input() : f32[3,4]
%1 = input() : f32[4,4]
%2 = input() : f32[4]
%3 = matmul(%0, %1) : f32[3,4]
%4 = relu(%3) : f32[3,4]
%5 = cache_guard(%4, 'all/s0.b0.other') : f32[3,4]
%6 = mul(%2, %5) : f32[3,4]
%7 = add(%0, %6) : f32[3,4]
return (%7)""",
    )


def test_gate_and_sum_in_one_operation_are_guarded_by_their_difference():
    graph = guarded(lambda x, w, g: torch.addcmul(x, g, x @ w), X, W, G)
    assert_expected_inline(
        dump(graph),
        """\
%0 = input() : f32[3,4]
%1 = input() : f32[4,4]
%2 = input() : f32[4]
%3 = matmul(%0, %1) : f32[3,4]
%4 = addcmul(%0, %2, %3) : f32[3,4]
%5 = cache_guard(%4, 'all/s0.b0.other', %0) : f32[3,4]
return (%5)""",
    )


def test_refusals_say_why():
    def net(x, w):
        cheap = x + torch.relu(x)  # no work in it
        noisy = cheap + torch.rand_like(cheap @ w)  # must never be skipped
        wide = noisy[:1] + (noisy[:1].expand(3, WIDTH) @ w)  # the operand is broadcast
        return wide

    _, steps = Pipeline((Canonicalise(), MarkBranches())).run(trace(net, X, W).graph)
    assert_expected_inline(
        "\n".join(str(r) for r in steps[-1].refusals),
        """\
add:
  no matrix product, convolution or attention between 'arg0_1' and 'relu'
add_1:
  'rand_like' (aten.rand_like.default) has an effect besides its value and must never be skipped
add_2:
  'slice_1' is broadcast to the shape of the sum, so it is no stream""",
    )


def test_kinds_choose():
    def net(x, w):
        x = x + torch.relu(x @ w) @ w
        return x + x @ w

    graph, steps = Pipeline((Canonicalise(), MarkBranches(kinds=("mlp",))), verify=True).run(trace(net, X, W).graph)
    assert [g.args[1] for g in cache_guards(graph.graph)] == ["all/s0.b0.mlp"]
    assert "it is other, which was not asked for" in str(steps[-1].refusals[-1])


def test_bad_options():
    with pytest.raises(ConfigError, match=r"kinds is a list of 'self-attention', .* or 'other'; got \('attn',\)"):
        MarkBranches(kinds=("attn",))
    with pytest.raises(ConfigError, match="gate is 'post' or 'pre'; got 'mid'"):
        MarkBranches(gate="mid")


@given(residual_nets())
@example(Net((("", ("matmul", "relu"), "gated", True), ("norm", ("matmul",), "addcmul", False))))
@settings(deadline=None, max_examples=examples(60, 25))
def test_any_net_can_be_marked_and_skipped(net):
    plain = trace(net, X, W, G).graph
    graph = guarded(net, X, W, G)
    with torch.no_grad():
        for a, b in zip(plain(X, W, G), graph(X, W, G), strict=True):
            assert torch.equal(a, b)
    assert len(cache_guards(graph.graph)) == net.works(), "every branch with work is found, and nothing else"
    if cache_guards(graph.graph):
        assert_skipped(graph, X, W, G)


@pytest.mark.parametrize("outcome", ["rewrites", "refusals"])
def test_the_generator_reaches(outcome):
    def reaches(net):
        _, steps = Pipeline((Canonicalise(), MarkBranches())).run(trace(net, X, W, G).graph)
        return getattr(steps[-1], outcome)

    assert_reaches(residual_nets(), reaches)
