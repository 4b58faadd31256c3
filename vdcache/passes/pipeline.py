"""Passes in order, held to their contracts."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import fx

from vdcache.errors import ConfigError, ContractError, VdcacheError
from vdcache.ir.edit import copy_graph
from vdcache.ir.facts import Fact, check
from vdcache.ir.tokens import parts
from vdcache.passes.base import Pass, PassRecord, PassResult, passes_of
from vdcache.passes.catalogue import known_passes
from vdcache.passes.contract import Contract, check_facts, check_options, failed, is_third_party
from vdcache.passes.watching import PipelineObserver
from vdcache.patterns.analysis import forget, structure
from vdcache.util.renamed import OPTIONS, current

__all__ = ["Pipeline"]


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. The order is checked when the pipeline is made, without a graph.

    Args:
        passes: each finds the facts that it requires among those that `given` holds and earlier passes ensure.
        verify: verify the contract of every pass: what it ensures, the facts that held before, a graph that is one, and that
            "no rewrites" means unchanged text. Passes of other packages always are.
        given: facts that hold on every captured graph.
        checked: facts that are checked on the graph that comes in.

    Raises:
        ConfigError: something that is not a pass, or a pass with an option of another type.
        ContractError: a pass requires what nothing before it ensures.
    """

    passes: tuple[Pass, ...]
    verify: bool = False
    given: frozenset[Fact] = frozenset({Fact.FUNCTIONAL, Fact.TYPED})
    checked: frozenset[Fact] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", passes_of(self.passes, "a pipeline"))
        known = set(self.given)
        for a_pass in self.passes:
            check_facts(a_pass)
            check_options(a_pass)
            if missing := a_pass.requires - known:
                names = ", ".join(sorted(f.name for f in missing))
                raise ContractError(f"'{a_pass.name}' requires {names}; nothing before it ensures that")
            known |= a_pass.ensures

    def __str__(self) -> str:
        return ",".join(str(p) for p in self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    @property
    def ensured(self) -> frozenset[Fact]:
        """Facts that hold on every graph that comes out."""
        return self.given.union(*(p.ensures for p in self.passes))

    def run(self, graph: fx.GraphModule, *, copied: bool = False) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
        """Run all passes on a copy of `graph` (on `graph` itself when it is `copied` already).

        Raises:
            ContractError: a pass failed, or `verify` found a broken promise.
        """
        for fact in self.checked:
            check(fact, graph.graph, after="reading")
        graph = graph if copied else copy_graph(graph)
        steps: list[PassRecord] = []
        watch = PipelineObserver(graph, str(self))
        read = structure(graph)  # what an analysis of the graph was read from
        for index, a_pass in enumerate(self.passes):
            watch.before(graph)
            began = time.perf_counter()
            try:
                result = self._run_one(a_pass, graph, self.verify or watch.debug.verify)
            except VdcacheError as error:
                error.add_note(f"in pass '{a_pass}' after {[s.text for s in steps] or 'capture'}")
                watch.failed(a_pass, error)
                raise
            graph, before, read = result.graph, read, structure(result.graph)
            if not before <= read:
                forget(graph)
            steps.append(PassRecord(str(a_pass), result.rewrites, result.refusals, time.perf_counter() - began))
            watch.after(a_pass, steps[-1], graph, index)
        graph.recompile()
        return graph, tuple(steps)

    @staticmethod
    def _run_one(a_pass: Pass, graph: fx.GraphModule, verify: bool) -> PassResult:
        contract = Contract(a_pass, graph) if verify or is_third_party(a_pass) else None
        try:
            result = a_pass.run(graph)
        except VdcacheError:
            raise
        except Exception as error:  # whoever compiles a model steps aside for a VdcacheError, and for nothing else
            raise failed(a_pass, error) from error
        if not isinstance(result, PassResult):
            raise ContractError(
                f"'{a_pass}' returned {type(result).__name__}; run returns a PassResult(graph, rewrites, refusals)"
            )
        if contract is not None:
            contract.check(result.graph, result.rewrites)
        return result

    @staticmethod
    def parse(text: str, known: Mapping[str, type[Pass]] | None = None, given: frozenset[Fact] | None = None) -> Pipeline:
        """The pipeline that prints as `text`. A pass of no installed package is named by its class, "my_module:MyPass{option=1}".

        Args:
            known: passes by name; vdcache's own and those of installed packages without.
            given: facts that hold on the graph that comes in; those of every captured graph without.

        Raises:
            ConfigError: an unknown pass or option, or no pipeline at all.
            ContractError: a pass requires what nothing before it ensures.
        """
        known = known_passes() if known is None else known
        passes, at = [], 0
        while at < len(text):
            found = _STEP.match(text, at)
            if found is None:
                raise ConfigError(f"{text[at:]!r} is no list of passes, as 'canonicalise,mark-branches{{kinds=[mlp]}}' is one")
            name, options = found.groups()
            passes.append(_with_options(_kind(name, known), options or ""))
            at = found.end()
        return Pipeline(tuple(passes)) if given is None else Pipeline(tuple(passes), given=given)


_STEP = re.compile(r"\s*([a-z][a-z0-9-]*|[\w.]+:\w+)(?:\{([^}]*)\})?\s*(?:,|$)")


def _kind(name: str, known: Mapping[str, type[Pass]]) -> type[Pass]:
    """The class of a pass by its name, or by module and class."""
    module, colon, own = name.partition(":")
    if not colon:
        if name not in known:
            raise ConfigError(f"no pass is called {name!r}; there are {', '.join(sorted(known))}, or your own as module:Class")
        return known[name]
    try:
        kind = getattr(importlib.import_module(module), own)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the pass {name!r} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise ConfigError(f"{name!r} is no class of passes: it does not subclass vdcache.Pass")
    return kind


def _with_options(kind: type[Pass], text: str) -> Pass:
    options: dict[str, Any] = {}
    allowed = {f.name: f for f in fields(kind)}
    for part in parts(text):
        key, equals, value = part.partition("=")
        name = current(OPTIONS.get(kind.name, {}), key.replace("-", "_"), f"the option of pass '{kind.name}'")
        if name not in allowed or not equals:
            there = ", ".join(a.replace("_", "-") for a in allowed) or "none"
            raise ConfigError(f"pass '{kind.name}' has no option {key!r}; it has {there}, given as option=value")
        read = allowed[name].metadata.get("read")
        options[name] = read(value) if read is not None else _option_value(value, allowed[name].default)
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigError(f"pass '{kind.name}' cannot be made of '{text}': {error}") from error


def _option_value(text: str, default: Any) -> Any:
    if text.startswith("["):
        items = [_option_value(t, None) for t in text[1:-1].split(",") if t]
        return frozenset(items) if isinstance(default, frozenset) else tuple(items)
    if isinstance(default, (tuple, frozenset)) and text != "none":  # a list of one, without its brackets
        return _option_value(f"[{text}]", default)
    if text in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
