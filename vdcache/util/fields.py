"""Fields of a dataclass, held to their annotations: one check and one form of message for every class.

    n: Annotated[int, at_least(1)]                  n is a whole number of at least 1; got 0
    gate: Annotated[str, one_of("post", "pre")]     gate is 'post' or 'pre'; got 'mid'
    strides: tuple[Annotated[int, at_least(1)], ...]

A `Bound` with a function that reads names of its module stands outside of the class: annotations are evaluated in the class's scope.
A sequence of another kind, such as a list, a range or an array, becomes what the annotation says.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any

from vdcache.errors import ConfigError

__all__ = [
    "Bound",
    "Checked",
    "Group",
    "VideoGrid",
    "VideoText",
    "above",
    "ascending",
    "at_least",
    "between",
    "check_fields",
    "one_of",
    "some",
]


@dataclass(frozen=True)
class Bound:
    """What a value must be beside its type.

    Args:
        holds: whether a value is so.
        words: what is said after the type, as " of at least 1" after "a whole number".
        noun: what is said in its place.
    """

    holds: Callable[[Any], bool]
    words: str = ""
    noun: str = ""


def at_least(least: float) -> Bound:
    """A finite number that is not below another."""
    return Bound(lambda v: least <= v < math.inf, f" of at least {least:g}")


def above(least: float) -> Bound:
    """A finite number that is above another."""
    return Bound(lambda v: least < v < math.inf, f" above {least:g}")


def between(least: float, most: float, noun: str = "") -> Bound:
    """A number in an interval, both ends included.

    Args:
        noun: what the number is. Default: its type.
    """
    words = f" between {least:g} and {most:g}"
    return Bound(lambda v: least <= v <= most, "" if noun else words, noun and noun + words)


def one_of(*known: str, empty: str = "") -> Bound:
    """One of several words.

    Args:
        empty: what the empty word stands for, where it may be given.
    """
    names = " or ".join(filter(None, (", ".join(map(repr, known[:-1])), repr(known[-1]))))
    return Bound(lambda v: v in known or (bool(empty) and v == ""), noun=names + (f", or empty for {empty}" if empty else ""))


some = Bound(len, ", at least one")  # type: ignore[arg-type]
ascending = Bound(lambda items: all(a < b for a, b in itertools.pairwise(items)), ", in ascending order")

# "group/name" names a slot, and "," and brackets part the options of a pass.
Group = Annotated[str, Bound(lambda v: bool(v) and not set("/,{}[]=# ") & set(v), noun="a name of letters, digits and dots")]
# Frames, height and width of video tokens, or nothing.
VideoGrid = Annotated[
    tuple[int, ...],
    Bound(
        lambda v: not v or (len(v) == 3 and min(v) >= 1),
        noun="(frames, height, width) of the video tokens, three whole numbers of at least 1",
    ),
]
# Tokens of text before and after those of video, or nothing.
VideoText = Annotated[
    tuple[int, ...],
    Bound(
        lambda v: not v or (len(v) == 2 and min(v) >= 0),
        noun="the tokens of text (before, after) those of video, two whole numbers of at least 0",
    ),
]


class Checked:
    """Base of a dataclass whose fields are held to their annotations when it is made.

    Raises:
        ConfigError: naming the class, the field, what it is and what it was given.
    """

    def __post_init__(self) -> None:
        check_fields(self, getattr(self, "name", type(self).__name__))


def check_fields(value: Any, owner: str, spelled: Callable[[str], str] = str) -> None:
    """Bring every field of a frozen dataclass into the form that its annotation says, or refuse it.

    Args:
        owner: what the dataclass is called in messages.
        spelled: how it calls a field. Default: by its name.

    Raises:
        ConfigError: a value of another type, or out of its bounds.
    """
    hints = _hints_of(type(value))  # type: ignore[arg-type]
    for field in fields(value):
        given = getattr(value, field.name)
        if field.name not in hints or given is field.default:
            continue
        if (found := _read(given, hints[field.name])) is _NO:
            raise ConfigError(f"{owner}: {spelled(field.name)} is {_in_words(hints[field.name])}; got {given!r}")
        if found is not given:
            object.__setattr__(value, field.name, found)


@functools.lru_cache(maxsize=256)
def _hints_of(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except (NameError, TypeError, AttributeError):  # of another package, with names that only a type checker sees
        return {}


_NO = object()


def _read(value: Any, wanted: Any) -> Any:
    """A value in the form of an annotated type, `_NO` if it has none; as it is for types that cannot be looked at."""
    kind, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if kind is Annotated:
        found = _read(value, inner[0])
        return found if found is not _NO and all(bound.holds(found) for bound in inner[1:]) else _NO
    if kind in (typing.Union, types.UnionType):
        return next((found for one in inner if (found := _read(value, one)) is not _NO), _NO)
    if kind is typing.Literal:
        return value if value in inner else _NO
    if wanted is int:
        return _whole(value)
    if wanted is float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return _NO
        return value if isinstance(value, (int, float)) else float(value)
    if kind in (tuple, list, frozenset, set):
        return _items(value, kind, inner)
    try:
        return value if isinstance(value, kind or wanted) else _NO
    except TypeError:
        return value


def _whole(value: Any) -> Any:
    try:
        return _NO if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return _NO


def _items(value: Any, kind: Any, inner: tuple[Any, ...]) -> Any:
    """A sequence whose items have the types that its annotation says."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return _NO
    items = list(value)
    fixed = kind is tuple and inner and inner[-1] is not ...
    if fixed and len(items) != len(inner):
        return _NO
    found = [_read(item, one) for item, one in zip(items, inner if fixed else inner[:1] * len(items))] if inner else items
    return _NO if any(item is _NO for item in found) else kind(found)


def _in_words(wanted: Any, *, many: bool = False) -> str:
    kind, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if kind is Annotated:
        nouns = [bound.noun for bound in inner[1:] if bound.noun] or [_in_words(inner[0], many=many)]
        return "".join([nouns[0], *(bound.words for bound in inner[1:])])
    if kind in (typing.Union, types.UnionType):
        return " or ".join(_in_words(one) for one in inner if one is not int or float not in inner)
    if kind is typing.Literal:
        return " or ".join(map(repr, inner))
    if kind in (tuple, list, frozenset, set) and inner:
        number = "" if kind is not tuple or inner[-1] is ... else f"{len(inner)} "
        return f"a list of {number}{_in_words(inner[0], many=True)}"
    if many:
        return _MANY.get(wanted, getattr(wanted, "__name__", wanted))
    return _ONE.get(wanted, f"a {getattr(wanted, '__name__', wanted)}")


_ONE = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "none", None: "none"}
_MANY = {bool: "true or false", int: "whole numbers", float: "numbers", str: "words"}
