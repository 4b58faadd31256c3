"""canonicalise: drop nodes that compute nothing, and call one operation by one name.

    add(x, dropout(f(x), 0.1, False))   -->   add(x, f(x))

Goes: assertions on metadata, dropout outside training, aliases, casts to the type that a value has already, copies that
stay inside, the concatenation of all slices of one tensor, dead code. `concat` becomes `cat`, `multiply` `mul`, and so on; `type_as`
becomes a cast that does not hold on to the tensor whose type it takes. Bit-exact. Refuses nothing; what it does not know stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from vdcache.ir.facts import Fact
from vdcache.ir.ops import VIEWS, is_effectful, same_type
from vdcache.passes.base import Pass, PassResult, drop_dead_code

aten = torch.ops.aten
_COPIES = (aten._to_copy.default, aten.to.dtype, aten.type_as.default, aten.clone.default)

# One operation under several names (the same schema and kernel), which composite capturing keeps apart.
_SYNONYMS: dict[object, object] = {
    getattr(getattr(aten, name), overload): getattr(getattr(aten, plain), overload)
    for name, plain in (
        ("concat", "cat"),
        ("concatenate", "cat"),
        ("multiply", "mul"),
        ("subtract", "sub"),
        ("divide", "div"),
        ("true_divide", "div"),
        ("negative", "neg"),
        ("absolute", "abs"),
        ("swapaxes", "transpose"),
        ("swapdims", "transpose"),
    )
    for overload in getattr(aten, name).overloads()
    if overload in getattr(aten, plain).overloads()
}
_SYNONYMS |= {aten.swapaxes.default: aten.transpose.int, aten.swapdims.default: aten.transpose.int}


@dataclass(frozen=True)
class Canonicalise(Pass):
    """Drop nodes that compute nothing, and call one operation by one name."""

    name: ClassVar[str] = "canonicalise"
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def run(self, graph: fx.GraphModule) -> PassResult:
        rewrites = 0
        for node in list(graph.graph.nodes):
            if node.target is aten._assert_tensor_metadata.default:
                graph.graph.erase_node(node)
                rewrites += 1
                continue
            if (plain := _SYNONYMS.get(node.target)) is not None:
                node.target = plain  # type: ignore[assignment]
                rewrites += 1
            if (source := _same_value(node)) is not None:
                node.replace_all_uses_with(source)
                graph.graph.erase_node(node)
                rewrites += 1
            elif node.target is aten.type_as.default and _stays(node):
                node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.meta["val"].dtype}
                rewrites += 1
        rewrites += drop_dead_code(graph.graph, keep=is_effectful)
        return PassResult(graph, rewrites)


def _stays(node: fx.Node) -> bool:
    """Whether a value is on the device that it comes from."""
    source = node.args[0]
    return isinstance(source, fx.Node) and source.meta["val"].device == node.meta["val"].device


def _same_value(node: fx.Node) -> fx.Node | None:
    """The node whose value `node` repeats, if it repeats one."""
    if node.op != "call_function" or not node.args:
        return None
    first = node.args[0]
    if node.target is aten.dropout.default and isinstance(first, fx.Node):
        return first if not node.args[2] or node.args[1] == 0 else None
    if node.target in (aten.alias.default, aten.lift_fresh_copy.default) and isinstance(first, fx.Node):
        return first
    if node.target in _COPIES and isinstance(first, fx.Node):
        kept = node.kwargs.get("memory_format") is not None or _is_returned(node)
        return first if same_type(first, node) and not kept else None
    if node.target is aten.cat.default:
        return _whole(node)
    return None


def _is_returned(node: fx.Node) -> bool:
    """Whether the caller gets this copy, or a view of it: then it must stay a copy, because the caller may write into it."""
    return any(user.op == "output" or (user.target in VIEWS and _is_returned(user)) for user in node.users)


def _whole(node: fx.Node) -> fx.Node | None:
    """The tensor whose consecutive slices `node` puts together again, completely."""
    pieces: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    if not isinstance(pieces, (list, tuple)) or len(pieces) < 2:
        return None
    source: Any = None
    at: Any = 0
    for piece in pieces:
        found = _sliced(piece)
        if found is None or found[1] != dim % len(node.meta["val"].shape) or found[2] != at:
            return None
        if source is not None and found[0] is not source:
            return None
        source, at = found[0], found[3]
    if not isinstance(source, fx.Node) or not same_type(source, node):
        return None
    size = source.meta["val"].shape[dim]
    ends = isinstance(at, int) and (at >= 2**62 or (isinstance(size, int) and at >= size))
    return source if at is None or ends else None


def _sliced(piece: object) -> tuple[Any, int, Any, Any] | None:
    """What a piece is a slice of, along which dimension, from and to; None if it leaves values out in between."""
    if not isinstance(piece, fx.Node) or piece.target is not aten.slice.Tensor:
        return None
    given: list[Any] = [*piece.args, None, None, None, None]
    source, dim, start, stop, step = given[:5]
    if step not in (None, 1):
        return None
    return source, (dim or 0) % len(piece.meta["val"].shape), start or 0, stop
