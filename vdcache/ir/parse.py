"""From text back to a graph: the inverse of `dump`.

Operations are found by name; what each computes is worked out from the types of the inputs, so the types of other lines may be
left out, and those that stand there are checked. Python functions other than the dialect's and those of `operator` and `math`
are not called by name: an operation of one's own is a `torch.library` op, whose package has been imported.
"""

from __future__ import annotations

import ast
import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from vdcache.errors import ConfigError
from vdcache.ir.capture import Signature
from vdcache.ir.dump import DTYPES, Symbols, type_of
from vdcache.ir.fakes import Fakes
from vdcache.ir.tokens import BINARY, Line, lines_of, parts

__all__ = ["parse"]

_LINE = re.compile(r"%(\d+) = (.*)")
_TYPED = re.compile(r"(.*) : ([^']*|'[^']*')")
_TENSOR = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?(?:@([\w:]+))?")
_FUNCTIONS = {
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}


def parse(text: str, constants: Mapping[str, torch.Tensor] | None = None) -> fx.GraphModule:
    """The graph that prints as `text`, ready to run.

    Args:
        text: what `dump` wrote, or lines written by hand; blank lines and those that start with "#" are passed over.
        constants: the values of constants that are too large for the text. Others get stand-ins by their name: small random
            numbers, and zeros for whole numbers and masks.

    Raises:
        ConfigError: a line that is no operation, does not fit its inputs, or says another type than it has.
    """
    lines = lines_of(text, "graph")
    reader = _Reader(Fakes(), dict(constants or {}))
    if lines and lines[0].text.startswith("sizes "):
        reader.read_sizes(lines.pop(0))
    return reader.graph(lines)


