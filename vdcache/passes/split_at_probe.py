"""split-at-probe: one of the two graphs around the frontier of the probes.

    x → a → b → y, probe(a)   -->   head: x → a; returns (a, sums of its change)      tail: (x, a) → b → y

The head is what the probes need and nothing more. The tail takes what the head computed as inputs, so nothing is computed
twice; views are repeated in the tail, because they cost nothing and what crosses should be dense. Bit-exact: both parts run the
same operations.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import fx

from vdcache.errors import CaptureError
from vdcache.ir import dialect
from vdcache.ir.capture import signature
from vdcache.ir.edit import add_input, backward_slice, call, outputs, set_outputs
from vdcache.ir.facts import Fact
from vdcache.ir.ops import SLICES, VIEWS, is_effectful, tensor_of
from vdcache.passes.base import Pass, PassResult, Refusal, drop_dead_code
from vdcache.passes.specialise import contiguous
from vdcache.passes.sums import sums_of
from vdcache.util.fields import one_of

__all__ = ["HeadIO", "SplitAtProbe", "head_io"]

aten = torch.ops.aten
_COPIES = frozenset(
    t
    for t in SLICES
    if isinstance(t, torch._ops.OpOverload) and t.overloadpacket in (aten.index, aten.index_select, aten.gather)
)
_REPEATED = (VIEWS | SLICES | {aten.expand.default}) - _COPIES  # what the tail repeats instead of taking it


@dataclass(frozen=True)
class HeadIO:
    """What a head takes after the model's inputs, and what it returns.

    Args:
        probes: (name, distance, since) in order: their previous values are its last inputs.
        carried: names of the nodes that it hands to the tail: its first outputs. The values of the probes follow, and last a
            float32 vector of all sums of their changes.
        carried_values, previous_values: fake tensors of these.
    """

    probes: tuple[tuple[str, str, str], ...] = ()
    carried: tuple[str, ...] = ()
    carried_values: tuple[torch.Tensor, ...] = ()
    previous_values: tuple[torch.Tensor, ...] = ()

    def unpack(self, outputs: Sequence[Any]) -> tuple[tuple[Any, ...], Any, tuple[Any, ...]]:
        """What a head returned: the values of the probes, the sums of their changes, and what is carried."""
        at = len(self.carried)
        return tuple(outputs[at:-1]), outputs[-1], tuple(outputs[:at])


def head_io(graph: fx.GraphModule) -> HeadIO:
    found = graph.meta.get("vdcache.head")
    return found if isinstance(found, HeadIO) else HeadIO()


@dataclass(frozen=True)
class SplitAtProbe(Pass):
    """Keep one part of a probed graph.

    A cache guard in the head goes: what it guards is computed before anything can be decided.

    Args:
        part: "head" or "tail".

    Raises:
        ConfigError: another part.
        CaptureError: the head writes, draws random numbers or communicates, and would do so in another order.
    """

    name: ClassVar[str] = "split-at-probe"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.PROBED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.PROBED})

    part: Annotated[str, one_of("head", "tail")] = "tail"

    def run(self, graph: fx.GraphModule) -> PassResult:
        g = graph.graph
        marks = dialect.probes(g)
        if not marks:
            return PassResult(graph, 0)
        first = backward_slice([m.args[0] for m in marks])
        # an operation of several results is computed where one of them is
        first |= {u for n in first if tensor_of(n) is None for u in n.users if u.target is operator.getitem}
        if wrong := next((n for n in first if is_effectful(n)), None):
            raise CaptureError(
                f"the policy needs a value that '{wrong.name}' ({wrong.target}) is part of, and that operation cannot be moved before the rest"
            )
        refusals = self._without_guards(g, first)
        crossing = _crossing(g, first)
        if self.part == "tail":
            for mark in marks:
                g.erase_node(mark)
            for number, node in enumerate(crossing):
                given = add_input(g, f"carried_{number}", node.meta["val"], str(self))
                given.meta["val"] = node.meta["val"]  # with the strides that the head leaves
                node.replace_all_uses_with(given)
        else:
            self._head(graph, marks, crossing)
        drop_dead_code(g, keep=_stays if self.part == "tail" else None)
        return PassResult(graph, len(marks), tuple(refusals))

    def _without_guards(self, g: fx.Graph, first: set[fx.Node]) -> list[Refusal]:
        refusals = []
        for cache_guard in dialect.cache_guards(g):
            if cache_guard in first:
                refusals.append(Refusal(cache_guard.name, "it is computed before the policy can decide"))
                cache_guard.replace_all_uses_with(cache_guard.args[0])  # type: ignore[arg-type]
                first.discard(cache_guard)
                g.erase_node(cache_guard)
        return refusals

    def _head(self, graph: fx.GraphModule, marks: Sequence[fx.Node], crossing: Sequence[fx.Node]) -> None:
        g = graph.graph
        values: list[fx.Node] = []
        sums: list[fx.Node] = []
        previous: list[fx.Node] = []
        for mark in marks:
            value, distance = contiguous(g, mark.args[0], mark, str(self)), str(mark.args[2])  # type: ignore[arg-type]
            before = add_input(g, f"previous_{len(previous)}", value.meta["val"], str(self))
            with g.inserting_before(g.output_node()):
                sums += sums_of(g, value, before, distance, provenance=str(self))
            values.append(value)
            previous.append(before)
        with g.inserting_before(g.output_node()):
            stacked = call(g, aten.stack.default, sums, provenance=str(self))
        graph.meta["vdcache.head"] = HeadIO(
            tuple((str(m.args[1]), str(m.args[2]), str(m.args[3])) for m in marks),
            tuple(n.name for n in crossing),
            tuple(n.meta["val"] for n in crossing),
            tuple(n.meta["val"] for n in previous),
        )
        for mark in [*dialect.observations(g), *dialect.emissions(g), *marks]:
            g.erase_node(mark)
        set_outputs(g, [*crossing, *values, stacked])
        graph.meta["vdcache"] = replace(signature(graph), mutations=())  # they are the tail's


def _repeats(node: fx.Node) -> bool:
    """Whether the tail repeats a node: a view, or one of the views that an operation makes at once."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and source.target in _REPEATED
    return node.target in _REPEATED


def _stays(node: fx.Node) -> bool:
    return is_effectful(node) or dialect.is_dialect(node)


def _crossing(g: fx.Graph, first: set[fx.Node]) -> list[fx.Node]:
    """What the rest needs of the first part, seen through what the rest repeats, in order."""
    todo = [n for n in outputs(g) if isinstance(n, fx.Node) and n in first]
    for node in g.nodes:
        if node not in first and node.target is not dialect.probe and node.op != "output":
            todo += [p for p in node.all_input_nodes if p in first]
    found, seen = set(), set()
    while todo:
        node = todo.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if _repeats(node) or tensor_of(node) is None:
            todo += node.all_input_nodes
        else:
            found.add(node)
    return [n for n in g.nodes if n in found]
