"""Which call is this? Generation, step and lane, from what the caller says or from what the model receives."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vdcache.runtime.agreement import SessionRanks
from vdcache.runtime.call import CompiledGraph
from vdcache.runtime.forward_watch import ForwardWatch
from vdcache.runtime.lane_table import Lane, LaneQuery, LaneTable
from vdcache.runtime.read import DeviceReads
from vdcache.runtime.session_warnings import SessionWarnings
from vdcache.runtime.step_lanes import StepLanes
from vdcache.runtime.step_planner import StepPlanner
from vdcache.runtime.step_tracker import Reading, StepTracker, Tick

__all__ = ["CallPlacement"]


@dataclass(slots=True)
class _Drive:
    """A call of the graph that tells the time, before it is settled in its lane."""

    graph: CompiledGraph
    tick: Tick
    table: LaneTable
    question: LaneQuery


class _Said:
    """What the caller says of the run."""

    def __init__(self) -> None:
        self.begun = False  # begin() was called and no step has started since
        self.steps = False  # step() was called in this generation
        self.lane: int | str | None = None  # of the next call
        self.driver: Hashable = None  # the call that began the current lane

    def begin(self, begun: bool) -> None:
        """A generation begins, or one has ended."""
        self.begun, self.steps, self.lane = begun, False, None

    def step(self) -> bool:
        """A step begins. Whether a generation was begun before."""
        if not self.begun and not self.steps:
            return False
        self.begun, self.steps, self.lane = False, True, None
        return True


class CallPlacement:
    """Where calls stand in the run.

    Explicit control (`said`) always wins; else the first graph with a timestep input drives the step tracker.
    """

    def __init__(
        self,
        planner: StepPlanner,
        lanes: StepLanes,
        forward: ForwardWatch,
        notices: SessionWarnings,
        reads: DeviceReads,
        ranks: SessionRanks,
    ) -> None:
        self._ranks = ranks
        self._planner, self._lanes, self._forward = planner, lanes, forward
        self._notices, self._reads = notices, reads
        self._tracker = StepTracker()
        self._ticker: Hashable = None  # the family that tells the time
        self._ticked = 0  # the last forward in which it did
        self._early: set[Hashable] = set()  # families that run before the step is known
        self.said = _Said()
        self.repeated = False  # the driving graph ran in this step with the same conditioning and another latent
        self._unsure = False  # the step may be no step: its timestep is that of the one before, with another latent
        self.rising = False  # the step may be the first one of another run

    # ---- what the caller says ------------------------------------------------------------------------------------------

    def begin(self, by_caller: bool = True) -> None:
        """A generation begins with the next call.

        Args:
            by_caller: they said so, and may say its steps.
        """
        self._tracker.begin()
        self.said.begin(by_caller)

    def forget(self) -> None:
        """What ran so far teaches nothing."""
        self._tracker, self._ticker = StepTracker(), None
        self._early.clear()

    def begin_step(self) -> None:
        self.said.driver, self.rising = None, False

    # ---- what the model receives ---------------------------------------------------------------------------------------

    def follows(self, graph: CompiledGraph) -> bool:
        """Whether a graph runs when the step is known; else it is computed whatever the plan."""
        return graph.family not in self._early

    def begins_lane(self, graph: CompiledGraph) -> bool:
        """Whether a lane begins with this graph, as far as can be told before its call is placed."""
        return self._forward.ran == 0 or (not self.said.steps and self._drives(graph))

    def own_lane(self, graph: CompiledGraph, who: Hashable, inputs: Sequence[Any], call: int = 0) -> tuple[Lane, bool]:
        """The lane that a graph's own conditioning tells, and whether it is new."""
        return self._lanes.own_lane(graph, who, inputs, self.begins_lane(graph), self._early, call)

    def place(self, graph: CompiledGraph, inputs: Sequence[Any], who: Hashable) -> _Drive | bool:
        """Place a call. What drives the step tracker comes back, to be settled once its generation and step have begun; of every other
        graph, whether it runs when the step is known.
        """
        self._lanes.placed = None
        self.repeated = False
        if self.said.steps:
            # A lane begins with a forward; where nobody watches those, with the step's first graph, which comes again with every lane.
            ran = self._forward.ran
            if ran == 0 or (ran is None and self.said.driver in (None, who)):
                self.said.driver = who
                asked = self._lanes.ask(graph, who, inputs, self.begins_lane(graph), self._early)
                self._begin_lane(graph, *self._lanes.settle(*asked), self._lanes.count)
            return True
        if self._drives(graph):
            self._ticker, self._ticked = graph.family, self._forward.count
            self._early.discard(graph.family)
            return self._tick(graph, inputs, who)
        if self._planner.step < 0 or self._ticker is None:
            self._early.add(graph.family)
            if not graph.inputs.timesteps and getattr(graph, "slots", True):
                self._notices.no_timestep(getattr(graph, "broken", ""))
        return graph.family not in self._early and self._planner.step >= 0

    def starts_generation(self, drive: _Drive) -> bool:
        """Whether a generation begins with this call that nobody has begun before."""
        begun, self.said.begun = self.said.begun, False
        return drive.tick.new_generation and not begun

    def settle(self, drive: _Drive) -> None:
        """The driving call is in its step: give it its lane."""
        tick = drive.tick
        self._begin_lane(drive.graph, *self._lanes.settle(drive.table, drive.question), tick.lane)
        if tick.new_step:
            self._unsure, self.rising = tick.repeated, tick.unsure
        self.repeated = tick.repeated or self._unsure

    def _drives(self, graph: CompiledGraph) -> bool:
        if not graph.inputs.timesteps or self._ticker == graph.family:
            return bool(graph.inputs.timesteps)
        # Dynamo takes another frame for the model where hooks were put on it or taken off: the old one never runs again.
        return self._ticker is None or (self._forward.ran is not None and self._forward.count > self._ticked + 1)

    def _begin_lane(self, graph: CompiledGraph, lane: Lane, new: bool, place: int) -> None:
        name, self.said.lane = self.said.lane, None
        self._lanes.begin(graph, lane, new, place, name)

    def _tick(self, graph: CompiledGraph, inputs: Sequence[Any], who: Hashable) -> _Drive:
        table, question = self._lanes.ask(graph, who, inputs, self.begins_lane(graph), self._early)
        reading, same_latent = self._read(graph, inputs, who, question)

        def repeated() -> bool:
            lane = table.known(question)
            own = lane is not None and self._lanes.repeats(
                graph, who, 0, (self.said.lane, lane.id, lane.id), inputs, same_latent
            )
            return self._ranks.any("another latent", own)  # it makes a new step, or a window, of this call

        tick = self._tracker.tick(reading, repeated, last=self._planner.is_last)
        self._planner.timestep = tick.timestep
        return _Drive(graph, tick, table, question)

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
        for position in graph.inputs.timesteps:
            value = inputs[position]
            keys.append(())
            if isinstance(value, Tensor):
                coarse = coarse or (value.is_floating_point() and value.element_size() <= 2)
                places.append(len(keys) - 1)
                wanted.append(value)
            else:
                keys[-1] = (float(value),)
        asked = question.unread() if question.equal else []
        wanted += asked
        waits = self._reads.waits(wanted)
        same: bool | Tensor | None = None
        if waits and (lane := question.lane) is not None:  # else it is looked at where it matters
            same = self._lanes.latent_before(graph, who, inputs, (self.said.lane, lane.id, lane.id))
        if isinstance(same, Tensor):
            wanted.append(same)
        numbers = self._reads.read([*wanted, *self._planner.metrics.unread()] if waits else wanted)
        for place, values in zip(places, numbers, strict=False):
            keys[place] = tuple(values)
        if asked:
            question.told([bool(values[0]) for values in numbers[len(places) : len(places) + len(asked)]])
        if isinstance(same, Tensor):
            same = bool(numbers[len(wanted) - 1][0])
        if waits:
            self._planner.metrics.told(numbers[len(wanted) :])
        latent = inputs[graph.inputs.latent] if graph.inputs.latent is not None else None
        form = None if latent is None else (tuple(latent.shape), latent.dtype, latent.device)
        return Reading(tuple(keys), coarse, form), same
