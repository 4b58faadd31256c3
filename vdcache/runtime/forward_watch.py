"""One forward of the model as it runs: which graphs took part, what it was given, what they made, what it returned.

So latents are told from prompts (the loop updates a latent by what the forward returns), and what a model makes itself between two
graphs from what it is given.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from vdcache.runtime.call import CallKey, CompiledGraph, Emitted
from vdcache.runtime.lane_table import LATENT
from vdcache.util.sizes import updated_by

__all__ = ["ForwardWatch"]

MOST_MADE = 256  # results of graphs that are remembered


class ForwardWatch:
    """What a session knows of the forward that runs now, and of the one before."""

    def __init__(self) -> None:
        self.graphs: dict[
            CompiledGraph, int
        ] = {}  # that have run under this session, and the turn of the plans at their last call
        self.emitted: list[Emitted] = []  # what the graphs of this forward hand out
        self.entered = 0  # how many calls of graphs have come through
        self.count = 0  # forwards that were watched
        self.ran: int | None = None  # graphs that ran in this forward; None where nobody watches forwards
        # What this forward was given, shapes by identity; None where nobody watches, or one graph is all.
        self._given: dict[int, tuple[int, ...]] | None = None
        # Shapes of what the last watched forward of a model in parts returned.
        self._results: list[tuple[int, ...]] | None = None
        self._latents: set[int] = set()  # of this forward, by identity, as far as its graphs have taken them
        self._latents_of: dict[CompiledGraph, tuple[int, ...]] = {}  # what is updated with those
        # What graphs returned lately, for which conditioning, in which family; and how often a lane had begun by then.
        self._made: dict[int, tuple[weakref.ref[Tensor], Hashable, Hashable, int]] = {}
        self._moving: dict[int, tuple[weakref.ref[Tensor], Hashable]] = {}  # what the caller says moves with the timestep
        self._lanes_begun = 0

    def begin(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """A forward begins that is watched to its end."""
        self.ran, self.count = 0, self.count + 1
        self._latents = set()
        self.emitted.clear()
        self._given = {id(x): tuple(x.shape) for x in _tensors((*args, *kwargs.values()))} if len(self.graphs) != 1 else None

    def end(self) -> None:
        """The forward is over, however it ended."""
        self.ran = self._given = None

    def returned(self, result: Any) -> None:
        """What the forward returned."""
        if self._results is None or len(self.graphs) > 1 or not all(graph.inputs.whole for graph in self.graphs):
            results = [tuple(x.shape) for x in _tensors((result,))]
            if results != self._results:
                self._results, self._latents_of = results, {}

    def lane_begins(self) -> None:
        self._lanes_begun += 1

    def step_begins(self) -> None:
        self._moving.clear()

    def moves(self, value: Tensor, name: Hashable) -> None:
        """The caller says that a value depends on the timestep, and what it is."""
        self._moving[id(value)] = weakref.ref(value), name

    def made(self, graph: CompiledGraph, key: CallKey, results: Sequence[Any]) -> None:
        """What a graph returned, and for which call."""
        if len(results) < 2 and self._given is None and len(self.graphs) < 2:
            return  # it is the model's result
        origin = key.graph, key.call, key.lane
        for number, result in enumerate(results):
            if isinstance(result, Tensor):
                self._made[id(result)] = weakref.ref(result), (*origin, number), graph.family, self._lanes_begun
        while len(self._made) > MOST_MADE:
            del self._made[next(iter(self._made))]

    def origin(self, value: Any) -> tuple[Hashable, Hashable] | None:
        """Where an earlier graph of this lane has made a value, and that graph's family; None where none has."""
        made = self._made.get(id(value))
        return (made[1], made[2]) if made is not None and made[0]() is value and made[3] == self._lanes_begun else None

    @property
    def unlearnt(self) -> bool:
        """In the first forward that is watched."""
        return self._results is None and self.ran is not None

    def latents(self, graph: CompiledGraph, inputs: Sequence[Any]) -> tuple[int, ...]:
        """What the denoising loop updates. A part of a model cannot tell by its own results; the whole model's can.

        Before the first watched forward is over nobody knows whether a graph is the whole: then everything is taken for conditioning.
        """
        if self._results is None:
            return graph.inputs.latents if self.ran is None else ()
        if graph.inputs.whole and len(self.graphs) == 1:
            return graph.inputs.latents
        if (found := self._latents_of.get(graph)) is None:
            found = self._latents_of[graph] = self._updated(graph, inputs, self._results)
        if self.ran is not None:
            self._latents.update(id(inputs[i]) for i in found)
        return found

    def _updated(self, graph: CompiledGraph, inputs: Sequence[Any], results: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Which inputs of a part of a model the loop updates with what the forward returns."""
        given = {i: v for i in graph.inputs.told if isinstance(v := inputs[i], Tensor) and v.is_floating_point() and v.ndim > 1}
        outer = {i: tuple(v.shape) for i, v in given.items() if self._given is None or id(v) in self._given}
        # Where an earlier graph has taken the latent, or the forward was given just what it returns, what else looks like it is a prompt.
        if self._latents:
            outer = {i: shape for i, shape in outer.items() if id(inputs[i]) in self._latents}
        elif self._given is not None and (exact := set(results) & set(self._given.values())):
            outer = {i: shape for i, shape in outer.items() if shape in exact}
        return tuple(updated_by(outer, results))

    def conditioning(
        self, graph: CompiledGraph, inputs: Sequence[Any], begins: bool, early: Set[Hashable]
    ) -> tuple[list[Any], frozenset[int]]:
        """The conditioning of a call, with `LATENT` in the place of latents, and which of it the forward itself has made.

        What an earlier graph of the same forward returned stands for that graph's own conditioning.

        Args:
            begins: whether a lane begins with this graph, so that what earlier graphs made is of another one.
            early: families of graphs that run before the step is known.
        """
        latents = self.latents(graph, inputs)
        values: list[Any] = [LATENT if i in latents else inputs[i] for i in graph.inputs.told]
        if not self._moving and len(self.graphs) < 2:
            return values, frozenset()
        inside: set[int] = set()
        for at, value in enumerate(values):
            if (told := self._moving.get(id(value))) is not None and told[0]() is value:
                values[at] = told[1]
                continue
            made = self.origin(value)
            if made is not None and (not begins or made[1] in early):
                values[at] = made[0]
            elif self._given is not None and isinstance(value, Tensor) and value.numel() > 1 and id(value) not in self._given:
                inside.add(at)  # one number may be a setting of the model, which Dynamo hands over as a tensor
        return values, frozenset(inside)


def _tensors(values: Iterable[Any], depth: int = 4) -> Iterator[Tensor]:
    """The tensors among values, in lists, tuples, dicts and the fields of objects too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value, depth)
        elif isinstance(value, dict):
            yield from _tensors(value.values(), depth)
        elif depth and not isinstance(value, (type, torch.nn.Module)) and (fields := getattr(value, "__dict__", None)):
            yield from _tensors(tuple(fields.values()), depth - 1)
