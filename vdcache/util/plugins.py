"""Parts that other packages bring: entry points, each loaded once, with the package that it comes from.

A package names them in its pyproject.toml, for example

    [project.entry-points."vdcache.passes"]
    window-attention = "my_package:WindowAttention"

One that cannot be loaded or is not what its group holds is reported once and passed over: nobody's model is to break because
another package is out of date.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vdcache.errors import warn_once

__all__ = ["GROUPS", "Plugin", "plugins"]

GROUPS = ("vdcache.passes", "vdcache.recipes", "vdcache.policies", "vdcache.predictors", "vdcache.masks")
_said: set[str] = set()


@dataclass(frozen=True)
class Plugin:
    """What an entry point gave.

    Args:
        origin: the package and its version.
    """

    name: str
    origin: str
    value: Any


def plugins(group: str, wrong: Callable[[Plugin], str] = lambda plugin: "") -> tuple[Plugin, ...]:
    """The entry points of a group that can be used, in order of their names.

    Args:
        group: one of `GROUPS`.
        wrong: why one is not what the group holds, "" where it is.
    """
    found: list[Plugin] = []
    for plugin in _loaded(group, tuple(sys.path)):
        if isinstance(plugin.value, _Broken):
            reason = plugin.value.reason
        elif first := next((p for p in found if p.name == plugin.name), None):
            reason = f"that of {first.origin} has the same name and is taken"
        elif not (reason := wrong(plugin)):
            found.append(plugin)
            continue
        message = f"vdcache passes over '{plugin.name}' of {plugin.origin} (entry point in {group}): {reason}"
        warn_once(_said, message)
    return tuple(found)


@dataclass(frozen=True)
class _Broken:
    reason: str


@functools.lru_cache(maxsize=32)
def _loaded(group: str, path: tuple[str, ...]) -> tuple[Plugin, ...]:
    """Every entry point of a group; `path` is where packages were looked for, so that a new one is seen."""
    found = []
    for point in sorted(importlib.metadata.entry_points(group=group), key=lambda p: p.name):
        origin = f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
        value: Any
        try:
            value = point.load()
        except Exception as error:  # noqa: BLE001 — whatever the other package does when it is imported
            value = _Broken(f"{point.value} cannot be imported: {type(error).__name__}: {error}")
        found.append(Plugin(point.name, origin, value))
    return tuple(found)
