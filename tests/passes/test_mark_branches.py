"""mark-branches: where cache guards go, what is refused, and that the numbers do not move."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from tests.support.nets import marked_net
from tests.support.thorough import examples
from vdcache.errors import ConfigError
from vdcache.ir import cache_guards
from vdcache.passes import Canonicalise, MarkBranches, Pipeline
from vdcache.testing import (
    WIDTH,
    Net,
    assert_pass,
    assert_reaches,
    assert_refuses,
    dump,
    residual_nets,
    run_pass,
    trace,
)

X, W, G = torch.randn(3, WIDTH), torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
MARK = Pipeline((Canonicalise(), MarkBranches()))


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
        ("%2 = relu(%0)\n%3 = add(%0, %2)", r"no matrix product, convolution or attention between '\w+' and '\w+'"),
        (
            "%2 = matmul(%0, %1)\n%4 = rand_like(%2)\n%3 = add(%0, %4)",
            r"'rand_like\w*' \(aten\.rand_like\.default\) has an effect besides its value and must never be skipped",
        ),
        (
            "%2 = matmul(%0, %1)\n%4 = unsqueeze(%2, 0)\n%5 = expand(%4, [2, 4, 4])\n%3 = add(%0, %5)",
            r"'\w+' is broadcast to the shape of the sum, so it is no stream",
        ),
    ],
)
def test_what_is_no_branch(line, reason):
    assert_refuses(MarkBranches(), f"%0 = input() : f32[4,4]\n%1 = parameter() : f32[4,4]\n{line}\nreturn (%3)", reason)


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
@example(Net((("", ("matmul",), "add", True), ("", ("matmul",), "gated", False), ("scale", ("matmul",), "addcmul", False))))
@example(Net((("", ("matmul", "relu"), "gated", True), ("norm", ("matmul",), "addcmul", False))))
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
def test_any_net_can_be_marked_and_skipped(net):
    marked = marked_net(MARK, net, X, W, G)
    assert len(cache_guards(marked.graph)) == net.works(), "every branch with work is found, and nothing else"


@pytest.mark.parametrize("outcome", ["rewrites", "refusals"])
def test_the_generator_reaches(outcome):
    assert_reaches(residual_nets(), lambda net: getattr(MARK.run(trace(net, X, W, G).graph)[1][-1], outcome))
