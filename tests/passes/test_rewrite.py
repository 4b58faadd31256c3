"""Passes of two texts: what they write, what they refuse, and which texts are none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings

from vdcache import Pipeline, Rewrite, analyze
from vdcache.errors import ConfigError
from vdcache.ir import Fact
from vdcache.passes import Canonicalise
from vdcache.testing import (
    WIDTH,
    assert_bit_identical,
    assert_close,
    assert_pass,
    assert_refuses,
    captured,
    residual_nets,
    run_pass,
    trace,
)


@dataclass(frozen=True)
class SiluOnce(Rewrite):
    """silu-once: x · sigmoid(x) is silu(x)."""

    name: ClassVar[str] = "silu-once"
    before = """
    %1 = sigmoid(%x)
    %2 = mul(%x, %1)"""
    after = "%1 = silu(%x)"


@dataclass(frozen=True)
class NoDoubleNegation(Rewrite):
    """no-double-negation: −(−x) is x; not in halves, where the option says so."""

    name: ClassVar[str] = "no-double-negation"
    before = "%1 = neg(%x)\n%2 = neg(%1)"
    after = "%x"

    halves: bool = True

    def why_not(self, match):
        half = match["x"].meta["val"].dtype == torch.float16
        return ["it is in halves"] if half and not self.halves else []


@dataclass(frozen=True)
class Split(Rewrite):
    """split: the two halves of a layer as two layers, with a list, a keyword and a value inside the pattern."""

    name: ClassVar[str] = "split"
    before = "%1 = linear(%x, %w)\n%2 = gelu(%1)"
    after = """
    %3 = slice(%w, 0, 0, 4)
    %4 = slice(%w, 0, 4, 8)
    %5 = linear(%x, %3)
    %6 = linear(%x, %4)
    %7 = cat([%5, %6], dim=-1)
    %8 = gelu(%7)"""


def test_the_pattern_is_replaced_wherever_it_stands():
    assert_pass(
        SiluOnce(),
        """
        %0 = input() : f32[2,4]
        %1 = sigmoid(%0)
        %2 = mul(%1, %0)
        %3 = sigmoid(%2)
        %4 = mul(%2, %3)
        return (%4)""",
        """
        %0 = input() : f32[2,4]
        %1 = silu(%0)
        %2 = silu(%1)
        return (%2)""",
    )


def test_what_is_read_elsewhere_stays():
    assert_pass(
        SiluOnce(),
        """
        %0 = input() : f32[2,4]
        %1 = sigmoid(%0)
        %2 = mul(%0, %1)
        %3 = add(%2, %1)
        return (%3)""",
        """
        %0 = input() : f32[2,4]
        %1 = sigmoid(%0)
        %2 = silu(%0)
        %3 = add(%2, %1)
        return (%3)""",
    )


def test_a_value_that_is_there_takes_the_place():
    before = "%0 = input() : f32[2]\n%1 = neg(%0)\n%2 = neg(%1)\n%3 = neg(%2)\nreturn (%3)"
    assert_pass(NoDoubleNegation(), before, "%0 = input() : f32[2]\n%1 = neg(%0)\nreturn (%1)")


def test_several_lines():
    assert_pass(
        Split(),
        "%0 = input() : f32[2,4]\n%1 = parameter() : f32[8,4]\n%2 = linear(%0, %1)\n%3 = gelu(%2)\nreturn (%3)",
        """
        %0 = input() : f32[2,4]
        %1 = parameter() : f32[8,4]
        %2 = slice(%1, 0, 0, 4)
        %3 = slice(%1, 0, 4, 8)
        %4 = linear(%0, %2)
        %5 = linear(%0, %3)
        %6 = cat([%4, %5], dim=-1)
        %7 = gelu(%6)
        return (%7)""",
    )


def test_another_type_is_refused_and_leaves_the_graph_alone():
    text = "%0 = input() : f32[2,4]\n%1 = parameter() : f32[6,4]\n%2 = linear(%0, %1)\n%3 = gelu(%2)\nreturn (%3)"

    @dataclass(frozen=True)
    class Narrow(Rewrite):
        name: ClassVar[str] = "narrow"
        before = "%1 = linear(%x, %w)\n%2 = gelu(%1)"
        after = "%3 = linear(%x, %w)\n%4 = slice(%3, 1, 0, 4)\n%5 = gelu(%4)"

    assert_refuses(Narrow(), text, "it would give f32[2,4] in the place of f32[2,6]")


def test_the_reasons_of_the_pass_are_asked():
    text = "%0 = input() : f16[2]\n%1 = neg(%0)\n%2 = neg(%1)\nreturn (%2)"
    assert run_pass(NoDoubleNegation(), text).rewrites == 1
    assert_refuses(NoDoubleNegation(halves=False), text, "it is in halves")


def test_an_effect_is_not_rewritten_away():
    @dataclass(frozen=True)
    class Still(Rewrite):
        name: ClassVar[str] = "still"
        before = "%1 = rand_like(%x, ...)\n%2 = add(%y, %1)"
        after = "%y"

    assert_refuses(Still(), "%0 = input() : f32[2]\n%1 = rand_like(%0)\n%2 = add(%0, %1)\nreturn (%2)", "has an effect")


def test_the_anatomy_is_read_anew():
    def net(x, w):
        return x + (x @ w) * torch.sigmoid(x @ w)

    @dataclass(frozen=True)
    class NoGate(Rewrite):
        name: ClassVar[str] = "no-gate"
        before = "%1 = sigmoid(%g)\n%2 = mul(%y, %1)"
        after = "%y"

    graph = run_pass(Canonicalise(), trace(net, torch.randn(2, 3, 4), torch.randn(4, 4)).graph).graph
    gate = analyze(graph).branches[0]
    after = run_pass(NoGate(), graph).graph
    assert "sigmoid" in gate.nodes and "sigmoid" not in analyze(after).branches[0].nodes


def test_options_and_names_work_as_for_every_pass():
    assert str(NoDoubleNegation(halves=False)) == "no-double-negation{halves=false}"
    known = {"no-double-negation": NoDoubleNegation}
    assert Pipeline.parse("no-double-negation{halves=false}", known=known).passes == (NoDoubleNegation(halves=False),)
    assert SiluOnce.requires == frozenset({Fact.FUNCTIONAL, Fact.TYPED})


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("", "a replacement has at least one line"),
        ("%1 = relu(%y)", "line 1 of the replacement, '%1 = relu(%y)': %y is no value of the pattern"),
        ("%2 = relu(%3)\n%3 = relu(%x)", "%3 is no value of the pattern, and not computed before this line"),
        ("%1 = rleu(%x)", "there is no operation 'rleu'"),
        ("relu(%x)", "a line is '%3 = relu(%2)', or a single value"),
        ("%1 = %x", "an operation has its arguments in brackets"),
    ],
)
def test_texts_that_are_none_are_said_when_the_class_is_made(after, message):
    with pytest.raises(ConfigError) as error:
        type("Wrong", (Rewrite,), {"name": "wrong", "before": "%1 = neg(%x)", "after": after})
    assert message in str(error.value)


def silu(x):
    return x * torch.sigmoid(x)


def test_a_model_of_torch_compile_is_rewritten_and_gives_the_same():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

        def forward(self, x):
            return x + self.down(silu(self.up(x)))

    torch.manual_seed(0)
    graph, inputs = captured(Model(), torch.randn(2, 3, 8))
    result = run_pass(SiluOnce(), graph)
    assert result.rewrites == 1
    assert_close(graph, result.graph, *inputs, rtol=1e-6, atol=1e-6)


def negated(net):
    """A net whose first result is negated twice."""

    def fn(*args):
        out = net(*args)
        first = out[0] if isinstance(out, tuple) else out
        return torch.neg(torch.neg(first))

    return fn


GIVEN = torch.randn(3, WIDTH), torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)


@settings(max_examples=25, deadline=None)
@given(residual_nets())
def test_any_net_gives_the_same_and_a_second_run_finds_nothing(net):
    graph = trace(negated(net), *GIVEN).graph
    once = run_pass(NoDoubleNegation(), graph)
    assert once.rewrites >= 1
    assert_bit_identical(graph, once.graph, *GIVEN)
    assert not run_pass(NoDoubleNegation(), once.graph).rewrites
