"""observe: measure how much one branch, or another value, changes from one computed step to the next.

    add(x, f(x))   -->   add(x, f(x)); observe(f(x), slot, distance)

The observation is a side value: nothing of the model reads it. AdaCache measures one branch for the whole model (arXiv
2411.02397 section 4.2: schedules of single layers are unstable), by default the temporal attention, else the self-attention, of
the middle block of the largest stream. The value is rounded to the stream's dtype before it is compared and kept, so that it
takes the bytes of one stream tensor even where gates are computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import fx

from vdcache.errors import ConfigError
from vdcache.ir import dialect
from vdcache.ir.edit import call
from vdcache.ir.facts import Fact
from vdcache.passes.base import Pass, PassResult, Refusal, copy_meta
from vdcache.passes.values import VALUES, find
from vdcache.patterns import ATTENDS, KINDS, Branch, GraphAnalysis, analyze
from vdcache.util.fields import Group, ascending, at_least, between, one_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Observe(Pass):
    """Observe one branch, or the same kind of branch in several blocks.

    Args:
        kind: kind of the branch, "temporal-attention" or "spatial-attention"; empty for AdaCache's choice. Or "input",
            "output", "residual" (what all blocks together add), which are no branches: `passes.values`.
        blocks: which blocks among those that have such a branch, counted from 0; empty for the middle one.
        distance: one of `dialect.DISTANCES`.
        strides: frame distances of the motion score; empty for none. Needs a graph that shows its latent frames.
        frames: latent frames, 0 to read them off the graph.
        group: the group of slots that the observation is for: it is measured in the steps that compute the group.
        block_range: the share of the blocks, (from, to) between 0 and 1, whose middle one is observed where `blocks` is empty.

    Raises:
        ConfigError: the branch does not exist.
    """

    name: ClassVar[str] = "observe"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.CANONICAL})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.OBSERVED})

    kind: Annotated[str, one_of(*KINDS, "temporal-attention", "spatial-attention", *VALUES, empty="AdaCache's choice")] = ""
    blocks: tuple[int, ...] = ()
    distance: Annotated[str, one_of(*dialect.DISTANCES)] = "l1"
    strides: tuple[Annotated[int, at_least(1)], ...] = ()
    frames: Annotated[int, at_least(0)] = 0
    group: Group = "all"
    block_range: Annotated[tuple[Annotated[float, between(0, 1)], Annotated[float, between(0, 1)]], ascending] = (0.0, 1.0)

    def run(self, graph: fx.GraphModule) -> PassResult:
        found = analyze(graph)
        if not found.branches:
            return PassResult(graph, 0, (Refusal("output", "the graph has no residual branch to observe"),))
        if self.kind in VALUES:
            return self._place(graph)
        nodes = {n.name: n for n in graph.graph.nodes}
        rewrites, refusals = 0, []
        for branch in self._choose(found, nodes):
            frames = self._frames(found, branch, nodes)
            if self.strides and not frames:
                refusals.append(
                    Refusal(branch.residual_add, "the graph does not show its latent frames, so motion is not measured")
                )
            value = self._value(branch, nodes)
            strides = tuple(i for i in self.strides if i < frames)
            with graph.graph.inserting_before(value.next):
                if value.meta["val"].dtype != (dtype := nodes[branch.source].meta["val"].dtype):
                    value = call(graph.graph, aten._to_copy.default, value, dtype=dtype, provenance=str(self))
                name = f"{self.group}/observed.{branch.name}"
                observed = (value, name, self.distance, strides, frames if strides else 0)
                mark = graph.graph.call_function(dialect.observe, observed)
            copy_meta(mark, str(self), value)
            rewrites += 1
        return PassResult(graph, rewrites, tuple(refusals))

    def _place(self, graph: fx.GraphModule) -> PassResult:
        """Observe a value that is no branch."""
        value = find(graph, self.kind, provenance=str(self))
        if isinstance(value, Refusal):
            return PassResult(graph, 0, (value,))
        g = graph.graph
        with g.inserting_before(g.output_node()):
            mark = g.call_function(dialect.observe, (value, f"{self.group}/observed.{self.kind}", self.distance, (), 0))
        copy_meta(mark, str(self), value)
        return PassResult(graph, 1)

    def _choose(self, found: GraphAnalysis, nodes: dict[str, fx.Node]) -> list[Branch]:
        candidates = self._candidates(found, nodes)
        if not candidates:
            there = ", ".join(f"{n} {k}" for k, n in found.count().items())
            raise ConfigError(f"no {self.kind or 'attention'} branch to observe; the graph has {there}")
        if not self.blocks:
            low, high = (round(share * len(candidates)) for share in self.block_range)
            own = candidates[low:high] or candidates
            return [own[(len(own) - 1) // 2]]
        if wrong := [i for i in self.blocks if not 0 <= i < len(candidates)]:
            raise ConfigError(
                f"there is no block {wrong[0]} to observe: {len(candidates)} blocks (0 to {len(candidates) - 1}) have "
                f"a branch of kind {self.kind or candidates[0].kind!r}"
            )
        return [candidates[i] for i in self.blocks]

    def _candidates(self, found: GraphAnalysis, nodes: dict[str, fx.Node]) -> list[Branch]:
        """Branches of the kind in the stream with the most and the largest of them, in order."""
        if self.kind:
            layout, _, _ = self.kind.rpartition("-")
            if layout in ("temporal", "spatial"):
                chosen = [b for b in found if b.layout == layout and b.kind in ATTENDS]
            else:
                chosen = [b for b in found if b.kind == self.kind]
        else:
            chosen = [b for b in found if b.kind in ATTENDS and b.layout == "temporal"]
            chosen = chosen or [b for b in found if b.kind in ATTENDS] or list(found)
        weight: dict[int, float] = {}
        for b in chosen:
            weight[b.stream] = weight.get(b.stream, 0) + _size(nodes[b.residual_add].meta["val"])
        best = max(weight, key=lambda s: (weight[s], -s), default=-1)
        first: dict[int, Branch] = {}  # of each block
        for b in chosen:
            if b.stream == best:
                first.setdefault(b.block, b)
        return list(first.values())

    def _value(self, branch: Branch, nodes: dict[str, fx.Node]) -> fx.Node:
        """The contribution (the sum itself where gate and sum are one operation)."""
        return nodes[branch.contribution or branch.residual_add]

    def _frames(self, found: GraphAnalysis, branch: Branch, nodes: dict[str, fx.Node]) -> int:
        """Frames along the branch's value [B, frames * S, C] or, for temporal attention, [B * S, frames, C]; 0 if unknown."""
        tokens = self._value(branch, nodes).meta["val"].shape[1] if self._value(branch, nodes).meta["val"].ndim == 3 else 0
        if not isinstance(tokens, int):
            return 0
        if self.frames:
            return self.frames if tokens % self.frames == 0 else 0
        if found.grid is None or found.grid.frames < 2:
            return 0
        return found.grid.frames if tokens in (found.grid.tokens, found.grid.frames) else 0


def _size(value: torch.Tensor) -> float:
    size = 1.0
    for s in value.shape:
        size *= s if isinstance(s, int) else 1024  # a symbol stands for many
    return size
