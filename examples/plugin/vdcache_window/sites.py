"""What both passes read off an attention: its operands, or why they leave it alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from vdcache.ir.edit import call
from vdcache.patterns import Attention, Refusal

aten = torch.ops.aten


@dataclass(frozen=True)
class Operands:
    """A plain attention, while the graph does not change: query, key and value are [..., tokens, width]."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float | None
    tokens: int


def operands_of(node: fx.Node, attention: Attention) -> Operands | Refusal:
    """The operands of an attention that has no mask of its own."""

    def no(reason: str) -> Refusal:
        return Refusal(node.name, reason)

    if attention.form != "sdpa":
        return no(f"it is written as {attention.form!r}; scaled_dot_product_attention is rewritten")
    if attention.kind == "cross":
        return no("it is a cross-attention")
    if attention.q_len is None or attention.q_len != attention.kv_len:
        return no(f"its {attention.q_len} queries are not its {attention.kv_len} keys, or a symbol stands for them")
    given: dict[str, Any] = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | dict(node.kwargs)
    if given.get("attn_mask") is not None or given.get("is_causal") or given.get("dropout_p"):
        return no("it has a mask or drops weights at random")
    query, key, value = (a for a in node.args[:3] if isinstance(a, fx.Node))
    return Operands(node, query, key, value, given.get("scale"), attention.q_len)


def band(graph: fx.Graph, tokens: int, window: int, provenance: str) -> fx.Node:
    """A mask [tokens, tokens] that is True where two are at most `window` apart, at the graph's insertion point."""

    def op(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(graph, target, *args, provenance=provenance, **kwargs)

    like = next(n for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor))
    ones = op(aten.new_ones.default, like, [tokens, tokens], dtype=torch.bool)
    return op(aten.tril.default, op(aten.triu.default, ones, -window), window)
