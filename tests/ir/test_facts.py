"""Every fact has a checker that finds what breaks it, and the text of a graph is stable."""

import pytest
import torch
from expecttest import assert_expected_inline

from vdcache.errors import ConfigError, ContractError
from vdcache.ir import Fact, cache_guard, check, dump, observe, trace
from vdcache.ir.edit import call
from vdcache.ir.facts import FACTS, holding

aten = torch.ops.aten


def graph_of():
    return trace(lambda x, w: x + torch.relu(x @ w), torch.randn(2, 4), torch.randn(4, 4)).graph.graph


def add(graph, target, *args):
    with graph.inserting_before(graph.output_node()):
        node = graph.call_function(target, args)
    node.meta["val"] = args[0].meta["val"]
    graph.output_node().args = ([node],)
    return node


def test_text():
    assert_expected_inline(
        dump(graph_of()),
        """\
%0 = input() : f32[2,4]
%1 = input() : f32[4,4]
%2 = matmul(%0, %1) : f32[2,4]
%3 = relu(%2) : f32[2,4]
%4 = add(%0, %3) : f32[2,4]
return (%4)""",
    )


def test_a_good_graph_holds_everything():
    for fact in FACTS:
        check(fact, graph_of())
    assert holding(graph_of()) == frozenset(FACTS)


@pytest.mark.parametrize(
    ("fact", "spoil", "message"),
    [
        (Fact.FUNCTIONAL, lambda g, x: add(g, aten.relu_.default, x), "writes into its arguments"),
        (Fact.CANONICAL, lambda g, x: add(g, aten.alias.default, x), "is a aten.alias.default"),
        (Fact.GUARDED, lambda g, x: add(g, cache_guard, x, "slot"), "a slot is named 'group/name'"),
        (Fact.GUARDED, lambda g, x: add(g, cache_guard, add(g, cache_guard, x, "a/b"), "a/b"), "has already"),
        (Fact.GUARDED, lambda g, x: add(g, cache_guard, x, "a/b", list(g.nodes)[1]), "has a base of"),
        (Fact.OBSERVED, lambda g, x: add(g, observe, x, "a/b", "l7"), "measures 'l7'"),
        (Fact.PLAIN, lambda g, x: add(g, cache_guard, x, "a/b"), "is a dialect node"),
    ],
)
def test_a_broken_graph_is_told(fact, spoil, message):
    graph = graph_of()
    spoil(graph, next(iter(graph.nodes)))
    with pytest.raises(ContractError, match=message):
        check(fact, graph)


def test_untyped_nodes_are_told():
    graph = graph_of()
    del list(graph.nodes)[2].meta["val"]
    with pytest.raises(ContractError, match=r"has no meta\['val'\]"):
        check(Fact.TYPED, graph)


def test_new_nodes_are_typed_as_they_are_made():
    graph = graph_of()
    x = next(iter(graph.nodes))
    with graph.inserting_before(graph.output_node()):
        node = call(graph, aten.sum.dim_IntList, x, [1], provenance="a test")
    assert tuple(node.meta["val"].shape) == (2,) and node.meta["vdcache"] == "a test"


def no_relu(graph):
    """The check of a fact that another package brings."""
    return next(((n, "is a relu") for n in graph.nodes if n.target is aten.relu.default), None)


NO_RELU = Fact("without-relu", no_relu)


def test_a_fact_of_ones_own():
    with pytest.raises(ContractError, match="after capture the graph is not without-relu: 'relu' is a relu"):
        check(NO_RELU, graph_of())
    assert NO_RELU not in holding(graph_of(), [NO_RELU]) and NO_RELU in holding(torch.fx.Graph(), [NO_RELU])
    assert repr(NO_RELU) == "Fact('without-relu')" and Fact("without-relu", no_relu) == NO_RELU


@pytest.mark.parametrize("name", ["", "Guarded", "two words", 3])
def test_a_fact_has_a_name(name):
    with pytest.raises(ConfigError, match="a fact is named in small letters and dashes"):
        Fact(name, no_relu)
