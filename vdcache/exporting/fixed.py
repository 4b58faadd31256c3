"""A model under a schedule as what every kind of package is made of: pure graphs of fixed shape, caches, and a list of steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from vdcache.backends.lowering import lower_tiles, tile_sites
from vdcache.backends.program import Program
from vdcache.backends.runner import original
from vdcache.backends.settings import Settings
from vdcache.calibration.calibration import Calibration
from vdcache.calibration.schedule import Schedule
from vdcache.errors import ConfigError
from vdcache.exporting.manifest import Cache, Graph, LoopSpec, ScheduledStep, Value
from vdcache.ir import dialect
from vdcache.ir.edit import copy_graph, outputs, set_outputs
from vdcache.ir.edit import inputs as graph_inputs
from vdcache.ir.exported import ExportedModel, whole
from vdcache.methods import recipe as named
from vdcache.methods.recipe import Recipe
from vdcache.policies.base import Policy
from vdcache.policies.plan import Plan
from vdcache.policies.simulate import simulate
from vdcache.policies.weights import Position
from vdcache.util.files import text_of
from vdcache.util.sizes import is_symbolic

__all__ = ["PLAN", "ExportedFiles", "Fixed", "FixedVariant", "fixed", "recipe_of", "unused", "value_of"]

PLAN = "plan"  # the input that says which plan a graph of several follows


@dataclass(frozen=True)
class FixedVariant:
    """One plan as a pure graph: all its inputs are read, and nothing is hidden.

    Args:
        graph: weights are among its inputs.
        roles: what each input is: ("weight", position), ("input", name), ("cache", name) or ("number", name).
        results: which outputs are the model's; the others are new values of `writes`.
        writes: the caches that the remaining outputs become, in order.
    """

    name: str
    plan: Plan
    graph: fx.GraphModule
    roles: tuple[tuple[str, Any], ...]
    results: int
    writes: tuple[str, ...]
    reused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fixed:
    """A model under a schedule.

    Args:
        whole: the model as one graph, with its weights.
        arguments: for each input of the model, its place among the flattened (args, kwargs).
        examples: the given values of the inputs.
    """

    model: str
    recipe: Recipe
    whole: ExportedModel
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    caches: tuple[Cache, ...]
    variants: tuple[FixedVariant, ...]
    steps: tuple[ScheduledStep, ...]
    arguments: tuple[int, ...]
    examples: tuple[Tensor, ...] = field(repr=False, default=())

    @property
    def call(self) -> Any:
        """The structure of (args, kwargs)."""
        return self.whole.takes

    @property
    def arity(self) -> int:
        """How many values (args, kwargs) hold, tensors and others."""
        return len(self.whole.given)

    def filled(self, results: Sequence[Any]) -> list[Any]:
        """The model's flat results, with what is no tensor in its place."""
        rest = iter(results)
        return [next(rest) if isinstance(v, fx.Node) else v for v in outputs(self.whole.captured.graph.graph)]

    def example(self, variant: FixedVariant) -> tuple[Tensor, ...]:
        """Inputs of a variant: the weights themselves, the given inputs, zeros for caches and numbers."""
        given = dict(zip((v.name for v in self.inputs), self.examples, strict=True))
        found = []
        for (kind, name), node in zip(variant.roles, graph_inputs(variant.graph.graph), strict=True):
            like = node.meta["val"]
            if kind == "weight":
                found.append(self.whole.state[name].detach())
            elif kind == "input":
                found.append(given[name])
            else:
                found.append(torch.ones(like.shape, dtype=like.dtype, device=like.device))
        return tuple(found)


@dataclass(frozen=True)
class ExportedFiles:
    """What a format has written into a package's folder."""

    graphs: tuple[Graph, ...]
    steps: tuple[ScheduledStep, ...]
    weights: str
    loop: LoopSpec | None = None
    opset: int = 0


def recipe_of(schedule: Any, num_steps: int | None = None) -> tuple[Recipe, int]:
    """The recipe that a schedule is, and its number of steps.

    Args:
        schedule: a `Schedule` or a `Calibration`, a path of one or of a recipe as JSON, a list of computed steps, or a recipe that decides everything
            before the run (or the name of one).
        num_steps: steps of a generation; known where the schedule says it.

    Raises:
        ConfigError: something else, no number of steps, or another than the schedule's.
    """
    if isinstance(schedule, Path) or (
        isinstance(schedule, str) and (schedule.endswith(".json") or schedule.lstrip()[:1] == "{")
    ):
        text = text_of(schedule)
        read: dict[str, Callable[[str], Any]] = {'"policy"': Recipe.from_json, '"goal"': Calibration.from_json}
        schedule = next((r for field, r in read.items() if field in text), Schedule.from_json)(text)
    times: tuple[float, ...] = ()
    if isinstance(schedule, Calibration):
        times, schedule = schedule.key.times, schedule.schedule
    if isinstance(schedule, (list, tuple, range)):
        if num_steps is None:
            raise ConfigError("a list of computed steps does not say how many steps there are: give num_steps")
        schedule = Schedule(num_steps, tuple(schedule), order=0)
    if isinstance(schedule, Schedule):
        if num_steps not in (None, schedule.steps):
            raise ConfigError(
                f"the schedule is for {schedule.steps} steps, and num_steps is {num_steps}: search one for {num_steps}"
            )
        return replace(schedule.recipe(), policy=schedule.policy(times)), schedule.steps
    recipe = named(schedule)
    rows = getattr(recipe.policy, "reuse", None)  # a table of plans knows its length
    num_steps = len(rows) if num_steps is None and isinstance(rows, tuple) else num_steps
    if num_steps is None:
        raise ConfigError(f"'{recipe.name}' does not say how many steps a generation has: give num_steps")
    return recipe.for_steps(num_steps), num_steps


