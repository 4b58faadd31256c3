"""One captured graph as it runs where the user's frame ran: each call finds its session, its plan and its variant."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vdcache.backends.guarded import GuardedGraph, inputs_of
from vdcache.backends.hoisting import SideGraphs
from vdcache.backends.inductor import no_autocast
from vdcache.backends.memory import CachePlan, cache_plans, chosen_plan, free_bytes
from vdcache.backends.settings import Settings
from vdcache.backends.variants import LazyVariant, PlanVariant, Variants
from vdcache.backends.verdict import Verdict, breaks_since
from vdcache.ir.capture import Captured
from vdcache.passes import Observe, VariantOutputs
from vdcache.passes.predictors import depends_on_steps, predictor_of
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.runtime import registry
from vdcache.runtime.agreement import Agreement
from vdcache.runtime.call import CallContext, CallKey, ProbeResult, VariantInputs
from vdcache.runtime.invariants import InvariantTables
from vdcache.runtime.session import Session
from vdcache.util.sizes import bytes_text
from vdcache.util.slots import group_of

__all__ = ["Program"]

# What compiling a graph costs at least, in times of capturing it: 20 at 2 and 8 blocks of Wan with cold caches, less with more blocks or warm ones.
COMPILING = 4.0
WON = 0.5  # of eager's time, which compiling wins at most
MAKING = 5e-3  # seconds that looking a variant up never takes, and making one always does

_kinds: dict[Hashable, int] = {}  # a small number for each, because it is hashed at every call


class Program:
    """A graph that chooses its variant at every call.

    Holds no state of any model: Dynamo runs one program for all instances of a class, so the session is looked up each time.

    Args:
        captured: the graph as it came in.
        settings: recipe and compiler.
        frame: identity of the user's frame.
        resumes: whether this graph goes on where another one left off.
        verdict: of the model, which knows why its forward is broken.
        agreement: of the ranks that run the model together.
    """

    def __init__(
        self,
        captured: Captured,
        settings: Settings,
        frame: Hashable = None,
        resumes: bool = False,
        verdict: Verdict | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        self.agreement = agreement
        self.settings, self.family, self._resumes, self._verdict = settings, frame, resumes, verdict
        self.guarded = GuardedGraph.made(captured, settings.recipe.pipeline)
        self.inputs = inputs_of(captured, self.guarded.analysis)
        kind = frame, self.guarded.structure, self.guarded.constants
        self.kind: Hashable = _kinds.setdefault(kind, len(_kinds))
        self.content: Hashable = _kinds.setdefault((kind, self.guarded.content), len(_kinds))
        self._keeps: CachePlan | None = None  # which values; as the recipe asks if None
        self._on_lanes = 0  # for how many lanes that was decided
        self.variants = Variants(self.guarded, settings)
        self.side = SideGraphs(self.guarded.module, self.variants.compiler)
        self.holds = bool(self.side.groups)  # values that depend on no latent
        self.capturing = 0.0  # seconds that tracing to here took, where somebody has measured it
        self.slots, self.lanes, head = self.variants.slots, self.variants.lanes, self.variants.head
        self.probes = head.probes if head is not None else ()
        self._fit(1)

    # ---- what a session asks -------------------------------------------------------------------------------------

    def weights(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """The parameters and buffers among the inputs of a call that the model does not write into itself."""
        found: tuple[Tensor, ...] = ()
        for part in self.inputs.weights:
            found += tuple(inputs[part])
        return found

    @property
    def writes_into_itself(self) -> bool:
        """Whether it writes into a parameter or buffer of the model."""
        return any(position in self.inputs.static for _, position in self.guarded.captured.signature.mutations)

    def goes_by_steps(self, groups: Sequence[str]) -> bool:
        """Whether what is predicted for any of these groups depends on the step in which it was computed last."""
        predictor = self.variants.predictor
        return any(depends_on_steps(predictor_of(predictor, group)) for group in groups)

    def narrow(self, plan: Plan) -> Plan:
        """What of a plan concerns this graph."""
        return self.variants.narrow(plan)

    def needs(self, plan: Plan) -> VariantInputs:
        """What the plan's variant takes besides the model's inputs."""
        return self.variants[plan].needs

    def collectives(self, plan: Plan) -> tuple[str, ...]:
        """What the plan's variant exchanges with other ranks, in order."""
        return self.variants[plan].collectives

    def warm_up(self) -> None:
        """Compile every variant that can be compiled without knowing more sizes."""
        self.variants.warm_up()
        for part in self.variants.parts(self.variants.plans):
            self.side.each(part.held, LazyVariant.warm_up)

    def compile_first(self, inputs: Sequence[Any]) -> None:
        """Compile what every run begins with, inside the backend call.

        Args:
            inputs: fake values of the model's.
        """
        given = [*inputs, *self.variants.compiler.pair]
        for part in self.variants.parts((RECOMPUTE,)):
            part.compile_now([*given, *part.carried])
            self.side.each(part.held, lambda graph: graph.compile_now(given))

    @property
    def unobserved(self) -> tuple[str, ...]:
        """Why what the recipe observes is not in this graph."""
        silent = (s for s in self.guarded.steps if s.text.partition("{")[0] == Observe.name and not s.rewrites)
        return tuple(f"{s.text} found nothing, {reason}" for s in silent for r in s.refusals for reason in r.reasons)

    @property
    def broken(self) -> str:
        """Why Dynamo broke the forward that this graph is part of, in sentences; "" where nothing is known."""
        advice = "Remove the break, or say where each step begins with session.begin() and session.step()."
        return self._verdict.because(advice) if self._verdict is not None else ""

    @property
    def masks(self) -> str:
        """In words: the masks on attentions, what they leave, and how they are computed."""
        if not (masked := self.guarded.masked):
            return ""
        density = sum(on.density for _, on in masked) / len(masked)
        names = ", ".join(dict.fromkeys(str(on.mask) for _, on in masked))
        found = [c for c in self.variants.compiler.choices.values() if c.seconds]
        how = ""
        if found:
            speed = sum(c.speedup for c in found) / len(found)
            how = f" by {', '.join(dict.fromkeys(c.lowering for c in found))}, {speed:.2f}× as fast as dense attention"
        return f"{len(masked)} attentions under masks ({names}): {density:.0%} of the weights{how}"

    @property
    def apart(self) -> str:
        """In words: why blocks that are equal are compiled one by one; "" where they are not."""
        why = self.variants.compiler.apart
        return f"blocks that are equal are compiled one by one: {why} (outline=True compiles them once)" if why else ""

    # ---- running -------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        session = registry.find(
            inputs, self.inputs.static, drives=bool(self.inputs.timesteps), resumes=self._resumes, owner=self.settings
        )
        if session is None:
            return self._alone(inputs)
        mine, claimed = session.claim(self.settings.new_session)
        try:
            return self._under(mine, inputs)
        except BaseException as error:
            mine.failed()
            if isinstance(error, Exception) and (cause := mine.ranks.explain(error)) is not None:
                raise cause from error
            raise
        finally:
            if claimed:
                mine.release()

    def _under(self, session: Session, inputs: Sequence[Any]) -> Sequence[Any]:
        session.adopt(self, self.agreement)
        if self._keeps is not None and self._keeps.on_host:
            session.store.on_host = True
        if self.settings.on_inputs is not None:
            self.settings.on_inputs(self, inputs)
        compiler, head = self.variants.compiler, self.variants.head
        waited = compiler.waited.seconds
        look = self._look
        if head is not None and head.held:
            look = functools.partial(self._look, tables=session.invariants)
        if session.store.refused or not self._on_lanes:
            self._fit_again(session, inputs)
        call = session.enter(self, inputs, look)
        if call.is_first and compiler.may_compile:
            self._decide(session, call.record.generation)
        variant = self.variants[call.plan]
        plain = call.pair is None and not (compiler.pair or variant.held or call.look.carried)
        given = inputs if plain else self._given(variant, session, call, inputs)
        run = variant.ready(given)
        making = compiler.waited.seconds - waited
        call.began += making  # making a variant is not what a step takes
        if call.device_time is not None and making > MAKING:
            call.device_time.restart()
        io = variant.io
        before = compiler.zeros(io.before_values, inputs) if call.before is None else call.before
        previous = compiler.zeros(io.previous_values, inputs) if call.previous is None else call.previous
        with no_autocast():
            outputs = variant.unpack(run(*given, *call.reads, *before, *previous, *call.numbers))
        self._hand_out(session, call, inputs, outputs)
        if call.to_come:  # while a device is at work on the first step, and not in the middle of the loop
            for plan in call.to_come:
                later = self.variants[self.narrow(plan)]
                later.ready(self._given(later, session, call, inputs))
        return outputs.results

    # ---- memory --------------------------------------------------------------------------------------------------

    def _fit(self, lanes: int, inputs: Sequence[Any] | None = None, budget: int | None = None) -> bool:
        """Decide which values are kept, so that they fit; whether that is another choice than before.

        Args:
            lanes: how many calls of a step keep values.
            inputs: of a call, where sizes are symbols.
            budget: bytes; the user's, or what is free on the device, if not given.
        """
        if budget is None and (budget := self.settings.budget) is None:
            budget = free_bytes(self.variants.fakes)
        if budget is None or not self.slots:
            self._on_lanes = lanes
            return False
        cuda = any(isinstance(v, Tensor) and v.device.type == "cuda" for v in self.variants.fakes)
        plans = cache_plans(self.settings.recipe.predictor, cuda=cuda)
        now = self._keeps or plans[0]
        made = {now: self.variants}

        def variants_of(plan: CachePlan) -> Variants:
            if plan not in made:
                made[plan] = Variants(self.guarded, self.settings, plan, self.variants.compiler)
            return made[plan]

        def bytes_of(plan: CachePlan) -> int | None:
            return variants_of(plan).cache_bytes(inputs)

        if inputs is None and bytes_of(plans[0]) is None:
            return False  # the first call tells the sizes
        self._on_lanes = lanes
        plan, message = chosen_plan(plans, bytes_of, lanes, budget)
        if plan == now:
            return False
        self._keeps, self.variants = plan, variants_of(plan)
        if message:
            self.settings.warn_once(f"memory {plan.name}", f"vdcache: {message}")
        return True

    def _fit_again(self, session: Session, inputs: Sequence[Any]) -> None:
        """Where what the lanes of a step keep did not fit: keep less of each, and nothing of what was kept otherwise."""
        store = session.store
        mine = {key for key in (*store.keys(), *store.refused) if isinstance(key, CallKey) and key.graph[0] == self.kind}  # type: ignore[index]
        lanes, budget = max(1, len(mine)), store.budget
        refused = store.refused & mine
        if lanes <= self._on_lanes and not refused:
            return
        if budget is not None:
            budget = max(0, budget - store.bytes(but=mine))
        if self._fit(lanes, inputs, budget):
            session.forget(mine)
        elif refused:
            self.settings.warn_once(
                "memory refused",
                f"vdcache: the values of {len(refused)} of {lanes} calls of a step do not fit beside the others, so these are computed at every "
                f"step: a step keeps at most {bytes_text(store.budget or 0)}. A larger cache_budget= keeps them",
            )
        store.refused -= mine

    def _decide(self, session: Session, generation: int) -> None:
        """The generation before ran eagerly: compile from here on if that can win back what it costs."""
        if generation < 1 or not (before := session.history.generation(generation - 1)):
            return
        left = (self.settings.generations or 0) - generation
        cost = COMPILING * sum(getattr(graph, "capturing", 0.0) for graph in session.graphs)
        compiles = left * WON * sum(r.seconds for r in before) > cost
        if compiles:
            session.times.ran_eagerly(before)
        for graph in session.graphs:
            if isinstance(graph, Program):
                graph.variants.decide(compiles)
                if compiles:
                    graph.side.forget()

    def _given(self, part: PlanVariant, session: Session, call: CallContext, inputs: Sequence[Any]) -> Sequence[Any]:
        """What a variant is given before what is cached: the model's inputs, the pair, what is held for it, and what the head hands over."""
        compiler = self.variants.compiler
        pair = [call.pair] if call.pair is not None else compiler.zeros(compiler.pair, inputs)
        return (*inputs, *pair, *self.side.values(part.held, inputs, session.invariants), *call.look.carried)

    def _look(
        self, inputs: Sequence[Any], previous: Sequence[Tensor] | None, tables: InvariantTables | None = None
    ) -> ProbeResult:
        """Run the head."""
        head, compiler = self.variants.head, self.variants.compiler
        assert head is not None
        return head.look(
            [*inputs, *compiler.zeros(compiler.pair, inputs), *self.side.values(head.held, inputs, tables)], previous
        )

    def _hand_out(self, session: Session, call: CallContext, inputs: Sequence[Any], outputs: VariantOutputs) -> None:
        """Give the session what a call has made."""
        saved = outputs.saved
        if self.lanes is not None and self.lanes.mode == "calls" and call.pair is None:
            saved = {n: v for n, v in saved.items() if group_of(n) != self.lanes.group}  # there was nothing to compare with
        if outputs.emitted:
            session.emit(self, outputs.emitted)
        # A policy that measured or probed what is no number computes the next step by itself, and says why.
        told = outputs.sums is not None or not _finite(call.look.values)
        if call.keep and saved and not told and not _finite(saved.values()):
            call.keep = False
            self.settings.warn_once(
                "not finite",
                f"vdcache: what the model computed in step {call.record.step} is not a number (NaN or infinite), so nothing of it is reused and the "
                "steps after it are computed until it is one again. Look at the model's input and its weights: nothing was reused in this step.",
            )
        session.leave(call, inputs, outputs.results, saved, outputs.observed, outputs.sums)
        if session.recorder is not None:
            probed = zip((p.layout.name for p in self.probes), call.look.values, strict=False)
            session.recorder(self, inputs, outputs.results, {**saved, **outputs.observed, **dict(probed)}, call.record)

    def _alone(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run without a session: everything is computed, nothing is kept."""
        if self.slots:
            self._say_no_session()
        compiler, head, variant = self.variants.compiler, self.variants.head, self.variants.recompute
        given = [*inputs, *compiler.zeros(compiler.pair, inputs)]
        carried: Sequence[Tensor] = ()
        if head is not None:
            carried = head.look([*given, *self.side.values(head.held, inputs, None)], None).carried
        given += [*self.side.values(variant.held, inputs, None), *carried]
        run = variant.ready(given)
        with no_autocast():
            return variant.unpack(run(*given, *compiler.zeros(variant.added, inputs))).results

    def _say_no_session(self) -> None:
        if broken := next(iter(breaks_since({})), ""):
            broken = f"If it is part of a forward that Dynamo has broken in this process, the reason is: {broken.rstrip('.')}. "
        self.settings.warn_once(
            "no session",
            f"vdcache: a graph runs outside any session and is computed in full: no timestep is seen in it. {broken}A timestep is a tensor "
            "that reaches a sine or cosine and then a layer (a Python float reaches none: pass a tensor). If the model embeds its time otherwise, "
            "breaks into several graphs, or is compiled block by block (compile_repeated_blocks), compile the whole of it, in which vdcache "
            "compiles equal blocks once: model = vdcache.compile(model); model.vdcache.begin(steps) and .step() then say the step.",
        )


def _finite(values: Iterable[Tensor]) -> bool:
    """Whether no value holds NaN or infinity, as far as that is known without waiting for a device."""
    on_host = (v for v in values if v.device.type == "cpu" and v.is_floating_point())
    return all(math.isfinite(v.sum(dtype=torch.float64 if v.dtype == torch.float64 else torch.float32)) for v in on_host)
