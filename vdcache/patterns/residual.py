"""Residual branches by dataflow: `residual_add = base + contribution`, where the contribution is computed from a stream.

Nothing here knows how a gate, a cast, a norm or a projection is spelled. A residual add is an addition one of whose operands
is an ancestor of the other (seen through casts, views, scalings and earlier residual adds) with real work in between; the nodes on
the paths between them that pass no other residual add are the branch. Values from elsewhere may enter it: timestep modulation, text,
rotary tables, other streams. Where every path passes another stream, that stream's value is the branch's source: a control
hint, or the end of a skip around a whole transformer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from vdcache.ir.ops import CASTS, SLICES, VIEWS, is_effectful, is_work, tensor_of
from vdcache.patterns.facts import Refusal
from vdcache.patterns.index import Index

__all__ = ["ResidualAdd", "additions", "asked", "find_residual_adds", "residual_adds_behind", "value_preserving_inputs"]

aten = torch.ops.aten
_TIME = "what is added to depends on nothing but the timestep and parameters, so it is no stream"
_SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class ResidualAdd:
    """A residual addition, while the graph does not change: the nodes behind a `Branch`."""

    node: fx.Node
    base: fx.Node
    source: fx.Node
    contribution: fx.Node | None
    inside: tuple[fx.Node, ...]


def additions(node: fx.Node) -> list[tuple[fx.Node, list[fx.Node], bool]]:
    """(base, what is added, whether what is added is one value) for each way to read `node` as a residual addition."""
    if node.op != "call_function":
        return []
    args = [a for a in node.args if isinstance(a, fx.Node)]
    if node.target is aten.add.Tensor and len(args) == 2:
        a, b = args
        if node.kwargs.get("alpha", 1) == 1:
            return [(a, [b], True), (b, [a], True)]
        return [(a, [b], False)]
    if node.target is aten.sub.Tensor and len(args) == 2:
        minus = args[1].args[0] if args[1].target is aten.neg.default else None
        swapped = [(minus, [args[0]], False)] if isinstance(minus, fx.Node) else []
        return [(args[0], [args[1]], False), *swapped]
    if node.target in (aten.addcmul.default, aten.addmm.default, aten.baddbmm.default, aten.addcdiv.default) and len(args) == 3:
        return [(args[0], args[1:], False)]
    if node.target in (aten.lerp.Tensor, aten.lerp.Scalar):
        return [(args[0], args[1:], False)]
    if node.target is aten.sum.dim_IntList and args and args[0].target is aten.stack.default:
        pieces = _stacked_along(args[0], list(node.args[1]))  # type: ignore[arg-type]
        return [(p, [q for q in pieces if q is not p], False) for p in pieces]
    return []


def _stacked_along(stack: fx.Node, axes: list[object]) -> list[fx.Node]:
    """What is stacked, where that is along these axes."""
    axis = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    return [p for p in stack.args[0] if isinstance(p, fx.Node)] if axes == [axis] else []  # type: ignore[union-attr]


def _carriers(node: fx.Node) -> Iterator[fx.Node]:
    """`node`, and what it repeats but for type, order, a part left out, or a factor."""
    at = node
    while True:
        yield at
        passes = at.target in CASTS or at.target in VIEWS or at.target in SLICES
        if not passes and at.target in _SCALES:
            factor = at.args[1]
            x, y = tensor_of(factor), tensor_of(at)
            passes = x is None or y is None or x.numel() != y.numel()
        if not passes or not at.args or not isinstance(at.args[0], fx.Node):
            return
        at = at.args[0]


def asked(graph: fx.Graph) -> list[fx.Node]:
    """The nodes on which dependence is asked when residual adds are looked for: what is added to, and what that repeats."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        for base, _, _ in additions(node):
            for at in _carriers(base):
                if at in found:
                    break
                found[at] = None
    return list(found)


