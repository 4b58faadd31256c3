"""Graphs to test on: of functions, of models as torch.compile sees them, guarded, specialised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vdcache.errors import ConfigError
from vdcache.ir.capture import capture, trace
from vdcache.ir.dump import dump
from vdcache.ir.edit import inputs
from vdcache.ir.facts import Fact
from vdcache.ir.oracle import PoisonInterpreter, example_inputs, record_slots, values_of
from vdcache.ir.parse import parse
from vdcache.passes import Canonicalise, DeadCode, MarkBranches, Pass, PassResult, Pipeline, Specialise, variant_io
from vdcache.passes.base import passes_of
from vdcache.passes.predictors import LAST, AnyPredictor

__all__ = [
    "PoisonInterpreter",
    "captured",
    "dump",
    "example_inputs",
    "graph_from",
    "guarded",
    "parse",
    "record_slots",
    "run_pass",
    "run_variant",
    "trace",
    "values_of",
    "variant",
]

Graph = str | fx.GraphModule


def graph_from(graph: Graph) -> fx.GraphModule:
    """A graph, or the one that prints as a text."""
    return parse(_dedented(graph)) if isinstance(graph, str) else graph


def _dedented(text: str) -> str:
    import textwrap

    return textwrap.dedent(text).strip()


def run_pass(a_pass: Pass | Pipeline | Sequence[Pass], graph: Graph) -> PassResult:
    """What one pass, or several in order, do to a copy of a graph, all its promises checked. What it requires is checked first.

    Returns the new graph with the rewrites and the refusals (of all passes of a pipeline).

    Raises:
        ContractError: the graph lacks a fact that the pass requires, or the pass broke a promise.
    """
    if isinstance(a_pass, str):
        raise ConfigError(f"a pass is a value, not the text {a_pass!r}; vdcache.Pipeline.parse(text) makes passes of a text")
    passes = passes_of(a_pass, "what is tested")
    given = frozenset[Fact]().union(*(p.requires for p in passes))
    result, steps = Pipeline(passes, verify=True, given=given, checked=passes[0].requires).run(graph_from(graph))
    return PassResult(result, sum(s.rewrites for s in steps), tuple(r for s in steps for r in s.refusals))


def guarded(fn: Callable[..., Any], *args: Tensor, more: Sequence[Any] = (), verify: bool = True) -> fx.GraphModule:
    """The guarded graph of a function: canonicalise, mark-branches, and `more` passes, with every promise checked."""
    graph, _ = Pipeline((Canonicalise(), MarkBranches(), *more), verify=verify).run(trace(fn, *args).graph)
    return graph


def variant(graph: Graph, reuse: Iterable[str] = (), predictor: AnyPredictor = LAST) -> fx.GraphModule:
    """The static graph of one plan: the groups that are reused."""
    passes = (Specialise(reuse=frozenset(reuse), predictor=predictor), DeadCode())
    return Pipeline(passes, verify=True, given=frozenset(Specialise.requires)).run(graph_from(graph))[0]


def run_variant(graph: fx.GraphModule, *args: Tensor, extra: Sequence[Tensor] = ()) -> list[Tensor]:
    """What a variant returns for the model's inputs and those that were added (`variant_io` names them)."""
    io = variant_io(graph)
    assert len(inputs(graph.graph)) == len(args) + len(extra), io
    with torch.no_grad():
        return list(graph(*args, *extra))


def captured(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The one graph that Dynamo makes of a model, in vdcache's form, and its inputs."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def door(graph: fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        found.append((capture(graph, given).graph, list(given)))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=door)(*args, **kwargs)
    ((graph, given),) = found
    return graph, given
