"""Values of a model that passes measure or guard, by what they are: its input, its output, what its blocks add, what they read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from vdcache.ir import dialect
from vdcache.ir.capture import signature
from vdcache.ir.edit import call, inputs, outputs
from vdcache.ir.ops import SLICES, VIEWS, is_work, tensor_of
from vdcache.patterns import Block, Branch, GraphAnalysis, Refusal, analyze

__all__ = ["PLACES", "VALUES", "find", "output"]

aten = torch.ops.aten
VALUES = ("input", "output", "residual")  # that show how far a step came
PLACES = (*VALUES, "modulated", "timestep", "modulation")
_SEEN = ("latent", "joint")  # streams that hold the tokens to be denoised


def find(graph: fx.GraphModule, at: str, blocks: int = 0, *, provenance: str) -> fx.Node | Refusal:
    """The node of a value; subtractions and slices that it takes are added to the graph.

    Args:
        at: "input", the latent (the leading channels where the model returns fewer of them); "output", what the model returns
            for it; "residual", what the first `blocks` denoising blocks add to the latent tokens (0: all of them); "modulated",
            what the first layers of the first denoising block read: normalised and, where the model does so, modulated by the
            timestep; "timestep", the embedding of the timestep; "modulation", what that is projected to.
    """
    found = analyze(graph)
    nodes = {n.name: n for n in graph.graph.nodes}
    if at == "input":
        return _input(graph, found, nodes, provenance)
    if at == "output":
        place = output(graph, found, nodes)
        return place if isinstance(place, Refusal) else place[0]
    if at in ("timestep", "modulation"):
        return _timestep(found, nodes, 1 if at == "timestep" else 2)
    there = found.denoising_blocks()
    if not there:
        return Refusal("output", "no block attends over video tokens")
    if at == "modulated":
        return _modulated(graph.graph, found, there[0], nodes, provenance)
    if blocks > len(there):
        return Refusal("output", f"there are {len(there)} denoising blocks, and {blocks} were asked for")
    return _residual(graph.graph, found, there[: blocks or None], nodes, provenance)


def output(graph: fx.GraphModule, found: GraphAnalysis, nodes: dict[str, fx.Node]) -> tuple[fx.Node, int] | Refusal:
    """What the model returns for the latent, and its position among the graph's outputs."""
    results = outputs(graph.graph)
    latent = tensor_of(nodes[found.latent]) if found.latent else None
    skip = len(signature(graph).mutations)
    tensors = [(n, i) for i, n in enumerate(results) if i >= skip and tensor_of(n) is not None]
    if not tensors:
        return Refusal("output", "the graph returns no tensor")
    if latent is None:
        return Refusal("output", "no input was found that the model returns an update of")
    for node, i in tensors:
        if _sizes(tensor_of(node)) == _sizes(latent):
            return node, i
    like = [(n, i) for n, i in tensors if tensor_of(n).ndim == latent.ndim]  # type: ignore[union-attr]
    return like[0] if like else tensors[0]


def _input(graph: fx.GraphModule, found: GraphAnalysis, nodes: dict[str, fx.Node], provenance: str) -> fx.Node | Refusal:
    if not found.latent:
        return Refusal("output", "no input was found that the model returns an update of")
    latent = nodes[found.latent]
    place = output(graph, found, nodes)
    if isinstance(place, Refusal):
        return latent
    have, want = _sizes(tensor_of(latent)), _sizes(tensor_of(place[0]))
    few = [i for i, (a, b) in enumerate(zip(have, want, strict=False)) if a != b]
    if len(have) == len(want) and len(few) == 1 and _less(want[few[0]], have[few[0]]):
        last = inputs(graph.graph)[-1]
        with graph.graph.inserting_after(last):  # conditions that were joined to the latent never change
            return call(graph.graph, aten.slice.Tensor, latent, few[0], 0, want[few[0]], provenance=provenance)
    return latent


