"""Fake values for a graph that is read from a file. The private torch names that this takes are in this file only.

Seen to work on torch 2.11.0, 2.12.1 and 2.13.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["Fakes", "factory"]


def factory(mode: Any) -> Callable[..., torch.Tensor]:
    """Makes fake tensors of a mode from sizes, strides, offset, dtype, device and whether they require gradients.

    The mode itself would ask dispatch for each, which takes five times as long.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    def make(
        size: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype, device: str, requires_grad: bool
    ) -> torch.Tensor:
        if offset:
            reach = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset
            meta = torch.empty(reach, dtype=dtype, device="meta").as_strided(size, stride, offset)
        else:
            meta = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        fake = FakeTensor(mode, meta, torch.device(device))
        return fake.requires_grad_() if requires_grad else fake

    return make


class Fakes:
    """Tensors without data and sizes without numbers, all of one graph."""

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self._env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)

    def symbol(self, name: str, number: int) -> Any:
        """A size that is `number` in the example that the graph was made from."""
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        source = ConstantSource(name)
        symbol = self._env.create_symbol(number, source, DimDynamic.DYNAMIC)
        return self._env.create_symintnode(symbol, hint=number, source=source)

    def tensor(self, sizes: Sequence[Any], strides: Sequence[Any] | None, dtype: torch.dtype, device: str) -> torch.Tensor:
        """A tensor; contiguous where no strides are given."""
        with self.mode:
            if strides is None:
                return torch.empty(tuple(sizes), dtype=dtype, device=device)
            return torch.empty_strided(tuple(sizes), tuple(strides), dtype=dtype, device=device)

    def like(self, value: torch.Tensor) -> torch.Tensor:
        """The fake of a real tensor."""
        return self.mode.from_tensor(value, static_shapes=True)
