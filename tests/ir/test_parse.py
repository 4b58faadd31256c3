"""The text of a graph is the graph: what is dumped parses, runs, and prints as it did; what is no graph is refused by line."""

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings

from vdcache.errors import ConfigError
from vdcache.ir import cache_guard, dump, parse, trace
from vdcache.ir.dialect import observe, probe
from vdcache.ir.graph_files import load_graph, save_graph
from vdcache.passes import Canonicalise, DeadCode, Emit, MarkBranches, MergeSlots, Observe, Pipeline, Specialise, TileAttention
from vdcache.testing import (
    WIDTH,
    TinyDiT,
    assert_bit_identical,
    assert_round_trip,
    latent,
    residual_nets,
    small_models,
    time_of,
    values_of,
)

X, W, G = torch.randn(3, WIDTH), torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)


def same(graph, *inputs):
    """The text parses back, and what it parses to computes the same."""
    assert_round_trip(graph)
    assert_bit_identical(graph, parse(dump(graph)), *inputs)


@settings(deadline=None, max_examples=30)
@given(residual_nets())
def test_random_nets(net):
    graph = trace(net, X, W, G).graph
    same(graph, X, W, G)
    marked, _ = Pipeline((Canonicalise(), MarkBranches(), MergeSlots())).run(graph)
    same(marked, X, W, G)


def test_every_dialect_node_and_plan():
    passes = (Canonicalise(), MarkBranches(), Observe(strides=(1,), frames=2), MergeSlots(), Emit())
    graph, _ = Pipeline(passes).run(trace(TinyDiT(), latent(0), time_of(0), latent(1)).graph)
    same(graph)
    for plan in (frozenset(), frozenset({"all"})):
        variant, _ = Pipeline((Specialise(reuse=plan), DeadCode()), given=frozenset(Specialise.requires)).run(graph)
        same(variant)
    g = graph.graph
    with g.inserting_before(g.output_node()):
        node = g.call_function(probe, (list(g.nodes)[-5], "all/p", "l1", "step"))
        node.meta["val"] = node.args[0].meta["val"]
    same(graph)


def test_masks():
    case = small_models()["demo"]
    graph, inputs = case.graph()
    tiled, _ = Pipeline((Canonicalise(), TileAttention(("frames:1",)))).run(graph)
    assert "vdcache.tile_attention" in dump(tiled)
    same(tiled, *inputs)


def test_sizes_that_are_symbols():
    model = TinyDiT()
    graph = trace(model, latent(0, 2, 6, 4), time_of(0).expand(2), latent(1, 2, 5, 4), dynamic=True).graph
    text = dump(graph)
    assert text.startswith("sizes s0=4, s1=16, s2=24, s3=2, s4=6, s5=5\n")
    assert "f32[s3,s4,s0]" in text and "operator.add" in text
    assert_round_trip(graph)
    again = parse(text)
    inputs = [*model.state_dict().values(), latent(3, 3, 7, 4), time_of(1).expand(3), latent(4, 3, 2, 4)]
    assert_bit_identical(graph, again, *inputs)  # any other sizes do as well


def test_computed_sizes():
    assert_expected_inline(
        dump(
            parse("""
sizes s0=6
%0 = input() : f32[2*s0,4]
%1 = input() : sym[s0]
%2 = input() : 3
%3 = slice(%0, 0, 0, %1)
return (%3, %1)""")
        ),
        """\
sizes s0=6
%0 = input() : f32[2*s0,4]
%1 = input() : sym[s0]
%2 = input() : 3
%3 = slice(%0, 0, 0, %1) : f32[s0,4]
return (%3, %1)""",
    )


def test_types_devices_strides_and_literals():
    text = """\
%0 = input() : bf16[2,3]{1,2}
%1 = parameter() : f8[2]"""
    with pytest.raises(ConfigError, match=r"line 2 of the graph.*there is no dtype 'f8'"):
        parse(text)
    text = """\
%0 = input() : bf16[2,3]{1,2}
%1 = parameter() : float8_e4m3fn[2,3]
%2 = _to_copy(%1, dtype=torch.bfloat16) : bf16[2,3]
%3 = add(%0, %2, alpha=-inf) : bf16[2,3]
%4 = clone(%3, memory_format=torch.contiguous_format) : bf16[2,3]
%5 = full([2, 3], nan, dtype=torch.float32, layout=torch.strided, device=device(type='cpu'), pin_memory=False) : f32[2,3]
%6 = index(%5, [None, %7]) : f32[2,1]
return (%6)"""
    with pytest.raises(ConfigError, match=r"line 7 .*%7 is not computed before this line"):
        parse(text)
    text = text.replace("[None, %7]", "[%8]").replace(
        "%6 =", "%8 = constant('at', [1]) : i64[1]\n%9 = gelu(%5, approximate='tanh # %0') : f32[2,3]\n%6 ="
    )
    with pytest.raises(ConfigError, match="does not take this"):
        parse(text)  # a text in quotes is left alone, and the operation says what it takes
    graph = parse(text.replace("tanh # %0", "tanh").replace("f32[2,1]", "f32[1,3]"))
    assert next(iter(graph.graph.nodes)).meta["val"].stride() == (1, 2)
    again = dump(graph)
    assert "bf16[2,3]{1,2}" in again and "alpha=-inf" in again and "constant('at', [1])" in again
    assert_round_trip(graph)


def test_devices_that_are_not_here():
    text = """\
%0 = input() : f16[4]@cuda:0
%1 = relu(%0) : f16[4]@cuda:0
return (%1)"""
    assert dump(parse(text)) == text


