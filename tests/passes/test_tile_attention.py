"""tile-attention: what is rewritten and what is left alone, on small functions and on published classes."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st

import vdcache
from tests.support.block_lists import Stack, call
from tests.support.thorough import examples, some
from tests.support.tile_masks import bias_of, by_hand, written_out
from tests.zoo import ZOO, build, graph_of
from vdcache import Recipe
from vdcache.attention.masks import Dense, Frames, Skip, Stripes, Window, masks_text, parse_mask
from vdcache.backends.lowering import tile_sites
from vdcache.errors import CaptureError, ConfigError
from vdcache.ir import dump
from vdcache.ir.capture import trace
from vdcache.ir.edit import copy_graph
from vdcache.methods import recipe
from vdcache.passes import Canonicalise, MarkBranches, MergeSlots, Pipeline, TileAttention
from vdcache.passes.tile_attention import places
from vdcache.patterns import Grid, analyze
from vdcache.patterns.cost import flops
from vdcache.policies import Always
from vdcache.testing import TinyDiT, assert_skipped, captured, latent, time_of

SITE = "scaled_dot_product_attention"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def under(graph, *args, more=(), **options):
    """The graph with masks, and what its pass did."""
    found, steps = Pipeline((Canonicalise(), TileAttention(*args, **options), *more), verify=True).run(graph)
    return found, steps[1]


def canonical(graph):
    return Pipeline((Canonicalise(),)).run(graph)[0]


def refused(graph, *args, **options):
    """The graph as it was, and each reason by the node that it is about."""
    found, step = under(graph, *args, **options)
    assert not step.rewrites and dump(found) == dump(canonical(graph))
    return {r.node: r.reasons[0] for r in step.refusals}


# ---- small functions: eight tokens, two heads ------------------------------------------------------------------------

GRID = (4, 1, 2)
X, W = latent(0, 1, 8, 4), latent(1, 4, 4)


def attending(**options):
    """A stream of one attention."""

    def fn(x, w, bias=None):
        q = (x @ w).unflatten(-1, (2, 2)).transpose(1, 2)
        return x + F.scaled_dot_product_attention(q, q, q, attn_mask=bias, **options).transpose(1, 2).flatten(2)

    return fn


def test_an_attention_gets_its_mask_in_place():
    graph = trace(attending(scale=0.5), X, W).graph
    assert_expected_inline(
        dump(canonical(graph)),
        """\
%0 = input() : f32[1,8,4]
%1 = input() : f32[4,4]
%2 = matmul(%0, %1) : f32[1,8,4]
%3 = view(%2, [1, 8, 2, 2]) : f32[1,8,2,2]
%4 = transpose.int(%3, 1, 2) : f32[1,2,8,2]
%5 = scaled_dot_product_attention(%4, %4, %4, scale=0.5) : f32[1,2,8,2]
%6 = transpose.int(%5, 1, 2) : f32[1,8,2,2]
%7 = view(%6, [1, 8, 4]) : f32[1,8,4]
%8 = add(%0, %7) : f32[1,8,4]
return (%8)""",
    )
    found, step = under(graph, Frames(2), grid=GRID)
    assert step.rewrites == 1 and not step.refusals
    assert_expected_inline(
        dump(found),
        """\
%0 = input() : f32[1,8,4]
%1 = input() : f32[4,4]
%2 = matmul(%0, %1) : f32[1,8,4]
%3 = view(%2, [1, 8, 2, 2]) : f32[1,8,2,2]
%4 = transpose.int(%3, 1, 2) : f32[1,2,8,2]
%5 = vdcache.tile_attention(%4, %4, %4, None, 'frames:2', [4, 1, 2], 0, 0, 0.5, 'gather') : f32[1,2,8,2]
%6 = transpose.int(%5, 1, 2) : f32[1,8,2,2]
%7 = view(%6, [1, 8, 4]) : f32[1,8,4]
%8 = add(%0, %7) : f32[1,8,4]
return (%8)""",
    )


def test_heads_of_one_mask_go_together():
    def fn(x, w):
        q = (x @ w).unflatten(-1, (4, 2)).transpose(1, 2)
        return x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

    graph = trace(fn, latent(0, 1, 8, 8), latent(1, 8, 8)).graph
    found, _ = under(graph, "frames:1|skip|frames:1*2", grid=(3, 1, 2), text=(0, 2))
    assert_expected_inline(
        dump(found),
        """\
