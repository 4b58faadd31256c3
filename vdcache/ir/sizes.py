"""Concrete sizes of symbolic tensors, from the inputs of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Bindings", "is_symbolic"]


def is_symbolic(value: Any) -> bool:
    """Whether a fake value has a size that is a symbol."""
    if isinstance(value, torch.SymInt):
        return True
    return isinstance(value, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in value.shape)


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
