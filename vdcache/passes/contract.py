"""What a pass owes whoever runs it, looked at from outside."""

from __future__ import annotations

import functools
import inspect
import numbers
import operator
import traceback
import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import fx

from vdcache.errors import ConfigError, ContractError
from vdcache.ir.dump import dump
from vdcache.ir.facts import Fact, check, holding

__all__ = ["Contract", "check_facts", "check_options", "failed", "is_third_party"]

# What a pass must leave true where it was true, whatever it ensures.
_LASTING = (Fact.FUNCTIONAL, Fact.TYPED, Fact.GUARDED, Fact.OBSERVED, Fact.PROBED)


def is_third_party(a_pass: Any) -> bool:
    """Whether a pass is of another package: those are always held to their promises, since a user's model runs on them."""
    return type(a_pass).__module__.partition(".")[0] != "vdcache"


def check_facts(a_pass: Any) -> None:
    """Raise ConfigError where a pass requires or ensures what is no fact."""
    for what in ("requires", "ensures"):
        facts = getattr(a_pass, what)
        if isinstance(facts, str) or not isinstance(facts, Iterable) or any(not isinstance(f, Fact) for f in facts):
            raise ConfigError(f"'{a_pass.name}' {what} {facts!r}; give a frozenset of facts, as frozenset({{Fact.GUARDED}})")


def check_options(a_pass: Any) -> None:
    """Raise ConfigError where an option is of another type than its field says."""
    wanted = _types_of(type(a_pass))  # type: ignore[arg-type]
    for option in fields(a_pass):
        value = getattr(a_pass, option.name)
        if option.name in wanted and value is not option.default and not _fits(value, wanted[option.name]):
            name = option.name.replace("_", "-")
            raise ConfigError(f"{a_pass.name}: {name} is {_in_words(wanted[option.name])}; got {value!r}")


@functools.lru_cache(maxsize=256)
def _types_of(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except (NameError, TypeError, AttributeError):  # of another package, with names that only a type checker sees
        return {}


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of an annotated type; true of types that cannot be looked at."""
    kind, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is typing.Literal:
        return value in inner
    if wanted is None or wanted is type(None):
        return value is None
    if wanted is bool:
        return isinstance(value, bool)
    if wanted is int:
        return _is_whole(value)
    if wanted is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind in (tuple, list, frozenset, set):  # any sequence is made one: a list, a range, an array
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            return False
        items = list(value)
        if kind is tuple and inner and inner[-1] is not ...:
            return len(items) == len(inner) and all(map(_fits, items, inner))
        return all(_fits(item, inner[0]) for item in items) if inner else True
    try:
        return isinstance(value, kind or wanted)
    except TypeError:
        return True


def _is_whole(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _in_words(wanted: Any) -> str:
    kind, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(_in_words(one) for one in inner if one is not int or float not in inner)
    if kind is typing.Literal:
        return " or ".join(map(repr, inner))
    if kind in (tuple, list, frozenset, set) and inner:
        number = "" if kind is not tuple or inner[-1] is ... else f"{len(inner)} "
        return f"a list of {number}{_MANY.get(inner[0], getattr(inner[0], '__name__', inner[0]))}"
    return _ONE.get(wanted, f"a {getattr(wanted, '__name__', wanted)}")


_ONE = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "none"}
_MANY = {bool: "true or false", int: "whole numbers", float: "numbers", str: "words"}


def failed(a_pass: Any, error: Exception) -> ContractError:
    """What to raise where a pass raised: with the line of the pass, because who compiles a model sees the message alone."""
    own = inspect.getsourcefile(type(a_pass))
    frames = traceback.extract_tb(error.__traceback__)
    at = next((f for f in reversed(frames) if f.filename == own), frames[-1] if frames else None)
    place = f" at {Path(at.filename).name}:{at.lineno}" if at is not None else ""
    return ContractError(f"'{a_pass}' failed{place}: {type(error).__name__}: {error}")


class Contract:
    """What a pass promises by running on a graph, noted before it runs."""

    def __init__(self, a_pass: Any, graph: fx.GraphModule) -> None:
        self._pass, self._text = a_pass, dump(graph)
        # a specialised graph writes into what the model writes into
        lost = {Fact.FUNCTIONAL} if Fact.PLAIN in a_pass.ensures else set()
        self._facts = holding(graph.graph) & set(_LASTING) - lost | a_pass.ensures

    def check(self, graph: fx.GraphModule, rewrites: int) -> None:
        """Raise ContractError where a promise is broken."""
        try:
            graph.graph.lint()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ContractError(f"after '{self._pass}' the graph is no graph: {reason}") from error
        for fact in self._facts:
            check(fact, graph.graph, after=f"'{self._pass}'")
        if not rewrites and dump(graph) != self._text:
            raise ContractError(f"'{self._pass}' reports no rewrites, but the graph has changed")