def fixed(
    model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None, schedule: Any, num_steps: int | None = None
) -> Fixed:
    """Bring a model under a schedule.

    Raises:
        ConfigError: a schedule that is decided while it runs, or that reads what no step before has kept.
        CaptureError: torch.export does not take the model as one graph.
    """
    recipe, steps = recipe_of(schedule, num_steps)
    model = original(model)
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "model")
    found = whole(model if isinstance(model, nn.Module) else _Module(model), tuple(args), dict(kwargs or {}), name=name)
    _without_state(found, name)
    given = graph_inputs(found.captured.graph.graph)
    tensors = [p for p in found.given if isinstance(given[p].meta.get("val"), Tensor)]
    flat = torch.utils._pytree.tree_leaves((tuple(args), dict(kwargs or {})))
    recipe = recipe.hoisting(False)  # a package computes every step by itself
    program = Program(found.captured, Settings(recipe, steps, inner="eager"))
    plans = _plans(program, recipe, steps)
    names = _unique([found.captured.signature.names[p] for p in tensors])
    positions = dict(zip(tensors, names, strict=True))
    caches: dict[str, Cache] = {}
    variants = tuple(_variant(program, plan, positions, caches, found) for plan in dict.fromkeys(plans))
    own = [
        PLAN,
        *(f"weight_{p}" for p in found.state),
        *(c.name for c in caches.values()),
        *(str(n) for v in variants for kind, n in v.roles if kind == "number"),
    ]
    if clash := set(own) & set(names):
        raise ConfigError(f"{name} has an input called {min(clash)!r}, which is a name of the package's own: call it otherwise")
    return Fixed(
        model=name,
        recipe=recipe,
        whole=found,
        inputs=tuple(value_of(n, given[p].meta["val"]) for p, n in positions.items()),
        outputs=tuple(value_of(f"output_{i}", v) for i, v in enumerate(_results(found))),
        caches=tuple(caches.values()),
        variants=variants,
        steps=_steps(program, plans, variants, recipe.policy),
        arguments=tuple(found.given.index(p) for p in tensors),
        examples=tuple(flat[found.given.index(p)].detach() for p in tensors),
    )


def _without_state(found: ExportedModel, name: str) -> None:
    """Refuse a model of which no fixed graph can be made."""
    if any(v.is_meta for v in found.state.values()):
        raise ConfigError(f"{name} is on the meta device, so it has no weights to export: load them first")
    if found.captured.signature.mutations:
        raise ConfigError(f"{name} writes into its inputs or buffers, which a graph without state cannot do")
    if wrong := next((n for n in graph_inputs(found.captured.graph.graph) if is_symbolic(n.meta.get("val"))), None):
        raise ConfigError(f"the input {wrong.name} of {name} has a size that is not fixed")


