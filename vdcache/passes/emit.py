"""emit: hand out what branches add, or another value, to whoever listens to the session.

    add(x, f(x))   -->   add(x, emit(f(x), name))

For measurements outside the graph: calibrations. An emission is an identity, so the pass is bit-exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import fx

from vdcache.ir import dialect
from vdcache.ir.facts import Fact
from vdcache.passes.base import Pass, PassResult, Refusal, copy_meta
from vdcache.passes.values import VALUES, find
from vdcache.patterns import KINDS, analyze
from vdcache.util.fields import one_of


@dataclass(frozen=True)
class Emit(Pass):
    """Emit the values of branches in the blocks that attend over video tokens, or one value of the model.

    Args:
        location: "branches", or "input", "output", "residual" (what all blocks add): `passes.values`.
        kinds: which branches, empty for all.
        gate: "pre" or "post", as `mark-branches` has it.

    Raises:
        ConfigError: an unknown place, kind or gate.
    """

    name: ClassVar[str] = "emit"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.CANONICAL})

    location: Annotated[str, one_of("branches", *VALUES)] = "branches"
    kinds: tuple[Annotated[str, one_of(*KINDS)], ...] = ()
    gate: Annotated[str, one_of("post", "pre")] = "pre"

    def run(self, graph: fx.GraphModule) -> PassResult:
        if self.location != "branches":
            value = find(graph, self.location, provenance=str(self))
            if isinstance(value, Refusal):
                return PassResult(graph, 0, (value,))
            self._mark(graph.graph, value, self.location)
            return PassResult(graph, 1)
        found = analyze(graph)
        nodes = {n.name: n for n in graph.graph.nodes}
        there = {b.index for b in found.denoising_blocks()}
        refusals, rewrites = [], 0
        for branch in found:
            if branch.block not in there or (self.kinds and branch.kind not in self.kinds):
                continue
            name = branch.pre_gate if self.gate == "pre" and branch.pre_gate else branch.contribution
            if name is None:
                refusals.append(Refusal(branch.residual_add, "gate and sum are one operation, so it has no value of its own"))
                continue
            self._mark(graph.graph, nodes[name], f"{branch.kind}/{branch.name}.{branch.residual_add}")
            rewrites += 1
        return PassResult(graph, rewrites, tuple(refusals))

    def _mark(self, g: fx.Graph, value: fx.Node, name: str) -> None:
        with g.inserting_before(g.output_node()):
            copy_meta(g.call_function(dialect.emit, (value, name)), str(self), value)
