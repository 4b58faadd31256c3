"""From text back to a graph: the inverse of `dump`.

Operations are found by name; what each computes is worked out from the types of the inputs, so the types of other lines may be
left out, and those that stand there are checked. Python functions other than the dialect's and those of `operator` and `math`
are not called by name: an operation of one's own is a `torch.library` op, whose package has been imported.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from vdcache.ir import dialect
from vdcache.ir.capture import Signature
from vdcache.ir.dump import DTYPES, Symbols, plain_overload, type_of
from vdcache.ir.errors import ConfigError
from vdcache.ir.fakes import Fakes

__all__ = ["parse"]

_LINE = re.compile(r"%(\d+) = (.*)")
_TYPED = re.compile(r"(.*) : ([^']*|'[^']*')")
_TENSOR = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?(?:@([\w:]+))?")
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS = {
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}
_MODULES = {"operator": operator, "math": math, "torch": torch}


def parse(text: str, constants: Mapping[str, torch.Tensor] | None = None) -> fx.GraphModule:
    """The graph that prints as `text`, ready to run.

    Args:
        text: what `dump` wrote, or lines written by hand; blank lines and those that start with "#" are passed over.
        constants: the values of constants that are too large for the text. Others get stand-ins by their name: small random
            numbers, and zeros for whole numbers and masks.

    Raises:
        ConfigError: a line that is no operation, does not fit its inputs, or says another type than it has.
    """
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")]
    reader = _Reader(Fakes(), dict(constants or {}))
    if lines and lines[0][1].startswith("sizes "):
        reader.read_sizes(*lines.pop(0))
    return reader.graph(lines)


class _Reader:
    def __init__(self, fakes: Fakes, constants: dict[str, torch.Tensor]) -> None:
        self._fakes, self._constants = fakes, constants
        self._sizes: dict[str, Any] = {}
        self._symbols = Symbols()

    def read_sizes(self, number: int, line: str) -> None:
        """The symbols of sizes."""
        for part in line.removeprefix("sizes ").split(","):
            name, equals, value = part.strip().partition("=")
            if not (equals and value.strip().isdigit() and int(value) > 1):
                raise _wrong(number, line, "a symbol of a size is given as s0=6, with a number above 1")
            self._sizes[name] = self._fakes.symbol(name, int(value))

    def graph(self, lines: Sequence[tuple[int, str]]) -> fx.GraphModule:
        graph, root = fx.Graph(), torch.nn.Module()
        nodes: dict[int, fx.Node] = {}
        values: dict[fx.Node, Any] = {}
        static, rows = set(), iter(lines)
        mutations: tuple[tuple[int, int], ...] = ()
        held: dict[str, Any] = {}
        returned = False
        for number, full in rows:
            line = full.strip()
            if returned:
                raise _wrong(number, line, "nothing follows what the graph returns")
            if line.startswith("return"):
                results, mutations = _results(number, line, nodes)
                graph.output(results)
                returned = True
                continue
            if (found := _LINE.fullmatch(line)) is None:
                raise _wrong(number, line, "a line is '%3 = relu(%2) : f32[2,4]', with a number, an operation and a type")
            index, rest = int(found[1]), found[2]
            if index in nodes:
                raise _wrong(number, line, f"%{index} is there already")
            call, type_text = (m[1], m[2]) if (m := _TYPED.fullmatch(rest)) else (rest, "")
            if call in ("input()", "parameter()"):
                at = len(graph.find_nodes(op="placeholder"))
                node = graph.placeholder(f"arg{at}_1")
                value = self._input(number, line, type_text)
                if call == "parameter()":
                    static.add(at)
            elif block := re.fullmatch(r"graph\('([^']+)'\) \{", call):
                inner = []
                for row in rows:
                    if row[1].rstrip() == full[: len(full) - len(full.lstrip())] + "}":
                        break
                    inner.append(row)
                held[block[1]] = value = self.graph(inner)
                node = graph.get_attr(block[1])
            elif call.startswith("constant("):
                name, tensor = self._constant(number, line, call, type_text)
                held[name] = tensor
                node, value = graph.get_attr(name), self._fakes.like(tensor)
            else:
                node, value = self._call(number, line, call, graph, nodes, values)
            nodes[index], values[node] = node, value
            if isinstance(value, fx.GraphModule) or type_text.strip() == "?":
                continue  # a graph has no value, and a dump that says "?" knows none
            node.meta["val"] = value
            if type_text and not call.endswith("put()") and not call.startswith("constant("):
                self._check(number, line, value, type_text)
        if not returned:
            raise ConfigError("the text of a graph ends with what it returns: return (%4)")
        result = fx.GraphModule({**held} if held else root, graph)
        outputs = graph.output_node().args[0]
        many = len(outputs) if isinstance(outputs, (tuple, list)) else 1
        result.meta["vdcache"] = Signature(mutations, many - len(mutations), frozenset(static))
        return result

    def _input(self, number: int, line: str, text: str) -> Any:
        """The fake value of an input."""
        if not text:
            raise _wrong(number, line, "an input says its type, as in '%0 = input() : f32[2,4]'")
        if text.startswith("sym["):
            return self._size(number, line, text[4:-1])
        if not _TENSOR.fullmatch(text):
            try:
                return None if text == "?" else ast.literal_eval(text)
            except (ValueError, SyntaxError) as error:
                raise _wrong(number, line, f"{text!r} is no type: f32[2,4], sym[s0] or a number") from error
        return self._fakes.tensor(*self._tensor_type(number, line, text))

    def _tensor_type(self, number: int, line: str, text: str) -> tuple[list[Any], list[Any] | None, torch.dtype, str]:
        if (found := _TENSOR.fullmatch(text)) is None:
            raise _wrong(number, line, f"{text!r} is no type of a tensor, as f32[2,4] is")
        dtype = DTYPES.get(found[1]) or getattr(torch, found[1], None)
        if not isinstance(dtype, torch.dtype):
            raise _wrong(number, line, f"there is no dtype {found[1]!r}; there are {', '.join(DTYPES)}")
        sizes = [self._size(number, line, s) for s in _parts(found[2])]
        strides = None if found[3] is None else [self._size(number, line, s) for s in _parts(found[3])]
        return sizes, strides, dtype, found[4] or "cpu"

    def _size(self, number: int, line: str, text: str) -> Any:
        """A size: a number, a symbol, or what is computed from symbols."""

        def value(node: ast.AST) -> Any:
            if isinstance(node, ast.Constant) and isinstance(node.value, int):
                return node.value
            if isinstance(node, ast.Name) and node.id in self._sizes:
                return self._sizes[node.id]
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
                return -value(node.operand)
            if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
                return _BINARY[type(node.op)](value(node.left), value(node.right))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
                return _FUNCTIONS[node.func.id](*map(value, node.args))
            raise _wrong(number, line, f"the size {text!r} is no number, and no symbol that 'sizes' names on the first line")

        return value(_python(number, line, text))

    def _constant(self, number: int, line: str, call: str, text: str) -> tuple[str, torch.Tensor]:
        given = _python(number, line, call)
        assert isinstance(given, ast.Call)
        name, *rest = (_literal(number, line, a) for a in given.args)
        sizes, strides, dtype, device = self._tensor_type(number, line, text)
        if name in self._constants:
            value = self._constants[name]
            if list(value.shape) != sizes or value.dtype != dtype:
                raise _wrong(number, line, f"the constant that was given is {type_of(value)}")
            return name, value
        if rest:
            return name, torch.tensor(rest[0], dtype=dtype, device=device).reshape(sizes)
        if dtype.is_floating_point or dtype.is_complex:
            seed = torch.Generator().manual_seed(sum(map(ord, name)))
            value = (0.1 * torch.randn(sizes, generator=seed)).to(dtype=dtype, device=device)
        else:
            value = torch.zeros(sizes, dtype=dtype, device=device)
        if strides is not None:
            value = torch.empty_strided(sizes, strides, dtype=dtype, device=device).copy_(value)
        return name, value

    def _call(
        self, number: int, line: str, text: str, graph: fx.Graph, nodes: dict[int, fx.Node], values: dict[fx.Node, Any]
    ) -> tuple[fx.Node, Any]:
        """A node that calls an operation, and what it gives for fake values."""
        call = _python(number, line, _named(text))
        if not isinstance(call, ast.Call):
            raise _wrong(number, line, "an operation has its arguments in brackets, as in relu(%2)")

        def argument(node: ast.AST) -> Any:
            return _literal(number, line, node, nodes)

        target = _target(number, line, ast.unparse(call.func))
        args = tuple(map(argument, call.args))
        named = {str(k.arg): argument(k.value) for k in call.keywords}
        name = target._overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else None
        node = graph.create_node("call_function", target, args, named, name=name)
        given, by_name = pytree.tree_map(
            lambda x: values[x] if isinstance(x, fx.Node) else x, (args, named), is_leaf=lambda x: isinstance(x, fx.Node)
        )
        try:
            with torch.no_grad(), self._fakes.mode:
                value = target(*given, **by_name)
        except Exception as error:
            raise _wrong(number, line, f"{text.partition('(')[0]} does not take this: {str(error).strip()[:300]}") from error
        return node, value

    def _check(self, number: int, line: str, value: Any, text: str) -> None:
        """Compare the type that a line says with the one that its operation gives."""
        for name, size in self._sizes.items():  # by the names of the text, whatever torch calls them
            self._symbols.name(size, name)
        is_plain = isinstance(value, (bool, int, float, str))
        found = repr(value) if is_plain else type_of(value, self._symbols)
        if found != text.replace("torch.", "") and not (is_plain and text == "?"):
            raise _wrong(number, line, f"it gives {found}")


def _wrong(number: int, line: str, why: str) -> ConfigError:
    return ConfigError(f"line {number} of the graph, '{line.strip()}': {why}")


def _named(text: str) -> str:
    """`%4` as a name that Python can read, except in quotes."""
    return re.sub(r"('(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\")|%(\d+)", lambda m: m[1] or f"_node_{m[2]}", text)


def _python(number: int, line: str, text: str) -> ast.AST:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise _wrong(number, line, f"{text!r} cannot be read: {error.msg}") from error


def _parts(text: str) -> list[str]:
    """What commas part, outside brackets."""
    depth, parts = 0, [""]
    for c in text:
        depth += (c in "([") - (c in ")]")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def _literal(number: int, line: str, node: ast.AST, nodes: dict[int, fx.Node] | None = None) -> Any:
    """An argument."""

    def value(node: ast.AST) -> Any:
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
            return _BINARY[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
            return float(node.id)
        if isinstance(node, ast.Name) and (found := re.fullmatch(r"_node_(\d+)", node.id)):
            if nodes is None or int(found[1]) not in nodes:
                raise _wrong(number, line, f"%{found[1]} is not computed before this line")
            return nodes[int(found[1])]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            known = getattr(torch, node.attr, None)
            if isinstance(known, (torch.dtype, torch.layout, torch.memory_format)):
                return known
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "slice":
                return slice(*map(value, node.args))
            if node.func.id == "device":
                return torch.device(*map(value, node.args), **{str(k.arg): value(k.value) for k in node.keywords})
        raise _wrong(number, line, f"{ast.unparse(node)!r} is no argument")

    return value(node)


def _target(number: int, line: str, name: str) -> Any:
    """The operation of a name."""
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
        raise _wrong(number, line, f"there is no operation {name!r}{where}")
    overload = overload or plain_overload(packet)
    if overload not in packet.overloads():
        raise _wrong(number, line, f"{name!r} has the forms {', '.join(packet.overloads())}")
    return getattr(packet, overload)


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


def _results(number: int, line: str, nodes: dict[int, fx.Node]) -> tuple[Any, tuple[tuple[int, int], ...]]:
    """What the graph returns, and which of it is written back into which input."""
    text = line.removeprefix("return").strip()
    if not text.startswith("("):
        return _literal(number, line, _python(number, line, _named(text)), nodes), ()
    values, mutations = [], []
    given = [n for n in nodes.values() if n.op == "placeholder"]
    for part in _parts(text[1:-1]):
        value, arrow, into = (p.strip() for p in part.partition("->"))
        values.append(_literal(number, line, _python(number, line, _named(value)), nodes))
        if arrow:
            node = _literal(number, line, _python(number, line, _named(into)), nodes)
            if node not in given:
                raise _wrong(number, line, f"'->' points at an input, and {into} is none")
            mutations.append((len(values) - 1, given.index(node)))
    return tuple(values), tuple(mutations)
