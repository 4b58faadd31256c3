"""The least that is a DiT, and a cache for it by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Reference", "TinyDiT", "latent", "time_of"]


class TinyDiT(nn.Module):
    """The least that is a DiT: a sinusoidal timestep, one attention and one MLP branch a block, adaLN gates."""

    def __init__(self, blocks: int = 2, dim: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inp, self.out = nn.Linear(4, dim), nn.Linear(dim, 4)
        self.time = nn.Linear(8, 2 * dim)
        self.text = nn.Linear(4, dim)
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(blocks))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(dim, 16), nn.GELU(), nn.Linear(16, dim)) for _ in range(blocks))
        self.eval().requires_grad_(False)

    def sinusoids(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        angles = timestep.float()[:, None] * torch.exp(-torch.arange(4, device=timestep.device))
        return torch.cat([angles.sin(), angles.cos()], -1).to(dtype)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        gates = self.time(self.sinusoids(timestep, x.dtype))[:, None].chunk(2, -1)
        h = self.inp(x) + self.text(text).mean(1, keepdim=True)
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            h = h + gates[0] * F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            h = h + gates[1] * mlp(h)
        return self.out(h)

    def branches(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """What all branches together add to the stream: computed apart, for the reference cache."""
        gates = self.time(self.sinusoids(timestep, x.dtype))[:, None].chunk(2, -1)
        h = start = self.inp(x) + self.text(text).mean(1, keepdim=True)
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            h = h + gates[0] * F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            h = h + gates[1] * mlp(h)
        return h - start

    def with_branches(self, x: Tensor, text: Tensor, total: Tensor) -> Tensor:
        return self.out(self.inp(x) + self.text(text).mean(1, keepdim=True) + total)


class Reference:
    """Caching by hand, told everything: recompute at steps 0, n, 2n … and the last."""

    def __init__(self, model: TinyDiT, every: int, steps: int) -> None:
        self.model, self.every, self.steps = model, every, steps
        self.kept: dict[Any, tuple[int, Tensor]] = {}
        self.due = -1

    def begin(self) -> None:
        self.kept.clear()
        self.due = -1

    def call(self, step: int, lane: Any, x: Tensor, t: Tensor, text: Tensor, *, again: bool = False) -> Tensor:
        key = (lane, x.shape, x.dtype, text.shape)
        due = step % self.every == 0 or step >= self.steps - 1
        if due:
            self.due = step
        if due or again or key not in self.kept or self.kept[key][0] < self.due:  # the lane sat out the last computed step
            self.kept[key] = step, self.model.branches(x, t, text)
            return self.model(x, t, text)
        return self.model.with_branches(x, text, self.kept[key][1])


def latent(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded random numbers, [1, 6, 4] without a shape."""
    shape = shape or (1, 6, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def time_of(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The timestep of a step, [1]."""
    return torch.tensor([1000 - 50 * step], dtype=dtype)
