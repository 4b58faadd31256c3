"""The lanes of a denoising step: which conditioning does a call have, and did the step have such a call already?"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence, Set
from typing import Any

from torch import Tensor

from vdcache.runtime.call import CompiledGraph
from vdcache.runtime.computed_steps import LaneKey
from vdcache.runtime.forward_watch import ForwardWatch
from vdcache.runtime.lane_table import Lane, LaneQuery, LaneTable, RememberedInput, compare
from vdcache.runtime.read import DeviceReads
from vdcache.runtime.step_planner import StepPlanner

__all__ = ["StepLanes"]


class StepLanes:
    """A table of lanes for every kind of graph, and the lane that calls belong to now.

    Args:
        planner: knows the generation and the step.
        forward: knows what the model is given and what its graphs made.
    """

    def __init__(self, planner: StepPlanner, forward: ForwardWatch, reads: DeviceReads) -> None:
        self._planner, self._forward, self._reads = planner, forward, reads
        self._tables: dict[Hashable, LaneTable] = {}
        self._labels: dict[Hashable, int] = {}  # of each family, how many lanes it has in this generation
        self._shown: set[int] = set()  # numbers of the lanes of this step
        # Of each call of this step: its latents and what moves with the timestep, by position.
        self._seen: dict[Hashable, dict[int, RememberedInput]] = {}
        self._calls: dict[Hashable, int] = {}  # how often each graph ran in the current lane
        self.count = 0  # how many lanes the current step has had
        self.lane: int | str = 0  # as a person sees it
        self._name: int | str | None = None  # what the caller calls it
        self._id = -1  # of the conditioning of the call that began the lane
        # The lane of the graph that began this lane, until that graph has taken it.
        self.placed: tuple[Lane, bool] | None = None

    # ---- which lane ----------------------------------------------------------------------------------------------------

    def ask(
        self, graph: CompiledGraph, who: Hashable, inputs: Sequence[Any], begins: bool, early: Set[Hashable], call: int = 0
    ) -> tuple[LaneTable, LaneQuery]:
        """A call's conditioning beside that of every lane of its table. Arguments as `ForwardWatch.conditioning`.

        A kind of graph has a table for its first, second … call in a forward: one that Dynamo makes anew goes on with the other's.
        """
        key = who, call, len(graph.inputs.told)
        if (table := self._tables.get(key)) is None:
            family = graph.family

            def label() -> int:
                number = self._labels[family] = self._labels.get(family, -1) + 1
                return number

            table = self._tables[key] = LaneTable(label)
        return table, table.ask(*self._forward.conditioning(graph, inputs, begins, early))

    def settle(self, table: LaneTable, question: LaneQuery) -> tuple[Lane, bool]:
        """The lane of a call, and whether it is new; reads what is still unread."""
        if question.equal and (wanted := question.unread()):
            question.told([bool(a[0]) for a in self._reads.read(wanted)])
        return table.settle(question, self._planner.generation, self._planner.step)

    def own_lane(
        self, graph: CompiledGraph, who: Hashable, inputs: Sequence[Any], begins: bool, early: Set[Hashable], call: int
    ) -> tuple[Lane, bool]:
        """The lane that a graph's own conditioning tells, and whether it is new."""
        return self.settle(*self.ask(graph, who, inputs, begins, early, call))

    def begin(self, graph: CompiledGraph, lane: Lane, new: bool, place: int, name: int | str | None) -> None:
        """The next graphs belong to this lane, until another one begins.

        Args:
            place: among the calls of the step.
            name: what the caller calls it.
        """
        self._name, self._id, self.placed = name, lane.id, (lane, new)
        number = lane.label if len(graph.inputs.told) > len(graph.inputs.latents) else place
        if number in self._shown:  # the same conditioning again in this step
            number = max([*self._shown, *self._labels.values()]) + 1
        self._shown.add(number)
        self.lane = number if name is None else name
        self.count += 1
        self._forward.lane_begins()
        self._calls.clear()

    def next_call(self, who: Hashable) -> int:
        """How often this graph ran before in the current lane."""
        call = self._calls[who] = self._calls.get(who, -1) + 1
        return call

    def key(self, own: Lane, follows: bool) -> LaneKey:
        """What a graph's cached values are kept under.

        One that runs before the step is known belongs to no lane but its own: the last one is that of another forward.
        """
        return (self._name, self._id, own.id) if follows else (None, -1, own.id)

    def take_placed(self) -> tuple[Lane, bool] | None:
        """The lane that began with this call, and whether it is new; None where it is still to be asked for."""
        placed, self.placed = self.placed, None
        return placed

    # ---- the same call again -----------------------------------------------------------------------------------------

    def latent_before(self, graph: CompiledGraph, who: Hashable, inputs: Sequence[Any], lane: LaneKey) -> bool | Tensor | None:
        """Whether the latent is that of the step's last call of this lane; None where there was none."""
        latents = self._forward.latents(graph, inputs)
        held = self._seen.get((who, 0, lane), {}).get(latents[0]) if latents else None
        return None if held is None else compare(held, inputs[latents[0]])

    def repeats(
        self,
        graph: CompiledGraph,
        who: Hashable,
        call: int,
        lane: LaneKey,
        inputs: Sequence[Any],
        same_latent: bool | Tensor | None = None,
    ) -> bool:
        """Whether this step had such a call already, with another latent; this one is remembered.

        What moves with the timestep counts as the latent does: where both are equal it is the same call again.

        Args:
            same_latent: what `latent_before` told, where that was asked.
        """
        table = self._tables.get((who, call, len(graph.inputs.told)))
        moves = table.moving if table is not None else ()
        moving = [i for at, i in enumerate(graph.inputs.told) if at in moves] if moves else []
        forward = self._forward
        latents = forward.latents(graph, inputs)
        kept = graph.inputs.told if forward.unlearnt else latents
        at = who, call, lane
        held = self._seen.get(at)
        # What an earlier graph has made goes with that graph's latents, and is not kept alive.
        now = self._seen[at] = {i: RememberedInput(inputs[i]) for i in kept if forward.origin(inputs[i]) is None}
        for i in moving:
            now[i] = RememberedInput(inputs[i], sampled=True)
        if held is None:
            return False
        answers = {i: compare(held[i], inputs[i]) for i in (*latents, *moving) if i in held}
        if same_latent is not None and latents:
            answers[latents[0]] = same_latent
        return self._some_differ(answers.values())

    def _some_differ(self, answers: Collection[bool | Tensor]) -> bool:
        """Whether an answer is no; reads a device only where those that are known all say yes."""
        if any(a is False for a in answers):
            return True
        unknown = [a for a in answers if isinstance(a, Tensor)]
        return bool(unknown) and not all(n[0] for n in self._reads.read(unknown))

    # ---- steps and generations ---------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        self._seen.clear()
        self._shown.clear()
        self._calls.clear()
        self.count = 0

    def begin_generation(self) -> None:
        """Nothing of a generation that is over."""
        for table in self._tables.values():
            table.clear()
        self._labels.clear()
        self._shown.clear()
        self._seen.clear()

    def gone(self) -> set[int]:
        """Lanes that sat out the step that just ended."""
        return {i for table in self._tables.values() for i in table.gone(self._planner.step - 1)}
