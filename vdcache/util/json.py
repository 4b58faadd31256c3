"""Frozen dataclasses as JSON text, and back with every type checked. Needs no torch.

The text is what `dataclasses.asdict` and `json.dumps` give: tuples are lists, nested dataclasses and mappings are objects.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from vdcache.errors import ConfigError
from vdcache.util.files import saved, text_of

__all__ = ["from_plain", "read_json", "write_json"]

T = TypeVar("T")


def write_json(
    value: Any,
    path: str | Path | None = None,
    *,
    indent: int | None = None,
    without: Collection[str] = (),
    also: Mapping[str, Any] = {},
) -> str:
    """A dataclass as JSON text, also written to `path`.

    Args:
        value: the dataclass; its values are numbers, text, None, tuples, mappings by text, and dataclasses.
        indent: spaces of one level. Default: everything on one line.
        without: names of fields that are not written.
        also: more values, for readers of the file only.
    """
    plain = {k: v for k, v in asdict(value).items() if k not in without}
    return saved(json.dumps({**plain, **also}, indent=indent), path)


def read_json(kind: type[T], source: str | Path, noun: str, *, without: Collection[str] = ()) -> T:
    """What `to_json` of a class wrote, by `write_json`.

    Args:
        kind: the dataclass. A field that is missing takes its default.
        source: JSON text, or the path of a file.
        noun: what a value of it is called in messages, such as "schedule".
        without: names in the text that are no fields, for readers only.

    Raises:
        ConfigError: a path where there is no file, or something else than `to_json` wrote.
    """
    try:
        data = json.loads(text_of(source))
        plain = {k: v for k, v in data.items() if k not in without} if isinstance(data, dict) else data
        return typing.cast(T, from_plain(kind, plain, noun))
    except ValueError as error:  # also a ConfigError of the class about its values
        raise ConfigError(f"this is no {noun}: it was not written by {kind.__name__}.to_json ({error})") from error


def from_plain(kind: Any, data: Any, place: str, *, complete: bool = False) -> Any:
    """Data of JSON as a value of a type.

    Args:
        kind: a dataclass, int, float, str, bool, a tuple, Mapping or dict of such types, or such a type or None.
        data: what `json.loads` gave.
        place: where it stands, for messages.
        complete: every field has to be there, those with defaults too. Default: False.

    Raises:
        ConfigError: a value of another type, or a field that is missing or unknown; it names the place.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, data, place, complete)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (p for p in parts if p is not types.NoneType)
        return None if data is None else from_plain(inner, data, place, complete=complete)
    if origin is tuple and isinstance(data, list):
        return tuple(from_plain(parts[0], v, f"{place}[{i}]", complete=complete) for i, v in enumerate(data))
    if origin in (Mapping, dict) and isinstance(data, dict):
        return {n: from_plain(parts[1], v, f"{place}.{n}", complete=complete) for n, v in data.items()}
    plain = (int, float) if kind is float else kind
    if origin is not None or not isinstance(data, plain) or (isinstance(data, bool) and kind is not bool):
        raise ConfigError(f"'{place}' is {data!r}, not {kind.__name__ if origin is None else kind}")
    return data


def _dataclass(kind: type, data: Any, place: str, complete: bool) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"'{place}' is {data!r}, not an object")
    hints, known = typing.get_type_hints(kind), {f.name: f for f in fields(kind)}
    if unknown := data.keys() - known:
        raise ConfigError(f"'{place}' has an unknown field {min(unknown)!r}")
    if missing := {n for n, f in known.items() if n not in data and (complete or _required(f))}:
        raise ConfigError(f"'{place}' has no field {min(missing)!r}")
    return kind(**{n: from_plain(hints[n], v, f"{place}.{n}", complete=complete) for n, v in data.items()})


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
