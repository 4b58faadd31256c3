"""What a report holds: frozen data about every graph of one forward, and what a recipe would do to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vdcache.patterns import KINDS, Attention, Block, Branch, Conditioning, GraphAnalysis, Refusal, Stream
from vdcache.patterns.invariance import Shares

if TYPE_CHECKING:
    import networkx

__all__ = ["GraphFacts", "HeldValues", "ReportData", "Slot", "VariantCost"]

SMALL = 0.5  # share of the FLOPs in branches, below which skipping them wins little


@dataclass(frozen=True)
class GraphFacts:
    """One graph of the forward. Dynamo makes several where the model breaks.

    Args:
        index: counted from 0 in the order in which they run.
        analysis: what was found in it; None where it could not be read (`problem` says why).
        nodes: how many operations.
        line: the source line that it begins with.
        ends, ends_at: why it ends before the function does, and where; "" where it does not.
        again: how many further times the same graph runs in one forward.
        shares: how much of it depends on the prompt or the timestep alone, and on the latent.
    """

    index: int
    analysis: GraphAnalysis | None
    nodes: int = 0
    line: str = ""
    ends: str = ""
    ends_at: str = ""
    problem: str = ""
    again: int = 0
    shares: Shares = field(default_factory=Shares, repr=False)


@dataclass(frozen=True)
class HeldValues:
    """What a recipe holds instead of computing it in every step.

    Args:
        kind: what the values depend on: "parameters", "prompt", "timestep", or "both" of the last two.
        values: how many there are.
        bytes: of one set of them: for one prompt, or for one timestep.
    """

    kind: str
    values: int
    bytes: int


@dataclass(frozen=True)
class Slot:
    """A value that a recipe keeps from one step to the next.

    Args:
        name: "group/name"; a plan reuses whole groups.
        branches: names of the branches that it stands for.
        stream: the stream that they belong to.
        merged: whether it keeps the difference of the stream over a run of branches, not one contribution.
        shape, dtype, bytes: of the value of one lane; None where a size is a symbol.
        node: the node of the graph that it keeps.
        graph: which graph, counted from 0.
    """

    name: str
    branches: tuple[str, ...]
    stream: int
    merged: bool
    shape: tuple[int | None, ...]
    dtype: str
    bytes: int
    node: str
    graph: int = 0


@dataclass(frozen=True)
class CacheCost:
    """What one way to keep the recipe's values takes of memory: `cache_budget` chooses the first that fits.

    Args:
        name: in words.
        bytes: of the cached values of one lane on the model's device; None if a size is a symbol.
    """

    name: str
    bytes: int | None


@dataclass(frozen=True)
class VariantCost:
    """One compiled graph for each plan, over all graphs of the forward.

    Args:
        reuse: the groups that are reused; empty for recomputing everything.
        flops: what one call costs.
        nodes: operations left.
    """

    reuse: tuple[str, ...]
    flops: int
    nodes: int

    @property
    def name(self) -> str:
        return f"reuse {', '.join(self.reuse)}" if self.reuse else "recompute all"


@dataclass(frozen=True, repr=False)
class ReportData:
    """The data of a `Report`. All fields from `slots_before` on describe the recipe, and are empty if none was given.

    Args:
        model: class or function name; for messages only.
        graphs: every graph of one forward.
        breaks: Dynamo's reasons for breaking the model into several graphs.
        recipe: name of the recipe, "" for none.
        slots_before: the recipe's slots before merging.
        slots: the recipe's slots after merging.
        cache_bytes: bytes of the cached tensors of one lane, known before the first run; None if a size is a symbol.
        memory: what each way to keep the values takes, the recipe's own first.
        variants: every compiled graph.
        steps: number of denoising steps that `schedule` is for.
        schedule: the plan of each step in the best case: with the fewest computed steps that the recipe can choose.
        goal: the goal, in words, of a recipe that finds its steps on the model itself; "" for other recipes. `schedule` then
            has the number of computed steps that the goal allows, but not necessarily these steps.
        nothing: why the recipe finds no slot, "" if it finds one.
        recipe_refusals: the places that the passes of the recipe left as they were, with reasons.
        masks: the attentions that the recipe puts masks on, in words, one line for each graph.
        held: what the recipe holds because it depends on no latent.
    """

    model: str
    graphs: tuple[GraphFacts, ...]
    breaks: tuple[str, ...] = ()
    recipe: str = ""
    slots_before: tuple[Slot, ...] = field(default=(), repr=False)
    slots: tuple[Slot, ...] = ()
    cache_bytes: int | None = 0
    memory: tuple[CacheCost, ...] = ()
    variants: tuple[VariantCost, ...] = ()
    steps: int = 0
    schedule: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    goal: str = ""
    nothing: str = ""
    recipe_refusals: tuple[Refusal, ...] = field(default=(), repr=False)
    masks: tuple[str, ...] = ()
    held: tuple[HeldValues, ...] = ()

    def __repr__(self) -> str:
        asked = f", recipe '{self.recipe}'" if self.recipe else ""
        return f"<Report on {self.model}: {len(self.graphs)} graph{'s' * (len(self.graphs) != 1)}, {len(self.branches)} branches{asked}; print it>"

    def _of(self, name: str) -> Iterable[Any]:
        for graph in self.graphs:
            if graph.analysis is not None:
                yield from getattr(graph.analysis, name)

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """The residual branches of all graphs, in order."""
        return tuple(self._of("branches"))

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """The attentions of all graphs, in order."""
        return tuple(self._of("attentions"))

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of all graphs, in order."""
        return tuple(self._of("blocks"))

    @cached_property
    def streams(self) -> tuple[Stream, ...]:
        """The residual streams of all graphs, in order."""
        return tuple(self._of("streams"))

    @cached_property
    def refusals(self) -> tuple[Refusal, ...]:
        """Every candidate that is not a branch, with the reason."""
        return tuple(self._of("refusals"))

    @cached_property
    def conditioning(self) -> Conditioning:
        """The conditioning of all graphs. Names of nodes in graphs after the first are prefixed with the number of the graph."""
        timestep_inputs: dict[str, None] = {}
        parts: dict[str, list[str]] = {"timestep": [], "text": [], "constant": []}
        for graph in self.graphs:
            if graph.analysis is None:
                continue
            found = graph.analysis.conditioning
            timestep_inputs.update(dict.fromkeys(found.timestep_inputs))
            for name, nodes in parts.items():
                nodes += [f"{graph.index}:{n}" if graph.index else n for n in getattr(found, name)]
        return Conditioning(tuple(timestep_inputs), *(tuple(parts[n]) for n in ("timestep", "text", "constant")))

    @cached_property
    def shares(self) -> Shares:
        """How much of one forward depends on the parameters, the prompt or the timestep alone, on the two of them, and on the latent."""
        return sum((g.shares for g in self.graphs for _ in range(1 + g.again)), Shares())

    @cached_property
    def flops(self) -> int:
        """FLOPs of one forward: matrix products, convolutions and attention."""
        return sum(g.analysis.flops * (1 + g.again) for g in self.graphs if g.analysis is not None)

    @cached_property
    def coverage(self) -> float:
        """Share of the FLOPs, 0 to 1, that a step skips if it reuses every branch."""
        covered = sum(g.analysis.covered * (1 + g.again) for g in self.graphs if g.analysis is not None)
        return covered / self.flops if self.flops else 0.0

    @property
    def bound(self) -> float | None:
        """The largest speed-up of the recipe over `steps` steps: FLOPs of the plain model divided by those of `schedule`.

        None without a recipe.
        """
        costs = {v.reuse: v.flops for v in self.variants}
        if not self.schedule or not costs:
            return None
        spent = sum(costs.get(plan, costs[()]) for plan in self.schedule)
        return self.steps * self.flops / spent if spent else None

    @property
    def verdict(self) -> str:
        """What can be won here, and what to do next, in words."""
        if not self.branches:
            refused = f" ({len(self.refusals)} are refused: report.refusals says why)" if self.refusals else ""
            return f"Nothing can be skipped: no addition is a residual branch{refused}."
        skipped = f"{self.coverage:.0%} of a step's FLOPs can be skipped"
        steps = f"{self.steps} step{'s' * (self.steps != 1)}"
        if self.coverage < SMALL:
            skipped = f"Only {skipped}, the rest lies outside the residual branches"
        if self.breaks:
            skipped += (
                f"; the forward breaks into {len(self.graphs)} graphs, and as one it might skip more (report.breaks says where)"
            )
        if not self.conditioning.timestep_inputs:
            return (
                f"{skipped}, but no timestep is seen: pass it as a tensor that reaches a sine or cosine, or say where each step begins with "
                "session.begin() and session.step()."
            )
        if self.nothing:
            return f"{skipped}, but not by '{self.recipe}', which finds no slot here. Next: try another of vdcache.recipes()."
        if not self.recipe:
            return (
                f"{skipped}. Next: model = vdcache.compile(model, num_steps=…), which finds a schedule in its first generation."
            )
        if self.bound is None or self.bound <= 1:
            return f"{skipped}; '{self.recipe}' reuses nothing in {steps}."
        own = "" if self.goal else f"'{self.recipe}', "
        return (
            f"{skipped}; {steps} cost at least {1 / self.bound:.0%} of their FLOPs with '{self.recipe}'. "
            f"Next: model = vdcache.compile(model, {own}num_steps={self.steps})."
        )

    def count(self) -> dict[str, int]:
        """The number of branches of each kind in one forward. A graph that runs several times counts each time."""
        found: dict[str, int] = {}
        for branch in self.branches:
            found[branch.kind] = found.get(branch.kind, 0) + 1 + self.graphs[branch.graph].again
        return {k: found[k] for k in KINDS if k in found}

    def to_networkx(self) -> networkx.DiGraph:
        """The branches as a directed graph whose edges follow the streams.

        Each branch is a node, with its facts as attributes. Each stream has a start node and an end node.

        Raises:
            ImportError: networkx is not installed.
        """
        import networkx

        graph = networkx.DiGraph(model=self.model)
        last: dict[tuple[int, int], str] = {}
        for stream in self.streams:
            start = f"g{stream.graph}.s{stream.index}.start"
            graph.add_node(start, kind="start", stream=stream.index, role=stream.role, graph=stream.graph)
            last[stream.graph, stream.index] = start
        for branch in self.branches:
            name = f"g{branch.graph}.{branch.residual_add}"
            facts = {
                k: getattr(branch, k)
                for k in ("kind", "stream", "block", "layout", "flops", "bytes", "module", "line", "graph")
            }
            graph.add_node(name, label=branch.name, **facts)
            graph.add_edge(last[branch.graph, branch.stream], name)
            last[branch.graph, branch.stream] = name
        for (number, index), name in last.items():
            end = f"g{number}.s{index}.end"
            graph.add_node(end, kind="end", stream=index, graph=number)
            graph.add_edge(name, end)
        return graph
