"""Stable text of a graph, for people, golden tests and files; `parse` reads it back.

    graph  ::= ["sizes" symbol "=" number ("," symbol "=" number)*] line* "return" results
    line   ::= "%" n "=" call [":" type]
    call   ::= ("input" | "parameter") "()" | "constant(" name ["," value] ")" | op "(" value ("," value)* ")"
             | "graph(" name ")" "{" graph "}"
    value  ::= "%" n | python literal | "[" value* "]" | "(" value* ")" | "slice(" value "," value "," value ")"
             | torch.dtype, torch.layout, torch.memory_format | "device(" … ")"
    type   ::= dtype "[" size ("," size)* "]" ["{" stride ("," stride)* "}"] ["@" device]
             | "sym[" size "]" | "(" type ("," type)* ")" | "?"
    results ::= value | "(" result ("," result)* ")"
    result ::= value ["->" "%" n]

Values and symbols are renumbered in order, so the text does not depend on the names that a tracer chose. `docs/ir.md` says more.
"""

from __future__ import annotations

import builtins
import operator
import types
from typing import Any

import sympy
import torch
from torch import fx

from vdcache.ir import dialect

__all__ = ["DTYPES", "SHOWN", "attribute", "dump", "name_of_op", "numbers", "type_of"]

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "b1": torch.bool,
    "c64": torch.complex64,
    "c128": torch.complex128,
}
_SHORT = {dtype: name for name, dtype in DTYPES.items()}
SHOWN = 8  # elements of a constant that are part of the text; larger ones are saved beside it


class Symbols:
    """Symbols of sizes by the order in which they are seen: s0, s1 … with the number that each had when the graph was made."""

    def __init__(self) -> None:
        self._known: dict[sympy.Symbol, sympy.Symbol] = {}
        self.numbers: dict[str, int] = {}

    def text(self, value: Any) -> str:
        """A size or another symbolic number."""
        if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return str(value)
        expr = value.node.expr
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self._known:
                self._see(symbol, value)
        return str(expr.xreplace(self._known)).replace(" ", "")

    def name(self, value: Any, name: str) -> None:
        """Call the symbol of a size so."""
        self._known[value.node.expr] = sympy.Symbol(name, positive=value.node.expr.is_positive, integer=True)

    def _see(self, symbol: sympy.Symbol, value: Any) -> None:
        kind = symbol.name[0] if symbol.name[0] in "su" else "z"
        name = f"{kind}{sum(n.name[0] == kind for n in self._known.values())}"
        self._known[symbol] = sympy.Symbol(name, positive=symbol.is_positive, integer=True)
        hint = value.node.shape_env.create_symintnode(symbol, hint=None).node.hint if kind == "s" else None
        if hint is not None:
            self.numbers[name] = int(hint)


def type_of(value: Any, symbols: Symbols | None = None, *, strides: bool = False) -> str:
    """The type column: `f32[4,8]`, `sym[s0]` for a symbolic number, `?` where nothing is known.

    Args:
        strides: show those of a tensor that is not contiguous.
    """
    symbols = symbols or Symbols()
    if isinstance(value, torch.Tensor):
        dtype = _SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
        text = f"{dtype}[{','.join(map(symbols.text, value.shape))}]"
        if strides and value.layout is torch.strided and not _is_contiguous(value):
            text += f"{{{','.join(map(symbols.text, value.stride()))}}}"
        return text if value.device.type == "cpu" else f"{text}@{value.device}"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"sym[{symbols.text(value)}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(type_of(v, symbols) for v in value) + ")"
    return "?"


