"""Attention under a mask of tiles by torch's `flex_attention`, compiled. Seen to work on torch 2.11 to 2.13 (CPU)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vdcache.attention.tiles import TileMask, _like
from vdcache.util.isolated import compile_isolated

__all__ = ["block_mask", "flex"]

BLOCK = 128


def flex(query: Tensor, key: Tensor, value: Tensor, on: TileMask, scale: float | None, bias: Tensor | None) -> Tensor:
    """`flex_attention` with a BlockMask; the contract of `vdcache.attention.tiles.gather`. Compiles at the first call of a size."""
    if on.mask.is_empty:
        return _like(query, value, torch.zeros)
    mask = block_mask(on, query.device)
    score_mod = None
    if bias is not None:
        rows = bias.expand(query.shape[0], query.shape[1], 1, bias.shape[3])
        if rows.dtype == torch.bool:
            rows = torch.zeros_like(rows, dtype=torch.float32).masked_fill(~rows, -torch.inf)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return score + rows[b, h, 0, kv]

    run = _compiled()
    # One compiled code serves all masks and sizes of a process; Dynamo's limit is meant for one function.
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        return run(  # type: ignore[no-any-return]
            query, key, value, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )


@functools.lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return compile_isolated(flex_attention, dynamic=False)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=64)
def block_mask(on: TileMask, device: torch.device) -> Any:
    """The BlockMask of a mask: from the table of tiles, without a matrix of queries × keys."""
    from torch.nn.attention.flex_attention import BlockMask

    at = on.tile_of
    tiles = on.count + 1  # text is one more tile
    members = torch.zeros(-(-on.tokens // BLOCK), tiles)
    members[torch.arange(on.tokens) // BLOCK, at % tiles] = 1.0
    allowed = torch.ones(tiles, tiles)
    allowed[:-1, :-1] = on.allowed.float()
    some = members @ allowed @ members.T > 0
    every = ~(members @ (1 - allowed) @ members.T > 0)
    every[:, -1] &= on.tokens % BLOCK == 0  # the last block of keys may be cut short

    def table(kept: Tensor) -> tuple[Tensor, Tensor]:
        counts = kept.sum(1, dtype=torch.int32)
        order = torch.argsort(kept.int(), dim=1, descending=True, stable=True).int()
        return counts[None, None].to(device), order[None, None].to(device)

    partial, full = table(some & ~every), table(every)
    tile_of, keeps = (at % tiles).to(device), allowed.bool().to(device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return keeps[tile_of[q], tile_of[kv]]

    # Tables by queries serve gradients alone, and are made by vmap, which fails where a dispatch mode watches custom operations.
    more: dict[str, Any] = (
        {"compute_q_blocks": False} if "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters else {}
    )
    sizes = (on.tokens, on.tokens)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=sizes, **more)
