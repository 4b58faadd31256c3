"""What the passes of a recipe make of one captured graph, and which of its inputs are what."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from vdcache.attention.tiles import TileMask
from vdcache.backends.lowering import tile_sites
from vdcache.ir import dialect
from vdcache.ir.capture import Captured
from vdcache.ir.edit import inputs as graph_inputs
from vdcache.ir.ops import is_work, tensor_of
from vdcache.passes import HoistInvariants, PassRecord, Pipeline, Refusal, SplitAtProbe
from vdcache.passes.hoist_invariants import step_graph
from vdcache.patterns import GraphAnalysis, analyze
from vdcache.runtime.call import GraphInputs
from vdcache.util.sizes import shape_hint, updated_by

__all__ = ["GuardedGraph", "inputs_of"]


@dataclass(frozen=True)
class GuardedGraph:
    """A captured graph with its cache guards. No graph of it is to be changed.

    Args:
        captured: the graph as it came in.
        module: the guarded graph.
        head: what runs before the plan of a step is chosen; None if the recipe probes nothing in this graph.
        body: the rest. Both take the invariants of `module` as inputs.
        steps: what each pass did.
        analysis: of `module`.
    """

    captured: Captured
    module: fx.GraphModule
    head: fx.GraphModule | None
    body: fx.GraphModule
    steps: tuple[PassRecord, ...]
    analysis: GraphAnalysis

    @classmethod
    def made(cls, captured: Captured, pipeline: Pipeline) -> GuardedGraph:
        """Run the passes. What the recipe's scope does not find in this graph is left out."""
        first = Pipeline(pipeline.passes[:1])
        module, steps = first.run(captured.graph)
        rest = pipeline.passes[1:]
        if not analyze(module).branches:
            rest = tuple(p for p in rest if isinstance(p, HoistInvariants))
        if rest:
            module, later = Pipeline(rest, given=first.ensured).run(module, copied=True)
            steps += later
        analysis = analyze(module)
        body = step_graph(module) if dialect.invariants(module.graph) else module
        if not dialect.probes(body.graph):
            return cls(captured, module, None, body, steps, analysis)
        given = pipeline.ensured | SplitAtProbe.requires
        head, _ = Pipeline((SplitAtProbe("head"),), given=given).run(body)
        tail, later = Pipeline((SplitAtProbe("tail"),), given=given).run(body)
        return cls(captured, module, head, tail, (*steps, *later), analysis)

    @property
    def masked(self) -> list[tuple[fx.Node, TileMask]]:
        """The attentions that have a mask."""
        return tile_sites(self.module)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(r for step in self.steps for r in step.refusals)

    @property
    def structure(self) -> tuple[Hashable, ...]:
        """What recompilations of one frame for other sizes have in common: the operations that do work and the slots between
        them, in order, with the dtypes of what is kept.
        """
        found: list[Hashable] = []
        for n in self.module.graph.nodes:
            if is_work(n):
                found.append(str(n.target))
            elif n.op == "call_function" and n.target in (dialect.cache_guard, dialect.observe, dialect.probe):
                value = n.args[0].meta.get("val")
                found.append((str(n.args[1]), getattr(value, "dtype", None)))
        return tuple(found)

    @property
    def constants(self) -> tuple[float, ...]:
        """The floats that stand in the graph, in order: settings of the model that Dynamo takes for constant, as the scale of an adapter."""
        calls = (n for n in self.module.graph.nodes if n.op == "call_function")
        return tuple(a for n in calls for a in (*n.args, *n.kwargs.values()) if isinstance(a, float))

    @property
    def content(self) -> tuple[Hashable, ...]:
        """All operations and numbers in the graph, in order, sizes too: where two graphs are for the same sizes, others are settings."""
        found: list[Hashable] = []
        for n in self.module.graph.nodes:
            if n.op == "call_function":
                found.append(str(n.target))
                leaves = pytree.tree_leaves((n.args, n.kwargs))
                found += [(type(x), x) for x in leaves if isinstance(x, (bool, int, float, str, torch.dtype))]
        return tuple(found)


def inputs_of(captured: Captured, analysis: GraphAnalysis) -> GraphInputs:
    """Which inputs of a captured graph are what."""
    given = graph_inputs(captured.graph.graph)
    fakes = [n.meta.get("val") for n in given]
    position = {n.name: i for i, n in enumerate(given)}
    static, sizes = captured.signature.static, _sizes(fakes)
    written = {at for _, at in captured.signature.mutations}  # by the model itself: its state, which says nothing of a call
    timesteps = tuple(position[name] for name in analysis.timestep_inputs)
    # A timestep's own dtype says nothing of what is kept: pipelines change it.
    activations = tuple(i for i in range(len(given)) if i not in static and i not in timesteps)
    results = [shape_hint(o) for n in captured.graph.graph.output_node().all_input_nodes if (o := tensor_of(n)) is not None]
    # What only comes nearest of all inputs may be a prompt, whose exchange must be noticed.
    likely = {i: shape_hint(v) for name in analysis.latents if (v := fakes[i := position[name]]) is not None}
    latents = tuple(updated_by(likely, results))
    return GraphInputs(
        static=tuple(sorted(static)),
        weights=_slices(sorted(static - written)),
        timesteps=timesteps,
        activations=activations,
        told=tuple(i for i in activations if i not in written | sizes),
        latent=position[analysis.latent] if analysis.latent else None,
        latents=latents,
        whole=len(latents) == len(likely) > 0,
    )


def _sizes(fakes: Sequence[Any]) -> set[int]:
    """The inputs that are sizes of tensors among them."""
    sizes = {str(d) for v in fakes if isinstance(v, Tensor) for d in v.shape if isinstance(d, torch.SymInt)}
    return {i for i, v in enumerate(fakes) if isinstance(v, torch.SymInt) and str(v) in sizes}


def _slices(positions: Sequence[int]) -> tuple[slice, ...]:
    """Ascending positions as slices."""
    found: list[slice] = []
    for i in positions:
        start = found.pop().start if found and found[-1].stop == i else i
        found.append(slice(start, i + 1))
    return tuple(found)
