"""Attention operations: what attends to what, over which axis, however it is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from vdcache.attention.tiles import TILE_ATTENTION
from vdcache.ir.ops import ATTENTION, CASTS, VIEWS, is_work, tensor_inputs, tensor_of, unviewed
from vdcache.patterns.facts import Attention, Grid, Refusal, Span
from vdcache.patterns.index import Index
from vdcache.patterns.streams import Streams

__all__ = ["AttentionMatch", "attention_matches", "axes_of", "describe", "layout_of", "operands", "video_span"]

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)


@dataclass(frozen=True)
class AttentionMatch:
    """One attention, while the graph does not change.

    Args:
        node: the operation that gives the result; of a chain of products, the last.
        query, key: its operands, as near as the graph holds them.
        scores: where two products make the attention, the inner one: of queries and keys, or for "linear" of keys and values.
        weights: where the graph holds the weights of every query and key, these: an operand of `node`.
    """

    node: fx.Node
    form: str
    query: fx.Node
    key: fx.Node
    scores: fx.Node | None = None
    weights: fx.Node | None = None


def attention_matches(nodes: Iterable[fx.Node], tokens: int | None = None) -> list[AttentionMatch]:
    """The attentions among `nodes`, in order; `tokens` is the length of the stream that they belong to, where it is known."""
    found: dict[fx.Node, AttentionMatch] = {}
    nodes = list(nodes)
    for node in nodes:
        if site := _fused(node) or _with_softmax(node):
            found[node] = site
    inner = {s.scores for s in found.values()}
    for node in nodes:
        if node not in found and node not in inner and (site := _chain(node, found, tokens)):
            found[node] = site
    order = {n: i for i, n in enumerate(nodes)}
    return sorted(found.values(), key=lambda s: order[s.node])


def _fused(node: fx.Node) -> AttentionMatch | None:
    """One operation that is all of attention: torch's own, flex attention, or another library's kernel."""
    if node.op != "call_function" or len(node.args) < 3:
        return None
    q, k = node.args[0], node.args[1]
    if not isinstance(q, fx.Node) or not isinstance(k, fx.Node):
        return None
    if node.target in ATTENTION:
        return AttentionMatch(node, "sdpa", q, k)
    if node.target is TILE_ATTENTION:
        return AttentionMatch(node, "tiles", q, k)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return AttentionMatch(node, "flex", q, k) if "flex_attention" in node.target.name() else None
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims", "prim"):
        a, b, c = (tensor_of(x) for x in node.args[:3])
        if a is None or b is None or c is None or min(a.ndim, b.ndim, c.ndim) < 3:
            return None
        if a.dtype == b.dtype == c.dtype and a.shape[-1] == b.shape[-1] and b.shape[:-1] == c.shape[:-1]:
            return AttentionMatch(node, "custom", q, k)
    return None


def _with_softmax(node: fx.Node) -> AttentionMatch | None:
    """matmul → softmax → matmul."""
    if node.target not in _PRODUCTS:
        return None
    for operand in operands(node):
        weights = _through(operand, _SOFTMAX)
        scores = _through(weights.args[0], _PRODUCTS) if weights is not None else None
        if scores is not None and len(pair := operands(scores)) == 2:
            return AttentionMatch(node, "matmul-softmax", pair[0], pair[1], scores, operand)
    return None


def _chain(node: fx.Node, known: dict[fx.Node, AttentionMatch], tokens: int | None) -> AttentionMatch | None:
    """A product with the product of two values that all come out of layers, and no layer in between.

    Where something but views, padding and factors lies between the two products, or where the inner one does not sum over
    tokens, the inner one is scores: attention with a normaliser of its own. Else keys and values were multiplied first.
    """
    if node.target not in _PRODUCTS or len(pair := operands(node)) != 2 or not all(map(_is_learned, pair)):
        return None
    for inner, outer in (pair, pair[::-1]):
        product, between = _above(inner, known)
        if product is None or len(both := operands(product)) != 2 or not all(map(_is_learned, both)):
            continue
        normalised = any(n.target not in _MOVES and not _is_factor(n) for n in between)
        if normalised or (tokens is not None and not _sums_over_tokens(product, node, tokens)):
            soft = any(n.target in _EXPONENTIALS for n in between)
            return AttentionMatch(node, "matmul-softmax" if soft else "matmul", both[0], both[1], product, inner)
        return AttentionMatch(node, "linear", outer, _keys_of(node, inner, product), product)
    return None


def _sums_over_tokens(product: fx.Node, outer: fx.Node, tokens: int) -> bool:
    """Whether the inner of two products sums over the tokens of a sequence (all of a stream, or those of a frame or a place)."""
    own, other = _contracted(product), _contracted(outer)
    if tokens in (own, other) or own is None or other is None:
        return own == tokens
    return tokens % own == 0


_EXPONENTIALS = (aten.exp.default, aten.exp2.default, aten.logsumexp.default, aten.log_softmax.int)
_MOVES = (
    VIEWS | CASTS | {aten.pad.default, aten.constant_pad_nd.default, aten.expand.default, aten.slice.Tensor, aten.mT.default}
)


def _is_factor(node: fx.Node) -> bool:
    return node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar) and len(tensor_inputs(node)) == 1


def _contracted(product: fx.Node) -> int | None:
    """The size that a product sums over."""
    first = operands(product)[0]
    value = tensor_of(first)
    if value is None:
        return None
    if product.target is not aten.einsum.default:
        return _int(value.shape[-1])
    inputs, _, output = str(product.args[0]).replace(" ", "").partition("->")
    letters = inputs.split(",")[0]
    sizes = [_int(n) for letter, n in zip(letters, value.shape, strict=False) if letter not in output]
    return sizes[0] if len(sizes) == 1 else None


def axes_of(product: fx.Node, position: int) -> tuple[int, int] | None:
    """Of an operand of a product, by its position: the axis that is summed over, and the one that the result keeps; None where
    there is not one of each."""
    if product.target is not aten.einsum.default:
        return (-1, -2) if position == 0 else (-2, -1)
    inputs, _, output = str(product.args[0]).replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(letters) != 2 or "." in inputs:
        return None
    own, other = letters[position], letters[1 - position]
    summed = [i for i, x in enumerate(own) if x in other and x not in output]
    kept = [i for i, x in enumerate(own) if x in output and x not in other]
    return (summed[0], kept[0]) if len(summed) == len(kept) == 1 else None


def _keys_of(outer: fx.Node, inner: fx.Node, product: fx.Node) -> fx.Node:
    """Which operand of the product of keys and values holds the keys: the one whose features the query is multiplied with.

    The first of them where the two products are not plain matrix products one right after the other.
    """
    both = operands(product)
    if product.target is aten.einsum.default or outer.target is aten.einsum.default or len(both) != 2:
        return both[0]
    transposed = False
    at = inner
    while at is not product and isinstance(first := at.args[0] if at.args else None, fx.Node):
        transposed ^= at.target in _TRANSPOSES
        at = first
    last = (
        operands(outer)[0] is inner
    ) ^ transposed  # the query meets the columns of the product, which are its second operand's
    return both[1] if last else both[0]


_TRANSPOSES = (aten.transpose.int, aten.mT.default, aten.t.default, aten.permute.default)


def operands(product: fx.Node) -> list[fx.Node]:
    if product.target is aten.einsum.default:
        given: Any = product.args[1]
        return [a for a in given if isinstance(a, fx.Node)]
    at = 1 if product.target is aten.baddbmm.default else 0
    return [a for a in product.args[at : at + 2] if isinstance(a, fx.Node)]


def _above(node: fx.Node, known: dict[fx.Node, AttentionMatch]) -> tuple[fx.Node | None, list[fx.Node]]:
    """The product that `node` is, seen through elementwise work and padding, and what lies between."""
    todo, seen = [node], {node}
    passed: list[fx.Node] = []
    while todo and len(seen) < 64:
        at = todo.pop(0)
        if at in known:
            continue
        if at.target in _PRODUCTS:
            return at, passed
        if at.op != "call_function" or is_work(at):
            continue
        passed.append(at)
        for parent in at.all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return None, passed


def _is_learned(node: fx.Node) -> bool:
    """Whether a layer lies above `node` within a branch's reach: rotary matrices and masks have none."""
    todo, seen = [node], {node}
    while todo and len(seen) < 200:
        at = todo.pop()
        if at.op == "call_function" and is_work(at) and (at.target not in _PRODUCTS or tensor_of(at) is None):
            return True
        if at.target in _PRODUCTS and any(unviewed(a).op in ("placeholder", "get_attr") for a in operands(at)):
            return True  # a layer spelled as a product with a weight
        for parent in at.all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return False


