"""The attention that tokens receive, against the dense matrix it is the column sums of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vdcache.ir import library


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(q, k, mask=None, causal=False, scale=None):
    """Column sums of the matrix, written out."""
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3) if q.ndim > 2 else k
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0).sum(-2)


@st.composite
def cases(draw):
    batch, heads, lq, lk = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 4])),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
    )
    shared = draw(st.sampled_from([1, heads]))
    mask = draw(st.sampled_from(["none", "bool", "float", "row", "heads", "one"]))
    return (
        batch,
        heads,
        lq,
        lk,
        shared,
        mask,
        draw(st.booleans()) and lq == lk,
        draw(st.sampled_from([None, 0.3])),
        draw(st.integers(1, 60)),
    )


@given(cases())
@settings(deadline=None, max_examples=150)
def test_chunks_of_any_size_give_the_dense_sums(case):
    batch, heads, lq, lk, shared, kind, causal, scale, chunk = case
    q, k = noise(batch, heads, lq, 4), noise(batch, shared, lk, 4, seed=1)
    mask = {
        "none": None,
        "bool": noise(lq, lk, seed=2) > -0.5,
        "float": noise(batch, 1, lq, lk, seed=2),
        "row": noise(batch, 1, 1, lk, seed=2) > -0.5,
        "heads": noise(1, heads, lq, lk, seed=2),
        "one": noise(batch, heads, lq, lk, seed=2) > -0.5,
    }[kind]
    before, library.CHUNK = library.CHUNK, chunk
    try:
        got = library.received(q, k, mask, causal, scale)
    finally:
        library.CHUNK = before
    torch.testing.assert_close(got, dense(q, k, mask, causal, scale), rtol=1e-5, atol=1e-5)


def test_three_dimensions_and_16_bits():
    q = noise(3, 7, 8).bfloat16()
    got = torch.ops.vdcache.attention_received(q, q, None, False, None)
    assert got.dtype == torch.float32 and got.shape == (3, 7)
    torch.testing.assert_close(got, (q @ q.mT).float().mul(8**-0.5).softmax(-1).sum(-2), rtol=2e-3, atol=2e-3)


def test_uniform_attention_gives_every_key_its_share():
    torch.testing.assert_close(
        library.received(torch.zeros(1, 2, 6, 4), noise(1, 2, 3, 4), None, False, None), torch.full((1, 2, 3), 2.0)
    )


@pytest.mark.parametrize("tokens", [512, 1024, 2048])
def test_no_tensor_grows_with_the_square_of_the_tokens(tokens, monkeypatch):
    monkeypatch.setattr(library, "CHUNK", 1 << 16)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    q = noise(1, 2, tokens, 8)
    with Watch():
        library.received(q, q, None, False, None)
    assert largest <= max(1 << 16, q.numel()) < 2 * tokens**2


@given(st.integers(1, 3), st.sampled_from([1, 2]), st.integers(2, 7), st.integers(1, 30))
@settings(deadline=None, max_examples=20)
def test_flex_with_a_score_and_a_mask(batch, shared, tokens, chunk):
    q, k, bias = noise(batch, 2, tokens, 4), noise(batch, shared, tokens, 4, seed=1), noise(2, seed=2)

    def score(s, b, h, i, j, bias):
        return s + bias[h] * (i - j)

    def mask(b, h, i, j):
        return i >= j - b

    before, library.CHUNK = library.CHUNK, chunk
    try:
        got = library.flex_received(q, k, score, (tokens, tokens, mask), 0.5, (bias,), ())
    finally:
        library.CHUNK = before
    at = torch.arange(tokens)
    added = bias[None, :, None, None] * (at[:, None] - at)
    seen = at[:, None] >= at - torch.arange(batch)[:, None, None, None]
    torch.testing.assert_close(got, dense(q, k, added.masked_fill(~seen, -torch.inf), scale=0.5), rtol=1e-5, atol=1e-5)


def test_linear_attention_without_its_matrix():
    q, k = noise(2, 3, 5, 4).relu(), noise(2, 3, 7, 4, seed=1).relu()
    q[0, 0, 0] = 0  # a query that attends to nothing
    weights = q @ k.mT
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(library.linear_received(q, k), weights.nan_to_num(0.0).sum(-2))


def test_weights_with_any_axes():
    w = noise(2, 5, 3, 7).softmax(1)  # keys along 1, queries along 3
    torch.testing.assert_close(library.weights_received(w, 3, 1, True), w.sum(3).transpose(1, 2))
    raw = noise(2, 4, 6).relu()
    torch.testing.assert_close(
        library.weights_received(raw, 1, 2, False), (raw / raw.sum(-1, keepdim=True)).nan_to_num(0.0).sum(1)
    )
