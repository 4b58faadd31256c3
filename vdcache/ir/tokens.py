"""One line of the text of a graph: its operation and its arguments, and what is wrong with it."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vdcache.errors import ConfigError
from vdcache.ir import dialect
from vdcache.ir.dump import plain_overload
from vdcache.util.renamed import DIALECT, current

__all__ = ["BINARY", "Line", "lines_of", "parts"]

BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_MODULES = {"operator": operator, "math": math, "torch": torch}
_VALUE = re.compile(r"('(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\")|%(\w+)")


def lines_of(text: str, of: str) -> list[Line]:
    """The lines of a text, without blank ones and those that start with "#"."""
    numbered = enumerate(text.splitlines(), 1)
    return [Line(i, line, of) for i, line in numbered if line.strip() and not line.strip().startswith("#")]


def parts(text: str) -> list[str]:
    """What commas part, outside brackets."""
    depth, found = 0, [""]
    for c in text:
        depth += (c in "([") - (c in ")]")
        if c == "," and not depth:
            found.append("")
        else:
            found[-1] += c
    return [p.strip() for p in found if p.strip()]


@dataclass(frozen=True)
class Line:
    """Line `number` of a text, counted from 1.

    Args:
        of: what the text is of, for messages: "graph" or "pattern".
    """

    number: int
    text: str
    of: str = "graph"

    def wrong(self, why: str) -> ConfigError:
        """What is wrong with it."""
        return ConfigError(f"line {self.number} of the {self.of}, '{self.text.strip()}': {why}")

    def python(self, text: str) -> ast.AST:
        """Part of it as Python reads it, where the value `%x` is the name `_x`."""
        try:
            return ast.parse(_VALUE.sub(lambda m: m[1] or f"_{m[2]}", text), mode="eval").body
        except SyntaxError as error:
            raise self.wrong(f"{text!r} cannot be read: {error.msg}") from error

    def argument(self, node: ast.AST, value_of: Callable[[str], Any], other: Callable[[ast.AST], Any] | None = None) -> Any:
        """An argument.

        Args:
            value_of: what `%x` stands for, given "x".
            other: what else there is; raises or gives None for nothing.
        """

        def value(node: ast.AST) -> Any:
            if other is not None and (found := other(node)) is not None:
                return found
            if isinstance(node, ast.Constant):
                return node.value
            if isinstance(node, ast.List):
                return [value(x) for x in node.elts]
            if isinstance(node, ast.Tuple):
                return tuple(value(x) for x in node.elts)
            if isinstance(node, ast.Dict):
                return {value(k): value(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
                return -value(node.operand)
            if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):  # a complex number
                return BINARY[type(node.op)](value(node.left), value(node.right))
            if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
                return float(node.id)
            if isinstance(node, ast.Name) and node.id.startswith("_") and len(node.id) > 1:
                return value_of(node.id[1:])
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                known = getattr(torch, node.attr, None)
                if isinstance(known, (torch.dtype, torch.layout, torch.memory_format)):
                    return known
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id == "slice":
                    return slice(*map(value, node.args))
                if node.func.id == "device":
                    return torch.device(*map(value, node.args), **{str(k.arg): value(k.value) for k in node.keywords})
            raise self.wrong(f"{_shown(node)!r} is no argument")

        return value(node)

    def literal(self, node: ast.AST) -> Any:
        """An argument without values."""

        def none(name: str) -> Any:
            raise self.wrong(f"%{name} cannot stand here")

        return self.argument(node, none)

    def call(self, text: str) -> ast.Call:
        """An operation and its arguments."""
        if not isinstance(call := self.python(text), ast.Call):
            raise self.wrong("an operation has its arguments in brackets, as in relu(%2)")
        return call

    def operation(self, text: str, value_of: Callable[[str], Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """An operation, its arguments, and those with a name."""
        call = self.call(text)
        target = self.target(ast.unparse(call.func))
        args = tuple(self.argument(a, value_of) for a in call.args)
        return target, args, {str(k.arg): self.argument(k.value, value_of) for k in call.keywords}

    def target(self, name: str) -> Any:
        """The operation of a name."""
        name = current(DIALECT, name, "the function")
        if name in dialect.FUNCTIONS:
            return dialect.FUNCTIONS[name]
        if name == "getitem":
            return operator.getitem
        first, *rest = name.split(".")
        if first == "higher_order":
            return getattr(torch.ops.higher_order, rest[0])
        if (found := _python_function(first, rest)) is not None:
            return found
        packet, overload = _packet(torch.ops.aten, first, rest)
        if packet is None and rest:
            packet, overload = _packet(getattr(torch.ops, first), rest[0], rest[1:])
        if packet is None:
            where = f"; if {first!r} is a package, import it first" if rest else ""
            raise self.wrong(f"there is no operation {name!r}{where}")
        overload = overload or plain_overload(packet)
        if overload not in packet.overloads():
            raise self.wrong(f"{name!r} has the forms {', '.join(packet.overloads())}")
        return getattr(packet, overload)


def _shown(node: ast.AST) -> str:
    return re.sub(r"\b_(\w+)", r"%\1", ast.unparse(node))


def _python_function(module: str, rest: Sequence[str]) -> Any:
    """A function on sizes."""
    if module not in _MODULES or len(rest) != 1 or (module == "torch" and not rest[0].startswith("sym_")):
        return None
    return getattr(_MODULES[module], rest[0], None)


def _packet(namespace: Any, name: str, rest: Sequence[str]) -> tuple[Any, str]:
    try:
        return getattr(namespace, name), ".".join(rest)
    except AttributeError:
        return None, ""
