"""The pass contract: text, order, honesty."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vdcache
from vdcache.errors import ConfigError, ContractError
from vdcache.ir import Fact, trace
from vdcache.methods.recipe import Recipe
from vdcache.methods.registry import NAMES
from vdcache.passes import (
    Canonicalise,
    MarkBranches,
    MergeSlots,
    Observe,
    Pass,
    PassResult,
    Pipeline,
    Rewrite,
    Specialise,
    put_cache_guard,
)
from vdcache.passes.predictors import LAST, Blended, ByGroup, Frequencies
from vdcache.policies.base import EveryN
from vdcache.policies.weights import Extrapolated, Scaled, Taylor
from vdcache.testing import TinyDiT, run_pass, try_recipe

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
class VariantInputs(Pass):
    name: ClassVar[str] = "needs"
    requires: ClassVar[frozenset[Fact]] = frozenset({NO_TANH})

    def run(self, graph):
        return PassResult(graph)


def test_a_fact_of_another_package_is_held_to_like_every_other():
    with pytest.raises(ContractError, match="'needs' requires without-tanh; nothing before it ensures that"):
        Pipeline((VariantInputs(),))
    graph = trace(torch.tanh, torch.randn(2)).graph
    Pipeline((NoTanh(), VariantInputs()), verify=True).run(graph)

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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("specialise{observe=maybe}", "specialise: observe is true or false; got 'maybe'"),
        ("specialise{reuse=[1]}", "specialise: reuse is a list of words"),
        ("mark-branches{expected-blocks=many}", "mark-branches: expected-blocks is a whole number of at least 0; got 'many'"),
        ("mark-branches{expected-blocks=-1}", "at least 0; got -1"),
        ("mark-branches{per-block=7}", "per-block is true or false; got 7"),
        ("mark-branches{start=x}", "start is a whole number or a share of the blocks between -1 and 1; got 'x'"),
        ("mark-branches{kinds=[1]}", "kinds is a list of 'self-attention'"),
        ("observe{frames=x}", "observe: frames is a whole number of at least 0; got 'x'"),
        ("observe{frames=-2}", "at least 0; got -2"),
        ("observe{blocks=[a]}", "blocks is a list of whole numbers"),
        ("observe{strides=2.5}", "strides is a list of whole numbers"),
        ("observe{block-range=[0.2,x]}", "block-range is a list of 2 numbers"),
        ("observe{block-range=[0.5,2]}", "block-range is a list of 2 numbers between 0 and 1, in ascending order"),
        ("probe{blocks=x}", "blocks is a whole number of at least 1; got 'x'"),
        ("emit{kinds=3}", "kinds is a list of 'self-attention'"),
        ("emit-attention{grid=x}", "three whole numbers of at least 1"),
    ],
)
def test_an_option_of_another_type_is_refused_when_the_pass_is_made(text, said):
    """Some were accepted, and some were reported as a broken promise of the pass in the middle of a compilation."""
    with pytest.raises(ConfigError, match=said):
        Pipeline.parse(text)
    with pytest.raises(ConfigError, match=said):
        vdcache.compile(TinyDiT(), "every-2", pipeline=text)


def test_options_of_passes_of_other_packages_are_checked_as_well():
    @dataclass(frozen=True)
    class Wide(Pass):
        name: ClassVar[str] = "wide"
        width: int = 0
        sides: tuple[int, ...] = ()
        names: "dict[str, int] | None" = None
        loose: int = None

        def __post_init__(self):  # without super()
            pass

        def run(self, graph):
            return PassResult(graph)

    assert Pipeline((Wide(), Wide(torch.tensor(3), range(2), {"a": 1}, 4), Wide(sides=[1]))).passes
    for wrong in (Wide("3"), Wide(sides=("x",)), Wide(sides=3), Wide(names=3), Wide(loose="x")):
        with pytest.raises(ConfigError, match=r"wide: (width|sides|names|loose) is .*; got"):
            Pipeline((wrong,))


@pytest.mark.parametrize("make", [Pipeline, lambda p: Recipe("every-2", EveryN(2)).with_passes(p), lambda p: run_pass(p, "")])
def test_a_pass_that_forgets_its_base_class(make):
    class Forgets:
        name = "forgets"

        def run(self, graph):
            return PassResult(graph)

    for given in (Forgets(), (MarkBranches(), Forgets()), Forgets):
        with pytest.raises(ConfigError, match=r"Forgets does not subclass vdcache\.Pass: write class Forgets\(vdcache\.Pass\)"):
            make(given)


def third_party(run, **attributes):
    """A pass of another package."""
    return dataclass(frozen=True)(
        type("ThirdParty", (Pass,), {"name": "third-party", "run": run, "__module__": __name__, **attributes})
    )()


def doubled(self, graph):
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default, sort=True) or [
        n for n in graph.graph.nodes if n.op == "call_function"
    ]:
        put_cache_guard(node, "all/twice", self)
    return PassResult(graph, 1)


def too_early(self, graph):
    node = next(n for n in graph.graph.nodes if n.op == "call_function")
    with graph.graph.inserting_before(node):
        early = graph.graph.call_function(torch.ops.aten.relu.default, (node,))
    early.meta = dict(node.meta)
    next(n for n in node.users if n is not early).replace_input_with(node, early)
    return PassResult(graph, 1)


def untyped(self, graph):
    node = next(n for n in graph.graph.nodes if n.op == "call_function")
    with graph.graph.inserting_after(node):
        made = graph.graph.call_function(torch.ops.aten.relu.default, (node,))
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return PassResult(graph, 1)


def writes(self, graph):
    node = next(n for n in graph.graph.nodes if n.op == "call_function")
    node.target = torch.ops.aten.add_.Tensor
    return PassResult(graph, 1)


def product(graph):
    products = (torch.ops.aten.matmul.default, torch.ops.aten.mm.default, torch.ops.aten.linear.default)
    return next(n for n in graph.graph.nodes if n.target in products)


def other_shape(self, graph):
    node = product(graph)
    node.replace_all_uses_with(node.args[1])
    return PassResult(graph, 1)


def untrue(self, graph):
    node = product(graph)
    node.args = node.args[::-1]
    return PassResult(graph, 1)


BROKEN = {
    "none": (lambda self, graph: None, "'third-party' returned NoneType; run returns a PassResult"),
    "graph": (lambda self, graph: graph, "'third-party' returned GraphModule; run returns a PassResult"),
    "doubled": (doubled, "has slot 'all/twice', which 'cache_guard' has already"),
    "too early": (too_early, "after 'third-party' the graph is no graph: "),
    "untyped": (untyped, "after 'third-party' the graph is not typed: 'relu"),
    "other shape": (other_shape, "gives float32[4, 4], and its meta['val'] says float32[2, 4]"),
    "untrue": (
        untrue,
        "after 'third-party' the graph cannot be computed: 'matmul' is aten.matmul.default of float32[4, 4] and float32[2, 4]",
    ),
    "writes": (writes, "after 'third-party' the graph is not functional: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_foreign_pass_that_breaks_its_promises_breaks_no_model(name):
    """Without verify, without strict: in the compilation of whoever uses it. The graph runs as it was, and the pass is named."""
    run, said = BROKEN[name]
    a_pass = third_party(run)
    graph = trace(lambda x, w: (x + torch.sin(x @ w)).tanh(), torch.randn(2, 4), torch.randn(4, 4)).graph
    with pytest.raises(ContractError) as error:
        Pipeline((a_pass,)).run(graph)
    assert said in str(error.value)
    (trial,) = try_recipe(Recipe("broken", EveryN(2), (a_pass, MarkBranches())), ["tiny"], steps=3)
    assert trial.identical and trial.computed == (0, 1, 2) and "'third-party'" in trial.said


def test_facts_that_are_texts_are_refused():
    with pytest.raises(ConfigError, match=r"'third-party' ensures \{'guarded'\}; give a frozenset of facts"):
        Pipeline((third_party(lambda self, graph: PassResult(graph), ensures={"guarded"}),))


def test_one_pass_is_a_pipeline():
    assert Pipeline(Canonicalise()).passes == (Canonicalise(),)


def test_a_pass_of_no_package_is_named_by_its_class():
    (made,) = Pipeline.parse(f"{__name__}:Liar").passes
    assert type(made).__name__ == "Liar"
    for wrong, said in (("nowhere:Liar", "cannot be imported"), (f"{__name__}:BROKEN", "is no class of passes")):
        with pytest.raises(ConfigError, match=said):
            Pipeline.parse(wrong)
    recipe = Recipe("own", EveryN(2), (Liar(),))
    with pytest.raises(ConfigError, match="is of no installed package, so a file could not be read back"):
        recipe.to_json()
