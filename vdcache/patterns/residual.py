"""Residual branches by dataflow: `join = base + contribution`, where the contribution is computed from the base.

Nothing here knows how a gate, a cast, a norm or a projection is spelled. A join is an addition one of whose operands
is an ancestor of the other (seen through casts, views and earlier joins) with real work in between; everything on
the paths between them is the branch. Values from elsewhere may enter it: timestep modulation, text, rotary tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from vdcache.ir.ops import CASTS, NORMS, VIEWS, is_effectful, is_work, tensor_of
from vdcache.patterns.facts import NoMatch
from vdcache.patterns.index import Index

__all__ = ["Join", "find_joins", "previous_join"]

aten = torch.ops.aten
_SCALES = (aten.mul.Tensor, aten.div.Tensor)


@dataclass(frozen=True)
class Join:
    """A residual addition, while the graph does not change: the nodes behind a `Branch`."""

    node: fx.Node
    base: fx.Node
    source: fx.Node
    contribution: fx.Node | None
    inside: tuple[fx.Node, ...]


def find_joins(index: Index) -> tuple[list[Join], list[NoMatch]]:
    """All residual joins of a graph in order, and every candidate that is none, with the reason."""
    joins: dict[fx.Node, Join] = {}
    refusals: list[NoMatch] = []
    for node in index.nodes:
        for base, others, separable in _operands(node):
            found = _match(index, joins, node, base, others, separable)
            if isinstance(found, Join):
                joins[node] = found
                break
            if found is not None:
                refusals.append(found)
    return _outermost(joins, refusals), refusals


def _operands(node: fx.Node) -> list[tuple[fx.Node, list[fx.Node], bool]]:
    """(base, what is added, whether what is added is one value) for each way to read `node` as a residual addition."""
    if node.op != "call_function":
        return []
    args = [a for a in node.args if isinstance(a, fx.Node)]
    if node.target is aten.add.Tensor and len(args) == 2:
        a, b = args
        if node.kwargs.get("alpha", 1) == 1:
            return [(a, [b], True), (b, [a], True)]
        return [(a, [b], False)]
    if node.target is aten.sub.Tensor and len(args) == 2:
        return [(args[0], [args[1]], False)]
    if node.target is aten.addcmul.default and len(args) == 3:
        return [(args[0], args[1:], False)]
    if node.target in (aten.lerp.Tensor, aten.lerp.Scalar):
        return [(args[0], args[1:], False)]
    return []


def _match(
    index: Index, joins: dict[fx.Node, Join], node: fx.Node, base: fx.Node, others: list[fx.Node], separable: bool
) -> Join | NoMatch | None:
    """The join at `node`, or why not, or None where nothing even looks like one."""
    x, y = tensor_of(base), tensor_of(node)
    if x is None or y is None or x.ndim == 0 or not y.is_floating_point():
        return None
    other = max(others, key=index.position.__getitem__)
    if (source := _source(index, joins, base, other)) is None:
        return None
    if x.ndim != y.ndim or any(str(s) != str(t) for s, t in zip(x.shape, y.shape, strict=True)):
        return NoMatch(node.name, f"'{base.name}' is broadcast to the shape of the sum, so it is no stream")
    inside = index.between(source, other)
    if not any(is_work(n) for n in inside):
        return NoMatch(node.name, f"no matrix product, convolution or attention between '{source.name}' and '{other.name}'")
    if effect := next((n for n in inside if is_effectful(n)), None):
        return NoMatch(
            node.name, f"'{effect.name}' ({effect.target}) has an effect besides its value and must never be skipped"
        )
    return Join(node, base, source, other if separable else None, tuple(inside))


def _source(index: Index, joins: dict[fx.Node, Join], base: fx.Node, other: fx.Node) -> fx.Node | None:
    """The value behind `base` from which `other` is computed: through casts, views, scalings and earlier joins."""
    at = base
    while True:
        if index.depends(other, at):
            return at if at.op != "get_attr" else None
        if at in joins:
            at = joins[at].base
        elif at.target in CASTS or at.target in VIEWS or (at.target in _SCALES and _other_is_number(at)):
            if not isinstance(at.args[0], fx.Node):
                return None
            at = at.args[0]
        else:
            return None


def _other_is_number(node: fx.Node) -> bool:
    return not isinstance(node.args[1], fx.Node)


def _outermost(joins: dict[fx.Node, Join], refusals: list[NoMatch]) -> list[Join]:
    """Branches that nest: a join alone inside a branch belongs to it; a branch around several is a container."""
    order = list(joins.values())
    dropped: set[fx.Node] = set()
    for join in order:  # first to last: what is judged is judged by joins that have been accepted
        members = set(join.inside)
        nested = [joins[n] for n in join.inside if n in joins and n not in dropped]
        foreign = next((j for j in nested if j.source is not join.source and j.source not in members), None)
        if foreign is not None:
            # what is added enters another stream further up: a modulation of every token that several blocks share
            dropped.add(join.node)
            reason = f"'{join.source.name}' is no stream: it is only read by the one that goes through '{foreign.node.name}'"
            refusals.append(NoMatch(join.node.name, reason))
    for join in reversed(order):
        if join.node in dropped:
            continue
        nested = [joins[n] for n in join.inside if n in joins and n not in dropped]
        if len(nested) == 1:
            dropped.add(nested[0].node)
            refusals.append(NoMatch(nested[0].node.name, f"lies inside the branch that ends at '{join.node.name}'"))
        elif len(nested) > 1:
            dropped.add(join.node)
            refusals.append(NoMatch(join.node.name, f"contains {len(nested)} branches, which are taken one by one"))
    return [j for j in order if j.node not in dropped]


def previous_join(join: Join, joins: dict[fx.Node, Join]) -> fx.Node | None:
    """The join whose sum `join` adds to, seen through whatever leaves a stream one stream: casts, views, norms, scalings."""
    at: object = join.base
    while isinstance(at, fx.Node):
        if at in joins:
            return at
        if (
            at.target in CASTS
            or at.target in VIEWS
            or at.target in NORMS
            or at.target in _SCALES
            or at.target is aten.add.Tensor
        ):
            at = at.args[0] if at.args else None
        else:
            return None
    return None
