"""From a model and its arguments to a report. Nothing of the model is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from vdcache.backends.memory import cache_plans
from vdcache.backends.program import Program
from vdcache.backends.settings import Settings
from vdcache.backends.variants import Variants
from vdcache.errors import CaptureError, ConfigError, VdcacheError
from vdcache.explanation.report import CacheCost, GraphFacts, HeldValues, Report, Slot, VariantCost
from vdcache.ir import dialect
from vdcache.ir.capture import Captured, CapturedForward, CapturedPart, parts
from vdcache.ir.exported import exported
from vdcache.ir.ops import tensor_of, unviewed
from vdcache.methods import recipe as named
from vdcache.methods.recipe import Recipe
from vdcache.passes import Canonicalise, MergeSlots, Pipeline
from vdcache.patterns import Branch, GraphAnalysis, Refusal, analyze, cost
from vdcache.patterns.cost import bytes_of
from vdcache.patterns.invariance import shares
from vdcache.policies.goal import Goal
from vdcache.policies.plan import Plan
from vdcache.policies.simulate import best_plans
from vdcache.util.checks import check_model, step_count

__all__ = ["explain"]

NO_BOUND = 1 << 62  # bytes: a report is of the recipe, whatever is free here


def explain(
    model: Callable[..., Any],
    *args: Any,
    recipe: str | Recipe | None = None,
    num_steps: int = 30,
    **kwargs: Any,
) -> Report:
    """Describe a model before it runs: branches, attentions, blocks, streams, conditioning, coverage, graphs, refusals.

    vdcache reads no weight and runs no operation of a graph, so the model and its tensors may be on the meta device:

        with torch.device("meta"):
            model, latent = MyDiT(), torch.empty(1, 16, 21, 60, 104)
        print(vdcache.explain(model, latent, …, recipe="adacache-fast"))

    Args:
        model: a module or function.
        args, kwargs: the arguments of one call.
        recipe: a `Recipe` or its name. With it, the report also has the recipe's slots, their bytes, its variants and an upper bound of
            the speed-up. Default: no recipe.
        num_steps: number of denoising steps of a generation, for that bound.

    Raises:
        CaptureError: the model cannot be traced, or computes nothing that Dynamo can see; the message says where.
        ConfigError: `model` is not a model, no recipe has this name, or `num_steps` is no number of steps.
    """
    chosen = named(recipe) if recipe is not None else None
    num_steps = step_count(num_steps)
    check_model(model, "explain")
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", type(model).__name__)
    if name == "OptimizedModule":
        name = type(model._orig_mod).__name__  # type: ignore[attr-defined]
    found = _parts(model, args, kwargs)
    if not found.found:
        reasons = "; ".join(r.splitlines()[0] for r in found.breaks)
        raise CaptureError(
            f"{name} has no graph: "
            + (f"Dynamo gives up: {reasons}" if reasons else "it runs no tensor operation that Dynamo sees")
            + ". Check that forward computes with torch, and that torch.compile is not disabled (TORCHDYNAMO_DISABLE, "
            "torch.compiler.disable)."
        )
    return _report(name, found, chosen, num_steps)


def _parts(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> CapturedForward:
    """The graphs that Dynamo makes; where it cannot trace the model, the one that torch.export makes."""
    try:
        return parts(model, args, kwargs)
    except CaptureError as error:
        if not isinstance(model, nn.Module):
            raise
        try:
            whole = exported(model, args, kwargs)
        except CaptureError:
            raise error from None
        return CapturedForward([CapturedPart(whole)], [f"Dynamo cannot trace it, torch.export can: {error}"])


def _report(name: str, found: CapturedForward, recipe: Recipe | None, steps: int) -> Report:
    seen: dict[int, int] = {}
    captured: list[Captured] = []
    graphs: list[GraphFacts] = []
    for part in found.found:
        if part.captured is None:
            graphs.append(GraphFacts(len(graphs), None, 0, part.line, part.ends, part.ends_at, part.problem))
            continue
        key = id(part.captured)
        if key in seen:
            again = graphs[seen[key]]
            graphs[seen[key]] = replace(again, again=again.again + 1)
            continue
        seen[key] = number = len(graphs)
        captured.append(part.captured)
        canonical, _ = Pipeline((Canonicalise(),)).run(part.captured.graph)
        facts = _named(analyze(canonical), canonical, part.captured, number)
        nodes = sum(n.op == "call_function" for n in canonical.graph.nodes)
        graphs.append(GraphFacts(number, facts, nodes, part.line, part.ends, part.ends_at, shares=shares(canonical)))
    report = Report(name, tuple(graphs), tuple(found.breaks))
    return _with_recipe(report, captured, list(seen.values()), recipe, steps) if recipe is not None else report


def _named(found: GraphAnalysis, graph: fx.GraphModule, captured: Captured, number: int) -> GraphAnalysis:
    """The analysis with the user's names for the inputs, and the number of the graph."""
    inputs = graph.graph.find_nodes(op="placeholder")
    names = dict(zip((n.name for n in inputs), captured.signature.names, strict=False))

    def said(given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(n, n) for n in given)

    return replace(
        found,
        branches=tuple(replace(b, graph=number) for b in found.branches),
        streams=tuple(replace(s, graph=number, inputs=said(s.inputs)) for s in found.streams),
        blocks=tuple(replace(b, graph=number) for b in found.blocks),
        refusals=tuple(r.of_graph(number) for r in found.refusals),
        timestep_inputs=said(found.timestep_inputs),
        latents=said(found.latents),
        latent=names.get(found.latent, found.latent),
        conditioning=replace(found.conditioning, timestep_inputs=said(found.conditioning.timestep_inputs)),
    )


