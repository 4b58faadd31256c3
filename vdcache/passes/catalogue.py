"""Every pass that there is, vdcache's own and those of other packages, with its options: what `vdcache passes` lists."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, dataclass, fields
from typing import Any

from vdcache.ir.facts import Fact
from vdcache.passes.base import Pass, option_text
from vdcache.passes.canonicalise import Canonicalise
from vdcache.passes.dead_code import DeadCode
from vdcache.passes.emit import Emit
from vdcache.passes.emit_attention import EmitAttention
from vdcache.passes.hoist_invariants import HoistInvariants
from vdcache.passes.mark_branches import MarkBranches
from vdcache.passes.mark_lanes import MarkLanes
from vdcache.passes.mark_output import MarkOutput
from vdcache.passes.merge_slots import MergeSlots
from vdcache.passes.observe import Observe
from vdcache.passes.probe import Probe
from vdcache.passes.specialise import Specialise
from vdcache.passes.split_at_probe import SplitAtProbe
from vdcache.passes.tile_attention import TileAttention
from vdcache.util.plugins import Plugin, plugins

__all__ = [
    "PASSES",
    "Entry",
    "Option",
    "catalogue",
    "documented_options",
    "fields_page",
    "first_sentence",
    "known_facts",
    "known_passes",
    "page",
    "readable",
]


# In the order in which they usually run.
PASSES: dict[str, type[Pass]] = {
    p.name: p
    for p in (
        Canonicalise,
        TileAttention,
        MarkBranches,
        MarkLanes,
        MarkOutput,
        MergeSlots,
        Observe,
        Probe,
        Emit,
        EmitAttention,
        HoistInvariants,
        SplitAtProbe,
        Specialise,
        DeadCode,
    )
}


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


def readable(a_pass: Pass) -> str:
    """The text that makes this pass again: its own, or one that names its class where no installed package brings it."""
    text = str(a_pass)
    kind = type(a_pass)
    return (
        text
        if known_passes().get(kind.name) is kind
        else f"{kind.__module__}:{kind.__qualname__}{text.removeprefix(kind.name)}"
    )


def known_facts() -> tuple[Fact, ...]:
    """Every fact that a known pass requires or ensures."""
    return tuple(dict.fromkeys(f for kind in known_passes().values() for f in sorted(kind.requires | kind.ensures, key=str)))


def catalogue() -> tuple[Entry, ...]:
    """Every pass, vdcache's own first, in the order in which they usually run."""
    return tuple(_entry(kind, origin) for kind, origin in _all().values())


def _all() -> dict[str, tuple[type[Pass], str]]:
    found = {name: (kind, "vdcache") for name, kind in PASSES.items()}
    for plugin in plugins("vdcache.passes", _why_not):
        found.setdefault(plugin.value.name, (plugin.value, plugin.origin))
    return found


def _why_not(plugin: Plugin) -> str:
    kind = plugin.value
    if not (isinstance(kind, type) and issubclass(kind, Pass)) or inspect.isabstract(kind):
        return f"{kind!r} is no class of passes: it does not subclass vdcache.Pass with its own 'run'"
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


def page() -> str:
    """The passes as Markdown: a row each, and what its module says. `docs/passes.md` ends with it."""
    entries = [e for e in catalogue() if e.origin == "vdcache"]
    lines = ["| pass | what it does | requires | ensures |", "|---|---|---|---|"]
    for e in entries:
        requires, ensures = (", ".join(sorted(f.name for f in facts)) or "–" for facts in (e.kind.requires, e.kind.ensures))
        lines.append(f"| [`{e.name}`](#{e.name}) | {e.sentence} | {requires} | {ensures} |")
    for e in entries:
        lines += ["", f"### {e.name}", "", _capitalised(e.sentence)]
        if e.change:
            lines += ["", "```", *(line.removeprefix("    ") for line in e.change.splitlines()), "```"]
        if e.more:
            lines += ["", e.more]
        if e.options:
            documented = documented_options(e.kind)
            lines += ["", "| option | default | |", "|---|---|---|"]
            for o in e.options:
                lines.append(f"| `{o.name}` | {_cell(o.default)} | {documented.get(o.name.replace('-', '_'), '')} |")
    return "\n".join(lines) + "\n"


def fields_page(*kinds: type) -> str:
    """Dataclasses as Markdown: what each is, and a row for each field. `docs/ir.md` holds those of the patterns."""
    lines: list[str] = []
    for kind in kinds:
        documented = documented_options(kind)
        lines += [f"### {kind.__name__}", "", first_sentence(kind), "", "| field | |", "|---|---|"]
        lines += [f"| `{f.name}` | {documented[f.name]} |" for f in fields(kind) if not f.name.startswith("_")]
        others = {
            n: v for n, v in vars(kind).items() if not n.startswith("_") and (inspect.isfunction(v) or isinstance(v, property))
        }
        for name, value in others.items():
            call = (
                ""
                if isinstance(value, property)
                else f"({', '.join(p for p in inspect.signature(value).parameters if p != 'self')})"
            )
            lines.append(f"| `{name}{call}` | {first_sentence(value)} |")
        lines.append("")
    return "\n".join(lines)


def first_sentence(thing: Any) -> str:
    """What a docstring begins with, up to the first blank line, on one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def documented_options(kind: type) -> dict[str, str]:
    """What the docstring of a pass says of each option; options that share an entry ("start, stop") share its words."""
    _, _, args = (inspect.getdoc(kind) or "").partition("Args:")
    args, _, _ = args.partition("\nRaises:")
    names = {f.name for f in fields(kind)}
    found: dict[str, str] = {}
    current: list[str] = []
    for line in args.splitlines():
        entry = re.match(r"\s+((?:\w+)(?:, \w+)*): (.*)", line)
        if entry and set(entry[1].split(", ")) <= names:
            current = entry[1].split(", ")
            found |= dict.fromkeys(current, entry[2].strip())
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
    return {name: text.replace("|", "\\|") for name, text in found.items()}


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cell(default: str | None) -> str:
    return "must be given" if default is None else f"`{default}`" if default else "empty"
