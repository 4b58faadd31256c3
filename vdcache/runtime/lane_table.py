"""Which lane is this call? Told by what the call is conditioned on, never by the order of calls.

The inputs of a graph that are neither weights, nor the timestep, nor the latent (prompts, masks, position ids, guidance) stay the
same within a generation, and differ between its lanes. A call belongs to the lane whose conditioning it has: the same objects,
unchanged, or objects of equal value. A call with a conditioning that no lane has is a new lane, for which nothing is cached.

Inputs that depend on the timestep (residuals that another network computes from the latent) cannot be told from prompts by their
looks. They change at every step, so an input that changed at every step of the generation so far is left out, unless an object comes that
was there at another step: then it is a prompt of one of several requests.
Where the forward of the model is watched, what it makes itself (between two graphs) is told from what it is given, and says nothing
of the lane, unless the very object was there at an earlier step: then it is a part of the model's state.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vdcache.runtime.weights_token import counts_versions, sample

__all__ = ["LATENT", "Lane", "LaneQuery", "LaneTable", "RememberedInput", "compare"]

LATENT = object()  # stands for a latent among a call's inputs: it says nothing of the lane, and equals whatever was there
MOST_LANES = 64  # of a generation; the one that was seen longest ago goes


class RememberedInput:
    """An input as it was when a call brought it, as far as it takes to know it again.

    Inference tensors count no versions, so a copy of them is kept; likewise of memory that is not torch's own (a numpy array's), into which
    others write unseen, and of an object that its owner has written into before.

    Args:
        value: a tensor or a number.
        copied: keep a copy of the tensor's value.
        sampled: keep no more than some of its elements, because it is large and another one at every step.
        weak: know it by identity alone, without keeping it alive.
    """

    __slots__ = ("_copy", "_ref", "_value", "sampled", "version")

    def __init__(self, value: Any, *, copied: bool = False, sampled: bool = False, weak: bool = False) -> None:
        self._copy: Tensor | None = None
        self._ref: weakref.ref[Tensor] | None = None
        self._value: Any = value
        self.version: int | None = None
        self.sampled = sampled and isinstance(value, Tensor)
        if not isinstance(value, Tensor):
            return
        if counts_versions(value):
            self.version = value._version
        if weak:
            self._ref, self._value, self.sampled = weakref.ref(value), None, False
        elif self.sampled:
            self._copy, self._value = sample(value), None
        elif copied or self.version is None:
            self._copy = value.clone()

    @property
    def object(self) -> Any:
        """What the caller passed; None where it is gone."""
        return self._value if self._ref is None else self._ref()

    def is_same_object(self, value: Any) -> bool:
        """Whether `value` is this object and was not written into since. Numbers are compared by value; `LATENT` matches anything."""
        if value is LATENT:
            return True
        if isinstance(value, Tensor):
            return self.object is value and self.version is not None and value._version == self.version
        return type(value) is type(self._value) and bool(value == self._value)

    def written(self, value: Any) -> bool:
        """Whether `value` is the very object, and its owner has written into it since (or may have)."""
        return isinstance(value, Tensor) and self.object is value and not self.is_same_object(value)

    def earlier(self) -> Tensor | None:
        """The value that it had; None where nobody knows it any more."""
        if self._copy is not None:
            return self._copy
        value = self.object
        return value if isinstance(value, Tensor) and self.version is not None and value._version == self.version else None


def compare(held: RememberedInput, value: Any) -> bool | Tensor:
    """Whether `value` equals what was held, as far as that was kept. A tensor of one bool where only a device knows."""
    if held.is_same_object(value):
        return True
    before = held.earlier()
    if before is None or not isinstance(value, Tensor):
        return False
    if held.sampled:
        value = sample(value)
    if before.shape != value.shape or before.dtype != value.dtype or before.device != value.device:
        return False
    if value.device.type == "cpu":
        return torch.equal(before, value)
    return (before == value).all()


@dataclass(eq=False)
class Lane:
    """One conditioning.

    Args:
        id: unique in this process: part of the key of what is cached.
        label: the number that a person sees.
        held: the conditioning inputs as the last call brought them.
        step: in which the lane was seen last.
    """

    id: int
    label: int
    held: list[RememberedInput]
    step: int


@dataclass(slots=True)
class LaneQuery:
    """The conditioning of one call beside that of every lane, not yet decided.

    Args:
        values: the conditioning inputs.
        lane: the lane, where the very objects tell it.
        equal: for each lane, whether each input is equal; tensors where a device must be read first. Of a lane that the objects
            tell only those inputs that move are asked for.
    """

    values: Sequence[Any]
    inside: frozenset[int] = frozenset()  # inputs that the forward itself has made
    lane: Lane | None = None
    equal: list[tuple[Lane, list[bool | Tensor]]] = field(default_factory=list)

    def unread(self) -> list[Tensor]:
        """What must be read from a device."""
        return [e for _, row in self.equal for e in row if isinstance(e, Tensor)]

    def told(self, answers: Sequence[bool]) -> None:
        """What was read, in the order of `unread`."""
        rest = iter(answers)
        self.equal = [(lane, [next(rest) if isinstance(e, Tensor) else e for e in row]) for lane, row in self.equal]


class LaneTable:
    """The lanes of one kind of graph in one generation.

    Args:
        label: gives the next new lane its number.
    """

    def __init__(self, label: Callable[[], int]) -> None:
        self._label = label
        self._lanes: list[Lane] = []
        self._generation, self._step = -1, -1
        self._still: set[int] = set()  # inputs that had the value of the step before, in this step
        self._changed: set[int] = set()
        self._always: frozenset[int] | None = None  # inputs that changed at every step so far; None before the second one
        self._moves: frozenset[int] = frozenset()  # inputs that depend on the timestep, as the steps before have shown
        self._stayed: frozenset[int] = frozenset()  # inputs made inside whose very object was there at an earlier step
        self._rewritten: set[int] = set()  # inputs whose objects their owner writes into
        # Of each input, the objects that were held lately: version, and the generation and step that each came at first.
        self._met: dict[int, dict[int, tuple[weakref.ref[Tensor], int, int, int]]] = {}

    @property
    def moving(self) -> frozenset[int]:
        """The inputs that depend on the timestep, as far as is known: they say nothing of the lane."""
        return self._moves - self._still if self._moves else self._moves

    def ask(self, values: Sequence[Any], inside: frozenset[int] = frozenset()) -> LaneQuery:
        """Compare a call's conditioning with that of every lane. Reads no value of a device.

        Args:
            values: of the conditioning inputs, always in the same order.
            inside: those that the forward itself has made.
        """
        if not self._moves and not inside:
            same = [lane for lane in self._lanes if all(map(RememberedInput.is_same_object, lane.held, values))]
            if same:  # by far the most calls
                return LaneQuery(values, inside, same[0] if len(same) == 1 else _newest(same))
        inside -= self._stayed
        self._still.update(i for i in self.moving if self._comes_again(i, values[i]))
        moving = self.moving | inside
        asked = [i for i in range(len(values)) if i not in moving]
        same = [lane for lane in self._lanes if all(lane.held[i].is_same_object(values[i]) for i in asked)]
        question = LaneQuery(values, inside, _newest(same))
        if same and not moving:
            return question
        compared = moving if same else range(len(values))
        for lane in self._lanes:
            self._rewritten.update(i for i in asked if lane.held[i].written(values[i]))
            question.equal.append((lane, [compare(lane.held[i], v) if i in compared else True for i, v in enumerate(values)]))
        return question

    def known(self, question: LaneQuery) -> Lane | None:
        """The lane of a call, if there is one. `question` must have been told what was unread."""
        moving = self.moving | question.inside
        known = [question.lane] if question.lane is not None else []
        if not known:
            known = [lane for lane, row in question.equal if all(e for i, e in enumerate(row) if i not in moving)]
        known = [lane for lane in known if lane in self._lanes]
        return _newest(known)

    def settle(self, question: LaneQuery, generation: int, step: int) -> tuple[Lane, bool]:
        """The lane of a call, and whether it is new. `question` must have been told what was unread.

        Args:
            generation, step: where the call stands.
        """
        if generation != self._generation or step != self._step:
            self._at(generation, step)
        values, found = question.values, question.lane
        if found is None or found not in self._lanes:
            found = self.known(question)
        if self._always is None or self._always:  # something may still turn out to move
            self._learn(question)
        if found is not None and found is question.lane and not self._moves and not question.inside:
            found.step = step
            return found, False
        if found is None:
            if len(self._lanes) >= MOST_LANES:
                self._lanes.remove(min(self._lanes, key=lambda lane: lane.step))
            held = [self._hold(i, v, question) for i, v in enumerate(values)]
            found = Lane(next(_ids), self._label_of_new(question), held, step)
            self._lanes.append(found)
            return found, True
        self._renew(found, question, step)
        found.step = step
        return found, False

    def _renew(self, lane: Lane, question: LaneQuery, step: int) -> None:
        """Remember the inputs of a lane as this call has brought them."""
        for i, value in enumerate(question.values):
            held = lane.held[i]
            if i in question.inside and lane.step < step and held.is_same_object(value):
                self._stayed |= {i}
            # Of an inference tensor the copy is what counts, and it is equal.
            if i in question.inside or (not held.is_same_object(value) and (held.version is not None or held.sampled)):
                lane.held[i] = self._hold(i, value, question)

    def _hold(self, i: int, value: Any, question: LaneQuery) -> RememberedInput:
        weak = i in question.inside and i not in self._stayed and isinstance(value, Tensor)
        if isinstance(value, Tensor) and not value.is_inference() and i not in question.inside:
            met = self._met.setdefault(i, {})
            known = met.get(id(value))
            if known is None or known[0]() is not value or known[1] != value._version:
                met[id(value)] = weakref.ref(value), value._version, self._generation, self._step
            if len(met) > MOST_LANES:
                del met[next(iter(met))]
        return RememberedInput(value, copied=i in self._rewritten, sampled=i in self.moving, weak=weak)

    def clear(self) -> None:
        """Let go of every lane; what is known of the inputs stays."""
        self._lanes.clear()

    def gone(self, step: int) -> list[int]:
        """Forget the lanes that were seen last before `step`, and return their ids."""
        left = [lane.id for lane in self._lanes if lane.step < step]
        self._lanes = [lane for lane in self._lanes if lane.step >= step]
        return left

    def _label_of_new(self, question: LaneQuery) -> int:
        """A person's number of a new lane: that of the lane it goes on, where an input that may depend on the timestep has changed."""
        if self._always is None:
            taken = {lane.label for lane in self._lanes if lane.step == self._step}
            for lane, row in question.equal:
                if lane.step == self._step - 1 and lane.label not in taken and any(row):
                    return lane.label
        return self._label()

    def _learn(self, question: LaneQuery) -> None:
        """Note which inputs kept the value that they had in the step before."""
        before = [lane for lane in self._lanes if lane.step == self._step - 1]
        if not before:
            return
        rows = [row for lane, row in question.equal if lane.step == self._step - 1]
        for i, value in enumerate(question.values):
            if i in question.inside:
                continue
            was_there = any(lane.held[i].is_same_object(value) for lane in before) or any(row[i] for row in rows)
            if was_there or self._comes_again(i, value):
                self._still.add(i)
            elif question.lane is None or i in self._moves:
                self._changed.add(i)

    def _comes_again(self, i: int, value: Any) -> bool:
        """Whether this very object was there before, at another step than one that would bring it in every generation."""
        if not isinstance(value, Tensor) or value.is_inference():
            return False
        met = self._met.get(i, {}).get(id(value))
        if met is None or met[0]() is not value or value._version != met[1]:
            return False
        _, _, generation, step = met
        return step < self._step if generation == self._generation else step not in (self._step, self._step + 1)

    def _at(self, generation: int, step: int) -> None:
        """Be at a step: what the last one showed is known now."""
        if generation != self._generation:
            self._close()
            self._lanes.clear()
            self._generation, self._step, self._always = generation, step, None
            self._moves = frozenset()  # learnt anew, so that equal generations have equal outputs
        elif step != self._step:
            self._close()
            self._step = step

    def _close(self) -> None:
        if self._still or self._changed:
            changed = (self._changed | self._moves) - self._still
            self._always = frozenset(changed if self._always is None else self._always & changed)
            self._moves = self._always
        self._still, self._changed = set(), set()


_ids = itertools.count()


def _newest(lanes: Sequence[Lane]) -> Lane | None:
    """The lane that was seen last."""
    return max(lanes, key=lambda lane: lane.step, default=None)
