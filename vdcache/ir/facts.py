"""What may be known of a graph, and the one check that says whether it holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from vdcache.errors import ConfigError, ContractError
from vdcache.ir import dialect

__all__ = ["FACTS", "Fact", "check", "holding"]

_Problem = tuple[fx.Node, str] | None


@dataclass(frozen=True)
class Fact:
    """A property of a graph that passes require and ensure, with the one check that says whether it holds.

    vdcache's own are attributes of this class, `Fact.CANONICAL` for example. A package that writes passes makes others:

        SORTED = Fact("sorted", lambda graph: next(((n, "stands behind what uses it") for n in …), None))

    Args:
        name: in small letters and dashes.
        problem: given a graph, the first node that is against it and why, as the end of a sentence; None where it holds.

    Raises:
        ConfigError: another name.
    """

    name: str
    problem: Callable[[fx.Graph], _Problem]

    FUNCTIONAL: ClassVar[Fact]  # no node writes into another node's value
    TYPED: ClassVar[Fact]  # every tensor node carries its fake value in meta["val"]
    CANONICAL: ClassVar[Fact]  # no dropouts, aliases or casts that do nothing
    GUARDED: ClassVar[Fact]  # every cache guard has a slot of its own, named "group/name"
    OBSERVED: ClassVar[Fact]  # every observation has a name of its own and a known distance
    PROBED: ClassVar[Fact]  # every probe has a name of its own and a known distance, and nothing reads it
    PLAIN: ClassVar[Fact]  # no dialect node is left

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9-]*", self.name):
            raise ConfigError(f"a fact is named in small letters and dashes, as 'guarded' is; got {self.name!r}")

    def __repr__(self) -> str:
        return f"Fact({self.name!r})"


def check(fact: Fact, graph: fx.Graph, after: str = "capture") -> None:
    """Raise ContractError where `fact` does not hold; `after` names what ran last."""
    if problem := fact.problem(graph):
        node, why = problem
        raise ContractError(f"after {after} the graph is not {fact.name}: '{node.name}' {why}")


def holding(graph: fx.Graph, facts: Iterable[Fact] = ()) -> frozenset[Fact]:
    """Which of vdcache's facts, and of `facts`, hold on a graph, whatever ran on it."""
    return frozenset(f for f in (*FACTS, *facts) if not f.problem(graph))


def _functional(graph: fx.Graph) -> _Problem:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return node, f"calls {node.target}, which writes into its arguments"
    return None


def _typed(graph: fx.Graph) -> _Problem:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and "val" not in node.meta and node.users:
            return node, "has no meta['val']"
    return None


def _canonical(graph: fx.Graph) -> _Problem:
    aten = torch.ops.aten
    for node in graph.nodes:
        if node.target in (aten.alias.default, aten._assert_tensor_metadata.default):
            return node, f"is a {node.target}"
    return None


def _unique_slots(nodes: list[fx.Node]) -> _Problem:
    seen: dict[object, str] = {}
    for node in nodes:
        slot = node.args[1]
        if not isinstance(slot, str) or "/" not in slot:
            return node, f"has slot {slot!r}; a slot is named 'group/name'"
        if slot in seen:
            return node, f"has slot {slot!r}, which '{seen[slot]}' has already"
        seen[slot] = node.name
    return None


def _guarded(graph: fx.Graph) -> _Problem:
    for node in dialect.cache_guards(graph):
        if len(node.args) > 2 and node.args[2] is not None:
            fresh, base = node.args[0].meta["val"], node.args[2].meta["val"]  # type: ignore[union-attr]
            if fresh.shape != base.shape or fresh.dtype != base.dtype:
                return node, f"has a base of {base.shape} {base.dtype} for a value of {fresh.shape} {fresh.dtype}"
    return _unique_slots(dialect.cache_guards(graph))


def _observed(graph: fx.Graph) -> _Problem:
    for node in dialect.observations(graph):
        if node.args[2] not in dialect.DISTANCES:
            return node, f"measures {node.args[2]!r}; known are {', '.join(dialect.DISTANCES)}"
    return _unique_slots(dialect.observations(graph))


def _probed(graph: fx.Graph) -> _Problem:
    for node in dialect.probes(graph):
        if node.args[2] not in dialect.DISTANCES or node.args[3] not in dialect.REFERENCE_STEPS:
            return (
                node,
                f"measures {node.args[2]!r} since {node.args[3]!r}; known are {', '.join((*dialect.DISTANCES, *dialect.REFERENCE_STEPS))}",
            )
        if node.users:
            return node, f"is read by '{next(iter(node.users)).name}'; a probe is a side value"
    return _unique_slots(dialect.probes(graph))


def _plain(graph: fx.Graph) -> _Problem:
    return next(((n, f"is a dialect node ({n.target})") for n in graph.nodes if dialect.is_dialect(n)), None)


Fact.FUNCTIONAL = Fact("functional", _functional)
Fact.TYPED = Fact("typed", _typed)
Fact.CANONICAL = Fact("canonical", _canonical)
Fact.GUARDED = Fact("guarded", _guarded)
Fact.OBSERVED = Fact("observed", _observed)
Fact.PROBED = Fact("probed", _probed)
Fact.PLAIN = Fact("plain", _plain)
FACTS = (Fact.FUNCTIONAL, Fact.TYPED, Fact.CANONICAL, Fact.GUARDED, Fact.OBSERVED, Fact.PROBED, Fact.PLAIN)