def _with_recipe(report: Report, captured: list[Captured], numbers: list[int], recipe: Recipe, steps: int) -> Report:
    recipe = recipe.for_steps(steps)
    before: list[Slot] = []
    after: list[Slot] = []
    refusals: list[Refusal] = []
    programs: list[tuple[int, Program]] = []
    total: int | None = 0
    for number, graph in zip(numbers, captured, strict=True):
        facts = report.graphs[number].analysis
        assert facts is not None  # it was captured
        try:
            program = Program(graph, Settings(recipe=recipe, inner="eager", cache_budget=NO_BOUND))
        except VdcacheError as error:
            if facts.branches:
                refusals.append(Refusal("recipe", str(error), graph=number))
            continue
        programs.append((number, program))
        refusals += [r.of_graph(number) for r in program.guarded.refusals]
        unmerged = Pipeline(tuple(p for p in recipe.pipeline if not isinstance(p, MergeSlots)), given=recipe.pipeline.given)
        if facts.branches:
            before += _slots(unmerged.run(graph.graph)[0], facts, number)
        after += _slots(program.guarded.module, facts, number)
        own = program.variants.cache_bytes()
        total = None if own is None or total is None else total + own * (1 + report.graphs[number].again)
    variants = _variant_costs(report, programs)
    schedule, goal = tuple(tuple(sorted(plan.reuse)) for plan in best_plans(recipe.policy, steps)), ""
    if recipe.goal is not None:
        schedule, goal = _meant(recipe.goal, steps, variants), str(recipe.goal)
    masks = tuple(program.masks for _, program in programs if program.masks)
    held = _held(programs)
    found_nothing = not after and not masks and not held and bool(recipe.passes)
    return replace(
        report,
        recipe=recipe.name,
        slots_before=tuple(before),
        slots=tuple(after),
        cache_bytes=total,
        memory=_memory(recipe, report, programs) if after else (),
        variants=tuple(variants),
        steps=steps,
        schedule=schedule,
        goal=goal,
        nothing=_why_nothing(recipe, (*report.refusals, *refusals)) if found_nothing else "",
        recipe_refusals=tuple(refusals),
        masks=masks,
        held=held,
    )


def _memory(recipe: Recipe, report: Report, programs: Sequence[tuple[int, Program]]) -> tuple[CacheCost, ...]:
    """What each way to keep the recipe's values takes of one lane's memory."""
    found = []
    for plan in cache_plans(recipe.predictor, cuda=True):
        total: int | None = 0
        for number, program in programs if plan.caches and not plan.on_host else ():
            variants = program.variants
            if plan.predictor != recipe.predictor:
                variants = Variants(program.guarded, program.settings, plan, variants.compiler)
            own = variants.cache_bytes()
            total = None if own is None or total is None else total + own * (1 + report.graphs[number].again)
        found.append(CacheCost(plan.name + (" (on a GPU)" if plan.on_host else ""), total))
    return tuple(found)


