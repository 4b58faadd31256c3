"""How attention under masks is computed: chosen for every graph that is about to be compiled."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from vdcache.attention.autotune import TuningResult, autotune
from vdcache.attention.masks import Skip
from vdcache.attention.merged import dense_kernel, merged
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
        expand: write gathered and merged attention out as slices and dense attention, which a compiler fuses with what surrounds it. On
            a GPU it stays one operation: there it runs on two streams, and a compiler makes a kernel of every slice.
        always: even where that are many slices, and on a GPU: no operation of our own is left.
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
        if expand and name in _WRITTEN_OUT and (always or _is_simple(node, on)):
            _expand(graph.graph, node, on, scale, name)
    graph.graph.lint()
    graph.recompile()
    return choices


def _is_simple(node: fx.Node, on: TileMask) -> bool:
    """Whether a compiler gains from the parts of an attention, and does not take long over them."""
    return not isinstance(on.mask, Skip) and on.pieces <= PIECES and node.meta["val"].device.type != "cuda"


def _expand(graph: fx.Graph, node: fx.Node, on: TileMask, scale: float | None, name: str) -> None:
    query = node.meta["val"]
    if name == "merged":  # tried outside, as the tables are made outside: they would become part of the graph
        dense_kernel(query.device, query.dtype, query.shape[3])
    on.groups, on.everywhere, on.shared  # noqa: B018

    def written_out(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        return _WRITTEN_OUT[name](query, key, value, on, scale, bias)

    with graph.inserting_before(node):
        out = inline(graph, written_out, node.args[:4], str(node.meta.get("vdcache", "tile-attention")))
    node.replace_all_uses_with(out)
    graph.erase_node(node)


_WRITTEN_OUT = {"gather": gather, "merged": merged}
