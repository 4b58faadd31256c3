"""The device side of `kernels/triton.py`: attention of lists of queries over lists of keys. Importing this file needs Triton."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.errors import InterpreterError

from vdcache.attention.kernel_configs import CONFIGS, Config, configs_for, float_configs

__all__ = ["CHUNK", "INTERPRETED", "ROWS", "can_loop", "interpreted", "kernel"]

CHUNK = 128  # keys next to each other that are read without looking their places up; the largest BLOCK_N
ROWS = 128  # queries of an entry of `blocks`; the largest BLOCK_M
INTERPRETED = {"BLOCK_M": 64, "BLOCK_N": 64}  # under TRITON_INTERPRET=1, where nothing is tuned


# One kernel for all sizes: of the strides only those of dimensions matter, which are one, and UNIT.
_ANY = [f"{t}_stride_{axis}" for t in ("query", "key", "value", "out") for axis in "bhn"]
_ANY += ["heads", "shared", "count", "queries_each", "keys_each"]


@triton.jit(do_not_specialize=_ANY)  # type: ignore[untyped-decorator]
def _attention(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    bias,
    out,
    blocks,
    rows,
    chunks,
    pieces,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    key_stride_d,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    value_stride_d,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    out_stride_d,
    bias_stride_b,
    bias_stride_h,
    bias_stride_n,
    heads,
    shared,  # heads of queries to one of keys
    count,  # of `blocks`
    scale,  # times log₂ e, not negative
    queries_each,  # of a list and keys of one, roughly: what is tuned for
    keys_each,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,  # of the strides of samples, heads and tokens: what the compiler may take them to be multiples of
    PIECE: tl.constexpr,
    BIAS: tl.constexpr,  # "none", "bool", "added"
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    EMULATED: tl.constexpr,  # products in float32, as the interpreter multiplies the bits of bfloat16 as whole numbers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program has BLOCK_M queries of one list, one head and one sample; those of a head follow each other, as they share keys.
    program = tl.program_id(0)
    of_a_head = count * (ROWS // BLOCK_M)
    head, program = program // of_a_head, program % of_a_head
    block = blocks + program // (ROWS // BLOCK_M) * 6
    first = tl.load(block) + program % (ROWS // BLOCK_M) * BLOCK_M
    stop = tl.load(block + 1)
    if first >= stop:
        return
    first_chunk, stop_chunk = tl.load(block + 2), tl.load(block + 3)
    first_piece, stop_piece = tl.load(block + 4), tl.load(block + 5)

    # Tokens are 64 bits wide wherever a stride multiplies them: long sequences have more than 2³¹ elements.
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    query += (b * query_stride_b + h * query_stride_h) * UNIT
    key += (b * key_stride_b + h // shared * key_stride_h) * UNIT
    value += (b * value_stride_b + h // shared * value_stride_h) * UNIT
    out += (b * out_stride_b + h * out_stride_h) * UNIT
    if BIAS != "none":
        bias += b * bias_stride_b + h * bias_stride_h

    dim = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    row = first + tl.arange(0, BLOCK_M)
    own = tl.load(rows + row, mask=row < stop, other=0).to(tl.int64)[:, None]
    real = (row < stop)[:, None] & (dim < D)
    q = tl.load(query + own * query_stride_n * UNIT + dim * query_stride_d, mask=real, other=0.0)
    out += own * out_stride_n * UNIT + dim * out_stride_d
    if EMULATED:
        q = q.to(tl.float32)

    column = tl.arange(0, BLOCK_N)
    rest = (stop_piece - first_piece) * PIECE
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the largest score so far, times log₂ e
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # The same steps three times: over chunks, over whole blocks of pieces, and over what is left, which alone needs a mask.
    for part in tl.static_range(3):
        # Tokens are looked up one step ahead, so that it does not delay the loads of keys and values, which are then pipelined.
        if part == 0:
            steps = (stop_chunk - first_chunk) * (CHUNK // BLOCK_N)
            next_start = tl.load(chunks + first_chunk)
        elif part == 1:
            steps = rest // BLOCK_N
            next_start = tl.load(pieces + first_piece + column // PIECE)
        else:
            steps = (rest % BLOCK_N > 0).to(tl.int32)
        for step in tl.range(0, steps, num_stages=1 if part == 2 else None):
            if part == 0:
                tokens = next_start + step % (CHUNK // BLOCK_N) * BLOCK_N + column
                next_start = tl.load(chunks + first_chunk + (step + 1) // (CHUNK // BLOCK_N))
            elif part == 1:
                tokens = next_start + column % PIECE
                next_start = tl.load(pieces + first_piece + ((step + 1) * BLOCK_N + column) // PIECE)
            else:
                j = rest // BLOCK_N * BLOCK_N + column
                tokens = tl.load(pieces + first_piece + j // PIECE, mask=j < rest, other=0) + j % PIECE
            tokens = tokens.to(tl.int64)
            from_keys = key + tokens[:, None] * key_stride_n * UNIT + dim * key_stride_d
            from_values = value + tokens[:, None] * value_stride_n * UNIT + dim * value_stride_d
            if part == 2:
                k = tl.load(from_keys, mask=(j < rest)[:, None] & (dim < D), other=0.0)
                v = tl.load(from_values, mask=(j < rest)[:, None] & (dim < D), other=0.0)
            elif D < BLOCK_D:
                k = tl.load(from_keys, mask=dim < D, other=0.0)
                v = tl.load(from_values, mask=dim < D, other=0.0)
            else:
                k = tl.load(from_keys)
                v = tl.load(from_values)
            if EMULATED:
                k, v = k.to(tl.float32), v.to(tl.float32)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if part < 2 and BIAS == "none":
                new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
                weights = tl.exp2(scores * scale - new_max[:, None])
                rescale = tl.exp2(row_max - new_max)
            else:
                scores = scores * scale
                if BIAS == "bool":
                    kept = tl.load(bias + tokens * bias_stride_n) != 0
                    scores = tl.where(kept[None, :], scores, float("-inf"))
                if BIAS == "added":
                    scores += tl.load(bias + tokens * bias_stride_n).to(tl.float32)[None, :] * 1.4426950408889634
                if part == 2:
                    scores = tl.where((j < rest)[None, :], scores, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(scores, 1))
                # Of a row that has seen no key yet the maximum is −∞, and −∞ − −∞ is no number.
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
                weights = tl.exp2(scores - shift[:, None])
                rescale = tl.exp2(row_max - shift)
            row_sum = row_sum * rescale + tl.sum(weights, 1)
            weights = weights.to(value.dtype.element_ty).to(v.dtype)
            acc = tl.dot(weights, v, acc * rescale[:, None], input_precision="ieee")
            row_max = new_max
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    tl.store(out, acc.to(out.dtype.element_ty), mask=real)


def _config(rows: int, keys: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": rows, "BLOCK_N": keys}, num_warps=warps, num_stages=stages)


_HALF = [_config(*sizes) for sizes in dict.fromkeys(itertools.chain(*CONFIGS.values()))]


def _fitting(configs: Sequence[triton.Config], named: Mapping[str, Any], **more: Any) -> list[triton.Config]:
    """The configurations worth a try: those of the dtype, the device and the head dimension, with blocks that fit the lists."""
    query = named["query"]
    major, minor = torch.cuda.get_device_capability(query.device)
    if query.element_size() == 4:
        return [_config(*sizes) for sizes in float_configs(10 * major + minor)]
    longest = min(max(named["queries_each"], 16), ROWS)
    wanted = configs_for(10 * major + minor, query.shape[3], named["bias"] is not None, longest)
    return [c for c in configs if _sizes(c) in wanted] or [_config(*sizes) for sizes in wanted]


def _sizes(config: triton.Config) -> Config:
    return config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"], config.num_warps, config.num_stages


@triton.jit  # type: ignore[untyped-decorator]
def _loop(length):  # type: ignore[no-untyped-def]
    for _ in tl.range(0, tl.load(length)):
        pass


@functools.lru_cache(maxsize=1)
def can_loop() -> bool:
    """Whether the interpreter can loop as often as a loaded number says: that of Triton 3.6 cannot with numpy 2.4."""
    try:
        _loop[(1,)](torch.ones(1, dtype=torch.int32))
    except InterpreterError:
        return False
    return True


interpreted: bool = knobs.runtime.interpret
# Launched as kernel[grid](…); under the interpreter with INTERPRETED.
kernel: Any = (
    _attention
    if interpreted
    else triton.autotune(
        configs=_HALF,
        key=["queries_each", "keys_each", "D", "PIECE", "BIAS"],
        prune_configs_by={"early_config_prune": _fitting},
        cache_results=True,
    )(_attention)
)
