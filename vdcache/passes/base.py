"""The contract of a pass, and the pipeline that holds passes to it."""

from __future__ import annotations

import abc
import importlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import fx

from vdcache.ir import dialect
from vdcache.ir.edit import copy_graph
from vdcache.ir.errors import ConfigError, ContractError, VdcacheError
from vdcache.ir.facts import Fact, check
from vdcache.ir.tokens import parts
from vdcache.passes.contract import Contract, check_facts, check_options, failed, is_third_party
from vdcache.passes.watching import PipelineObserver
from vdcache.renamed import OPTIONS, current

__all__ = [
    "Pass",
    "PassResult",
    "Pipeline",
    "Refusal",
    "copy_meta",
    "drop_dead_code",
    "option_text",
    "passes_of",
    "put_cache_guard",
]


@dataclass(frozen=True)
class Refusal:
    """A place that a pass did not rewrite, with every reason. Refusing is no error: the graph stays as it was there."""

    node: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.node}:" + "".join(f"\n  {r}" for r in self.reasons)


@dataclass(frozen=True)
class PassResult:
    """What a pass did: the graph (edited in place), the number of rewrites, the refusals. No rewrite means no change."""

    graph: fx.GraphModule
    rewrites: int = 0
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Pass(abc.ABC):
    """One rewrite of a graph, as a value: its fields are its options.

    A pass edits the graph that it is given (the pipeline copies once, at the start). Its text, `str(a_pass)`, is
    `name{option=value,…}` with the options that differ from their defaults.

    Class attributes say what a pipeline must know: `name`, in small letters and dashes; `requires` and `ensures`, the facts that
    hold before and after; `fixed_sizes`, whether what it writes is cut for the sizes of one graph (`vdcache.compile` then compiles
    each size on its own).

    Options are numbers, words, true or false, none, and lists of them. One of another type is made of its text (`str`) by the function
    that its field names: `field(default=LAST, metadata={"read": read_predictor})`.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED})
    ensures: ClassVar[frozenset[Fact]] = frozenset()
    fixed_sizes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse an option of another type than its field says; a subclass with its own `__post_init__` calls this one.

        Raises:
            ConfigError: naming the option, what it is and what it was given.
        """
        check_options(self)

    @abc.abstractmethod
    def run(self, graph: fx.GraphModule) -> PassResult:
        """Rewrite `graph` in place."""

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        options = ",".join(f"{f.name.replace('_', '-')}={option_text(getattr(self, f.name))}" for f in changed)
        return f"{self.name}{{{options}}}" if options else self.name


def passes_of(given: Any, where: str) -> tuple[Pass, ...]:
    """One pass or several, as a tuple.

    Args:
        where: what they are for, for messages.

    Raises:
        ConfigError: a class, a value whose class does not subclass `Pass`, or anything else.
    """
    if isinstance(given, (Pass, str, bytes, type)) or not isinstance(given, Iterable):
        given = (given,)
    for value in (found := tuple(given)):
        if isinstance(value, Pass):
            continue
        kind = value if isinstance(value, type) else type(value)
        if not issubclass(kind, Pass) and callable(getattr(kind, "run", None)):
            why = f"the class {kind.__name__} does not subclass vdcache.Pass: write class {kind.__name__}(vdcache.Pass)"
        elif isinstance(value, type):
            why = f"{kind.__name__} is a class: give a value of it, {kind.__name__}()"
        else:
            why = f"got {value!r}; a pass is a value of a class that subclasses vdcache.Pass, as MarkBranches() is one"
        raise ConfigError(f"{where} is made of passes, and {why}")
    return found


def option_text(value: Any) -> str:
    """The value of an option as the text of a pass holds it."""
    if isinstance(value, (tuple, list, frozenset, set)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return "[" + ",".join(option_text(v) for v in items) + "]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value)


@dataclass(frozen=True)
class PassRecord:
    """What the pipeline remembers of one pass: its text, what it did, and how long it took (seconds)."""

    text: str
    rewrites: int
    refusals: tuple[Refusal, ...]
    seconds: float


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. The order is checked when the pipeline is made, without a graph.

    Args:
        passes: each finds the facts that it requires among those that `given` holds and earlier passes ensure.
        verify: verify the contract of every pass: what it ensures, the facts that held before, a graph that is one, an analysis that is true, and that
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
        for index, a_pass in enumerate(self.passes):
            watch.before(graph)
            began = time.perf_counter()
            try:
                result = self._run_one(a_pass, graph, self.verify or watch.debug.verify)
            except VdcacheError as error:
                error.add_note(f"in pass '{a_pass}' after {[s.text for s in steps] or 'capture'}")
                watch.failed(a_pass, error)
                raise
            graph = result.graph
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
        if known is None:
            from vdcache.passes.catalogue import known_passes

            known = known_passes()
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


def drop_dead_code(graph: fx.Graph, keep: Callable[[fx.Node], bool] | None = None) -> int:
    """Remove nodes that nothing uses; those that `keep` names, inputs and outputs stay. Returns how many went."""
    gone = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not (keep and keep(node)):
            graph.erase_node(node)
            gone += 1
    return gone


def copy_meta(node: fx.Node, a_pass: str, like: fx.Node, value: torch.Tensor | None = None) -> fx.Node:
    """Give a new node the meta of the node that it stands for, and say who made it."""
    node.meta = {**like.meta, "vdcache": a_pass}
    if value is not None:
        node.meta["val"] = value
    return node


def put_cache_guard(value: fx.Node, slot: str, a_pass: Pass, base: fx.Node | None = None) -> fx.Node:
    """Insert a cache guard after `value` and redirect its users to it.

    Steps that reuse the slot's group skip every operation that only `value` needed.

    Args:
        slot: "group/name", unlike every other slot of the graph.
        base: what is subtracted before the value is kept, and added to what was kept; computed before the value, of its type.
    """
    with value.graph.inserting_after(value):
        cache_guard = value.graph.call_function(dialect.cache_guard, (value, slot) if base is None else (value, slot, base))
    copy_meta(cache_guard, str(a_pass), value)
    value.replace_all_uses_with(cache_guard, delete_user_cb=lambda user: user is not cache_guard)
    return cache_guard
