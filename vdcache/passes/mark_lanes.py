"""mark-lanes: put a cache guard on one lane of guidance, with the other lane as its base.

    y: [2B, …] = model([x, x])   -->   a, b = halves of y; y = [cache_guard(a, slot, b), b]

What is kept is the difference of the two lanes; in a reused step the one is predicted from the other (FasterCache, arXiv
2410.19355, section 3.3), and is not computed: its half of the batch goes (`halve-batch`), or its call of the model is one
addition. Bit-exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import fx

from vdcache.errors import CaptureError
from vdcache.ir.capture import signature
from vdcache.ir.edit import add_input, call, copy_graph, inputs, outputs, set_output, set_outputs
from vdcache.ir.facts import Fact
from vdcache.ir.ops import is_effectful, tensor_of
from vdcache.passes.base import Pass, PassResult, Refusal, drop_dead_code, put_cache_guard
from vdcache.passes.halve_batch import halve
from vdcache.passes.values import output
from vdcache.patterns import analyze
from vdcache.util.fields import Group, one_of

__all__ = ["LanesIO", "MarkLanes", "halve_lanes", "lanes_io"]

aten = torch.ops.aten
CALLS = ("auto", "batch", "calls")


@dataclass(frozen=True)
class LanesIO:
    """How the lanes of a marked graph lie.

    Args:
        mode: "batch", both lanes in one call, or "calls", one after the other: the graph then has an input more, what the
        step's first call returned.
        group: the group of the slot.
        output: which of the graph's outputs it is.
        batch: rows of the batch, of both lanes; 0 for calls.
        low: first row of the lane that is always computed.
        pair_value: fake tensor of the further input, None for a batch.
    """

    mode: str
    group: str
    output: int
    batch: int = 0
    low: int = 0
    pair_value: torch.Tensor | None = None


def lanes_io(graph: fx.GraphModule) -> LanesIO | None:
    found = graph.meta.get("vdcache.lanes")
    return found if isinstance(found, LanesIO) else None


@dataclass(frozen=True)
class MarkLanes(Pass):
    """Guard one of two lanes.

    Args:
        mode: "batch" for both lanes in one batch, "calls" for two calls a step, of which the second one is predicted; "auto"
            takes a batch where the number of samples is even. In a batch the lanes are told from two prompts by their latents,
            which are equal.
        predicted: which half of a batch is predicted: "first" or "second".
        group: the group that the slot belongs to.

    Raises:
        ConfigError: another mode or half.
    """

    name: ClassVar[str] = "mark-lanes"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.CANONICAL})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.GUARDED})

    mode: Annotated[str, one_of(*CALLS)] = "auto"
    predicted: Annotated[str, one_of("first", "second")] = "first"
    group: Group = "lane"

    def run(self, graph: fx.GraphModule) -> PassResult:
        found = analyze(graph)
        place = output(graph, found, {n.name: n for n in graph.graph.nodes})
        if isinstance(place, Refusal):
            return PassResult(graph, 0, (place,))
        value, position = place
        if not found.branches:
            return PassResult(graph, 0, (Refusal(value.name, "no residual stream leads to it"),))
        rows = value.meta["val"].shape[0]
        even = isinstance(rows, int) and rows % 2 == 0
        if self.mode != "calls" and not isinstance(rows, int):
            return PassResult(
                graph,
                0,
                (Refusal(value.name, "the batch is a symbol, and half of it is not known: compile with dynamic=False"),),
            )
        if self.mode == "batch" and not even:
            return PassResult(graph, 0, (Refusal(value.name, f"a batch of two lanes is even, and this one is {rows}"),))
        if self.mode == "batch" or (self.mode == "auto" and even):
            return self._in_a_batch(graph, value, position, rows)
        return self._in_calls(graph, value, position)

    def _in_a_batch(self, graph: fx.GraphModule, value: fx.Node, position: int, rows: int) -> PassResult:
        trial = copy_graph(graph)
        try:
            twin = next(n for n in trial.graph.nodes if n.name == value.name)
            with trial.graph.inserting_before(trial.graph.output_node()):
                part = call(trial.graph, aten.slice.Tensor, twin, 0, 0, rows // 2, provenance=str(self))
            halve(trial, twin, part, rows, 0, carrying(trial, rows))
        except CaptureError as error:
            return PassResult(graph, 0, (Refusal(value.name, str(error)),))
        g = graph.graph
        with g.inserting_before(g.output_node()):
            first = call(g, aten.slice.Tensor, value, 0, 0, rows // 2, provenance=str(self))
            second = call(g, aten.slice.Tensor, value, 0, rows // 2, rows, provenance=str(self))
            own, base = (first, second) if self.predicted == "first" else (second, first)
        marked = put_cache_guard(own, f"{self.group}/output", self, base, users=())
        with g.inserting_before(g.output_node()):
            order = [marked, base] if self.predicted == "first" else [base, marked]
            joined = call(g, aten.cat.default, order, provenance=str(self))
        set_output(g, position, joined)
        graph.meta["vdcache.lanes"] = LanesIO(
            "batch", self.group, position, rows, rows // 2 if self.predicted == "first" else 0
        )
        return PassResult(graph, 1)

    def _in_calls(self, graph: fx.GraphModule, value: fx.Node, position: int) -> PassResult:
        g = graph.graph
        pair = add_input(g, "pair", value.meta["val"], str(self))
        set_output(g, position, put_cache_guard(value, f"{self.group}/output", self, pair, users=()))
        graph.meta["vdcache.lanes"] = LanesIO("calls", self.group, position, pair_value=pair.meta["val"])
        return PassResult(graph, 1)


def carrying(graph: fx.GraphModule, rows: int) -> list[fx.Node]:
    """The inputs of a graph that hold a batch of `rows`: all but parameters, with that many rows."""
    fixed = signature(graph).static
    return [
        n
        for i, n in enumerate(inputs(graph.graph))
        if i not in fixed and (v := tensor_of(n)) is not None and v.ndim and v.shape[0] == rows
    ]


def halve_lanes(graph: fx.GraphModule, lanes: LanesIO, at: int) -> None:
    """Leave out, in a variant that reuses the lane, the half of the batch that nothing reads any more.

    Args:
        at: which of the variant's outputs it is.
    """
    g = graph.graph
    results = outputs(g)
    joined = results[at]
    high = lanes.low + lanes.batch // 2
    kept = next(
        n for n in joined.all_input_nodes if n.target is aten.slice.Tensor and tuple(n.args[1:]) == (0, lanes.low, high)
    )
    full = kept.args[0]
    rest = [r for i, r in enumerate(results) if i != at and isinstance(r, fx.Node)]
    new = halve(graph, full, kept, lanes.batch, lanes.low, carrying(graph, lanes.batch), rest)  # type: ignore[arg-type]
    set_outputs(g, [r if i == at else new.get(r, r) for i, r in enumerate(results)])
    drop_dead_code(g, keep=is_effectful)
    graph.recompile()