class _Finder:
    """Joins in the order of the graph; a later residual add may take an earlier one into its branch."""

    def __init__(self, index: Index, conditioning: int) -> None:
        self.index, self.conditioning = index, conditioning
        self.residual_adds: dict[fx.Node, ResidualAdd] = {}
        self.refusals: list[Refusal] = []

    def visit(self, node: fx.Node) -> None:
        reasons = []
        for base, others, separable in additions(node):
            found = self._match(node, base, others, separable)
            if isinstance(found, ResidualAdd):
                self.residual_adds[node] = found
                return
            if found is not None:
                reasons.append(found)
        self.refusals += reasons

    def _match(self, node: fx.Node, base: fx.Node, others: list[fx.Node], separable: bool) -> ResidualAdd | Refusal | None:
        """The join at `node`, or why not, or None where nothing even looks like one."""
        if not _may_be_stream(base, node):
            return None
        other = max(others, key=self.index.position.__getitem__)
        source = self._source(base, other)
        if (inputs := self.index.inputs_of(base)) and not inputs & ~self.conditioning:
            return Refusal(node.name, _TIME) if source is not None else None
        if source is None and not self._continues(base):
            return None
        region, absorbed = self._region(node, others, source)
        if not region.reached and not region.crossed:
            return None
        if not _same_shape(base, node):
            return Refusal(node.name, f"'{base.name}' is broadcast to the shape of the sum, so it is no stream")
        start = self._start(node, base, source, region)
        if isinstance(start, Refusal):
            return start
        inside = sorted(region.inside, key=self.index.position.__getitem__)
        if not any(is_work(n) for n in inside):
            return Refusal(node.name, self._why_no_work(region, base, other, source))
        if effect := next((n for n in inside if is_effectful(n)), None):
            reason = f"'{effect.name}' ({effect.target}) has an effect besides its value and must never be skipped"
            return Refusal(node.name, reason)
        for inner in absorbed:
            del self.residual_adds[inner]
            self.refusals.append(Refusal(inner.name, f"lies inside the branch that ends at '{node.name}'"))
        return ResidualAdd(node, base, start, other if separable else None, tuple(inside))

    def _start(self, node: fx.Node, base: fx.Node, source: fx.Node | None, region: _Region) -> fx.Node | Refusal:
        """Where the branch begins, and the region cut to what lies below; or why it begins on no stream."""
        if region.reached and source is not None:
            if region.crossed:
                region.keep_below({source: None})
            return source
        last = max(region.crossed, key=self.index.position.__getitem__)
        if not self._continues(base) and (source is None or not self._starts_from(last, source)):
            reason = f"'{base.name}' is no stream: it is only read by the one that goes through '{last.name}'"
            return Refusal(node.name, reason)
        region.keep_below(region.crossed)
        return last

    def _why_no_work(self, region: _Region, base: fx.Node, other: fx.Node, source: fx.Node | None) -> str:
        if not region.crossed:
            return f"no matrix product, convolution or attention between '{base.name}' and '{other.name}'"
        many = sum(1 for j in self.residual_adds if source is not None and self._depends(j, source))
        return f"contains {many} branches, which are taken one by one"

    def _source(self, base: fx.Node, other: fx.Node) -> fx.Node | None:
        """The value behind `base` from which `other` is computed: through casts, views, scalings and earlier residual adds."""
        stream: fx.Node | None = base
        while stream is not None:
            before = None
            for at in _carriers(stream):
                if self._depends(other, at):
                    return at if at.op != "get_attr" else None
                if at in self.residual_adds:
                    before = self.residual_adds[at].base
                    break
            stream = before
        return None

    def _depends(self, node: fx.Node, on: fx.Node) -> bool:
        return self.index.depends(node, on)

    def _continues(self, base: fx.Node) -> bool:
        """Whether `base` repeats the sum of an earlier residual add."""
        return any(at in self.residual_adds for at in _carriers(base))

    def _starts_from(self, residual_add: fx.Node, source: fx.Node) -> bool:
        """Whether the stream that goes through `residual_add` begins with something computed from `source`."""
        at = self.residual_adds[residual_add]
        seen = {at.node}
        while (
            before := next((j for j in residual_adds_behind(at.base, self.residual_adds) if j not in seen), None)
        ) is not None:
            seen.add(before)
            at = self.residual_adds[before]
        return at.source is source or self._depends(at.source, source)

    def _begins_at(self, residual_add: fx.Node, source: fx.Node | None) -> bool:
        """Whether no other residual add lies between `source` and `residual_add` on its stream."""
        before = residual_adds_behind(self.residual_adds[residual_add].base, self.residual_adds)
        return all(b is source or (source is not None and not self._depends(b, source)) for b in before)

    def _region(self, node: fx.Node, others: list[fx.Node], source: fx.Node | None) -> tuple[_Region, list[fx.Node]]:
        """What lies between the stream and what is added, and the residual adds in it that belong to nobody else."""
        region = _Region(self.index, self.residual_adds, source)
        for other in others:
            region.grow(other)
        absorbed: list[fx.Node] = []
        while True:
            own = next(
                (j for j in region.crossed if self._begins_at(j, source) and region.holds(j, node)),
                None,
            )
            if own is None:
                return region, absorbed
            absorbed.append(own)
            region.enter(own)