def _is_contiguous(value: torch.Tensor) -> bool:
    """Whether the strides are the usual ones, asked without adding a guard on any symbol."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        size, stride = (x.node.expr if isinstance(x, torch.SymInt) else x for x in (size, stride))
        if size != 1 and stride != expected:
            return False
        expected = expected * size
    return True


def numbers(graph: fx.Graph) -> dict[fx.Node, int]:
    """The number that each node has in the text of its graph."""
    return {node: i for i, node in enumerate(n for n in graph.nodes if n.op != "output")}


def dump(graph: fx.Graph | fx.GraphModule) -> str:
    """The text of a graph. `parse` gives the graph back, but for large constants, and names and places in the user's code."""
    module = graph if isinstance(graph, fx.GraphModule) else graph.owning_module
    graph = graph.graph if isinstance(graph, fx.GraphModule) else graph
    symbols = Symbols()
    lines = _lines(graph, module, symbols)
    if symbols.numbers:
        lines.insert(0, "sizes " + ", ".join(f"{name}={n}" for name, n in symbols.numbers.items()))
    return "\n".join(lines)


def _lines(graph: fx.Graph, module: fx.GraphModule | None, symbols: Symbols) -> list[str]:
    number = numbers(graph)
    sig: Any = module.meta.get("vdcache") if module is not None else None
    position = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{number[value]}"
        if isinstance(value, list):
            return "[" + ", ".join(map(text, value)) + "]"
        if isinstance(value, tuple):
            return "(" + ", ".join(map(text, value)) + (",)" if len(value) == 1 else ")")
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({text(value.start)}, {text(value.stop)}, {text(value.step)})"
        return repr(value)

    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append("return " + _results(node, text, sig, {i: n for n, i in position.items()}))
            continue
        if node.op == "placeholder":
            call = "parameter()" if position[node] in getattr(sig, "static", ()) else "input()"
        elif node.op == "get_attr":
            held = attribute(module, str(node.target))
            if isinstance(held, fx.GraphModule):
                inner = [f"  {line}" for line in _lines(held.graph, held, symbols)]
                lines += [f"%{number[node]} = graph({node.target!r}) {{", *inner, "}"]
                continue
            call = f"constant({node.target!r}{_shown(held)})"
            if isinstance(held, torch.Tensor):
                lines.append(f"%{number[node]} = {call} : {type_of(held, symbols, strides=True)}")
                continue
        else:
            named = [f"{k}={text(v)}" for k, v in node.kwargs.items()]
            call = f"{name_of_op(node.target)}({', '.join([*map(text, node.args), *named])})"
        value = node.meta.get("val")
        shown = repr(value) if _is_plain(value) else type_of(value, symbols, strides=node.op == "placeholder")
        lines.append(f"%{number[node]} = {call} : {shown}")
    return lines


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _results(node: fx.Node, text: Any, sig: Any, given: dict[int, fx.Node]) -> str:
    """What is returned: `%4` alone, or a list in which `%4 -> %0` is written back into an input."""
    results = node.args[0]
    if not isinstance(results, (tuple, list)):
        return str(text(results))
    back = dict(getattr(sig, "mutations", ()))
    return "(" + ", ".join(text(v) + (f" -> {text(given[back[i]])}" if i in back else "") for i, v in enumerate(results)) + ")"


def attribute(module: fx.GraphModule | None, path: str) -> Any:
    """What a graph holds under a name, of its own or in a submodule; None for nothing."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _shown(held: Any) -> str:
    """The elements of a small constant."""
    plain = type(held) in (torch.Tensor, torch.nn.Parameter) and held.device.type != "meta"
    return f", {held.tolist()!r}" if plain and held.numel() <= SHOWN else ""


def name_of_op(target: Any) -> str:
    """An operation as it prints: without `aten.`, and without the overload that its name alone stands for."""
    if isinstance(target, torch._ops.OpOverload):
        packet, overload = str(target).rsplit(".", 1)
        short = packet.removeprefix("aten.")
        return short if overload == plain_overload(target._overloadpacket) else f"{short}.{overload}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    if dialect.is_dialect_function(target) or target is operator.getitem:
        return str(target.__name__)
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", str(target))
    if isinstance(target, types.BuiltinFunctionType):
        module = {"_operator": "operator"}.get(module, module)
    return f"{module}.{name}" if module and module != builtins.__name__ else name


def plain_overload(packet: Any) -> str:
    """The overload of an operation that its name alone stands for."""
    return "Tensor" if "Tensor" in packet.overloads() else "default"
