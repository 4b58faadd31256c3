"""Which weights are these? A number that is another one for other weights.

Identity and version of every parameter and buffer tell, and cost some 0.06 µs each, at every call: a tensor that a model holds as an attribute
counts as a weight for Dynamo, and lanes may differ in it. Other objects are compared by their bits, all of a small tensor, a sum over one
of middle size, and a sample of a large one. So a weight that was moved, as offloading does, is the same one, and weights that come back have
the number that they had: adapters may come and go. What is written through `.data` (as PEFT's merge does) shows in neither identity
nor version; no value crosses generations, so it counts from the next one on.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
import sys
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WeightsToken", "counts_versions", "sample"]

SAMPLES = 1024  # elements of a large weight that are compared where it is another object
WHOLE = 4096  # elements of a weight that is compared whole
SUMMED = 2**18  # elements of a weight that is summed up besides
MOST = 100_000  # weights that are remembered


class WeightsToken:
    """The weights of the graphs of one model, as far as they were seen."""

    def __init__(self) -> None:
        self._known: dict[object, dict[bytes, _Weights]] = {}  # of each graph, by identity
        self._last: dict[object, _Weights] = {}  # of each graph, at its last call
        self._numbers: dict[Hashable, int] = {}  # by graph and bits in order, and by kind of graph and bits in any order
        self._count = itertools.count()
        self._samples: dict[int, _Sample] = {}  # of the weights that are alive, by address
        self._held = 0  # weights that are remembered
        self.current: object = (
            None  # stands for the objects that the last call's weights are, as long as nobody wrote into them
        )

    def check(self, graph: object, kind: Hashable, weights: Sequence[Tensor], now: Hashable = None) -> tuple[int, bool]:
        """The number of the weights that a graph receives. Waits for no device unless a weight is another object than before.

        Args:
            graph: whose weights these are.
            kind: graphs of one kind compute the same; one that Dynamo made anew goes on with the weights of the other.
            weights: its parameters and buffers, always in the same order.
            now: the step.

        Returns also whether they were written into, or are new ones in the place of others: then nobody will come back to those.
        """
        weights = tuple(weights)
        own = self._known.setdefault(graph, {})
        identities, known = _identities(weights), self._last.get(graph)
        if known is None or known.identities != identities:  # to look so many bytes up takes longer than to compare them
            known = own.get(identities)
        if known is not None and known.unchanged(weights):
            known.step, self._last[graph], self.current = now, known, known
            return known.number, False
        seen = _Weights(weights, [self._sampled(w) for w in weights])
        seen.step, self.current = now, seen
        in_order, in_any = seen.contents()
        number = self._numbers.get((graph, in_order))
        if number is None and not own:  # Dynamo hands over the weights of a graph that it makes anew in another order
            number = self._numbers.get((kind, in_any))
        written = known is not None and known.alive and not known.differs_by_look(weights)
        # What was used in this very step is the weights of another block or lane, and is still there.
        replaced = written or (number is None and any(now is None or w.step != now for w in own.values()))
        seen.number = number = next(self._count) if number is None or written else number
        self._numbers[graph, in_order] = self._numbers[kind, in_any] = number
        self._last[graph] = seen
        self._remember(own, seen, known)
        return number, replaced

    def _remember(self, own: dict[bytes, _Weights], seen: _Weights, known: _Weights | None) -> None:
        """Take the place of what a graph's weights were, and let go of those that are no more."""
        count = len(seen.versions)
        for old in [w for w in own.values() if w is known or not w.alive]:
            del own[old.identities]
            self._held -= count
        own[seen.identities] = seen
        self._held += count
        while self._held > MOST and len(own) > 1:
            del own[next(iter(own))]
            self._held -= count
        if len(self._numbers) > MOST:
            self._numbers.clear()  # weights that come back are computed once more

    def _sampled(self, weight: Tensor) -> _Sample:
        """The sample of a weight, taken once for each version of it."""
        found = self._samples.get(id(weight))
        if found is None or found.ref() is not weight or found.version is None or found.version != _version_of(weight):
            found = _Sample(weight, functools.partial(_forget, self._samples, id(weight)))
            self._samples[id(weight)] = found
        return found


class _Sample:
    """Some bits of a weight, on its device until they are asked for."""

    def __init__(self, weight: Tensor, died: Callable[[Any], None]) -> None:
        self.ref = weakref.ref(weight, died)
        self.version = _version_of(weight)
        self._bits: Tensor | None = sample(weight)
        self._bytes = b""

    @staticmethod
    def bytes_of(samples: Sequence[_Sample]) -> list[bytes]:
        """The bits of each; waits once for each device whose bits are not known yet."""
        unread = [s for s in samples if s._bits is not None]
        for one, bits in zip(unread, _on_host([s._bits for s in unread if s._bits is not None]), strict=True):
            one._bytes, one._bits = bits, None
        return [s._bytes for s in samples]


