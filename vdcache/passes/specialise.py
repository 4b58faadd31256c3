"""specialise: from the guarded graph to the static graph of one plan.

    y = add(x, cache_guard(f(x), s))   --reuse s-->       y = add(x, input)
                                 --recompute s-->   h = f(x); y = add(x, h); return (y, …, h)

What a reused slot kept becomes inputs of the graph, from which a predictor makes its value, so all that only it needed is dead.
A recomputed slot becomes outputs. With a base, reuse gives base + input, and recomputing returns fresh − base beside the fresh
value itself. Predictions of float16 values stay within its range. An observation whose group this plan computes turns into the sums of its measure against its previous value, which
is an input; zeros go in where there is none yet. What is emitted becomes an output where nothing is reused. Recompute-all is
bit-exact. The result holds no dialect node; the order of what was added is in `VariantIO`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx

from vdcache.errors import ContractError
from vdcache.ir import dialect
from vdcache.ir.capture import signature
from vdcache.ir.edit import add_input, backward_slice, call, evaluate, inline, inputs, laid_out, outputs, set_outputs
from vdcache.ir.facts import Fact
from vdcache.ir.ops import CASTS, VIEWS, is_effectful, is_work
from vdcache.passes.base import Pass, PassResult, drop_dead_code
from vdcache.passes.predictors import (
    LAST,
    AnyPredictor,
    ByGroup,
    LastValue,
    Predictor,
    Ring,
    as_told,
    graph_of,
    numbers_of,
    predictor_of,
    read_predictor,
)
from vdcache.passes.sums import sums_of
from vdcache.util.slots import group_of

__all__ = ["Specialise", "VariantIO", "VariantOutputs", "contiguous", "variant_io"]

aten = torch.ops.aten
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.addcmul.default})
_CARRY = _SUMS | VIEWS | CASTS | {aten.mul.Tensor}  # what a predicted value goes through on its way into the stream


class VariantOutputs(NamedTuple):
    """What a variant returns, as nodes or as values: `flat` is the order, and `VariantIO.unpack` reads it.

    Args:
        results: the model's.
        saved: what is kept, by name.
        observed: what is measured, by name.
        emitted: what the listeners are given, by name.
        sums: a float32 vector of all sums of what is measured; None where nothing is.
    """

    results: Sequence[Any]
    saved: dict[str, Any]
    observed: dict[str, Any]
    emitted: dict[str, Any]
    sums: Any = None

    def flat(self) -> list[Any]:
        """As the graph returns it."""
        sums = [] if self.sums is None else [self.sums]
        return [*self.results, *self.saved.values(), *self.observed.values(), *self.emitted.values(), *sums]


@dataclass(frozen=True)
class VariantIO:
    """What a variant takes after the model's inputs, in order, and what it returns.

    Args:
        reads: kept values that are inputs: a slot's name, with "#1", "#2" … where its predictor keeps several.
        before: values kept at the computed step before that are inputs (after `reads`): a predictor of higher order needs them.
        previous: observations whose previous values are inputs (after `before`).
        numbers: groups whose predictors are told of the step (after `previous`): float32 0-d tensors, as many as `predictors.numbers_of` names.
        results: how many results of the model it returns.
        saves: kept values that are outputs. The observations of `previous` are outputs too.
        emits: names of the emitted values that are outputs.
        measures: (observation, distance, strides) of all sums; empty for none.
        read_values, before_values, previous_values, number_values: fake tensors of the added inputs, contiguous.
    """

    reads: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    previous: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    results: int = 1
    saves: tuple[str, ...] = ()
    emits: tuple[str, ...] = ()
    measures: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    read_values: tuple[torch.Tensor, ...] = ()
    before_values: tuple[torch.Tensor, ...] = ()
    previous_values: tuple[torch.Tensor, ...] = ()
    number_values: tuple[torch.Tensor, ...] = ()

    @property
    def added_values(self) -> tuple[torch.Tensor, ...]:
        """All added inputs, in order."""
        return (*self.read_values, *self.before_values, *self.previous_values, *self.number_values)

    @property
    def reused(self) -> tuple[str, ...]:
        """The slots that are reused."""
        return tuple(dict.fromkeys(r.partition("#")[0] for r in self.reads))

    def unpack(self, outputs: Iterable[Any]) -> VariantOutputs:
        """What a variant returned, by name."""
        rest = iter(outputs)
        return VariantOutputs(
            list(itertools.islice(rest, self.results)),
            dict(zip(self.saves, rest, strict=False)),
            dict(zip(self.previous, rest, strict=False)),
            dict(zip(self.emits, rest, strict=False)),
            next(rest, None),
        )


def variant_io(graph: fx.GraphModule) -> VariantIO:
    found = graph.meta.get("vdcache.variant")
    return found if isinstance(found, VariantIO) else VariantIO()


class _Added:
    """The inputs that a variant has beside the model's."""

    def __init__(self, graph: fx.Graph, provenance: str) -> None:
        self._graph, self._made_by = graph, provenance
        self._inputs: dict[str, dict[str, fx.Node]] = {"read": {}, "before": {}, "previous": {}}
        self._numbers: dict[str, tuple[fx.Node, ...]] = {}

    def input(self, kind: str, name: str, like: torch.Tensor) -> fx.Node:
        own = self._inputs[kind]
        own[name] = add_input(self._graph, f"{kind}_{len(own)}", like, self._made_by)
        return own[name]

    def numbers(self, group: str, names: Sequence[str], like: torch.Tensor) -> tuple[fx.Node, ...]:
        """What a group's predictor is told of the step. On the CPU, where it is known: a kernel takes the numbers as they are."""
        if group not in self._numbers:
            number, place = like.new_empty((), dtype=torch.float32, device="cpu"), len(self._numbers)
            self._numbers[group] = tuple(add_input(self._graph, f"{n}_{place}", number, self._made_by) for n in names)
        return self._numbers[group]

    def _drop_unread(self) -> None:
        for own in self._inputs.values():
            for name, node in list(own.items()):
                if not node.users:
                    self._graph.erase_node(own.pop(name))
        for group, nodes in list(self._numbers.items()):
            if not any(n.users for n in nodes):
                for n in self._numbers.pop(group):
                    self._graph.erase_node(n)

    def finish(self) -> dict[str, Any]:
        """Drop the inputs that nothing reads (of slots behind other reused slots), put the rest in order, and say which there
        are.
        """
        self._drop_unread()
        kinds = {kind: list(own.values()) for kind, own in self._inputs.items()}
        kinds["number"] = [node for nodes in self._numbers.values() for node in nodes]
        added = [node for own in kinds.values() for node in own]
        for before, node in itertools.pairwise([*(n for n in inputs(self._graph) if n not in added)][-1:] + added):
            before.append(node)
        return {
            "reads": tuple(self._inputs["read"]),
            "before": tuple(self._inputs["before"]),
            "previous": tuple(self._inputs["previous"]),
            "numbers": tuple(self._numbers),
            **{f"{kind}_values": tuple(n.meta["val"] for n in own) for kind, own in kinds.items()},
        }


