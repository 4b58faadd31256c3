"""Stable text of a graph, for people, golden tests and cache keys.

    graph  ::= line* "return (" value ("," value)* ")"
    line   ::= "%" n "=" op "(" value ("," value)* ")" ":" type
    value  ::= "%" n | python literal | "[" value* "]"
    type   ::= dtype "[" size ("," size)* "]" | "sym" | "?"

Values are renumbered in order, so the text does not depend on the names that a tracer chose. `docs/ir.md` says more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

__all__ = ["dump", "type_of"]

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def type_of(value: Any) -> str:
    """The type column: `f32[4,8]`, `sym` for a symbolic number, `?` where nothing is known."""
    if isinstance(value, torch.Tensor):
        return f"{_SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{','.join(str(s) for s in value.shape)}]"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"sym[{value}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(type_of(v) for v in value) + ")"
    return "?"


def dump(graph: fx.Graph | fx.GraphModule) -> str:
    """The text of a graph."""
    graph = graph.graph if isinstance(graph, fx.GraphModule) else graph
    number: dict[fx.Node, int] = {}

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{number[value]}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(text(v) for v in value) + "]"
        if isinstance(value, slice):
            return f"slice({text(value.start)}, {text(value.stop)}, {text(value.step)})"
        return repr(value)

    lines = []
    for node in graph.nodes:
        if node.op == "output":
            results = node.args[0]
            listed: Iterable[Any] = results if isinstance(results, (tuple, list)) else [results]
            lines.append("return (" + ", ".join(text(v) for v in listed) + ")")
            continue
        number[node] = len(number)
        if node.op == "placeholder":
            call = "input()"
        elif node.op == "get_attr":
            call = f"constant({node.target!r})"
        else:
            named = [f"{k}={text(v)}" for k, v in node.kwargs.items()]
            call = f"{_op(node.target)}({', '.join([*(text(a) for a in node.args), *named])})"
        lines.append(f"%{number[node]} = {call} : {type_of(node.meta.get('val'))}")
    return "\n".join(lines)


def _op(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).removeprefix("aten.")
        return name.removesuffix(".default").removesuffix(".Tensor")
    return str(getattr(target, "__name__", target))
