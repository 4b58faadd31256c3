"""The analysis of a graph: its streams, blocks and branches, its attentions, its conditioning, and what each costs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from vdcache.ir.capture import last_line, readable, signature
from vdcache.ir.dialect import cache_guard, invariant, is_dialect
from vdcache.ir.ops import CASTS, is_work, tensor_of
from vdcache.patterns import blocks, conditioning, cost
from vdcache.patterns.attention import AttentionMatch, attention_matches, describe
from vdcache.patterns.facts import Attention, Block, Branch, GraphAnalysis, Grid
from vdcache.patterns.index import Index
from vdcache.patterns.residual import ResidualAdd, asked, find_residual_adds
from vdcache.patterns.streams import Streams

__all__ = ["analyze", "forget", "structure"]

aten = torch.ops.aten


_CACHE = "vdcache.analysis"


def forget(graph: fx.GraphModule) -> None:
    """Read the graph anew next time: a pass has changed what it is made of."""
    graph.meta.pop(_CACHE, None)


def structure(graph: fx.GraphModule) -> set[tuple[Any, ...]]:
    """What an analysis is read from: every node but the dialect's, with its operation and its inputs, cache guards left out.

    An analysis stays true as long as everything that was in this set is still in it.
    """
    computed = (n for n in graph.graph.nodes if n.op != "output" and not is_dialect(n))
    return {(n, n.target, *map(_without_cache_guard, n.all_input_nodes)) for n in computed}


def _without_cache_guard(node: fx.Node) -> Any:
    while node.target in (cache_guard, invariant):
        node = node.args[0]  # type: ignore[assignment]
    return node


def analyze(graph: fx.GraphModule) -> GraphAnalysis:
    """Everything the patterns find in a canonical graph.

    The answer names nodes and is kept in `graph.meta`. A pipeline drops it after a pass that changed what it was read from.
    """
    if isinstance(known := graph.meta.get(_CACHE), GraphAnalysis):
        return known
    sig = signature(graph)
    given = conditioning.activations(graph.graph, sig)
    timestep_inputs = conditioning.timestep_inputs(given)
    index = Index(graph.graph, given, asked(graph.graph))
    residual_adds, refusals = find_residual_adds(index, index.mask_of(timestep_inputs))
    latents = conditioning.latents(index, sig, [j.source for j in residual_adds], timestep_inputs)
    streams = Streams(index, residual_adds, index.mask_of(latents), index.mask_of(timestep_inputs))
    grid = conditioning.grid(index, latents[0] if latents else "", _latent_tokens(streams))
    shapes = [blocks.shape_of(j) for j in residual_adds]
    held = cost.owners(graph.graph, _regions(residual_adds), _kept(residual_adds))
    found = _branches(index, residual_adds, shapes, held, streams, grid)
    inside = {n for j in residual_adds for n in j.inside}
    loose = [s for s in attention_matches(index.nodes) if s.node not in inside]
    apart = tuple(describe(index, s, s.query, set(), streams, grid) for s in loose)
    result = GraphAnalysis(
        branches=tuple(found),
        timestep_inputs=timestep_inputs,
        latent=latents[0] if latents else "",
        grid=grid,
        refusals=tuple(refusals),
        streams=streams.facts(),
        blocks=_blocks(found, shapes),
        attentions=(*dict.fromkeys(a for b in found for a in b.attentions), *apart),
        conditioning=conditioning.dependence(index, latents, timestep_inputs, inside | {j.node for j in residual_adds}),
        latents=latents,
        flops=sum(map(cost.flops, index.nodes)),
        covered=sum(map(cost.flops, held)),
    )
    graph.meta[_CACHE] = result
    return result


def _regions(residual_adds: Sequence[ResidualAdd]) -> list[tuple[fx.Node, ...]]:
    """What reusing a branch leaves out: its nodes, and the sum itself where gate and sum are one operation."""
    return [(*j.inside, j.node) if j.contribution is None else j.inside for j in residual_adds]


def _kept(residual_adds: Sequence[ResidualAdd]) -> list[fx.Node]:
    """What reusing still reads, though the sum that reads it now is left out."""
    return [j.base for j in residual_adds if j.contribution is None]


def _tokens(residual_add: ResidualAdd) -> int | None:
    """Tokens of the stream [B, N, C] at a residual add."""
    value = tensor_of(residual_add.node)
    size = value.shape[1] if value is not None and value.ndim == 3 else None
    return size if isinstance(size, int) else None


def _latent_tokens(streams: Streams) -> int | None:
    """Tokens of the first latent stream, None where there is none or its length is a symbol."""
    for stream in streams.facts():
        if stream.role == "latent" and len(stream.shape) == 3:
            return stream.shape[1]
        if stream.role == "joint":
            return next((s.stop - s.start for s in stream.spans if s.role == "latent"), None)
    return None


def _own_attentions(residual_adds: Sequence[ResidualAdd]) -> list[list[AttentionMatch]]:
    """The attentions of every residual add."""
    found = [attention_matches(j.inside, _tokens(j)) for j in residual_adds]
    shared = Counter(s.node for own in found for s in own)
    # an attention that another branch added already only feeds this one, where it has one of its own
    return [[s for s in own if shared[s.node] == 1] or own for own in found]


def _shared_costs(owners: dict[fx.Node, tuple[int, ...]], count: int) -> list[int]:
    """FLOPs of so many branches; a node that several of them need counts for each in equal parts."""
    costs = [0] * count
    for node, members in owners.items():
        if spent := cost.flops(node):
            for i in members:
                costs[i] += spent // len(members)
    return costs


def _branches(
    index: Index,
    residual_adds: Sequence[ResidualAdd],
    shapes: Sequence[str],
    owners: dict[fx.Node, tuple[int, ...]],
    streams: Streams,
    grid: Grid | None,
) -> list[Branch]:
    held = _own_attentions(residual_adds)
    attentions = [
        [describe(index, s, j.source, set(j.inside), streams, grid) for s in own]
        for j, own in zip(residual_adds, held, strict=True)
    ]
    kinds = [_kind(j, own, described) for j, own, described in zip(residual_adds, held, attentions, strict=True)]
    numbers = blocks.segment(
        shapes, kinds, [streams.of[j.node] for j in residual_adds], [frozenset(s.node.name for s in own) for own in held]
    )
    costs = _shared_costs(owners, len(residual_adds))
    found = []
    for i, residual_add in enumerate(residual_adds):
        own = [a for a in attentions[i] if a.kind != "cross"]
        kept = residual_add.contribution if residual_add.contribution is not None else residual_add.node
        found.append(
            Branch(
                kind=kinds[i],
                stream=streams.of[residual_add.node],
                block=numbers[i],
                layout=own[0].layout if own else "",
                residual_add=residual_add.node.name,
                base=residual_add.base.name,
                source=residual_add.source.name,
                contribution=residual_add.contribution.name if residual_add.contribution is not None else None,
                pre_gate=_pre_gate(residual_add),
                nodes=tuple(n.name for n in residual_add.inside),
                attentions=tuple(attentions[i]),
                leaks=_leaks(residual_add, set(residual_add.inside)),
                flops=costs[i],
                bytes=cost.bytes_of(kept),
                module=_module(residual_add),
                line=_line(residual_add),
            )
        )
    return found


def _blocks(branches: Sequence[Branch], digests: Sequence[str]) -> tuple[Block, ...]:
    members: dict[int, list[int]] = {}
    for i, branch in enumerate(branches):
        members.setdefault(branch.block, []).append(i)
    shapes: dict[tuple[object, ...], int] = {}
    found = []
    for number, own in members.items():
        key = tuple((digests[i], branches[i].stream) for i in own)
        found.append(Block(number, shapes.setdefault(key, len(shapes)), tuple(branches[i].name for i in own)))
    return tuple(found)


def _kind(residual_add: ResidualAdd, own: Sequence[AttentionMatch], attentions: Sequence[Attention]) -> str:
    if not own:
        return "mlp" if _is_mlp(residual_add) else "other"
    if _has_parallel_mlp(residual_add, {s.node.name for s in own}) or _goes_on_as_mlp(residual_add, {s.node for s in own}):
        return "fused"
    kinds = {a.kind for a in attentions}
    if "joint" in kinds:
        return "joint-attention"
    return "self-attention" if "self" in kinds else "cross-attention"


def _is_mlp(residual_add: ResidualAdd) -> bool:
    """Two layers or more, one after the other, and nothing but convolutions that mixes tokens."""
    if any(_mixes_tokens(n) for n in residual_add.inside):
        return False
    depth: dict[fx.Node, int] = {}
    for node in residual_add.inside:
        above = max((depth.get(p, 0) for p in node.all_input_nodes), default=0)
        depth[node] = above + is_work(node)
    return depth[residual_add.inside[-1]] + is_work(residual_add.node) >= 2


_SCANS = {aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default, aten.flip.default, aten.roll.default}
_POOLS = {
    getattr(packet, overload)
    for packet in (
        aten.adaptive_avg_pool1d,
        aten.adaptive_avg_pool2d,
        aten.adaptive_avg_pool3d,
        aten.avg_pool2d,
        aten.avg_pool3d,
    )
    for overload in packet.overloads()
}


def _mixes_tokens(node: fx.Node) -> bool:
    """A scan, a pool, a mean over tokens, or a stack of steps that were computed one after the other."""
    if node.target in _SCANS:
        axis, value = node.args[1] if len(node.args) > 1 else -1, tensor_of(node)
        return value is not None and value.ndim >= 3 and isinstance(axis, (int, list)) and axis not in (-1, value.ndim - 1)
    if node.target in _POOLS:
        return True
    if node.target is aten.mean.dim:
        value = tensor_of(node.args[0])
        axes: Any = node.args[1]
        return value is not None and value.ndim == 4 and {a % 4 for a in axes} == {2, 3}
    if node.target is aten.stack.default:  # the loop of a recurrence: each piece needs the one before
        pieces: Any = node.args[0]
        return len(pieces) > 3 and all(b in _near_users(a) for a, b in itertools.pairwise(pieces))
    return False


def _near_users(node: fx.Node) -> set[fx.Node]:
    near: set[fx.Node] = set()
    edge = {node}
    for _ in range(3):
        edge = {u for n in edge for u in n.users}
        near |= edge
    return near


def _has_parallel_mlp(residual_add: ResidualAdd, attention_matches: set[str]) -> bool:
    """Whether work that avoids every attention meets the attention's result by concatenation or sum.

    Where the two meet in a product instead, the work is a gate on the attention, not an MLP beside it.
    """
    attended: set[fx.Node] = set()
    beside: set[fx.Node] = set()
    for node in residual_add.inside:
        parents = node.all_input_nodes
        if node.name in attention_matches or any(p in attended for p in parents):
            attended.add(node)
            if node.name not in attention_matches and any(p in beside for p in parents):
                return node.target in (aten.cat.default, aten.add.Tensor)
        elif is_work(node) or any(p in beside for p in parents):
            beside.add(node)
    return False


def _goes_on_as_mlp(residual_add: ResidualAdd, own: set[fx.Node]) -> bool:
    """Whether the attention's result goes through an MLP before it is added: three layers or more, its own projection the first."""
    depth: dict[fx.Node, int] = {}
    for node in residual_add.inside:
        if node in own:
            depth[node] = 0
        elif above := [depth[p] for p in node.all_input_nodes if p in depth]:
            depth[node] = max(above) + is_work(node)
    return max(depth.values(), default=0) >= 3


