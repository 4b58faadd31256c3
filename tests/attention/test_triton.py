"""Attention under masks of tiles in Triton: run by Triton's interpreter on the CPU, and compiled for a GPU that need not be there.

A GPU runs the compiled kernel in tests/gpu/test_triton.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.thorough import examples, in_turn, some
from vdcache.attention.tiles import _like, masked, tiled
from vdcache.attention.triton import _tables, available, triton_attention
from vdcache.errors import ConfigError

ROOT = Path(__file__).parents[2]
# How far a result may be from the one in float64: rounding of weights and result to the dtype, for values of order one.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
MASKS = [
    "dense",
    "skip",
    "frames:0",
    "frames:1",
    "frames:2",
    "diagonal:2:2",
    "radial:2:1",
    "radial:4:0",
    "multi-diagonal:4:1",
    "stripes:4:3:1",
    "window:1x2x2:1x2x5",
    "window:3x1x3:1x4x1",
    "window:1x1x1:3x1x1",
]


def _unable() -> str:
    """Why the interpreter cannot run here. It must be chosen before Triton is imported, and then it is for the whole process."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _interpreter()
    if torch.cuda.is_available():
        return "TRITON_INTERPRET=1 is not set, and setting it would have every Triton kernel of this process interpreted"
    if "triton" in sys.modules:
        return "Triton is already imported without TRITON_INTERPRET=1"
    os.environ["TRITON_INTERPRET"] = "1"
    return _interpreter()


def _interpreter() -> str:
    from vdcache.attention.block_sparse import can_loop

    versions = " and ".join(f"{name} {metadata.version(name)}" for name in ("triton", "numpy"))
    return "" if can_loop() else f"{versions}: this interpreter cannot loop; it can with numpy<2.4"


UNABLE = _unable()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which calculates for the interpreter
interpreted = pytest.mark.skipif(bool(UNABLE), reason=UNABLE)


@pytest.fixture
def blocks(monkeypatch):
    """Sets the sizes of blocks and chunks."""

    def set_sizes(m: int, n: int, chunk: int = 128) -> None:
        from vdcache.attention import block_sparse

        monkeypatch.setattr(block_sparse, "INTERPRETED", {"BLOCK_M": m, "BLOCK_N": n})
        monkeypatch.setattr(block_sparse, "CHUNK", chunk)
        _tables.cache_clear()

    yield set_sizes
    _tables.cache_clear()


def inputs(n, d=16, dtype=torch.float32, heads=2, shared=1, batch=1, heads_first=True, seed=0):
    """Query (of a spread that makes some weights large), key and value, [B, H, N, D] in either order in memory."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for h in (heads, heads // shared, heads // shared):
        shape = (batch, h, n, d) if heads_first else (batch, n, h, d)
        x = torch.randn(shape, generator=generator).to(dtype)
        made.append(x if heads_first else x.transpose(1, 2))
    return made[0] * 2, made[1], made[2]


def check(q, k, v, on, scale=None, bias=None):
    """The kernel's result is that of dense attention in float64, and has its form."""
    out = triton_attention(q, k, v, on, scale, bias)
    wide = bias.double() if bias is not None and bias.dtype != torch.bool else bias
    want = masked(q.double(), k.double(), v.double(), on, scale, wide)
    form = _like(q, v, torch.empty)
    assert out.dtype == q.dtype and out.shape == form.shape and out.stride() == form.stride()
    torch.testing.assert_close(out.double(), want, rtol=0, atol=TOLERANCE[q.dtype])
    return out


@interpreted
@pytest.mark.parametrize(("mask", "around"), in_turn(MASKS, [(0, 0, True), (3, 0, False), (0, 4, True), (2, 5, False)]))
def test_masks(mask, around, blocks):
    blocks(32, 16, 32)
    before, after, heads_first = around
    on = tiled(mask, (3, 4, 5), before, after)
    check(*inputs(on.tokens, heads_first=heads_first), on)


@interpreted
@pytest.mark.parametrize(("d", "dtype"), in_turn([16, 64, 72, 96, 128], TOLERANCE))
def test_dtypes_and_head_dimensions(d, dtype):
    on = tiled("frames:1", (3, 10, 13), 3)  # chunks, and tiles that are no multiple of a block
    check(*inputs(on.tokens, d, dtype, heads=1), on)


@interpreted
@pytest.mark.parametrize(
    ("sizes", "mask"),
    in_turn([(128, 128, 128), (32, 64, 64), (64, 32, 128), (16, 16, 64)], ["frames:1", "window:3x1x3:1x4x5", "radial:4:1"]),
)
def test_blocks_and_chunks(sizes, mask, blocks):
    blocks(*sizes)
    on = tiled(mask, (3, 8, 10), 1, 4)
    check(*inputs(on.tokens, heads=1), on)


@interpreted
@pytest.mark.parametrize(("shared", "heads_first"), in_turn([2, 4], [True, False]))
def test_heads_of_queries_share_one_of_keys(shared, heads_first):
    on = tiled("window:1x2x2:1x2x5", (2, 4, 10), 2)
    check(*inputs(on.tokens, heads=4, shared=shared, batch=2, heads_first=heads_first), on)


