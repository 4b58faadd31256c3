"""Every pass that there is, vdcache's own and those of other packages, with its options: what `vdcache passes` lists."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, dataclass, fields
from typing import Any

from vdcache.ir.plugins import Plugin, plugins
from vdcache.passes.base import Pass, option_text

__all__ = ["Entry", "Option", "catalogue", "known_passes"]


@dataclass(frozen=True)
class Option:
    """One option of a pass, as its text names it; `default` is None where it must be given."""

    name: str
    default: str | None

    @property
    def text(self) -> str:
        return self.name if self.default is None else f"{self.name}={self.default or 'none'}"


@dataclass(frozen=True)
class Entry:
    """One pass.

    Args:
        sentence: the first line of its module's docstring, or of its own.
        change: before and after, where the docstring shows them.
        more: the rest of the docstring: what it promises, what it refuses.
        origin: "vdcache", or the package that brings it.
    """

    name: str
    kind: type[Pass]
    sentence: str
    change: str
    more: str
    options: tuple[Option, ...]
    origin: str


def known_passes() -> dict[str, type[Pass]]:
    """Passes by name; a name of vdcache's own always means its own."""
    return {name: kind for name, (kind, _) in _all().items()}


def catalogue() -> tuple[Entry, ...]:
    """Every pass, vdcache's own first, in the order in which they usually run."""
    return tuple(_entry(kind, origin) for kind, origin in _all().values())


def _all() -> dict[str, tuple[type[Pass], str]]:
    from vdcache.passes import PASSES

    found = {name: (kind, "vdcache") for name, kind in PASSES.items()}
    for plugin in plugins("vdcache.passes", _why_not):
        found.setdefault(plugin.value.name, (plugin.value, plugin.origin))
    return found


def _why_not(plugin: Plugin) -> str:
    from vdcache.passes import PASSES

    kind = plugin.value
    if not (isinstance(kind, type) and issubclass(kind, Pass)) or inspect.isabstract(kind):
        return f"{kind!r} is no class of passes (vdcache.Pass with a 'run' of its own)"
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        return f"its name is {name!r}; a pass is named in small letters and dashes, as 'mark-branches' is"
    if name in PASSES:
        return f"vdcache has a pass '{name}' of its own"
    return ""


def _entry(kind: type[Pass], origin: str) -> Entry:
    module = inspect.getdoc(inspect.getmodule(kind)) or ""
    of_module = module.startswith(f"{kind.name}:")
    sentence, _, rest = (module.removeprefix(f"{kind.name}:") if of_module else inspect.getdoc(kind) or "").partition("\n\n")
    change = re.match(r"\s*((?: {4}.*\n?|\n)+)", "\n" + rest) if "-->" in rest.partition("\n\n")[0] else None
    block, _, more = rest.partition("\n\n") if change else ("", "", rest)
    options = tuple(Option(f.name.replace("_", "-"), _default(f)) for f in fields(kind))
    if not of_module:
        more = more.partition("Args:")[0]
    return Entry(kind.name, kind, " ".join(sentence.split()), block.strip("\n"), more.strip(), options, origin)


def _default(option: Any) -> str | None:
    if option.default is not MISSING:
        return option_text(option.default)
    return option_text(option.default_factory()) if option.default_factory is not MISSING else None