class _Module(nn.Module):
    """A function as torch.export takes it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _plans(program: Program, recipe: Recipe, steps: int) -> list[Plan]:
    """The plan of every step.

    Raises:
        ConfigError: the policy looks at what the run computes.
    """
    graph = program.guarded.module.graph
    looks = program.probes or dialect.observations(graph) or dialect.emissions(graph)
    if recipe.goal is not None or looks or program.lanes is not None:
        raise ConfigError(
            f"'{recipe.name}' decides while it runs what to reuse, and a fixed graph cannot: give a schedule (vdcache.calibrate and vdcache.search_schedule find "
            "one for this model), a list of computed steps, or a recipe that depend on the step number alone, as every-3"
        )
    policy = recipe.policy
    asked: list[Plan] = []

    def narrow(plan: Plan) -> Plan:
        asked.append(plan)
        return program.narrow(plan)

    plans = simulate(policy, steps, narrow=narrow)
    if any(asked) and not any(plans):
        reasons = dict.fromkeys(why for r in program.guarded.refusals for why in r.reasons)
        raise ConfigError(
            f"'{recipe.name}' finds nothing to reuse in this model: {'; '.join(reasons) or 'it shows no residual stream'}"
        )
    if any(policy.plans()) and not any(plans):
        raise ConfigError(f"'{recipe.name}' reuses nothing in a generation of {steps} steps, so there is nothing to export")
    return plans


def _variant(
    program: Program, plan: Plan, positions: dict[int, str], caches: dict[str, Cache], found: ExportedModel
) -> FixedVariant:
    variant = program.variants[plan]
    graph, needs = copy_graph(variant.graph), variant.needs
    if tile_sites(graph):
        lower_tiles(graph, "gather", always=True)
    g = graph.graph
    roles: list[tuple[str, Any]] = [
        ("input", positions[i]) if i in positions else ("weight" if i in found.state else "fixed", i)
        for i in range(len(graph_inputs(found.captured.graph.graph)))
    ]
    for slot in (*needs.reads, *needs.before):
        roles.append(("cache", _cache(caches, slot, graph_inputs(g)[len(roles)]).name))
    roles += [("number", f"{_plain(group)}_{n}") for group, told in needs.numbers for n in told.names]
    returned = variant.io.unpack(outputs(g))
    results = [v for v in returned.results if isinstance(v, fx.Node)]
    writes = [_cache(caches, slot, node).name for slot, node in returned.saved.items()]
    _distinct(g, [*results, *returned.saved.values()])
    left = []
    for node, role in zip(graph_inputs(g), roles, strict=True):
        if node.users:
            left.append(role)
        else:
            g.erase_node(node)
    if wrong := [r for r in left if r[0] == "fixed"]:
        what = found.captured.signature.names[wrong[0][1]]
        raise ConfigError(f"the graph reads {what}, which is no tensor: bind it before exporting, as functools.partial does")
    graph.recompile()
    name = "recompute" if not plan else "reuse_" + "_".join(map(_plain, sorted(plan.reuse)))
    return FixedVariant(name, plan, graph, tuple(left), len(results), tuple(writes), needs.slots)


def _distinct(g: fx.Graph, values: list[fx.Node]) -> None:
    """Return `values`, each of which is computed and returned once: a graph gives no input and no value twice."""
    seen: set[fx.Node] = set()
    found = []
    for value in values:
        if value in seen or value.op == "placeholder":
            with g.inserting_before(g.output_node()):
                copy = g.call_function(torch.ops.aten.clone.default, (value,))
            copy.meta = dict(value.meta)
            value = copy
        seen.add(value)
        found.append(value)
    set_outputs(g, found)


def _cache(caches: dict[str, Cache], slot: str, node: fx.Node) -> Cache:
    if slot not in caches:
        like = value_of(f"cache_{_plain(slot)}", node.meta["val"])
        caches[slot] = Cache(unused(like.name, {c.name for c in caches.values()}), slot, like.shape, like.dtype)
    return caches[slot]


def _steps(
    program: Program, plans: Sequence[Plan], variants: Sequence[FixedVariant], policy: Policy
) -> tuple[ScheduledStep, ...]:
    """What every step runs and is given.

    Raises:
        ConfigError: a step reads what no step before it has kept, or its predictor goes by timesteps that nobody has told.
    """
    by_plan = {v.plan: v for v in variants}
    times = getattr(policy, "times", ())
    places = [Position(s, times[s] if times else None) for s in range(len(plans))]
    bent = [Position(s, 1000.0 * (1 - s / len(plans)) ** 2 + 1) for s in range(len(plans))]  # unlike the numbers of the steps
    computed: dict[str, list[Position]] = {}
    written: set[str] = set()
    steps = []
    for number, plan in enumerate(plans):
        variant, needs = by_plan[plan], program.needs(plan)
        if missing := set(needs.reads) - written:
            raise ConfigError(f"step {number} reuses {min(missing).partition('#')[0]}, which no step before it has computed")
        numbers: dict[str, float] = {}
        for group, told in needs.numbers:
            values = told.values(places[number], computed.get(group, ()))
            if not times and values != told.values(bent[number], [bent[p.step] for p in computed.get(group, ())]):
                raise ConfigError(
                    "the recipe predicts by timesteps, which a fixed graph does not see: give the Calibration (it has them), or a PlanTable with "
                    "its `times`, or a Schedule with power=0"
                )
            numbers |= {f"{_plain(group)}_{n}": float(v) for n, v in zip(told.names, values, strict=True)}
        wanted = {name for kind, name in variant.roles if kind == "number"}
        steps.append(
            ScheduledStep(
                variant.name, tuple(sorted(plan.reuse)), variant.reused, {n: v for n, v in numbers.items() if n in wanted}
            )
        )
        written.update(program.variants[plan].io.saves)
        for group in needs.computes:
            computed.setdefault(group, []).insert(0, places[number])
    return tuple(steps)


def _results(found: ExportedModel) -> list[Tensor]:
    return [n.meta["val"] for n in outputs(found.captured.graph.graph) if isinstance(n, fx.Node)]


def value_of(name: str, like: Tensor) -> Value:
    """A tensor as the manifest lists it."""
    return Value(name, tuple(int(s) for s in like.shape), str(like.dtype).removeprefix("torch."))


def _plain(text: str) -> str:
    """A name that every tool takes."""
    return re.sub(r"\W+", "_", text)


def _unique(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        found.append(unused(_plain(name), set(found)))
    return found


def unused(name: str, taken: set[str]) -> str:
    """`name`, with a number where it is taken."""
    number, found = 1, name
    while found in taken:
        number, found = number + 1, f"{name}_{number + 1}"
    return found
