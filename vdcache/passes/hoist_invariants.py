"""hoist-invariants: mark what a step need not compute, because it depends on no latent.

    y = f(x, linear(silu(embed(t)), w))   -->   y = f(x, invariant(linear(silu(embed(t)), w), 'timestep.0/0'))

Loop-invariant code motion over the denoising loop. What depends on parameters alone, on the prompt or on the timestep is computed by the
very operations of the model, in a graph beside the step's (`side_graph`), and held; the step's graph takes it as an input
(`step_graph`). Which values are held is a minimum cut: what a value spares (FLOPs, weights that are not read) against the bytes that are
held for it. Views and casts spare nothing by themselves. Nothing moves across an effect, a random draw, a cache guard, or an operation of
another library. Bit-exact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import fx

from vdcache.ir import dialect
from vdcache.ir.capture import signature
from vdcache.ir.edit import add_input, backward_slice, call, copy_graph, inputs, outputs, set_outputs
from vdcache.ir.facts import Fact
from vdcache.ir.ops import CASTS, is_effectful, is_work, tensor_of
from vdcache.passes.base import Pass, PassResult, Refusal, copy_meta, drop_dead_code
from vdcache.passes.mark_lanes import lanes_io
from vdcache.patterns.analysis import forget
from vdcache.patterns.cost import bytes_of, flops
from vdcache.patterns.invariance import CLASSES, Dependence, dependence, is_view
from vdcache.util.fields import at_least, one_of

__all__ = ["HELD", "HoistInvariants", "InvariantGroup", "groups_of", "held_inputs", "side_graph", "step_graph"]

HELD = CLASSES[:4]  # classes whose values can be held
FLOPS_PER_BYTE = 16  # FLOPs that a processor does while it reads a byte; low, as on a CPU, so that little is held for little
SLOT = 256  # bytes that a held value counts for besides its own: it is one input more
_HELD = "vdcache.invariant"  # in the meta of an input: which invariant it is
WIDENED = 24  # how often what is held is made dearer, by half, until it fits the budget


@dataclass(frozen=True)
class HoistInvariants(Pass):
    """Mark what is held between steps instead of being computed in each.

    Args:
        classes: of "parameters", "prompt", "timestep" and "both" (timestep and prompt together: held values then serve the same prompt
            at the same timestep alone, so it pays only where a prompt comes back).
        budget: bytes that the values of one class may take, for one prompt or one timestep.

    Raises:
        ConfigError: another class.
    """

    name: ClassVar[str] = "hoist-invariants"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.CANONICAL})

    classes: tuple[Annotated[str, one_of(*HELD)], ...] = ("parameters", "prompt", "timestep")
    budget: Annotated[int, at_least(0)] = 2**28

    def run(self, graph: fx.GraphModule) -> PassResult:
        g = graph.graph
        if (lanes := lanes_io(graph)) is not None and lanes.mode == "batch":
            why = "one lane of a batch is predicted from the other, and what is held holds both"
            return PassResult(graph, 0, (Refusal(g.output_node().name, why),))
        found = dependence(graph)
        numbers: dict[int, int] = {}  # of each set of inputs
        count: dict[int, int] = {}
        marks = []
        for kind in HELD:
            if kind not in self.classes:
                continue
            hoisted = _hoisted(g, found, kind, self.budget)
            for node in _frontier(g, hoisted):
                mask = found.masks[node]
                group = numbers.setdefault(mask, len(numbers))
                number = count[group] = count.get(group, -1) + 1
                with g.inserting_after(node):
                    mark = g.call_function(dialect.invariant, (node, f"{kind}.{group}/{number}"))
                copy_meta(mark, str(self), node)
                for user in [u for u in node.users if u not in hoisted and u is not mark]:
                    user.replace_input_with(node, mark)
                marks.append(mark)
        self._copy_results(g, found)
        return PassResult(graph, len(marks))

    def _copy_results(self, g: fx.Graph, found: Dependence) -> None:
        """What the model returns, and its caller may write into, shares no memory with what is held."""
        results = outputs(g)
        for at, node in enumerate(results):
            if not isinstance(node, fx.Node) or node.op != "call_function":
                continue
            source: object = node
            while isinstance(source, fx.Node) and source.target is not dialect.invariant:
                if not (is_view(source) or source.target in CASTS):
                    source = None
                    break
                source = source.args[0] if source.args else None
            held = found.masks.get(node) is not None and found.kind(node) in HELD
            if isinstance(source, fx.Node) or (held and any(n.target is dialect.invariant for n in backward_slice([node]))):
                with g.inserting_before(g.output_node()):
                    results[at] = call(g, torch.ops.aten.clone.default, node, provenance=str(self))
        set_outputs(g, results)


# ---- which values are held ---------------------------------------------------------------------------------------------


def _spared(node: fx.Node, found: Dependence) -> float:
    """What not computing a node is worth, in bytes that are not moved."""
    if is_view(node) or node.target in CASTS:
        return 0.0
    weights = 0
    if is_work(node):
        weights = sum(bytes_of(p) for p in set(node.all_input_nodes) if found.kind(p) == "parameters")
    return weights + flops(node) / FLOPS_PER_BYTE + 0.5 * bytes_of(node)


def _hoisted(g: fx.Graph, found: Dependence, kind: str, budget: int) -> set[fx.Node]:
    """The nodes of a class that steps do not compute, chosen by a minimum cut."""
    own = (n for n in g.nodes if n.op == "call_function" and n.users and n in found.masks)  # marks are none of its nodes
    nodes = [n for n in own if found.kind(n) == kind]
    spared = {n: _spared(n, found) for n in nodes}
    if not any(spared.values()):
        return set()
    price = 1.0
    for _ in range(WIDENED):
        chosen = _cut(nodes, spared, price)
        if sum(bytes_of(n) for n in _frontier(g, chosen)) <= budget:
            return chosen
        price *= 1.5
    return set()


def _cut(nodes: list[fx.Node], spared: Mapping[fx.Node, float], price: float) -> set[fx.Node]:
    """The set, closed under what its members are computed from, that spares most for what it holds.

    Project selection: a member spares what it costs; a member that something outside reads must be held. Both are capacities of one cut.
    """
    import networkx

    own = set(nodes)
    flow = networkx.DiGraph()
    flow.add_nodes_from(("source", "sink"))
    for node in nodes:
        if spared[node]:
            flow.add_edge("source", node, capacity=round(spared[node]))
        held = (node, "held")
        if tensor_of(node) is not None and not is_view(node):
            flow.add_edge(node, held, capacity=round(price * (bytes_of(node) + SLOT)))
        else:
            flow.add_edge(node, held)  # without a capacity: it is not held by itself
        outside = False
        for user in node.users:
            if user in own:
                flow.add_edge(held, user)
                flow.add_edge(user, node)
            else:
                outside = True
        if outside:
            flow.add_edge(held, "sink")
    _, (chosen, _) = networkx.minimum_cut(flow, "source", "sink")
    return chosen & own


def _frontier(g: fx.Graph, hoisted: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes among them that others read, in order."""
    return [n for n in g.nodes if n in hoisted and any(u not in hoisted for u in n.users)]


