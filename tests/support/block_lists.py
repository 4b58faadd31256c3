"""A stack of blocks over a small video, and a cache that adds block deltas by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vdcache.testing import TinyDiT, latent, time_of

BLOCKS, STEPS = 6, 6


class Stack(nn.Module):
    """Blocks that attend over a small video, in one stream or (MMDiT) in a latent and a text stream."""

    def __init__(self, two: bool, blocks: int = BLOCKS, dim: int = 8) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.two = two
        self.patch, self.time, self.words, self.out = (
            nn.Conv3d(4, dim, 1),
            nn.Linear(8, dim),
            nn.Linear(4, dim),
            nn.Linear(dim, 4),
        )
        self.qkv = nn.ModuleList(nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(2)) for _ in range(blocks))
        self.mlp = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(2))
            for _ in range(blocks)
        )
        self.eval().requires_grad_(False)

    def start(self, x, timestep, text):
        sinusoids = self.time(TinyDiT.sinusoids(None, timestep, x.dtype))[:, None]
        return (
            [self.patch(x).flatten(2).mT + sinusoids, self.words(text)]
            if self.two
            else [self.patch(x).flatten(2).mT + sinusoids]
        )

    def block(self, i, streams):
        qkv = [self.qkv[i][s](h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4) for s, h in enumerate(streams)]
        q, k, v = torch.cat(qkv, 3)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        parts = o.split([h.shape[1] for h in streams], 1)
        streams = [h + part for h, part in zip(streams, parts, strict=True)]
        return [h + self.mlp[i][s](h) for s, h in enumerate(streams)]

    def end(self, streams, like):
        result = self.out(streams[0]).mT.reshape(like.shape)
        return (result, streams[1].mean()) if self.two else (result,)

    def forward(self, x, timestep, text):
        streams = self.start(x, timestep, text)
        for i in range(len(self.qkv)):
            streams = self.block(i, streams)
        return self.end(streams, x)


class ByHand:
    """ProfilingDiT's reference code, restated: each block's delta is stored when it is computed, and added when it is reused."""

    def __init__(self, model: Stack) -> None:
        self.model, self.deltas = model, {}

    def __call__(self, x, timestep, text, reused):
        streams = self.model.start(x, timestep, text)
        for i in range(len(self.model.qkv)):
            if i in reused and i in self.deltas:
                streams = [h + d for h, d in zip(streams, self.deltas[i], strict=True)]
                continue
            after = self.model.block(i, streams)
            self.deltas[i] = [b - a for a, b in zip(streams, after, strict=True)]
            streams = after
        return self.model.end(streams, x)


def call(step, seed=0):
    x = latent(seed, 1, 4, 2, 2, 3) + 0.1 * step * latent(50 + seed, 1, 4, 2, 2, 3)
    return x, time_of(step), latent(9, 1, 3, 4)