def _forget(samples: dict[int, _Sample], at: int, ref: Any) -> None:
    if (found := samples.get(at)) is not None and found.ref is ref:
        del samples[at]


class _Weights:
    """Weights as they were once."""

    def __init__(self, weights: tuple[Tensor, ...], samples: list[_Sample]) -> None:
        self.number = -1
        self.step: Hashable = None  # in which they were seen last
        self.identities, self.versions = _identities(weights), _versions(weights)
        self.alive = True
        self._refs = [weakref.ref(w, self._died) for w in weights]  # an id may be given to another object
        self._samples = samples
        # Others may write into these unseen: they are looked at. Parameters are trusted, for a model may hold a thousand of them.
        self._unsure = [i for i, w in enumerate(weights) if not isinstance(w, nn.Parameter) and not counts_versions(w)]

    def _died(self, _: Any) -> None:
        self.alive = False

    def unchanged(self, weights: tuple[Tensor, ...]) -> bool:
        """Whether these are the weights. They have the same identities, as far as those tell."""
        return self.alive and _versions(weights) == self.versions and not (self._unsure and self.differs_by_look(weights))

    def differs_by_look(self, weights: tuple[Tensor, ...]) -> bool:
        """Whether one of those that count no version has other bits now."""
        if not self._unsure:
            return False
        before = _Sample.bytes_of([self._samples[i] for i in self._unsure])
        return before != _on_host([sample(weights[i]) for i in self._unsure])

    def contents(self) -> tuple[int, int]:
        """Hashes of all bits: in the order of the weights, and in whatever order."""
        bits = _Sample.bytes_of(self._samples)
        return hash(tuple(bits)), hash(tuple(sorted(bits)))


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
        return [w._version for w in weights]
    except RuntimeError:  # inference tensors count none
        return [None if w.is_inference() else w._version for w in weights]


def _version_of(weight: Tensor) -> int | None:
    return weight._version if counts_versions(weight) else None


def counts_versions(value: Tensor) -> bool:
    """Whether who writes into a tensor counts a version: inference tensors count none, and numpy's memory is not torch's."""
    if value.is_inference():
        return False
    return not value.is_cpu or value.layout is not torch.strided or value.untyped_storage().resizable()


def sample(weight: Tensor) -> Tensor:
    """Bits of a small tensor, or of `SAMPLES` elements from all over a larger one and sums over one of middle size, on its device,
    [n] uint8; waits for nothing.
    """
    with torch.no_grad():
        flat = weight.detach()
        if flat.numel() > SUMMED and not flat.is_contiguous():
            flat = flat[tuple(slice(None, None, max(1, s // 32)) for s in flat.shape)]
        flat = flat.contiguous().reshape(-1)
        if flat.is_complex():
            flat = torch.view_as_real(flat).reshape(-1)
        picked = flat[:: 1 if flat.numel() <= WHOLE else flat.numel() // SAMPLES].clone(memory_format=torch.contiguous_format)
        bits = picked.view(torch.uint8).reshape(-1)
        if not WHOLE < flat.numel() <= SUMMED:
            return bits
        numbers = _words(flat)
        # Sums go round at 64 bits. An odd factor loses no bit of a word; an even one would lose its highest.
        factors = torch.arange(1, 2 * numbers.numel(), 2, device=numbers.device)
        sums = torch.stack([numbers.sum(), (numbers * factors).sum()])
        return torch.cat([bits, sums.view(torch.uint8)])


def _words(flat: Tensor) -> Tensor:
    """The bits of a tensor as the longest whole numbers that its size is a multiple of: eight bytes at a time are summed in a sixth of the
    time of one at a time."""
    size = flat.numel() * flat.element_size()
    word = next((d for d in (torch.int64, torch.int32) if size % d.itemsize == 0), torch.uint8)
    flat = flat.clone() if flat.storage_offset() else flat  # no word begins in the middle of memory's
    return flat.view(word).to(torch.int64)


def _on_host(samples: Sequence[Tensor]) -> list[bytes]:
    """The bits of samples; waits once for each device."""
    found = [b""] * len(samples)
    by_device: dict[torch.device, list[int]] = {}
    for i, one in enumerate(samples):
        by_device.setdefault(one.device, []).append(i)
    for members in by_device.values():
        flat = torch.cat([samples[i] for i in members]).cpu().numpy().tobytes()
        at = 0
        for i in members:
            found[i] = flat[at : at + samples[i].numel()]
            at += samples[i].numel()
    return found
