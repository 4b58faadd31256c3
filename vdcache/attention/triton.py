"""Attention under a static mask of tiles, as a kernel of our own in Triton.

Queries whose keys are the same make a list; a program takes a block of one list and goes through its keys with the online
softmax of FlashAttention-2 (arXiv 2307.08691), in float32 and powers of two. Which keys these are is constant, and stands in
tables: stretches of `CHUNK` tokens next to each other, which are read without looking anything up, and what is left in pieces
of equal length. So nothing is copied, tiles need not be multiples of a block, and the kernel knows nothing of tiles. Queries
that attend to everything are left to torch's dense attention.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from dataclasses import dataclass
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcache.attention.tiles import TileMask, _attend, _like, check_sequence
from vdcache.errors import ConfigError

__all__ = ["available", "triton_attention"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 128  # head dimension
PIECES = 16  # longest piece; smaller than any block of keys


def available(device: torch.device) -> bool:
    """Whether the kernel can run there: Triton is installed, and the device is CUDA or TRITON_INTERPRET=1 is set."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@torch.no_grad()
def triton_attention(
    query: Tensor, key: Tensor, value: Tensor, on: TileMask, scale: float | None, bias: Tensor | None
) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V, without gradients; any strides are worked on as they are.

    A query that attends to something but not to everything, and whose keys the bias excludes one and all, gets 0, where
    `scaled_dot_product_attention` may give NaN.

    Args:
        query, key, value: [B, H, N, D] in float16, bfloat16 or float32, D up to 128; keys and values may have fewer heads.
        scale: 1/√D if not given.
        bias: of keys alone, [B or 1, H or 1, 1, N], bool (True attends) or added.

    Returns:
        [B, H, N, D], heads and tokens in memory as in `query`.

    Raises:
        ConfigError: Triton cannot run here, or it cannot be done for these dtypes or shapes.
    """
    _check(query, key, value, on)
    if on.mask.is_empty:
        return _like(query, value, torch.zeros)
    tables = _tables(on, query.device)
    out = _like(query, value, torch.empty)
    if tables.dense is not None:
        rows = tables.dense
        out[:, :, rows] = _attend(query[:, :, rows], key, value, bias, scale)
    if len(tables.blocks):
        scale = query.shape[3] ** -0.5 if scale is None else scale
        if scale < 0:  # the kernel takes the maximum before it scales
            query, scale = -query, -scale
        with torch.cuda.device_of(query):
            _launch(query, key, value, bias, out, tables, scale)
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, on: TileMask) -> None:
    if not available(query.device):
        raise ConfigError(
            f"triton_attention on {query.device}: it needs Triton (pip install triton) and a CUDA device, or TRITON_INTERPRET=1 "
            "in the environment to be interpreted on the CPU; the lowering 'gather' needs neither"
        )
    check_sequence(on, query.shape[2], key.shape[2], "triton_attention")
    if query.dtype not in DTYPES or {key.dtype, value.dtype} != {query.dtype}:
        found = ", ".join(str(t.dtype) for t in (query, key, value))
        raise ConfigError(f"triton_attention: query, key and value are all float16, bfloat16 or float32; got {found}")
    dims = query.shape[3], key.shape[3], value.shape[3]
    if len(set(dims)) > 1 or dims[0] > WIDEST:
        raise ConfigError(
            f"triton_attention: query, key and value have one head dimension, {WIDEST} at most; got {dims[0]}, {dims[1]} and {dims[2]}"
        )
    if key.shape != value.shape or key.shape[0] != query.shape[0] or query.shape[1] % key.shape[1]:
        found = ", ".join(str(list(t.shape)) for t in (query, key, value))
        raise ConfigError(
            f"triton_attention: keys and values are of one shape, and their heads divide those of the query; got {found}"
        )


def _launch(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, tables: _Tables, scale: float) -> None:
    from vdcache.attention import block_sparse

    if block_sparse.interpreted and not block_sparse.can_loop():
        raise ConfigError(
            f"triton_attention: the interpreter of Triton {metadata.version('triton')} cannot loop with numpy {metadata.version('numpy')}; "
            "pip install 'numpy<2.4', or take a torch that brings Triton 3.7 or later"
        )
    b, h, n, d = query.shape
    kind = "none" if bias is None else "bool" if bias.dtype == torch.bool else "added"
    if bias is None:
        of_bias = [0, 0, 0]
    else:
        bias = (bias.view(torch.uint8) if kind == "bool" else bias).expand(b, h, 1, n)
        of_bias = [bias.stride(0), bias.stride(1), bias.stride(3)]
    strides = [t.stride() for t in (query, key, value, out)]
    unit = math.gcd(8, *(n for of in strides for n in of[:3]))
    count = len(tables.blocks)
    fixed = block_sparse.INTERPRETED if block_sparse.interpreted else {}
    block_sparse.kernel[lambda meta: (b * h * count * (block_sparse.ROWS // meta["BLOCK_M"]),)](
        query,
        key,
        value,
        bias,
        out,
        tables.blocks,
        tables.rows,
        tables.chunks,
        tables.pieces,
        *(n for of in strides for n in (*(n // unit for n in of[:3]), of[3])),
        *of_bias,
        h,
        h // key.shape[1],
        count,
        scale * math.log2(math.e),
        tables.queries_each,
        tables.keys_each,
        D=d,
        BLOCK_D=max(16, _power_of_two(d)),
        UNIT=unit,
        PIECE=tables.piece,
        BIAS=kind,
        CHUNK=block_sparse.CHUNK,
        ROWS=block_sparse.ROWS,
        EMULATED=block_sparse.interpreted and query.dtype == torch.bfloat16,
        enable_fp_fusion=True,
        **fixed,
    )


@dataclass(frozen=True)
class _Tables:
    """Which queries attend to which keys, on the device of the attention.

    Args:
        blocks: int32 [n, 6], for each `ROWS` queries of a list or fewer: from … to in `rows`, in `chunks` and in `pieces`.
        rows: int32, the tokens of the queries, list after list.
        chunks: int32, the first tokens of `CHUNK` keys next to each other, list after list.
        pieces: int32, likewise of `piece` keys, for what chunks leave. After either come zeros, as it is read a step ahead.
        queries_each, keys_each: of a list at most, and on average; as powers of two.
        dense: the tokens that attend to everything: a slice, int64 tokens, or None.
    """

    blocks: Tensor
    rows: Tensor
    chunks: Tensor
    pieces: Tensor
    piece: int
    queries_each: int
    keys_each: int
    dense: slice | Tensor | None


@functools.lru_cache(maxsize=256)
def _tables(on: TileMask, device: torch.device) -> _Tables:
    """The tables of a mask on a device, made once."""
    from vdcache.attention.block_sparse import CHUNK, ROWS

    at = on.tile_of
    is_text = at < 0
    tiles = at.argsort(stable=True)[on.text :].reshape(on.count, on.size)  # tokens of every tile
    attends = [(list(q), k) for group in on.groups for q, k in zip(group.queries, group.keys, strict=True)]
    rows = [tiles[q].flatten() for q, _ in attends]
    runs = []  # of each list, keys next to each other: from … to
    for queries, _ in attends:
        kept = on.allowed[queries[0]][at.clamp(min=0)] | is_text
        runs.append(torch.diff(F.pad(kept.to(torch.int8), (1, 1))).nonzero().reshape(-1, 2))
    start, stop = torch.cat(runs or [torch.zeros(0, 2, dtype=torch.int64)]).unbind(1)
    whole = (stop - start) // CHUNK
    start_rest = start + whole * CHUNK
    piece = math.gcd(PIECES, *(stop - start_rest).unique().tolist())
    left = (stop - start_rest) // piece

    runs_before = _sums([len(r) for r in runs])
    chunks_before, pieces_before = (_sums(x)[runs_before].tolist() for x in (whole, left))
    rows_before = _sums([len(r) for r in rows]).tolist()
    blocks = [
        (first, min(first + ROWS, rows_before[i + 1]), *chunks_before[i : i + 2], *pieces_before[i : i + 2])
        for i in range(len(attends))
        for first in range(rows_before[i], rows_before[i + 1], ROWS)
    ]

    everywhere = is_text | on.allowed.all(1)[at.clamp(min=0)]
    tokens = everywhere.nonzero().flatten()
    dense: slice | Tensor | None = None
    if len(tokens):
        first, last = int(tokens[0]), int(tokens[-1])
        dense = slice(first, last + 1) if last - first + 1 == len(tokens) else tokens.to(device)

    def table(x: Tensor) -> Tensor:
        return x.to(device, torch.int32)

    return _Tables(
        table(torch.tensor(blocks, dtype=torch.int32).reshape(-1, 6)),
        table(torch.cat(rows or [tokens[:0]])),
        table(F.pad(_cut(start, whole, CHUNK), (0, 1))),
        table(F.pad(_cut(start_rest, left, piece), (0, CHUNK))),
        piece,
        _power_of_two(max(map(len, rows), default=1)),
        _power_of_two(int((stop - start).sum()) // max(len(rows), 1)),
        dense,
    )


def _cut(start: Tensor, counts: Tensor, step: int) -> Tensor:
    """The starts of so many stretches of `step` tokens, one after the other, from each start."""
    before = _sums(counts)[:-1]
    return start.repeat_interleave(counts) + (torch.arange(int(counts.sum())) - before.repeat_interleave(counts)) * step


def _sums(counts: Tensor | list[int]) -> Tensor:
    """How many there are before each, and in all."""
    return F.pad(torch.as_tensor(counts, dtype=torch.int64).cumsum(0), (1, 0))


def _power_of_two(n: int) -> int:
    """The next from n on."""
    return 1 << max(n - 1, 0).bit_length()
