"""What depends on no latent, held from call to call: whose values they are, and when they count.

A value belongs to the weights, the shapes and the graph of its call (as every cached value does), and to the inputs that it was computed
from: a timestep by its exact bits, a prompt by what it holds. It outlives its generation, and so it is held to more than cached values
are, because what is written through `.data` shows in neither identity nor version: a prompt is compared by value once a generation, and
the weights behind a value by sums over all of their bits once a generation and wherever other objects bring them. In doubt nothing is
held, and the value is computed.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vdcache.runtime.call import CallKey
from vdcache.runtime.lane_table import RememberedInput, compare
from vdcache.runtime.read import DeviceReads
from vdcache.runtime.store import has_own_memory

__all__ = ["HeldValues", "InvariantTables", "ValueGroup", "weight_sums"]

MOST_BYTES = 2**30  # of all that is held by one session
MOST_PROMPTS = 64  # of one group, at one timestep
MOST_TIMESTEPS = 1024  # of one group
MOST_WEIGHTS = 8  # sets of weights, shapes and graphs
MOVING = 8  # calls in a row, more than a step has lanes, that bring another prompt: then it is none
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
CHECKS = 4  # times in one generation that other objects bring the weights: then they are brought anew at every call


class ValueGroup(Protocol):
    """Values that depend on the same inputs, as `passes.InvariantGroup`: positions of inputs."""

    @property
    def name(self) -> str: ...
    @property
    def timesteps(self) -> tuple[int, ...]: ...
    @property
    def prompts(self) -> tuple[int, ...]: ...
    @property
    def static(self) -> tuple[int, ...]: ...


@dataclass(eq=False, slots=True)
class HeldValues:
    """Values of one group for the same inputs, by name.

    Args:
        inputs: the prompt's inputs, as they were.
        generation: in which those were compared by value last, or the value was made.
        used: the generation that used it last.
    """

    inputs: list[RememberedInput]
    generation: int
    used: int
    values: dict[str, Tensor] = field(default_factory=dict)
    kept: bool = True
    bytes: int = 0


@dataclass(eq=False, slots=True)
class _Table:
    """What is held of one group, for one set of weights and shapes."""

    by_timestep: dict[Hashable, list[HeldValues]] = field(default_factory=dict)
    sums: list[Tensor] = field(default_factory=list)
    checked: tuple[object, int] = (None, -2)  # the weights, as objects, and the generation
    checks: int = 0  # in this generation
    summed: int = -1  # the call in which `sums` were taken last
    missed: int = 0  # calls in a row with another prompt


class InvariantTables:
    """The held values of one session.

    Args:
        reads: waits for devices.
    """

    def __init__(self, reads: DeviceReads) -> None:
        self._reads = reads
        self._scopes: dict[Hashable, dict[str, _Table]] = {}
        self._of_key: dict[CallKey, dict[str, _Table]] = {}  # one look-up a call; of this generation
        self._scope: dict[str, _Table] | None = None  # of the call that runs now; None where nothing may be held
        self._weights: object = None
        self._generation = -1
        self._numerics: Hashable = None
        self._call = 0
        self.hits = self.misses = 0

    def place(self, key: CallKey, follows: bool, generation: int, weights: object) -> None:
        """A call begins.

        Args:
            follows: its step is known.
            generation: in which it stands.
            weights: tells the objects that its weights are, while they are alive and not written into.
        """
        if generation != self._generation:
            self._generation = generation
            self._of_key.clear()
            if (numerics := _numerics()) != self._numerics:
                self.clear()
                self._numerics = numerics
        self._weights = weights
        self._call += 1
        if not follows:
            self._scope = None
            return
        if (scope := self._of_key.get(key)) is None:
            own = key.graph, key.weights, key.forms
            scope = self._scopes.pop(own, {})
            self._scopes[own] = self._of_key[key] = scope
            if len(self._scopes) > MOST_WEIGHTS:
                gone = self._scopes.pop(next(iter(self._scopes)))
                self._of_key = {k: s for k, s in self._of_key.items() if s is not gone}
        self._scope = scope

    def find(self, group: ValueGroup, inputs: Sequence[Any]) -> HeldValues:
        """What is held for the inputs of a call; new and empty where nothing is. `keep` is told what was computed then."""
        if self._scope is None:
            return self._nothing()
        if (table := self._scope.get(group.name)) is None:
            table = self._scope[group.name] = _Table()
        if table.checked != (self._weights, self._generation) and not self._check(table, group, inputs):
            return self._nothing()
        if table.missed > MOVING:
            return self._nothing()
        timestep = self._bits([inputs[i] for i in group.timesteps]) if group.timesteps else ()
        entries = table.by_timestep.get(timestep)
        values = [inputs[i] for i in group.prompts]
        if entries is not None and (found := self._matching(entries, values)) is not None:
            found.used = self._generation
            self.hits += 1
            table.missed = 0
            return found
        self.misses += 1
        table.missed += bool(values)
        if table.missed > MOVING:
            table.by_timestep.clear()
            return self._nothing()
        if table.summed != self._call:  # a value is held for the weights that it is computed from, whatever came before
            self._take_sums(table, group, inputs)
            entries = table.by_timestep.get(timestep)
        if entries is None:
            if len(table.by_timestep) >= MOST_TIMESTEPS and not self._make_room(table):
                return self._nothing()
            entries = table.by_timestep[timestep] = []
        if len(entries) >= MOST_PROMPTS:
            entries.remove(min(entries, key=lambda e: e.used))
        made = HeldValues([RememberedInput(v, copied=True) for v in values], self._generation, self._generation)
        entries.append(made)
        return made

    def _nothing(self) -> HeldValues:
        """For values that serve one call alone."""
        return HeldValues([], self._generation, self._generation, kept=False)

    def keep(self, held: HeldValues, inputs: Sequence[Any], values: dict[str, Tensor]) -> None:
        """Hold what was computed for the inputs of a call. What shares memory with those is copied: their owner may write into it."""
        if not held.kept:
            held.values.update(values)  # for this call alone
            return
        foreign = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}
        values = {name: _own(value, foreign) for name, value in values.items()}
        held.values.update(values)
        held.bytes += sum(v.numel() * v.element_size() for v in values.values())
        if self.bytes() > MOST_BYTES:
            self._shrink(held)

    def _matching(self, entries: list[HeldValues], values: Sequence[Any]) -> HeldValues | None:
        """The entry that was computed from these inputs."""
        now = self._generation
        for entry in entries:
            if entry.generation == now and all(map(RememberedInput.is_same_object, entry.inputs, values)):
                return entry
        for entry in reversed(entries):
            answers = [_same_value(held, value) for held, value in zip(entry.inputs, values, strict=True)]
            if any(a is False for a in answers):
                continue
            unknown = [a for a in answers if isinstance(a, Tensor)]
            if unknown and not all(n[0] for n in self._reads.read(unknown)):
                continue
            entry.inputs = [
                held if held.is_same_object(value) else RememberedInput(value, copied=True)
                for held, value in zip(entry.inputs, values, strict=True)
            ]
            entry.generation = now
            return entry
        return None

    def _check(self, table: _Table, group: ValueGroup, inputs: Sequence[Any]) -> bool:
        """Compare the weights with those that the values of a group were computed from. False where nothing is to be held."""
        table.checks = table.checks + 1 if table.checked[1] == self._generation else 1
        if table.checked[1] != self._generation:
            table.missed = 0
        table.checked = (self._weights, self._generation)
        if table.checks > CHECKS:
            table.checked = (None, self._generation)
            table.by_timestep.clear()
            return False
        self._take_sums(table, group, inputs)
        return True

    def _take_sums(self, table: _Table, group: ValueGroup, inputs: Sequence[Any]) -> None:
        """Let go of what was computed from other weights."""
        sums = [weight_sums(inputs[i]) for i in group.static if isinstance(inputs[i], Tensor)]
        if table.by_timestep and not self._equal(table.sums, sums):
            table.by_timestep.clear()
        table.sums, table.summed = sums, self._call

    def _equal(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
        if len(before) != len(now):
            return False
        if any(a.shape != b.shape or a.device != b.device for a, b in zip(before, now, strict=True)):
            return False
        unknown = []
        for a, b in zip(before, now, strict=True):
            if a.device.type != "cpu":
                unknown.append((a == b).all())
            elif not torch.equal(a, b):
                return False
        return not unknown or all(n[0] for n in self._reads.read(unknown))

    def _bits(self, values: Sequence[Any]) -> Hashable:
        """The exact bits of timesteps."""
        found: list[Hashable] = []
        for value in values:
            if not isinstance(value, Tensor):
                found.append((type(value), _float64(value) if isinstance(value, float) else value))
                continue
            if value.numel() == 1:  # read as float64, which holds every smaller float
                if value.device.type != "cpu":
                    self._reads.syncs += 1
                number = value.item()
                found.append((value.dtype, value.shape, _float64(number) if isinstance(number, float) else number))
                continue
            flat = value.detach()
            if value.device.type != "cpu":
                self._reads.syncs += 1
                flat = flat.cpu()
            raw = flat.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found.append((value.dtype, value.shape, raw))
        return tuple(found)

    # ---- how much is held ----------------------------------------------------------------------------------------------

    def entries(self) -> list[tuple[_Table, Hashable, HeldValues]]:
        return [
            (table, timestep, entry)
            for scope in self._scopes.values()
            for table in scope.values()
            for timestep, entries in table.by_timestep.items()
            for entry in entries
        ]

    def bytes(self) -> int:
        """Bytes held now."""
        return sum(entry.bytes for _, _, entry in self.entries())

    def _make_room(self, table: _Table) -> bool:
        """Let go of timesteps that neither this generation nor the one before has used. A schedule that is longer than the table would
        else push out each value right before it is needed."""
        old = [t for t, entries in table.by_timestep.items() if all(e.used < self._generation - 1 for e in entries)]
        for timestep in old:
            del table.by_timestep[timestep]
        return bool(old)

    def _shrink(self, newest: HeldValues) -> None:
        """Let go of what was not used lately; where all of it was, of the newest."""
        for table, timestep, entry in sorted(self.entries(), key=lambda found: found[2].used):
            if self.bytes() <= MOST_BYTES:
                return
            if entry.used < self._generation - 1:
                self._drop(table, timestep, entry)
        for table, timestep, entry in self.entries():
            if entry is newest and self.bytes() > MOST_BYTES:
                self._drop(table, timestep, entry)

    @staticmethod
    def _drop(table: _Table, timestep: Hashable, entry: HeldValues) -> None:
        own = table.by_timestep[timestep]
        own.remove(entry)
        if not own:
            del table.by_timestep[timestep]

    def clear(self) -> None:
        """Hold nothing."""
        self._scopes.clear()
        self._of_key.clear()
        if self._scope is not None:
            self._scope = {}


_float64 = struct.Struct("d").pack


def _same_value(held: RememberedInput, value: Any) -> bool | Tensor:
    """Whether an input has the value that it had: by its bits, whatever object brings it."""
    before = held.earlier()
    if before is None or not isinstance(value, Tensor):
        return compare(held, value)
    if before.shape != value.shape or before.dtype != value.dtype or before.device != value.device:
        return False
    if before.stride() != value.stride():  # kernels may add up in another order
        return False
    whole = _INTEGERS.get(value.element_size())
    if whole is None or value.layout is not torch.strided:
        return compare(held, value)
    a, b = before.detach().view(whole), value.detach().view(whole)  # −0.0 is not 0.0
    return torch.equal(a, b) if value.device.type == "cpu" else (a == b).all()


def _own(value: Tensor, foreign: set[int]) -> Tensor:
    if has_own_memory(value, foreign):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)


def weight_sums(weight: Tensor) -> Tensor:
    """Sums over all bits of a weight, by rows and by columns, [n] int64 on its device: as good as equal sums mean equal weights. Waits for
    nothing.
    """
    with torch.no_grad():
        flat = weight.detach()
        if flat.is_complex():
            flat = torch.view_as_real(flat)
        flat = flat.contiguous().reshape(-1).view(torch.uint8)
        whole = flat.numel() // 8 * 8
        words = flat[:whole].view(torch.int64)
        width = 1 << max(0, words.numel().bit_length() // 2)
        rows = words.numel() // width
        table = words[: rows * width].reshape(rows, width)
        return torch.cat([table.sum(0), table.sum(1), words[rows * width :], flat[whole:].to(torch.int64)])


def _numerics() -> Hashable:
    """Settings of the process on which the bits of a result depend."""
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.backends.mkldnn.enabled,
    )