@dataclass(frozen=True)
class Specialise(Pass):
    """Specialise the guarded graph to one plan.

    Args:
        reuse: the groups that are reused.
        save: which recomputed slots are outputs: "all", "none" (then nothing is observed either), or "needed", those
            that `slots` names.
        slots: the slots that some plan reads; the values of others need not be kept.
        predictor: what a reused slot is given, and what is kept for it.
        observe: whether observations are measured.
    """

    name: ClassVar[str] = "specialise"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.GUARDED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAIN})

    reuse: frozenset[str] = frozenset()
    save: str = "all"
    slots: tuple[str, ...] = ()
    predictor: AnyPredictor | ByGroup = field(default=LAST, metadata={"read": read_predictor})
    observe: bool = True

    def run(self, graph: fx.GraphModule) -> PassResult:
        g = graph.graph
        marks = [*dialect.cache_guards(g), *dialect.observations(g), *dialect.emissions(g), *dialect.invariants(g)]
        for mark in dialect.invariants(g):  # nobody holds these: they are computed
            mark.replace_all_uses_with(mark.args[0])  # type: ignore[arg-type]
            g.erase_node(mark)
        writes = bool(signature(graph).mutations)
        added = _Added(g, str(self))
        fresh: dict[str, fx.Node] = {}
        for cache_guard in dialect.cache_guards(g):
            slot = str(cache_guard.args[1])
            if group_of(slot) in self.reuse:
                self._reuse(g, cache_guard, added)
            else:
                fresh[slot] = cache_guard
        wanted = backward_slice(outputs(g))
        saved: dict[str, fx.Node] = {}
        for slot, cache_guard in fresh.items():
            if cache_guard in wanted and self._keeps(slot):
                saved |= self._saved(g, cache_guard, added)
        for node in fresh.values():
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]

        wanted = backward_slice([*outputs(g), *saved.values()])
        seen: dict[str, fx.Node] = {}
        sums: list[fx.Node] = []
        measures: list[tuple[str, str, tuple[int, ...]]] = []
        for mark in dialect.observations(g):
            value, name, distance, strides, frames = mark.args
            slot = str(name)
            if self.observe and self.save != "none" and _there(value, wanted) and group_of(slot) not in self.reuse:
                seen[slot] = contiguous(g, value, mark, str(self))  # type: ignore[arg-type]
                before = added.input("previous", slot, value.meta["val"])  # type: ignore[union-attr]
                with g.inserting_before(mark):
                    sums += sums_of(g, seen[slot], before, str(distance), strides, frames, provenance=str(self))  # type: ignore[arg-type]
                measures.append((slot, str(distance), tuple(strides)))  # type: ignore[arg-type]
            g.erase_node(mark)
        emitted: dict[str, fx.Node] = {}
        for mark in dialect.emissions(g):
            if not self.reuse:
                emitted[str(mark.args[1])] = mark.args[0]  # type: ignore[assignment]
            g.erase_node(mark)
        stacked = None
        if sums:
            with g.inserting_before(g.output_node()):
                stacked = call(g, aten.stack.default, sums, provenance=str(self))
        results = _written_back(graph)
        set_outputs(g, VariantOutputs(results, saved, seen, emitted, stacked).flat())
        drop_dead_code(g, keep=is_effectful)
        graph.meta["vdcache.variant"] = VariantIO(
            results=len(results), saves=tuple(saved), emits=tuple(emitted), measures=tuple(measures), **added.finish()
        )
        return PassResult(graph, rewrites=len(marks) + writes)

    def _keeps(self, slot: str) -> bool:
        return self.save == "all" or (self.save == "needed" and slot in self.slots)

    def _predictor(self, slot: str, like: torch.Tensor, added: _Added) -> tuple[Predictor, Sequence[fx.Node]]:
        """What is traced for a slot, and what it is told of the step."""
        found = predictor_of(self.predictor, group_of(slot))
        numbers, graph = added.numbers(group_of(slot), numbers_of(found).names, like), graph_of(found)
        return graph, as_told(graph, numbers)

    def _reuse(self, g: fx.Graph, cache_guard: fx.Node, added: _Added) -> None:
        """Put what a predictor makes of new inputs in the place of a guarded value."""
        slot, like = str(cache_guard.args[1]), cache_guard.meta["val"]
        base = cache_guard.args[2] if len(cache_guard.args) > 2 else None
        predictor, numbers = self._predictor(slot, like, added)
        kept = [added.input("read", name, _kept_form(predictor, i, like)) for i, name in enumerate(_names(predictor, slot))]
        with g.inserting_before(cache_guard):
            value = _traced(g, predictor, "predict", (kept, numbers), like, provenance=str(self))[0]
            half, own = like.dtype == torch.float16, value.meta["val"].dtype
            if own != like.dtype and not half:
                value = call(g, aten._to_copy.default, value, dtype=like.dtype, provenance=str(self))
            if isinstance(base, fx.Node):
                if half and own != like.dtype:
                    base = call(g, aten._to_copy.default, base, dtype=own, provenance=str(self))
                value = call(g, aten.add.Tensor, base, value, provenance=str(self))
            if half and (own != like.dtype or not isinstance(predictor, LastValue) or base is not None):
                value = _within_half(g, value, provenance=str(self))
                if own != like.dtype:
                    value = call(g, aten._to_copy.default, value, dtype=like.dtype, provenance=str(self))
            if not _views_fit(cache_guard, value.meta["val"]):
                value = laid_out(g, value, like, provenance=str(self))
        cache_guard.replace_all_uses_with(value)
        g.erase_node(cache_guard)
        _clamp_sums(g, value, provenance=str(self))

    def _saved(self, g: fx.Graph, cache_guard: fx.Node, added: _Added) -> dict[str, fx.Node]:
        """What a recomputed slot keeps, by name."""
        slot = str(cache_guard.args[1])
        predictor, numbers = self._predictor(slot, cache_guard.meta["val"], added)
        new, base = cache_guard.args[0], cache_guard.args[2] if len(cache_guard.args) > 2 else None
        after = cache_guard.next
        with g.inserting_before(after):
            if isinstance(base, fx.Node):
                if predictor.tensors > 1:  # differences of differences: formed in float32 from the start
                    new, base = (
                        call(g, aten._to_copy.default, x, dtype=torch.float32, provenance=str(self)) for x in (new, base)
                    )
                new = call(g, aten.sub.Tensor, new, base, provenance=str(self))
            previous: list[fx.Node] = []
            if predictor.tensors > 1:
                like = cache_guard.meta["val"]
                previous = [
                    added.input("before", name, _kept_form(predictor, i, like))
                    for i, name in enumerate(_names(predictor, slot))
                ]
            values = _traced(g, predictor, "store", (new, previous, numbers), cache_guard.meta["val"], provenance=str(self))
        return {
            name: v if v in previous else contiguous(g, v, after, str(self))
            for name, v in zip(_names(predictor, slot), values, strict=True)
        }


