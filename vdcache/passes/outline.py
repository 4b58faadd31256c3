"""outline: blocks that are equal up to weights become calls of one graph, which the inner compiler then compiles once.

    h = f(x, w0); y = f(h, w1)   -->   h = invoke_subgraph(f, x, w0); y = invoke_subgraph(f, h, w1)

Where blocks end the analysis says. Two of them are of one kind if they hold the same operations, wired alike, on values of the same
shapes, strides and dtypes, and if the same of their values are read outside. So a block whose attention has another mask, or in which
something is observed, is of another kind. Bit-exact.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from vdcache.ir.ops import VIEWS, communicates, is_effectful
from vdcache.ir.regions import LEAST, Region, call_regions, operation, region_of
from vdcache.passes.base import Pass, PassResult, Refusal
from vdcache.patterns.analysis import analyze, forget

__all__ = ["Outline"]


@dataclass(frozen=True)
class Outline(Pass):
    """Make repeated blocks calls of one graph."""

    name: ClassVar[str] = "outline"

    def run(self, graph: fx.GraphModule) -> PassResult:
        kinds: dict[Hashable, list[Region]] = {}
        refusals = []
        for inside in _same_beginnings(list(_blocks(graph))):
            region = region_of(inside)
            if (reason := _why_not(region)) is not None:
                refusals.append(Refusal(inside[-1].name, reason))
            elif len(inside) >= LEAST:
                kinds.setdefault(region.kind, []).append(region)
        repeated = [members for members in kinds.values() if len(members) > 1]
        if repeated:
            call_regions(graph, repeated, "block")
            forget(graph)
        return PassResult(graph, sum(map(len, repeated)), tuple(refusals))


def _blocks(graph: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """What stands between the last sum of a block and that of the next; before the first block, everything."""
    place = {n.name: i for i, n in enumerate(graph.graph.nodes)}
    sums: dict[int, list[int]] = {}
    for branch in analyze(graph).branches:
        sums.setdefault(branch.block, []).append(place[branch.residual_add])
    ends = set(map(max, sums.values()))
    inside: list[fx.Node] = []
    for i, node in enumerate(graph.graph.nodes):
        if node.op == "call_function":
            inside.append(node)
        if i in ends:
            yield inside
            inside = []


def _same_beginnings(blocks: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Blocks without what stands before them, as the embeddings before the first one: as much as makes them like another block."""
    words = [tuple(map(operation, inside)) for inside in blocks]
    whole, lengths = set(words), sorted(set(map(len, words)))

    def cut(own: Sequence[str]) -> int:
        return next((n for n in lengths if n < len(own) and tuple(own[-n:]) in whole), len(own))

    return [inside[-cut(own) :] for inside, own in zip(blocks, words, strict=True)]


def _why_not(region: Region) -> str | None:
    """Why a block has to stay where it is; None where it need not."""
    if (effect := next((n for n in region.inside if is_effectful(n) or communicates(n)), None)) is not None:
        return f"'{effect.name}' does more than compute its value"
    if not region.takes_values:
        return "an operation in it calls a graph"
    for result in region.results:
        source = result
        while source.target in VIEWS and isinstance(source.args[0], fx.Node):
            source = source.args[0]
        if source in region.given:
            return f"'{result.name}' is a view of what the block is given"
    return None
