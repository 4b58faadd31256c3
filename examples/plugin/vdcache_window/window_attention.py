"""window-attention: temporal attention sees only frames that are near.

    o = scaled_dot_product_attention(q, k, v)   -->   o = scaled_dot_product_attention(q, k, v, band)

`band` [frames, frames] is True where two frames are at most `frames` apart. Not exact: the other weights are gone. Refuses attention
that does not run over frames, that has a mask already, or whose sizes are symbols.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from vdcache import Pass, PassResult, analyze
from vdcache.errors import ConfigError
from vdcache.ir import Fact
from vdcache.passes import Refusal
from vdcache.patterns import Attention
from vdcache_window.sites import Operands, band, operands_of


@dataclass(frozen=True)
class WindowAttention(Pass):
    """Put a band mask on every temporal attention.

    Args:
        frames: how many frames a frame sees before it and after it.

    Raises:
        ConfigError: a window below 1.
    """

    name: ClassVar[str] = "window-attention"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.CANONICAL})
    fixed_sizes: ClassVar[bool] = True

    frames: int = 1

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ConfigError(f"{self.name}: a window of frames is at least 1, got {self.frames}")

    def run(self, graph: fx.GraphModule) -> PassResult:
        nodes = {n.name: n for n in graph.graph.nodes}
        rewrites, refusals = 0, []
        for attention in analyze(graph).attentions:
            place = self._place(nodes[attention.node], attention)
            if isinstance(place, Refusal):
                refusals.append(place)
                continue
            with graph.graph.inserting_before(place.node):
                mask = band(graph.graph, place.tokens, self.frames, str(self))
            place.node.args = (place.query, place.key, place.value, mask)
            place.node.kwargs = {"scale": place.scale} if place.scale is not None else {}
            rewrites += 1
        return PassResult(graph, rewrites, tuple(refusals))

    def _place(self, node: fx.Node, attention: Attention) -> Operands | Refusal:
        if attention.layout != "temporal":
            return Refusal(node.name, f"it runs over {attention.layout or 'unknown'} tokens, not over frames")
        return operands_of(node, attention)
