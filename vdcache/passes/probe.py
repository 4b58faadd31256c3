"""probe: mark the value whose change decides, within a step, whether the step is computed.

    h = block_0(x); …   -->   h = block_0(x); probe(h − x, name, distance, reference_step); …

A probe is a side value, so the pass is bit-exact. The graph is split at it later (`split-at-probe`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import fx

from vdcache.ir import dialect
from vdcache.ir.facts import Fact
from vdcache.passes.base import Pass, PassResult, Refusal, copy_meta
from vdcache.passes.filters import FILTERS, filtered
from vdcache.passes.values import PLACES, find
from vdcache.util.fields import Group, at_least, one_of


@dataclass(frozen=True)
class Probe(Pass):
    """Probe one value.

    Args:
        location: "input", "residual" (of the first `blocks` denoising blocks), "modulated", "timestep" or "modulation":
        `passes.values`.
        blocks: how many blocks the residual is of.
        distance: how the change is measured (`dialect.DISTANCES`).
        reference_step: compare with the "step" before, or with the last step that was "computed".
        filter: what is applied to the value first: "wiener" for the filter of SeaCache, which needs the grid of tokens; empty
        for nothing.
        group: the group of slots that the probe decides on.

    Raises:
        ConfigError: an unknown place, distance, filter, or no block.
    """

    name: ClassVar[str] = "probe"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.CANONICAL})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.PROBED})

    location: Annotated[str, one_of(*(p for p in PLACES if p != "output"))] = "residual"
    blocks: Annotated[int, at_least(1)] = 1
    distance: Annotated[str, one_of(*dialect.DISTANCES)] = "l1"
    reference_step: Annotated[str, one_of(*dialect.REFERENCE_STEPS)] = "computed"
    filter: Annotated[str, one_of(*FILTERS, empty="no filter")] = ""
    group: Group = "all"

    def run(self, graph: fx.GraphModule) -> PassResult:
        value = find(graph, self.location, self.blocks, provenance=str(self))
        if isinstance(value, Refusal):
            return PassResult(graph, 0, (value,))
        if self.filter:
            value = filtered(graph, value, self.filter, provenance=str(self))
            if isinstance(value, Refusal):
                return PassResult(graph, 0, (value,))
        name = f"{self.group}/probe.{self.location}{self.blocks if self.location == 'residual' else ''}"
        anchor = value
        if value.op == "placeholder":
            anchor = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
        with graph.graph.inserting_after(anchor):
            mark = graph.graph.call_function(dialect.probe, (value, name, self.distance, self.reference_step))
        copy_meta(mark, str(self), value)
        return PassResult(graph, 1)