def test_mutations_and_parameters_come_back():
    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls.add_(1)
            return x * self.weight

    captured = trace(Counts(), torch.ones(4))
    assert_expected_inline(
        dump(captured.graph),
        """\
%0 = parameter() : f32[4]
%1 = parameter() : f32[1]
%2 = input() : f32[4]
%3 = add(%1, 1) : f32[1]
%4 = mul(%2, %0) : f32[4]
return (%3 -> %1, %4)""",
    )
    again = parse(dump(captured.graph)).meta["vdcache"]
    assert (again.mutations, again.results, again.static) == (((0, 1),), 1, frozenset({0, 1}))


def test_one_result_alone_stays_alone():
    graph = parse("%0 = input() : f32[2]\n%1 = relu(%0)\nreturn %1")
    assert torch.equal(graph(torch.ones(2)), torch.ones(2))
    assert dump(graph).endswith("return %1")


def test_graphs_inside_graphs():
    from tests.zoo import graph_of

    graph, inputs = graph_of("flex")
    text = dump(graph)
    assert "graph('sdpa_score0') {" in text and "higher_order.flex_attention" in text
    same(graph, *inputs)


def test_constants_are_small_or_beside(tmp_path):
    big, small = torch.randn(4, 5), torch.tensor([0.5, 2.0])
    graph = trace(lambda x: x @ big * small[0], torch.randn(2, 4)).graph
    assert "constant('_tensor_constant" in dump(graph)
    assert_round_trip(graph)
    x = torch.randn(2, 4)
    assert not torch.equal(parse(dump(graph))(x)[0], graph(x)[0])  # a stand-in, the same each time
    assert_bit_identical(parse(dump(graph)), parse(dump(graph)), x)
    save_graph(tmp_path / "g.txt", graph, comment="two\nlines", pipeline="canonicalise")
    found = load_graph(tmp_path / "g.txt")
    assert found.pipeline == "canonicalise"
    assert_bit_identical(found.graph, graph, x)
    with pytest.raises(ConfigError, match="there is no text of a graph at"):
        load_graph(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match=r"the constant that was given is f32\[1\]"):
        parse(dump(graph), {n.target: torch.ones(1) for n in graph.graph.find_nodes(op="get_attr")})


def test_types_may_be_left_out_and_wrong_ones_are_told():
    graph = parse("%0 = input() : f32[2,4]\n# a comment\n\n%5 = sum.dim_IntList(%0, [1])\nreturn (%5)")
    assert dump(graph).splitlines()[1] == "%1 = sum.dim_IntList(%0, [1]) : f32[2]"
    with pytest.raises(ConfigError, match=r"line 2 of the graph, '%1 = relu.*it gives f32\[2\]"):
        parse("%0 = input() : f32[2]\n%1 = relu(%0) : f32[3]\nreturn (%1)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%0 = input()\nreturn (%0)", "an input says its type"),
        ("%0 = input() : f32[2]", "ends with what it returns"),
        ("%0 = input() : f32[n]\nreturn (%0)", "the size 'n' is no number"),
        ("%0 = input() : f32[2]\n%0 = relu(%0)\nreturn (%0)", "%0 is there already"),
        ("%0 = input() : f32[2]\nreturn (%0)\n%1 = relu(%0)", "nothing follows"),
        ("%0 = input() : f32[2]\n%1 = reluu(%0)\nreturn (%1)", "there is no operation 'reluu'"),
        ("%0 = input() : f32[2]\n%1 = mine.op(%0)\nreturn (%1)", "if 'mine' is a package, import it first"),
        ("%0 = input() : f32[2]\n%1 = add.Wrong(%0, 1)\nreturn (%1)", "has the forms"),
        ("%0 = input() : f32[2]\n%1 = relu(%0\nreturn (%1)", "cannot be read"),
        ("%0 = input() : f32[2]\n%1 = relu(open('x'))\nreturn (%1)", "is no argument"),
        ("%0 = input() : f32[2]\n%1 = os.system('x')\nreturn (%1)", "there is no operation 'os.system'"),
        ("%0 = input() : f32[2]\nrelu(%0)\nreturn (%0)", "a line is '%3 ="),
        ("%0 = input() : f32[2]\n%1 = relu(%0)\nreturn (%1 -> %1)", "points at an input"),
        ("sizes s0=1\n%0 = input() : f32[s0]\nreturn (%0)", "a symbol of a size"),
    ],
)
def test_what_is_no_graph(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_parsed_graphs_take_passes():
    """Guards, values and names of a parsed graph are those of the graph itself: passes do the same to both."""
    graph = trace(TinyDiT(), latent(0), time_of(0), latent(1)).graph
    passes = Pipeline((Canonicalise(), MarkBranches(), MergeSlots(), Observe()), verify=True)
    (mine, steps), (theirs, others) = passes.run(graph), passes.run(parse(dump(graph)))
    assert dump(mine) == dump(theirs)
    assert [s.rewrites for s in steps] == [s.rewrites for s in others]
    assert [s.refusals for s in steps] == [s.refusals for s in others]


def test_dialect_functions_are_identities_under_the_interpreter():
    graph = parse("""
%0 = input() : f32[2]
%1 = cache_guard(%0, 'a/b', %0)
%2 = observe(%1, 'a/o', 'l1', (), 0)
return (%2)""")
    assert {n.target for n in graph.graph.nodes if n.op == "call_function"} == {cache_guard, observe}
    assert torch.equal(values_of(graph, [torch.ones(2)])["observe"], torch.ones(2))
