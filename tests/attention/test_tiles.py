"""Attention under a mask of tiles: every lowering against dense attention with the mask written out; what is read and copied."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import vdcache
from tests.support.tile_masks import FORMS, Copies, Odd, bias_of, by_hand, cases, noise, tensors
from vdcache.attention.flex import BLOCK, block_mask
from vdcache.attention.masks import Dense, Diagonal, Frames, MultiDiagonal, Radial, Skip, Stripes, Window
from vdcache.attention.tiles import TILE_ATTENTION, TileMask, gather, masked, tiled
from vdcache.errors import ConfigError


def check_against_hand(got, q, k, v, on, scale, bias):
    """Weights and values are each rounded a few times to the type that is computed in."""
    allowed = 4 * max(torch.finfo(q.dtype).eps, 1e-14) * (1 + float(v.abs().max()))
    torch.testing.assert_close(got.double(), by_hand(q, k, v, on.keeps(), scale, bias), rtol=0, atol=allowed)
    assert got.dtype == q.dtype


@given(cases(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
@settings(deadline=None, max_examples=200)
def test_gathering_is_dense_attention_with_the_mask_written_out(case, dtype):
    given = tensors(case, dtype)
    for lowering in (gather, masked):
        check_against_hand(lowering(*given), *given)


@given(cases())
@settings(deadline=None, max_examples=60)
def test_gradients_flow_as_through_dense_attention(case):
    q, k, v, on, scale, bias = tensors(case, torch.float64)
    if isinstance(on.mask, Skip):
        return
    where = {"grid": on.grid, "text": (on.before, on.after), "scale": scale, "bias": bias}
    found = []
    for lowering in ("gather", "masked"):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        vdcache.tile_attention(*leaves, on.mask, lowering=lowering, **where).square().sum().backward()
        found.append([x.grad for x in leaves])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("mask", "grid"), [(Frames(1), (3, 1, 2)), (Window((1, 1, 2), (1, 1, 2)), (1, 2, 6)), (Radial(2, 0), (5, 2, 1))], ids=str
)
def test_gradients_are_finite_differences(mask, grid):
    on = mask.on(*grid, text=(1, 2))
    leaves = [noise(1, 2, on.tokens, 2, seed=s, dtype=torch.float64).requires_grad_() for s in range(3)]
    bias = torch.randn(1, 1, 1, on.tokens, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v, b: gather(q, k, v, on, None, b), (*leaves, bias))


@pytest.mark.parametrize("form", FORMS)
def test_frames_that_are_all_references_are_dense_attention_to_the_bit(form):
    q, k, v = (noise(2, 2, 4 * 6 + 3, 8, seed=s, form=form) for s in range(3))
    got = vdcache.tile_attention(q, k, v, Frames(4), (4, 2, 3), text=(1, 2))
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v))


@given(cases(), st.data())
@settings(deadline=None, max_examples=80)
def test_what_a_tile_does_not_attend_to_has_no_influence(case, data):
    """NaN in keys and values that the mask leaves out does not reach the tile, and what it attends to does."""
    q, k, v, on, scale, bias = tensors(case, torch.float32)
    if isinstance(on.mask, Skip):
        return
    tile = data.draw(st.integers(0, on.count - 1))
    own = (on.tile_of == tile).nonzero()[0]
    unseen = ~on.keeps()[own[0]]
    before = gather(q, k, v, on, scale, bias)
    k[:, :, unseen], v[:, :, unseen] = torch.nan, torch.nan
    after = gather(q, k, v, on, scale, bias)
    assert torch.equal(after[:, :, on.tile_of == tile], before[:, :, on.tile_of == tile])
    assert not before.isnan().any()
    assert not unseen.any() or bias is not None or after[:, :, on.tile_of < 0].isnan().all()


def test_a_tile_that_attends_to_text_alone():
    on = TileMask(Odd(), (4, 2, 2), 1, 2)
    given = *(noise(2, 2, on.tokens, 4, seed=s) for s in range(3)), on, None, None
    check_against_hand(gather(*given), *given)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("lowering", ["gather", "masked"])
def test_a_frame_whose_keys_the_bias_leaves_out_gives_zero(kind, lowering):
    q, k, v = (noise(1, 2, 12, 4, seed=s) for s in range(3))
    bias = torch.arange(12)[None, None, None] < 8
    if kind == "float":
        bias = torch.zeros(bias.shape).masked_fill(~bias, -torch.inf)
    out = vdcache.tile_attention(q, k, v, "frames:0", (3, 2, 2), bias=bias, lowering=lowering)
    assert (out[:, :, 8:] == 0).all() and not out.isnan().any() and (out[:, :, :8] != 0).any()


# ---- what is copied --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["heads", "tokens"])
@pytest.mark.parametrize(("frames", "k"), [(8, 1), (8, 2), (9, 4), (6, 0), (6, 6), (5, 3)])
def test_no_key_or_value_is_copied_more_often_than_it_must_be(frames, k, form):
    """Each frame that is no reference needs its own keys and those of the references next to each other; the references may be
    put together once before. Queries and results move once."""
    space, width = 6, 2 * 4
    q, key, v = (noise(1, 2, frames * space, 4, seed=s, form=form) for s in range(3))
    on = tiled(f"frames:{k}", (frames, 2, 3))
    gather(q, key, v, on, None, None)  # makes the tables
    with torch.no_grad(), Copies(query=q, key=key, value=v) as copies:
        gather(q, key, v, on, None, None)
    rest = frames - k
    assert copies.elements["key"] == copies.elements["value"] <= (rest * (1 + k) + k) * space * width
    assert max(copies.elements["query"], copies.elements["result"]) <= frames * space * width
    assert rest or not copies.elements.total()


# ---- the operation in a graph ----------------------------------------------------------------------------------------


@given(cases(), st.sampled_from(["gather", "masked"]))
@settings(deadline=None, max_examples=60)
def test_the_result_lies_in_memory_as_its_fake_does(case, lowering):
    q, k, v, on, scale, bias = tensors(case, torch.float32)
    rest = str(on.mask), list(on.grid), on.before, on.after, scale, lowering
    got = TILE_ATTENTION(q, k, v, bias, *rest)
    with FakeTensorMode() as fake:
        like = TILE_ATTENTION(*(None if x is None else fake.from_tensor(x) for x in (q, k, v, bias)), *rest)
    assert (got.shape, got.stride(), got.dtype) == (like.shape, like.stride(), like.dtype)
    torch.testing.assert_close(got, gather(q, k, v, on, scale, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [Frames(2), Window((1, 1, 2), (1, 2, 2)), Dense(), Skip()], ids=str)
@pytest.mark.parametrize(("form", "of_keys"), [("heads", 2), ("tokens", 2), ("fused", 1)])
def test_the_operation_keeps_torch_s_rules(mask, form, of_keys):
    q, k, v = (noise(1, n, 4 * 4 + 3, 4, seed=s, form=form) for s, n in enumerate((2, of_keys, of_keys)))
    bias = bias_of("bool", 1, 1, q.shape[2], q.dtype) if form == "tokens" else None
    torch.library.opcheck(
        TILE_ATTENTION,
        (q, k, v, bias, str(mask), [4, 2, 2], 1, 2, 0.3, "gather"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


# ---- flex attention --------------------------------------------------------------------------------------------------

LARGE = [
    (Frames(2), (6, 8, 8), (0, 0)),
    (Frames(1), (5, 8, 8), (3, 40)),
    (Window((1, 1, 2), (2, 8, 8)), (4, 8, 16), (0, 5)),
    (Radial(2, 1), (8, 8, 8), (130, 0)),
    (MultiDiagonal(4), (4, 32, 4), (0, 0)),
    (Stripes(2, 3, 2), (6, 10, 7), (1, 1)),
    (Diagonal(4, 3), (5, 16, 4), (0, 77)),
]


@pytest.mark.parametrize(("mask", "grid", "text"), LARGE, ids=str)
def test_the_block_mask_of_flex_attention_keeps_the_same(mask, grid, text):
    """Blocks that are left out hold nothing that is kept, full ones everything, and `mask_mod` decides in between."""
    on = mask.on(*grid, text=text)
    blocks = block_mask(on, torch.device("cpu"))
    at = torch.arange(on.tokens)
    inside = blocks.mask_mod(0, 0, at[:, None].expand(-1, on.tokens), at[None].expand(on.tokens, -1))
    assert torch.equal(inside, on.keeps())
    kinds = torch.zeros(-(-on.tokens // BLOCK), -(-on.tokens // BLOCK), dtype=torch.long)
    for counts, order, kind in (
        (blocks.kv_num_blocks, blocks.kv_indices, 1),
        (blocks.full_kv_num_blocks, blocks.full_kv_indices, 2),
    ):
        for row, (n, own) in enumerate(zip(counts[0, 0].tolist(), order[0, 0].tolist(), strict=True)):
            assert not kinds[row, own[:n]].any(), "a block is listed once"
            kinds[row, own[:n]] = kind
    kind_of = kinds.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: on.tokens, : on.tokens]
    assert torch.equal(torch.where(kind_of == 1, inside, kind_of == 2), on.keeps())
    assert not on.tokens % BLOCK or (kinds[:, -1] < 2).all(), "a block of keys that is cut short is not full"


@pytest.mark.slow
def test_flex_attention_gives_the_same():
    """One compilation serves all masks of so many tiles."""
    q, k, v = (noise(1, h, 6 * 64 + 5, 8, seed=s, form="tokens") for s, h in enumerate((4, 2, 2)))
    bias = bias_of("bool", 1, 4, q.shape[2], q.dtype)
    for mask in (Frames(2), Window((1, 2, 1), (2, 4, 8)), Window((3, 1, 1), (1, 8, 8)), Skip()):  # six tiles each
        on = mask.on(6, 8, 8, text=(2, 3))
        got = vdcache.tile_attention(q, k, v, mask, on.grid, text=(2, 3), bias=bias, scale=0.3, lowering="flex")
        torch.testing.assert_close(got, masked(q, k, v, on, 0.3, bias), rtol=1e-5, atol=1e-5)


# ---- pictures and tables ---------------------------------------------------------------------------------------------


FRAMES = """\
frames:2 on 8 × 2 × 2 tokens: 53.1% of the weights, 1.88× less
████████████████
████····██······
██··██··██······
██····████······
████████████████
██······████····
██······██··██··
██······██····██"""
WINDOW = """\
window:1x3x1:1x1x2 on 2 × 4 × 4 tokens and 4 of text: 35.8% of the weights, 2.79× less
██··██··██······················
··██··██··██····················
██··██··██······················
··██··██··██····················
····██··██··██··················
······██··██··██················
····██··██··██··················
······██··██··██················
················██··██··██······
··················██··██··██····
················██··██··██······
··················██··██··██····
····················██··██··██··
······················██··██··██
····················██··██··██··
······················██··██··██"""


def test_pictures():
    """expecttest writes ASCII alone, so these are kept by hand; a dot stands for a space."""
    assert str(Frames(2).on(8, 2, 2)).replace("  ", "··") == FRAMES
    assert str(Window((1, 3, 1), (1, 1, 2)).on(2, 4, 4, text=(0, 4))).replace("  ", "··") == WINDOW


def test_a_picture_of_many_tiles_is_one_of_their_means():
    on = Frames(16).on(64)
    lines = on.picture(8).splitlines()
    assert len(lines) == 8 and {len(line) for line in lines} == {16}
    assert "█" not in on.picture(8) and " " not in on.picture(8), "no eight frames hold only references or none"
    assert str(Skip().on(4, 2, 2)).startswith("skip: nothing is computed\n")


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowering": "fast"}, "no lowering of tile attention is called 'fast'; there are gather, masked"),
        ({"mask": "frames:5"}, "frames:5 has 5 reference frames, and the video has 4 latent frames"),
        ({"mask": "window"}, "tiles of 4 rows do not cut 2; 1, 2 do"),
        ({"mask": "frame"}, "no mask is called 'frame'"),
        ({"text": (1, 2)}, "16 tokens are not the 4 × 2 × 2 tokens of video and 3 of text"),
        ({"grid": (4, 2, 3)}, "16 tokens are not the 4 × 2 × 3 tokens of video and 0 of text"),
        ({"key": noise(1, 2, 8, 4), "value": noise(1, 2, 8, 4)}, "16 queries and 8 keys: .* a sequence to itself"),
    ],
    ids=str,
)
def test_what_cannot_be_says_so(options, message):
    x = noise(1, 2, 16, 4)
    given = {"query": x, "key": x, "value": x, "mask": "frames:1", "grid": (4, 2, 2), **options}
    with pytest.raises(ConfigError, match=message):
        vdcache.tile_attention(**given)


TOGETHER = "keys and values are as many, of the query's batch and width, and their heads divide its heads"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (4, 4)}, r"grid is \(frames, height, width\), three whole numbers of at least 1; got \(4, 4\)"),
        ({"grid": (4, -2, -2)}, r"three whole numbers of at least 1; got \(4, -2, -2\)"),
        ({"grid": 16}, "grid is a list of whole numbers; got 16"),
        ({"text": (1, 0, -1)}, r"text is the tokens of text \(before, after\) those of video; got \(1, 0, -1\)"),
        ({"bias": noise(1, 1, 16, 16)}, r"bias is of keys alone, \[1 or 1, 1 or 2, 1, 16\]; got \(1, 1, 16, 16\)"),
        ({"bias": noise(1, 2, 1, 7)}, r"bias is of keys alone, .*; got \(1, 2, 1, 7\)"),
        ({"bias": noise(1, 3, 1, 16)}, r"bias is of keys alone, .*; got \(1, 3, 1, 16\)"),
        ({"bias": noise(1, 1, 1, 16)[0, 0]}, r"bias is of keys alone, .*; got \(1, 16\)"),
        ({"value": noise(1, 2, 8, 4)}, TOGETHER),
        ({"key": noise(1, 3, 16, 4), "value": noise(1, 3, 16, 4)}, TOGETHER),
        ({"key": noise(1, 2, 16, 3)}, TOGETHER),
        ({"key": noise(2, 2, 16, 4), "value": noise(2, 2, 16, 4)}, TOGETHER),
    ],
    ids=lambda o: " ".join(o) if isinstance(o, dict) else "",
)
def test_operands_that_do_not_belong_together_are_refused(options, message):
    x = noise(1, 2, 16, 4)
    given = {"query": x, "key": x, "value": x, "mask": "frames:1", "grid": (4, 2, 2), **options}
    with pytest.raises(ConfigError, match=message):
        vdcache.tile_attention(**given)


def test_a_grid_that_is_a_tensor_is_one():
    x = noise(1, 2, 16, 4)
    got = vdcache.tile_attention(x, x, x, "frames:2", torch.tensor([4, 2, 2]))
    torch.testing.assert_close(got, vdcache.tile_attention(x, x, x, "frames:2", (4, 2, 2)))


def test_a_model_that_attends_under_a_mask_itself_is_one_graph():
    torch._dynamo.reset()
    x = noise(1, 2, 16, 4)
    compiled = torch.compile(lambda x: vdcache.tile_attention(x, x, x, "frames:1", (4, 2, 2)), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), vdcache.tile_attention(x, x, x, "frames:1", (4, 2, 2)))
