"""Masks of tiles drawn at random, their papers' rules restated token by token, and attention under them written out."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vdcache.attention.masks import AttentionMask, Dense, Diagonal, Frames, MultiDiagonal, Radial, Skip, Stripes, Window

# ---- the rules, on two tokens of the video: (frame, row, column) of the query and of the key -------------------------


def attends(mask, grid, query, key):
    """Whether a token attends to another, by the words of the paper that the mask is from."""
    (i, *_), (j, *_) = query, key
    if isinstance(mask, Window):
        return all(in_window(*axis) for axis in zip(grid, mask.size, mask.window, query, key, strict=True))
    if isinstance(mask, Frames):
        references = {math.floor(n * grid[0] / mask.references) for n in range(mask.references)}
        return i == j or i in references or j in references
    if isinstance(mask, Dense):
        return True
    if isinstance(mask, Skip):
        return False
    rows = grid[1] // mask.chunks
    k, l = query[1] // rows, key[1] // rows  # noqa: E741 — the paper's letters
    if isinstance(mask, Radial):
        return j < mask.sinks or radial(abs(i - j), k, l, mask.chunks)
    if isinstance(mask, MultiDiagonal):
        return abs(k - l) < mask.width
    near = abs((i * mask.chunks + k) - (j * mask.chunks + l)) < mask.width
    return near or (isinstance(mask, Stripes) and (j * mask.chunks + l) % mask.every == 0)


def in_window(tokens, size, window, query, key):
    """Sliding tile attention along one axis: the tiles around the query's, moved inwards until as many lie in the video."""
    tiles, query, key = tokens // size, query // size, key // size
    if window >= tiles:
        return True
    around = range(query - window // 2, query - window // 2 + window)
    while around[0] < 0:
        around = range(around[0] + 1, around[-1] + 2)
    while around[-1] >= tiles:
        around = range(around[0] - 1, around[-1])
    return key in around


def radial(apart, k, l, s):  # noqa: E741
    """Radial attention, equation 4, with a tile in the place of a token and s of them in a frame."""
    r = math.floor(math.log2(max(apart, 1)))
    if 2**r <= s and abs(k - l) + 1 <= Fraction(s, 2**r):
        return True
    return apart % math.ceil(Fraction(2**r, s)) == 0 and k == l


def written_out(mask, grid, before=0, after=0):
    """Every pair of tokens, text included: bool [tokens, tokens]."""
    video = [(f, y, x) for f in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])]
    tokens = [None] * before + video + [None] * after
    if isinstance(mask, Skip):
        return torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    return torch.tensor([[q is None or k is None or attends(mask, grid, q, k) for k in tokens] for q in tokens])


# ---- random masks ----------------------------------------------------------------------------------------------------

small = st.integers(1, 4)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
masks = st.one_of(
    st.builds(Dense),
    st.builds(Skip),
    st.builds(Frames, st.integers(0, 9)),
    st.builds(Window, sizes, sizes),
    st.builds(Radial, small, st.integers(0, 3)),
    st.builds(Diagonal, small, st.integers(1, 9)),
    st.builds(MultiDiagonal, small, small),
    st.builds(Stripes, small, st.integers(1, 9), small),
)


@st.composite
def placed(draw, kinds=masks):
    """A mask with a grid that it fits."""
    mask = draw(kinds)
    if isinstance(mask, Window):
        return mask, tuple(n * s for n, s in zip(draw(sizes), mask.size, strict=True))
    frames, rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    return mask, (max(frames, getattr(mask, "references", 1)), rows * getattr(mask, "chunks", 1), columns)


class Odd(AttentionMask):
    """Tiles of one frame, and only every second of them attends to anything."""

    name = "odd"

    def tile(self, grid):
        return (1, *grid[1:])

    def allowed(self, grid):
        return torch.eye(grid[0], dtype=torch.bool) & (torch.arange(grid[0]) % 2 == 1)


# ---- random operands -------------------------------------------------------------------------------------------------

FORMS = ("heads", "tokens", "fused", "strided")  # how [B, H, N, D] lies in memory
BIASES = (None, "bool", "float")


def noise(*shape, seed=0, dtype=torch.float32, form="heads"):
    """[B, H, N, D]: contiguous, as [B, N, H, D] seen through a transposition, as a part of a larger tensor of queries, keys and
    values, or with every second feature of a larger one."""
    b, h, n, d = shape
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if form == "tokens":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if form == "fused":
        whole = x.new_full((b, n, 3, h, d), torch.nan)
        whole[:, :, 1] = x.transpose(1, 2)
        return whole[:, :, 1].transpose(1, 2)
    if form == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
    return x


def bias_of(kind, batch, heads, tokens, dtype):
    if kind is None:
        return None
    drawn = torch.randn(batch, heads, 1, tokens, generator=torch.Generator().manual_seed(9))
    return drawn > -0.5 if kind == "bool" else drawn.to(dtype)


def by_hand(q, k, v, keeps, scale=None, bias=None):
    """Dense attention in float64; a query that is left without a key gives zero."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.double()
    return scores.masked_fill(~keeps, -torch.inf).softmax(-1).nan_to_num(0.0) @ v


@st.composite
def cases(draw):
    mask, grid = draw(placed())
    on = mask.on(*grid, text=(draw(st.integers(0, 3)), draw(st.integers(0, 3))))
    batch, heads, of_keys = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    heads = max(heads, of_keys)
    forms = draw(st.tuples(*[st.sampled_from(FORMS)] * 3))
    kind = draw(st.sampled_from(BIASES))
    wide = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    return on, batch, heads, of_keys, draw(st.integers(1, 9)), forms, kind, wide, draw(st.sampled_from([None, 0.3]))


def tensors(case, dtype):
    on, batch, heads, of_keys, width, forms, kind, wide, scale = case
    q = noise(batch, heads, on.tokens, width, seed=1, dtype=dtype, form=forms[0])
    k = noise(batch, of_keys, on.tokens, width, seed=2, dtype=dtype, form=forms[1])
    v = noise(batch, of_keys, on.tokens, width + 1, seed=3, dtype=dtype, form=forms[2])
    return q, k, v, on, scale, bias_of(kind, *wide, on.tokens, dtype)


# ---- what is copied --------------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Elements of every tensor that is written and is no result of attention, by the tensor that they come from."""

    def __init__(self, **tensors):
        super().__init__()
        self.of = {t.untyped_storage().data_ptr(): name for name, t in tensors.items()}
        self.alive, self.elements = list(tensors.values()), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        flat = [a for x in args for a in (x if isinstance(x, (list, tuple)) else [x]) if isinstance(a, torch.Tensor)]
        for made in (x for x in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(x, torch.Tensor)):
            place = made.untyped_storage().data_ptr()
            if place not in {a.untyped_storage().data_ptr() for a in flat}:
                attends = "attention" in func.name()
                source = "result" if attends else self.of[flat[0].untyped_storage().data_ptr()]
                self.of[place] = source
                self.alive.append(made)
                self.elements[source] += 0 if attends else made.numel()
        return out
