"""Concrete sizes of symbolic tensors, from the inputs of a call."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from vdcache.errors import ConfigError

__all__ = ["Bindings", "byte_count", "bytes_text", "is_symbolic", "shape_hint", "size_hint", "updated_by"]

Key = TypeVar("Key")


def is_symbolic(value: Any) -> bool:
    """Whether a fake value has a size that is a symbol."""
    if isinstance(value, torch.SymInt):
        return True
    return isinstance(value, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in value.shape)


_UNITS = {
    "": 1,
    "b": 1,
    **{f"{u}{kind}": base**i for kind, base in (("ib", 1024), ("b", 1000)) for i, u in enumerate("kmgt", 1)},
}


def byte_count(value: Any, subject: str) -> int:
    """A number of bytes: a whole number, or a text such as "4GiB", "1.5 GB", "500MiB".

    Args:
        subject: what it is, for the message.

    Raises:
        ConfigError: anything else, or less than nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower()) if isinstance(value, str) else None
    if found is not None and found[2] in _UNITS:
        return int(float(found[1]) * _UNITS[found[2]])
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{subject} is a number of bytes or a text such as '4GiB' or '500MB'; got {value!r}")
    return value


def bytes_text(count: float) -> str:
    """A number of bytes as people read it: "2.9 GiB"."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def size_hint(value: Any) -> int:
    """A size as an integer: that of the call for which a graph was made, where it is a symbol; 1 where nobody knows."""
    if isinstance(value, int):
        return value
    hint = getattr(getattr(value, "node", None), "hint", None)
    return hint if isinstance(hint, int) else 1


def shape_hint(value: torch.Tensor) -> list[int]:
    """The shape of a fake tensor as integers."""
    return [size_hint(s) for s in value.shape]


def updated_by(inputs: Mapping[Key, Sequence[int]], results: Sequence[Sequence[int]], *, nearest: bool = False) -> list[Key]:
    """Which inputs a solver updates with which results, judged by shapes: for each result the input that agrees with it in all
    dimensions but one at most, the channels. The best comes first; of several for one result, the likeliest, then the largest.
    Beyond the first one, sequences [B, N, C] must agree wholly: what differs may be the number of tokens, of text for example.

    Args:
        inputs: shapes.
        results: shapes.
        nearest: where none agrees so well, the input that comes nearest stands in.
    """
    scored = []
    for key, shape in inputs.items():
        for number, result in enumerate(results):
            differ = sum(a != b for a, b in zip(shape, result, strict=False)) if len(shape) == len(result) else len(result) + 1
            likeness = 1 - differ / max(1, len(result))
            scored.append((differ <= 1, likeness, math.prod(shape), number, key))
    chosen: list[Key] = []
    taken: set[int] = set()
    for agrees, likeness, _, number, key in sorted(scored, key=lambda s: s[:3], reverse=True):
        sure = likeness == 1 or len(results[number]) > 3
        if key not in chosen and number not in taken and ((agrees and (sure or not chosen)) or (nearest and not chosen)):
            chosen.append(key)
            taken.add(number)
    return chosen


class Bindings:
    """Which number each symbol of a graph stands for in one call.

    Args:
        fakes: the fake values of the graph's inputs.
    """

    def __init__(self, fakes: Sequence[Any]) -> None:
        # (position, dimension or None for a SymInt input, symbol): where each plain symbol can be read off
        self._places: list[tuple[int, int | None, Any]] = []
        seen = set()
        for position, fake in enumerate(fakes):
            dims: list[tuple[int | None, Any]] = []
            if isinstance(fake, torch.SymInt):
                dims = [(None, fake)]
            elif isinstance(fake, torch.Tensor):
                dims = list(enumerate(fake.shape))
            for dim, size in dims:
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.expr not in seen:
                    seen.add(size.node.expr)
                    self._places.append((position, dim, size.node.expr))

    @property
    def any(self) -> bool:
        """Whether the graph has symbolic inputs at all."""
        return bool(self._places)

    def sizes(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        """The numbers of all symbols in this call, in a fixed order: a key for shapes."""
        return tuple(int(inputs[p] if d is None else inputs[p].shape[d]) for p, d, _ in self._places)

    def shape(self, fake: torch.Tensor, inputs: Sequence[Any]) -> tuple[int, ...]:
        """The shape of `fake` in this call."""
        if not is_symbolic(fake):
            return tuple(int(s) for s in fake.shape)
        values = dict(zip((e for _, _, e in self._places), self.sizes(inputs), strict=True))
        return tuple(int(s.node.expr.subs(values)) if isinstance(s, torch.SymInt) else int(s) for s in fake.shape)
