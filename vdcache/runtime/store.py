"""Cached tensors: whose they are and how large they are. When they go `ComputedSteps` says."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["Store", "has_own_memory", "storage_bytes"]


class Store:
    """Tensors by (graph, lane, shapes of the inputs) and slot.

    The store owns what it keeps: a value that shares storage with something else, or is part of a larger buffer,
    is copied when it is put in, because its owner may write into it (the caller into an output, a replayed CUDA graph into a
    buffer).
    """

    def __init__(self) -> None:
        self.budget: int | None = None  # bytes of the device that values may take
        self.refused: set[Hashable] = set()  # keys whose values did not fit
        self.on_host = False  # values of a GPU are kept in main memory, and brought back where they are read
        self._values: dict[Hashable, dict[str, Tensor]] = {}
        self._aside: dict[Hashable, dict[str, torch.device]] | None = None  # where they are to be, while they are not
        self.peak_bytes = 0

    def get(self, key: Hashable, slots: Sequence[str]) -> list[Tensor] | None:
        """The values of `slots`, or None unless all are there."""
        try:
            held = self._values[key]
            found = [held[s] for s in slots]
        except KeyError:
            return None
        return [_back(v) for v in found] if self.on_host else found

    def put(
        self,
        key: Hashable,
        slots: Sequence[str],
        values: Sequence[Tensor],
        others: Iterable[object],
        rows: tuple[int, int] | None = None,
    ) -> bool:
        """Keep `values`, unless that would take more than the budget: then nothing of the key is kept. Whether they are kept.

        Args:
            others: tensors that the caller holds as well (inputs and outputs of the call).
            rows: first row and number of rows where the values are parts of what is kept already: the other rows stay.
        """
        if not slots:
            return True
        if self.budget is not None and self._more(key, slots, values, rows) > self.budget:
            self.drop(key)
            self.refused.add(key)
            return False
        foreign = {_address(o) for o in others if isinstance(o, Tensor)}
        held = self._values.setdefault(key, {})
        for slot, value in zip(slots, values, strict=True):
            if rows is not None and slot in held and value.shape != held[slot].shape:
                held[slot].narrow(0, *rows).copy_(value)
                continue
            if self.on_host and value.device.type != "cpu":
                held[slot] = _away(value)
                continue
            held[slot] = (
                value
                if has_own_memory(value, foreign) and value.is_contiguous()
                else value.clone(memory_format=torch.contiguous_format)
            )
        self.peak_bytes = max(self.peak_bytes, self.bytes())
        return True

    def _more(self, key: Hashable, slots: Sequence[str], values: Sequence[Tensor], rows: tuple[int, int] | None) -> int:
        """Bytes that would be held on the device with these values."""
        held = self._values.get(key, {})
        elsewhere = [t for k, own in self._values.items() for slot, t in own.items() if k != key or slot not in slots]
        parts = [v if rows is None or slot not in held else held[slot] for slot, v in zip(slots, values, strict=True)]
        new = sum(v.numel() * v.element_size() for v in parts if not (self.on_host and v.device.type != "cpu"))
        return storage_bytes(_here(elsewhere)) + new

    def drop(self, key: Hashable | None = None, *, but: Collection[str] = ()) -> None:
        """Free the values of one key, or all.

        Args:
            but: slots of the key that stay.
        """
        if key is None:
            self._values.clear()
            self.refused.clear()
        elif held := {slot: v for slot, v in self._values.pop(key, {}).items() if slot in but}:
            self._values[key] = held

    def put_aside(self) -> None:
        """Move all values to main memory until `bring_back`."""
        if self._aside is None:
            self._aside = {key: {slot: v.device for slot, v in held.items()} for key, held in self._values.items()}
            self._values = {key: {slot: v.cpu() for slot, v in held.items()} for key, held in self._values.items()}

    def bring_back(self) -> None:
        """Move what was put aside to where it was."""
        if (devices := self._aside) is not None:
            self._values = {k: {slot: v.to(devices[k][slot]) for slot, v in held.items()} for k, held in self._values.items()}
            self._aside = None

    def keys(self) -> list[Hashable]:
        """The keys under which something is held."""
        return list(self._values)

    def bytes(self, *, but: Collection[Hashable] = ()) -> int:
        """Bytes of storage held now, main memory of a GPU's values left out.

        Args:
            but: keys that do not count.
        """
        return storage_bytes(_here(t for key, held in self._values.items() if key not in but for t in held.values()))

    def __len__(self) -> int:
        return sum(len(held) for held in self._values.values())


def has_own_memory(value: Tensor, foreign: Collection[int]) -> bool:
    """Whether nothing but `value` needs its storage.

    Args:
        foreign: addresses of storages that others hold as well.
    """
    storage = value.untyped_storage()
    return storage.data_ptr() not in foreign and storage.nbytes() <= value.numel() * value.element_size()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


_HOME = "vdcache_home"  # the device that a value belongs to which is kept in main memory


def _away(value: Tensor) -> Tensor:
    """A copy in pinned main memory. It is made and read back on the stream that computes, which keeps the order without an event: 15 to
    30 ms for a gigabyte, beside a computed step of seconds."""
    copy = _pinned(value)
    copy.copy_(value, non_blocking=True)
    setattr(copy, _HOME, value.device)
    return copy


def _back(value: Tensor) -> Tensor:
    home = getattr(value, _HOME, None)
    return value if home is None else value.to(home, non_blocking=True)


def _here(values: Iterable[Tensor]) -> list[Tensor]:
    """Those that are kept on their own device."""
    return [v for v in values if not hasattr(v, _HOME)]


def _pinned(like: Tensor) -> Tensor:
    """Main memory for a tensor of a GPU."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
