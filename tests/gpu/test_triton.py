"""On a GPU: the compiled kernel of attention under masks of tiles."""

from __future__ import annotations

import os

import pytest
import torch

from vdcache.attention.tiles import _like, gather, tiled
from vdcache.attention.triton import available, triton_attention

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: torch sees no GPU here"),
    pytest.mark.skipif(not available(CUDA), reason="needs Triton"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET is set: nothing would be compiled"),
]


@pytest.fixture(autouse=True)
def few_configurations(monkeypatch):
    """Two instead of ten: each takes seconds to compile, for every head dimension and kind of bias."""
    from vdcache.attention import block_sparse

    keep = [
        c
        for c in block_sparse._HALF
        if (c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"], c.num_warps) in ((128, 64, 8), (64, 64, 4), (32, 64, 4))
    ]
    monkeypatch.setattr(block_sparse.kernel, "configs", keep)


def inputs(n, d, heads, shared, heads_first, dtype):
    torch.manual_seed(0)
    for h in (heads, heads // shared, heads // shared):
        shape = (1, h, n, d) if heads_first else (1, n, h, d)
        x = torch.randn(shape, device=CUDA).to(dtype)
        yield x if heads_first else x.transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize(
    ("mask", "text", "d", "shared", "heads_first"),
    [
        ("frames:2", 0, 128, 1, False),
        ("radial:5:1", 0, 128, 1, True),
        ("window:3x3x3:1x10x13", 226, 64, 1, True),
        ("window:3x5x5:1x6x4", 0, 64, 1, False),
        ("multi-diagonal:10:1", 0, 72, 3, False),
        ("stripes:30:8:2", 77, 96, 1, True),
    ],
)
def test_it_is_as_exact_as_dense_attention(mask, text, d, shared, heads_first, kind):
    on = tiled(mask, (13, 30, 52), 0, text)
    q, k, v = inputs(on.tokens, d, 6, shared, heads_first, torch.bfloat16)
    bias = None
    if kind != "none":
        bias = torch.randn(1, 1, 1, on.tokens, device=CUDA, dtype=q.dtype)
        bias = bias > -1 if kind == "bool" else bias
    exact = gather(q.float(), k.float(), v.float(), on, None, bias if kind != "added" else bias.float())
    error = (gather(q, k, v, on, None, bias).float() - exact).abs()
    out = triton_attention(q, k, v, on, None, bias)
    assert out.stride() == _like(q, v, torch.empty).stride()
    own = (out.float() - exact).abs()
    assert own.max() <= 2 * error.max() + 1e-4 and own.mean() <= 1.5 * error.mean() + 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes(dtype):
    on = tiled("radial:3:1", (5, 12, 26), 3, 4)
    q, k, v = inputs(on.tokens, 128, 4, 1, True, dtype)
    exact = gather(q.double(), k.double(), v.double(), on, None, None)
    out = triton_attention(q, k, v, on, None, None).double()
    torch.testing.assert_close(out, exact, rtol=0, atol=2e-5 if dtype == torch.float32 else 2e-3)


@torch.no_grad()
def test_more_elements_than_32_bits_count():
    on = tiled("frames:0", (4, 16, 16))
    small = list(inputs(on.tokens, 64, 1, 1, True, torch.bfloat16))
    apart = 2**31 // (on.tokens - 256)
    whole = torch.empty(on.tokens * apart + 256, device=CUDA, dtype=torch.bfloat16)
    large = [whole.as_strided((1, 1, on.tokens, 64), (0, 0, apart // 8 * 8, 1), 64 * i).copy_(x) for i, x in enumerate(small)]
    out, want = (triton_attention(*x, on, None, None) for x in (large, small))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-2)  # the two may be tuned to other blocks


@torch.no_grad()
def test_a_gather_beside_another_stream_is_the_same_bit_for_bit(monkeypatch):
    """What attends to everything runs on a side stream: inputs that are freed at once, memory that is reused, a captured graph."""
    on = tiled("frames:2", (8, 30, 40), 0, 5)
    made = [list(inputs(on.tokens, 64, 8, 1, False, torch.bfloat16)) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr("torch.compiler.is_compiling", lambda: True)  # everything on one stream
        want = [gather(*x, on, None, None).clone() for x in made]
    torch.cuda.synchronize()
    for i in range(40):
        out = gather(*(t.clone(memory_format=torch.preserve_format) for t in made[i % 2]), on, None, None)
        torch.empty_like(out).fill_(float("nan"))  # memory that was just freed is written over
        assert torch.equal(out, want[i % 2])
    x = [t.clone(memory_format=torch.preserve_format) for t in made[0]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gather(*x, on, None, None)
    for inputs_, wanted in zip(made, want, strict=True):
        for mine, given in zip(x, inputs_, strict=True):
            mine.copy_(given)
        graph.replay()
        assert torch.equal(out, wanted)
