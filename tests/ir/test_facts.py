"""Every fact has a checker that finds what breaks it, and the text of a graph is stable."""

import pytest
import torch
from expecttest import assert_expected_inline

from vdcache.ir import ContractError, Fact, check, dump, guard, observe, trace
from vdcache.ir.edit import call

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
    for fact in Fact:
        check(fact, graph_of())


@pytest.mark.parametrize(
    ("fact", "spoil", "message"),
    [
        (Fact.FUNCTIONAL, lambda g, x: add(g, aten.relu_.default, x), "writes into its arguments"),
        (Fact.CANONICAL, lambda g, x: add(g, aten.alias.default, x), "is a aten.alias.default"),
        (Fact.GUARDED, lambda g, x: add(g, guard, x, "slot"), "a slot is named 'group/name'"),
        (Fact.GUARDED, lambda g, x: add(g, guard, add(g, guard, x, "a/b"), "a/b"), "has already"),
        (Fact.GUARDED, lambda g, x: add(g, guard, x, "a/b", list(g.nodes)[1]), "has a base of"),
        (Fact.OBSERVED, lambda g, x: add(g, observe, x, "a/b", "l7"), "measures 'l7'"),
        (Fact.PLAIN, lambda g, x: add(g, guard, x, "a/b"), "is a dialect node"),
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
        node = call(graph, aten.sum.dim_IntList, x, [1], made_by="a test")
    assert tuple(node.meta["val"].shape) == (2,) and node.meta["vdcache"] == "a test"
