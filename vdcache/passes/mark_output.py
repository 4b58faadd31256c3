"""mark-output: put a cache guard on what the model returns, or on what its last block hands over.

    return y   -->   return cache_guard(y, slot, x)

The scope of methods that skip the whole model: a reused step is one addition. With the latent as the base, what is kept is the
difference of output and input (EasyCache, arXiv 2507.02860). At the last block it is the hidden states themselves, from which a reused
step computes the model's end alone (Spectrum, arXiv 2603.01623). Bit-exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import fx

from vdcache.ir.edit import set_output
from vdcache.ir.facts import Fact
from vdcache.ir.ops import same_type
from vdcache.passes.base import Pass, PassResult, Refusal, put_cache_guard
from vdcache.passes.values import find, output
from vdcache.patterns import GraphAnalysis, analyze
from vdcache.util.fields import Group, one_of


@dataclass(frozen=True)
class MarkOutput(Pass):
    """Guard the output that belongs to the latent.

    Args:
        base: "input" keeps output − latent; "zero" the output itself, as is also done, with a refusal, where the two are not
            of one shape and type. Hidden states have no base.
        group: the group that the slot belongs to.
        location: "output", or "hidden" for the stream of latent tokens behind the last block.

    Raises:
        ConfigError: another base or location.
    """

    name: ClassVar[str] = "mark-output"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.CANONICAL})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.GUARDED})

    base: Annotated[str, one_of("input", "zero")] = "input"
    group: Group = "all"
    location: Annotated[str, one_of("output", "hidden")] = "output"

    def run(self, graph: fx.GraphModule) -> PassResult:
        g = graph.graph
        found = analyze(graph)
        if self.location == "hidden":
            return self._hidden(graph, found)
        place = output(graph, found, {n.name: n for n in g.nodes})
        if isinstance(place, Refusal):
            return PassResult(graph, 0, (place,))
        value, position = place
        if not found.branches:
            return PassResult(graph, 0, (Refusal(value.name, "no residual stream leads to it"),))
        refusals = []
        base = None
        if self.base == "input":
            latent = find(graph, "input", provenance=str(self))
            if isinstance(latent, Refusal):
                refusals.append(latent)
            elif not same_type(latent, value):
                a, b = latent.meta["val"], value.meta["val"]
                reason = f"the output is {tuple(b.shape)} {b.dtype}, the latent {tuple(a.shape)} {a.dtype}: the output itself is kept"
                refusals.append(Refusal(value.name, reason))
            else:
                base = latent
        set_output(g, position, put_cache_guard(value, f"{self.group}/output", self, base, users=()))
        return PassResult(graph, 1, tuple(refusals))

    def _hidden(self, graph: fx.GraphModule, found: GraphAnalysis) -> PassResult:
        """Guard the stream of latent tokens behind the last denoising block."""
        blocks = {b.index for b in found.denoising_blocks()}
        ends = [b.residual_add for b in found if b.block in blocks and found.streams[b.stream].role in ("latent", "joint")]
        if not ends:
            return PassResult(graph, 0, (Refusal("output", "no stream of latent tokens runs through the blocks"),))
        value = next(n for n in graph.graph.nodes if n.name == ends[-1])
        put_cache_guard(value, f"{self.group}/hidden", self)
        return PassResult(graph, 1)
