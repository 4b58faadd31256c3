"""The pass contract: text, order, honesty."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from vdcache.ir import ConfigError, ContractError, Fact, trace
from vdcache.methods.registry import NAMES
from vdcache.passes import Canonicalise, MarkBranches, MergeSlots, Observe, Pass, PassResult, Pipeline, Rewrite, Specialise
from vdcache.passes.predictors import LAST, Blended, ByGroup, Extrapolated, Frequencies, Scaled, Taylor

PASSES = (
    Canonicalise(),
    MarkBranches(kinds=("mlp", "fused"), group="g", gate="pre"),
    MergeSlots(group="g"),
    Observe(kind="temporal-attention", blocks=(3, 4), distance="cosine", strides=(1, 2), frames=5),
    Specialise(reuse=frozenset({"b", "a"}), save="needed", slots=("a/x.1",)),
)


def test_text_round_trip():
    text = str(Pipeline(PASSES))
    assert text == (
        "canonicalise,mark-branches{kinds=[mlp,fused],group=g,gate=pre},merge-slots{group=g},"
        "observe{kind=temporal-attention,blocks=[3,4],distance=cosine,strides=[1,2],frames=5},"
        "specialise{reuse=[a,b],save=needed,slots=[a/x.1]}"
    )
    assert Pipeline.parse(text).passes == PASSES
    for named in NAMES:
        made = named.make(*named.example).pipeline
        assert Pipeline.parse(str(made)).passes == made.passes


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="no pass is called 'nope'"):
        Pipeline.parse("nope")
    with pytest.raises(ConfigError, match="has no option 'colour'"):
        Pipeline.parse("merge-slots{colour=red}")


def test_texts_that_people_write():
    text = "canonicalise, mark-branches{kinds=mlp,group=g}, specialise{reuse=g}"
    passes = Pipeline.parse(text).passes
    assert passes[1:] == (MarkBranches(kinds=("mlp",), group="g"), Specialise(reuse=frozenset({"g"})))
    for wrong in ("canonicalise;merge-slots", "Canonicalise", "canonicalise mark-branches"):
        with pytest.raises(ConfigError, match="is no list of passes"):
            Pipeline.parse(wrong)
    with pytest.raises(ConfigError, match="given as option=value"):
        Pipeline.parse("merge-slots{run}")
    with pytest.raises(ContractError, match="'mark-branches' requires canonical"):
        Pipeline.parse("mark-branches")
    assert Pipeline.parse("mark-branches", given=MarkBranches.requires).passes == (MarkBranches(),)


def test_order_is_checked_without_a_graph():
    with pytest.raises(ContractError, match="'mark-branches' requires canonical; nothing before it ensures that"):
        Pipeline((MarkBranches(),))


@dataclass(frozen=True)
class Liar(Pass):
    name: ClassVar[str] = "liar"

    def run(self, graph):
        with graph.graph.inserting_before(graph.graph.output_node()):
            graph.graph.call_function(torch.ops.aten.relu.default, (next(iter(graph.graph.nodes)),))
        return PassResult(graph, 0)


@dataclass(frozen=True)
class Promiser(Pass):
    name: ClassVar[str] = "promiser"
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def run(self, graph):
        return PassResult(graph, 0)


def test_verify_holds_passes_to_their_word():
    graph = trace(lambda x: x.alias().relu() if hasattr(x, "alias") else torch.ops.aten.alias(x).relu(), torch.randn(2)).graph
    with pytest.raises(ContractError, match="'liar' reports no rewrites, but the graph has changed"):
        Pipeline((Liar(),), verify=True).run(graph)
    with graph.graph.inserting_before(graph.graph.output_node()):
        alias = graph.graph.call_function(torch.ops.aten.alias.default, (next(iter(graph.graph.nodes)),))
    alias.meta = dict(next(iter(graph.graph.nodes)).meta)
    with pytest.raises(ContractError, match="after 'promiser' the graph is not canonical"):
        Pipeline((Promiser(),), verify=True).run(graph)


def test_the_pipeline_works_on_a_copy():
    graph = trace(lambda x, w: x + x @ w, torch.randn(2, 4), torch.randn(4, 4)).graph
    before = len(graph.graph.nodes)
    Pipeline((Canonicalise(), MarkBranches())).run(graph)
    assert len(graph.graph.nodes) == before


NO_TANH = Fact(
    "without-tanh", lambda graph: next(((n, "is a tanh") for n in graph.nodes if n.target is torch.ops.aten.tanh.default), None)
)


@dataclass(frozen=True)
class NoTanh(Rewrite):
    """no-tanh: tanh becomes sigmoid."""

    name: ClassVar[str] = "no-tanh"
    ensures: ClassVar[frozenset[Fact]] = frozenset({NO_TANH})
    before = "%1 = tanh(%x)"
    after = "%1 = sigmoid(%x)"


@dataclass(frozen=True)
class Needs(Pass):
    name: ClassVar[str] = "needs"
    requires: ClassVar[frozenset[Fact]] = frozenset({NO_TANH})

    def run(self, graph):
        return PassResult(graph)


def test_a_fact_of_another_package_is_held_to_like_every_other():
    with pytest.raises(ContractError, match="'needs' requires without-tanh; nothing before it ensures that"):
        Pipeline((Needs(),))
    graph = trace(torch.tanh, torch.randn(2)).graph
    Pipeline((NoTanh(), Needs()), verify=True).run(graph)

    @dataclass(frozen=True)
    class Lies(NoTanh):
        name: ClassVar[str] = "lies"

        def why_not(self, match):
            return ["it feels like it"]

    with pytest.raises(ContractError, match="after 'lies' the graph is not without-tanh: 'tanh' is a tanh"):
        Pipeline((Lies(),), verify=True).run(graph)


@pytest.mark.parametrize(
    "predictor",
    [
        LAST,
        Taylor(2),
        Scaled(0.98),
        Extrapolated(0.5),
        Extrapolated(0.5, 3, 20),
        Frequencies(),
        Frequencies((1.2, 0, 9), (0.9, 3, 20), 0.4),
        ByGroup((("attention", Taylor(1)),)),
        ByGroup((("attention", Taylor(1)), ("mlp", Scaled(0.9))), Taylor(2)),
    ],
    ids=str,
)
def test_a_predictor_is_part_of_the_text(predictor):
    made = Specialise(reuse=frozenset({"all", "mlp"}), predictor=predictor, slots=("all/1",))
    assert Pipeline.parse(str(made), given=Specialise.requires).passes == (made,)


def test_what_is_no_predictor_is_refused():
    for text in ("nope(1)", "taylor(", "taylor(9)", "taylor(order=x)", "by_group(1)", "3"):
        with pytest.raises(ConfigError):
            Pipeline.parse(f"specialise{{reuse=all,predictor={text}}}", given=Specialise.requires)
    blended = Specialise(reuse=frozenset({"all"}), predictor=Blended(lambda values, when: values[0]))
    with pytest.raises(ConfigError, match="is no predictor that a text can name"):
        Pipeline.parse(str(blended), given=Specialise.requires)