class _Region:
    """Nodes above what is added and below the source; the search stops at residual adds."""

    LIMIT = 4000  # without a source to stop at, a search that finds no stream near by gives up

    def __init__(self, index: Index, residual_adds: dict[fx.Node, ResidualAdd], source: fx.Node | None) -> None:
        self.index, self.residual_adds, self.source = index, residual_adds, source
        self.reached = False
        self.inside: dict[fx.Node, None] = {}
        self.crossed: dict[fx.Node, None] = {}

    def grow(self, start: fx.Node) -> None:
        todo = [start]
        while todo:
            node = todo.pop()
            if node is self.source:
                self.reached = True
            elif node in self.inside or node in self.crossed or not self._below(node):
                continue
            elif node in self.residual_adds:
                self.crossed[node] = None
            else:
                self.inside[node] = None
                todo += node.all_input_nodes

    def _below(self, node: fx.Node) -> bool:
        if self.source is not None:
            return self.index.depends(node, self.source)
        return node.op == "call_function" and len(self.inside) < self.LIMIT and self.index.inputs_of(node) != 0

    def holds(self, residual_add: fx.Node, end: fx.Node) -> bool:
        """Whether everything that the sum of `residual_add` goes into lies inside, up to `end`."""
        todo, seen = [residual_add], {residual_add}
        while todo:
            for user in todo.pop().users:
                if user is end or user in seen:
                    continue
                if user not in self.inside:
                    return False
                seen.add(user)
                todo.append(user)
        return True

    def enter(self, residual_add: fx.Node) -> None:
        """Go on through a residual add: it is part of the branch."""
        del self.crossed[residual_add]
        self.inside[residual_add] = None
        for parent in residual_add.all_input_nodes:
            self.grow(parent)

    def keep_below(self, sources: dict[fx.Node, None]) -> None:
        """Drop what does not depend on `sources`."""
        below = set(sources)
        kept: dict[fx.Node, None] = {}
        for node in sorted(self.inside, key=self.index.position.__getitem__):
            if any(p in below for p in node.all_input_nodes):
                below.add(node)
                kept[node] = None
        self.inside = kept


def _may_be_stream(base: fx.Node, node: fx.Node) -> bool:
    x, y = tensor_of(base), tensor_of(node)
    return x is not None and y is not None and x.ndim > 0 and y.is_floating_point() and base.op != "get_attr"


def _same_shape(base: fx.Node, node: fx.Node) -> bool:
    x, y = base.meta["val"], node.meta["val"]
    return x.ndim == y.ndim and all(str(s) == str(t) for s, t in zip(x.shape, y.shape, strict=True))


def find_residual_adds(index: Index, conditioning: int = 0) -> tuple[list[ResidualAdd], list[Refusal]]:
    """All residual adds of a graph in order, and every candidate that is none, with the reason.

    Args:
        index: made with `asked(graph)`.
        conditioning: mask of the timestep candidates: what depends on them alone is no stream.
    """
    finder = _Finder(index, conditioning)
    for node in index.nodes:
        finder.visit(node)
    residual_adds, refusals = [], finder.refusals
    for residual_add in finder.residual_adds.values():
        if not index.inputs_of(residual_add.node) & ~conditioning:
            refusals.append(Refusal(residual_add.node.name, _TIME))
        else:
            residual_adds.append(residual_add)
    return residual_adds, refusals


def residual_adds_behind(base: fx.Node, residual_adds: dict[fx.Node, ResidualAdd]) -> list[fx.Node]:
    """The residual adds whose sums `base` carries on: through everything but work that keeps the elements or a part of them.

    Norms and modulations keep a stream the same stream; a concatenation of two carries both.
    """
    found: dict[fx.Node, None] = {}
    todo, seen = [base], {base}
    while todo:
        node = todo.pop()
        if node in residual_adds:
            found[node] = None
            continue
        if node.op != "call_function" or is_work(node):
            continue
        for parent in value_preserving_inputs(node):
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return list(found)


_FIRST = SLICES | {aten.pad.default, aten.constant_pad_nd.default, aten.slice_scatter.default, aten.select_scatter.default}


def value_preserving_inputs(node: fx.Node) -> list[fx.Node]:
    """The operands whose elements `node` carries on, or a part of them."""
    if node.target in _FIRST:
        first = node.args[0]
        return [first] if isinstance(first, fx.Node) else []
    if node.target in (aten.cat.default, aten.stack.default):
        return list(node.all_input_nodes)
    value = tensor_of(node)
    if value is None:
        # a split: the pieces are taken from it by getitem
        return [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) and "split" in str(node.target) else []
    return [p for p in node.all_input_nodes if (x := tensor_of(p)) is not None and str(x.numel()) == str(value.numel())]