# ---- the graphs that come of it ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InvariantGroup:
    """Invariants that depend on the same inputs.

    Args:
        name: what stands before the slash in the names of its values; it begins with their class.
        values: names of its values, in order.
        timesteps, prompts: positions of these inputs among the graph's.
        static: positions of the parameters and buffers that its values are computed from.
    """

    name: str
    values: tuple[str, ...]
    timesteps: tuple[int, ...]
    prompts: tuple[int, ...]
    static: tuple[int, ...]

    @property
    def kind(self) -> str:
        """One of `HELD`."""
        return self.name.partition(".")[0]


def groups_of(graph: fx.GraphModule) -> tuple[InvariantGroup, ...]:
    """The groups of a marked graph, in order: a group comes after those that its values are computed from."""
    marks: dict[str, list[fx.Node]] = {}
    for mark in dialect.invariants(graph.graph):
        marks.setdefault(str(mark.args[1]).partition("/")[0], []).append(mark)
    if not marks:
        return ()
    found, static = dependence(graph), signature(graph).static
    position = {n: i for i, n in enumerate(inputs(graph.graph))}
    made = []
    for name, own in marks.items():
        value: fx.Node = own[0].args[0]  # type: ignore[assignment]
        read = {position[n] for n in backward_slice(list(own)) if n.op == "placeholder"}
        mask = found.masks[value]
        made.append(
            InvariantGroup(
                name,
                tuple(str(m.args[1]) for m in own),
                tuple(i for i in position.values() if mask >> i & 1 and found.timesteps >> i & 1),
                tuple(i for i in position.values() if mask >> i & 1 and found.prompts >> i & 1),
                tuple(sorted(read & static)),
            )
        )
    return tuple(sorted(made, key=lambda group: len(group.timesteps) + len(group.prompts)))


def step_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A marked graph as a step runs it: the marked values are inputs after all others (`held_inputs`)."""
    made = copy_graph(graph)
    forget(made)
    _take(made.graph, held=True)
    drop_dead_code(made.graph, keep=lambda n: is_effectful(n) or dialect.is_dialect(n))
    made.recompile()
    return made


def held_inputs(graph: fx.GraphModule) -> tuple[tuple[str, ...], list[torch.Tensor]]:
    """Which invariants a step's graph reads, in the order of its inputs, and their fake values. The inputs that it does not read go."""
    names, values = [], []
    for node in inputs(graph.graph):
        if (name := node.meta.get(_HELD)) is None:
            continue
        if node.users:
            names.append(str(name))
            values.append(node.meta["val"])
        else:
            graph.graph.erase_node(node)
            graph.recompile()
    return tuple(names), values


def _take(g: fx.Graph, held: bool) -> list[str]:
    """Put inputs in the place of marks. Returns the names of the marks."""
    names: list[str] = []
    for mark in dialect.invariants(g):
        taken = add_input(g, f"invariant_{len(names)}", mark.meta["val"], "hoist-invariants")
        taken.meta["val"] = mark.meta["val"]  # with the strides that its graph leaves
        names.append(str(mark.args[1]))
        if held:
            taken.meta[_HELD] = names[-1]
        mark.replace_all_uses_with(taken)
        g.erase_node(mark)
    return names


def side_graph(graph: fx.GraphModule, names: Iterable[str]) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The graph that computes some values of one group of a marked graph, in their order among its marks.

    Returns also the names of the values of other groups that are its inputs after the model's.
    """
    made = copy_graph(graph)
    forget(made)
    g, wanted = made.graph, set(names)
    group = next(iter(wanted)).partition("/")[0]
    results = [m.args[0] for m in dialect.invariants(g) if str(m.args[1]) in wanted]
    for mark in dialect.invariants(g):
        if str(mark.args[1]).partition("/")[0] == group:
            mark.replace_all_uses_with(mark.args[0])  # type: ignore[arg-type]
    set_outputs(g, results)
    drop_dead_code(g)
    needed = _take(g, held=False)
    drop_dead_code(g)
    made.meta["vdcache"] = replace(signature(made), mutations=(), results=len(results))
    made.recompile()
    return made, tuple(needed)
