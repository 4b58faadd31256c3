"""Attention under a mask of tiles as dense calls whose results are merged by their log-sum-exps.

Many masks have keys that every query attends to: reference frames, sinks, stripes, text. These are put together once, and not once
for each frame as a gather does. The softmax over two disjoint sets of keys is

    out = σ(l₁ − l₂) · out₁ + σ(l₂ − l₁) · out₂,    l = ln Σ exp(score),

as in FlashAttention's splits (arXiv 2205.14135, section 3.1) and ring attention (arXiv 2310.01889). A frame that attends to itself
is a view. A tile that everything attends to is no key of the first set, so it counts once. Queries that attend to everything make
a dense call of their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from vdcache.attention.tile_mask import Group, TileMask
from vdcache.attention.tiles import AT_ONCE, ELSEWHERE, Range, _beside, _like, _Memory, _merged, check_sequence
from vdcache.attention.timing import seconds_of
from vdcache.errors import ConfigError

__all__ = ["dense_kernel", "merged", "why_not_merged"]

aten = torch.ops.aten
VIEWS = 4  # stretches of queries that are attended to one by one; more of them are put together first
Dense = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]  # (query, key, value, scale) → (result, log-sum-exp)


def merged(query: Tensor, key: Tensor, value: Tensor, on: TileMask, scale: float | None, bias: Tensor | None) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V, without gradients; the contract of `vdcache.attention.tiles.gather` but for what is refused.

    Args:
        query, key, value: [B, H, N, D], of one dtype, head dimension and number of heads.
        scale: 1/√D if not given.
        bias: None.

    Raises:
        ConfigError: a mask without keys that all queries share, or operands that no dense kernel returns log-sum-exps for.
    """
    check_sequence(on, query.shape[2], key.shape[2], "merged")
    if on.mask.is_empty:
        return _like(query, value, lambda *shape, **form: query.new_zeros(shape))
    if reason := why_not_merged(on) or _why_not_these(query, key, value, bias):
        raise ConfigError(f"merged: {reason}; the lowering 'gather' can")
    scale = query.shape[3] ** -0.5 if scale is None else scale
    attend = dense_kernel(query.device, query.dtype, query.shape[3])
    memory = _Memory(query, key, on)
    q, k, v = (memory.tiles_first(t) for t in (query, key, value))
    text = [(0, on.before), (on.before + on.video, on.tokens)]
    shared = on.shared
    everywhere = _merged([text[0], *_places(on, on.everywhere), text[1]])
    parts: dict[Range, Tensor] = {}
    with _beside(query, key, value) as aside:
        if everywhere:
            with aside:
                out = memory.attend(memory.take(q, everywhere), k, v, None, scale, 1)
                parts |= memory.split(out, everywhere)
        common = _merged([text[0], *_places(on, shared), text[1]])
        common_keys, common_values = (_bhnd(memory, memory.take(t, common)) for t in (k, v))
        for group in on.groups:
            own = [[t for t in keys if t not in shared] for keys in group.keys]
            for queries, tiles in _stretches(on, group, own, key):
                rows = _bhnd(memory, memory.take(q, queries))
                out, sums = attend(rows, common_keys, common_values, scale)
                if tiles[0]:
                    n = len(tiles)
                    places = _merged([r for t in tiles for r in _places(on, t)])
                    keys, values = (_samples(_bhnd(memory, memory.take(t, places)), n) for t in (k, v))
                    near, near_sums = attend(_samples(rows, n), keys, values, scale)
                    out = _mixed(_rows(near, n), _rows(near_sums, n), out, sums)
                parts |= memory.split(_bhnd(memory, out), queries)
    return memory.joined([parts[r] for r in sorted(parts)])


def why_not_merged(on: TileMask) -> str:
    """Why attention under a mask cannot be merged of two calls; "" where it can."""
    if on.mask.is_empty or not on.groups:
        return f"under {on.mask} every query attends to everything or nothing, so there is nothing to merge"
    if not on.text and not on.shared:
        return f"under {on.mask} no key is attended to by all queries, so there is nothing to compute once"
    return ""


