"""The nodes that live between capture and specialisation.

They are plain Python functions, used as targets of `call_function` nodes, and all are identities: a graph that holds
them still computes what it computed before. `specialise` turns every one of them into plain ATen, so none reaches a
compiler.
"""

from __future__ import annotations

from torch import Tensor, fx

__all__ = [
    "DISTANCES",
    "FUNCTIONS",
    "REFERENCE_STEPS",
    "cache_guard",
    "cache_guards",
    "emissions",
    "emit",
    "invariant",
    "invariants",
    "is_dialect",
    "is_dialect_function",
    "observations",
    "observe",
    "probe",
    "probes",
    "with_cache_guard",
]

DISTANCES = ("l1", "l2", "cosine", "magnitude")
REFERENCE_STEPS = ("step", "computed")


def cache_guard(new: Tensor, slot: str, base: Tensor | None = None) -> Tensor:
    """The value `new`, which may come from an earlier step instead.

    Without `base` the saved value is `new`. With it the saved value is `new - base`, and reuse gives
    `base + saved` (a delta list). Recomputing returns `new` itself, bit for bit.

    Args:
        slot: "group/name"; a plan reuses whole groups.
    """
    return new


def observe(value: Tensor, slot: str, distance: str, strides: tuple[int, ...] = (), frames: int = 0) -> Tensor:
    """The value `value`, whose change since the last recomputed step is measured for the policy.

    A recomputing variant returns the sums that the measures are made of (`runtime.metrics`), so that lanes can be
    added up before anything is divided.

    Args:
        slot: "group/name"; its previous value is kept in the store under this name. It is measured in the steps that compute
            the group.
        distance: one of `DISTANCES`.
        strides: frame distances of the motion score (AdaCache equation 7); none when no motion is asked for.
        frames: latent frames; `value` is then [B, frames * S, C] with frames outermost, or has `frames` as dimension 1.
    """
    return value


def emit(value: Tensor, name: str) -> Tensor:
    """The value `value`, which whoever listens to the session is given in every step that reuses nothing.

    Args:
        name: unlike that of every other emission of the graph.
    """
    return value


def probe(value: Tensor, name: str, distance: str, reference_step: str) -> Tensor:
    """The value `value`, whose change the policy must know before it can choose the plan of this very step.

    The graph is split where it stands (`split-at-probe`): what it needs runs first, the plan is chosen, and a variant of the
    rest runs.

    Args:
        name: "group/name"; its previous value is kept in the store under this name.
        distance: one of `DISTANCES`.
        reference_step: what it is compared with: its value at the "step" before, or at the last step that was "computed".
    """
    return value


def invariant(value: Tensor, name: str) -> Tensor:
    """The value `value`, which depends on no latent: a step is given it and need not compute it.

    Args:
        name: "group/name"; the values of one group depend on the same inputs. Unlike that of every other invariant of the graph.
    """
    return value


FUNCTIONS = {f.__name__: f for f in (cache_guard, observe, emit, probe, invariant)}


def is_dialect_function(target: object) -> bool:
    return getattr(target, "__name__", "") in FUNCTIONS and target in FUNCTIONS.values()


def is_dialect(node: fx.Node) -> bool:
    return node.op == "call_function" and is_dialect_function(node.target)


def cache_guards(graph: fx.Graph) -> list[fx.Node]:
    """The cache guard nodes of a graph, in order."""
    return graph.find_nodes(op="call_function", target=cache_guard)


def with_cache_guard(node: fx.Node) -> fx.Node:
    """The cache guard of `node` where it has one: what a reusing step has in the place of its value. Else `node`."""
    return next((u for u in node.users if u.target is cache_guard and u.args[0] is node), node)


def observations(graph: fx.Graph) -> list[fx.Node]:
    """The observe nodes of a graph, in order."""
    return graph.find_nodes(op="call_function", target=observe)


def probes(graph: fx.Graph) -> list[fx.Node]:
    """The probe nodes of a graph, in order."""
    return graph.find_nodes(op="call_function", target=probe)


def invariants(graph: fx.Graph) -> list[fx.Node]:
    """The invariant nodes of a graph, in order."""
    return graph.find_nodes(op="call_function", target=invariant)


def emissions(graph: fx.Graph) -> list[fx.Node]:
    """The emit nodes of a graph, in order."""
    return graph.find_nodes(op="call_function", target=emit)
