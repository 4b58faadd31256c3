"""specialise: from the guarded graph to the static graph of one plan.

    y = add(x, guard(f(x), s))   --reuse s-->       y = add(x, input)
                                 --recompute s-->   h = f(x); y = add(x, h); return (y, …, h)

A reused slot becomes an input of the graph, so all that only it needed is dead. A recomputed slot becomes an output. With
a base, reuse gives base + input, and recomputing returns fresh − base beside the fresh value itself. An observation whose
group this plan computes turns into the sums of its measure against its previous value, which is an input; zeros go in where there
is none yet. What is emitted becomes an output where nothing is reused. Recompute-all is bit-exact. The result holds no dialect
node; the order of what was added is in `VariantIO`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from vdcache.ir import dialect
from vdcache.ir.capture import signature
from vdcache.ir.dialect import group_of
from vdcache.ir.edit import add_input, call, inputs, live_nodes, outputs, set_outputs
from vdcache.ir.facts import Fact
from vdcache.ir.ops import is_effectful
from vdcache.passes.base import Pass, PassResult, drop_dead_code

__all__ = ["SUMS", "Specialise", "VariantIO", "variant_io"]

aten = torch.ops.aten
SUMS = {"l1": 2, "l2": 2, "cosine": 3}  # how many sums a distance is made of


@dataclass(frozen=True)
class VariantIO:
    """What a variant takes after the model's inputs, and returns after the model's outputs, in order.

    Args:
        reads: slots whose saved values are inputs.
        previous: observations whose previous values are inputs (after `reads`).
        saves: slots whose values are outputs.
        observed: observations whose values are outputs (after `saves`); the same as `previous`.
        emits: names of the emitted values that are outputs (after `observed`).
        measures: (observation, distance, strides) of the last output, a float32 vector of all sums; empty for none.
        read_values, previous_values: fake tensors of the added inputs, dense.
    """

    reads: tuple[str, ...] = ()
    previous: tuple[str, ...] = ()
    saves: tuple[str, ...] = ()
    emits: tuple[str, ...] = ()
    measures: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    read_values: tuple[torch.Tensor, ...] = ()
    previous_values: tuple[torch.Tensor, ...] = ()


def variant_io(graph: fx.GraphModule) -> VariantIO:
    found = graph.meta.get("vdcache.variant")
    return found if isinstance(found, VariantIO) else VariantIO()


@dataclass(frozen=True)
class Specialise(Pass):
    """Specialise the guarded graph to one plan.

    Args:
        reuse: the groups that are reused.
        save: which recomputed slots are outputs: "all", "none" (then nothing is observed either), or "needed", those
            that `slots` names.
        slots: the slots that some plan reads; the values of others need not be kept.
    """

    name: ClassVar[str] = "specialise"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.GUARDED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAIN})

    reuse: frozenset[str] = frozenset()
    save: str = "all"
    slots: tuple[str, ...] = ()

    def run(self, graph: fx.GraphModule) -> PassResult:
        g = graph.graph
        marks = [*dialect.guards(g), *dialect.observations(g), *dialect.emissions(g)]
        reads: dict[str, fx.Node] = {}
        saves: dict[str, fx.Node] = {}
        for guard in dialect.guards(g):
            slot = str(guard.args[1])
            if group_of(slot) in self.reuse:
                reads[slot] = self._reuse(g, guard, len(reads))
            else:
                saves[slot] = guard
        wanted = live_nodes(outputs(g))
        kept = [s for s, node in saves.items() if node in wanted and self._keeps(s)]
        saved = {s: self._saved(g, saves[s]) for s in kept}
        for node in saves.values():
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        reads = {s: node for s, node in reads.items() if node.users or node in wanted}

        wanted = live_nodes([*outputs(g), *saved.values()])
        seen: dict[str, fx.Node] = {}
        previous: dict[str, fx.Node] = {}
        sums: list[fx.Node] = []
        measures: list[tuple[str, str, tuple[int, ...]]] = []
        for mark in dialect.observations(g):
            value, name, distance, strides, frames = mark.args
            slot = str(name)
            if self.save != "none" and value in wanted and group_of(slot) not in self.reuse:
                seen[slot] = dense(g, value, mark, str(self))  # type: ignore[arg-type]
                previous[slot] = add_input(g, f"previous_{len(previous)}", value.meta["val"], str(self))  # type: ignore[union-attr]
                sums += self._sums(g, seen[slot], previous[slot], str(distance), strides, frames, mark)  # type: ignore[arg-type]
                measures.append((slot, str(distance), tuple(strides)))  # type: ignore[arg-type]
            g.erase_node(mark)
        emitted: dict[str, fx.Node] = {}
        for mark in dialect.emissions(g):
            if not self.reuse:
                emitted[str(mark.args[1])] = mark.args[0]  # type: ignore[assignment]
            g.erase_node(mark)
        extra = [*saved.values(), *seen.values(), *emitted.values()]
        if sums:
            with g.inserting_before(g.output_node()):
                extra.append(call(g, aten.stack.default, sums, made_by=str(self)))
        _finish(graph, extra)
        drop_dead_code(g, keep=is_effectful)
        for slot, node in list(reads.items()):
            if not node.users:  # behind another reused slot
                del reads[slot]
                g.erase_node(node)
        graph.meta["vdcache.variant"] = VariantIO(
            reads=tuple(reads),
            previous=tuple(previous),
            saves=tuple(saved),
            emits=tuple(emitted),
            measures=tuple(measures),
            read_values=tuple(n.meta["val"] for n in reads.values()),
            previous_values=tuple(n.meta["val"] for n in previous.values()),
        )
        return PassResult(graph, rewrites=len(marks) + bool(signature(graph).mutations))

    def _keeps(self, slot: str) -> bool:
        return self.save == "all" or (self.save == "needed" and slot in self.slots)

    def _reuse(self, g: fx.Graph, guard: fx.Node, number: int) -> fx.Node:
        """Put a new input in the place of a guarded value."""
        base = guard.args[2] if len(guard.args) > 2 else None
        saved = add_input(g, f"saved_{number}", guard.meta["val"], str(self))
        value = saved
        if isinstance(base, fx.Node):
            with g.inserting_before(guard):
                value = call(g, aten.add.Tensor, base, saved, made_by=str(self))
        guard.replace_all_uses_with(value)
        g.erase_node(guard)
        return saved

    def _saved(self, g: fx.Graph, guard: fx.Node) -> fx.Node:
        """The value that a recomputed slot keeps."""
        fresh, base = guard.args[0], guard.args[2] if len(guard.args) > 2 else None
        if not isinstance(base, fx.Node):
            return dense(g, fresh, guard, str(self))  # type: ignore[arg-type]
        with g.inserting_after(guard):
            mark = g.call_function(dialect.guard, ())
        with g.inserting_before(mark):
            delta = call(g, aten.sub.Tensor, fresh, base, made_by=str(self))
        kept = dense(g, delta, mark, str(self))
        g.erase_node(mark)
        return kept

    def _sums(
        self,
        g: fx.Graph,
        value: fx.Node,
        previous: fx.Node,
        distance: str,
        strides: tuple[int, ...],
        frames: int,
        mark: fx.Node,
    ) -> list[fx.Node]:
        """The sums that distance and motion are made of, each float32 and 0-d (`runtime.measures` divides them)."""

        def op(target: object, *args: object, **kwargs: object) -> fx.Node:
            return call(g, target, *args, made_by=str(self), **kwargs)

        def total(node: fx.Node) -> fx.Node:
            return op(aten.sum.default, node)

        with g.inserting_before(mark):
            now = op(aten._to_copy.default, value, dtype=torch.float32)
            then = op(aten._to_copy.default, previous, dtype=torch.float32)
            if distance == "cosine":
                sums = [total(op(aten.mul.Tensor, a, b)) for a, b in ((then, now), (then, then), (now, now))]
            else:
                size = aten.abs.default if distance == "l1" else aten.square.default
                sums = [total(op(size, op(aten.sub.Tensor, then, now))), total(op(size, then))]
            if strides:
                # [B, frames * S, C] -> [B, frames, S * C]: one row a frame
                rows = op(aten.reshape.default, now, [-1, frames, _row(value, frames)])
                for i in strides:
                    late = op(aten.slice.Tensor, rows, 1, i, frames)
                    early = op(aten.slice.Tensor, rows, 1, 0, frames - i)
                    sums.append(total(op(aten.abs.default, op(aten.sub.Tensor, late, early))))
                    sums.append(total(op(aten.abs.default, late)))
                    sums.append(total(op(aten.abs.default, early)))
        return sums


def _row(value: fx.Node, frames: int) -> int:
    tokens, width = value.meta["val"].shape[1:]
    return int(tokens) // frames * int(width)


def dense(g: fx.Graph, value: fx.Node, before: fx.Node, made_by: str) -> fx.Node:
    """`value` as a contiguous tensor: what is kept must have the strides that the next variant expects."""
    fake = value.meta["val"]
    if _surely_contiguous(fake):
        return value
    with g.inserting_before(before):
        return call(g, aten.clone.default, value, memory_format=torch.contiguous_format, made_by=made_by)


def _surely_contiguous(value: torch.Tensor) -> bool:
    if not all(isinstance(s, int) for s in (*value.shape, *value.stride())):
        return False  # asking symbols would add shape guards
    return value.is_contiguous()


def _finish(graph: fx.GraphModule, extra: list[fx.Node]) -> None:
    """Write mutated inputs back, and return the model's results and then `extra`."""
    g, sig = graph.graph, signature(graph)
    values, given = outputs(g), inputs(g)
    with g.inserting_before(g.output_node()):
        for output, position in sig.mutations:
            call(g, aten.copy_.default, given[position], values[output], made_by="specialise")
    set_outputs(g, [*values[len(sig.mutations) :], *extra])