def _residual(
    g: fx.Graph, found: GraphAnalysis, blocks: Sequence[Block], nodes: dict[str, fx.Node], provenance: str
) -> fx.Node | Refusal:
    """The latent tokens after these blocks, less those before."""
    numbers = {b.index for b in blocks}
    own = [b for b in found if b.block in numbers and found.streams[b.stream].role in _SEEN]
    if not own:
        return Refusal("output", "no stream of latent tokens runs through the blocks")
    end = nodes[own[-1].residual_add]
    with g.inserting_before(dialect.with_cache_guard(end).next):
        after = _latent_part(g, found, own[-1], end, provenance)
        before = _latent_part(g, found, own[0], nodes[own[0].base], provenance)
        now, then = _sizes(tensor_of(after)), _sizes(tensor_of(before))
        if now != then:
            return Refusal(own[-1].residual_add, f"the latent tokens are {now} here and were {then}")
        return call(g, aten.sub.Tensor, after, before, provenance=provenance)


def _latent_part(g: fx.Graph, found: GraphAnalysis, branch: Branch, value: fx.Node, provenance: str) -> fx.Node:
    stream = found.streams[branch.stream]
    span = next((s for s in stream.spans if s.role == "latent"), None)
    if stream.role != "joint" or span is None:
        return value
    return call(g, aten.slice.Tensor, value, 1, span.start, span.stop, provenance=provenance)


def _modulated(
    g: fx.Graph, found: GraphAnalysis, block: Block, nodes: dict[str, fx.Node], provenance: str
) -> fx.Node | Refusal:
    for branch in found:
        attends = any(a.kind != "cross" for a in branch.attentions)
        if branch.block != block.index or not attends or found.streams[branch.stream].role not in _SEEN:
            continue
        inside = {*branch.nodes, branch.source}
        for name in branch.nodes:
            if is_work(nodes[name]):
                read = next((p for p in nodes[name].all_input_nodes if p.name in inside), None)
                while read is not None and (read.target in VIEWS or read.target in SLICES):
                    read = read.args[0] if isinstance(read.args[0], fx.Node) else None
                if read is not None:
                    return _without_text(g, found, branch, read, provenance)
    return Refusal(block.branches[0], "the first denoising block has no attention whose input could be read")


def _timestep(found: GraphAnalysis, nodes: dict[str, fx.Node], number: int) -> fx.Node | Refusal:
    """The layer of that number on the way from the timestep. The embedding of nearly every model ends with the second one;
    where modulation is made for all blocks together, the third makes it.
    """
    layers = [nodes[n] for n in found.conditioning.timestep if is_work(nodes[n])]
    if not layers:
        return Refusal("output", "no layer depends on the timestep alone")
    return layers[min(number, len(layers) - 1)]


def _sizes(value: torch.Tensor | None) -> tuple[object, ...]:
    return () if value is None else tuple(s if isinstance(s, int) else str(s) for s in value.shape)


def _less(a: object, b: object) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a < b


def _without_text(g: fx.Graph, found: GraphAnalysis, branch: Branch, value: fx.Node, provenance: str) -> fx.Node:
    """The latent tokens of `value`, where it holds a sequence of text and latent tokens."""
    stream, tensor = found.streams[branch.stream], tensor_of(value)
    if value.target is aten.cat.default and len(stream.shape) == 3:  # two streams meet for their attention
        parts: list[fx.Node] = list(value.args[0])  # type: ignore[arg-type]
        own = [p for p in parts if (v := tensor_of(p)) is not None and v.ndim == 3 and v.shape[1] == stream.shape[1]]
        return own[0] if len(own) == 1 else value
    span = next((s for s in stream.spans if s.role == "latent"), None)
    if span is None or stream.role != "joint" or tensor is None or tensor.ndim != 3:
        return value
    if tensor.shape[1] != max(s.stop for s in stream.spans):
        return value
    with g.inserting_after(value):
        return call(g, aten.slice.Tensor, value, 1, span.start, span.stop, provenance=provenance)
