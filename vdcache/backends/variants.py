"""From a guarded graph to its variants: which there are, what they take and return, and when they are compiled."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vdcache.attention.autotune import TuningResult
from vdcache.backends.eager import run_eagerly
from vdcache.backends.guarded import GuardedGraph
from vdcache.backends.inductor import (
    CUDA_GRAPHS,
    Compiled,
    Context,
    asks_for_cuda_graphs,
    compile_own,
    no_autocast,
    on_one_device,
    out_of_pool,
)
from vdcache.backends.lowering import lower_tiles, tile_sites
from vdcache.backends.memory import CachePlan
from vdcache.backends.settings import Settings
from vdcache.errors import ConfigError, ContractError
from vdcache.ir import dialect
from vdcache.ir.capture import first_line, is_control_flow
from vdcache.ir.edit import copy_graph
from vdcache.ir.edit import inputs as graph_inputs
from vdcache.ir.ops import collective_order
from vdcache.passes import DeadCode, Pipeline, Specialise, VariantOutputs, head_io, variant_io
from vdcache.passes.hoist_invariants import held_inputs
from vdcache.passes.mark_lanes import halve_lanes, lanes_io
from vdcache.passes.outline import CALL, Outline
from vdcache.passes.predictors import numbers_of, predictor_of
from vdcache.patterns.cost import flops
from vdcache.policies.metrics import MetricSpec
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.runtime.call import LaneScope, ProbeResult, ProbeSpec, VariantInputs
from vdcache.util.sizes import Bindings
from vdcache.util.slots import group_of

__all__ = ["Head", "LazyVariant", "PlanVariant", "VariantCompiler", "Variants"]


class _Waited(threading.local):
    """How many seconds each thread has waited for graphs to be compiled."""

    seconds = 0.0


class VariantCompiler:
    """Compiles the static graphs of one captured graph: when Dynamo calls the backend, and after it has returned.

    Args:
        settings: recipe and compiler.
        fakes: fake values of the captured graph's inputs.
        static: which of them are weights and buffers, by position.
        pair: fake value of the input that all parts have after these, where one lane is predicted from another call.
    """

    def __init__(self, settings: Settings, fakes: Sequence[Any], static: frozenset[int], pair: Sequence[Tensor]) -> None:
        self._settings, self._fakes, self._static, self.pair = settings, (*fakes, *pair), static, pair
        self.bindings = Bindings(fakes)
        self.apart = ""  # why blocks that repeat are compiled one by one
        self.choices: dict[str, TuningResult] = {}  # how attentions under masks are computed, by node
        self.lock = threading.RLock()  # threads may run one program at once
        self.waited = _Waited()
        self.eager = settings.starts_eagerly
        self.may_compile = settings.starts_eagerly and settings.inner == "auto"  # nobody has decided yet
        self._context = Context()

    def compile(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        """Compile a graph, which stays as it is, for all its inputs."""
        settings = self._settings
        own = self._lowered(graph)
        if self.eager:
            return run_eagerly(own)
        options = dict(settings.inductor)
        if settings.cuda_graphs:
            options[CUDA_GRAPHS], inputs = True, on_one_device(inputs)
        elif asks_for_cuda_graphs(options):
            options[CUDA_GRAPHS] = False
            settings.log_once(
                "cuda graphs",
                "vdcache: cached graphs are compiled without CUDA graphs, because a replay overwrites what earlier steps cached; "
                "everything else that you asked Inductor for is done. cuda_graphs=True has every result copied",
            )
        with no_autocast():
            run = self._compiled(graph, own, inputs, options)
        return out_of_pool(run) if settings.cuda_graphs else run

    def _compiled(self, graph: fx.GraphModule, own: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> Compiled:
        """Compile `own`, the lowered copy of `graph`, which is used up."""
        settings = self._settings
        if settings.outline and self._outlined(own):
            try:
                return compile_own(own, inputs, options, self._static)
            except Exception as error:
                if is_control_flow(error):
                    raise
                settings.log_once(
                    "outline",
                    f"vdcache: Inductor takes no calls of repeated blocks ({first_line(error)}), so every block is compiled on its own",
                )
                own = self._lowered(graph)
        return compile_own(own, inputs, options, self._static)

    def _outlined(self, graph: fx.GraphModule) -> bool:
        """Make calls of the blocks that repeat, in place, where that is asked for or does not make a step longer."""
        done = Outline(CALL if self._settings.outline == "auto" else 0.0).run(graph)
        small = [reason for refusal in done.refusals for reason in refusal.reasons if reason.startswith("a block takes")]
        self.apart = self.apart or next(iter(small), "")
        return bool(done.rewrites)

    def _lowered(self, graph: fx.GraphModule) -> fx.GraphModule:
        """What the inner compiler is given: a copy, where masks are lowered in it or Inductor takes possession of it."""
        eager, masked = self.eager, bool(tile_sites(graph))
        if masked or not eager:
            graph = copy_graph(graph)
        if masked:
            lowering = "gather" if eager and self._settings.tiles == "auto" else self._settings.tiles
            self.choices.update(lower_tiles(graph, lowering, expand=not eager))
        return graph

    def compile_later(self, graph: fx.GraphModule, more: Sequence[Tensor]) -> Compiled | None:
        """Compile for all sizes that the captured graph is for. None where that takes a guard that Dynamo will never check.

        Args:
            more: fake values of the inputs after those that all parts have.
        """
        before = self._context.guards()
        with self._context.again():
            found = self.compile(graph, [*self._fakes, *more])
        return found if self._context.guards() <= before else None

    def compile_for(self, graph: fx.GraphModule, inputs: Sequence[Any], added: Sequence[Tensor]) -> Compiled:
        """Compile for the sizes of these inputs alone.

        Args:
            added: fake values of the inputs after these.
        """
        examples = [torch.empty(self.bindings.shape(v, inputs), dtype=v.dtype, device=v.device) for v in added]
        with torch.inference_mode(False), torch.no_grad():
            return self.compile(graph, [*inputs, *examples])

    def zeros(self, values: Sequence[Tensor], inputs: Sequence[Any]) -> list[Tensor]:
        """Zeros in the place of fake values, of the sizes that a call has."""
        if not values:
            return []
        return [torch.zeros(self.bindings.shape(v, inputs), dtype=v.dtype, device=v.device) for v in values]


class LazyVariant:
    """One graph of a program.

    Args:
        graph: not to be changed by others.
        added: fake values of the inputs that it has after the model's and after `carried`.
        compiler: of the program's graphs.
        carried: fake values of what the head hands over. What the graph is given because it depends on no latent comes before.
    """

    def __init__(
        self, graph: fx.GraphModule, added: Sequence[Tensor], compiler: VariantCompiler, carried: Sequence[Tensor] = ()
    ) -> None:
        self.held, values = held_inputs(graph)  # names of the invariants that it is given
        self.graph, self.added, self.carried = graph, tuple(added), (*values, *carried)
        self._compiler = compiler
        self._compiled: dict[Hashable, Compiled] = {}
        self._by_size = False  # each compiled graph is good for one size only

    def compile_now(self, inputs: Sequence[Any]) -> None:
        """Compile inside the backend call.

        Args:
            inputs: the model's, and what is carried.
        """
        self._compiled[()] = self._compiler.compile(self.graph, [*inputs, *self.added])

    def forget(self) -> None:
        """Compile it anew when it is needed."""
        self._compiled.clear()

    def warm_up(self) -> None:
        """Compile it, unless that takes more sizes than are known."""
        with self._compiler.lock:
            if not self._by_size and not self._compiled:
                if (found := self._compiler.compile_later(self.graph, [*self.carried, *self.added])) is not None:
                    self._compiled[()] = found
                self._by_size = found is None

    def ready(self, inputs: Sequence[Any]) -> Compiled:
        """The compiled graph for these inputs (the model's, and those that come after)."""
        if (found := self._compiled.get(())) is not None:  # good for all inputs
            return found
        began = time.perf_counter()
        with self._compiler.lock:
            self.warm_up()
            size = self._compiler.bindings.sizes(inputs) if self._by_size else ()
            if size not in self._compiled:
                self._compiled[size] = self._compiler.compile_for(self.graph, inputs, self.added)
        self._compiler.waited.seconds += time.perf_counter() - began
        return self._compiled[size]


class PlanVariant(LazyVariant):
    """What runs under one plan.

    Args:
        needs: what the session gives it.
    """

    def __init__(
        self, graph: fx.GraphModule, needs: VariantInputs, compiler: VariantCompiler, carried: Sequence[Tensor]
    ) -> None:
        self.io = io = variant_io(graph)
        self.needs, self.collectives = needs, collective_order(graph.graph)
        super().__init__(graph, io.added_values, compiler, carried)
        self._results_alone = not (io.saves or io.previous or io.emits or io.measures)

    def unpack(self, outputs: Sequence[Any]) -> VariantOutputs:
        """What it returned, by name."""
        return VariantOutputs(list(outputs), {}, {}, {}) if self._results_alone else self.io.unpack(outputs)


class Head(LazyVariant):
    """What runs before the plan of a step is chosen."""

    def __init__(self, graph: fx.GraphModule, compiler: VariantCompiler) -> None:
        self.io = head_io(graph)
        super().__init__(graph, self.io.previous_values, compiler)
        self.probes = tuple(ProbeSpec(MetricSpec(name, distance), since) for name, distance, since in self.io.probes)

    def look(self, inputs: Sequence[Any], previous: Sequence[Tensor] | None) -> ProbeResult:
        """Run it.

        Args:
            inputs: the model's, the pair, and the invariants that it reads.
            previous: values of the probes; None where there are none yet.
        """
        before = self._compiler.zeros(self.added, inputs) if previous is None else previous
        with no_autocast():
            outputs = self.ready(inputs)(*inputs, *before)
        return ProbeResult(*self.io.unpack(outputs))


class Variants:
    """The variants of one guarded graph by plan, each specialised when it is first asked for and compiled when it first runs.

    Where the recipe probes, the graph is split: the head runs first, the policy decides, and a variant of the tail follows.

    Args:
        guarded: the graph.
        settings: recipe and compiler.
        keeps: which values are kept; as the recipe asks if not given.
        compiler: of other variants of the same graph, which go on being compiled as these are.

    Raises:
        ConfigError: the recipe never reuses what it guards.
    """

    def __init__(
        self,
        guarded: GuardedGraph,
        settings: Settings,
        keeps: CachePlan | None = None,
        compiler: VariantCompiler | None = None,
    ) -> None:
        self._guarded, self._recipe = guarded, settings.recipe
        self.predictor = settings.recipe.predictor if keeps is None else keeps.predictor
        lanes, mutations = lanes_io(guarded.module), len(guarded.captured.signature.mutations)
        self.lanes: LaneScope | None = None
        if lanes is not None:
            self.lanes = LaneScope(lanes.mode, lanes.group, (lanes.low, lanes.batch // 2), lanes.output - mutations)
        pair = () if lanes is None or lanes.pair_value is None else (lanes.pair_value,)
        self.fakes = fakes = [n.meta.get("val") for n in graph_inputs(guarded.captured.graph.graph)]
        self.compiler = compiler or VariantCompiler(settings, fakes, guarded.captured.signature.static, pair)
        self.head = None if guarded.head is None else Head(guarded.head, self.compiler)
        self.slots = tuple(str(n.args[1]) for n in dialect.cache_guards(guarded.body.graph))
        caches = keeps is None or keeps.caches
        self._groups = frozenset(map(group_of, self.slots)) if caches else frozenset()
        self._narrowed: dict[Plan, Plan] = {}
        self._made: dict[Plan, PlanVariant] = {}
        self._read: tuple[str, ...] = ()  # the slots that some plan reads: the others are not worth keeping
        asked = settings.recipe.plans() if caches else (RECOMPUTE,)
        self.plans = tuple(dict.fromkeys(map(self.narrow, asked)))
        if self.slots and not any(self.plans) and (wanted := {g for p in asked for g in p.reuse}):
            raise ConfigError(
                f"the recipe '{settings.recipe.name}' never reuses what it guards: its policy reuses {', '.join(sorted(wanted))}, its slots "
                f"belong to {', '.join(sorted(self._groups))}; give both the same group"
            )
        self._read = self._slots_read()
        self.recompute = self[RECOMPUTE]

    def __len__(self) -> int:
        """How many graphs there are to compile, the head among them."""
        return len(self.plans) + (self.head is not None)

    def __getitem__(self, plan: Plan) -> PlanVariant:
        if (found := self._made.get(plan)) is None:
            keeps = bool(self.slots) and len(self.plans) > 1
            with self.compiler.lock:
                if (found := self._made.get(plan)) is None:
                    found = self._made[plan] = self._specialised(plan, "needed" if keeps else "none")
        return found

    def narrow(self, plan: Plan) -> Plan:
        """What of a plan concerns this graph: groups without a slot in it make no variant of their own."""
        if (found := self._narrowed.get(plan)) is None:
            found = self._narrowed[plan] = Plan(plan.reuse & self._groups)
        return found

    def _slots_read(self) -> tuple[str, ...]:
        """The slots that some plan reads."""
        read: set[str] = set()
        for plan in filter(None, self.plans):
            variant = self._specialised(plan, "none")
            read.update(variant.io.reused)
            if plan.reuse == self._groups:  # it computes nothing that it could keep
                self._made[plan] = variant
        return tuple(s for s in self.slots if s in read)

    def _specialised(self, plan: Plan, save: str) -> PlanVariant:
        guarded, recipe = self._guarded, self._recipe
        lanes = lanes_io(guarded.module)
        half = lanes is not None and lanes.mode == "batch" and lanes.group in plan.reuse
        specialise = Specialise(reuse=plan.reuse, save=save, slots=self._read, predictor=self.predictor, observe=not half)
        given = recipe.pipeline.ensured | Specialise.requires
        graph, _ = Pipeline((specialise, DeadCode()), given=given).run(guarded.body)
        if half and lanes is not None and self.lanes is not None:
            halve_lanes(graph, lanes, self.lanes.output)
        _check_order(guarded.body, graph, plan)
        io = variant_io(graph)
        frames: dict[str, Any] = {str(n.args[1]): n.args[4] for n in dialect.observations(guarded.body.graph)}
        layouts = tuple(MetricSpec(slot, distance, strides, frames[slot]) for slot, distance, strides in io.measures)
        numbers = tuple((group, numbers_of(predictor_of(self.predictor, group))) for group in io.numbers)
        needs = VariantInputs(io.reads, io.before, layouts, numbers, tuple(dict.fromkeys(map(group_of, io.saves))), io.reused)
        carried = self.head.io.carried_values if self.head is not None else ()
        return PlanVariant(graph, needs, self.compiler, carried)

    # ---- what they cost ------------------------------------------------------------------------------------------

    def cache_bytes(self, inputs: Sequence[Any] | None = None) -> int | None:
        """Bytes kept for one lane, known before the first run; None where sizes are symbols.

        Args:
            inputs: of a call, which tell what symbols stand for.
        """
        kept = {name: v for p in self.plans for name, v in zip(self[p].io.reads, self[p].io.read_values, strict=True)}
        values = [*kept.values(), *self.recompute.io.previous_values, *(self.head.added if self.head is not None else ())]
        if any(isinstance(s, torch.SymInt) for v in values for s in v.shape):
            if inputs is None:
                return None
            return sum(math.prod(self.compiler.bindings.shape(v, inputs)) * v.element_size() for v in values)
        return sum(v.numel() * v.element_size() for v in values)

    def flops(self, plan: Plan) -> int:
        """FLOPs of one call under a plan, the head's included; counted by `patterns.cost`."""
        return sum(flops(n) for part in self.parts((plan,)) for n in part.graph.graph.nodes)

    def parts(self, plans: Sequence[Plan]) -> list[LazyVariant]:
        """The head, if there is one, and the variants of these plans."""
        return [*([self.head] if self.head is not None else []), *map(self.__getitem__, plans)]

    # ---- compiling -----------------------------------------------------------------------------------------------

    def decide(self, compiles: bool) -> None:
        """From here on variants are compiled by Inductor, or run eagerly for good."""
        with self.compiler.lock:
            self.compiler.may_compile, self.compiler.eager = False, not compiles
            for part in (*self._made.values(), *([self.head] if self.head is not None else [])) if compiles else ():
                part.forget()

    def warm_up(self) -> None:
        """Compile every variant that can be compiled without knowing more sizes."""
        for part in self.parts(self.plans):
            part.warm_up()


def _check_order(body: fx.GraphModule, variant: fx.GraphModule, plan: Plan) -> None:
    """Every variant communicates in the order of the whole graph, which is the same on all ranks: it leaves exchanges out, and moves none.

    Raises:
        ContractError: it does not.
    """
    rest = iter(collective_order(body.graph))
    if (moved := next((c for c in collective_order(variant.graph) if c not in rest), None)) is not None:
        raise ContractError(f"the variant that reuses {plan} communicates in another order than the model does, at '{moved}'")