def _pre_gate(residual_add: ResidualAdd) -> str | None:
    """The value that the branch's last product multiplies by something that does not come from the stream."""
    at = residual_add.contribution
    while at is not None and at.target in CASTS:
        at = at.args[0] if isinstance(at.args[0], fx.Node) else None
    if at is None or at.target is not aten.mul.Tensor:
        return None
    inside = set(residual_add.inside)
    values = [a for a in at.args if isinstance(a, fx.Node)]
    from_stream = [v for v in values if v in inside]
    if len(values) == 2 and len(from_stream) == 1 and tensor_of(from_stream[0]) is not None:
        return from_stream[0].name
    return None


def _leaks(residual_add: ResidualAdd, inside: set[fx.Node]) -> tuple[str, ...]:
    return tuple(
        n.name
        for n in residual_add.inside
        if n is not residual_add.contribution and any(u not in inside and u is not residual_add.node for u in n.users)
    )


def _module(residual_add: ResidualAdd) -> str:
    """The innermost module that the branch's work shares, from what the tracer left; "" where it left nothing."""
    stacks = []
    for node in residual_add.inside:
        if is_work(node) and (stack := node.meta.get("nn_module_stack")):
            stacks.append([str(path) for path, _ in stack.values()])
    if not stacks:
        return ""
    shared = stacks[0]
    for stack in stacks[1:]:
        shared = [a for a, b in zip(shared, stack, strict=False) if a == b]
    return readable(shared[-1]) if shared else ""


def _line(residual_add: ResidualAdd) -> str:
    """`file:line` of the user's code that did the branch's last real work; "" where the tracer left nothing."""
    for node in reversed(residual_add.inside):
        if is_work(node) and isinstance(stack := node.meta.get("stack_trace"), str):
            return last_line(stack)
    return ""
