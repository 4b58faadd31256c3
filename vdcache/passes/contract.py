"""What a pass owes whoever runs it, looked at from outside."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import fx

from vdcache.errors import ConfigError, ContractError
from vdcache.ir.dump import dump
from vdcache.ir.facts import Fact, check, holding
from vdcache.util.fields import check_fields

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
    """Raise ConfigError where an option is not what its field says."""
    check_fields(a_pass, a_pass.name, lambda name: name.replace("_", "-"))


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
