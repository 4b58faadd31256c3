"""A pass written as two texts: a pattern, and what takes its place."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from vdcache.errors import ConfigError, ContractError
from vdcache.ir.dump import name_of_op, type_of
from vdcache.ir.edit import call
from vdcache.ir.ops import communicates, is_effectful, same_type
from vdcache.ir.tokens import Line, lines_of
from vdcache.passes.base import Pass, PassResult, Refusal
from vdcache.patterns.match import Match, Pattern

__all__ = ["Rewrite"]


@dataclass(frozen=True)
class Rewrite(Pass):
    """Put other operations in the place of a pattern.

        @dataclass(frozen=True)
        class SiluOnce(Rewrite):
            \"\"\"silu-once: x · sigmoid(x) is silu(x).\"\"\"

            name = "silu-once"
            before = '''
            %1 = sigmoid(%x)
            %2 = mul(%x, %1)'''
            after = "%1 = silu(%x)"

    `after` is written like a graph; it may use every value of the pattern, its last line takes the place of the pattern's, and a
    single `%x` puts that value there. What nothing reads any more goes; a value inside that something else reads stays. Refused: a
    replacement that cannot be computed or has another shape, dtype or device, an effect in either (random numbers, writes), and what
    `why_not` says.

    Raises:
        ConfigError: when the class is made: a text that cannot be read, or a value in `after` that `before` has not.
    """

    before: ClassVar[str]
    after: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "before" in vars(cls) or "after" in vars(cls):
            if missing := [n for n in ("name", "before", "after") if not isinstance(getattr(cls, n, None), str)]:
                raise ConfigError(f"the rewrite {cls.__name__} has no text {', '.join(missing)}")
            _read(cls.before, cls.after)

    def why_not(self, match: Match) -> list[str]:
        """Every reason against rewriting a match; an empty list means yes. To be overridden."""
        return []

    def run(self, graph: fx.GraphModule) -> PassResult:
        pattern, lines = _read(self.before, self.after)
        rewrites, refusals = 0, []
        for match in pattern.find(graph):
            reasons = [
                f"'{n.name}' has an effect besides its value" for n in match.inside if is_effectful(n) or communicates(n)
            ]
            against = self.why_not(match)
            if not isinstance(against, list):
                raise ContractError(f"'{self}': why_not gave {against!r}; it returns a list of reasons, empty for yes")
            reasons += against
            if not reasons and (problem := self._put(graph.graph, match, lines)):
                reasons.append(problem)
            if reasons:
                refusals.append(Refusal(match.root.name, *reasons))
                continue
            rewrites += 1
        return PassResult(graph, rewrites, tuple(refusals))

    def _put(self, graph: fx.Graph, match: Match, lines: tuple[_Line, ...]) -> str:
        """Replace a match; or leave the graph as it was, and say why."""
        values, root = dict(match.values), match.root
        made: list[fx.Node] = []
        with graph.inserting_before(root):
            for line in lines:
                if line.target is None:
                    values[line.name] = values[line.args[0].name]
                    continue
                args, named = _filled((line.args, line.named), values)
                try:
                    values[line.name] = call(graph, line.target, *args, provenance=str(self), **named)
                except Exception as error:  # noqa: BLE001 — whatever an operation says of inputs that it does not take
                    _undo(graph, made)
                    return f"'%{line.name}' of the replacement cannot be computed here: {str(error).partition(chr(10))[0]}"
                made.append(values[line.name])
        new = values[lines[-1].name]
        if effect := next((n for n in made if is_effectful(n)), None):
            name = name_of_op(effect.target)
            _undo(graph, made)
            return f"'{name}' of the replacement has an effect besides its value"
        if not isinstance(new, fx.Node) or not same_type(new, root):
            what = type_of(new.meta.get("val")) if isinstance(new, fx.Node) else repr(new)
            _undo(graph, made)
            return f"it would give {what} in the place of {type_of(root.meta.get('val'))}"
        if made:
            new.meta = {**root.meta, **new.meta}
        root.replace_all_uses_with(new)
        for node in reversed(match.inside):
            if not node.users:
                graph.erase_node(node)
        return ""


def _undo(graph: fx.Graph, made: list[fx.Node]) -> None:
    for node in reversed(made):
        graph.erase_node(node)


@dataclass(frozen=True)
class _Value:
    name: str


@dataclass(frozen=True)
class _Line:
    """A line of `after`; without a target it is a value alone."""

    name: str
    target: Any
    args: tuple[Any, ...]
    named: Mapping[str, Any]


@functools.cache
def _read(before: str, after: str) -> tuple[Pattern, tuple[_Line, ...]]:
    pattern = Pattern(before)
    known, lines = set(pattern.names), []
    for row in lines_of(after, "replacement"):
        name, equals, text = (p.strip() for p in row.text.strip().partition(" = "))

        def value(name: str, row: Line = row) -> _Value:
            if name not in known:
                raise row.wrong(f"%{name} is no value of the pattern, and not computed before this line")
            return _Value(name)

        if not name.startswith("%"):
            raise row.wrong("a line is '%3 = relu(%2)', or a single value")
        if not equals:
            lines.append(_Line("", None, (value(name[1:]),), {}))
            continue
        lines.append(_Line(name[1:], *row.operation(text, value)))
        known.add(name[1:])
    if not lines:
        raise ConfigError("a replacement has at least one line: '%x' for a value that is there already")
    return pattern, tuple(lines)


def _filled(tree: Any, values: Mapping[str, Any]) -> Any:
    """`tree` with what stands for its values."""
    if isinstance(tree, _Value):
        return values[tree.name]
    if isinstance(tree, (list, tuple)):
        return type(tree)(_filled(x, values) for x in tree)
    if isinstance(tree, dict):
        return {k: _filled(v, values) for k, v in tree.items()}
    return tree
