"""Attention operations: what attends to what, over which axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from vdcache.ir.ops import ATTENTION, CASTS, VIEWS, tensor_of
from vdcache.patterns.facts import Attention, Grid
from vdcache.patterns.index import Index

__all__ = ["attention_nodes", "describe", "is_attention"]

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)


def is_attention(node: fx.Node) -> bool:
    """Whether the node is an attention: the fused operation, or the last product of matmul → softmax → matmul."""
    if node.target in ATTENTION:
        return True
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "flex_attention" in node.target.name()
    return node.target in _PRODUCTS and (weights := _softmax_of(node)) is not None and _scores_of(weights) is not None


def attention_nodes(nodes: list[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if is_attention(n)]


def _through(node: Any, targets: tuple[Any, ...], pass_by: frozenset[Any]) -> fx.Node | None:
    """The first node with one of `targets`, going up from `node` by first operands and through `pass_by` only."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target in targets:
            return node
        if node.target not in pass_by:
            return None
        node = node.args[0] if node.args else None
    return None


_PASS_BY = (
    VIEWS
    | CASTS
    | {
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.add.Tensor,
        aten.dropout.default,
        aten.expand.default,
        aten.masked_fill.Scalar,
        aten.sub.Tensor,
    }
)


def _softmax_of(product: fx.Node) -> fx.Node | None:
    return _through(product.args[0], _SOFTMAX, _PASS_BY) if product.args else None


def _scores_of(softmax: fx.Node) -> fx.Node | None:
    return _through(softmax.args[0], _PRODUCTS, _PASS_BY)


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The query and the key of an attention, as near as the graph holds them."""
    if node.target in _PRODUCTS:
        scores = _scores_of(_softmax_of(node))  # type: ignore[arg-type]
        at = 1 if scores.target is aten.baddbmm.default else 0  # type: ignore[union-attr]
        return scores.args[at], scores.args[at + 1]  # type: ignore[union-attr,return-value]
    return node.args[0], node.args[1]  # type: ignore[return-value]


def describe(index: Index, node: fx.Node, source: fx.Node, inside: set[fx.Node], varying: int, grid: Grid | None) -> Attention:
    """What an attention inside a branch that reads `source` is.

    Args:
        inside: the nodes of the branch.
        varying: mask of the inputs that are not parameters; tokens that come from them belong to a stream.
    """
    query, key = operands(node)
    if not _reads(index, key, source):
        kind = "cross"
    elif _mixes_streams(index, key, source, inside, varying) or _mixes_streams(index, query, source, inside, varying):
        kind = "joint"
    else:
        kind = "self"
    q, k = tensor_of(query), tensor_of(key)
    heads = q_len = kv_len = head_dim = None
    if q is not None and k is not None and node.target not in _PRODUCTS and q.ndim == 4:
        heads, q_len, kv_len, head_dim = _int(q.shape[1]), _int(q.shape[2]), _int(k.shape[2]), _int(q.shape[3])
    layout = "unknown"
    if grid is not None and q is not None and q_len is not None and kind != "cross":
        layout = _layout(q_len, _int(q.shape[0]), grid, kind)
    return Attention(node.name, kind, layout, heads, q_len, kv_len, head_dim)


def _layout(q_len: int, batch: int | None, grid: Grid, kind: str) -> str:
    space = grid.height * grid.width
    if q_len == grid.tokens or (kind == "joint" and q_len > grid.tokens):
        return "full"
    if grid.frames > 1 and q_len == space and batch is not None and batch % grid.frames == 0:
        return "spatial"
    if grid.frames > 1 and q_len == grid.frames and batch is not None and batch % space == 0:
        return "temporal"
    return "full" if kind == "self" and grid.frames == 1 and q_len >= space else "unknown"


def _reads(index: Index, node: fx.Node, source: fx.Node) -> bool:
    return node is source or index.depends(node, source)


def _mixes_streams(index: Index, node: fx.Node, source: fx.Node, inside: set[fx.Node], varying: int) -> bool:
    """Whether tokens from outside the branch are concatenated on the way from `source` to `node`."""
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        if at not in inside:
            continue
        if at.target is aten.cat.default:
            pieces: Any = at.args[0]
            for piece in pieces:
                if not _reads(index, piece, source) and index.depends_on_any(piece, varying):
                    return True
        for parent in at.all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return False


def _int(size: Any) -> int | None:
    return size if isinstance(size, int) else None
