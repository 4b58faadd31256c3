"""Masks of tiles against their papers' rules, restated token by token; their texts; and what cannot be a mask."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tile_masks import Odd, masks, placed, sizes, written_out
from vdcache.attention.masks import (
    MASKS,
    AttentionMask,
    Dense,
    Diagonal,
    Frames,
    MultiDiagonal,
    Radial,
    Skip,
    Stripes,
    Window,
    masks_text,
    parse_mask,
    parse_masks,
)
from vdcache.attention.tiles import TileMask
from vdcache.errors import ConfigError
from vdcache.passes import Pipeline, TileAttention

# ---- the rules, on two tokens of the video: (frame, row, column) of the query and of the key -------------------------


# ---- random masks ----------------------------------------------------------------------------------------------------


@given(placed(), st.integers(0, 2), st.integers(0, 2))
@settings(deadline=None, max_examples=120)
def test_the_tables_are_the_rule_and_the_density_is_its_share(case, before, after):
    mask, grid = case
    want = written_out(mask, grid, before, after)
    on = mask.on(*grid, text=(before, after))
    assert torch.equal(on.keeps(), want)
    assert mask.density(*grid, text=before + after) == pytest.approx(float(want.double().mean()), rel=1e-6)
    assert on.density == mask.density(*grid, text=before + after)
    assert on.tokens == len(want) and on.count * on.size == on.video == math.prod(grid)


@pytest.mark.parametrize("text", [0, 7])
def test_the_published_share_of_frame_masks(text):
    """(2Fk − k² + F − k) / F², for every number of frames up to 24 and every k; tokens of text see all and are seen by all."""
    for frames in range(1, 25):
        for k in range(frames + 1):
            kept = Fraction(2 * frames * k - k * k + frames - k, frames * frames)
            video = 6 * frames
            want = (kept * video**2 + 2 * text * video + text**2) / (video + text) ** 2
            assert Frames(k).density(frames, 2, 3, text=text) == pytest.approx(float(want), rel=1e-6)


def test_no_reference_leaves_the_diagonal_and_all_of_them_everything():
    for frames in range(1, 25):
        grid = (frames, 2, 3)
        assert torch.equal(Frames(0).allowed(grid), torch.eye(frames, dtype=torch.bool))
        assert Frames(frames).allowed(grid).all()
        for k in range(1, frames + 1):
            assert Frames(k).reference_frames(frames)[0] == 0 and len(set(Frames(k).reference_frames(frames))) == k


@given(placed(st.builds(Window, sizes, sizes)))
def test_under_a_window_every_query_attends_to_equally_many_keys(case):
    mask, grid = case
    tiles = [n // s for n, s in zip(grid, mask.size, strict=True)]
    assert set(mask.allowed(grid).sum(1).tolist()) == {math.prod(map(min, tiles, mask.window))}


@given(st.integers(1, 12), st.sampled_from([1, 3, 5, 7]))
def test_an_odd_window_is_that_of_the_published_code(tiles, window):
    """FastVideo's mask of sliding tile attention: the centre is clamped, and keys are at most half a window away from it."""
    window = min(window, tiles - (tiles + 1) % 2)
    at = torch.arange(tiles)
    centre = at.clamp(window // 2, tiles - 1 - window // 2)
    want = (centre[:, None] - at).abs() <= window // 2
    assert torch.equal(Window((1, 1, window), (1, 1, 1)).allowed((1, 1, tiles)), want)


@pytest.mark.parametrize("chunks", [2, 4])
def test_radial_masks_grow_by_as_much_with_every_doubling_of_the_frames(chunks):
    """O(n log n): with every power of two a query attends to at most 2s more tiles on either side, s of them in a frame."""
    most = []
    for power in range(3, 9):
        allowed = Radial(chunks, sinks=0).allowed((2**power, chunks, 1))
        most.append(int(allowed.sum(1).max()))
        assert most[-1] <= chunks + 4 * chunks * (power + 1)
    steps = [b - a for a, b in pairwise(most)]
    assert steps[-1] == steps[-2] > 0, "not O(n)"
    assert most[-1] < chunks * 2**8 / 4, "not O(n²)"


# ---- texts -----------------------------------------------------------------------------------------------------------


@given(masks)
def test_the_text_of_a_mask_reads_back(mask):
    assert parse_mask(str(mask)) == parse_mask(f" {mask} ") == parse_mask(mask) == mask
    assert type(parse_mask(str(mask))) is MASKS[mask.name]


@given(st.lists(masks, min_size=1, max_size=9))
def test_the_text_of_masks_of_heads_reads_back(heads):
    assert parse_masks(masks_text(heads)) == parse_masks(heads) == parse_masks([str(m) for m in heads]) == tuple(heads)


def test_texts():
    assert [str(kind()) for kind in MASKS.values() if kind.__module__ == "vdcache.attention.masks"] == [
        "dense",
        "skip",
        "frames:1",
        "window:3x3x3:1x4x4",
        "radial:8:1",
        "diagonal:8:4",
        "multi-diagonal:8:1",
        "stripes:8:8:1",
    ]
    assert parse_mask("radial") == Radial() and parse_mask("stripes:4:2") == Stripes(4, 2)
    assert parse_mask("window:3x1x5") == Window((3, 1, 5))
    assert Window([3, 3, 3], [1, 2, 2]) == Window((3, 3, 3), (1, 2, 2))
    frames, dense = Frames(2), Dense()
    assert parse_masks("frames:2*2|dense") == parse_masks([frames, "frames:2", dense]) == (frames, frames, dense)
    assert parse_masks(["frames:2*2", dense]) == (frames, frames, dense)
    assert masks_text([frames, frames, dense, frames]) == "frames:2*2|dense|frames:2"
    assert parse_masks(frames) == parse_masks("frames:2") == (frames,)


# ---- what cannot be --------------------------------------------------------------------------------------------------

WHOLE = "is a whole number of at least"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Frames(-1), f"frames: references {WHOLE} 0; got -1"),
        (lambda: Frames(1.5), f"frames: references {WHOLE} 0; got 1.5"),
        (lambda: Frames(True), f"frames: references {WHOLE} 0; got True"),
        (lambda: Frames("2"), f"frames: references {WHOLE} 0; got '2'"),
        (lambda: Window(3), "window: window is (frames, height, width), three whole numbers of at least 1; got 3"),
        (lambda: Window((3, 3)), "window: window is (frames, height, width), three whole numbers of at least 1; got (3, 3)"),
        (
            lambda: Window(size="1x4x4"),
            "window: size is (frames, height, width), three whole numbers of at least 1; got '1x4x4'",
        ),
        (
            lambda: Window((3, 0, 3)),
            "window: window is (frames, height, width), three whole numbers of at least 1; got (3, 0, 3)",
        ),
        (
            lambda: Window(size=(1, 4, 4.0)),
            "window: size is (frames, height, width), three whole numbers of at least 1; got (1, 4, 4.0)",
        ),
        (lambda: Radial(0), f"radial: chunks {WHOLE} 1; got 0"),
        (lambda: Radial(8, -1), f"radial: sinks {WHOLE} 0; got -1"),
        (lambda: Diagonal(8, 0), f"diagonal: width {WHOLE} 1; got 0"),
        (lambda: MultiDiagonal(8, 1.0), f"multi-diagonal: width {WHOLE} 1; got 1.0"),
        (lambda: Stripes(8, 0), f"stripes: every {WHOLE} 1; got 0"),
        (lambda: Stripes(None), f"stripes: chunks {WHOLE} 1; got None"),
        (lambda: Frames(5).on(4), "frames:5 has 5 reference frames, and the video has 4 latent frames"),
        (lambda: Frames(5).density(4), "frames:5 has 5 reference frames, and the video has 4 latent frames"),
        (
            lambda: Window(size=(2, 1, 1)).on(9),
            "window:3x3x3:2x1x1: tiles of 2 frames do not cut 9; 1, 3, 9 do",
        ),
        (lambda: Window().on(2, 6, 4), "window:3x3x3:1x4x4: tiles of 4 rows do not cut 6; 1, 2, 3, 6 do"),
        (lambda: Window().on(2, 4, 10), "window:3x3x3:1x4x4: tiles of 4 columns do not cut 10; 1, 2, 5, 10 do"),
        (lambda: Radial().on(2, 12), "radial:8:1: a frame of 12 rows is not cut into 8 tiles; 1, 2, 3, 4, 6, 12 can be"),
        (lambda: Stripes(2).on(2, 1), "stripes:2:8:1: a frame of 1 rows is not cut into 2 tiles; 1 can be"),
        (lambda: MultiDiagonal(3).density(2, 4), "multi-diagonal:3:1: a frame of 4 rows is not cut into 3 tiles"),
        (lambda: parse_mask("frame:4"), f"no mask is called 'frame'; there are {', '.join(MASKS)}"),
        (lambda: parse_mask(""), "no mask is called ''"),
        (lambda: parse_mask(None), "a mask is a value or its text, such as 'frames:4'; got None"),
        (lambda: parse_mask(4), "a mask is a value or its text, such as 'frames:4'; got 4"),
        (lambda: parse_mask(Frames), "a mask is a value or its text"),
        (lambda: parse_mask("frames:1:2"), "mask 'frames' takes references; got 'frames:1:2'"),
        (lambda: parse_mask("dense:1"), "mask 'dense' takes no numbers; got 'dense:1'"),
        (lambda: parse_mask("radial:8:1:1"), "mask 'radial' takes chunks, sinks; got 'radial:8:1:1'"),
        (lambda: parse_mask("frames:-1"), f"frames: references {WHOLE} 0; got -1"),
        (lambda: parse_mask("frames:2x2"), f"frames: references {WHOLE} 0; got (2, 2)"),
        (lambda: parse_mask("window:3"), "window: window is (frames, height, width), three whole numbers of at least 1; got 3"),
        (
            lambda: parse_mask("window:3x3"),
            "window: window is (frames, height, width), three whole numbers of at least 1; got (3, 3)",
        ),
        *(
            (lambda text=text: parse_mask(text), f"the numbers of a mask are whole, as in 'frames:4' or .*; got '{text}'")
            for text in ("frames:", "frames:1.5", "frames:all", "window:3x3x:1x4x4", "radial:8:one")
        ),
        (lambda: parse_masks("frames:2*|dense"), "heads of a mask are counted as in 'frames:2*6|dense*2'; got"),
        (lambda: parse_masks("frames:2*-1"), "heads of a mask are counted as in"),
        (lambda: parse_masks("frames:2*1.5"), "heads of a mask are counted as in"),
        (lambda: parse_masks("frames:2|"), "no mask is called ''"),
        (lambda: parse_masks(["frames:2", None]), "no mask is called 'None'"),
        (lambda: parse_masks(4), "no mask is called '4'"),
    ],
)
def test_what_cannot_be_says_so(make, message):
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ConfigError, match=pattern):
        make()


