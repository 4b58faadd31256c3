"""Which weights are these? A number that is another one for other weights.

Identity and version of every parameter and buffer tell, and cost some 0.06 µs each, at every call: a tensor that a model holds as an attribute
counts as a weight for Dynamo, and lanes may differ in it. Weights that were there before have the number that they had, so adapters may come
and go. A weight that was moved, as offloading does, is another object of the same value: that is found out by its bits, all of a small
tensor and a sample of a large one, and is no change. What is written through `.data` (as PEFT's merge does) shows in neither identity nor
version; no value crosses generations, so it counts from the next one on.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import sys
import weakref
from collections.abc import Hashable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

__all__ = ["WeightsToken", "sample"]

SAMPLES = 1024  # elements of a weight that are compared where it is another object
WHOLE = 4096  # elements of a weight that is compared whole
MOST = 100_000  # weights that are remembered

_version = attrgetter("_version")


class WeightsToken:
    """The weights of the graphs of one model, as far as they were seen."""

    def __init__(self) -> None:
        self._known: dict[object, dict[bytes, _Weights]] = {}  # of each graph, by identity, the last one at the end
        self._numbers = itertools.count()
        self._held = 0  # weights that are remembered

    def check(self, graph: object, kind: Hashable, weights: Sequence[Tensor], now: Hashable = None) -> tuple[int, bool]:
        """The number of the weights that a graph receives. Waits for no device unless a weight is another object than before.

        Args:
            graph: whose weights these are.
            kind: graphs of one kind compute the same; one that Dynamo made anew goes on with the weights of the other.
            weights: its parameters and buffers, always in the same order.
            now: the step. What was used in this very step is the weights of another block or lane, not these ones as they were.

        Returns also whether they were written into, or take the place of others: then nobody will come back to those.
        """
        weights = tuple(weights)
        own = self._known.setdefault(graph, {})
        identities = _identities(weights)
        known = own.get(identities)
        if known is not None and known.unchanged(weights):
            known.step = now
            return known.number, False
        seen = _Weights(kind, weights)
        seen.step = now
        written = known is not None and known.alive
        same, replaced = (None, True) if written else self._counterpart(graph, seen)
        seen.number = next(self._numbers) if same is None else same.number
        for old in (known, same):
            if old is not None and own.get(old.identities) is old:
                del own[old.identities]
                self._held -= len(weights)
        own[identities] = seen
        self._held += len(weights)
        while self._held > MOST and len(own) > 1:
            del own[next(iter(own))]
            self._held -= len(weights)
        return seen.number, replaced

    def _counterpart(self, graph: object, seen: _Weights) -> tuple[_Weights | None, bool]:
        """The weights from before that these are, and whether these are others that take the place of some."""

        def earlier(group: Iterable[_Weights]) -> list[_Weights]:
            return [w for w in group if seen.step is None or w.step != seen.step]

        own = earlier(reversed(self._known[graph].values()))
        if (moved := next((w for w in own if w.moved_to(seen)), None)) is not None:
            return moved, False
        groups = (group.values() for of, group in self._known.items() if of is not graph)
        twins = [w for w in itertools.chain(*groups) if w.kind == seen.kind]
        gone = earlier(twins)
        same = next((w for w in twins if w.holds(seen)), None) or next((w for w in gone if w.equals(seen)), None)
        return same, same is None and bool(own or gone)


class _Weights:
    """Weights as they were once."""

    def __init__(self, kind: Hashable, weights: tuple[Tensor, ...]) -> None:
        self.kind = kind
        self.number = -1
        self.step: Hashable = None  # in which they were seen last
        self.identities, self.versions = _identities(weights), _versions(weights)
        self.alive = True
        self._refs = [weakref.ref(w, self._died) for w in weights]  # an id may be given to another object
        self._samples = [sample(w) for w in weights]

    def _died(self, _: Any) -> None:
        self.alive = False

    def unchanged(self, weights: tuple[Tensor, ...]) -> bool:
        """Whether these are the weights. They have the same identities, as far as those tell."""
        return self.alive and _versions(weights) == self.versions

    def moved_to(self, other: _Weights) -> bool:
        """Whether the same graph's weights are these now: the same objects, not written into, or others of the same bits."""
        moved = []
        for i, (mine, its) in enumerate(zip(self._refs, other._refs, strict=True)):
            if mine() is not its():
                moved.append(i)
            elif self.versions[i] != other.versions[i]:
                return False
        now, then = (_on_host([of._samples[i] for i in moved]) for of in (other, self))
        return now == then

    def holds(self, other: _Weights) -> bool:
        """Whether another graph's weights are among these very objects, in whatever order."""
        mine = {(id(w), v) for ref, v in zip(self._refs, self.versions, strict=True) if (w := ref()) is not None}
        return all((id(ref()), v) in mine for ref, v in zip(other._refs, other.versions, strict=True))

    def equals(self, other: _Weights) -> bool:
        """Whether another graph's weights are among these by their bits."""
        return set(_on_host(other._samples)) <= set(_on_host(self._samples))


def _addresses(values: tuple[Any, ...]) -> bytes:
    """The addresses of a tuple's items, copied as they lie in CPython's tuple: a hundredth of the time of asking each for its id."""
    return ctypes.string_at(id(values) + tuple.__basicsize__, len(values) * _POINTER)


def _ids(values: tuple[Any, ...]) -> bytes:
    return struct.pack(f"{len(values)}P", *map(id, values))


_POINTER = struct.calcsize("P")
_probe = (object(), "", 1.5)
# Seen on CPython 3.11; where a tuple is laid out otherwise its items are asked.
_identities = _addresses if sys.implementation.name == "cpython" and _addresses(_probe) == _ids(_probe) else _ids


def _versions(weights: Sequence[Tensor]) -> list[int | None]:
    try:
        return list(map(_version, weights))
    except RuntimeError:  # inference tensors count none
        return [None if w.is_inference() else w._version for w in weights]


def sample(weight: Tensor) -> Tensor:
    """Bits of a small tensor, or of `SAMPLES` elements from all over a large one, on its device, [n] uint8; waits for nothing."""
    with torch.no_grad():
        flat = weight.detach()
        if not flat.is_contiguous():
            whole = flat.numel() <= WHOLE
            flat = flat if whole else flat[tuple(slice(None, None, max(1, s // 32)) for s in flat.shape)]
            flat = flat.contiguous()
        flat = flat.reshape(-1)
        every = 1 if flat.numel() <= WHOLE else flat.numel() // SAMPLES
        picked = flat[::every].clone(memory_format=torch.contiguous_format)
        if picked.is_complex():
            picked = torch.view_as_real(picked)
        return picked.contiguous().view(torch.uint8).reshape(-1)


def _on_host(samples: Sequence[Tensor]) -> list[bytes]:
    """The bits of samples; waits once for each device."""
    found = [b""] * len(samples)
    by_device: dict[torch.device, list[int]] = {}
    for i, one in enumerate(samples):
        by_device.setdefault(one.device, []).append(i)
    for members in by_device.values():
        flat = bytes(torch.cat([samples[i] for i in members]).tolist())
        at = 0
        for i in members:
            found[i] = flat[at : at + samples[i].numel()]
            at += samples[i].numel()
    return found