def _traced(g: fx.Graph, predictor: Predictor, what: str, args: Any, like: torch.Tensor, provenance: str) -> list[fx.Node]:
    """What a predictor's function gives, as nodes: so many values as it says, of the shape of the guarded one."""
    try:
        found = inline(g, getattr(predictor, what), args, provenance=provenance)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ContractError(
            f"'{what}' of the predictor {predictor} cannot be traced: {type(error).__name__}: {reason}. It is given tensors without numbers: "
            "choose with torch.where, never with 'if'"
        ) from error
    values = [found] if isinstance(found, fx.Node) else list(found)
    many = 1 if what == "predict" else predictor.tensors
    shapes = [tuple(v.meta["val"].shape) if isinstance(v, fx.Node) else v for v in values]
    if len(values) != many or any(str(s) != str(tuple(like.shape)) for s in shapes):
        raise ContractError(
            f"'{what}' of the predictor {predictor} gives {shapes} for a value of {tuple(like.shape)}; it gives {many} of that shape"
        )
    return values


def _within_half(g: fx.Graph, value: fx.Node, provenance: str) -> fx.Node:
    """`value`, within the range of float16, which ends where extrapolation goes beyond anything that the model itself ever gives."""
    most = torch.finfo(torch.float16).max
    return call(g, aten.clamp.default, value, -most, most, provenance=provenance)