@pytest.mark.parametrize("text", ["frames:2*0", "frames:2*²"])
def test_a_mask_for_no_heads_is_refused(text):
    with pytest.raises(ConfigError, match="heads of a mask are counted"):
        parse_masks(text)


@pytest.mark.parametrize(
    ("sizes", "text", "message"),
    [
        ((2, 0, 2), (0, 0), r"grid is \(frames, height, width\), three whole numbers of at least 1; got \(2, 0, 2\)"),
        ((0, 2, 2), (0, 0), r"three whole numbers of at least 1; got \(0, 2, 2\)"),
        ((2, -2, -2), (0, 0), r"three whole numbers of at least 1; got \(2, -2, -2\)"),
        ((2.5, 2, 2), (0, 0), r"three whole numbers of at least 1; got \(2.5, 2, 2\)"),
        ((2, 2, 2), (-1, 0), "before is a whole number of at least 0; got -1"),
        ((2, 2, 2), (0, 1.5), "after is a whole number of at least 0; got 1.5"),
    ],
)
def test_sizes_that_are_none_are_refused(sizes, text, message):
    with pytest.raises(ConfigError, match=message):
        Frames(0).on(*sizes, text=text)


def test_a_token_that_attends_to_nothing_is_refused_unless_there_is_text():
    with pytest.raises(ConfigError, match="under the mask odd some tokens attend to nothing"):
        TileMask(Odd(), (4, 2, 2))
    assert TileMask(Odd(), (4, 2, 2), after=1).keeps().any(1).all()
    assert not Skip().on(4, 2, 2).keeps().any() and Skip().density(4, 2, 2, text=3) == 0


def test_a_mask_of_ones_own_is_known_by_its_name():
    """From its definition on: graphs and pipelines hold its text."""

    @dataclass(frozen=True)
    class Near(AttentionMask):
        name: ClassVar[str] = "test-near"
        reach: int = 1

        def tile(self, grid):
            return (1, *grid[1:])

        def allowed(self, grid):
            frames = torch.arange(grid[0])
            return (frames[:, None] - frames[None]).abs() <= self.reach

    assert parse_mask("test-near:2") == Near(2)
    a_pass = TileAttention((Near(2),))
    assert str(a_pass) == "tile-attention{masks=[test-near:2]}"
    assert Pipeline.parse(f"canonicalise,{a_pass}").passes[1] == a_pass
    assert Near(1).density(4) == 10 / 16
    with pytest.raises(ConfigError, match=r"a mask is called 'frames' already: vdcache.attention.masks.Frames"):

        class Frames(AttentionMask):
            name = "frames"