def _through(node: Any, targets: tuple[Any, ...]) -> fx.Node | None:
    """The first node with one of `targets`, going up from `node` by first operands and through what keeps scores scores."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target in targets:
            return node
        if node.target not in _PASS_BY:
            return None
        node = node.args[0] if node.args else None
    return None


_PASS_BY = (
    VIEWS
    | CASTS
    | {
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.add.Tensor,
        aten.add.Scalar,
        aten.dropout.default,
        aten.expand.default,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.sub.Tensor,
        aten.nan_to_num.default,
        aten.clamp.default,
        aten.tanh.default,
    }
)


def describe(
    index: Index, site: AttentionMatch, source: fx.Node, inside: set[fx.Node], streams: Streams, grid: Grid | None
) -> Attention:
    """What an attention inside a branch that reads `source` is.

    Args:
        inside: the nodes of the branch.
    """
    query, key = site.query, site.key
    if not _reads(key, source, inside):
        kind = "cross"
    elif _mixes_streams(index, key, source, inside) or _mixes_streams(index, query, source, inside):
        kind = "joint"
    else:
        kind = "self"
    heads, q_len, kv_len, head_dim = _sizes(site)
    batch = q.shape[0] if (q := tensor_of(query)) is not None else None
    spans = streams.spans(key) if kind != "cross" else ()
    if kv_len is not None and spans and spans[-1].stop != kv_len:
        spans = ()
    layout = "unknown"
    if grid is not None and q_len is not None and kind != "cross":
        layout = _layout(q_len, _int(batch), grid, spans)
    return Attention(
        site.node.name, kind, layout, heads, q_len, kv_len, head_dim, site.form, spans, grid if layout != "unknown" else None
    )


def _sizes(site: AttentionMatch) -> tuple[int | None, int | None, int | None, int | None]:
    """Heads, queries, keys and width of a head."""
    q, k = tensor_of(site.query), tensor_of(site.key)
    if q is None or k is None:
        return None, None, None, None
    if site.form in ("sdpa", "flex", "tiles") and q.ndim == 4:
        return _int(q.shape[1]), _int(q.shape[2]), _int(k.shape[2]), _int(q.shape[3])
    if site.form == "sdpa":
        return None, _int(q.shape[-2]), _int(k.shape[-2]), _int(q.shape[-1])
    scores = tensor_of(site.scores)
    if site.form in ("matmul-softmax", "matmul") and scores is not None:
        heads = _int(scores.shape[1]) if scores.ndim == 4 else None
        return heads, _int(scores.shape[-2]), _int(scores.shape[-1]), _contracted(site.scores)  # type: ignore[arg-type]
    if site.form == "linear" and scores is not None and scores.ndim == 4:
        heads, width = _int(scores.shape[1]), _int(scores.shape[-1])
        keys = _length(k, heads, width)
        if site.scores is not None and site.scores.target is not aten.einsum.default:
            keys = _int(k.shape[-1])  # what a matrix product of keys and values sums over
        return heads, _length(q, heads, width), keys, width
    return None, None, None, None


def _length(value: torch.Tensor, heads: int | None, width: int | None) -> int | None:
    """Tokens of a query or key [B, heads, N, width] or [B, N, heads, width]: the size that is neither; None where none is left over."""
    sizes = [_int(s) for s in value.shape[1:]]
    for known in (heads, width):
        if known in sizes:
            sizes.remove(known)
    return sizes[0] if len(sizes) == 1 else None


def layout_of(tokens: int, grid: Grid) -> str:
    """Over what a sequence of so many video tokens runs: "full", "spatial" or "temporal".

    Where sizes coincide (one frame, say), the longest it could be.
    """
    space = grid.height * grid.width
    return "full" if tokens == grid.tokens else "spatial" if tokens == space else "temporal"


def video_span(attention: Attention, keys: int, grid: Grid) -> tuple[int, int] | Refusal:
    """From which to which of so many keys of a sequence the video tokens are."""
    sizes = (grid.tokens, grid.frames, grid.height * grid.width)
    latent = [s for s in attention.spans if s.role == "latent"]
    if len(latent) == 1 and latent[0].stop - latent[0].start in sizes:
        return latent[0].start, latent[0].stop
    if not attention.spans and keys in sizes:
        return 0, keys
    if attention.spans:
        held = ", ".join(f"{s.stop - s.start} {s.role}" for s in attention.spans)
        return Refusal(attention.node, f"its {keys} keys are {held}, and the grid has {grid.tokens} video tokens")
    return Refusal(
        attention.node, f"{keys} keys are not the {grid.tokens} video tokens, and the graph does not show which of them are"
    )


def _layout(q_len: int, batch: int | None, grid: Grid, spans: Sequence[Span]) -> str:
    space = grid.height * grid.width
    if q_len == grid.tokens or any(s.stop - s.start == grid.tokens for s in spans):
        return "full"
    if grid.frames > 1 and q_len == space and batch is not None and batch % grid.frames == 0:
        return "spatial"
    if grid.frames > 1 and q_len == grid.frames and batch is not None and batch % space == 0:
        return "temporal"
    return "full" if grid.frames == 1 and q_len >= space else "unknown"


def _reads(node: fx.Node, source: fx.Node, inside: set[fx.Node]) -> bool:
    return node is source or node in inside


def _mixes_streams(index: Index, node: fx.Node, source: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether tokens from outside the branch are concatenated on the way from `source` to `node`.

    What comes straight from an input, without a layer, is no other stream: a cache of earlier keys.
    """
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        if at not in inside:
            continue
        if at.target is aten.cat.default:
            pieces: Any = at.args[0]
            for piece in pieces:
                if not _reads(piece, source, inside) and index.inputs_of(piece) and _has_work(piece):
                    return True
        for parent in at.all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return False


def _has_work(node: fx.Node) -> bool:
    """Whether a layer lies above `node`."""
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        if is_work(at):
            return True
        for parent in at.all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return False


def _int(size: Any) -> int | None:
    return size if isinstance(size, int) else None
