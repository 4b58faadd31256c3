"""One captured graph with all its variants: what runs where the user's frame ran."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vdcache.backends.eager import run_eagerly
from vdcache.backends.inductor import Compiled, Context, compile_now, no_autocast
from vdcache.backends.settings import Settings
from vdcache.ir import dialect
from vdcache.ir.capture import Captured
from vdcache.ir.dialect import group_of
from vdcache.ir.edit import copy_graph
from vdcache.ir.edit import inputs as graph_inputs
from vdcache.ir.errors import ConfigError
from vdcache.ir.sizes import Bindings
from vdcache.passes import DeadCode, Pipeline, Refusal, Specialise, Step, VariantIO, variant_io
from vdcache.passes.canonicalise import Canonicalise
from vdcache.patterns import Anatomy, anatomy
from vdcache.runtime import registry
from vdcache.runtime.measures import Layout
from vdcache.runtime.plan import RECOMPUTE, Plan
from vdcache.runtime.session import Needs

__all__ = ["Program"]


class Program:
    """A graph that chooses its variant at every call.

    Holds no state of any model: Dynamo runs one program for all instances of a class, so the session is looked up each time.

    Args:
        captured: the graph as it came in.
        settings: recipe and compiler.
        frame: identity of the user's frame, and whether this graph goes on where another one left off.
    """

    def __init__(self, captured: Captured, settings: Settings, frame: Hashable = None, resumes: bool = False) -> None:
        self.settings, self.family, self._resumes = settings, frame, resumes
        self._captured = captured
        pipeline = settings.recipe.pipeline
        self.guarded, self.steps = self._guard(pipeline)
        self.anatomy: Anatomy = anatomy(self.guarded)
        self.slots = tuple(str(n.args[1]) for n in dialect.guards(self.guarded.graph))
        self.emits = tuple(str(n.args[1]) for n in dialect.emissions(self.guarded.graph))
        self._groups = frozenset(map(group_of, self.slots))
        self.plans = tuple(dict.fromkeys(self.narrow(p) for p in settings.recipe.policy.plans()))

        given = graph_inputs(captured.graph.graph)
        names = [n.name for n in given]
        self._fakes = [n.meta.get("val") for n in given]
        self._bindings = Bindings(self._fakes)
        self.clocks = tuple(names.index(c) for c in self.anatomy.clocks)
        self.latent = names.index(self.anatomy.latent) if self.anatomy.latent else None
        self.static = tuple(sorted(captured.signature.static))
        self.activations = tuple(i for i in range(len(names)) if i not in captured.signature.static)
        self._context = Context()
        self._graphs: dict[Plan, tuple[fx.GraphModule, VariantIO]] = {}
        if self.slots and not any(self.plans) and (wanted := {g for p in settings.recipe.policy.plans() for g in p.reuse}):
            raise ConfigError(
                f"the recipe '{settings.recipe.name}' never reuses what it guards: its policy reuses {', '.join(sorted(wanted))}, its slots "
                f"belong to {', '.join(sorted(self._groups))}; give both the same group"
            )
        self._needs_of: dict[Plan, Needs] = {}
        self._compiled: dict[tuple[Plan, Hashable], Compiled] = {}
        self._by_size: set[Plan] = set()  # plans whose variant is good for one size only
        self._needed = self._read_by_some_plan()
        self._io = self._specialised(RECOMPUTE)[1]
        self._frames: dict[str, Any] = {str(n.args[1]): n.args[4] for n in dialect.observations(self.guarded.graph)}

    # ---- what there is -------------------------------------------------------------------------------------------

    def _guard(self, pipeline: Pipeline) -> tuple[fx.GraphModule, tuple[Step, ...]]:
        """The guarded graph. What the recipe's scope does not find in this graph is left out."""
        graph, first = Pipeline((Canonicalise(),)).run(self._captured.graph)
        if not anatomy(graph).branches:
            return graph, first
        rest = pipeline.passes[1:]
        given = frozenset().union(*(p.ensures for p in pipeline.passes[:1]), pipeline.given)
        guarded, later = Pipeline(rest, given=given).run(graph, copied=True)
        return guarded, (*first, *later)

    def narrow(self, plan: Plan) -> Plan:
        """What of a plan concerns this graph: groups without a slot in it make no variant of their own."""
        return Plan(plan.reuse & self._groups)

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
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(r for step in self.steps for r in step.refusals)

    def cache_bytes(self) -> int | None:
        """Bytes kept for one lane, known before the first run; None where sizes are symbols."""
        values = self._kept_values()
        if any(isinstance(s, torch.SymInt) for v in values for s in v.shape):
            return None
        return sum(v.numel() * v.element_size() for v in values)

    def _kept_values(self) -> list[Tensor]:
        kept: dict[str, Tensor] = {}
        for plan in self.plans:
            io = self._specialised(plan)[1]
            kept.update(zip(io.reads, io.read_values, strict=True))
        return [*kept.values(), *self._io.previous_values]

    def needs(self, plan: Plan) -> Needs:
        """What the plan's variant takes besides the model's inputs."""
        if plan not in self._needs_of:
            io = self._specialised(plan)[1]
            layouts = tuple(Layout(slot, d, strides, self._frames[slot]) for slot, d, strides in io.measures)
            self._needs_of[plan] = Needs(io.reads, io.before, layouts, io.times, tuple(self._groups - plan.reuse), io.reused)
        return self._needs_of[plan]

    def variant_graph(self, plan: Plan) -> fx.GraphModule:
        """The graph that runs under a plan; not to be changed."""
        return self._specialised(plan)[0]

    def _specialised(self, plan: Plan) -> tuple[fx.GraphModule, VariantIO]:
        if plan not in self._graphs:
            keeps = bool(self.slots) and len(self.plans) > 1
            self._graphs[plan] = self._specialise(plan, "needed" if keeps else "none", self._needed if keeps else ())
        return self._graphs[plan]

    def _specialise(self, plan: Plan, save: str, slots: tuple[str, ...] = ()) -> tuple[fx.GraphModule, VariantIO]:
        specialise = Specialise(reuse=plan.reuse, save=save, slots=slots, predictor=self.settings.recipe.predictor)
        given = frozenset().union(*(p.ensures for p in self.settings.recipe.pipeline), Pipeline(()).given)
        given |= Specialise.requires
        graph, _ = Pipeline((specialise, DeadCode()), given=given).run(self.guarded)
        return graph, variant_io(graph)

    # ---- compiling -----------------------------------------------------------------------------------------------

    def compile_first(self, example_inputs: Sequence[Any]) -> None:
        """Compile the variant that every run begins with, inside the backend call."""
        graph, io = self._specialised(RECOMPUTE)
        self._compiled[RECOMPUTE, ()] = self._compile(graph, [*example_inputs, *io.added_values])

    def warm_up(self) -> None:
        """Compile every variant that can be compiled without knowing more sizes."""
        for plan in self.plans:
            self._variant(plan, None)

    def _compile(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        if self.settings.inner == "eager":
            return run_eagerly(graph)
        # Inductor takes possession of what it compiles; the saved graph must stay for other sizes.
        with no_autocast():
            return compile_now(copy_graph(graph), inputs, dict(self.settings.inductor))

    def _variant(self, plan: Plan, inputs: Sequence[Any] | None) -> Compiled:
        """The compiled variant of a plan; compiled now if this is its first call."""
        size: Hashable = self._bindings.sizes(inputs) if plan in self._by_size and inputs is not None else ()
        if (found := self._compiled.get((plan, size))) is not None:
            return found
        graph, io = self._specialised(plan)
        extra = io.added_values
        if size:
            found = self._for_one_size(graph, inputs or (), extra)
        else:
            before = self._context.guards()
            with self._context.again():
                found = self._compile(graph, [*self._fakes, *extra])
            if self._context.guards() > before:
                # A guard that Dynamo will never check: this variant is only good for sizes that it was made for.
                self._by_size.add(plan)
                return self._variant(plan, inputs) if inputs is not None else found
        self._compiled[plan, size] = found
        return found

    def _for_one_size(self, graph: fx.GraphModule, inputs: Sequence[Any], extra: Sequence[Tensor]) -> Compiled:
        examples = [torch.empty(self._bindings.shape(v, inputs), dtype=v.dtype, device=v.device) for v in extra]
        with torch.inference_mode(False), torch.no_grad():
            return self._compile(graph, [*inputs, *examples])

    # ---- running -------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        session = registry.find(
            inputs, self.static, drives=bool(self.clocks), resumes=self._resumes, make=self.settings.new_session
        )
        if session is None:
            return self._alone(inputs)
        session.adopt(self)
        ticket = session.enter(self, inputs)
        plan = ticket.plan
        asked = time.perf_counter()
        run = self._variant(plan, inputs)
        ticket.began += time.perf_counter() - asked  # making a variant is not what a step takes
        io = self._specialised(plan)[1]
        before = self._zeros(io.before_values, inputs) if ticket.before is None else ticket.before
        previous = self._zeros(io.previous_values, inputs) if ticket.previous is None else ticket.previous
        with no_autocast():
            outputs = run(*inputs, *ticket.reads, *before, *previous, *ticket.times)
        results, rest = outputs[: self._results], outputs[self._results :]
        saved = dict(zip(io.saves, rest, strict=False))
        observed = dict(zip(io.previous, rest[len(io.saves) :], strict=False))
        if io.emits:
            session.emit(self, dict(zip(io.emits, rest[len(io.saves) + len(io.previous) :], strict=False)))
        session.leave(ticket, inputs, results, saved, observed, rest[-1] if io.measures else None)
        return results

    @property
    def _results(self) -> int:
        return self._captured.signature.results

    def _alone(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run without a session: everything is computed, nothing is kept."""
        self.settings.say_once(
            "no session",
            "vdcache: a graph runs outside any session and is computed in full: no timestep is seen in it. A timestep is a tensor "
            "that reaches a sine or cosine and then a layer (a Python float reaches none: pass a tensor). If the model embeds its time otherwise, or "
            "breaks into several graphs, use model = vdcache.compile(model); model.vdcache.begin(steps) and .step() then say the step.",
        )
        zeros = self._zeros(self._io.added_values, inputs)
        with no_autocast():
            return self._variant(RECOMPUTE, inputs)(*inputs, *zeros)[: self._results]

    def _zeros(self, values: Sequence[Tensor], inputs: Sequence[Any]) -> list[Tensor]:
        return [torch.zeros(self._bindings.shape(v, inputs), dtype=v.dtype, device=v.device) for v in values]
