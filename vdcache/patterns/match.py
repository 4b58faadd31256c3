"""Patterns of operations, written as the text of a graph: for what structure alone does not say.

    %1 = linear(%x, %up, ...)
    %2 = gelu|silu(%1, ...)
    %3 = linear(~%2, %down, ...)

A line stands for an operation; what no line defines (`%x`) stands for any value, at every place for the same. The last line is the one
that is matched. Nothing is traced and no size is burned in.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from vdcache.errors import ConfigError, ContractError
from vdcache.ir.capture import signature
from vdcache.ir.dump import name_of_op
from vdcache.ir.ops import CASTS, VIEWS
from vdcache.ir.tokens import Line, lines_of
from vdcache.patterns.facts import Refusal

__all__ = ["Match", "Pattern"]

aten = torch.ops.aten
_LINE = re.compile(r"%(\w+) = ([\w.|]+)(\(.*\))")
_EITHER_ORDER = (aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default)
_SOURCES = ("input", "parameter", "constant")  # what comes from outside, by what `dump` calls it


@dataclass(frozen=True)
class Match:
    """Where a pattern stands in a graph. It holds nodes, so it is good until the graph changes, and says so afterwards.

    Args:
        root: the node of the pattern's last line.
        values: by name, a node for every line, and whatever stands for the values that no line defines.
        inside: the nodes of the lines, and the casts and views between them, in the order of the graph.
    """

    root: fx.Node
    values: Mapping[str, Any] = field(repr=False)
    inside: tuple[fx.Node, ...] = field(repr=False)
    _seen: tuple[tuple[Any, ...], ...] = field(repr=False, compare=False)

    def __getitem__(self, name: str) -> Any:
        """What `%name` stands for: a node, or the number or list that is written there.

        Raises:
            ConfigError: a name that the pattern has not.
            ContractError: the graph has changed since.
        """
        self.check()
        if (key := name.removeprefix("%")) not in self.values:
            raise ConfigError(f"the pattern has no value %{key}; it has {', '.join(f'%{n}' for n in self.values)}")
        return self.values[key]

    @property
    def leaks(self) -> tuple[tuple[fx.Node, fx.Node], ...]:
        """Values inside that something else reads, each with its first such reader: they cannot be left out."""
        self.check()
        own = set(self.inside)
        outside = ((n, next((u for u in n.users if u not in own), None)) for n in self.inside if n is not self.root)
        return tuple((n, user) for n, user in outside if user is not None)

    def check(self) -> None:
        """Raise ContractError where the graph is no longer what was matched."""
        for node, *was in self._seen:
            if was != [node.target, node.args, node.kwargs]:
                raise ContractError(
                    f"'{node.name}' has changed since '{self.root.name}' was matched; a match does not outlive a change: match again"
                )


@dataclass(frozen=True)
class Pattern:
    """Operations as text.

        %1 = mul|div(%x, 0.5)       one of several operations, one number
        %2 = linear(~%1, %w, ...)   ~ sees through casts and views; ... takes any further arguments
        %3 = cat([%2, _], 1)        _ is any argument, given or not

    Arguments are compared by the operation's schema, in any spelling; one that a line does not give must have its default. Both orders
    of `add`, `mul`, `maximum` and `minimum` are tried. `%w = parameter()` and `%x = input()` are inputs of the graph. Patterns are joined
    by `|`: the first that matches counts.

    Args:
        text: the lines.

    Raises:
        ConfigError: a line that cannot be read, an operation that is none, a line that nothing uses.
    """

    text: str

    def __post_init__(self) -> None:
        self._alternatives  # noqa: B018 — what is wrong with the text is said when the pattern is made

    def __or__(self, other: Pattern) -> Pattern:
        return Pattern(f"{self.text}\n|\n{other.text}")

    @property
    def names(self) -> frozenset[str]:
        """The values that every match has."""
        return frozenset.intersection(*(a.names for a in self._alternatives))

    def match(self, node: fx.Node) -> Match | Refusal:
        """The match whose last line is `node`, or how far one came and what was in the way."""
        best = Refusal(node.name)
        for alternative in self._alternatives:
            search = _Search(alternative)
            if isinstance(found := search.at(node), Match):
                return found
            best = found if not best.reason or found.depth > best.depth else best
        return best

    def find(self, graph: fx.GraphModule, within: Iterable[str] | None = None) -> Iterator[Match]:
        """All matches in the order of the graph. It may be changed between two: each is looked for when it is asked for, and what
        was added is not looked at.

        Args:
            within: names of the nodes that may be inside a match, such as `branch.nodes`; any without.
        """
        own = None if within is None else set(within)
        nodes = list(graph.graph.nodes)
        alive = set(nodes)
        for node in nodes:
            if node in alive and isinstance(found := self.match(node), Match):
                if own is not None and not own.issuperset(n.name for n in found.inside):
                    continue
                yield found
                alive = set(graph.graph.nodes)

    def closest(self, graph: fx.GraphModule) -> Refusal:
        """What came nearest to a match, and what was in the way: for whoever wonders why a pattern finds nothing."""
        computed = {n.name for n in graph.graph.nodes if n.op == "call_function"}
        tried = [found for n in graph.graph.nodes if isinstance(found := self.match(n), Refusal)]
        best = max(tried, key=lambda found: (found.depth, found.node in computed), default=Refusal("", "the graph is empty"))
        if best.depth:
            return best
        roots = sorted({name_of_op(t) for a in self._alternatives for t in a.lines[a.root].targets if not isinstance(t, str)})
        return Refusal("", f"the graph has no {' or '.join(roots)}")

    @cached_property
    def _alternatives(self) -> tuple[_Lines, ...]:
        texts = re.split(r"(?m)^\s*\|\s*$", self.text)
        return tuple(_Lines.read(text) for text in texts)


@dataclass(frozen=True)
class _Value:
    """A value of the pattern; seen `through` casts and views."""

    name: str
    through: bool = False


_ANY, _REST = object(), object()


@dataclass(frozen=True)
class _Operation:
    """One line."""

    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    named: dict[str, Any]
    open: bool


@dataclass(frozen=True)
class _Lines:
    """The lines of one alternative by name; the last one is the root."""

    lines: dict[str, _Operation]
    names: frozenset[str]

    @property
    def root(self) -> str:
        return next(reversed(self.lines))

    @staticmethod
    def read(text: str) -> _Lines:
        lines: dict[str, _Operation] = {}
        used: set[str] = set()
        rows = lines_of(text, "pattern")
        if not rows:
            raise ConfigError("a pattern has at least one line, as '%1 = relu(%x)' is one")
        for row in rows:
            if (found := _LINE.fullmatch(row.text.strip())) is None:
                raise row.wrong("a line is '%3 = gelu|silu(%2, ...)': a name, operations and their arguments")
            name, operations, arguments = found.groups()
            if name in lines or name in used:
                raise row.wrong(f"%{name} is {'there already' if name in lines else 'used before this line'}")
            lines[name] = _operation(row, operations.split("|"), arguments, used)
        names = list(lines)
        if loose := [n for n in names[:-1] if n not in used]:
            raise rows[names.index(loose[0])].wrong(f"nothing uses %{loose[0]}; the last line is the one that is matched")
        return _Lines(lines, frozenset(used | set(names)))


def _operation(row: Line, operations: Sequence[str], arguments: str, used: set[str]) -> _Operation:
    def value(name: str) -> _Value:
        used.add(name)
        return _Value(name)

    def other(node: ast.AST) -> Any:
        if isinstance(node, ast.Name) and node.id == "_":
            return _ANY
        if isinstance(node, ast.Constant) and node.value is ...:
            return _REST
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            inner = row.argument(node.operand, value)
            if not isinstance(inner, _Value):
                raise row.wrong("~ stands before a value, as in ~%2")
            return _Value(inner.name, through=True)
        return None

    call = row.call(f"_{arguments}")
    args = [row.argument(a, value, other) for a in call.args]
    named = {str(k.arg): row.argument(k.value, value, other) for k in call.keywords}
    is_open = bool(args) and args[-1] is _REST
    args = args[:-1] if is_open else args
    if _REST in args or _REST in named.values():
        raise row.wrong("... is the last of the arguments without a name")
    targets = tuple(o if o in _SOURCES else row.target(o) for o in operations)
    for target in targets:
        if isinstance(target, str) and (args or named or is_open):
            raise row.wrong(f"{target}() has no arguments")
        known = _parameters(target)
        if known is not None and (len(args) > len(known) or not named.keys() <= known.keys()):
            raise row.wrong(f"{name_of_op(target)} takes {', '.join(known) or 'nothing'}")
    return _Operation(targets, tuple(args), named, is_open)


def _parameters(target: Any) -> dict[str, Any] | None:
    """The arguments of an operation in order, with their defaults (`_ANY` for none); None where nobody knows."""
    if isinstance(target, torch._ops.OpOverload):
        return {a.name: a.default_value if a.has_default_value() else _ANY for a in target._schema.arguments}
    try:
        given = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in given):
        return None
    return {p.name: _ANY if p.default is p.empty else p.default for p in given}


@dataclass(frozen=True)
class _Bound:
    """What the values of a pattern stand for so far, and the casts and views that were seen through."""

    values: dict[str, Any]
    between: frozenset[fx.Node] = frozenset()

    def put(self, name: str, value: Any, over: Sequence[Any] = ()) -> _Bound:
        return _Bound({**self.values, name: value}, self.between | frozenset(over))


class _Search:
    """Tries to lay the lines over nodes, from the last one upwards, and remembers what came farthest."""

    def __init__(self, pattern: _Lines) -> None:
        self._lines, self._root = pattern.lines, pattern.root
        self._depth, self._failed = -1, Refusal("")

    def at(self, node: fx.Node) -> Match | Refusal:
        bound = next(self._line(self._root, node, _Bound({})), None)
        if bound is None:
            return self._failed
        own = {bound.values[name] for name in self._lines} | bound.between
        inside = tuple(n for n in node.graph.nodes if n in own and n.op == "call_function")
        return Match(node, bound.values, inside, tuple((n, n.target, n.args, n.kwargs) for n in inside))

    def _fail(self, node: fx.Node, bound: _Bound, reason: str) -> None:
        depth = sum(name in self._lines for name in bound.values)
        if depth > self._depth:
            self._depth, self._failed = depth, Refusal(node.name, reason, depth=depth)

    def _line(self, name: str, node: fx.Node, bound: _Bound) -> Iterator[_Bound]:
        """Every way to let a line stand for a node."""
        line = self._lines[name]
        target = node.target if node.op == "call_function" else _kind(node)
        if target not in line.targets:
            wanted = "|".join(t if isinstance(t, str) else name_of_op(t) for t in line.targets)
            found = target if isinstance(target, str) else name_of_op(target)
            self._fail(node, bound, f"is {found}, where %{name} is {wanted}")
            return
        bound = bound.put(name, node)
        if node.op != "call_function":
            yield bound
            return
        for args in _orders(node):
            if (pairs := self._pairs(line, node, args, bound)) is not None:
                yield from self._all(node, pairs, bound)

    def _pairs(self, line: _Operation, node: fx.Node, args: Sequence[Any], bound: _Bound) -> list[tuple[str, Any, Any]] | None:
        """(what it is called, in the pattern, in the graph) of every argument that must be compared."""
        known = _parameters(node.target)
        if known is None:
            if len(args) < len(line.args) or (len(args) > len(line.args) and not line.open):
                self._fail(node, bound, f"has {len(args)} arguments, not {len(line.args)}")
                return None
            return [(f"argument {i}", p, a) for i, (p, a) in enumerate(zip(line.args, args, strict=False), 1)]
        actual = {**known, **dict(zip(known, args, strict=False)), **node.kwargs}
        wanted = {**dict(zip(known, line.args, strict=False)), **line.named}
        for name in known:
            if not line.open and name not in wanted and not _same(actual[name], known[name]):
                self._fail(node, bound, f"has {name}={_text(actual[name])}, which the pattern does not give ('...' takes any)")
                return None
        return [(name, p, None if actual[name] is _ANY else actual[name]) for name, p in wanted.items()]

    def _all(self, node: fx.Node, pairs: Sequence[tuple[str, Any, Any]], bound: _Bound) -> Iterator[_Bound]:
        if not pairs:
            yield bound
            return
        (what, pattern, actual), *rest = pairs
        for found in self._value(node, what, pattern, actual, bound):
            yield from self._all(node, rest, found)

    def _value(self, node: fx.Node, what: str, pattern: Any, actual: Any, bound: _Bound) -> Iterator[_Bound]:
        if pattern is _ANY:
            yield bound
        elif isinstance(pattern, _Value):
            yield from self._named(node, what, pattern, actual, bound)
        elif isinstance(pattern, (list, tuple)) and isinstance(actual, (list, tuple)):
            is_open = bool(pattern) and pattern[-1] is _REST
            items = pattern[:-1] if is_open else pattern
            if len(actual) < len(items) or (len(actual) > len(items) and not is_open):
                self._fail(node, bound, f"has {len(actual)} values in {what}, not {len(items)}")
                return
            pairs = [(f"{what}[{i}]", p, a) for i, (p, a) in enumerate(zip(items, actual, strict=False))]
            yield from self._all(node, pairs, bound)
        elif _same(actual, pattern):
            yield bound
        else:
            self._fail(node, bound, f"has {what}={_text(actual)}, not {_text(pattern)}")

    def _named(self, node: fx.Node, what: str, wanted: _Value, actual: Any, bound: _Bound) -> Iterator[_Bound]:
        """Every way to let `%name` stand for an argument."""
        name = wanted.name
        chain = _chain(actual) if wanted.through else [actual]
        if name in bound.values:
            at = next((i for i, a in enumerate(chain) if _same(a, bound.values[name])), None)
            if at is None:
                self._fail(node, bound, f"has {what}={_text(actual)}; %{name} is {_text(bound.values[name])} already")
            else:
                yield bound.put(name, chain[at], over=chain[:at])
        elif name in self._lines:
            if not isinstance(actual, fx.Node):
                self._fail(node, bound, f"has {what}={_text(actual)}; %{name} is computed")
                return
            for at, candidate in enumerate(chain):
                if candidate is not chain[-1] and candidate.target not in self._lines[name].targets:
                    continue  # the end of the chain says what is in the way
                yield from self._line(name, candidate, _Bound(bound.values, bound.between | frozenset(chain[:at])))
        elif actual is None:
            self._fail(node, bound, f"has no {what}, where %{name} stands")
        else:
            yield bound.put(name, chain[-1], over=chain[:-1])


def _kind(node: fx.Node) -> str:
    """What `dump` calls what comes from outside."""
    if node.op != "placeholder":
        return "constant"
    graph = node.graph.owning_module
    static = signature(graph).static if graph is not None else frozenset()
    return "parameter" if node.graph.find_nodes(op="placeholder").index(node) in static else "input"


def _orders(node: fx.Node) -> list[tuple[Any, ...]]:
    """The arguments in every order that means the same."""
    args = tuple(node.args)
    swaps = node.target in _EITHER_ORDER and len(args) == 2 and node.kwargs.get("alpha", 1) == 1
    return [args, args[::-1]] if swaps else [args]


def _chain(value: Any) -> list[Any]:
    """`value`, and what it repeats but for type and shape."""
    chain = [value]
    while (
        isinstance(at := chain[-1], fx.Node) and (at.target in CASTS or at.target in VIEWS) and isinstance(at.args[0], fx.Node)
    ):
        chain.append(at.args[0])
    return chain


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _text(value: Any) -> str:
    return f"'{value.name}'" if isinstance(value, fx.Node) else repr(value)
