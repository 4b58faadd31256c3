"""Are these still the same weights? A number that changes when a weight does.

Identity and version of every parameter and buffer tell, and cost some 0.06 µs each. A weight that was moved, as offloading does, is
another object of the same value: that is found out by a sample of its bits, and is no change. What is written through `.data`
(as PEFT's merge does) shows in neither identity nor version; no value crosses generations, so it counts from the next one on.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import weakref
from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

__all__ = ["WeightsToken", "sample"]

SAMPLES = 16  # elements of a weight that are compared where it is another object

_version = attrgetter("_version")


class WeightsToken:
    """The weights of the graphs of one model, as far as they were seen."""

    def __init__(self) -> None:
        self.value = 0
        self._known: dict[object, _Weights] = {}

    def looked_at(self, graph: object, now: Hashable) -> bool:
        """Whether a graph's weights were looked at in this step."""
        known = self._known.get(graph)
        return known is not None and known.step == now

    def check(self, graph: object, kind: Hashable, weights: Sequence[Tensor], now: Hashable = None) -> int:
        """The token, after a look at what a graph receives. Waits for no device unless a weight is another object than before.

        Args:
            graph: whose weights these are.
            kind: graphs of one kind compute the same; one that Dynamo made anew goes on with the weights of the other.
            weights: its parameters and buffers, always in the same order.
            now: the step. A graph whose like ran in this very step is another block, not the other one made anew.
        """
        weights = tuple(weights)
        known = self._known.get(graph)
        if known is None:
            seen = _Weights(kind, weights)
            twin = next((w for w in self._known.values() if w.kind == kind), None)
            beside = twin is not None and now is not None and twin.step == now
            if twin is not None and not beside and not twin.holds(seen):
                self.value += 1
            self._known[graph] = seen
        elif not known.unchanged(weights):
            seen = _Weights(kind, weights, known)
            if seen.differs:
                self.value += 1
            self._known[graph] = seen
        self._known[graph].step = now
        return self.value


class _Weights:
    """Weights as they were once.

    Args:
        before: the same ones earlier: what is another object now is compared with it.
    """

    def __init__(self, kind: Hashable, weights: tuple[Tensor, ...], before: _Weights | None = None) -> None:
        self.kind = kind
        self.step: Hashable = None  # in which they were seen last
        self.ids, self.versions = list(map(id, weights)), _versions(weights)
        self._identities = _identities(weights)
        self.alive = True
        self.differs = False
        self._refs = [weakref.ref(w, self._died) for w in weights]  # an id may be given to another object
        if before is None:
            self._samples: list[Tensor] = [sample(w) for w in weights]
            return
        self._samples = list(before._samples)
        moved = []
        for i, weight in enumerate(weights):
            if self.ids[i] != before.ids[i] or before._refs[i]() is not weight:
                moved.append(i)
                self._samples[i] = sample(weight)
            elif self.versions[i] != before.versions[i]:  # written into
                self.differs = True
                self._samples[i] = sample(weight)
        if moved and not self.differs:
            now, then = (_on_host([of._samples[i] for i in moved]) for of in (self, before))
            self.differs = now != then

    def _died(self, _: Any) -> None:
        self.alive = False

    def unchanged(self, weights: tuple[Tensor, ...]) -> bool:
        return self.alive and _identities(weights) == self._identities and _versions(weights) == self.versions

    def holds(self, other: _Weights) -> bool:
        """Whether another graph's weights are these, in whatever order: the same objects, or objects of the same value."""
        mine = {(i, v) for i, v in zip(self.ids, self.versions, strict=True)} if self.alive else set()
        if all(key in mine for key in zip(other.ids, other.versions, strict=True)):
            return True
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
    """Bits of up to `SAMPLES` elements from all over a tensor, on its device, [n] uint8; waits for nothing."""
    with torch.no_grad():
        flat = weight.detach()
        if not flat.is_contiguous():
            flat = flat[tuple(slice(None, None, max(1, s // 4)) for s in flat.shape)].contiguous()
        flat = flat.reshape(-1)
        picked = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].clone(memory_format=torch.contiguous_format)
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
