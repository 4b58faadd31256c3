"""Attention under a static mask of tiles: the operation, its tables, and the lowerings that plain torch has.

Every lowering equals dense attention with the same mask up to rounding. `gather` is dense attention without any mask: queries
whose keys are the same attend together, in one call, and groups of equal size share a call as further samples. So the fastest
dense kernel of the device runs, and every key and value is copied once for each tile of queries that cannot share it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vdcache.attention.masks import parse_mask
from vdcache.attention.tile_mask import AttentionMask, Group, Sizes, TileMask
from vdcache.errors import ConfigError
from vdcache.util.checks import whole_numbers

__all__ = ["LOWERINGS", "TILE_ATTENTION", "Group", "TileMask", "gather", "masked", "tables_of", "tile_attention", "tiled"]

# Bytes of keys that are gathered for one call: on a CPU, what fresh memory costs is more than what a larger call gains.
AT_ONCE = {"cpu": 8 << 20}
ELSEWHERE = 1 << 30
Range = tuple[int, int]  # tokens from … to, the last not included


@functools.lru_cache(maxsize=512)
def tiled(mask: str, grid: Sizes, before: int = 0, after: int = 0) -> TileMask:
    """The tables of a mask on a sequence, made once."""
    return TileMask(parse_mask(mask), grid, before, after)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def masked(query: Tensor, key: Tensor, value: Tensor, on: TileMask, scale: float | None, bias: Tensor | None) -> Tensor:
    """Dense attention with the mask written out: what every other lowering is compared with."""
    if on.mask.is_empty:
        return _like(query, value, lambda *shape, **form: query.new_zeros(shape))
    keeps = on.keeps().to(query.device)
    if bias is not None:
        keeps = keeps & bias if bias.dtype == torch.bool else bias.masked_fill(~keeps, -torch.inf)
    return _attend(query, key, value, keeps, scale)


def gather(query: Tensor, key: Tensor, value: Tensor, on: TileMask, scale: float | None, bias: Tensor | None) -> Tensor:
    """Dense attention of groups of queries over the keys that they share; no mask.

    Args:
        query, key, value: [B, H, N, D]; keys and values may have fewer heads. Either order of heads and tokens in memory is
            worked on as it lies.
        bias: of keys alone, [B or 1, H or 1, 1, N], as `scaled_dot_product_attention` takes it.
    """
    if on.mask.is_empty:
        return _like(query, value, lambda *shape, **form: query.new_zeros(shape))
    memory = _Memory(query, key, on)
    q, k, v = (memory.tiles_first(t) for t in (query, key, value))
    bias = memory.tiles_first_bias(bias)
    first, last = on.before, on.before + on.video

    def of(tiles: Sequence[int]) -> list[Range]:
        return [(first + t * on.size, first + (t + 1) * on.size) for t in tiles]

    parts: dict[Range, Tensor] = {}  # of the result
    text = [(0, first), (last, on.tokens)]
    everywhere = _merged([text[0], *of(on.everywhere), text[1]])
    with _beside(query, key, value) as aside:
        if everywhere:
            with aside:
                out = memory.attend(memory.take(q, everywhere), k, v, bias, scale, 1)
                parts |= memory.split(out, everywhere)
        for group in on.groups:
            shared = _merged([text[0], *of(group.shared), text[1]])
            tokens = len(group.keys[0]) * on.size + on.text
            each = tokens * key[:, :, 0].numel() * key.element_size()  # bytes of a class's keys
            step = max(1, AT_ONCE.get(key.device.type, ELSEWHERE) // each)
            for start in range(0, len(group.keys), step):
                classes = range(start, min(start + step, len(group.keys)))
                own = [_merged(of([t for t in group.keys[c] if t not in set(group.shared)])) for c in classes]
                keys, values = (memory.take_each(t, own, shared) for t in (k, v))
                biases = None if bias is None else _Memory.take_bias(bias, own, shared)
                queries = [r for c in classes for r in of(group.queries[c])]
                out = memory.attend(memory.take(q, _merged(queries)), keys, values, biases, scale, len(classes))
                parts |= memory.split(out, queries)
    return memory.joined([parts[r] for r in sorted(parts)])


@contextlib.contextmanager
def _beside(*inputs: Tensor) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """On a GPU, a place for work beside the current stream, which waits for it at the end; elsewhere, no other place.

    The last blocks of a call of attention leave most of a GPU idle: two calls that need nothing of each other fill that for each other
    (H200, bfloat16: 2 to 5 % of a masked attention of 720p).
    """
    device = inputs[0].device
    real = all(type(x) in (Tensor, torch.nn.Parameter) for x in inputs)  # a fake tensor has no stream
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)  # what the backward pass keeps outlives the wait
    if device.type != "cuda" or not real or learns or torch.compiler.is_compiling():
        yield contextlib.nullcontext()
        return
    current = torch.cuda.current_stream(device)
    side = _side_stream(device, current.cuda_stream)
    # What is allocated aside and freed here is handed out again on this side stream alone, whose work waits for the current stream first.
    side.wait_stream(current)
    try:
        yield torch.cuda.stream(side)
    finally:
        current.wait_stream(side)


@functools.lru_cache(maxsize=64)
def _side_stream(device: torch.device, current: int) -> Any:
    """One for each stream that attention runs on, so that threads do not wait for each other."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Memory:
    """How heads and tokens of an attention lie in memory, so that tiles are cut where they are contiguous.

    Of [B, N, H, D] tiles become samples, of [B, H, N, D] further heads: either way a reshape and no copy.
    """

    def __init__(self, query: Tensor, key: Tensor, on: TileMask) -> None:
        self.on = on
        self.heads_first = _heads_first(query) and query.shape[1] == key.shape[1]
        self.axis = 2 if self.heads_first else 1

    def tiles_first(self, x: Tensor) -> Tensor:
        """[B, N, H, D] or [B, H, N, D], with the tokens of every tile next to each other."""
        x = x if self.heads_first else x.transpose(1, 2)
        return self._moved(x, back=False) if self.on.moved else x

    def tiles_first_bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None or not self.on.moved:
            return bias
        return _Memory._reordered(bias, self.on, 3, back=False)

    def _moved(self, x: Tensor, back: bool) -> Tensor:
        return _Memory._reordered(x, self.on, self.axis, back)

    @staticmethod
    def _reordered(x: Tensor, on: TileMask, axis: int, back: bool) -> Tensor:
        """The tokens of the video in the order of tiles, or back in that of the grid."""
        video = x.narrow(axis, on.before, on.video)
        t, tile_t, h, tile_h, w, tile_w = on.cuts
        cut = (t, h, w, tile_t, tile_h, tile_w) if back else on.cuts
        order = (0, 3, 1, 4, 2, 5) if back else (0, 2, 4, 1, 3, 5)
        lead, rest = x.shape[:axis], x.shape[axis + 1 :]
        dims = [*range(axis), *(axis + i for i in order), *range(axis + 6, axis + 6 + len(rest))]
        video = video.reshape(*lead, *cut, *rest).permute(dims).reshape(*lead, on.video, *rest)
        if not on.text:
            return video
        return torch.cat([x.narrow(axis, 0, on.before), video, x.narrow(axis, on.before + on.video, on.after)], axis)

    def take(self, x: Tensor, ranges: Sequence[Range]) -> Tensor:
        """Some tokens, one after the other."""
        return _cat([x.narrow(self.axis, a, b - a) for a, b in ranges], self.axis)

    def take_each(self, x: Tensor, own: Sequence[Sequence[Range]], shared: Sequence[Range]) -> Tensor:
        """Of every class its own tokens and those that all share."""
        common = [self.take(x, shared)] if shared else []
        pieces = [p for ranges in own for p in [*(x.narrow(self.axis, a, b - a) for a, b in ranges), *common]]
        return _cat(pieces, self.axis)

    @staticmethod
    def take_bias(bias: Tensor, own: Sequence[Sequence[Range]], shared: Sequence[Range]) -> Tensor:
        """The same of a bias [B, H, 1, N]: [B, H, classes, keys]."""
        rows = [_cat([bias[..., a:b] for a, b in [*ranges, *shared]], 3) for ranges in own]
        return torch.cat(rows, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, classes: int) -> Tensor:
        """Attention of each class over its keys; the result has the form of `q`."""
        n = classes
        if self.heads_first:
            b, h = q.shape[:2]
            q, k, v = (x.reshape(b, h * n, x.shape[2] // n, x.shape[3]) for x in (q, k, v))
            if bias is not None:
                rows = bias.expand(bias.shape[0], h, n, bias.shape[3])
                bias = rows.reshape(rows.shape[0], h * n, 1, rows.shape[3])
            return _attend(q, k, v, bias, scale).reshape(b, h, -1, v.shape[3])
        b = q.shape[0]
        q, k, v = (x.reshape(b * n, x.shape[1] // n, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
        if bias is not None and n > 1:
            rows = bias.expand(b, *bias.shape[1:]).transpose(1, 2)  # [B, classes, H, keys]
            bias = rows.reshape(b * n, rows.shape[2], 1, rows.shape[3])
        return _attend(q, k, v, bias, scale).transpose(1, 2).reshape(b, -1, q.shape[1], v.shape[3])

    def split(self, out: Tensor, ranges: Sequence[Range]) -> dict[Range, Tensor]:
        """The parts of a result that belong to ranges of tokens."""
        ends = itertools.accumulate(b - a for a, b in ranges)
        return {(a, b): out.narrow(self.axis, end - (b - a), b - a) for (a, b), end in zip(ranges, ends, strict=True)}

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        out = _cat(list(parts), self.axis)
        out = self._moved(out, back=True) if self.on.moved else out
        return out if self.heads_first else out.transpose(1, 2)


def _merged(ranges: Sequence[Range]) -> list[Range]:
    """The same tokens in as few ranges."""
    found: list[Range] = []
    for a, b in ranges:
        if found and found[-1][1] == a:
            found[-1] = (found[-1][0], b)
        elif b > a:
            found.append((a, b))
    return found


def _cat(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _heads_first(query: Tensor) -> bool:
    return query.stride(1) >= query.stride(2)


def _like(query: Tensor, value: Tensor, make: Callable[..., Tensor]) -> Tensor:
    """A tensor of the result's form: in memory as the query lies."""
    b, h, n, _ = query.shape
    if _heads_first(query) and h == value.shape[1]:
        return make(b, h, n, value.shape[-1], dtype=query.dtype, device=query.device)
    return make(b, n, h, value.shape[-1], dtype=query.dtype, device=query.device).transpose(1, 2)


Lowering = Callable[[Tensor, Tensor, Tensor, TileMask, float | None, Tensor | None], Tensor]


def _elsewhere(module: str, name: str) -> Lowering:
    """A lowering of another room, which is imported at its first call: its compiler takes long to load."""

    def run(query: Tensor, key: Tensor, value: Tensor, on: TileMask, scale: float | None, bias: Tensor | None) -> Tensor:
        return getattr(importlib.import_module(module), name)(query, key, value, on, scale, bias)  # type: ignore[no-any-return]

    return run


# (query, key, value, tables, scale, bias of keys) → result
LOWERINGS: dict[str, Lowering] = {
    "gather": gather,
    "masked": masked,
    "merged": _elsewhere("vdcache.attention.merged", "merged"),
    "flex": _elsewhere("vdcache.attention.flex", "flex"),
    "triton": _elsewhere("vdcache.attention.triton", "triton_attention"),
}


def tile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | str,
    grid: Sequence[int],
    *,
    text: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    scale: float | None = None,
    lowering: str = "gather",
) -> Tensor:
    """Attention of a video to itself under a static mask: softmax(scale · Q Kᵀ + mask) V. Gradients flow.

    Args:
        query, key, value: [B, H, N, D]; keys and values may have fewer heads, each then shared by as many queries.
        mask: a mask or its text, such as "frames:4".
        grid: latent frames, height and width of the video tokens, frames outermost in the sequence.
        text: tokens of text before and after them; they attend to everything, and everything attends to them.
        bias: of keys alone, [B or 1, H or 1, 1, N]: bool (True attends) or added.
        scale: 1/√D if not given.
        lowering: one of `LOWERINGS`.

    Raises:
        ConfigError: a mask that does not fit the grid, or tokens that are not those of grid and text.
    """
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if torch.compiler.is_compiling() and not learns:  # one node of the graph, which the operation itself checks
        text_ = mask if isinstance(mask, str) else str(mask)
        return _operation(query, key, value, bias, text_, list(grid), text[0], text[1], scale, lowering)
    if lowering not in LOWERINGS:
        raise ConfigError(f"no lowering of tile attention is called {lowering!r}; there are {', '.join(LOWERINGS)}")
    sizes = whole_numbers(grid, "tile_attention: grid")
    if len(around := whole_numbers(text, "tile_attention: text")) != 2:
        raise ConfigError(f"tile_attention: text is the tokens of text (before, after) those of video; got {text}")
    on = tiled(str(parse_mask(mask)), sizes, *around)  # type: ignore[arg-type]
    check_sequence(on, query.shape[2], key.shape[2], "tile_attention")
    b, h, n, _ = query.shape
    if value.shape[:3] != key.shape[:3] or key.shape[0] != b or h % key.shape[1] or key.shape[3] != query.shape[3]:
        raise ConfigError(
            f"tile_attention: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}: keys and values are as many, of the "
            "query's batch and width, and their heads divide its heads"
        )
    if bias is not None and (
        bias.ndim != 4 or bias.shape[0] not in (1, b) or bias.shape[1] not in (1, h) or bias.shape[2:] != (1, n)
    ):
        raise ConfigError(f"tile_attention: bias is of keys alone, [1 or {b}, 1 or {h}, 1, {n}]; got {tuple(bias.shape)}")
    return LOWERINGS[lowering](query, key, value, on, scale, bias)


@torch.library.custom_op("vdcache::tile_attention", mutates_args=())
def _operation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: str,
    grid: Sequence[int],
    before: int,
    after: int,
    scale: float | None,
    lowering: str,
) -> Tensor:
    """`tile_attention` as one node of a graph."""
    frames, height, width = grid
    on = tiled(mask, (frames, height, width), before, after)
    out = LOWERINGS[lowering](query, key, value, on, scale, bias)
    form = _like(query, value, torch.empty)
    return out if out.stride() == form.stride() and out.data_ptr() != query.data_ptr() else form.copy_(out)


@_operation.register_fake
def _(query, key, value, bias, mask, grid, before, after, scale, lowering):  # type: ignore[no-untyped-def]
    return _like(query, value, torch.empty)


TILE_ATTENTION = torch.ops.vdcache.tile_attention.default  # what a graph holds


def tables_of(node: fx.Node) -> TileMask:
    """The tables of a tile attention in a graph."""
    given: Any = node.args
    mask, (frames, height, width), before, after = given[4:8]
    return tiled(mask, (frames, height, width), before, after)


def check_sequence(on: TileMask, query: int, key: int, where: str) -> None:
    """Refuse queries and keys that are not the sequence of the mask.

    Raises:
        ConfigError: naming what was expected and got.
    """
    if query != key:
        raise ConfigError(f"{where}: {query} queries and {key} keys: a mask of tiles is for attention of a sequence to itself")
    if query != on.tokens:
        frames, height, width = on.grid
        raise ConfigError(
            f"{where}: {query} tokens are not the {frames} × {height} × {width} tokens of video and {on.text} of text that the mask is for"
        )
