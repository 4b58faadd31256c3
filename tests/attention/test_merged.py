"""Attention under a mask as dense calls merged by their log-sum-exps: against the mask written out, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vdcache
from tests.support.thorough import examples
from tests.support.tile_masks import FORMS, Copies, Odd, bias_of, by_hand, noise, placed
from vdcache.attention import merged as module
from vdcache.attention.masks import Diagonal, Frames, MultiDiagonal, Radial, Stripes, Window
from vdcache.attention.merged import dense_kernel, merged, why_not_merged
from vdcache.attention.tiles import masked, tiled
from vdcache.errors import ConfigError

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture
def fresh_kernels():
    dense_kernel.cache_clear()
    yield
    dense_kernel.cache_clear()


@given(placed(), st.data())
@settings(deadline=None, max_examples=examples(300, 120))
def test_it_is_dense_attention_with_the_mask_written_out(case, data):
    """Or it is refused, and then for a reason that the mask shows."""
    mask, grid = case
    on = mask.on(*grid, text=(data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))))
    batch, heads, dtype = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.sampled_from([*TOLERANCE]))
    width, scale = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([None, 0.3, 0.0, -0.5]))
    q, k, v = (
        noise(batch, heads, on.tokens, width, seed=s, dtype=dtype, form=data.draw(st.sampled_from(FORMS))) for s in range(3)
    )
    if (reason := why_not_merged(on)) and not mask.is_empty:
        keeps = on.keeps()
        assert "nothing to merge" in reason if keeps.all() else not keeps.all(0).any()
        with pytest.raises(ConfigError, match="'gather' can"):
            merged(q, k, v, on, scale, None)
        return
    got = merged(q, k, v, on, scale, None)
    torch.testing.assert_close(got.double(), by_hand(q, k, v, on.keeps(), scale), rtol=0, atol=TOLERANCE[dtype])
    assert got.dtype == dtype


KINDS = [
    (Frames(1), (6, 4, 6), (0, 0)),
    (Frames(3), (9, 4, 6), (0, 0)),
    (Frames(12), (24, 2, 3), (0, 0)),  # more stretches than are attended to one by one
    (Frames(0), (4, 4, 6), (3, 5)),
    (Window((1, 3, 3), (1, 2, 2)), (4, 4, 6), (0, 4)),
    (Radial(4, 1), (8, 4, 6), (0, 0)),
    (Stripes(4, 3, 2), (6, 4, 6), (2, 0)),
    (Diagonal(4, 2), (5, 4, 6), (0, 3)),
    (MultiDiagonal(4, 1), (6, 4, 6), (1, 0)),
    (Odd(), (4, 2, 2), (1, 2)),  # what attends to nothing of its own
]


@pytest.mark.parametrize(("mask", "grid", "text"), KINDS, ids=str)
@pytest.mark.parametrize("form", ["heads", "tokens"])
def test_every_kind_of_mask_that_has_shared_keys(mask, grid, text, form):
    on = mask.on(*grid, text=text)
    assert not why_not_merged(on)
    q, k, v = (noise(2, 3, on.tokens, 16, seed=s, form=form) * (3 if s == 0 else 1) for s in range(3))
    got = vdcache.tile_attention(q, k, v, mask, grid, text=text, lowering="merged")
    torch.testing.assert_close(got, masked(q, k, v, on, None, None), rtol=0, atol=1e-5)


@given(placed(), st.integers(0, 3), st.data())
@settings(deadline=None, max_examples=examples(100, 40))
def test_what_a_tile_does_not_attend_to_has_no_influence(case, text, data):
    mask, grid = case
    on = mask.on(*grid, text=(0, text))
    if why_not_merged(on):
        return
    q, k, v = (noise(1, 2, on.tokens, 4, seed=s, form=data.draw(st.sampled_from(FORMS))) for s in range(3))
    tile = data.draw(st.integers(0, on.count - 1))
    own = on.tile_of == tile
    unseen = ~on.keeps()[own.nonzero()[0, 0]]
    before = merged(q, k, v, on, None, None)
    k[:, :, unseen], v[:, :, unseen] = torch.nan, torch.nan
    after = merged(q, k, v, on, None, None)
    assert torch.equal(after[:, :, own], before[:, :, own]) and not before.isnan().any()


def test_large_scores_do_not_overflow():
    on = tiled("frames:1", (3, 2, 2))
    q, k, v = (noise(1, 1, on.tokens, 8, seed=s) for s in range(3))
    for factor in (1e3, -1e3):
        got = merged(q * factor, k, v, on, None, None)
        torch.testing.assert_close(got.double(), by_hand(q * factor, k, v, on.keeps()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("frames", "k"), [(8, 1), (8, 2), (9, 3), (6, 4)])
def test_only_the_shared_keys_are_copied(frames, k):
    """A gather copies them for every frame, and a frame's own beside them."""
    space, width = 6, 2 * 4
    q, key, v = (noise(1, 2, frames * space, 4, seed=s, form="tokens") for s in range(3))
    on = tiled(f"frames:{k}", (frames, 2, 3))
    merged(q, key, v, on, None, None)  # makes the tables, and tries the kernel
    with torch.no_grad(), Copies(query=q, key=key, value=v) as copies:
        merged(q, key, v, on, None, None)
    assert copies.elements["key"] == copies.elements["value"] <= k * space * width
    assert copies.elements["query"] <= k * space * width
    assert copies.elements["result"] <= (2 * frames * space + 1) * width + 3 * frames * space * 2, "mixed once, joined once"