def _why_not_these(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> str:
    """Why these operands cannot be; "" where they can."""
    if bias is not None:
        return "a bias of keys is not taken by all kernels that return log-sum-exps"
    if not query.shape[1] == key.shape[1] == value.shape[1]:
        return f"queries, keys and values have as many heads; got {query.shape[1]}, {key.shape[1]} and {value.shape[1]}"
    if not query.shape[3] == key.shape[3] == value.shape[3]:
        return f"queries, keys and values have one head dimension; got {query.shape[3]}, {key.shape[3]} and {value.shape[3]}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return "no gradient flows through log-sum-exps"
    return ""


def _places(on: TileMask, tiles: Collection[int]) -> list[Range]:
    """The tokens of tiles."""
    return [(on.before + t * on.size, on.before + (t + 1) * on.size) for t in sorted(tiles)]


def _stretches(on: TileMask, group: Group, own: list[list[int]], key: Tensor) -> list[tuple[list[Range], list[list[int]]]]:
    """The calls of a group: the tokens of the queries, and of each class the tiles of keys that are not shared.

    Where every tile attends to itself, tiles next to each other are one view of the queries and of the keys. Of other keys no more are
    copied at once than by a gather.
    """
    by_itself = all(list(q) == k for q, k in zip(group.queries, own, strict=True))
    if by_itself and len(group.queries[0]) == 1:
        runs: list[list[list[int]]] = []
        for tiles in own:
            if runs and runs[-1][-1][0] + 1 == tiles[0]:
                runs[-1].append(tiles)
            else:
                runs.append([tiles])
        if len(runs) <= VIEWS:
            return [(_merged(_places(on, [t for (t,) in run])), run) for run in runs]
    each = max(1, len(own[0]) * on.size) * key[:, :, 0].numel() * key.element_size()  # bytes of a class's keys
    step = max(1, AT_ONCE.get(key.device.type, ELSEWHERE) // each)
    calls = []
    for start in range(0, len(own), step):
        queries = [r for tiles in group.queries[start : start + step] for r in _places(on, tiles)]
        calls.append((_merged(queries), own[start : start + step]))
    return calls


def _bhnd(memory: _Memory, x: Tensor) -> Tensor:
    """[B, H, N, D] from what `memory` holds, and back."""
    return x if memory.heads_first else x.transpose(1, 2)


def _samples(x: Tensor, classes: int) -> Tensor:
    """[B, H, classes · n, D] as [B · classes, H, n, D]; a view where the samples lie one after the other."""
    return x if classes == 1 else x.unflatten(2, (classes, -1)).transpose(1, 2).flatten(0, 1)


def _rows(x: Tensor, classes: int) -> Tensor:
    """[B · classes, H, n, …] as [B, H, classes · n, …]."""
    return x if classes == 1 else x.unflatten(0, (-1, classes)).transpose(1, 2).flatten(2, 3)


def _mixed(first: Tensor, first_sums: Tensor, second: Tensor, second_sums: Tensor) -> Tensor:
    """Two results over disjoint keys as one; sums are natural log-sum-exps [B, H, N], in float32 at least."""
    weight = torch.sigmoid(first_sums - second_sums)[..., None]
    return torch.lerp(second.to(weight.dtype), first.to(weight.dtype), weight).to(first.dtype)


# ---- dense kernels that return log-sum-exps ------------------------------------------------------------------------


def _flash_on_cpu(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, scale=scale)  # type: ignore[no-any-return]


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    found = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, False, False, scale=scale)
    return found[0], found[1]


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    found = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False, scale=scale)
    return found[0], found[1]


def _efficient(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    found = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, False, scale=scale)
    return found[0], found[1]


KERNELS: dict[str, tuple[Dense, ...]] = {"cpu": (_flash_on_cpu,), "cuda": (_cudnn, _flash, _efficient)}
PROBE = (1, 4, 2048)  # samples, heads and tokens of what kernels are timed on


@functools.lru_cache(maxsize=64)
def dense_kernel(device: torch.device, dtype: torch.dtype, width: int) -> Dense:
    """The fastest dense kernel of a device that returns log-sum-exps, for a dtype and a head dimension; tried once.

    What kernels return is not documented: some pad the sums, some return powers of two. So each is held against sums in float64, and
    what comes back here returns natural logarithms [B, H, N], in float32 at least.

    Raises:
        ConfigError: there is none.
    """
    fitting, refused = [], []
    for kernel in KERNELS.get(device.type, ()):
        found = _natural(kernel, device, dtype, width)
        if isinstance(found, str):
            refused.append(f"{kernel.__name__.strip('_')}: {found}")
        else:
            fitting.append(found)
    if not fitting:
        reasons = "; ".join(refused) or f"none is known for {device.type}"
        raise ConfigError(
            f"merged: no dense kernel for {dtype}, head dimension {width}, on {device} returns log-sum-exps ({reasons}); "
            "the lowering 'gather' needs none"
        )
    if len(fitting) == 1:
        return fitting[0]
    b, h, n = PROBE
    x = torch.zeros(b, n, h, width, device=device, dtype=dtype).transpose(1, 2)
    times = seconds_of([functools.partial(f, x, x, x, 1.0) for f in fitting], device, 0.02)
    return fitting[times.index(min(times))]


def _natural(kernel: Dense, device: torch.device, dtype: torch.dtype, width: int) -> Dense | str:
    """A kernel with natural log-sum-exps [B, H, N], or why it is none."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, 2, width, generator=draw, dtype=torch.float64).to(device, dtype).transpose(1, 2)
        for n in (200, 264, 264)  # no multiples of a block, so that what is padded shows
    )
    scale = width**-0.5
    try:
        with torch.no_grad():
            out, sums = kernel(q, k, v, scale)
            scores = (q.double() @ k.double().mT * scale).cpu()
            got, result = _unpadded(sums, q).cpu().double(), out.cpu().double()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    exact = scores.logsumexp(-1)
    allowed = 0.02 if dtype.itemsize < 4 else 1e-4
    if not torch.allclose(result, scores.softmax(-1) @ v.double().cpu(), rtol=0, atol=allowed):
        return "it computes another result"
    for base in (1.0, math.log(2)):
        if torch.allclose(got * base, exact, rtol=0, atol=allowed):
            return functools.partial(_run, kernel, base)
    return "what it returns is no log-sum-exp"


def _run(kernel: Dense, base: float, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    out, sums = kernel(query, key, value, scale)
    sums = _unpadded(sums, query)
    return out, sums if base == 1.0 else sums * base


def _unpadded(sums: Tensor, query: Tensor) -> Tensor:
    """[B, H, N] of what a kernel returned: [B, H, N or more] or [B, H, N, 1]."""
    b, h, n, _ = query.shape
    return sums.reshape(b, h, -1)[:, :, :n]