@interpreted
@pytest.mark.parametrize(("scale", "biased"), in_turn([0.5, 2.0, 0.0, -0.3], [False, True]))
def test_scales(scale, biased):
    on = tiled("frames:1", (3, 3, 7), 0, 3)
    bias = torch.randn(1, 1, 1, on.tokens) if biased else None
    check(*inputs(on.tokens), on, scale, bias)


@interpreted
@pytest.mark.parametrize(
    ("shape", "of"),
    in_turn(
        [(1, 1), (2, 1), (1, 4), (2, 4)],
        [("frames:1", "bool"), ("window:1x2x3:1x2x3", "added"), ("frames:1", "added"), ("window:1x2x3:1x2x3", "bool")],
    ),
)
def test_bias(shape, of, blocks):
    mask, kind = of
    blocks(16, 16, 32)
    on = tiled(mask, (2, 4, 6), 0, 6)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(*shape, 1, on.tokens, generator=generator) * 3
    if kind == "bool":
        bias = bias > -1
        bias[..., -6] = True  # text, so that no query is left without a key
    else:
        bias[..., 3:5] = -torch.inf
    check(*inputs(on.tokens, heads=4, shared=2, batch=2, heads_first=kind == "bool"), on, None, bias)


@interpreted
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_query_without_a_key_gets_zero_and_spoils_no_other(kind, blocks):
    blocks(32, 16, 32)
    on = tiled("frames:0", (3, 4, 10))
    bias = torch.ones(1, 1, 1, on.tokens, dtype=torch.bool)
    bias[..., 40:80] = False
    if kind == "added":
        bias = torch.zeros(1, 1, 1, on.tokens).masked_fill(~bias, -torch.inf)
    q, k, v = inputs(on.tokens)
    out = triton_attention(q, k, v, on, None, bias)
    assert (out[:, :, 40:80] == 0).all()
    want = masked(q, k, v, on, None, None)
    for own in (slice(0, 40), slice(80, 120)):
        torch.testing.assert_close(out[:, :, own], want[:, :, own], rtol=0, atol=2e-5)


@interpreted
@pytest.mark.parametrize(
    ("mask", "poison"),
    in_turn(["frames:1", "window:1x2x2:1x2x5", "radial:4:0", "multi-diagonal:4:1", "stripes:4:3:1"], [torch.nan, 3e38]),
)
def test_what_a_tile_may_not_see_has_no_influence(mask, poison, blocks):
    blocks(32, 16, 32)
    on = tiled(mask, (3, 4, 10), 0, 3)  # the first token is unseen under some: what is read for keys that are none
    q, k, v = inputs(on.tokens, heads=1)
    clean = triton_attention(q, k, v, on, None, None)
    own = (on.tile_of == on.count - 1).nonzero().flatten()
    unseen = ~on.keeps()[own[0]]
    assert unseen.any()
    spoiled = [x.clone() for x in (k, v)]
    for x in spoiled:
        x[:, :, unseen] = poison
    assert torch.equal(triton_attention(q, *spoiled, on, None, None)[:, :, own], clean[:, :, own])


@interpreted
@settings(max_examples=examples(40, 15), deadline=None)
@given(data=st.data())
def test_any_mask_on_any_grid(data):
    frames, chunks, rows, width = (data.draw(st.integers(1, n)) for n in (4, 3, 2, 5))
    mask = data.draw(
        st.sampled_from(
            [
                f"frames:{data.draw(st.integers(0, frames))}",
                f"window:{data.draw(st.integers(1, 3))}x2x1:1x{rows}x{width if data.draw(st.booleans()) else 1}",
                f"radial:{chunks}:{data.draw(st.integers(0, 1))}",
                f"diagonal:{chunks}:2",
                f"multi-diagonal:{chunks}:1",
                f"stripes:{chunks}:3:1",
            ]
        )
    )
    on = tiled(mask, (frames, chunks * rows, width), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    shared, batch, first = data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, 2)), data.draw(st.booleans())
    check(*inputs(on.tokens, data.draw(st.integers(1, 24)), dtype, 2, shared, batch, first, data.draw(st.integers(0, 9))), on)


@interpreted
def test_any_strides():
    on = tiled("frames:1", (3, 3, 5), 1)
    q, _, _ = inputs(on.tokens, 48)
    q, k, v = q.chunk(3, -1)  # one projection of all three
    check(q, k, v, on)
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs(on.tokens))  # tokens innermost
    check(q, k, v, on)
    q, k, v = inputs(on.tokens)
    check(q, k.expand(2, -1, -1, -1)[:1], v[:, :1].expand(-1, 2, -1, -1), on)