class _Reader:
    def __init__(self, fakes: Fakes, constants: dict[str, torch.Tensor]) -> None:
        self._fakes, self._constants = fakes, constants
        self._sizes: dict[str, Any] = {}
        self._symbols = Symbols()

    def read_sizes(self, line: Line) -> None:
        """The symbols of sizes."""
        for part in line.text.removeprefix("sizes ").split(","):
            name, equals, value = part.strip().partition("=")
            if not (equals and value.strip().isdigit() and int(value) > 1):
                raise line.wrong("a symbol of a size is given as s0=6, with a number above 1")
            self._sizes[name] = self._fakes.symbol(name, int(value))

    def graph(self, lines: Sequence[Line]) -> fx.GraphModule:
        graph, root = fx.Graph(), torch.nn.Module()
        nodes: dict[int, fx.Node] = {}
        values: dict[fx.Node, Any] = {}
        static, rows = set(), iter(lines)
        mutations: tuple[tuple[int, int], ...] = ()
        held: dict[str, Any] = {}
        returned = False
        for line in rows:
            text = line.text.strip()
            if returned:
                raise line.wrong("nothing follows what the graph returns")
            if text.startswith("return"):
                results, mutations = _results(line, nodes)
                graph.output(results)
                returned = True
                continue
            if (found := _LINE.fullmatch(text)) is None:
                raise line.wrong("a line is '%3 = relu(%2) : f32[2,4]', with a number, an operation and a type")
            index, rest = int(found[1]), found[2]
            if index in nodes:
                raise line.wrong(f"%{index} is there already")
            call, type_text = (m[1], m[2]) if (m := _TYPED.fullmatch(rest)) else (rest, "")
            if call in ("input()", "parameter()"):
                at = len(graph.find_nodes(op="placeholder"))
                node = graph.placeholder(f"arg{at}_1")
                value = self._input(line, type_text)
                if call == "parameter()":
                    static.add(at)
            elif block := re.fullmatch(r"graph\('([^']+)'\) \{", call):
                end = line.text[: len(line.text) - len(line.text.lstrip())] + "}"
                inner = itertools.takewhile(lambda row, end=end: row.text.rstrip() != end, rows)  # type: ignore[misc]
                held[block[1]] = value = self.graph(list(inner))
                node = graph.get_attr(block[1])
            elif call.startswith("constant("):
                name, tensor = self._constant(line, call, type_text)
                held[name] = tensor
                node, value = graph.get_attr(name), self._fakes.like(tensor)
            else:
                node, value = self._call(line, call, graph, nodes, values)
            nodes[index], values[node] = node, value
            if isinstance(value, fx.GraphModule) or type_text.strip() == "?":
                continue  # a graph has no value, and a dump that says "?" knows none
            node.meta["val"] = value
            if type_text and not call.endswith("put()") and not call.startswith("constant("):
                self._check(line, value, type_text)
        if not returned:
            raise ConfigError("the text of a graph ends with what it returns: return (%4)")
        result = fx.GraphModule({**held} if held else root, graph)
        outputs = graph.output_node().args[0]
        many = len(outputs) if isinstance(outputs, (tuple, list)) else 1
        result.meta["vdcache"] = Signature(mutations, many - len(mutations), frozenset(static))
        return result

    def _input(self, line: Line, text: str) -> Any:
        """The fake value of an input."""
        if not text:
            raise line.wrong("an input says its type, as in '%0 = input() : f32[2,4]'")
        if text.startswith("sym["):
            return self._size(line, text[4:-1])
        if not _TENSOR.fullmatch(text):
            try:
                return None if text == "?" else ast.literal_eval(text)
            except (ValueError, SyntaxError) as error:
                raise line.wrong(f"{text!r} is no type: f32[2,4], sym[s0] or a number") from error
        return self._fakes.tensor(*self._tensor_type(line, text))

    def _tensor_type(self, line: Line, text: str) -> tuple[list[Any], list[Any] | None, torch.dtype, str]:
        if (found := _TENSOR.fullmatch(text)) is None:
            raise line.wrong(f"{text!r} is no type of a tensor, as f32[2,4] is")
        dtype = DTYPES.get(found[1]) or getattr(torch, found[1], None)
        if not isinstance(dtype, torch.dtype):
            raise line.wrong(f"there is no dtype {found[1]!r}; there are {', '.join(DTYPES)}")
        sizes = [self._size(line, s) for s in parts(found[2])]
        strides = None if found[3] is None else [self._size(line, s) for s in parts(found[3])]
        return sizes, strides, dtype, found[4] or "cpu"

    def _size(self, line: Line, text: str) -> Any:
        """A size: a number, a symbol, or what is computed from symbols."""

        def value(node: ast.AST) -> Any:
            if isinstance(node, ast.Constant) and isinstance(node.value, int):
                return node.value
            if isinstance(node, ast.Name) and node.id in self._sizes:
                return self._sizes[node.id]
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
                return -value(node.operand)
            if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
                return BINARY[type(node.op)](value(node.left), value(node.right))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
                return _FUNCTIONS[node.func.id](*map(value, node.args))
            raise line.wrong(f"the size {text!r} is no number, and no symbol that 'sizes' names on the first line")

        return value(line.python(text))

    def _constant(self, line: Line, call: str, text: str) -> tuple[str, torch.Tensor]:
        name, *rest = (line.literal(a) for a in line.call(call).args)
        sizes, strides, dtype, device = self._tensor_type(line, text)
        if name in self._constants:
            value = self._constants[name]
            if list(value.shape) != sizes or value.dtype != dtype:
                raise line.wrong(f"the constant that was given is {type_of(value)}")
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
        self, line: Line, text: str, graph: fx.Graph, nodes: dict[int, fx.Node], values: dict[fx.Node, Any]
    ) -> tuple[fx.Node, Any]:
        """A node that calls an operation, and what it gives for fake values."""
        target, args, named = line.operation(text, _among(line, nodes))
        name = target._overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else None
        node = graph.create_node("call_function", target, args, named, name=name)
        given, by_name = pytree.tree_map(
            lambda x: values[x] if isinstance(x, fx.Node) else x, (args, named), is_leaf=lambda x: isinstance(x, fx.Node)
        )
        try:
            with torch.no_grad(), self._fakes.mode:
                value = target(*given, **by_name)
        except Exception as error:
            raise line.wrong(f"{text.partition('(')[0]} does not take this: {str(error).strip()[:300]}") from error
        return node, value

    def _check(self, line: Line, value: Any, text: str) -> None:
        """Compare the type that a line says with the one that its operation gives."""
        for name, size in self._sizes.items():  # by the names of the text, whatever torch calls them
            self._symbols.name(size, name)
        is_plain = isinstance(value, (bool, int, float, str))
        found = repr(value) if is_plain else type_of(value, self._symbols)
        if found != text.replace("torch.", "") and not (is_plain and text == "?"):
            raise line.wrong(f"it gives {found}")


def _among(line: Line, nodes: dict[int, fx.Node]) -> Callable[[str], fx.Node]:
    """The node of a number that stands in a line."""

    def node(name: str) -> fx.Node:
        if not name.isdigit() or int(name) not in nodes:
            raise line.wrong(f"%{name} is not computed before this line")
        return nodes[int(name)]

    return node


def _results(line: Line, nodes: dict[int, fx.Node]) -> tuple[Any, tuple[tuple[int, int], ...]]:
    """What the graph returns, and which of it is written back into which input."""
    text = line.text.strip().removeprefix("return").strip()
    if not text.startswith("("):
        return line.argument(line.python(text), _among(line, nodes)), ()
    values, mutations = [], []
    given = [n for n in nodes.values() if n.op == "placeholder"]
    for part in parts(text[1:-1]):
        value, arrow, into = (p.strip() for p in part.partition("->"))
        values.append(line.argument(line.python(value), _among(line, nodes)))
        if arrow:
            node = line.argument(line.python(into), _among(line, nodes))
            if node not in given:
                raise line.wrong(f"'->' points at an input, and {into} is none")
            mutations.append((len(values) - 1, given.index(node)))
    return tuple(values), tuple(mutations)
