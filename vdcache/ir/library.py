"""Operations of our own that a compiled graph may hold. Each says its result's form to the compiler and computes it anywhere.

How much attention a token receives: the column sums s_j = Σ_i A_ij of the attention matrix A (ProfilingDiT, arXiv 2504.03140, equation 5),
for every way in which attention is written. None of them holds a matrix of queries × keys of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["CHUNK", "attention_received", "flex_received", "linear_received", "received", "weights_received"]

CHUNK = 1 << 22  # scores held at one time, float32: 16 MiB


def received(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """Column sums of softmax(scale · Q Kᵀ + mask), a chunk of queries at a time.

    Args:
        query, key: [..., Lq, D] and [..., Lk, D]; keys may have fewer heads (dimension −3), each then shared by as many queries.
        mask: as `scaled_dot_product_attention` takes it: bool (True attends) or added, broadcast to [..., Lq, Lk].
        scale: 1/√D if not given.

    Returns float32 [..., Lk]. Where all queries attend alike, every token receives Lq / Lk.
    """
    lead, lq, lk = query.shape[:-2], query.shape[-2], key.shape[-2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if key.ndim > 2 and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    q = query.reshape(-1, lq, query.shape[-1])
    k = key.expand(*lead, *key.shape[-2:]).reshape(-1, lk, key.shape[-1])
    bias = None
    if mask is not None:
        bias = mask.expand(*lead, *mask.shape[-2:]) if mask.ndim > 2 else mask
    sums = torch.zeros(q.shape[0], lk, dtype=torch.float32, device=q.device)
    for heads, rows in _chunks(q.shape[0], lq, lk):
        scores = (q[heads, rows] @ k[heads].transpose(-1, -2)).float().mul_(scale)
        if bias is not None:
            part = _part(bias, lead, heads, rows)
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.float()
        if is_causal:
            after = torch.arange(lk, device=q.device)[None] > torch.arange(lq, device=q.device)[rows, None]
            scores.masked_fill_(after, -torch.inf)
        weights = torch.softmax(scores, -1)
        if bias is not None:
            weights = weights.nan_to_num_(0.0)  # a query that may attend to nothing
        sums[heads] += weights.sum(-2)
    return sums.reshape(*lead, lk)


attention_received = torch.library.custom_op("vdcache::attention_received", received, mutates_args=())


@attention_received.register_fake
def _(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    return query.new_empty((*query.shape[:-2], key.shape[-2]), dtype=torch.float32)


def _chunks(heads: int, lq: int, lk: int) -> Sequence[tuple[slice, slice]]:
    """Slices of heads and of queries, each with at most `CHUNK` scores (one row at least)."""
    together = max(1, CHUNK // max(1, lq * lk))
    rows = lq if together > 1 else max(1, min(lq, CHUNK // max(1, lk)))
    return [
        (slice(h, min(h + together, heads)), slice(r, min(r + rows, lq)))
        for h in range(0, heads, together)
        for r in range(0, lq, max(1, rows))
    ]


def _part(bias: Tensor, lead: Sequence[int], heads: slice, rows: slice) -> Tensor:
    """The rows of a mask that belong to some flattened heads: [heads, rows, Lk], broadcast where the mask is."""
    if bias.ndim > 2:
        index = torch.unravel_index(torch.arange(heads.start, heads.stop, device=bias.device), tuple(lead))
        bias = bias[index]
    return bias if bias.shape[-2] == 1 else bias[..., rows, :]


def flex_received(
    query: Tensor, key: Tensor, score_mod: Callable[..., Tensor] | None, block_mask: Any, scale: float, *buffers: Any
) -> Tensor:
    """Column sums of flex attention's softmax, a chunk of queries at a time.

    Args:
        query, key: [B, H, Lq, D] and [B, Hk, Lk, D].
        score_mod, block_mask, scale: as the operation `flex_attention` holds them in a graph; the mask's last part is a function of
            (batch, head, query, key).
        buffers: what score_mod and the mask's function take besides: two tuples.

    Returns float32 [B, H, Lk].
    """
    b, h, lq, _ = query.shape
    lk = key.shape[-2]
    if key.shape[1] != h:
        key = key.repeat_interleave(h // key.shape[1], 1)
    mask_mod = block_mask[-1] if block_mask else None
    of_score, of_mask = (tuple(x) for x in (*buffers, (), ())[:2])
    parts = []
    every = [torch.arange(n, device=query.device) for n in (b, h, lq, lk)]
    step = max(1, CHUNK // max(1, b * h * lk))
    for start in range(0, lq, step):
        rows = slice(start, min(start + step, lq))
        scores = (query[:, :, rows] @ key.transpose(-1, -2)).float() * scale
        at = (every[0], every[1], every[2][rows], every[3])
        if score_mod is not None:
            scores = _everywhere(score_mod, len(of_score), with_score=True)(scores, *at, *of_score).float()
        if mask_mod is not None:
            seen = _everywhere(mask_mod, len(of_mask), with_score=False)(*at, *of_mask)
            scores = scores.masked_fill(~seen, -torch.inf)
        parts.append(torch.softmax(scores, -1).nan_to_num(0.0).sum(-2))
    return torch.stack(parts).sum(0)


def _everywhere(fn: Callable[..., Tensor], others: int, *, with_score: bool) -> Callable[..., Tensor]:
    """A function of one (score,) batch, head, query and key as one of all of them: [B, H, Lq, Lk]."""
    for axis in (3, 2, 1, 0):  # the key moves fastest
        at = [0 if i == axis else None for i in range(4)]
        fn = torch.vmap(fn, in_dims=(*((0,) if with_score else ()), *at, *(None,) * others))
    return fn


def linear_received(query: Tensor, key: Tensor) -> Tensor:
    """Column sums of linear attention, A_ij = φ(q_i)·φ(k_j) / Σ_j φ(q_i)·φ(k_j), in linear time.

    Args:
        query, key: [..., Lq, D] and [..., Lk, D], after the feature map.

    Returns float32 [..., Lk].
    """
    q, k = query.float(), key.float()
    total = q @ k.sum(-2).unsqueeze(-1)  # [..., Lq, 1]
    share = torch.where(total == 0, torch.zeros_like(q), q / total)
    return (k @ share.sum(-2).unsqueeze(-1)).squeeze(-1)


def weights_received(weights: Tensor, query_axis: int, key_axis: int, normalised: bool) -> Tensor:
    """Column sums of attention weights that the graph holds anyway.

    Args:
        weights: with queries along one axis and keys along another.
        normalised: whether the weights of a query add up to one; else they are made to.

    Returns float32, the weights' shape without the query axis and with the keys last.
    """
    weights = weights.float().movedim((query_axis, key_axis), (-2, -1))
    if not normalised:
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total == 0, torch.zeros_like(weights), weights / total)
    return weights.sum(-2)