@interpreted
def test_more_elements_than_32_bits_count():
    on = tiled("frames:0", (2, 3, 3))
    apart = 2**31 // (on.tokens - 2)  # of tokens: the last is beyond 2³¹ elements; memory is taken where it is written
    whole = torch.empty(on.tokens * apart + 64, dtype=torch.float16)
    small = inputs(on.tokens, dtype=torch.float16, heads=1)
    large = []
    for i, x in enumerate(small):
        view = whole.as_strided((1, 1, on.tokens, 16), (0, 0, apart, 1), 16 * i)
        large.append(view.copy_(x))
    torch.testing.assert_close(
        triton_attention(*large, on, None, None), triton_attention(*small, on, None, None), rtol=0, atol=0
    )


@interpreted
def test_no_gradient_is_followed():
    on = tiled("frames:1", (2, 2, 2))
    q, k, v = (x.requires_grad_() for x in inputs(on.tokens))
    assert not triton_attention(q, k, v, on, None, None).requires_grad


def test_it_says_what_it_needs(monkeypatch):
    on = tiled("frames:1", (2, 2, 2))
    q, k, v = inputs(on.tokens)
    with monkeypatch.context() as m:
        m.setattr(importlib.util, "find_spec", lambda name: None)
        assert not available(torch.device("cuda")) and not available(torch.device("cpu"))
        with pytest.raises(ConfigError, match=r"pip install triton.*'gather' needs neither"):
            triton_attention(q, k, v, on, None, None)
    with monkeypatch.context() as m:
        m.setattr(importlib.util, "find_spec", lambda name: name)
        m.delenv("TRITON_INTERPRET", raising=False)
        assert available(torch.device("cuda")) and not available(torch.device("cpu"))
        m.setenv("TRITON_INTERPRET", "1")
        assert available(torch.device("cpu"))


def test_it_says_what_it_refuses(monkeypatch):
    monkeypatch.setattr("vdcache.attention.triton.available", lambda device: True)
    on = tiled("frames:1", (2, 2, 2))
    q, k, v = inputs(on.tokens)
    for args, message in [
        ((q, k, v[..., :8]), "one head dimension, 128 at most; got 16, 16 and 8"),
        (inputs(on.tokens, 160), "128 at most; got 160, 160 and 160"),
        ((q, k, v.half()), "got torch.float32, torch.float32, torch.float16"),
        (tuple(x.double() for x in (q, k, v)), "all float16, bfloat16 or float32"),
        ((q, k, v[:, :1]), r"got \[1, 2, 8, 16\], \[1, 2, 8, 16\], \[1, 1, 8, 16\]"),
        (inputs(on.tokens + 1), "triton_attention: 9 tokens are not the 2 × 2 × 2 tokens of video"),
    ]:
        with pytest.raises(ConfigError, match=message):
            triton_attention(*args, on, None, None)


@pytest.mark.skipif(bool(UNABLE) and "cannot loop" not in UNABLE, reason=UNABLE)
def test_an_interpreter_that_cannot_loop_is_said(monkeypatch):
    from vdcache.attention import block_sparse

    monkeypatch.setattr(block_sparse, "can_loop", lambda: False)
    on = tiled("frames:0", (2, 2, 2))
    with pytest.raises(ConfigError, match=r"Triton \d.* cannot loop with numpy \d.*; pip install 'numpy<2.4'"):
        triton_attention(*inputs(on.tokens), on, None, None)


def test_importing_it_imports_no_triton():
    code = "import sys, vdcache.attention.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vdcache.attention.block_sparse import CHUNK, ROWS, _attention

dtype, d, bias, m, n = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
constants = dict(D=d, BLOCK_D=128, UNIT=8, PIECE=4, BIAS=bias, CHUNK=CHUNK, ROWS=ROWS, EMULATED=False, BLOCK_M=m, BLOCK_N=n)
constants |= {f"{t}_stride_d": 1 for t in ("query", "key", "value", "out")} | ({"bias": None} if bias == "none" else {})
pointers = dict.fromkeys(("query", "key", "value", "out", "bias"), "*" + dtype)
pointers |= dict.fromkeys(("blocks", "rows", "chunks", "pieces"), "*i32")
names = _attention.arg_names
types = {"scale": "fp32"} | pointers | dict.fromkeys(constants, "constexpr")
source = ASTSource(
    _attention,
    {name: types.get(name, "i32") for name in names},
    {(i,): constants[name] for i, name in enumerate(names) if name in constants},
    {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers and name not in constants},
)
made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True})
code = made.asm["ptx"]
loads = code.count("cp.async.ca.shared") + code.count("cp.async.cg.shared")
print("tensor cores" * ("wgmma.mma_async" in code), "wide loads" * (code.count(", 0x10, ") == loads > 0))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(
    ("dtype", "d", "bias", "m", "n"),
    some([("bf16", 128, "none", 128, 128), ("fp16", 72, "added", 64, 64)], lambda case: case[1] == 72),
)
def test_it_compiles_for_a_gpu(dtype, d, bias, m, n, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    args = [sys.executable, "-c", COMPILE, dtype, str(d), bias, str(m), str(n)]
    done = subprocess.run(args, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "tensor cores wide loads"
