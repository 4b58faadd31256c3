"""What a graph computes, run node by node: example inputs, the value of every node, and the skip oracle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vdcache.ir import dialect
from vdcache.ir.edit import inputs
from vdcache.util.slots import group_of

__all__ = ["PoisonInterpreter", "example_inputs", "record_slots", "skipped", "unskippable", "values_of"]


class PoisonInterpreter(fx.Interpreter):
    """The skip oracle: replays recorded slot values with everything that only they need poisoned by NaN.

    If a region may be skipped, NaN inside it changes no output.

    Args:
        recorded: the kept value of every slot that is reused, by its name; other slots are computed.
        dead: names of the nodes that are poisoned.
    """

    def __init__(self, graph: fx.GraphModule, recorded: dict[str, Tensor], dead: set[str]) -> None:
        super().__init__(graph)
        self.recorded, self.dead = recorded, dead

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.target is dialect.cache_guard and str(n.args[1]) in self.recorded:
            base = self.env[n.args[2]] if len(n.args) > 2 else 0  # type: ignore[index]
            return base + self.recorded[str(n.args[1])]
        result = super().run_node(n)
        if n.name in self.dead and isinstance(result, Tensor) and result.is_floating_point():
            return result * torch.nan
        return result


def record_slots(graph: fx.GraphModule, *args: Any) -> dict[str, Tensor]:
    """The value that each slot would keep."""
    recorded: dict[str, Tensor] = {}

    class ValueRecorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "call_function" and n.target is dialect.cache_guard:
                fresh = self.env[n.args[0]]  # type: ignore[index]
                base = self.env[n.args[2]] if len(n.args) > 2 else 0  # type: ignore[index]
                recorded[str(n.args[1])] = fresh - base
                return fresh
            return super().run_node(n)

    with torch.no_grad():
        ValueRecorder(graph).run(*args)
    return recorded


def skipped(graph: fx.Graph, groups: Iterable[str] | None = None) -> set[fx.Node]:
    """The operations that a step which reuses these groups (None: all of them) leaves out."""
    chosen = None if groups is None else set(groups)
    live = {graph.output_node()}
    todo = list(live)
    while todo:
        node = todo.pop()
        parents = list(node.all_input_nodes)
        if node.target is dialect.cache_guard and (chosen is None or group_of(str(node.args[1])) in chosen):
            parents = [node.args[2]] if len(node.args) > 2 else []  # type: ignore[list-item]
        for parent in parents:
            if parent not in live:
                live.add(parent)
                todo.append(parent)
    return {n for n in graph.nodes if n not in live and n.op == "call_function"}


def unskippable(graph: fx.GraphModule, *args: Any, groups: Iterable[str] | None = None) -> tuple[Sequence[Any], Sequence[Any]]:
    """What the graph returns, and what it returns when everything that reuse leaves out is poisoned."""
    chosen = None if groups is None else set(groups)
    kept = record_slots(graph, *args)
    kept = {slot: v for slot, v in kept.items() if chosen is None or group_of(slot) in chosen}
    dead = {n.name for n in skipped(graph.graph, chosen)}
    graph.recompile()  # a pass that ran by itself has changed the nodes alone
    with torch.no_grad():
        return graph(*args), PoisonInterpreter(graph, kept, dead).run(*args)


def values_of(graph: fx.GraphModule, given: Sequence[Any]) -> dict[str, Any]:
    """The value of every node, by its name."""
    values: dict[str, Any] = {}

    class ValueWatch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        ValueWatch(graph).run(*given)
    return values


def example_inputs(graph: fx.GraphModule, seed: int = 0) -> list[Any]:
    """Inputs that fit the types of a graph: random numbers, zeros for whole numbers, True for masks.

    Symbolic sizes are the numbers that they had in the example that the graph was made from.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_example(n.meta.get("val"), generator) for n in inputs(graph.graph)]


def _example(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if not isinstance(value, Tensor):
        return value
    sizes, strides = ([s.node.hint if isinstance(s, torch.SymInt) else s for s in x] for x in (value.shape, value.stride()))
    made = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    if value.dtype == torch.bool:
        return made.fill_(True)
    if not (value.is_floating_point() or value.is_complex()):
        return made.zero_()
    return made.copy_(torch.randn(sizes, generator=generator, dtype=torch.float64).to(made.dtype))
