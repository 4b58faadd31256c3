"""probe: mark the value whose change decides, within a step, whether the step is computed.

    h = block_0(x); …   -->   h = block_0(x); probe(h − x, name, distance, reference_step); …

A probe is a side value, so the pass is bit-exact. The graph is split at it later (`split-at-probe`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from vdcache.errors import ConfigError
from vdcache.ir import dialect
from vdcache.ir.facts import Fact
from vdcache.passes.base import Pass, PassResult, Refusal, copy_meta
from vdcache.passes.filters import FILTERS, filtered
from vdcache.passes.values import PLACES, find
from vdcache.patterns import NoMatch
from vdcache.util.checks import group_name


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

    location: str = "residual"
    blocks: int = 1
    distance: str = "l1"
    reference_step: str = "computed"
    filter: str = ""
    group: str = "all"

    def __post_init__(self) -> None:
        group_name(self.group, self.name)
        for what, value, known in (
            ("place", self.location, [p for p in PLACES if p != "output"]),
            ("distance", self.distance, dialect.DISTANCES),
            ("reference step", self.reference_step, dialect.REFERENCE_STEPS),
            ("filter", self.filter, ("", *FILTERS)),
        ):
            if value not in known:
                raise ConfigError(f"{self.name}: no {what} {value!r}; there are {', '.join(k or repr('') for k in known)}")
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int) or self.blocks < 1:
            raise ConfigError(f"{self.name}: the residual is of at least one block; got blocks={self.blocks!r}")
        super().__post_init__()

    def run(self, graph: fx.GraphModule) -> PassResult:
        value = find(graph, self.location, self.blocks, provenance=str(self))
        if isinstance(value, NoMatch):
            return PassResult(graph, 0, (Refusal(value.node, (value.reason,)),))
        if self.filter:
            value = filtered(graph, value, self.filter, provenance=str(self))
            if isinstance(value, NoMatch):
                return PassResult(graph, 0, (Refusal(value.node, (value.reason,)),))
        name = f"{self.group}/probe.{self.location}{self.blocks if self.location == 'residual' else ''}"
        anchor = value
        if value.op == "placeholder":
            anchor = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
        with graph.graph.inserting_after(anchor):
            mark = graph.graph.call_function(dialect.probe, (value, name, self.distance, self.reference_step))
        copy_meta(mark, str(self), value)
        return PassResult(graph, 1)
