"""What may be known of a graph, and the one check that says whether it holds."""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
from torch import fx

from vdcache.ir import dialect
from vdcache.ir.errors import ContractError

__all__ = ["Fact", "check", "holding"]


class Fact(enum.Enum):
    """A property of a graph that passes require and ensure."""

    FUNCTIONAL = "functional"  # no node writes into another node's value
    TYPED = "typed"  # every tensor node carries its fake value in meta["val"]
    CANONICAL = "canonical"  # no dropouts, aliases or casts that do nothing
    GUARDED = "guarded"  # every guard has a slot of its own, named "group/name"
    OBSERVED = "observed"  # every observation has a name of its own and a known distance
    PROBED = "probed"  # every probe has a name of its own and a known distance, and nothing reads it
    PLAIN = "plain"  # no dialect node is left


def check(fact: Fact, graph: fx.Graph, after: str = "capture") -> None:
    """Raise ContractError where `fact` does not hold; `after` names what ran last."""
    if problem := _CHECKS[fact](graph):
        node, why = problem
        raise ContractError(f"after {after} the graph is not {fact.value}: '{node.name}' {why}")


def holding(graph: fx.Graph) -> frozenset[Fact]:
    """The facts that hold on a graph, whatever ran on it."""
    return frozenset(f for f, problem in _CHECKS.items() if not problem(graph))


_Problem = tuple[fx.Node, str] | None


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
    for node in dialect.guards(graph):
        if len(node.args) > 2 and node.args[2] is not None:
            fresh, base = node.args[0].meta["val"], node.args[2].meta["val"]  # type: ignore[union-attr]
            if fresh.shape != base.shape or fresh.dtype != base.dtype:
                return node, f"has a base of {base.shape} {base.dtype} for a value of {fresh.shape} {fresh.dtype}"
    return _unique_slots(dialect.guards(graph))


def _observed(graph: fx.Graph) -> _Problem:
    for node in dialect.observations(graph):
        if node.args[2] not in dialect.DISTANCES:
            return node, f"measures {node.args[2]!r}; known are {', '.join(dialect.DISTANCES)}"
    return _unique_slots(dialect.observations(graph))


def _probed(graph: fx.Graph) -> _Problem:
    for node in dialect.probes(graph):
        if node.args[2] not in dialect.DISTANCES or node.args[3] not in dialect.SINCE:
            return (
                node,
                f"measures {node.args[2]!r} since {node.args[3]!r}; known are {', '.join((*dialect.DISTANCES, *dialect.SINCE))}",
            )
        if node.users:
            return node, f"is read by '{next(iter(node.users)).name}'; a probe is a side value"
    return _unique_slots(dialect.probes(graph))


def _plain(graph: fx.Graph) -> _Problem:
    return next(((n, f"is a dialect node ({n.target})") for n in graph.nodes if dialect.is_dialect(n)), None)


_CHECKS: dict[Fact, Callable[[fx.Graph], _Problem]] = {
    Fact.FUNCTIONAL: _functional,
    Fact.TYPED: _typed,
    Fact.CANONICAL: _canonical,
    Fact.GUARDED: _guarded,
    Fact.OBSERVED: _observed,
    Fact.PROBED: _probed,
    Fact.PLAIN: _plain,
}
