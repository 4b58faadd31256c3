"""One captured graph with all its variants: what runs where the user's frame ran."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vdcache.attention.autotune import TuningResult
from vdcache.backends.eager import run_eagerly
from vdcache.backends.inductor import Compiled, Context, compile_now, no_autocast
from vdcache.backends.lowering import lower_tiles, tile_sites
from vdcache.backends.settings import Settings
from vdcache.backends.verdict import Verdict, breaks_since
from vdcache.errors import ConfigError
from vdcache.ir import dialect
from vdcache.ir.capture import Captured, first_line, is_control_flow
from vdcache.ir.edit import copy_graph
from vdcache.ir.edit import inputs as graph_inputs
from vdcache.ir.facts import Fact
from vdcache.ir.ops import is_work, tensor_of
from vdcache.passes import (
    DeadCode,
    Observe,
    PassRecord,
    Pipeline,
    Refusal,
    Specialise,
    SplitAtProbe,
    VariantIO,
    head_io,
    variant_io,
)
from vdcache.passes.canonicalise import Canonicalise
from vdcache.passes.mark_lanes import halve_lanes, lanes_io
from vdcache.passes.outline import Outline
from vdcache.patterns import GraphAnalysis, analyze
from vdcache.patterns.cost import flops
from vdcache.policies.metrics import MetricSpec
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.runtime import registry
from vdcache.runtime.call import LaneScope, ProbeResult, ProbeSpec, VariantInputs
from vdcache.runtime.session import Session
from vdcache.util.sizes import Bindings, shape_hint, updated_by
from vdcache.util.slots import group_of

__all__ = ["LazyVariant", "Program"]

MAKING = 5e-3  # seconds that looking a variant up never takes, and making one always does


class LazyVariant:
    """One graph of a program, compiled when it is first needed.

    Args:
        graph: not to be changed.
        added: fake values of the inputs that it has after the model's and after `carried`.
        of: the program, whose settings and tracing context compile it.
        carried: fake values of what the head hands over.
    """

    def __init__(self, graph: fx.GraphModule, added: Sequence[Tensor], of: Program, carried: Sequence[Tensor] = ()) -> None:
        self.graph, self.added, self.carried = graph, tuple(added), tuple(carried)
        self._of = of
        self._compiled: dict[Hashable, Compiled] = {}
        self._by_size = False  # good for one size only
        self._tiled = bool(tile_sites(graph))

    def compile_now(self, inputs: Sequence[Any]) -> None:
        """Compile inside the backend call.

        Args:
            inputs: the model's, and what is carried.
        """
        self._compiled[()] = self._compile([*inputs, *self.added])

    def ready(self, inputs: Sequence[Any] | None) -> Compiled:
        """The compiled graph for these inputs (the model's, and what is carried)."""
        if not self._by_size and (found := self._compiled.get(())) is not None:
            return found
        with self._of.making:  # threads may run one program at once
            size: Hashable = self._of.bindings.sizes(inputs) if self._by_size and inputs is not None else ()
            return self._compiled.get(size) or self._make(size, inputs)

    def _make(self, size: Hashable, inputs: Sequence[Any] | None) -> Compiled:
        if size:
            found = self._for_one_size(inputs or ())
        else:
            context = self._of.context
            before = context.guards()
            with context.again():
                found = self._compile([*self._of.fakes, *self.carried, *self.added])
            if context.guards() > before:
                # A guard that Dynamo will never check: this variant is only good for sizes that it was made for.
                self._by_size = True
                return self.ready(inputs) if inputs is not None else found
        self._compiled[size] = found
        return found

    def _for_one_size(self, inputs: Sequence[Any]) -> Compiled:
        shape = self._of.bindings.shape
        examples = [torch.empty(shape(v, inputs), dtype=v.dtype, device=v.device) for v in self.added]
        with torch.inference_mode(False), torch.no_grad():
            return self._compile([*inputs, *examples])

    def _compile(self, inputs: Sequence[Any]) -> Compiled:
        settings = self._of.settings
        graph = self._lowered()
        if settings.inner == "eager":
            return run_eagerly(graph)
        options = dict(settings.inductor)
        with no_autocast():
            if settings.outline and Outline().run(graph).rewrites:
                try:
                    return compile_now(graph, inputs, options)
                except Exception as error:
                    if is_control_flow(error):
                        raise
                    settings.log_once(
                        "outline",
                        f"vdcache: every block is compiled on its own, because Inductor takes no calls of one block: {first_line(error)}",
                    )
                    graph = self._lowered()
            return compile_now(graph, inputs, options)

    def _lowered(self) -> fx.GraphModule:
        """The graph as the inner compiler is given it: a copy, where it is changed or taken possession of."""
        settings = self._of.settings
        eager = settings.inner == "eager"
        graph = copy_graph(self.graph) if self._tiled or not eager else self.graph
        if self._tiled:
            lowering = "gather" if eager and settings.tiles == "auto" else settings.tiles
            self._of.choices.update(lower_tiles(graph, lowering, expand=not eager))
        return graph


class Program:
    """A graph that chooses its variant at every call.

    Where the recipe probes, the graph is split: the head runs first, the policy decides, and a variant of the tail follows.
    Holds no state of any model: Dynamo runs one program for all instances of a class, so the session is looked up each time.

    Args:
        captured: the graph as it came in.
        settings: recipe and compiler.
        frame: identity of the user's frame.
        resumes: whether this graph goes on where another one left off.
        verdict: of the model, which knows why its forward is broken.
    """

    def __init__(
        self,
        captured: Captured,
        settings: Settings,
        frame: Hashable = None,
        resumes: bool = False,
        verdict: Verdict | None = None,
    ) -> None:
        self.settings, self.family, self._resumes, self._verdict = settings, frame, resumes, verdict
        self._captured = captured
        pipeline = settings.recipe.pipeline
        self.guarded, self.steps = self._insert_cache_guards(pipeline)
        self.analysis: GraphAnalysis = analyze(self.guarded)
        self._sites = tile_sites(self.guarded)
        self.structure = _structure(self.guarded)
        kind = frame, self.structure, _constants(self.guarded)
        self.kind: Hashable = _kinds.setdefault(kind, len(_kinds))

        given = graph_inputs(captured.graph.graph)
        names = [n.name for n in given]
        self.fakes = [n.meta.get("val") for n in given]
        self.bindings = Bindings(self.fakes)
        self.choices: dict[str, TuningResult] = {}  # how attentions under masks are computed, by node
        self.timestep_inputs = tuple(names.index(c) for c in self.analysis.timestep_inputs)
        self.latent = names.index(self.analysis.latent) if self.analysis.latent else None
        self.static = tuple(sorted(captured.signature.static))
        timed = {
            *captured.signature.static,
            *self.timestep_inputs,
        }  # a timestep's own dtype says nothing of what is kept: pipelines change it
        self.activations = tuple(i for i in range(len(names)) if i not in timed)
        outputs = [tensor_of(n) for n in captured.graph.graph.output_node().all_input_nodes]
        # What only comes nearest of all inputs may be a prompt, whose exchange must be noticed.
        results = [shape_hint(o) for o in outputs if o is not None]
        fed = {i: self.fakes[i] for i in map(names.index, self.analysis.latents)}
        nearest = {i: shape_hint(v) for i, v in fed.items() if v is not None}
        self.latents = tuple(updated_by(nearest, results))
        self.whole = len(self.latents) == len(nearest) > 0
        written = {at for _, at in captured.signature.mutations}  # by the model itself: its state, which says nothing of a call
        sizes = {str(d) for v in self.fakes if isinstance(v, Tensor) for d in v.shape if isinstance(d, torch.SymInt)}
        self.told = tuple(
            i
            for i in self.activations
            if i not in written and not (isinstance(self.fakes[i], torch.SymInt) and str(self.fakes[i]) in sizes)
        )
        self._weights = tuple(i for i in self.static if i not in written)
        self._weight_runs = _runs(self._weights)
        self.context = Context()
        self.making = threading.RLock()

        self._carried: tuple[Tensor, ...] = ()
        self._lanes = lanes_io(self.guarded)
        mutations = len(captured.signature.mutations)
        self.lanes = (
            LaneScope(
                self._lanes.mode, self._lanes.group, (self._lanes.low, self._lanes.batch // 2), self._lanes.output - mutations
            )
            if self._lanes is not None
            else None
        )
        pair = self._lanes.pair_value if self._lanes is not None else None
        self._more = () if pair is None else (pair,)  # inputs that all parts have after the model's
        self.fakes += self._more
        self._head, self._body, self.probes = self._split()
        self.slots = tuple(str(n.args[1]) for n in dialect.cache_guards(self._body.graph))
        self.emits = tuple(str(n.args[1]) for n in dialect.emissions(self._body.graph))
        self._groups = frozenset(map(group_of, self.slots))
        self._narrowed: dict[Plan, Plan] = {}
        self.plans = tuple(dict.fromkeys(self.narrow(p) for p in settings.recipe.plans()))
        self._graphs: dict[Plan, tuple[fx.GraphModule, VariantIO]] = {}
        if self.slots and not any(self.plans) and (wanted := {g for p in settings.recipe.plans() for g in p.reuse}):
            raise ConfigError(
                f"the recipe '{settings.recipe.name}' never reuses what it guards: its policy reuses {', '.join(sorted(wanted))}, its slots "
                f"belong to {', '.join(sorted(self._groups))}; give both the same group"
            )
        self._needs_of: dict[Plan, VariantInputs] = {}
        self._parts: dict[Plan, LazyVariant] = {}
        self._needed = self._read_by_some_plan()
        self._io = self._specialised(RECOMPUTE)[1]
        self._frames: dict[str, Any] = {str(n.args[1]): n.args[4] for n in dialect.observations(self._body.graph)}

    # ---- what there is -------------------------------------------------------------------------------------------

    def _insert_cache_guards(self, pipeline: Pipeline) -> tuple[fx.GraphModule, tuple[PassRecord, ...]]:
        """The guarded graph. What the recipe's scope does not find in this graph is left out."""
        graph, first = Pipeline((Canonicalise(),)).run(self._captured.graph)
        if not analyze(graph).branches:
            return graph, first
        rest = pipeline.passes[1:]
        given = frozenset().union(*(p.ensures for p in pipeline.passes[:1]), pipeline.given)
        guarded, later = Pipeline(rest, given=given).run(graph, copied=True)
        return guarded, (*first, *later)

    def _split(self) -> tuple[LazyVariant | None, fx.GraphModule, tuple[ProbeSpec, ...]]:
        """The head where the recipe probes something, the rest, and what is probed."""
        if not dialect.probes(self.guarded.graph):
            return None, self.guarded, ()
        given = self._facts | SplitAtProbe.requires
        head, _ = Pipeline((SplitAtProbe("head"),), given=given).run(self.guarded)
        tail, steps = Pipeline((SplitAtProbe("tail"),), given=given).run(self.guarded)
        self.steps = (*self.steps, *steps)
        io = head_io(head)
        self._carried = io.carried_values
        probes = tuple(ProbeSpec(MetricSpec(name, distance), since) for name, distance, since in io.probes)
        return LazyVariant(head, io.previous_values, self), tail, probes

    @property
    def _facts(self) -> frozenset[Fact]:
        passes = self.settings.recipe.pipeline
        return frozenset().union(*(p.ensures for p in passes), Pipeline(()).given)

    def weights(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """The parameters and buffers among the inputs of a call that the model does not write into itself."""
        found: list[Tensor] = []
        for run in self._weight_runs:  # a slice costs a tenth of as many look-ups, and a model has a thousand weights
            found += inputs[run]
        return tuple(found)

    def narrow(self, plan: Plan) -> Plan:
        """What of a plan concerns this graph: groups without a slot in it make no variant of their own."""
        if (found := self._narrowed.get(plan)) is None:
            found = self._narrowed[plan] = Plan(plan.reuse & self._groups)
        return found

    def _read_by_some_plan(self) -> tuple[str, ...]:
        """The slots whose values are worth keeping."""
        needed: set[str] = set()
        for plan in filter(None, self.plans):
            graph, io = self._specialise(plan, "none")
            needed.update(io.reused)
            if plan.reuse == self._groups:  # it computes nothing that it could keep
                self._graphs[plan] = graph, io
        return tuple(s for s in self.slots if s in needed)

    @property
    def tiled(self) -> bool:
        """Whether some attention has a mask."""
        return bool(self._sites)

    @property
    def masks(self) -> str:
        """In words: the masks on attentions, what they leave, and how they are computed."""
        sites = self._sites
        if not sites:
            return ""
        density = sum(on.density for _, on in sites) / len(sites)
        names = ", ".join(dict.fromkeys(str(on.mask) for _, on in sites))
        found = [c for c in self.choices.values() if c.seconds]
        how = ""
        if found:
            speed = sum(c.speedup for c in found) / len(found)
            how = f" by {', '.join(dict.fromkeys(c.lowering for c in found))}, {speed:.2f}× as fast as dense attention"
        return f"{len(sites)} attentions under masks ({names}): {density:.0%} of the weights{how}"

    @property
    def unobserved(self) -> tuple[str, ...]:
        """Why what the recipe observes is not in this graph."""
        silent = (s for s in self.steps if s.text.partition("{")[0] == Observe.name and not s.rewrites)
        return tuple(f"{s.text} found nothing, {reason}" for s in silent for r in s.refusals for reason in r.reasons)

    @property
    def broken(self) -> str:
        """Why Dynamo broke the forward that this graph is part of, in sentences; "" where nothing is known."""
        advice = "Remove the break, or say where each step begins with session.begin() and session.step()."
        if self._verdict is not None:
            return self._verdict.because(advice)
        return ""

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(r for step in self.steps for r in step.refusals)

    def cache_bytes(self) -> int | None:
        """Bytes kept for one lane, known before the first run; None where sizes are symbols."""
        values = self._kept_values()
        if any(isinstance(s, torch.SymInt) for v in values for s in v.shape):
            return None
        return sum(v.numel() * v.element_size() for v in values)

    @property
    def pair_values(self) -> tuple[Tensor, ...]:
        """What a lane that is predicted from another call's keeps, as fake tensors: the step's first call does not keep it."""
        return tuple(v.detach() for v in self._more)

    def _kept_values(self) -> list[Tensor]:
        kept: dict[str, Tensor] = {}
        for plan in self.plans:
            io = self._specialised(plan)[1]
            kept.update(zip(io.reads, io.read_values, strict=True))
        probed = self._head.added if self._head is not None else ()
        return [*kept.values(), *self._io.previous_values, *probed]

    def needs(self, plan: Plan) -> VariantInputs:
        """What the plan's variant takes besides the model's inputs."""
        if (found := self._needs_of.get(plan)) is None:
            io = self._specialised(plan)[1]
            layouts = tuple(MetricSpec(slot, d, strides, self._frames[slot]) for slot, d, strides in io.measures)
            computes = tuple(self._groups - plan.reuse)
            found = self._needs_of[plan] = VariantInputs(io.reads, io.before, layouts, io.times, computes, io.reused)
        return found

    def slots_kept(self, plan: Plan) -> tuple[str, ...]:
        """What the plan's variant returns after the model's results, by the name under which it is kept."""
        return self._specialised(plan)[1].saves

    def flops(self, plan: Plan) -> int:
        """FLOPs of one call under a plan, the head's included; counted by `patterns.cost`."""
        graphs = [self.variant_graph(plan), *([self._head.graph] if self._head is not None else [])]
        return sum(flops(n) for graph in graphs for n in graph.graph.nodes)

    def variant_graph(self, plan: Plan) -> fx.GraphModule:
        """The graph that runs under a plan; not to be changed."""
        return self._specialised(plan)[0]

    def _specialised(self, plan: Plan) -> tuple[fx.GraphModule, VariantIO]:
        if plan not in self._graphs:
            keeps = bool(self.slots) and len(self.plans) > 1
            with self.making:
                if plan not in self._graphs:
                    self._graphs[plan] = self._specialise(plan, "needed" if keeps else "none", self._needed if keeps else ())
        return self._graphs[plan]

    def _specialise(self, plan: Plan, save: str, slots: tuple[str, ...] = ()) -> tuple[fx.GraphModule, VariantIO]:
        half = self._lanes is not None and self._lanes.mode == "batch" and self._lanes.group in plan.reuse
        specialise = Specialise(
            reuse=plan.reuse, save=save, slots=slots, predictor=self.settings.recipe.predictor, observe=not half
        )
        graph, _ = Pipeline((specialise, DeadCode()), given=self._facts | Specialise.requires).run(self._body)
        if half and self._lanes is not None:
            halve_lanes(graph, self._lanes, self.lanes.output if self.lanes is not None else 0)
        return graph, variant_io(graph)

    # ---- compiling -----------------------------------------------------------------------------------------------

    def compile_first(self, example_inputs: Sequence[Any]) -> None:
        """Compile what every run begins with, inside the backend call."""
        example_inputs = [*example_inputs, *self.fakes[len(example_inputs) :]]
        if self._head is not None:
            self._head.compile_now(example_inputs)
        self._part(RECOMPUTE).compile_now([*example_inputs, *self._carried])

    def warm_up(self) -> None:
        """Compile every variant that can be compiled without knowing more sizes."""
        for part in (*([self._head] if self._head is not None else []), *map(self._part, self.plans)):
            part.ready(None)

    @property
    def variants(self) -> int:
        """How many graphs there are to compile, the head among them."""
        return len(self.plans) + (self._head is not None)

    def _part(self, plan: Plan) -> LazyVariant:
        if (found := self._parts.get(plan)) is None:
            graph, io = self._specialised(plan)
            found = self._parts[plan] = LazyVariant(graph, io.added_values, self, self._carried)
        return found

    # ---- running -------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        session = registry.find(
            inputs, self.static, drives=bool(self.timestep_inputs), resumes=self._resumes, owner=self.settings
        )
        if session is None:
            return self._alone(inputs)
        mine, claimed = session.claim(self.settings.new_session)
        try:
            return self._under(mine, inputs)
        except BaseException:
            mine.failed()
            raise
        finally:
            if claimed:
                mine.release()

    def _under(self, session: Session, inputs: Sequence[Any]) -> Sequence[Any]:
        session.adopt(self)
        if self.settings.on_inputs is not None:
            self.settings.on_inputs(self, inputs)
        making = 0.0

        def look(previous: list[Tensor] | None) -> ProbeResult:
            nonlocal making
            asked = time.perf_counter()
            assert self._head is not None
            self._head.ready(inputs)
            making += time.perf_counter() - asked
            return self._look([*inputs, *self._zeros(self._more, inputs)], previous)

        call = session.enter(self, inputs, look)
        plan = call.plan
        pair = [call.pair] if call.pair is not None else self._zeros(self._more, inputs)
        carried = [*pair, *call.look.carried]
        asked = time.perf_counter()
        run = self._part(plan).ready((*inputs, *carried) if carried else inputs)
        made = time.perf_counter() - asked + making
        call.began += made  # making a variant is not what a step takes
        if call.device_time is not None and made > MAKING:
            call.device_time.restart()
        io = self._specialised(plan)[1]
        before = self._zeros(io.before_values, inputs) if call.before is None else call.before
        previous = self._zeros(io.previous_values, inputs) if call.previous is None else call.previous
        with no_autocast():
            outputs = run(*inputs, *carried, *call.reads, *before, *previous, *call.times)
        results, rest = outputs[: self._results], outputs[self._results :]
        saved = dict(zip(io.saves, rest, strict=False))
        if self.lanes is not None and self.lanes.mode == "calls" and call.pair is None:
            saved = {n: v for n, v in saved.items() if group_of(n) != self.lanes.group}  # there was nothing to compare with
        observed = dict(zip(io.previous, rest[len(io.saves) :], strict=False))
        if io.emits:
            session.emit(self, dict(zip(io.emits, rest[len(io.saves) + len(io.previous) :], strict=False)))
        # A policy that measured or probed what is no number computes the next step by itself, and says why.
        if call.keep and saved and not io.measures and _finite(call.look.values) and not _finite(saved.values()):
            call.keep = False
            self.settings.warn_once(
                "not finite",
                f"vdcache: what the model computed in step {call.record.step} is not a number (NaN or infinite), so nothing of it is reused and the "
                "steps after it are computed until it is one again. Look at the model's input and its weights: nothing was reused in this step.",
            )
        session.leave(call, inputs, results, saved, observed, rest[-1] if io.measures else None)
        if session.recorder is not None:
            probed = zip((p.layout.name for p in self.probes), call.look.values, strict=False)
            session.recorder(self, inputs, results, {**saved, **observed, **dict(probed)}, call.record)
        return results

    def _look(self, inputs: Sequence[Any], previous: Sequence[Tensor] | None) -> ProbeResult:
        """Run the head."""
        if self._head is None:
            return ProbeResult()
        before = self._zeros(self._head.added, inputs) if previous is None else previous
        with no_autocast():
            outputs = self._head.ready(inputs)(*inputs, *before)
        at = len(self._carried)
        return ProbeResult(tuple(outputs[at:-1]), outputs[-1], tuple(outputs[:at]))

    @property
    def _results(self) -> int:
        return self._captured.signature.results

    def _alone(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run without a session: everything is computed, nothing is kept."""
        if self.slots:
            self._say_no_session()
        more = self._zeros(self._more, inputs)
        carried = [*more, *self._look([*inputs, *more], None).carried]
        zeros = self._zeros(self._io.added_values, inputs)
        run = self._part(RECOMPUTE).ready([*inputs, *carried])
        with no_autocast():
            return run(*inputs, *carried, *zeros)[: self._results]

    def _say_no_session(self) -> None:
        reason = next(iter(breaks_since({})), "")
        broken = (
            f"If it is part of a forward that Dynamo has broken in this process, the reason is: {reason.rstrip('.')}. "
            if reason
            else ""
        )
        self.settings.warn_once(
            "no session",
            f"vdcache: a graph runs outside any session and is computed in full: no timestep is seen in it. {broken}A timestep is a tensor "
            "that reaches a sine or cosine and then a layer (a Python float reaches none: pass a tensor). If the model embeds its time otherwise, "
            "breaks into several graphs, or is compiled block by block (compile_repeated_blocks), compile the whole of it: "
            "model = vdcache.compile(model); model.vdcache.begin(steps) and .step() then say the step.",
        )

    def _zeros(self, values: Sequence[Tensor], inputs: Sequence[Any]) -> list[Tensor]:
        return [torch.zeros(self.bindings.shape(v, inputs), dtype=v.dtype, device=v.device) for v in values]


def _finite(values: Iterable[Tensor]) -> bool:
    """Whether no value holds NaN or infinity, as far as that is known without waiting for a device."""
    on_host = (v for v in values if v.device.type == "cpu" and v.is_floating_point())
    return all(math.isfinite(v.sum(dtype=torch.float64 if v.dtype == torch.float64 else torch.float32)) for v in on_host)


def _structure(graph: fx.GraphModule) -> tuple[Hashable, ...]:
    """What recompilations of one frame for other sizes have in common: the operations that do work and the slots between them,
    in order, with the dtypes of what is kept.
    """
    found: list[Hashable] = []
    for n in graph.graph.nodes:
        if is_work(n):
            found.append(str(n.target))
        elif n.op == "call_function" and n.target in (dialect.cache_guard, dialect.observe, dialect.probe):
            value = n.args[0].meta.get("val")
            found.append((str(n.args[1]), getattr(value, "dtype", None)))
    return tuple(found)


def _runs(positions: Sequence[int]) -> list[slice]:
    """Ascending positions as slices."""
    runs: list[slice] = []
    for i in positions:
        if runs and runs[-1].stop == i:
            runs[-1] = slice(runs[-1].start, i + 1)
        else:
            runs.append(slice(i, i + 1))
    return runs


_kinds: dict[Hashable, int] = {}  # a small number for each, because it is hashed at every call


def _constants(graph: fx.GraphModule) -> tuple[float, ...]:
    """The floats that stand in the graph, in order: settings of the model that Dynamo takes for constant, as the scale of an adapter."""
    return tuple(
        a for n in graph.graph.nodes if n.op == "call_function" for a in (*n.args, *n.kwargs.values()) if isinstance(a, float)
    )