def _held(programs: Sequence[tuple[int, Program]]) -> tuple[HeldValues, ...]:
    """What the graphs are given because it depends on no latent, by what it depends on."""
    found: dict[str, list[int]] = {}
    for _, program in programs:
        for mark in dialect.invariants(program.guarded.module.graph):
            found.setdefault(str(mark.args[1]).partition(".")[0], []).append(bytes_of(mark))
    return tuple(HeldValues(kind, len(sizes), sum(sizes)) for kind, sizes in found.items())


def _variant_costs(report: Report, programs: list[tuple[int, Program]]) -> list[VariantCost]:
    """What every plan costs, all graphs of the forward together."""
    variants = []
    for plan in dict.fromkeys(p for _, program in programs for p in program.variants.plans):
        costs = nodes = 0
        for number, program in programs:
            own = plan if plan in program.variants.plans else Plan()
            times = 1 + report.graphs[number].again
            costs += times * program.variants.flops(own)
            nodes += times * sum(n.op == "call_function" for n in program.variants[own].graph.graph.nodes)
        variants.append(VariantCost(tuple(sorted(plan.reuse)), costs, nodes))
    return variants


def _why_nothing(recipe: Recipe, refusals: Sequence[Refusal]) -> str:
    """Why a recipe finds nothing to cache; what the recipe itself cannot do comes first."""
    reasons = sorted((r for r in refusals if r.node != "output"), key=lambda r: r.node != "recipe")
    return f"the recipe '{recipe.name}' finds nothing to cache: " + (
        "; ".join(f"{r.node}: {r.reason}" for r in reasons[:5])
        or "no value is added to what it was computed from, so there is no residual branch"
    )


def _slots(guarded: fx.GraphModule, facts: GraphAnalysis, number: int) -> list[Slot]:
    """The cache guards of a graph, each with the branches that it stands for."""
    position = {n.name: i for i, n in enumerate(guarded.graph.nodes)}
    by_value = {b.contribution: b for b in facts.branches} | {b.pre_gate: b for b in facts.branches if b.pre_gate}
    by_join = {b.residual_add: b for b in facts.branches}
    found = []
    for cache_guard in dialect.cache_guards(guarded.graph):
        fresh, base = cache_guard.args[0], cache_guard.args[2] if len(cache_guard.args) > 2 else None
        assert isinstance(fresh, fx.Node)
        branches: list[Branch] = []
        if isinstance(base, fx.Node):
            last = _last_join(fresh, by_join)
            if last is not None:
                low = position[unviewed(base).name]  # merging repeats views of the start right before its cache guard
                branches = [
                    b
                    for b in facts.branches
                    if b.stream == last.stream and low < position[b.residual_add] <= position[last.residual_add]
                ]
        elif (branch := by_value.get(fresh.name)) is not None:
            branches = [branch]
        value = fresh.meta["val"]
        shape = tuple(s if isinstance(s, int) else None for s in value.shape)
        found.append(
            Slot(
                name=str(cache_guard.args[1]),
                branches=tuple(b.name for b in branches),
                stream=branches[0].stream if branches else 0,
                merged=isinstance(base, fx.Node),
                shape=shape,
                dtype=str(value.dtype).removeprefix("torch."),
                bytes=cost.bytes_of(fresh),
                node=fresh.name,
                graph=number,
            )
        )
    return found


def _last_join(node: fx.Node, by_join: dict[str, Branch]) -> Branch | None:
    """The branch whose sum `node` carries on, seen through what keeps its elements."""
    while node.name not in by_join:
        same = [p for p in node.all_input_nodes if _as_many(p, node)]
        if not same:
            return None
        node = same[-1] if same[-1].op == "call_function" else same[0]
    return by_join[node.name]


def _as_many(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes hold as many elements."""
    x, y = tensor_of(a), tensor_of(b)
    return x is not None and y is not None and str(x.numel()) == str(y.numel())


def _meant(goal: Goal, steps: int, variants: Sequence[VariantCost]) -> tuple[tuple[str, ...], ...]:
    """What a goal means: so many computed steps that a speed is reached, or one, where a quality says how many. Which they are is
    found on the model itself.
    """
    reuse = next((v for v in variants if v.reuse), None)
    if reuse is None:
        return ((),) * steps
    count = 1
    if goal.speedup is not None:
        try:
            count = goal.count(steps, reuse.flops / max(1, variants[0].flops))
        except ConfigError:  # no schedule is so fast
            count = steps
    return ((),) * count + (reuse.reuse,) * (steps - count)
