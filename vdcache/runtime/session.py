"""The state of one generation after another for one model: what is cached, which call this is, and what it reuses."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vdcache.errors import CacheStateError, ConfigError
from vdcache.policies.base import Policy
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.policies.weights import WeightRule
from vdcache.runtime.agreement import Agreement, SessionRanks
from vdcache.runtime.call import CallContext, CallKey, CompiledGraph, Listener, ProbeResult, Recorder, VariantInputs
from vdcache.runtime.call_placement import CallPlacement
from vdcache.runtime.computed_steps import ComputedSteps
from vdcache.runtime.device_time import DeviceTime
from vdcache.runtime.forward_watch import ForwardWatch
from vdcache.runtime.history import History, Record, tell
from vdcache.runtime.invariants import InvariantTables
from vdcache.runtime.lane_pair import LanePair
from vdcache.runtime.read import DeviceReads
from vdcache.runtime.run_times import RunTimes
from vdcache.runtime.session_warnings import SessionWarnings
from vdcache.runtime.step_lanes import StepLanes
from vdcache.runtime.step_metrics import PendingSums
from vdcache.runtime.step_planner import StepPlanner
from vdcache.runtime.store import Store
from vdcache.runtime.summary import summary_table
from vdcache.runtime.weights_token import WeightsToken
from vdcache.util.checks import step_count
from vdcache.util.checks import timestep as checked_timestep
from vdcache.util.slots import group_of

__all__ = ["Session"]

Look = Callable[[Sequence[Any], "list[Tensor] | None"], ProbeResult]

NOTHING_STORED = "nothing is stored for this lane"
SEVERAL_LATENTS = "this step had several latents of one conditioning"


class _Turn:
    """One thread at a time is in the middle of a call; another one gets a session of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.thread: int | None = None  # that is in the middle of a call
        self.own = threading.local()  # `session`: the calling thread's own, where it has one
        self.others: weakref.WeakSet[Session] = weakref.WeakSet()  # of all threads

    def take(self) -> bool:
        if not self._lock.acquire(blocking=False):
            return False
        self.thread = threading.get_ident()
        return True

    def give(self) -> None:
        self.thread = None
        self._lock.release()


