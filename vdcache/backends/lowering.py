"""How attention under masks is computed: chosen for every graph that is about to be compiled."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from vdcache.attention.autotune import TuningResult, autotune
from vdcache.attention.masks import Skip
from vdcache.attention.tiles import TILE_ATTENTION, TileMask, gather, tables_of
from vdcache.ir.edit import inline
from vdcache.ir.ops import tensor_of

__all__ = ["lower_tiles", "tile_sites"]

PIECES = 512  # slices of a gather beyond which it stays one operation: a compiler takes long over many


def tile_sites(graph: fx.GraphModule) -> list[tuple[fx.Node, TileMask]]:
    """The attentions of a graph that have a mask."""
    return [(n, tables_of(n)) for n in graph.graph.find_nodes(op="call_function", target=TILE_ATTENTION)]


def lower_tiles(
    graph: fx.GraphModule, lowering: str = "auto", *, expand: bool = True, always: bool = False
) -> dict[str, TuningResult]:
    """Choose the lowering of every attention that has a mask, in place; what was measured, by the node's name.

    Args:
        lowering: "auto" to measure, or the name of one.
        expand: write a gather out as slices and dense attention, which a compiler fuses with what surrounds it.
        always: even where that are many slices: no operation of our own is left.
    """
    choices: dict[str, TuningResult] = {}
    for node, on in tile_sites(graph):
        scale: Any = node.args[8]
        name = lowering
        if lowering == "auto":
            query, key, value, bias = (tensor_of(x) for x in node.args[:4])
            assert query is not None and key is not None and value is not None
            choices[node.name] = choice = autotune(query, key, value, bias, on, scale)
            name = choice.lowering
        node.update_arg(9, name)
        few = not isinstance(on.mask, Skip) and on.pieces <= PIECES
        if name == "gather" and expand and (few or always):
            _expand(graph.graph, node, on, scale)
    graph.graph.lint()
    graph.recompile()
    return choices


def _expand(graph: fx.Graph, node: fx.Node, on: TileMask, scale: float | None) -> None:
    def written_out(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        return gather(query, key, value, on, scale, bias)

    on.groups, on.everywhere  # noqa: B018 — tables are made outside, or they would become part of the graph
    with graph.inserting_before(node):
        out = inline(graph, written_out, node.args[:4], str(node.meta.get("vdcache", "tile-attention")))
    node.replace_all_uses_with(out)
    graph.erase_node(node)
