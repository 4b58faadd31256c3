"""The state of one generation after another for one model: step tracker, policy state, cached tensors, history."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vdcache.errors import CacheStateError, ConfigError
from vdcache.policies.base import Always, Policy
from vdcache.policies.metrics import MetricSpec, MetricValue, count_of, measured
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.runtime.call import CallContext, CallKey, CompiledGraph, Emitted, LaneScope, Listener, ProbeResult, Recorder
from vdcache.runtime.device_time import DeviceTime
from vdcache.runtime.history import History, Record, tell
from vdcache.runtime.lane_table import LATENT, Lane, LaneQuery, LaneTable, RememberedInput, compare
from vdcache.runtime.read import read
from vdcache.runtime.session_warnings import SessionWarnings
from vdcache.runtime.step_tracker import Reading, StepTracker, Tick
from vdcache.runtime.store import Store
from vdcache.runtime.summary import summary_table
from vdcache.runtime.weights_token import WeightsToken
from vdcache.util.checks import step_count
from vdcache.util.checks import timestep as checked_timestep
from vdcache.util.sizes import updated_by
from vdcache.util.slots import group_of

__all__ = ["Session"]

MOST_MADE = 256  # results of graphs that are remembered
MOST_LENGTHS = 64  # lengths of generations that are remembered
NOTHING_STORED = "nothing is stored for this lane"
SEVERAL_LATENTS = "this step had several latents of one conditioning"


@dataclass
class _Pending:
    """Sums of one call that the policy has not seen yet."""

    sums: Tensor
    layouts: tuple[MetricSpec, ...]
    elements: tuple[int, ...]
    comparable: bool


@dataclass
class Session:
    """Drives the caching of one model.

    Without a word from the caller the session tells generations, steps and lanes from what the model receives. The methods
    `begin`, `step` and `lane` say it outright, and what they say always wins. A cached value belongs to the weights, the
    conditioning (`lane_table`), the shapes and the lane's name, never to the order of calls.

    Args:
        policy: when to recompute.
        num_steps: denoising steps of a generation (model evaluations, for solvers of higher order); None to learn it from the
            first generation, which is then computed in full.
        name: of the recipe, for messages.
        prepare: the policy for a number of steps, where it differs with them.
        listeners: each is given, after every call of the model, the call's last record, what its graphs emitted, in the order
            in which they ran, and what the model returned.
        recorder: is given every graph that ran, its inputs, what it returned, what it kept, observed and probed by name, and its
            record.
    """

    policy: Policy
    num_steps: int | None = None
    name: str = "always"
    prepare: Callable[[int], Policy] | None = None
    history: History = field(default_factory=History)
    store: Store = field(default_factory=Store)
    listeners: list[Listener] = field(default_factory=list)
    recorder: Recorder | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None:  # a policy that cannot be run is an error now, not in the middle of a run
            self.num_steps = step_count(self.num_steps)
            (self.prepare(self.num_steps) if self.prepare is not None else self.policy).start(self.num_steps)
        self._given_steps = self.num_steps
        self._tracker = StepTracker()
        self._notices = SessionWarnings(self.name)
        self._state: Any = None
        self._plan, self._why = RECOMPUTE, ""
        self._undecided = False  # the plan of this step waits for a probe
        self._probe: tuple[MetricValue, ...] | None = None  # what was probed at this step
        self._step, self._generation = -1, -1
        self._hit = False  # something was reused in this generation
        self._lane: int | str = 0
        self._lane_name: int | str | None = None  # what the caller calls it
        self._lane_id = -1  # of the conditioning of the call that began the lane
        self._placed_new = False
        self._placed: Lane | None = None  # the lane of the graph that began this lane, until that graph has taken it
        self._repeated = False  # that graph ran in this step with the same conditioning and another latent
        self._running: deque[Record] = deque()  # calls that a device may still be working on
        self._lock = threading.Lock()
        self._busy: int | None = None  # the thread that is in the middle of a call
        self._of_thread = threading.local()  # `session`: the calling thread's own, where it has one
        self._unsure = False  # the step may be no step: its timestep is that of the one before, with another latent
        self._tables: dict[Hashable, LaneTable] = {}
        self._labels: dict[Hashable, int] = {}  # of each family, how many lanes it has in this generation
        self._shown: set[int] = set()  # numbers of the lanes of this step
        # Of each call of this step: its latents and what moves with the timestep, by position.
        self._seen: dict[Hashable, dict[int, RememberedInput]] = {}
        self._ambiguous: dict[tuple[int | str | None, int, int], int] = {}  # lanes, and the last step of several latents
        # What graphs returned lately, for which conditioning, in which family; and how often a lane had begun by then.
        self._made: dict[int, tuple[weakref.ref[Tensor], Hashable, Hashable, int]] = {}
        self._moving: dict[int, tuple[weakref.ref[Tensor], Hashable]] = {}  # what the caller says moves with the timestep
        self._lanes_begun = 0
        self._weights = WeightsToken()
        self._weights_of: dict[CompiledGraph, tuple[int, int]] = {}  # the step in which the weights of a graph were looked at
        self._token = 0
        self._lengths: dict[tuple[float, ...], int] = {}  # first two timesteps -> steps of the generation that began so
        self._timestep: float | None = None
        self._timesteps: list[float] = []  # of this generation
        self._pending: list[_Pending] = []
        self._step_records: list[Record] = []
        self._ticker: Hashable = None
        self._early: set[Hashable] = set()
        self._graphs: dict[CompiledGraph, None] = {}
        self._entered = 0  # how many calls have come through
        self._driver: Hashable = None  # under explicit control: the call that began the current lane
        self._in_forward: int | None = None  # graphs that ran in this forward of the model; None where nobody watches forwards
        # What this forward was given, by identity; None where nobody watches, or one graph is all.
        self._given: set[int] | None = None
        # Shapes of what the last watched forward of a model in parts returned.
        self._results: list[tuple[int, ...]] | None = None
        self._latents_of: dict[CompiledGraph, tuple[int, ...]] = {}  # what is updated with those
        self._calls: dict[Hashable, int] = {}  # how often each graph ran in the current lane
        self._lanes = 0  # how many lanes the current step has had under explicit control
        self._explicit_step = False  # step() was called in this generation
        self._explicit_lane: int | str | None = None
        self._begun = False  # begin() was called and no step has started since
        self._syncs = 0
        self._emitted: list[Emitted] = []
        self._first_lane: dict[Hashable, RememberedInput] = {}  # what graphs returned in the first lane of this step
        self._same_halves: bool | None = None  # of this generation's batch; None where nobody has looked
        self._computed: dict[CallKey, dict[str, tuple[int, int]]] = {}  # of each lane: group -> last computed step, how many
        self._due: dict[
            tuple[Hashable, int, str], int
        ] = {}  # graph, call and group -> the last step that was planned to compute it

    def __repr__(self) -> str:
        done = self.history.computed_steps() if len(self.history) else []
        steps = f"{self.num_steps} steps" if self.num_steps else "steps not known yet"
        return f"<Session {self.name}, {steps}, {self._generation + 1} generations, {len(done)} steps computed in the last>"

    # ---- what the user may say -------------------------------------------------------------------------------------

    def begin(self, num_steps: int | None = None) -> None:
        """A new generation starts: forget every cached value.

        Args:
            num_steps: how many steps it will have, where this is known now.

        Raises:
            ConfigError: no number of steps, or one that the recipe is not for.
        """
        if num_steps is not None:
            self.num_steps = self._given_steps = step_count(num_steps)
        self._new_generation(said_by_caller=True)
        self._tracker.begin()
        self._explicit_step, self._explicit_lane, self._begun = False, None, True

    def step(self, timestep: float | Tensor | None = None) -> None:
        """The next calls belong to the next denoising step.

        The plan of the step is chosen here, so this may wait for a measure of the step before; the calls then wait for nothing.

        Args:
            timestep: where the step stands, for the history and for policies that go by the noise level; in the model's units. A tensor
                of one value is read, which waits for its device.

        Raises:
            CacheStateError: no generation was begun.
            ConfigError: no number.
        """
        if not self._begun and not self._explicit_step:
            raise CacheStateError("session.step() says that a step of a generation starts; call session.begin() first")
        at = None if timestep is None else checked_timestep(timestep)
        self._begun, self._explicit_step, self._explicit_lane = False, True, None
        self._timestep = at
        self._new_step()

    def end(self) -> None:
        """The generation is over, also where it was cut short: free what it kept. The next call begins another one."""
        self.store.drop()
        self._computed.clear()
        self._forget_lanes()
        self._tracker.begin()
        self._explicit_step, self._begun = False, False

    def lane(self, name: int | str) -> None:
        """The next call belongs to this lane of the step, for example "cond" or "uncond".

        Raises:
            ConfigError: neither a name nor a number.
        """
        if not isinstance(name, (int, str)):
            raise ConfigError(f"session.lane(name) takes a name or a number, as 'cond' and 'uncond'; got {name!r}")
        self._explicit_lane = name

    def moves(self, value: Tensor, name: Hashable) -> None:
        """`value`, an input of the next calls of this step, depends on the timestep: that it is another one at every step is no
        change of the conditioning.

        Args:
            name: what it is, the same at every step.
        """
        self._moving[id(value)] = weakref.ref(value), name

    def reset(self) -> None:
        """Forget every cached value, the policy's state and what was learnt; the history stays."""
        self._step, self._state = -1, None  # what ran so far teaches nothing
        self.num_steps = self._given_steps
        self._tracker = StepTracker()
        self.begin()

    @property
    def calibration(self) -> Any:
        """What `vdcache-auto` found for this model and follows, a `Calibration`; None before, and under other recipes."""
        return getattr(self.recorder, "calibration", None)

    @property
    def graphs(self) -> tuple[CompiledGraph, ...]:
        """The graphs that have run under this session."""
        return tuple(self._graphs)

    def warm_up(self) -> None:
        """Compile every variant of every graph that has run so far, so that no later step waits for a compiler."""
        for graph in self._graphs:
            graph.warm_up()

    def watch(self, run: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one call of the model, and say once if it went past every graph of vdcache although earlier ones did not."""
        before = self._entered
        self._emitted.clear()
        self._in_forward = 0
        self._given = {id(x) for x in _tensors((*args, *kwargs.values()))} if len(self._graphs) != 1 else None
        try:
            result = run(*args, **kwargs)
        except BaseException:
            self.failed()
            raise
        finally:
            self._in_forward = self._given = None
        if self._results is None or len(self._graphs) > 1 or not all(graph.whole for graph in self._graphs):
            results = [tuple(x.shape) for x in _tensors((result,))]
            if results != self._results:
                self._results, self._latents_of = results, {}
        for listen in self.listeners if self._entered > before else ():
            listen(self.history[-1], tuple(self._emitted), result)
        if before and self._entered == before:
            self._notices.outside()
        return result

    def claim(self, make: Callable[[], Session]) -> tuple[Session, bool]:
        """This session for one call; where another thread is in the middle of a call, a session of the calling thread's own.

        Threads that take turns share the session.

        Args:
            make: makes that session.

        Returns the session, and whether to `release` it after the call: False inside another call of the same thread.
        """
        own: Session = getattr(self._of_thread, "session", self)
        me = threading.get_ident()
        if own._busy == me:
            return own, False
        if own._lock.acquire(blocking=False):
            own._busy = me
            return own, True
        own = self._of_thread.session = make()
        self._notices.threads()
        return own.claim(make)

    def release(self) -> None:
        """The call that claimed the session is over."""
        self._busy = None
        self._lock.release()

    def failed(self) -> None:
        """A call raised: what it was to compute is not there, so nothing older counts for it."""
        self.store.drop()
        self._computed.clear()

    def emit(self, graph: CompiledGraph, values: dict[str, Tensor]) -> None:
        """A graph hands out what it emits; the listeners are given it when the model has returned."""
        if self.listeners:
            self._emitted.append((graph, values))

    def follow(self, policy: Policy) -> None:
        """From the next step on, this policy decides.

        Raises:
            ConfigError: it is not for this number of steps.
        """
        self._state = policy.start(self.num_steps, None) if self.num_steps is not None else None
        self.policy = policy

    def follows(self, graph: CompiledGraph) -> bool:
        """Whether a graph runs when the step is known; else it is computed whatever the plan."""
        return graph.family not in self._early

    def adopt(self, graph: CompiledGraph) -> None:
        """A graph joins at its first run, not when it is compiled."""
        if graph not in self._graphs:
            self._graphs[graph] = None

    # ---- what happens around a call --------------------------------------------------------------------------------

    def enter(
        self,
        graph: CompiledGraph,
        inputs: Sequence[Any],
        look: Callable[[list[Tensor] | None], ProbeResult] = lambda previous: ProbeResult(),
    ) -> CallContext:
        """Place a call in the run and say what it reuses.

        Args:
            look: runs the graph's head, given the previous values of its probes; called once, where the graph has probes.
        """
        began, on_device = time.perf_counter(), DeviceTime.of([inputs[i] for i in (*graph.latents[:1], *graph.activations[:1])])
        self._entered += 1
        self._syncs = 0
        # One graph may serve several blocks (regional compilation) or be called again with the same weights. Within a forward they
        # are told apart by their order, because offloading puts other objects in the place of weights.
        watched = self._in_forward is not None
        who = (graph.kind, 0 if watched else next((id(inputs[i]) for i in graph.static), 0))
        follows = self._place(graph, inputs, who)
        if self._in_forward is not None:
            self._in_forward += 1
        call = self._calls[who] = self._calls.get(who, -1) + 1
        own, new = self._own_lane(graph, who, inputs, call)
        # A graph that runs before the step is known belongs to no lane but its own: the last one is that of another forward.
        lane = (self._lane_name, self._lane_id, own.id) if follows else (None, -1, own.id)
        repeated = self._repeats(graph, who, call, lane, inputs) or self._repeated
        if repeated:
            self._ambiguous[lane] = self._step
            if follows and self._step > 0 and self._skips and self.num_steps is not None:
                self._notices.several_latents()
        changed = self._look_at_weights(graph, inputs)
        key = CallKey(who, call, lane, self._token, _forms(inputs, graph.activations))
        if repeated:
            self._drop(key)  # of the other latent
        again = any(step == self._step for step, _ in self._computed.get(key, {}).values())
        seen = ProbeResult()
        if graph.probes:
            earlier = self.store.get(key, [p.layout.name for p in graph.probes])
            seen = look(earlier)
            if follows and self._undecided:
                self._decide(graph, seen, comparable=earlier is not None)
        plan, why = (graph.narrow(self._plan), self._why) if follows else (RECOMPUTE, "the graph runs before the step is known")
        if follows and self._undecided:
            plan, why = RECOMPUTE, "it runs before the policy can decide"
        pair, rows = None, None
        if (lanes := graph.lanes) is not None:
            pair = self._pair(graph, who, call) if lanes.mode == "calls" else None
            if lanes.group in plan.reuse and (reason := self._no_pair(lanes, graph, inputs, pair)) is not None:
                plan, why = Plan(plan.reuse - {lanes.group}), reason
            elif lanes.group in plan.reuse and lanes.mode == "batch":
                rows = lanes.rows
        reads: list[Tensor] = []
        if plan:
            found = self.store.get(key, graph.needs(plan).reads)
            if changed:
                plan, why = RECOMPUTE, "the weights changed"
            elif repeated or (found is not None and self._is_ambiguous(key, plan)):
                plan, why = RECOMPUTE, SEVERAL_LATENTS
            elif found is None:
                plan, why = RECOMPUTE, "its conditioning is new" if new else NOTHING_STORED
            elif self._is_stale(key, plan):
                plan, why = RECOMPUTE, "this lane sat out the last computed step"
            else:
                reads = found
        elif follows and self._plan:
            why = "the graph has nothing to reuse"
        needs = graph.needs(plan)
        before = self.store.get(key, needs.before) if needs.before else None
        previous = self.store.get(key, [layout.name for layout in needs.layouts]) if needs.layouts else None
        if not plan and not again and rows is None:
            # What the step replaces is freed before it runs, when memory is needed most, but for what it compares with.
            compared = {*needs.before, *(layout.name for layout in needs.layouts), *(p.layout.name for p in graph.probes)}
            self.store.drop(key, but=compared)
        record = Record(
            generation=self._generation,
            step=self._step,
            lane=self._lane,
            timestep=self._timestep,
            plan=self._plan if follows else RECOMPUTE,
            reused=needs.slots,
            why=why,
            syncs=self._syncs,
            probe=self._probe or (),
        )
        return CallContext(
            graph,
            plan,
            key,
            needs,
            reads,
            before,
            previous,
            [torch.tensor(float(n)) for group in needs.times for n in self._times(key, group)],
            record,
            began,
            seen,
            pair,
            rows,
            keep=follows and self.num_steps is not None and not self._last() and not again,
            device_time=on_device,
            again=again,
        )

    def leave(
        self,
        ticket: CallContext,
        inputs: Sequence[Any],
        results: Sequence[Any],
        saved: dict[str, Tensor],
        observed: dict[str, Tensor],
        sums: Tensor | None,
    ) -> None:
        """Keep what a call computed for later steps."""
        if (lanes := ticket.graph.lanes) is not None and lanes.mode == "calls":
            value = results[lanes.output]
            at = ticket.key.graph, ticket.key.call
            if isinstance(value, Tensor) and at not in self._first_lane:
                self._first_lane[at] = RememberedInput(value)
        for number, result in (
            enumerate(results) if len(results) > 1 or self._given is not None or len(self._graphs) > 1 else ()
        ):
            if isinstance(result, Tensor):
                origin = ticket.key.graph, ticket.key.call, ticket.key.lane, number
                self._made[id(result)] = weakref.ref(result), origin, ticket.graph.family, self._lanes_begun
        while len(self._made) > MOST_MADE:
            del self._made[next(iter(self._made))]
        if ticket.keep:
            names, values = [*saved, *observed], [*saved.values(), *observed.values()]
            for probe, value in zip(ticket.graph.probes, ticket.look.values, strict=True):
                if probe.reference_step == "step" or group_of(probe.layout.name) not in ticket.plan.reuse:
                    names.append(probe.layout.name)
                    values.append(value)
            if names:
                self.store.put(ticket.key, names, values, [*inputs, *results], ticket.rows)
            own = self._computed.setdefault(ticket.key, {})
            for group in ticket.needs.computes:
                own[group] = (self._step, own.get(group, (0, 0))[1] + 1)
                if group not in self._plan.reuse:
                    self._due[ticket.key.graph, ticket.key.call, group] = self._step
        elif not ticket.plan and not ticket.again:
            self._drop(ticket.key)
        if self._last():  # nothing will read this lane again
            self._drop(ticket.key)
        if sums is not None and ticket.keep:
            elements = tuple(v.numel() for v in observed.values())
            self._pending.append(_Pending(sums, ticket.needs.layouts, elements, ticket.previous is not None))
        ticket.record.timed(ticket.device_time, time.perf_counter() - ticket.began)
        if ticket.device_time is not None:
            ticket.device_time.stop()
            self._running.append(ticket.record)
            while self._running and self._running[0].settle():
                self._running.popleft()
        self.history.add(ticket.record)
        tell(ticket.record)
        self._hit = self._hit or bool(ticket.record.reused)
        if self._last() and self._skips and not self._hit and any(getattr(g, "slots", True) for g in self._graphs):
            unobserved = dict.fromkeys(why for g in self._graphs for why in g.unobserved)
            self._notices.nothing_reused(self.num_steps, self.history.generation(), tuple(unobserved))
        self._step_records.append(ticket.record)

    def _pair(self, graph: CompiledGraph, who: Hashable, call: int) -> Tensor | None:
        """What the step's first lane returned, unless its owner has written into it since."""
        first = self._first_lane.get((who, call))
        return first.earlier() if first is not None else None

    def _no_pair(self, lanes: LaneScope, graph: CompiledGraph, inputs: Sequence[Any], pair: Tensor | None) -> str | None:
        """Why a lane cannot be predicted in this call; "" where it is the one that is always computed."""
        if lanes.mode == "calls":
            return "" if pair is None else None
        if self._same_halves is None:
            latent = inputs[graph.latent] if graph.latent is not None else None
            self._same_halves = False
            if isinstance(latent, Tensor):
                first, second = latent.chunk(2)
                values, syncs = read([(first == second).all()])
                self._syncs += syncs
                self._same_halves = bool(values[0][0])
            if not self._same_halves:
                self._notices.no_lanes()
        return None if self._same_halves else "the halves of the batch are not two lanes"

    def _decide(self, graph: CompiledGraph, seen: ProbeResult, comparable: bool) -> None:
        """Choose the plan of the step by what was probed."""
        self._undecided = False
        measures = None
        if comparable and seen.sums is not None:
            numbers, syncs = read([seen.sums])
            self._syncs += syncs
            sizes = [v.numel() for v in seen.values]
            layouts = [p.layout for p in graph.probes]
            at, found = 0, []
            for layout, elements in zip(layouts, sizes, strict=True):
                count = count_of(layout)
                found.append(measured(layout, numbers[0][at : at + count], elements))
                at += count
            measures = tuple(found)
        self._probe = measures
        self._state, plan = self.policy.decide(self._state, self._step, measures)  # type: ignore[attr-defined]
        self._plan = self._listed(plan)
        if not self._plan and measures and not all(math.isfinite(m.change) for m in measures):
            self._why = "what was probed is not a number"
            self._notices.probe_is_no_number()

    def _times(self, key: CallKey, group: str) -> tuple[int, int, int]:
        """Steps since a group was last computed, how often it was in this generation (1 and 0 where it never was), and the
        step.
        """
        last, count = self._computed.get(key, {}).get(group, (self._step - 1, 0))
        return self._step - last, count, self._step

    def _is_stale(self, key: CallKey, plan: Plan) -> bool:
        """Whether the model was computed at a later step than this lane last was, as where guidance was off in between."""
        own = self._computed.get(key, {})
        return any(own.get(g, (self._step, 0))[0] < self._due.get((key.graph, key.call, g), -1) for g in plan.reuse)

    def _is_ambiguous(self, key: CallKey, plan: Plan) -> bool:
        """Whether the lane was last computed in a step in which it had several latents, so that nobody knows whose values are kept."""
        if (several := self._ambiguous.get(key.lane)) is None:
            return False
        own = self._computed.get(key, {})
        return any(own.get(g, (-1, 0))[0] <= several for g in plan.reuse)

    def _drop(self, key: CallKey) -> None:
        self.store.drop(key)
        self._computed.pop(key, None)

    def summary(self, generation: int = -1) -> Any:
        """A rich table of one generation, the last one by default: print it with `rich.print`."""
        return summary_table(self, generation)

    @property
    def step_index(self) -> int:
        """The current step, −1 before the first."""
        return self._step

    # ---- where the call stands -------------------------------------------------------------------------------------

    def _place(self, graph: CompiledGraph, inputs: Sequence[Any], who: Hashable) -> bool:
        """Advance the step tracker if this graph drives it. False for a graph that runs before it."""
        self._placed, self._repeated = None, False
        if self._explicit_step:
            # A lane begins with a forward; where nobody watches those, with the step's first graph, which comes again with every lane.
            if self._in_forward == 0 or (self._in_forward is None and self._driver in (None, who)):
                self._driver = who
                self._begin_lane(graph, *self._own_lane(graph, who, inputs), self._lanes)
            return True
        if self._drives(graph):
            self._ticker = graph.family
            self._tick(graph, inputs, who)
            return True
        if self._step < 0 or self._ticker is None:
            self._early.add(graph.family)
            if not graph.timestep_inputs and getattr(graph, "slots", True):
                self._notices.no_timestep(getattr(graph, "broken", ""))
        return graph.family not in self._early and self._step >= 0

    def _drives(self, graph: CompiledGraph) -> bool:
        return bool(graph.timestep_inputs) and self._ticker in (None, graph.family)

    def _begin_lane(self, graph: CompiledGraph, lane: Lane, new: bool, place: int) -> None:
        """The next graphs belong to this lane, until another one begins."""
        self._lane_name, self._explicit_lane = self._explicit_lane, None
        self._lane_id, self._placed, self._placed_new = lane.id, lane, new
        number = lane.label if len(graph.told) > len(graph.latents) else place
        if number in self._shown:  # the same conditioning again in this step
            number = max([*self._shown, *self._labels.values()]) + 1
        self._shown.add(number)
        self._lane = number if self._lane_name is None else self._lane_name
        self._lanes += 1
        self._lanes_begun += 1
        self._calls.clear()

    def _tick(self, graph: CompiledGraph, inputs: Sequence[Any], who: Hashable) -> None:
        table = self._table(graph, who)
        question = table.ask(*self._conditioning(graph, inputs))
        reading, latent = self._read(graph, inputs, who, question)

        def repeated() -> bool:
            lane = table.known(question)
            return lane is not None and self._repeats(graph, who, 0, (self._explicit_lane, lane.id, lane.id), inputs, latent)

        tick = self._tracker.tick(reading, repeated, last=self._last())
        self._timestep = tick.timestep
        if tick.new_generation and not self._begun:
            self._new_generation(mixed=tick.mixed)
        self._begun = False
        if tick.new_step:
            self._new_step(tick)
        self._begin_lane(graph, *table.settle(question, self._generation, self._step), tick.lane)
        if tick.new_step:
            self._unsure = tick.repeated
        self._repeated = tick.repeated or self._unsure

    def _read(
        self, graph: CompiledGraph, inputs: Sequence[Any], who: Hashable, question: LaneQuery
    ) -> tuple[Reading, bool | Tensor | None]:
        """Read the timestep, and on an accelerator everything else that this call may need, with one sync.

        Returns also whether the latent is that of the step's last call with the same conditioning, where that is known.
        """
        keys: list[tuple[float, ...]] = []
        coarse = False
        wanted: list[Tensor] = []
        places: list[int] = []
        for position in graph.timestep_inputs:
            value = inputs[position]
            keys.append(())
            if isinstance(value, Tensor):
                coarse = coarse or (value.is_floating_point() and value.element_size() <= 2)
                places.append(len(keys) - 1)
                wanted.append(value)
            else:
                keys[-1] = (float(value),)
        asked = question.unread()
        wanted += asked
        same: bool | Tensor | None = None
        latents = self._latents(graph, inputs)
        if question.lane is not None and latents:
            lane = (self._explicit_lane, question.lane.id, question.lane.id)
            if held := self._seen.get((who, 0, lane), {}).get(latents[0]):
                same = compare(held, inputs[latents[0]])
        waits = self._waits([*wanted, *([same] if isinstance(same, Tensor) else [])])
        if isinstance(same, Tensor):
            wanted.append(same)
        pending = list(self._pending) if waits else []
        numbers, syncs = read([*wanted, *(p.sums for p in pending)])
        self._syncs += syncs
        for place, values in zip(places, numbers, strict=False):
            keys[place] = tuple(values)
        question.told([bool(values[0]) for values in numbers[len(places) : len(places) + len(asked)]])
        if isinstance(same, Tensor):
            same = bool(numbers[len(wanted) - 1][0])
        for p, values in zip(pending, numbers[len(wanted) :], strict=True):
            p.sums = torch.tensor(values, dtype=torch.float64)
        latent = inputs[graph.latent] if graph.latent is not None else None
        form = None if latent is None else (tuple(latent.shape), latent.dtype, latent.device)
        return Reading(tuple(keys), coarse, form), same

    # ---- whose values these are ------------------------------------------------------------------------------------

    def _table(self, graph: CompiledGraph, who: Hashable, call: int = 0) -> LaneTable:
        """The lanes of a kind of graph, at its first, second … call in a forward: one that Dynamo makes anew goes on with the other's."""
        key = who, call, len(graph.told)
        if key not in self._tables:
            family = graph.family

            def label() -> int:
                number = self._labels[family] = self._labels.get(family, -1) + 1
                return number

            self._tables[key] = LaneTable(label)
        return self._tables[key]

    def _conditioning(self, graph: CompiledGraph, inputs: Sequence[Any]) -> tuple[list[Any], frozenset[int]]:
        """The conditioning of a call, with `LATENT` in the place of latents, and which of it the forward itself has made.

        What an earlier graph of the same forward returned stands for that graph's own conditioning.
        """
        latents = self._latents(graph, inputs)
        values: list[Any] = [LATENT if i in latents else inputs[i] for i in graph.told]
        if not self._moving and len(self._graphs) < 2:
            return values, frozenset()
        begins = self._in_forward == 0 or (self._drives(graph) and not self._explicit_step)
        inside: set[int] = set()
        for at, value in enumerate(values):
            if (told := self._moving.get(id(value))) is not None and told[0]() is value:
                values[at] = told[1]
                continue
            made = self._origin(value)
            if made is not None and (not begins or made[1] in self._early):
                values[at] = made[0]
            elif self._given is not None and isinstance(value, Tensor) and value.numel() > 1 and id(value) not in self._given:
                inside.add(at)  # one number may be a setting of the model, which Dynamo hands over as a tensor
        return values, frozenset(inside)

    def _origin(self, value: Any) -> tuple[Hashable, Hashable] | None:
        """Where an earlier graph of this lane has made a value, and that graph's family; None where none has."""
        made = self._made.get(id(value))
        return (made[1], made[2]) if made is not None and made[0]() is value and made[3] == self._lanes_begun else None

    @property
    def _unlearnt(self) -> bool:
        """In the first forward that is watched."""
        return self._results is None and self._in_forward is not None

    def _latents(self, graph: CompiledGraph, inputs: Sequence[Any]) -> tuple[int, ...]:
        """What the denoising loop updates. A part of a model cannot tell by its own results; the whole model's can.

        Before the first watched forward is over nobody knows whether a graph is the whole: then everything is taken for conditioning.
        """
        if self._unlearnt:
            return ()
        if self._results is None or (graph.whole and len(self._graphs) == 1):
            return graph.latents
        if (found := self._latents_of.get(graph)) is None:
            given = {i: v for i in graph.told if isinstance(v := inputs[i], Tensor) and v.is_floating_point() and v.ndim > 1}
            outer = {i: v.shape for i, v in given.items() if self._given is None or id(v) in self._given}
            found = self._latents_of[graph] = tuple(updated_by(outer, self._results))
        return found

    def _own_lane(self, graph: CompiledGraph, who: Hashable, inputs: Sequence[Any], call: int = 0) -> tuple[Lane, bool]:
        """The lane that a graph's own conditioning tells, and whether it is new."""
        if self._placed is not None:
            lane, self._placed = self._placed, None
            return lane, self._placed_new
        table = self._table(graph, who, call)
        question = table.ask(*self._conditioning(graph, inputs))
        if wanted := question.unread():
            answers, syncs = read(wanted)
            self._syncs += syncs
            question.told([bool(a[0]) for a in answers])
        return table.settle(question, self._generation, self._step)

    def _repeats(
        self,
        graph: CompiledGraph,
        who: Hashable,
        call: int,
        lane: tuple[int | str | None, int, int],
        inputs: Sequence[Any],
        same_latent: bool | Tensor | None = None,
    ) -> bool:
        """Whether this step had such a call already, with another latent; this one is remembered.

        What moves with the timestep counts as the latent does: where both are equal it is the same call again.
        """
        moves = self._table(graph, who, call).moving
        moving = [i for at, i in enumerate(graph.told) if at in moves] if moves else []
        latents = self._latents(graph, inputs)
        # What an earlier graph has made goes with that graph's latents, and is not kept alive.
        kept = [i for i in (graph.told if self._unlearnt else latents) if self._origin(inputs[i]) is None]
        at = who, call, lane
        held = self._seen.get(at)
        self._seen[at] = {i: RememberedInput(inputs[i]) for i in kept} | {
            i: RememberedInput(inputs[i], sampled=True) for i in moving
        }
        if held is None:
            return False
        answers = {i: compare(held[i], inputs[i]) for i in (*latents, *moving) if i in held}
        if same_latent is not None and latents:
            answers[latents[0]] = same_latent
        if any(a is False for a in answers.values()):
            return True
        if unknown := [a for a in answers.values() if isinstance(a, Tensor)]:
            numbers, syncs = read(unknown)
            self._syncs += syncs
            return not all(n[0] for n in numbers)
        return False

    def _look_at_weights(self, graph: CompiledGraph, inputs: Sequence[Any]) -> bool:
        """Look at a graph's weights at its first call in a step. Whether they changed: then no cached value counts any more."""
        now = self._generation, self._step
        if self._weights_of.get(graph) == now:
            return False
        self._weights_of[graph] = now
        before, self._token = self._token, self._weights.check(graph, graph.kind, graph.weights(inputs), now)
        if self._token == before:
            return False
        self.store.drop()
        self._computed.clear()
        return True

    def _forget_lanes(self) -> None:
        """Nothing of a generation that is over."""
        for table in self._tables.values():
            table.clear()
        self._labels.clear()
        self._shown.clear()
        self._seen.clear()
        self._ambiguous.clear()
        self._first_lane.clear()

    def _forget_gone(self) -> None:
        """A lane that sat out a computed step would be computed if it came back: let go of it."""
        for table in self._tables.values():
            if left := set(table.gone(self._step)):
                for key in [k for k in self._computed if left & set(k.lane[1:])]:
                    self._drop(key)
                self._ambiguous = {lane: step for lane, step in self._ambiguous.items() if not left & set(lane[1:])}

    @staticmethod
    def _waits(values: Sequence[Tensor]) -> bool:
        """Whether reading any of these waits for a device."""
        return any(v.device.type != "cpu" for v in values)

    # ---- steps and generations -------------------------------------------------------------------------------------

    def _new_generation(self, said_by_caller: bool = False, mixed: bool = False) -> None:
        """Args: `mixed` where parts of a batch go on, so that nobody knows how long a generation is."""
        ran = self._step + 1
        if mixed:
            pass
        elif ran and self._given_steps is None:
            if self.num_steps is None and self._skips:
                self._notices.learnt(ran)
            elif ran != self.num_steps and self._skips:
                self._notices.other_length(ran, self.num_steps)
            self.num_steps = ran
            self._lengths[tuple(self._timesteps[:2])] = ran
            if len(self._lengths) > MOST_LENGTHS:
                del self._lengths[next(iter(self._lengths))]
        elif ran and ran < (self._given_steps or 0) and not said_by_caller and self._skips:
            self._notices.short(ran, self._given_steps)
        self.store.drop()
        self._computed.clear()
        self._due.clear()
        self._pending.clear()
        self._step_records = []
        self._timesteps = []
        self._same_halves = None
        self._forget_lanes()
        self._step, self._generation, self._hit = -1, self._generation + 1, False
        self._plan, self._why, self._undecided, self._probe = RECOMPUTE, "", False, None
        if self.num_steps is not None:
            self._start_policy()

    def _new_step(self, tick: Tick | None = None) -> None:
        """Close the step before, and choose the plan of this one."""
        measures = self._measures()
        if self._step >= 0:
            for record in self._step_records:
                record.measures = measures or ()
            if self._state is not None:
                self._state = self.policy.observe(self._state, self._step, self._ran(), measures)
            if any(r.computed and not r.plan for r in self._step_records):
                self._forget_gone()
        self._step_records = []
        self._undecided, self._probe = False, None
        self._first_lane.clear()
        self._seen.clear()
        self._shown.clear()
        self._moving.clear()
        if self._timestep is not None:
            self._timesteps.append(self._timestep)
        self._driver, self._lanes = None, 0
        self._calls.clear()
        self._step += 1
        if self._step == 1 and self._given_steps is None:
            self._recall_length(measures)
        if self.num_steps is None:
            self._plan, self._why = RECOMPUTE, "learning the number of steps"
        elif self._step >= self.num_steps:
            self._plan, self._why = RECOMPUTE, f"beyond the {self.num_steps} steps that were announced"
            if self._skips:
                self._notices.long(self._step + 1, self.num_steps)
        else:
            plan = self.policy.plan(self._state, self._step, tuple(self._timesteps))
            self._plan, self._why, self._undecided = RECOMPUTE if plan is None else self._listed(plan), "", plan is None

    def _recall_length(self, measures: tuple[MetricValue, ...] | None) -> None:
        """Runs of several lengths in turn: where an earlier one began with the same two timesteps, this one is as long."""
        steps = self._lengths.get(tuple(self._timesteps[:2]))
        if steps is None or steps == self.num_steps:
            return
        self.num_steps = steps
        self._start_policy()
        if self._state is not None:
            self._state = self.policy.observe(self._state, 0, RECOMPUTE, measures)

    def _start_policy(self) -> None:
        """The policy for the number of steps, before its first step."""
        assert self.num_steps is not None
        if self.prepare is not None:
            self.policy = self.prepare(self.num_steps)
        try:
            self._state = self.policy.start(self.num_steps, self._state)
        except ConfigError as error:
            if self._given_steps is not None:
                raise
            # The number was learnt in the middle of a run, where an error would lose what the user has.
            self._notices.not_followed(error)
            self.policy = Always()
            self._state = self.policy.start(self.num_steps)

    def _listed(self, plan: Plan) -> Plan:
        """A plan of the policy's, if it is one of those for which the graphs were prepared."""
        if not plan or plan in (listed := self.policy.plans()):
            return plan
        self._notices.unlisted(plan, listed)
        return RECOMPUTE

    def _ran(self) -> Plan:
        """The plan that the step before really followed: reuse only if some call reused."""
        return self._plan if any(r.reused for r in self._step_records) or not self._step_records else RECOMPUTE

    def _measures(self) -> tuple[MetricValue, ...] | None:
        """What the step before measured, lanes added up; None where a lane had nothing to compare with."""
        pending, self._pending = self._pending, []
        if not pending:
            return None
        numbers, syncs = read([p.sums for p in pending])
        self._syncs += syncs
        if not all(p.comparable for p in pending):
            return None
        totals: dict[MetricSpec, list[float]] = {}
        elements: dict[MetricSpec, int] = {}
        for p, sums in zip(pending, numbers, strict=True):
            at = 0
            for layout, n in zip(p.layouts, p.elements, strict=True):
                count = count_of(layout)
                own = sums[at : at + count]
                at += count
                totals[layout] = [a + b for a, b in zip(totals.get(layout, [0.0] * count), own, strict=True)]
                elements[layout] = elements.get(layout, 0) + n
        result = tuple(measured(layout, sums, elements[layout]) for layout, sums in totals.items())
        if not all(math.isfinite(m.change) for m in result):
            self._notices.observed_is_no_number()
        return result

    @property
    def _skips(self) -> bool:
        """Whether the policy ever reuses anything; if not, nothing depends on the number of steps."""
        return len(self.policy.plans()) > 1

    def _last(self) -> bool:
        return self.num_steps is not None and self._step >= self.num_steps - 1


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, in lists, tuples and dicts too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _forms(inputs: Sequence[Any], positions: Sequence[int]) -> Hashable:
    """Shape, dtype and device of the tensors at these positions: values never cross any of them.

    Sizes that a graph for many sizes takes as numbers say nothing more, and a graph for one size does not take them.
    """
    values = (inputs[position] for position in positions)
    return tuple((v.shape, v.dtype, v.device) for v in values if isinstance(v, Tensor))