class Session:
    """Drives the caching of one model.

    By default the session infers generations, steps and lanes from the model's inputs. The methods `begin`, `step` and `lane` set them
    explicitly, and take precedence. A cached value belongs to the weights, the
    conditioning (`lane_table`), the shapes and the lane's name, never to the order of calls.

    Args:
        policy: when to recompute.
        num_steps: denoising steps of a generation (model evaluations, for solvers of higher order); None to learn it from the
            first generation, which is then computed in full.
        name: of the recipe, for messages.
        prepare: returns the policy for a number of steps, if the policy depends on it.

    After every call of the model each of the `listeners` receives the call's last record, the values that its graphs emitted, in the order in
    which they ran, and the model's output. A `recorder` receives every graph that ran, its inputs and outputs, its cached, observed and
    probed values by name, and its record.
    """

    def __init__(
        self,
        policy: Policy,
        num_steps: int | None = None,
        name: str = "always",
        prepare: Callable[[int], Policy] | None = None,
    ) -> None:
        if num_steps is not None:  # a policy that cannot be run is an error now, not in the middle of a run
            num_steps = step_count(num_steps)
            (prepare(num_steps) if prepare is not None else policy).start(num_steps)
        self.name = name
        self.history = History()
        self.rule: WeightRule | None = None  # of what is predicted, in the place of the recipe's
        self.listeners: list[Listener] = []
        self.recorder: Recorder | None = None
        self.ranks = SessionRanks(name)
        self._reads, self._notices = DeviceReads(), SessionWarnings(name)
        self._planner = StepPlanner(policy, num_steps, prepare, self._notices, self._reads, self.ranks)
        self._forward = ForwardWatch()
        self._lanes = StepLanes(self._planner, self._forward, self._reads)
        self._placement = CallPlacement(self._planner, self._lanes, self._forward, self._notices, self._reads, self.ranks)
        self.store = Store()
        self._computed = ComputedSteps(self.store)
        self._weights = WeightsToken()
        self._pair = LanePair(self._reads, self._notices)
        self.invariants = InvariantTables(self._reads)
        self.times = RunTimes()
        self._turn = _Turn()

    def __repr__(self) -> str:
        done = self.history.computed_steps() if len(self.history) else []
        steps = f"{self.num_steps} steps" if self.num_steps else "steps not known yet"
        return f"<Session {self.name}, {steps}, {self._planner.generation + 1} generations, {len(done)} steps computed in the last>"

    @property
    def policy(self) -> Policy:
        """When to recompute."""
        return self._planner.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._planner.policy, self.rule = policy, None

    @property
    def num_steps(self) -> int | None:
        """Denoising steps of a generation; None while nobody knows."""
        return self._planner.length.steps

    @num_steps.setter
    def num_steps(self, num_steps: int | None) -> None:
        self._planner.announce(None if num_steps is None else step_count(num_steps))

    @property
    def prepare(self) -> Callable[[int], Policy] | None:
        """The policy for a number of steps, where it differs with them."""
        return self._planner.prepare

    @prepare.setter
    def prepare(self, prepare: Callable[[int], Policy] | None) -> None:
        self._planner.prepare = prepare

    # ---- what the user may say -------------------------------------------------------------------------------------

    def begin(self, num_steps: int | None = None) -> None:
        """A new generation starts: forget every cached value.

        Args:
            num_steps: how many steps it will have, where this is known now.

        Raises:
            ConfigError: no number of steps, or one that the recipe is not for.
        """
        if num_steps is not None:
            self._planner.announce(step_count(num_steps))
        self._begin_generation(said_by_caller=True)
        self._placement.begin()

    def step(self, timestep: float | Tensor | None = None) -> None:
        """The next calls belong to the next denoising step.

        The plan of the step is chosen here, so this may wait for a measurement of the step before. The calls that follow do
        not wait.

        Args:
            timestep: of this step, in the model's units, for the history and for policies that depend on the noise level. A tensor of one value
                is read, which waits for its device.

        Raises:
            CacheStateError: no generation was begun.
            ConfigError: `timestep` is not a number.
        """
        at = None if timestep is None else checked_timestep(timestep)
        if not self._placement.said.step():
            raise CacheStateError("session.step() says that a step of a generation starts; call session.begin() first")
        self._planner.timestep = at
        self._begin_step()

    def freeze(self) -> None:
        """From now on `vdcache-auto` follows what it has found, and searches no further, so that outputs do not change any more. What no
        schedule is known for is computed in full. Other recipes never change."""
        for one in (self, *self._turn.others):
            if (freeze := getattr(one.recorder, "freeze", None)) is not None:
                freeze()

    def end(self) -> None:
        """The generation is over, also where it was cut short: free what it kept. The next call begins another one."""
        self._forget()
        self._placement.begin(by_caller=False)

    def lane(self, name: int | str) -> None:
        """The next call belongs to this lane of the step, for example "cond" or "uncond".

        Raises:
            ConfigError: neither a name nor a number.
        """
        if not isinstance(name, (int, str)):
            raise ConfigError(f"session.lane(name) takes a name or a number, as 'cond' and 'uncond'; got {name!r}")
        self._placement.said.lane = name

    def moves(self, value: Tensor, name: Hashable) -> None:
        """`value`, an input of the next calls of this step, depends on the timestep: that it is another one at every step is no
        change of the conditioning.

        Args:
            name: what it is, the same at every step.
        """
        self._forward.moves(value, name)

    def reset(self) -> None:
        """Forget every cached value, the policy's state and what was learnt; the history stays."""
        self.rule = None
        self._planner.forget()
        self._placement.forget()
        self.invariants.clear()
        self.begin()

    def summary(self, generation: int = -1) -> Any:
        """A rich table of one generation, the last one by default: print it with `rich.print`."""
        return summary_table(self, generation)

    @property
    def step_index(self) -> int:
        """The current step, −1 before the first."""
        return self._planner.step

    @property
    def calibration(self) -> Any:
        """What `vdcache-auto` found for this model and follows, a `Calibration`; None before, and under other recipes."""
        return getattr(self.recorder, "calibration", None)

    @property
    def graphs(self) -> tuple[CompiledGraph, ...]:
        """The graphs that have run under this session."""
        return tuple(self._forward.graphs)

    def warm_up(self) -> None:
        """Compile every variant of every graph that has run so far, so that no later generation waits for a compiler.

        Without it a graph's first call in a generation compiles what the later steps may reuse, so that no step after the first one waits.
        """
        for graph in self._forward.graphs:
            graph.warm_up()

    def watch(self, run: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one call of the model, and say once if it went past every graph of vdcache although earlier ones did not."""
        forward = self._forward
        before = forward.entered
        forward.begin(args, kwargs)
        began = self.times.begin()
        try:
            result = run(*args, **kwargs)
        except BaseException as error:
            self.failed()
            if isinstance(error, Exception) and (cause := self.ranks.explain(error)) is not None:
                raise cause from error
            raise
        finally:
            forward.end()
            self.times.end(began, self._planner.generation)
        forward.returned(result)
        for listen in self.listeners if forward.entered > before else ():
            listen(self.history[-1], tuple(forward.emitted), result)
        if before and forward.entered == before:
            self._notices.outside()
        return result

    def claim(self, make: Callable[[], Session]) -> tuple[Session, bool]:
        """This session for one call; where another thread is in the middle of a call, a session of the calling thread's own.

        Threads that take turns share the session.

        Args:
            make: makes that session.

        Returns the session, and whether to `release` it after the call: False inside another call of the same thread.
        """
        own: Session = getattr(self._turn.own, "session", self)
        if own._turn.thread == threading.get_ident():
            return own, False
        if own._turn.take():
            return own, True
        own = self._turn.own.session = make()
        self._turn.others.add(own)
        if getattr(self.recorder, "frozen", False):
            own.recorder.freeze(self.recorder)  # type: ignore[union-attr]
        self._notices.threads()
        return own.claim(make)

    def release(self) -> None:
        """The call that claimed the session is over."""
        self._turn.give()

    def failed(self) -> None:
        """A call raised: what it was to compute is not there, so nothing older counts for it."""
        self._computed.drop_values()

    def forget(self, keys: Iterable[CallKey]) -> None:
        """What some calls keep: it is kept otherwise from here on, so the next of each is computed."""
        for key in keys:
            self._computed.drop(key)

    def emit(self, graph: CompiledGraph, values: dict[str, Tensor]) -> None:
        """A graph hands out what it emits; the listeners are given it when the model has returned."""
        if self.listeners:
            self._forward.emitted.append((graph, values))

    def follow(self, policy: Policy, rule: WeightRule | None = None) -> None:
        """From the next step on, this policy decides.

        Args:
            rule: of what is predicted, for at most as many values as the recipe's own predictor keeps; None for the recipe's own.

        Raises:
            ConfigError: it is not for this number of steps, or the rule is none.
        """
        if rule is not None and not isinstance(rule, WeightRule):
            raise ConfigError(f"rule is a vdcache.predictors.WeightRule, as vdcache.predictors.Taylor(1); got {rule!r}")
        self._planner.follow(policy)
        self.rule = rule

    def follows(self, graph: CompiledGraph) -> bool:
        """Whether a graph runs when the step is known; else it is computed whatever the plan."""
        return self._placement.follows(graph)

    def adopt(self, graph: CompiledGraph, agreement: Agreement | None = None) -> None:
        """A graph joins at its first run, not when it is compiled.

        Args:
            agreement: of the ranks that run it together.
        """
        self._forward.graphs.setdefault(graph, -1)
        if agreement is not None:
            self.ranks.join(agreement)

    # ---- what happens around a call --------------------------------------------------------------------------------

    def enter(
        self,
        graph: CompiledGraph,
        inputs: Sequence[Any],
        look: Look = lambda inputs, previous: ProbeResult(),
    ) -> CallContext:
        """Place a call in the run and say what it reuses.

        Args:
            look: runs the graph's head, given the inputs and the previous values of its probes; called once, where the graph has probes.
        """
        began, on_device = time.perf_counter(), DeviceTime.of(inputs, graph.inputs.on_device)
        planner, store = self._planner, self.store
        self._reads.syncs = 0
        call = self._identify(graph, inputs)
        call.began, call.device_time = began, on_device
        key, step = call.key, planner.step
        again = call.again = self._computed.at(key, step)
        if graph.probes:
            call.look = self._look_at_probes(call, inputs, look)
        self._choose(graph, inputs, call)
        if self.ranks.has_others:
            self._agree(graph, call)
        needs = call.needs
        if needs.before:
            call.before = store.get(key, needs.before)
        if needs.layouts:
            call.previous = store.get(key, [layout.name for layout in needs.layouts])
        if not call.plan.reuse and not again and call.rows is None:
            # What the step replaces is freed before it runs, when memory is needed most, but for what it compares with.
            compared = {*needs.before, *(layout.name for layout in needs.layouts), *(p.layout.name for p in graph.probes)}
            store.drop(key, but=compared)
        call.record = Record(
            generation=planner.generation,
            step=step,
            lane=self._lanes.lane,
            timestep=planner.timestep,
            plan=planner.now.plan if call.follows else RECOMPUTE,
            reused=needs.slots,
            why=call.why,
            syncs=self._reads.syncs,
            probe=planner.now.probe or (),
        )
        if needs.numbers:
            call.numbers = self._numbers(call.needs, key)
        if (graphs := self._forward.graphs).get(graph) != planner.turn:
            graphs[graph], call.to_come = planner.turn, planner.to_come
            call.is_first = self.times.compiles = True
        call.keep = call.follows and planner.length.steps is not None and not planner.is_last and not again
        return call

    def _numbers(self, needs: VariantInputs, key: CallKey) -> list[Tensor]:
        """What the predictors of a variant are told of the step."""
        planner, found = self._planner, list[Tensor]()
        at = planner.position
        for group, told in needs.numbers:
            steps = self._computed.steps(key, group)
            if at.timestep is not None and any(p.timestep is None for p in steps):  # computed before the policy was followed
                steps = [planner.placed(p) for p in steps]
            found += [torch.tensor(n, dtype=torch.float32) for n in told.values(at, steps, self.rule)]
        return found

    def _identify(self, graph: CompiledGraph, inputs: Sequence[Any]) -> CallContext:
        """Which call is this, and what do its cached values belong to?"""
        planner, lanes, forward = self._planner, self._lanes, self._forward
        forward.entered += 1
        # One graph may serve several blocks (regional compilation) or be called again with the same weights. Within a forward they
        # are told apart by their order, because offloading puts other objects in the place of weights.
        watched = forward.ran is not None
        who = (graph.kind, 0 if watched or not graph.inputs.static else id(inputs[graph.inputs.static[0]]))
        follows = self._place(graph, inputs, who)
        if forward.ran is not None:
            forward.ran += 1
        number = lanes.next_call(who)
        own, new = lanes.take_placed() or self._placement.own_lane(graph, who, inputs, number)
        lane = lanes.key(own, follows)
        repeated = lanes.repeats(graph, who, number, lane, inputs) or self._placement.repeated
        weights, changed = self._weights.check(graph, graph.kind, graph.weights(inputs), (planner.generation, planner.step))
        if changed:
            self._computed.drop_values()
            self.invariants.clear()
        key = self._computed.key(who, number, lane, weights, (graph.content, *_forms(inputs, graph.inputs.activations)))
        if getattr(graph, "holds", False):
            self.invariants.place(key, follows, planner.generation, self._weights.current)
        if repeated:
            self._computed.had_several_latents(lane, planner.step)
            self._computed.drop(key)  # of the other latent
            if follows and planner.step > 0 and planner.skips and planner.length.steps is not None:
                self._notices.several_latents()
        return CallContext(graph, key, follows, new, repeated, changed)

    def _look_at_probes(self, call: CallContext, inputs: Sequence[Any], look: Look) -> ProbeResult:
        """Run the head of a graph, and let the policy decide by it where it has not decided yet."""
        earlier = self.store.get(call.key, [p.layout.name for p in call.graph.probes])
        seen = look(inputs, earlier)
        if call.follows and self._planner.now.undecided:
            self._planner.decide(call.graph, seen, comparable=earlier is not None)
        return seen

    def _agree(self, graph: CompiledGraph, call: CallContext) -> None:
        """Compute what not all ranks that run the model together would reuse."""
        reason = self.ranks.apart
        if not reason and getattr(graph, "slots", True):
            reason = self.ranks.same_plan(sorted(call.plan.reuse), graph.collectives(call.plan), call.why)
        if reason:
            call.plan, call.reads, call.rows, call.why, call.needs = RECOMPUTE, (), None, reason, graph.needs(RECOMPUTE)

    def _choose(self, graph: CompiledGraph, inputs: Sequence[Any], call: CallContext) -> None:
        """What a call could reuse of the step's plan, and why not more."""
        if (scope := graph.lanes) is not None:
            call.pair = self._pair.first(scope, call.key.graph, call.key.call)
        plan = self._planned(graph, inputs, call)
        call.needs = needs = graph.needs(plan)
        if not plan.reuse:
            return
        found = self.store.get(call.key, needs.reads)
        if why := self._why_computed(call, plan, found is not None):
            call.why, call.needs = why, graph.needs(RECOMPUTE)
        elif found is not None:
            call.plan, call.reads = plan, found

    def _planned(self, graph: CompiledGraph, inputs: Sequence[Any], call: CallContext) -> Plan:
        """What the step's plan says of a call of this graph."""
        now, scope = self._planner.now, graph.lanes
        if not call.follows or now.undecided:
            call.why = "it runs before the policy can decide" if call.follows else "the graph runs before the step is known"
            return RECOMPUTE
        plan, call.why = graph.narrow(now.plan), now.why
        if scope is not None and scope.group in plan.reuse:
            if (reason := self._pair.why_not(scope, call, inputs)) is not None:
                plan, call.why = Plan(plan.reuse - {scope.group}), reason
            elif scope.mode == "batch":
                call.rows = scope.rows
        if now.plan.reuse and not plan.reuse:
            call.why = "the graph has nothing to reuse"
        return plan

    def _why_computed(self, call: CallContext, plan: Plan, is_stored: bool) -> str:
        """Why nothing of a plan can be reused in a call; "" where it can."""
        if call.weights_changed:
            return "the weights changed"
        if self._placement.rising:
            return "which way the timesteps run is not known yet"
        if call.is_repeated or (is_stored and self._computed.is_ambiguous(call.key, plan)):
            return SEVERAL_LATENTS
        if not is_stored:
            return "its conditioning is new" if call.is_new else NOTHING_STORED
        return "this lane sat out the last computed step" if self._computed.is_stale(call.key, plan, self._planner.step) else ""

    def leave(
        self,
        call: CallContext,
        inputs: Sequence[Any],
        results: Sequence[Any],
        saved: dict[str, Tensor],
        observed: dict[str, Tensor],
        sums: Tensor | None,
    ) -> None:
        """Keep what a call computed for later steps."""
        planner, key, graph = self._planner, call.key, call.graph
        is_last = planner.is_last
        if graph.lanes is not None:
            self._pair.returned(graph.lanes, call, inputs, results)
        self._forward.made(graph, key, results)
        self._keep(call, inputs, results, saved, observed)
        if is_last:  # nothing will read this lane again
            self._computed.drop(key)
        if sums is not None and call.keep:
            elements = tuple(v.numel() for v in observed.values())
            planner.metrics.observe(PendingSums(sums, call.needs.layouts, elements, call.previous is not None))
        spent = time.perf_counter() - call.began
        call.record.timed(call.device_time, spent)
        self.times.inside += spent
        if call.device_time is not None:
            call.device_time.stop()
            self.times.running.add(call.record)
        self.history.add(call.record)
        tell(call.record)
        planner.ran(call.record)
        graphs = self._forward.graphs
        if is_last and not planner.reused and planner.skips and any(getattr(g, "slots", True) for g in graphs):
            unobserved = dict.fromkeys(why for g in graphs for why in g.unobserved)
            self._notices.nothing_reused(planner.length.steps, self.history.generation(), tuple(unobserved))

    def _keep(
        self,
        call: CallContext,
        inputs: Sequence[Any],
        results: Sequence[Any],
        saved: dict[str, Tensor],
        observed: dict[str, Tensor],
    ) -> None:
        """Store what a call computed, and drop what it has replaced."""
        planner, key, graph = self._planner, call.key, call.graph
        if call.keep:
            fits = True
            if saved or observed or graph.probes:
                kept = {**saved, **observed, **_probed(call)}
                fits = self.store.put(key, list(kept), list(kept.values()), [*inputs, *results], call.rows)
            if not fits:
                self._computed.drop(key)
            elif call.rows is not None and graph.goes_by_steps(call.needs.computes):
                # One half is of this step now and the other is not, and a predictor takes one place for both.
                self._computed.drop(key)
            elif call.needs.computes:
                self._computed.computed(key, call.needs.computes, planner.position, planner.now.plan)
        elif not call.again and (not call.plan or call.needs.computes):
            self._computed.drop(key)

    def _place(self, graph: CompiledGraph, inputs: Sequence[Any], who: Hashable) -> bool:
        """Where a call stands; what begins with it begins. False for a graph that runs before the step is known."""
        placed = self._placement.place(graph, inputs, who)
        if isinstance(placed, bool):
            return placed
        if self._placement.starts_generation(placed):
            self._begin_generation(mixed=placed.tick.mixed)
        if placed.tick.new_step:
            self._begin_step()
        self._placement.settle(placed)
        return True

    # ---- steps and generations -----------------------------------------------------------------------------------------

    def _begin_generation(self, *, said_by_caller: bool = False, mixed: bool = False) -> None:
        """Args: `mixed` where parts of a batch go on, so that nobody knows how long a generation is."""
        self._forget()
        self._planner.begin_generation(said_by_caller=said_by_caller, mixed=mixed)

    def _begin_step(self) -> None:
        computed = self._planner.begin_step()
        self.ranks.place = self._planner.generation, self._planner.step
        if computed and (gone := self._lanes.gone()):
            # A lane that sat out a computed step would be computed if it came back: let go of it.
            self._computed.drop_lanes(gone)
        self._pair.begin_step()
        self._forward.step_begins()
        self._placement.begin_step()
        self._lanes.begin_step()

    def _forget(self) -> None:
        """Nothing of a generation that is over."""
        self._computed.clear()
        self._lanes.begin_generation()
        self._pair.begin_generation()


def _probed(call: CallContext) -> dict[str, Tensor]:
    """What was probed and counts for later steps, by name."""
    return {
        probe.layout.name: value
        for probe, value in zip(call.graph.probes, call.look.values, strict=True)
        if probe.reference_step == "step" or group_of(probe.layout.name) not in call.plan.reuse
    }


def _forms(inputs: Sequence[Any], positions: Sequence[int]) -> tuple[Hashable, ...]:
    """Shape, dtype and device of the tensors at these positions: values never cross any of them.

    Sizes that a graph for many sizes takes as numbers say nothing more, and a graph for one size does not take them.
    """
    return tuple([(v.shape, v.dtype, v.device) for i in positions if isinstance(v := inputs[i], Tensor)])