def _clamp_sums(g: fx.Graph, value: fx.Node, provenance: str) -> None:
    """Keep the float16 sums that a predicted value goes into, behind its gate and casts, within their range."""
    todo, seen = [value], {value}
    while todo:
        node = todo.pop()
        for user in list(node.users):
            out = user.meta.get("val")
            if user in seen or user.target not in _CARRY or not isinstance(out, torch.Tensor):
                continue
            seen.add(user)
            narrows = user.target in CASTS and node.meta["val"].dtype != torch.float16
            if out.dtype == torch.float16 and (narrows or user.target in _SUMS):
                others = list(user.users)
                with g.inserting_after(user):
                    clamped = _within_half(g, user, provenance)
                for other in others:
                    other.replace_input_with(user, clamped)
            else:
                todo.append(user)


def _views_fit(cache_guard: fx.Node, value: torch.Tensor) -> bool:
    """Whether the views of a guarded value can be taken of one that lies otherwise in memory: `view` copies nothing."""
    if not all(isinstance(s, int) for s in (*value.shape, *cache_guard.meta["val"].stride(), *value.stride())):
        return True  # asking symbols would add shape guards
    todo: list[tuple[fx.Node, Any]] = [(cache_guard, value)] if value.stride() != cache_guard.meta["val"].stride() else []
    while todo:
        node, now = todo.pop()
        for user in node.users:
            if user.target in VIEWS and user.args[0] is node:
                try:
                    todo.append((user, evaluate(user.target, (now, *user.args[1:]), user.kwargs)))
                except (RuntimeError, ValueError):
                    return False
    return True


def _names(predictor: Predictor, slot: str) -> list[str]:
    return [slot, *(f"{slot}#{i}" for i in range(1, predictor.tensors))]


def _kept_form(predictor: Predictor, place: int, like: torch.Tensor) -> torch.Tensor:
    """The form of a kept tensor: the value's own, or float32 where a predictor of no ring keeps several."""
    if isinstance(predictor, Ring):
        kind = predictor.kept_type(place, like.dtype)
        return like if kind == like.dtype else like.to(kind)
    return like.float() if predictor.tensors > 1 and like.dtype != torch.float32 else like


def _there(value: Any, wanted: set[fx.Node]) -> bool:
    """Whether a variant computes `value` anyway, or all but a difference, a slice or a cast of it."""
    if value in wanted or value.op == "placeholder":
        return True
    return not is_work(value) and bool(value.all_input_nodes) and all(_there(p, wanted) for p in value.all_input_nodes)


def contiguous(g: fx.Graph, value: fx.Node, before: fx.Node, provenance: str) -> fx.Node:
    """`value` as a contiguous tensor: what is kept must have the strides that the next variant expects."""
    fake = value.meta["val"]
    if _surely_contiguous(fake):
        return value
    with g.inserting_before(before):
        return call(g, aten.clone.default, value, memory_format=torch.contiguous_format, provenance=provenance)


def _surely_contiguous(value: torch.Tensor) -> bool:
    if not all(isinstance(s, int) for s in (*value.shape, *value.stride())):
        return False  # asking symbols would add shape guards
    return value.is_contiguous()


def _written_back(graph: fx.GraphModule) -> list[Any]:
    """Write mutated inputs back. The model's results."""
    g, sig = graph.graph, signature(graph)
    values, given = outputs(g), inputs(g)
    with g.inserting_before(g.output_node()):
        for output, position in sig.mutations:
            call(g, aten.copy_.default, given[position], values[output], provenance="specialise")
    graph.meta["vdcache"] = replace(sig, mutations=())  # they are written here
    return values[len(sig.mutations) :]
