"""outline: blocks that are equal up to weights become calls of one graph, which the inner compiler then compiles once.

    h = f(x, w0); y = f(h, w1)   -->   h = invoke_subgraph(f, x, w0); y = invoke_subgraph(f, h, w1)

Where blocks end the analysis says. Two of them are of one kind if they hold the same operations, wired alike, on values of the same
shapes, strides and dtypes, and if the same of their values are read outside. So a block whose attention has another mask, or in which
something is observed, is of another kind. Bit-exact.

A call costs host time, so a block that takes hardly longer than a call stays where it is, if the caller says what a call costs.
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
from vdcache.patterns.cost import least_seconds

__all__ = ["CALL", "SHARE", "Outline"]

CALL = 30e-6  # seconds of host time that a call takes under Inductor, 32 inputs; measured on a CPU
SHARE = 0.03  # of a block's time that a call may take on a CPU
HIDES = 4.0  # calls: an accelerator that is at work for so long hides one, and the launches of the block's kernels


@dataclass(frozen=True)
class Outline(Pass):
    """Make repeated blocks calls of one graph.

    Args:
        call: seconds that a call takes; 0 to make calls of the smallest blocks too.
    """

    call: float = 0.0
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
        repeated = []
        for members in (m for m in kinds.values() if len(m) > 1):
            seconds, device = least_seconds(members[0].inside, (*members[0].given, *members[0].results))
            if seconds >= self.call * (1 / SHARE if device == "cpu" else HIDES):
                repeated.append(members)
            else:
                why = f"a block takes {1e6 * seconds:.2g} µs on a fast device, and a call {1e6 * self.call:.2g} µs"
                refusals.append(Refusal(members[0].inside[-1].name, why))
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
