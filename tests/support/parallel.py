"""A DiT whose tokens are spread over ranks: Ulysses, as serving engines write it by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn

from vdcache.demo.model import DemoAttention, DemoConfig, DemoDiT, rotate


class UlyssesAttention(nn.Module):
    """All tokens of some heads on each rank: all-to-all before and after.

    Args:
        own: the attention whose weights it has.
        group: the ranks.
    """

    def __init__(self, own: DemoAttention, group: Any) -> None:
        super().__init__()
        self.own, self.group, self.ranks = own, group, dist.get_world_size(group)

    def exchange(self, x: Tensor, sent: list[int], taken: list[int]) -> Tensor:
        """Rows of the first dimension, so many to each rank and from each."""
        return collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), taken, sent, self.group))

    def forward(self, x: Tensor, sizes: list[int], rotary: tuple[Tensor, Tensor]) -> Tensor:
        own, b = self.own, x.shape[0]
        mine, p = x.shape[1], self.ranks
        q, k, v = own.norm_q(own.to_q(x)), own.norm_k(own.to_k(x)), own.to_v(x)
        parts = []
        for t in (q, k, v):
            t = t.unflatten(-1, (p, own.heads // p, -1))  # [B, N/P, P, H/P, D]
            t = t.permute(2, 1, 0, 3, 4).flatten(0, 1)  # [P·N/P, B, H/P, D]
            parts.append(self.exchange(t, [mine] * p, sizes).transpose(0, 1))  # [B, N, H/P, D]
        q, k, v = parts
        q, k = rotate(q, rotary), rotate(k, rotary)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out = self.exchange(out.permute(2, 0, 1, 3), sizes, [mine] * p)  # [P·N/P, B, H/P, D]
        out = out.unflatten(0, (p, mine)).permute(2, 1, 0, 3, 4).reshape(b, mine, -1)
        return own.to_out[0](out)


class UlyssesDiT(nn.Module):
    """`DemoDiT` with its tokens spread over the ranks of a group; parts may be unequal. Its input is whole on every rank.

    Args:
        whole: whether its output is, too; else each rank returns its own tokens.
    """

    def __init__(self, model: DemoDiT, group: Any = None, whole: bool = True) -> None:
        super().__init__()
        self.whole = whole
        self.model, self.group = model, group or dist.group.WORLD
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.attention = nn.ModuleList(UlyssesAttention(block.attn1, self.group) for block in model.blocks)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        m, c = self.model, self.model.config
        grid = [n // p for n, p in zip(x.shape[2:], c.patch_size, strict=True)]
        rotary = m.rotary(*grid)
        time, modulation, text = m.condition_embedder(timestep, text)
        modulation = modulation.unflatten(1, (6, -1))
        h = m.patch_embedding(x).flatten(2).transpose(1, 2)
        sizes = [t.shape[1] for t in h.tensor_split(self.ranks, 1)]
        h = h.tensor_split(self.ranks, 1)[self.rank].contiguous()
        for block, attention in zip(m.blocks, self.attention, strict=True):
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (block.scale_shift_table + modulation).chunk(6, dim=1)
            n = block.norm1(h) * (1 + scale_a) + shift_a
            h = h + attention(n, sizes, rotary) * gate_a
            h = h + block.attn2(block.norm2(h), text, None)
            n = block.norm3(h) * (1 + scale_m) + shift_m
            h = h + block.ffn(n) * gate_m
        shift, scale = (m.scale_shift_table + time[:, None]).chunk(2, dim=1)
        h = m.proj_out(m.norm_out(h) * (1 + scale) + shift)
        if not self.whole:
            return h
        most = max(sizes)
        h = F.pad(h, (0, 0, 0, most - h.shape[1]))
        h = collectives.wait_tensor(collectives.all_gather_tensor(h.transpose(0, 1).contiguous(), 0, self.group))
        h = torch.cat([part[:size] for part, size in zip(h.split(most), sizes, strict=True)]).transpose(0, 1)
        return unpatched(h, grid, c)


def unpatched(h: Tensor, grid: list[int], c: DemoConfig) -> Tensor:
    """[B, N, p·q·r·C] to [B, C, T, H, W]."""
    h = h.unflatten(1, grid).unflatten(-1, (*c.patch_size, -1))
    return h.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
