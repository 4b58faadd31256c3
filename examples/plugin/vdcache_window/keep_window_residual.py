"""keep-window-residual: keep what full attention has besides attention in a window (DiTFastAttn, arXiv 2406.08552).

    o = attention(q, k, v)   -->   w = attention(q, k, v, band);  o = cache_guard(attention(q, k, v), slot, w)

A computed step returns the full attention, bit for bit, and leaves `attention - w` behind. A reused one computes `w` of its own queries,
keys and values, and adds what was left. So what depends on the step follows it, and what is far away is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from vdcache import Pass, PassResult, analyze
from vdcache.errors import ConfigError
from vdcache.ir import Fact
from vdcache.ir.edit import call
from vdcache.passes import Refusal, put_cache_guard
from vdcache_window.sites import band, operands_of

aten = torch.ops.aten


@dataclass(frozen=True)
class KeepWindowResidual(Pass):
    """Guard the self- and joint-attentions of the denoising blocks with windowed attention as the base.

    Args:
        window: how many tokens a token sees before it and after it.
        group: the group of slots; a policy reuses whole groups.

    Raises:
        ConfigError: a window below 1.
    """

    name: ClassVar[str] = "keep-window-residual"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.CANONICAL})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.GUARDED})
    fixed_sizes: ClassVar[bool] = True

    window: int = 8
    group: str = "all"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"{self.name}: a window of tokens is at least 1, got {self.window}")

    def run(self, graph: fx.GraphModule) -> PassResult:
        nodes = {n.name: n for n in graph.graph.nodes}
        rewrites, refusals = 0, []
        for branch, attention in analyze(graph).denoising_attentions():
            place = operands_of(nodes[attention.node], attention)
            if not isinstance(place, Refusal) and place.tokens <= 2 * self.window + 1:
                place = Refusal(place.node.name, f"its {place.tokens} tokens all lie in a window of {self.window}")
            if isinstance(place, Refusal):
                refusals.append(place)
                continue
            full = place.node
            with graph.graph.inserting_before(full):
                mask = band(graph.graph, place.tokens, self.window, str(self))
                scale = {} if place.scale is None else {"scale": place.scale}
                near = call(graph.graph, full.target, place.query, place.key, place.value, mask, provenance=str(self), **scale)
            slot = f"{self.group}/{branch.name}.{attention.node}"
            put_cache_guard(full, slot, self, base=near)
            rewrites += 1
        return PassResult(graph, rewrites, tuple(refusals))
