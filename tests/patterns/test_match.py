"""Patterns as text: what they find, what was in the way, and that a match does not outlive a change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.thorough import some
from vdcache import Pattern
from vdcache.errors import ConfigError, ContractError
from vdcache.ir import dump
from vdcache.ir.dump import numbers
from vdcache.patterns import Match, Refusal
from vdcache.testing import WIDTH, parse, residual_nets, small_models, trace

MLP = Pattern("""
    # an MLP, however its halves are joined
    %1 = linear(%x, %up, ...)
    %2 = gelu|silu(%1, ...)
    %3 = linear(~%2, %down, ...)""")
GRAPH = """
%0 = input() : f32[2,4]
%1 = parameter() : f32[8,4]
%2 = parameter() : f32[4,8]
%3 = linear(%0, %1)
%4 = gelu(%3, approximate='tanh')
%5 = _to_copy(%4, dtype=torch.float32)
%6 = view(%5, [2, 8])
%7 = linear(%6, %2)
%8 = add(%0, %7)
return (%8)"""


def found(pattern, text, at=None):
    """What the pattern finds on the last node, or on that of a number."""
    graph = parse(text)
    of = numbers(graph.graph)
    nodes = [n for n in graph.graph.nodes if n.op != "output"]
    return Pattern(pattern).match(next(n for n in nodes if of[n] == at) if at is not None else nodes[-1])


def test_a_match_names_what_stands_for_every_value():
    graph = parse(GRAPH)
    (match,) = MLP.find(graph)
    of = numbers(graph.graph)
    assert {name: of[node] for name, node in match.values.items()} == {"x": 0, "up": 1, "down": 2, "1": 3, "2": 4, "3": 7}
    assert [of[n] for n in match.inside] == [3, 4, 5, 6, 7], "the cast and the view between the lines are inside"
    assert match.root is match["3"] is match["%3"] and not match.leaks
    with pytest.raises(ConfigError, match=r"the pattern has no value %y; it has %.*%x"):
        match["y"]


def test_a_value_that_is_read_elsewhere_leaks():
    graph = parse(GRAPH.replace("return (%8)", "%9 = relu(%4)\nreturn (%8, %9)"))
    (match,) = MLP.find(graph)
    assert [(a.name, b.name) for a, b in match.leaks] == [("gelu", "relu")]


HEAD = "%0 = input() : f32[2,4]\n%1 = input() : f32[2,4]\n%2 = parameter() : f32[4]\n"


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ("%3 = add(%0, %1)", "%1 = add(%a, %b)"),
        ("%3 = mul(%0, 2.0)", "%1 = mul(%x, 2.0)"),
        ("%3 = mul(%0, 2.0)", "%1 = mul(%x, 2)"),
        ("%3 = mul(%0, 2.0)", "%1 = mul(%x, %by)"),
        ("%3 = mul(%0, 2.0)", "%1 = mul(_, _)"),
        ("%3 = mul(2.0, %0)", "%1 = mul(%x, 2.0)"),
        ("%3 = sub(%0, %0)", "%1 = sub(%x, %x)"),
        ("%3 = softmax.int(%0, -1)", "%1 = softmax.int(%x, dim=-1)"),
        ("%3 = softmax.int(%0, dim=-1)", "%1 = softmax.int(%x, -1)"),
        ("%3 = softmax.int(%0, -1, None)", "%1 = softmax.int(%x, -1)"),
        ("%3 = softmax.int(%0, -1, torch.float32)", "%1 = softmax.int(%x, -1, torch.float32)"),
        ("%3 = softmax.int(%0, -1, torch.float32)", "%1 = softmax.int(%x, ...)"),
        ("%3 = cat([%0, %1, %0], 1)", "%1 = cat([%x, ...], 1)"),
        ("%3 = cat([%0, %1, %0], 1)", "%1 = cat([%x, _, %x], 1)"),
        ("%3 = cache_guard(%0, 'all/x')", "%1 = cache_guard(%x, 'all/x')"),
        ("%3 = cache_guard(%0, 'all/x', %1)", "%1 = cache_guard(%x, %slot, ...)"),
        ("%3 = mul(%0, %2)", "%1 = parameter()\n%2 = mul(%x, %1)"),
        ("%3 = mul(%0, %2)", "%1 = parameter()\n%2 = input()\n%3 = mul(%1, %2)"),
        ("%3 = gelu(%0)", "%1 = silu(%x)\n|\n%1 = gelu(%x)"),
    ],
)
def test_what_matches(line, pattern):
    match = found(pattern, f"{HEAD}{line}\nreturn (%3)")
    assert isinstance(match, Match) and match, str(match)


@pytest.mark.parametrize(
    ("line", "pattern", "reason", "depth"),
    [
        ("%3 = sub(%0, %1)", "%1 = add(%a, %b)", "is sub, where %1 is add", 0),
        ("%3 = sub(%0, %1)", "%1 = sub(%x, %x)", "has other='arg1_1'; %x is 'arg0_1' already", 1),
        ("%3 = mul(%0, 2.0)", "%1 = mul(%x, 3)", "has other=2.0, not 3", 1),
        ("%3 = mul(%0, True)", "%1 = mul(%x, 1)", "has other=True, not 1", 1),
        (
            "%3 = softmax.int(%0, -1, torch.float32)",
            "%1 = softmax.int(%x, -1)",
            "has dtype=torch.float32, which the pattern",
            1,
        ),
        ("%3 = softmax.int(%0, -1)", "%1 = softmax.int(%x, -1, %type)", "has no dtype, where %type stands", 1),
        ("%3 = cat([%0, %1], 1)", "%1 = cat([%x], 1)", "has 2 values in tensors, not 1", 1),
        ("%3 = cat([%0, %1], 1)", "%1 = cat([%x, _, _, ...], 1)", "has 2 values in tensors, not 3", 1),
        (
            "%3 = cache_guard(%0, 'all/x', %1)",
            "%1 = cache_guard(%x, _)",
            "has base='arg1_1', which the pattern does not give",
            1,
        ),
        ("%3 = mul(%0, %1)", "%1 = parameter()\n%2 = mul(%x, %1)", "is input, where %1 is parameter", 1),
        ("%3 = sub(%0, 2.0)", "%1 = relu(%x)\n%2 = sub(_, %1)", "has other=2.0; %1 is computed", 1),
    ],
)
def test_what_does_not_match_says_why(line, pattern, reason, depth):
    text = f"{HEAD}{line}\nreturn (%3)"
    no = found(pattern, text)
    assert isinstance(no, Refusal) and not no and reason in no.reason and no.depth == depth, str(no)
    assert Pattern(pattern).closest(parse(text)).depth == depth


def test_both_orders_are_tried_with_what_lies_behind_them():
    """The first order fits the sum alone; only the second fits what it is made of."""
    text = f"{HEAD}%3 = relu(%0)\n%4 = relu(%1)\n%5 = neg(%4)\n%6 = add(%5, %3)\nreturn (%6)"
    match = found("%1 = relu(%a)\n%2 = relu(%b)\n%3 = neg(%2)\n%4 = add(%1, %3)", text)
    assert match and match["a"].name == "arg0_1" and match["b"].name == "arg1_1"
    assert not found("%1 = relu(%a)\n%2 = relu(%b)\n%3 = neg(%2)\n%4 = sub(%1, %3)", text.replace("add", "sub"))


def test_an_order_with_a_factor_is_not_turned():
    text = f"{HEAD}%3 = relu(%0)\n%4 = add(%1, %3, alpha=2)\nreturn (%4)"
    assert not found("%1 = relu(%a)\n%2 = add(%1, %b, alpha=2)", text)
    assert found("%1 = relu(%a)\n%2 = add(%b, %1, alpha=2)", text)


def test_the_closest_miss_is_the_one_with_most_lines():
    graph = parse(GRAPH.replace("gelu(%3, approximate='tanh')", "relu(%3)"))
    no = MLP.closest(graph)
    assert (no.node, no.reason, no.depth) == ("relu", "is relu, where %2 is gelu|silu", 1)
    assert str(Pattern("%1 = tanh(%x)").closest(graph)) == ": the graph has no tanh"
    assert list(MLP.find(graph)) == []


def test_a_match_does_not_outlive_a_change():
    graph = parse(GRAPH)
    (match,) = MLP.find(graph)
    match["2"].replace_input_with(match["1"], match["x"])
    with pytest.raises(ContractError, match=r"'gelu' has changed since 'linear_1' was matched; .*: match again"):
        match["x"]
    graph = parse(GRAPH)
    (match,) = MLP.find(graph)
    match["3"].replace_all_uses_with(match["x"])
    graph.graph.erase_node(match["3"])
    with pytest.raises(ContractError, match="match again"):
        _ = match.leaks


def test_a_graph_may_be_changed_between_two_matches():
    graph = parse("%0 = input() : f32[2]\n%1 = relu(%0)\n%2 = relu(%1)\n%3 = relu(%2)\nreturn (%3)")
    names = []
    for match in Pattern("%1 = relu(%x)\n%2 = relu(%1)").find(graph):
        names.append(match.root.name)
        match.root.replace_all_uses_with(match["1"])
        graph.graph.erase_node(match.root)
    assert names == ["relu_1", "relu_2"], "the third relu reads the first one now"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a pattern has at least one line"),
        ("relu(%x)", "line 1 of the pattern, 'relu(%x)': a line is"),
        ("%1 = rleu(%x)", "there is no operation 'rleu'"),
        ("%1 = relu(%x)\n%2 = neg(%x)", "nothing uses %1; the last line is the one that is matched"),
        ("%1 = relu(%x)\n%1 = neg(%1)", "%1 is there already"),
        ("%1 = relu(%2)\n%2 = neg(%1)", "%2 is used before this line"),
        ("%1 = relu(%x, 3)", "relu takes self"),
        ("%1 = softmax.int(%x, axis=1)", "softmax.int takes self, dim, dtype"),
        ("%1 = add(..., %x)", "... is the last of the arguments"),
        ("%1 = add(~3, %x)", "~ stands before a value, as in ~%2"),
        ("%1 = input(%x)", "input() has no arguments"),
        ("%1 = relu(open('x'))", "is no argument"),
        ("%1 = relu(%x", "a line is"),
    ],
)
def test_patterns_that_are_none_are_refused(text, message):
    with pytest.raises(ConfigError) as error:
        Pattern(text)
    assert message in str(error.value)


def own_text(graph, root, most=6):
    """The lines that `root` is computed from, as a pattern: the nearest `most` as lines, what is behind them as values."""
    of, lines = numbers(graph.graph), {}
    for line in dump(graph).splitlines():
        if line.startswith("%") and "= constant(" not in line:
            lines[int(line[1:].split(" ")[0])] = line.rsplit(" : ", 1)[0]
    near, todo = set(), [root]
    while todo and len(near) < most:
        node = todo.pop(0)
        if node.op == "call_function" and of[node] in lines:
            near.add(of[node])
            todo += node.all_input_nodes
    return Pattern("\n".join(lines[n] for n in sorted(near)))


@pytest.mark.parametrize("name", some(["tiny", "dit", "hunyuan_video", "latte"], {"tiny", "latte"}.__contains__))
def test_what_a_graph_prints_is_a_pattern_of_itself(name):
    models = small_models()
    if name not in models:
        pytest.skip("diffusers is not installed")
    graph, _ = models[name].graph()
    of = numbers(graph.graph)
    for node in [n for n in graph.graph.nodes if n.op == "call_function"][::7]:
        match = own_text(graph, node).match(node)
        assert match, f"{node.format_node()}: {match}"
        assert all(value is node or of[value] == int(key) for key, value in match.values.items() if not key.isalpha())


@settings(max_examples=25, deadline=None)
@given(residual_nets(), st.integers(0, 10**6))
def test_a_part_of_a_random_net_is_found_in_it(net, pick):
    graph = trace(net, torch.randn(3, WIDTH), torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)).graph
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    if not nodes:
        return
    node = nodes[pick % len(nodes)]
    pattern = own_text(graph, node, most=4)
    assert any(m.root is node for m in pattern.find(graph))
