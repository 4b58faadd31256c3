"""What each value of a graph depends on: parameters alone, the prompt, the timestep, both of these, or the latent.

What does not depend on the latent is the same in every step of a generation (the prompt's values), in every generation that has the
timestep (the timestep's), or always (those of the parameters). Nothing here decides by names: latents and timestep inputs are those of
`patterns.analysis`, and every other input is taken for a part of the prompt. An input that is no prompt after all costs time, not
exactness: whoever keeps values compares the inputs that they were computed from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from vdcache.ir import dialect
from vdcache.ir.capture import signature
from vdcache.ir.edit import inputs
from vdcache.ir.ops import SLICES, VIEWS, is_effectful, tensor_of
from vdcache.patterns.analysis import analyze
from vdcache.patterns.cost import bytes_of, flops

__all__ = ["CLASSES", "Dependence", "Shares", "dependence", "is_view", "shares"]

aten = torch.ops.aten
CLASSES = ("parameters", "prompt", "timestep", "both", "latent")
_SIZES = {aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int}
_OWN = frozenset({"aten", "prims", "prim", "_operator"})


@dataclass(frozen=True)
class Dependence:
    """Of every node of a graph, the inputs that its value is computed from.

    Args:
        masks: by node, a bit for each input by position; parameters and sizes have none.
        timesteps, prompts: the bits of these inputs. Every other bit is a latent's, or says that a value may not be moved.
    """

    masks: Mapping[fx.Node, int]
    timesteps: int
    prompts: int

    def kind(self, node: fx.Node) -> str:
        """One of `CLASSES`."""
        mask = self.masks[node]
        if mask & ~(self.timesteps | self.prompts):
            return "latent"
        if mask & self.timesteps:
            return "both" if mask & self.prompts else "timestep"
        return "prompt" if mask else "parameters"


def dependence(graph: fx.GraphModule) -> Dependence:
    """What every node of a canonical or guarded graph depends on.

    A value that is random, written into, communicated, handed over by an operation of another library, or that a step may replace (a
    cache guard) counts with the latents, and so does everything that is computed from it.
    """
    found, sig = analyze(graph), signature(graph)
    given = inputs(graph.graph)
    written = {at for _, at in sig.mutations}
    stays = 1 << len(given)
    bits: dict[fx.Node, int] = {}
    timesteps = prompts = 0
    sizes = {
        str(size)
        for i, node in enumerate(given)
        if i not in sig.static and node.name not in found.timestep_inputs and (value := tensor_of(node)) is not None
        for size in value.shape
        if isinstance(size, torch.SymInt)
    }
    for i, node in enumerate(given):
        value = node.meta.get("val")
        if i in written:  # the model's state
            bits[node] = stays
        elif i in sig.static or (isinstance(value, torch.SymInt) and str(value) in sizes):
            bits[node] = 0
        elif node.meta.get("vdcache"):  # an input that a pass has added
            bits[node] = stays
        else:
            bits[node] = 1 << i
            if node.name in found.timestep_inputs:
                timesteps |= 1 << i
            elif node.name not in found.latents:
                prompts |= 1 << i
    broken = any("autocast" in str(n.target) for n in graph.graph.nodes if n.op == "call_function")
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            continue
        mask = 0
        for parent in node.all_input_nodes:
            mask |= bits[parent]
        if node.op == "call_function":
            if node.target in _SIZES and isinstance(source := node.args[0], fx.Node) and source.op == "placeholder":
                mask = bits[source] & (timesteps | stays)
            elif broken or not _may_move(node):
                mask |= stays
        elif node.op not in ("get_attr", "output"):
            mask |= stays
        bits[node] = mask
    return Dependence(bits, timesteps, prompts)


def _may_move(node: fx.Node) -> bool:
    """Whether an operation gives the same for the same inputs, whenever it runs."""
    if node.target is dialect.invariant:
        return True
    if dialect.is_dialect(node) or is_effectful(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace in _OWN and torch.Tag.nondeterministic_seeded not in node.target.tags
    return getattr(node.target, "__module__", "") in ("_operator", "math", "torch")  # getitem, and arithmetic of sizes


def is_view(node: fx.Node) -> bool:
    """Whether a node gives elements of its first input without computing any."""
    if node.target in VIEWS or node.target is aten.expand.default:
        return True
    target = node.target
    if target in SLICES:
        return not (
            isinstance(target, torch._ops.OpOverload) and target.overloadpacket in (aten.index, aten.index_select, aten.gather)
        )
    return False


@dataclass(frozen=True)
class Shares:
    """How much of a graph is of which class, each by the names in `CLASSES`.

    Args:
        flops: of one call.
        weights: bytes of the parameters and buffers that are read for values of the class, and for none that depends on more.
        values: bytes of the values of the class, views left out.
    """

    flops: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.flops)

    def __add__(self, other: Shares) -> Shares:
        def total(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
            return {c: a.get(c, 0) + b.get(c, 0) for c in CLASSES}

        return Shares(total(self.flops, other.flops), total(self.weights, other.weights), total(self.values, other.values))

    def of(self, what: str) -> Iterator[tuple[str, float]]:
        """The share of each class, 0 to 1.

        Args:
            what: "flops", "weights" or "values".
        """
        amounts: Mapping[str, int] = getattr(self, what)
        total = sum(amounts.values())
        for name in CLASSES:
            yield name, amounts.get(name, 0) / total if total else 0.0


def shares(graph: fx.GraphModule) -> Shares:
    """How much of a canonical graph is of which class."""
    found = dependence(graph)
    static = {node for i, node in enumerate(inputs(graph.graph)) if i in signature(graph).static}
    spent, held = dict.fromkeys(CLASSES, 0), dict.fromkeys(CLASSES, 0)
    weights = dict.fromkeys(CLASSES, 0)
    rank: dict[fx.Node, int] = {}  # of what is made of parameters alone: of the last class that reads it
    for node in reversed(graph.graph.nodes):
        if node.op == "output":
            continue
        kind = found.kind(node)
        if node.op == "call_function":
            spent[kind] += flops(node)
            held[kind] += 0 if is_view(node) else bytes_of(node)
        if kind == "parameters" and node.users:
            readers = (u for u in node.users if u.op != "output")
            rank[node] = max((CLASSES.index(found.kind(u)) or rank.get(u, 0) for u in readers), default=0)
        if node in static and node.users:
            weights[CLASSES[rank.get(node, CLASSES.index(kind))]] += bytes_of(node)
    return Shares(spent, weights, held)
