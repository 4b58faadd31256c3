"""The anatomy of a graph: its branches with kind, stream, block and gate; its timestep, latent and grid."""

from __future__ import annotations

import torch
from torch import fx

from vdcache.ir.capture import signature
from vdcache.ir.ops import CASTS, is_work, tensor_of
from vdcache.patterns import conditioning
from vdcache.patterns.attention import attention_nodes, describe
from vdcache.patterns.facts import Anatomy, Attention, Branch, Grid
from vdcache.patterns.index import Index
from vdcache.patterns.residual import Join, find_joins, previous_join

__all__ = ["anatomy"]

aten = torch.ops.aten
_CACHE = "vdcache.anatomy"


def anatomy(graph: fx.GraphModule) -> Anatomy:
    """Everything the patterns find in a canonical graph.

    The answer names nodes and is kept in `graph.meta`: passes that only add dialect nodes leave it true.
    """
    if isinstance(known := graph.meta.get(_CACHE), Anatomy):
        return known
    index, sig = Index(graph.graph), signature(graph)
    joins, refusals = find_joins(index)
    clocks = conditioning.clocks(index, sig)
    starts = [j.source for j in joins]
    latent = conditioning.latent(index, sig, starts, clocks)
    grid = conditioning.grid(index, sig, latent)
    varying = index.mask_of(conditioning.activations(index, sig))
    branches = _branches(index, joins, varying, grid)
    graph.meta[_CACHE] = result = Anatomy(tuple(branches), clocks, latent, grid, tuple(refusals))
    return result


def _branches(index: Index, joins: list[Join], varying: int, grid: Grid | None) -> list[Branch]:
    by_node = {j.node: j for j in joins}
    stream_of: dict[fx.Node, int] = {}
    streams = 0
    last: dict[int, tuple[int, list[str]]] = {}  # stream -> its current block and the kinds seen in it
    found = []
    for join in joins:
        before = previous_join(join, by_node)
        if before is None or before not in stream_of:
            stream_of[join.node] = streams
            streams += 1
        else:
            stream_of[join.node] = stream_of[before]
        stream = stream_of[join.node]

        inside = set(join.inside)
        sites = [describe(index, n, join.source, inside, varying, grid) for n in attention_nodes(list(join.inside))]
        kind = _kind(join, sites)
        block, kinds = last.get(stream, (0, []))
        if _starts_a_block(kind, kinds):
            block, kinds = block + 1, []
        last[stream] = (block, [*kinds, kind])
        own = [s for s in sites if s.kind != "cross"]
        found.append(
            Branch(
                kind=kind,
                stream=stream,
                block=block,
                layout=own[0].layout if own else "",
                join=join.node.name,
                base=join.base.name,
                source=join.source.name,
                contribution=join.contribution.name if join.contribution is not None else None,
                pre_gate=_pre_gate(index, join),
                nodes=tuple(n.name for n in join.inside),
                attentions=tuple(sites),
                leaks=_leaks(join, inside),
                module=_module(join),
            )
        )
    return found


def _starts_a_block(kind: str, kinds: list[str]) -> bool:
    """A block ends with its MLP (or fused branch), or where the same kind of attention comes again."""
    if not kinds:
        return False
    return kinds[-1] in ("mlp", "fused") or (kind in ("self-attention", "joint-attention", "other") and kind in kinds)


def _kind(join: Join, sites: list[Attention]) -> str:
    if not sites:
        return "mlp" if _is_mlp(join) else "other"
    if _has_parallel_mlp(join, {s.node for s in sites}):
        return "fused"
    kinds = {s.kind for s in sites}
    if "joint" in kinds:
        return "joint-attention"
    return "self-attention" if "self" in kinds else "cross-attention"


def _is_mlp(join: Join) -> bool:
    """Two layers or more, one after the other, and nothing that mixes tokens (a convolution may)."""
    depth: dict[fx.Node, int] = {}
    for node in join.inside:
        above = max((depth.get(p, 0) for p in node.all_input_nodes), default=0)
        depth[node] = above + is_work(node)
    return depth[join.inside[-1]] >= 2


def _has_parallel_mlp(join: Join, sites: set[str]) -> bool:
    """Whether work that avoids every attention meets the attention's result by concatenation or sum.

    Where the two meet in a product instead, the work is a gate on the attention, not an MLP beside it.
    """
    attended: set[fx.Node] = set()
    beside: set[fx.Node] = set()
    for node in join.inside:
        parents = node.all_input_nodes
        if node.name in sites or any(p in attended for p in parents):
            attended.add(node)
            if node.name not in sites and any(p in beside for p in parents):
                return node.target in (aten.cat.default, aten.add.Tensor)
        elif is_work(node) or any(p in beside for p in parents):
            beside.add(node)
    return False


def _pre_gate(index: Index, join: Join) -> str | None:
    """The value that the branch's last product multiplies by something that does not come from the stream."""
    at = join.contribution
    while at is not None and at.target in CASTS:
        at = at.args[0] if isinstance(at.args[0], fx.Node) else None
    if at is None or at.target is not aten.mul.Tensor:
        return None
    inside = set(join.inside)
    values = [a for a in at.args if isinstance(a, fx.Node)]
    from_stream = [v for v in values if v in inside]
    if len(values) == 2 and len(from_stream) == 1 and tensor_of(from_stream[0]) is not None:
        return from_stream[0].name
    return None


def _leaks(join: Join, inside: set[fx.Node]) -> tuple[str, ...]:
    return tuple(
        n.name
        for n in join.inside
        if n is not join.contribution and any(u not in inside and u is not join.node for u in n.users)
    )


def _module(join: Join) -> str:
    """The innermost module that the branch's work shares, from what the tracer left; "" where it left nothing."""
    stacks = []
    for node in join.inside:
        if is_work(node) and (stack := node.meta.get("nn_module_stack")):
            stacks.append([str(path) for path, _ in stack.values()])
    if not stacks:
        return ""
    shared = stacks[0]
    for stack in stacks[1:]:
        shared = [a for a, b in zip(shared, stack, strict=False) if a == b]
    return shared[-1] if shared else ""