# ---- kernels -------------------------------------------------------------------------------------------------------


def in_base_2(query, key, value, scale):
    """As some kernels return it: powers of two, rows padded to a multiple of 32."""
    out, sums = module._flash_on_cpu(query, key, value, scale)
    return out, torch.nn.functional.pad(sums / math.log(2), (0, -sums.shape[2] % 32), value=torch.nan)


def with_a_dimension(query, key, value, scale):
    out, sums = module._flash_on_cpu(query, key, value, scale)
    return out, sums[..., None]


def largest_scores(query, key, value, scale):
    out, _ = module._flash_on_cpu(query, key, value, scale)
    return out, (query @ key.mT * scale).amax(-1)


def other_result(query, key, value, scale):
    out, sums = module._flash_on_cpu(query, key, value, scale)
    return out * 1.5, sums


def fails(query, key, value, scale):
    raise RuntimeError("no kernel for this head dimension\nmore")


@pytest.mark.parametrize("kernel", [in_base_2, with_a_dimension], ids=lambda k: k.__name__)
def test_sums_in_another_form_are_brought_into_one(kernel, monkeypatch, fresh_kernels):
    monkeypatch.setitem(module.KERNELS, "cpu", (kernel,))
    on = tiled("frames:2", (6, 2, 3), 0, 5)
    q, k, v = (noise(1, 2, on.tokens, 8, seed=s) for s in range(3))
    torch.testing.assert_close(merged(q, k, v, on, None, None), masked(q, k, v, on, None, None), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        ((largest_scores,), "largest_scores: what it returns is no log-sum-exp"),
        ((other_result, fails), "other_result: it computes another result; fails: no kernel for this head dimension[)]"),
        ((), "none is known for cpu"),
    ],
)
def test_a_kernel_that_is_none_is_not_taken(kernels, reason, monkeypatch, fresh_kernels):
    monkeypatch.setitem(module.KERNELS, "cpu", kernels)
    on = tiled("frames:1", (3, 2, 2))
    with pytest.raises(ConfigError, match=f"{reason}.*; the lowering 'gather' needs none"):
        merged(*(noise(1, 2, on.tokens, 4, seed=s) for s in range(3)), on, None, None)


def test_the_fastest_kernel_is_taken(monkeypatch, fresh_kernels):
    asked = []

    def times(runs, device, seconds):
        asked.append(len(runs))
        return [2.0, 1.0]

    monkeypatch.setattr(module, "seconds_of", times)
    monkeypatch.setitem(module.KERNELS, "cpu", (module._flash_on_cpu, largest_scores, in_base_2))
    found = dense_kernel(CPU, torch.float32, 16)
    assert found.args == (in_base_2, math.log(2)) and asked == [2]
    assert dense_kernel(CPU, torch.float32, 16) is found and asked == [2], "tried once"


# ---- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "dense"}, "under dense every query attends to everything or nothing"),
        ({"mask": "frames:4"}, "under frames:4 every query attends to everything"),
        ({"mask": "frames:0"}, "under frames:0 no key is attended to by all queries"),
        ({"mask": "diagonal:2:1"}, "under diagonal:2:1 no key is attended to by all queries"),
        ({"bias": bias_of("bool", 1, 1, 16, None)}, "a bias of keys is not taken by all kernels"),
        ({"key": noise(1, 1, 16, 4), "value": noise(1, 1, 16, 4)}, "as many heads; got 2, 1 and 1"),
        ({"value": noise(1, 2, 16, 5)}, "one head dimension; got 4, 4 and 5"),
        ({"query": noise(1, 2, 16, 4).requires_grad_()}, "no gradient flows through log-sum-exps"),
    ],
    ids=str,
)
def test_what_is_refused_says_why(options, message):
    x = noise(1, 2, 16, 4)
    given = {"query": x, "key": x, "value": x, "mask": "frames:1", "grid": (4, 2, 2), "lowering": "merged", **options}
    with pytest.raises(ConfigError, match=f"merged: .*{message}.*; the lowering 'gather' can"):
        vdcache.tile_attention(**given)


def test_an_empty_mask_gives_zero():
    x = noise(1, 2, 16, 4)
    assert not vdcache.tile_attention(x, x, x, "skip", (4, 2, 2), lowering="merged").any()