%0 = input() : f32[1,8,8]
%1 = input() : f32[8,8]
%2 = matmul(%0, %1) : f32[1,8,8]
%3 = view(%2, [1, 8, 4, 2]) : f32[1,8,4,2]
%4 = transpose.int(%3, 1, 2) : f32[1,4,8,2]
%5 = slice(%4, 1, 0, 1) : f32[1,1,8,2]
%6 = slice(%4, 1, 2, 4) : f32[1,2,8,2]
%7 = cat([%5, %6], 1) : f32[1,3,8,2]
%8 = slice(%4, 1, 0, 1) : f32[1,1,8,2]
%9 = slice(%4, 1, 2, 4) : f32[1,2,8,2]
%10 = cat([%8, %9], 1) : f32[1,3,8,2]
%11 = slice(%4, 1, 0, 1) : f32[1,1,8,2]
%12 = slice(%4, 1, 2, 4) : f32[1,2,8,2]
%13 = cat([%11, %12], 1) : f32[1,3,8,2]
%14 = vdcache.tile_attention(%7, %10, %13, None, 'frames:1', [3, 1, 2], 0, 2, None, 'gather') : f32[1,3,8,2]
%15 = slice(%4, 1, 1, 2) : f32[1,1,8,2]
%16 = slice(%4, 1, 1, 2) : f32[1,1,8,2]
%17 = slice(%4, 1, 1, 2) : f32[1,1,8,2]
%18 = vdcache.tile_attention(%15, %16, %17, None, 'skip', [3, 1, 2], 0, 2, None, 'gather') : f32[1,1,8,2]
%19 = cat([%14, %18], 1) : f32[1,4,8,2]
%20 = slice(%19, 1, 0, 1) : f32[1,1,8,2]
%21 = slice(%19, 1, 3, 4) : f32[1,1,8,2]
%22 = slice(%19, 1, 1, 3) : f32[1,2,8,2]
%23 = cat([%20, %21, %22], 1) : f32[1,4,8,2]
%24 = permute(%23, [0, 2, 1, 3]) : f32[1,8,4,2]
%25 = clone(%24, memory_format=torch.contiguous_format) : f32[1,8,4,2]
%26 = permute(%25, [0, 2, 1, 3]) : f32[1,4,8,2]
%27 = transpose.int(%26, 1, 2) : f32[1,8,4,2]
%28 = view(%27, [1, 8, 8]) : f32[1,8,8]
%29 = add(%0, %28) : f32[1,8,8]
return (%29)""",
    )


# ---- every way in which an attention is written ----------------------------------------------------------------------

MASKS = [Dense(), Frames(0), Frames(1), Frames(3), Window((2, 1, 1), (1, 1, 1)), Stripes(1, 2), Skip()]


@st.composite
def written(draw):
    """One mask for all heads or one a head; heads of queries and keys; the order in memory; text; a mask of keys; a scale."""
    heads, of_keys = draw(st.sampled_from([(1, 1), (2, 2), (4, 4), (4, 2)]))
    masks = draw(st.lists(st.sampled_from(MASKS), min_size=heads, max_size=heads))
    if heads != of_keys or draw(st.booleans()):
        masks = masks[:1]
    order = draw(st.sampled_from(["tokens", "heads", "mixed"]))
    text = draw(st.sampled_from([(0, 0), (2, 0), (1, 2)]))
    bias = draw(st.sampled_from([None, "bool", "float", "expanded"]))
    return masks, heads, of_keys, order, text, bias, draw(st.sampled_from([1, heads])), draw(st.sampled_from([None, 0.3]))


@given(written(), st.integers(1, 2))
@settings(deadline=None, max_examples=examples(25, 12))
@torch.no_grad()
def test_each_head_attends_under_its_own_mask(case, batch):
    masks, heads, of_keys, order, text, kind, wide, scale = case
    grid, width = (3, 2, 2), 4
    tokens = 12 + sum(text)
    x, w = latent(0, batch, tokens, heads * width), latent(1, heads * width, (heads + 2 * of_keys) * width)
    given = () if kind is None else (bias_of("bool" if kind == "expanded" else kind, 1, wide, tokens, x.dtype),)

    def split(x, w):
        parts = (x @ w).unflatten(-1, (-1, width)).transpose(1, 2).split([heads, of_keys, of_keys], 1)
        return [p.contiguous() if order == "heads" or (order == "mixed" and i) else p for i, p in enumerate(parts)]

    def fn(x, w, bias=None):
        q, k, v = split(x, w)
        if kind == "expanded":
            bias = bias.expand(batch, heads, tokens, tokens)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=heads != of_keys)
        return x + out.transpose(1, 2).flatten(2)

    graph, step = under(trace(fn, x, w, *given).graph, masks_text(masks), grid=grid, text=text)
    assert step.rewrites == any(m != Dense() for m in masks)
    q, k, v = split(x, w)
    keeps = torch.stack([written_out(m, grid, *text) for m in masks])
    want = x + by_hand(q, k, v, keeps, scale, *given).transpose(1, 2).flatten(2)
    torch.testing.assert_close(graph(x, w, *given)[0].double(), want, rtol=1e-5, atol=1e-5)
    (value,) = graph.graph.output_node().args[0]
    assert (value.meta["val"].shape, value.meta["val"].stride()) == (want.shape, want.stride())


# ---- what stays as it was --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("two", [False, True])
@torch.no_grad()
def test_what_is_dense_changes_nothing(two):
    graph = trace(Stack(two, blocks=2), *call(0)).graph
    for masks in ("dense", ["dense", "dense"], "dense*2", Dense()):
        found, step = under(graph, masks)
        assert step.rewrites == 0 and dump(found) == dump(canonical(graph))
    model = Stack(two, blocks=2)
    compiled = vdcache.compile(model, recipe("always").with_masks("dense"), inner="eager")
    for step in range(2):
        assert all(torch.equal(a, b) for a, b in zip(compiled(*call(step)), model(*call(step)), strict=True))


def fresh_anatomy(graph):
    graph = copy_graph(graph)
    graph.meta.pop("vdcache.analysis", None)
    return analyze(graph)


def described(found):
    """All that does not name a node."""
    sites = [(a.kind, a.layout, a.heads, a.q_len, a.kv_len, a.head_dim, a.spans, a.grid) for a in found.attentions]
    branches = [(b.name, b.kind, b.layout, b.block, b.bytes, b.module, len(b.attentions), len(b.leaks)) for b in found]
    streams = [(s.role, s.shape, s.spans) for s in found.streams]
    return (
        sites,
        branches,
        streams,
        found.blocks,
        found.timestep_inputs,
        found.latents,
        found.grid,
        [r.reason for r in found.refusals],
    )


def check_anatomy(plain, masked):
    """The analysis is the same under masks, and attention costs what is left of it."""
    before, after, sites = fresh_anatomy(plain), fresh_anatomy(masked), tile_sites(masked)
    assert described(after) == described(before)
    assert [a.form for a in after.attentions].count("tiles") == len(sites)
    nodes = {n.name: n for n in plain.graph.nodes}
    dense = [flops(nodes[a.node]) for _, a in before.denoising_attentions()]
    assert [flops(n) for n, _ in sites] == [round(on.density * d) for d, (_, on) in zip(dense, sites, strict=True)]
    assert before.flops - after.flops == sum(dense) - sum(flops(n) for n, _ in sites) > 0


@pytest.mark.parametrize("two", [False, True])
def test_the_anatomy_is_the_same_under_a_mask(two):
    graph = trace(Stack(two, blocks=2), *call(0)).graph
    check_anatomy(canonical(graph), under(graph, "frames:0")[0])


def test_branches_are_the_same_under_masks_of_heads():
    graph = trace(Stack(True, blocks=2), *call(0)).graph
    found, _ = under(graph, "frames:1|frames:0")
    before, after = fresh_anatomy(canonical(graph)), fresh_anatomy(found)
    assert described(after)[2:] == described(before)[2:] and [b.name for b in after] == [b.name for b in before]
    assert [(b.kind, b.layout, b.block, len(b.leaks)) for b in after] == [
        (b.kind, b.layout, b.block, len(b.leaks)) for b in before
    ]
    assert [(a.kind, a.layout, a.spans, a.heads) for a in after.attentions] == [
        (a.kind, a.layout, a.spans, 1) for a in before.attentions for _ in range(2)
    ]


@pytest.mark.parametrize("what", ["analysis", "second pass"])
def test_what_the_patterns_say_after_the_pass_is_of_the_graph_as_it_is(what):
    graph = trace(Stack(False, blocks=2), *call(0)).graph
    if what == "second pass":
        found, _ = under(graph, "frames:1", sites=(SITE,), more=(TileAttention("frames:0"),))
        assert [str(on.mask) for _, on in tile_sites(found)] == ["frames:1", "frames:0"]
    else:
        found, _ = under(graph, "frames:1")
        sites = {a.node for a in analyze(found).attentions}
        assert sites and sites <= {n.name for n in found.graph.nodes}


def test_what_a_cache_skips_is_skipped_under_a_mask():
    graph, _ = under(
        trace(Stack(True, blocks=2), *call(0)).graph, ["frames:0", "frames:1"], more=(MarkBranches(), MergeSlots())
    )
    assert_skipped(graph, *Stack(True, blocks=2).state_dict().values(), *call(0))


# ---- refusals --------------------------------------------------------------------------------------------------------

ALONE = "it runs inside one frame already", "it runs over the frames of one place, so there are no tiles in it"


def test_spatial_and_temporal_attentions_are_left_alone():
    graph = graph_of("latte")[0]
    layouts = {a.node: a.layout for _, a in analyze(canonical(graph)).denoising_attentions()}
    assert set(layouts.values()) == {"spatial", "temporal"}
    assert refused(graph, "frames:1") == {n: ALONE[layout == "temporal"] for n, layout in layouts.items()}


def test_spatial_attention_has_tiles_where_its_frame_is_given_as_a_grid():
    graph, _ = graph_of("latte")
    sites = [a.node for _, a in analyze(canonical(graph)).denoising_attentions() if a.layout == "spatial"]
    found, step = under(graph, Window((1, 1, 1), (1, 2, 4)), sites=sites, grid=(1, 4, 4))
    assert step.rewrites == len(sites) == 2 and {on.density for _, on in tile_sites(found)} == {0.5}


def test_a_site_that_was_asked_for_by_name_and_cannot_have_a_mask():
    graph = graph_of("wan")[0]
    crossed = next(a for a in analyze(canonical(graph)).attentions if a.kind == "cross")
    with pytest.raises(
        ConfigError, match=f"no mask can be put on '{crossed.node}': it is a cross-attention of 48 queries to 6 keys"
    ):
        under(graph, "frames:1", sites=(crossed.node,))
    with pytest.raises(ConfigError, match=r"no mask can be put on .*: it runs inside one frame already"):
        under(graph_of("latte")[0], ["frames:1", "dense", "frames:1", "dense"])
    with pytest.raises(ConfigError, match=f"no attention is called 'attn'; there are {SITE}, {SITE}_1"):
        under(graph, "frames:1", sites=("attn",))


TINY = latent(1), time_of(2), latent(9, 1, 3, 4)
UNKNOWN = "the graph does not show frames, height and width of its tokens: give grid=(frames, height, width)"


def test_a_grid_that_the_graph_does_not_show():
    graph = trace(TinyDiT(), *TINY).graph
    with pytest.raises(ConfigError) as error:
        under(graph, "frames:1")
    assert str(error.value) == (
        f"tile-attention: no attention of this model can have the mask frames:1:\n{SITE}: {UNKNOWN}\n{SITE}_1: {UNKNOWN}"
    )
    with pytest.raises(ConfigError, match=f"no mask can be put on '{SITE}': the graph does not show"):
        under(graph, ["frames:1", "dense"])
    assert {str(p) for p in places(canonical(graph)).values()} == {f"{SITE}: {UNKNOWN}", f"{SITE}_1: {UNKNOWN}"}


@pytest.mark.parametrize(
    ("where", "spans"),
    [
        ({"grid": (3, 1, 2)}, ((3, 1, 2), 0, 0)),
        ({"grid": [2, 1, 2], "text": [2, 0]}, ((2, 1, 2), 2, 0)),
        ({"grid": (1, 3, 1), "text": (1, 2)}, ((1, 3, 1), 1, 2)),
    ],
    ids=str,
)
def test_a_grid_and_a_text_that_are_given(where, spans):
    found, step = under(trace(TinyDiT(), *TINY).graph, Window((1, 1, 1), (1, 1, 1)), **where)
    assert step.rewrites == 2
    assert {(on.grid, on.before, on.after) for _, on in tile_sites(found)} == {spans}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"grid": (2, 1, 2)}, r"6 keys are not the 4 video tokens, .*; give text=\(2, 0\) or \(0, 2\) if these are of a text"),
        ({"grid": (2, 2, 2)}, "6 keys are not the 8 video tokens, and the graph does not show which of them are\n"),
        ({"grid": (2, 1, 2), "text": (1, 2)}, "its 6 tokens are not 1 of text, 2 × 1 × 2 of video and 2 of text"),
    ],
    ids=str,
)
def test_a_grid_and_a_text_that_do_not_add_up(where, message):
    with pytest.raises(ConfigError, match=message):
        under(trace(TinyDiT(), *TINY).graph, "frames:1", **where)


@pytest.mark.parametrize(
    ("options", "bias", "message"),
    [
        ({}, torch.zeros(8, 8), r"its own mask \(8, 8\) differs between queries; one of keys alone, \[B, 1, 1, 8\], can be"),
        ({}, torch.zeros(1, 2, 8, 8), r"its own mask \(1, 2, 8, 8\) differs between queries"),
        ({"is_causal": True}, None, "it is causal"),
        ({"dropout_p": 0.1}, None, "it drops weights at random"),
    ],
    ids=["every query", "and head", "causal", "dropout"],
)
def test_attentions_that_are_more_than_a_sequence_to_itself(options, bias, message):
    given = (X, W) if bias is None else (X, W, bias)
    graph = trace(attending(**options), *given).graph
    with pytest.raises(ConfigError, match=f"no mask can be put on '{SITE}': {message}"):
        under(graph, "frames:1", sites=(SITE,), grid=GRID)
    if "dropout_p" in options:  # a branch that must never be skipped is none
        assert refused(graph, "frames:1", grid=GRID) == {"output": "the graph has no attention among video tokens"}
        return
    with pytest.raises(ConfigError, match=f"no attention of this model can have the mask frames:1:\n{SITE}: {message}"):
        under(graph, "frames:1", grid=GRID)


def test_attention_that_is_written_out():
    def fn(x, w):
        q = (x @ w).unflatten(-1, (2, 2)).transpose(1, 2)
        return x + ((q @ q.mT).softmax(-1) @ q).transpose(1, 2).flatten(2)

    with pytest.raises(
        ConfigError, match="attention written as 'matmul-softmax' is not rewritten; scaled_dot_product_attention"
    ):
        under(trace(fn, X, W).graph, "frames:1", grid=GRID)


def test_flex_attention_is_left_alone():
    from torch.nn.attention.flex_attention import flex_attention

    def fn(x, w):
        q = (x @ w).unflatten(-1, (2, 16)).transpose(1, 2)
        return x + flex_attention(q, q, q).transpose(1, 2).flatten(2)

    graph, _ = captured(fn, latent(0, 1, 8, 32), latent(1, 32, 32))
    with pytest.raises(ConfigError, match="attention written as 'flex' is not rewritten; scaled_dot_product_attention"):
        under(graph, "frames:1", grid=GRID)


def test_a_graph_without_attention():
    graph = trace(lambda x, w: x + torch.relu(x @ w), X, W).graph
    assert refused(graph, "frames:1") == {"output": "the graph has no attention among video tokens"}


def test_one_attention_of_several_that_cannot_have_the_mask_is_left_alone():
    def fn(x, w):
        return attending()(attending(is_causal=True)(x, w), w)

    found, step = under(trace(fn, X, W).graph, "frames:1", grid=GRID)
    assert step.rewrites == 1 and [str(r) for r in step.refusals] == [f"{SITE}: it is causal"]
    assert len(tile_sites(found)) == 1


@pytest.mark.parametrize(
    ("masks", "options", "message"),
    [
        ("frames:5", {}, f"'{SITE}': frames:5 has 5 reference frames, and the video has 4 latent frames"),
        ("window:1x1x1:1x2x1", {}, f"'{SITE}': window:1x1x1:1x2x1: tiles of 2 rows do not cut 1"),
        ("frames:1|frames:9", {}, f"'{SITE}': frames:9 has 9 reference frames"),
        (
            ["frames:1"] * 3,
            {},
            r"3 masks for 1 attentions; give one for all, or one for each. For one a head write 'frames:2\*6",
        ),
        ("frames:1*3|dense", {}, f"'{SITE}' has 2 heads, and 4 masks are given for them"),
        (["frames:1"] * 2, {"sites": (SITE,)}, "2 masks for 1 attentions"),
    ],
    ids=str,
)
def test_masks_that_do_not_fit_name_the_site(masks, options, message):
    with pytest.raises(ConfigError, match=f"tile-attention: {message}"):
        under(trace(attending(), X, W).graph, masks, grid=GRID, **options)


def test_heads_that_share_keys_have_one_mask():
    def fn(x, w):
        q, k = (x @ w).unflatten(-1, (2, 2)).transpose(1, 2), (x @ w[:, :2]).unflatten(-1, (1, 2)).transpose(1, 2)
        return x + F.scaled_dot_product_attention(q, k, k, enable_gqa=True).transpose(1, 2).flatten(2)

    graph = trace(fn, X, W).graph
    assert under(graph, "frames:1*2", grid=GRID)[1].rewrites == 1
    with pytest.raises(ConfigError, match=f"'{SITE}' shares keys among heads, so all its heads have one mask"):
        under(graph, "frames:1|dense", grid=GRID)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": ()}, "give one mask for all attentions, or one for each"),
        ({"masks": "frame:1"}, "no mask is called 'frame'"),
        ({"masks": ["frames:1", 3]}, "no mask is called '3'"),
        (
            {"masks": "frames:1", "grid": (4, 4)},
            r"grid is \(frames, height, width\) of the video tokens, three whole numbers of at least 1; got \(4, 4\)",
        ),
        (
            {"masks": "frames:1", "grid": (4, 4, 0)},
            r"grid is \(frames, height, width\) of the video tokens, three whole numbers of at least 1; got \(4, 4, 0\)",
        ),
        ({"masks": "frames:1", "grid": 4}, r"grid is \(frames, height, width\) .*; got 4"),
        ({"masks": "frames:1", "grid": (4, 4.0, 4)}, r"grid is \(frames, height, width\) .*; got \(4, 4.0, 4\)"),
        (
            {"masks": "frames:1", "text": (1,)},
            r"text is the tokens of text \(before, after\) those of video, two whole numbers of at least 0; got \(1,\)",
        ),
        ({"masks": "frames:1", "text": (1, -1)}, r"text is the tokens of text .*; got \(1, -1\)"),
        ({"masks": "frames:1", "text": "ab"}, "text is the tokens of text .*; got 'ab'"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        TileAttention(**options)


# ---- texts and recipes -----------------------------------------------------------------------------------------------

TEXTS = {
    TileAttention("frames:4"): "tile-attention{masks=[frames:4]}",
    TileAttention([Frames(4), "dense", "radial"]): "tile-attention{masks=[frames:4,dense,radial:8:1]}",
    TileAttention([["frames:2", "frames:2", Skip()], Window()]): ("tile-attention{masks=[frames:2*2|skip,window:3x3x3:1x4x4]}"),
    TileAttention("frames:1", sites=("a", "b_1"), grid=[4, 2, 3], text=(0, 7)): (
        "tile-attention{masks=[frames:1],sites=[a,b_1],grid=[4,2,3],text=[0,7]}"
    ),
}


def test_the_text_of_the_pass_reads_back():
    for made, text in TEXTS.items():
        assert str(made) == text
        pipeline = Pipeline((Canonicalise(), made, MarkBranches(start=1), MergeSlots()))
        assert Pipeline.parse(str(pipeline)) == pipeline


@pytest.mark.parametrize("made", TEXTS, ids=str)
def test_a_recipe_with_masks_is_read_back_from_its_file(made, tmp_path):
    plain = recipe("taylorseer-4-1")
    masked = plain.with_masks([m.split("|") for m in made.masks], sites=made.sites, grid=made.grid, text=made.text)
    masked.to_json(tmp_path / "recipe.json")
    assert Recipe.from_json(tmp_path / "recipe.json") == Recipe.from_json(masked.to_json()) == masked
    assert masked.passes == (made, *plain.passes) and masked.masks == made.masks and plain.masks == ()


def test_masks_take_the_place_of_those_that_were_there():
    tiles = recipe("tiles-4")
    assert tiles.masks == ("frames:4",) and tiles.with_masks("frames:2").passes == (TileAttention("frames:2"),)
    both = recipe("tiles-4+adacache-fast")
    fast = recipe("adacache-fast")
    assert (both.name, both.policy, both.books) == ("tiles-4+adacache-fast", fast.policy, fast.books)
    assert both.passes == (TileAttention("frames:4"), *fast.passes) and recipe("always").masks == ()
    assert Recipe.from_json(both.to_json()) == both


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiles-4+adacash", "no recipe is called 'adacash'; did you mean adacache"),
        ("tiles+every-3", "no recipe is called 'tiles.every-3'"),
        ("tiles-4.5", "no recipe is called 'tiles-4.5'"),
        ("tiles--1", "frames: references is a whole number of at least 0; got -1"),
        ("tiles-4+", "no recipe is called ''"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(ConfigError, match=message):
        recipe(name)


# ---- published classes -----------------------------------------------------------------------------------------------

SPANS = {  # the tokens of the video in the sequence, and those of text before and after: as the architectures have them
    "wan": (3, (3, 4, 4), 0, 0),
    "cogvideox": (3, (3, 4, 4), 6, 0),
    "hunyuan_video": (4, (3, 6, 6), 0, 6),
    "consisid": (4, (3, 4, 4), 6, 0),
    "open_sora_plan": (3, (3, 4, 4), 0, 0),
}


def value(output):
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)


def with_masks_by_hand(model, call, mask, grid, before, after, monkeypatch):
    """The eager model, with the mask given to every attention of that many tokens to themselves."""
    keeps, dense, met = written_out(mask, grid, before, after), F.scaled_dot_product_attention, []

    def attend(query, key, value, attn_mask=None, *args, **kwargs):
        if query.shape[-2] == key.shape[-2] == len(keeps):
            met.append(None)
            own = attn_mask.bool() if attn_mask is not None else torch.tensor(True)
            attn_mask = keeps & own
        return dense(query, key, value, attn_mask, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        return value(model(**call)), len(met)


@pytest.mark.parametrize("name", some(SPANS, {"wan", "cogvideox", "hunyuan_video"}.__contains__))
@torch.no_grad()
def test_where_the_video_lies_in_published_classes(name, monkeypatch):
    sites, grid, before, after = SPANS[name]
    model, given = build(name), ZOO[name].call(0, 6)
    want, met = with_masks_by_hand(model, given, Frames(1), grid, before, after, monkeypatch)
    assert met == sites and not torch.allclose(want, value(model(**given)), atol=1e-3)
    for tiles in ("masked", "gather") if name == "wan" else ("gather",):
        compiled = vdcache.compile(model, "tiles-1", inner="eager", dynamic=False, tiles=tiles, strict=True)
        torch.testing.assert_close(value(compiled(**given)), want, rtol=1e-5, atol=2e-6)
    (graph,) = compiled.vdcache.graphs
    assert [(on.grid, on.before, on.after) for _, on in tile_sites(graph.guarded.module)] == [(grid, before, after)] * sites
    check_anatomy(canonical(graph.guarded.captured.graph), graph.guarded.module)
    assert (
        graph.masks
        == f"{sites} attentions under masks (frames:1): {tile_sites(graph.guarded.module)[0][1].density:.0%} of the weights"
    )


@torch.no_grad()
def test_a_model_in_which_nothing_has_tiles_says_so_once():
    model = build("latte")
    compiled = vdcache.compile(model, "tiles-1", inner="eager", dynamic=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(3):
            assert torch.equal(value(compiled(**ZOO["latte"].call(step, 6))), value(model(**ZOO["latte"].call(step, 6))))
    (warning,) = [w for w in said if issubclass(w.category, vdcache.VdcacheWarning)]
    assert "the masks of 'tiles-1' are on no attention of this graph" in str(warning.message)
    assert all(reason in str(warning.message) for reason in ALONE)


@torch.no_grad()
def test_a_model_without_attention_is_an_error_where_that_is_asked_for():
    class Stream(TinyDiT):
        def forward(self, x, timestep, text):
            h = self.inp(x) + self.time(self.sinusoids(timestep, x.dtype))[:, None, :8]
            return self.out(h + self.mlp[0](h))

    message = r"the masks of 'tiles-1' are on no attention of this graph: output: the graph has no attention among video tokens"
    with pytest.raises(CaptureError, match=message):
        vdcache.compile(Stream(), "tiles-1", inner="eager", strict=True)(*TINY)


@torch.no_grad()
def test_masks_and_a_cache():
    """A computed step is the model under its masks, bit for bit; a reused one skips them."""
    model, case = build("wan"), ZOO["wan"]
    tiles = vdcache.compile(model, "tiles-1", inner="eager")
    both = vdcache.compile(model, "tiles-1+every-3", num_steps=5, inner="eager", strict=True)
    for step in range(5):
        got, want = value(both(**case.call(step, 6))), value(tiles(**case.call(step, 6)))
        assert torch.equal(got, want) == (step in (0, 3, 4))
    assert both.vdcache.history.computed_steps() == [0, 3, 4]
    (graph,) = both.vdcache.graphs
    left = {str(p): len(tile_sites(graph.variants[p].graph)) for p in graph.variants.plans}
    assert left == {"recompute": 3, "reuse{all}": 0}


@torch.no_grad()
def test_texts_of_unequal_length_beside_the_video():
    """Where the text is no part of the sequence, attentions keep their masks even if its length is a symbol."""
    model, masked = TinyDiT(), Recipe("masked", Always()).with_masks("frames:0", grid=(3, 1, 2))
    symbols = torch.compile(model, backend="vdcache", options={"recipe": masked, "inner": "eager", "strict": True})
    fixed = vdcache.compile(model, masked, inner="eager", tiles="masked")
    for length in (3, 5):
        given = (*TINY[:2], latent(9, 1, length, 4))
        torch._dynamo.maybe_mark_dynamic(given[2], 1)
        torch.testing.assert_close(symbols(*given), fixed(*given), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(symbols(*given), model(*given), atol=1e-3)


@torch.no_grad()
def test_texts_of_unequal_length_in_the_sequence():
    """Every length has tables of its own, unless sizes are asked to be symbols."""
    model, other = Stack(True, blocks=2), latent(9, 1, 5, 4)
    compiled = vdcache.compile(model, "tiles-0", inner="eager")
    for text in (call(0)[2], other):
        compiled(*call(0)[:2], text)
    assert [tile_sites(g.guarded.module)[0][1].after for g in compiled.vdcache.graphs] == [3, 5]
    with pytest.raises(ConfigError, match=r"its sizes are symbols, .*: compile with dynamic=False"):
        vdcache.compile(model, "tiles-0", inner="eager", dynamic=True)(*call(0))


def test_errors_before_anything_runs_and_at_the_first_call():
    with pytest.raises(
        ConfigError, match="no lowering of tile attention is called 'fast'; there are auto, gather, masked, merged, flex"
    ):
        vdcache.compile(TinyDiT(), "tiles-1", tiles="fast")
    with pytest.raises(ConfigError, match="no lowering of tile attention is called None"):
        vdcache.compile(TinyDiT(), "tiles-1", tiles=None)
    with torch.no_grad(), pytest.raises(ConfigError, match="the graph does not show frames, height and width"):
        vdcache.compile(TinyDiT(), "tiles-1", inner="eager")(*TINY)
    with torch.no_grad(), pytest.raises(ConfigError, match=f"'{SITE}': frames:3 has 3 reference frames, and the video has 2"):
        vdcache.compile(Stack(False), "tiles-3+every-2", num_steps=4, inner="eager")(*call(0))


def test_where_the_grid_comes_from():
    graph = canonical(trace(Stack(True, blocks=1), *call(0)).graph)
    (place,) = places(graph).values()
    assert (place.grid, place.before, place.after) == ((2, 2, 3), 0, 3) and analyze(graph).grid == Grid(2, 2, 3)
    assert place.on(parse_mask("frames:1")) == Frames(1).on(2, 2, 3, text=(0, 3))
