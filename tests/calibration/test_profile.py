"""Profiles: R against its definition, lists, thresholds, stability, JSON, pictures, every kind of foreground, bad input."""

import functools
import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vdcache
from tests.support.block_lists import BLOCKS, STEPS, Stack, call
from tests.support.thorough import in_turn
from tests.zoo import ZOO, build
from vdcache.calibration import Profile
from vdcache.calibration.profiler import _prediction, _shares, to_tokens
from vdcache.errors import CacheStateError, ConfigError
from vdcache.patterns import Grid
from vdcache.testing import TinyDiT, latent, time_of

GRID = (2, 2, 3)
MASK = torch.zeros(GRID, dtype=torch.bool)
MASK[0, 0, :2] = MASK[1, 1, 2] = True


def generate(model, seed=0, steps=STEPS):
    with torch.no_grad():
        return [model(*call(step, seed))[0] for step in range(steps)]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def profiled(two=False, prompts=(0, 3), blocks=BLOCKS, **options):
    made = _profiled if not options else _profiled.__wrapped__
    return made(two, tuple(prompts), blocks, **options)


@functools.cache
def _profiled(two, prompts, blocks, **options):
    return vdcache.profile(Stack(two, blocks), generate, prompts=list(prompts), **{"foreground": MASK, **options})


def by_hand(two, threshold, prompts=(0, 3)):
    """R of every generation, step and block, from dense attention weights."""
    model, found = Stack(two), []

    def attend(q, k, v):
        weights.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
        return weights[-1] @ v

    for seed in prompts:
        steps = []
        for step in range(STEPS):
            weights: list = []
            before, torch.nn.functional.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention, attend
            try:
                with torch.no_grad():
                    model(*call(step, seed))
            finally:
                torch.nn.functional.scaled_dot_product_attention = before
            row = []
            for w in weights:
                received = w.mean(1).sum(-2)[0, :12] / (w.shape[-2] / w.shape[-1])
                high = (received > threshold).reshape(GRID)
                frames = [(high[f] & MASK[f]).sum() / MASK[f].sum() for f in range(2)]
                row.append(float(sum(frames) / 2))
            steps.append(row)
        found.append(steps)
    return np.array(found)


@pytest.mark.parametrize(("two", "threshold"), in_turn([False, True], [1.0, 1.05]))
def test_scores_are_equation_6(two, threshold):
    got = profiled(two, token_threshold=threshold)
    want = by_hand(two, threshold)
    assert got.scores.shape == (2, STEPS, BLOCKS)
    np.testing.assert_allclose(got.scores, want, atol=1e-5)
    assert want.std() > 0 and got.grid == GRID
    assert got.block_scores == pytest.approx(dict(enumerate(want.mean((0, 1)))))
    assert got.over_steps == pytest.approx(dict(enumerate(want.mean(0).std(0))))
    assert got.over_series == pytest.approx(dict(enumerate(want.mean(1).std(0))))
    assert {s.block_kind for s in got.sites} == {"double" if two else "single"}


def test_what_is_generated_is_what_the_model_generates():
    model, seen = Stack(False), []
    vdcache.profile(model, lambda m: seen.extend(generate(m)), foreground=MASK)
    assert all(torch.equal(a, b) for a, b in zip(seen, generate(model), strict=True))


def test_distances_are_those_of_consecutive_predictions():
    found = profiled().distances
    outputs = [generate(Stack(False), seed) for seed in (0, 3)]
    want = [[((b - a).abs().mean() / a.abs().mean()).item() for a, b in itertools.pairwise(o)] for o in outputs]
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_lists_follow_the_threshold():
    found = profiled()
    scores = found.block_scores
    for tau in (0.0, *scores.values(), 1.0):
        at = found.with_threshold(tau)
        assert at.foreground == tuple(b for b in range(BLOCKS) if scores[b] >= tau)
        assert sorted((*at.foreground, *at.background)) == list(range(BLOCKS))
        for b, share in at.agreement.items():
            assert share == pytest.approx(((found.scores[..., b] >= tau) == (scores[b] >= tau)).mean())
    # of itself τ leaves 60 % of the blocks to the background: 4 of 6
    ordered = sorted(scores.values())
    assert len(found.background) == 4 and found.threshold == pytest.approx((ordered[3] + ordered[4]) / 2)
    for bad in (math.nan, 2.0, -1, "1"):
        with pytest.raises(ConfigError, match="block_threshold is a share"):
            found.with_threshold(bad)


def test_a_profile_makes_a_recipe_that_runs():
    found = profiled()
    recipe = vdcache.methods.profilingdit(found, when=(0, 3))
    model = Stack(False)
    fast = vdcache.compile(model, recipe, num_steps=STEPS, inner="eager", strict=True)
    outputs, plain = generate(fast), generate(model)
    assert [torch.equal(a, b) for a, b in zip(outputs, plain, strict=True)] == [s in (0, 3) for s in range(STEPS)]
    (graph,) = fast.vdcache.graphs
    slots = {int(n) for s in graph.slots for n in re.findall(r"\.b(\d+)", s)}
    assert slots <= set(found.background)


@torch.no_grad()
def test_single_and_double_blocks_have_profiles_of_their_own():
    model, case = build("hunyuan_video"), ZOO["hunyuan_video"]

    def run(m):
        for step in range(2):
            m(**case.call(step, 6))

    mask = torch.zeros(3, 6, 6, dtype=torch.bool)
    mask[:, 2:4, 2:4] = True
    whole = vdcache.profile(model, run, foreground=mask)
    assert whole.blocks == (0, 1, 2, 3) and [s.block_kind for s in whole.sites] == ["double", "double", "single", "single"]
    single = whole.only("single")
    assert single.blocks == (0, 1) and list(single.block_scores.values()) == list(whole.block_scores.values())[2:]
    assert vdcache.methods.profilingdit(single.with_threshold(1.0)).passes[0].block_kind == "single"
    listed = vdcache.methods.profilingdit(whole, block_kind="single")
    assert listed.passes == vdcache.methods.profilingdit(single).passes
    with pytest.raises(ConfigError, match="speaks of single blocks, and block_kind='double'"):
        vdcache.methods.profilingdit(single, block_kind="double")
    with pytest.raises(ConfigError, match="either a profile or lists"):
        vdcache.methods.profilingdit(whole, [3])
    with pytest.raises(ConfigError, match="no block of kind 'single'; it has double"):
        profiled(True).only("single")


def test_json_and_text_round_trip(tmp_path):
    found = profiled(two=True)
    found.to_json(tmp_path / "profile.json")
    again = Profile.from_json(tmp_path / "profile.json")
    assert again.background == found.background and again.sites == found.sites and again.series == found.series
    np.testing.assert_allclose(again.scores, found.scores, atol=1e-5)
    assert str(again) == str(found) and repr(again) == repr(found)
    assert (again.mask == found.mask).all() and again.mask.dtype == bool
    text = str(found)
    assert "6 blocks" in text and "foreground" in text and "full joint" in text
    with pytest.raises(ConfigError, match="no profile"):
        Profile.from_json("{}")
    with pytest.raises(ConfigError, match="no profile"):
        Profile.from_json("nonsense")
    with pytest.raises(ConfigError, match="found version 2"):
        Profile.from_json(found.to_json().replace('"vdcache profile": 1', '"vdcache profile": 2'))


def test_a_step_without_foreground_says_nothing():
    empty = torch.zeros(GRID, dtype=torch.bool)
    half = profiled(blocks=2, foreground=[empty, MASK])
    assert np.isnan(half.scores[0]).all() and not np.isnan(half.scores[1]).any() and half.covered[0].max() == 0
    assert "null" in half.to_json() and np.isnan(Profile.from_json(half.to_json()).scores[0]).all()
    assert half.block_scores == pytest.approx(profiled(prompts=(3,), blocks=2).block_scores)
    with pytest.raises(ConfigError, match="no step of any generation shows a foreground"):
        profiled(blocks=2, foreground=empty)


def test_the_picture_is_drawn(tmp_path):
    from PIL import Image

    for prompts in ((0,), (0, 3)):
        profiled(prompts=prompts).plot(tmp_path / "profile.png")
        picture = np.asarray(Image.open(tmp_path / "profile.png").convert("L"))
        assert picture.shape[1] > 1000 and picture.std() > 20


@pytest.mark.parametrize("kind", ["segmenter", "otsu", "samples", "list", "pixels"])
def test_every_way_to_say_where_the_foreground_is(kind):
    pictures = []

    def segmenter(picture):
        pictures.append(picture)
        return MASK

    given_mask = {
        "segmenter": segmenter,
        "otsu": None,
        "samples": MASK[None],
        "list": [MASK, MASK],
        "pixels": MASK.repeat_interleave(2, 1).repeat_interleave(4, 2),
    }[kind]
    found = profiled(blocks=2, foreground=given_mask)
    if kind == "otsu":
        assert found.scores.shape == (2, STEPS, 2)
        return
    np.testing.assert_allclose(found.scores, profiled(blocks=2).scores)
    if kind == "segmenter":
        assert len(pictures) == 2 * STEPS and all(p.shape == (*GRID, 3) and p.min() >= 0 and p.max() <= 1 for p in pictures)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_shares_are_means_over_frames_with_a_foreground(sites, frames, space, seed):
    g = torch.Generator().manual_seed(seed)
    high, inside = torch.rand(sites, frames, space, generator=g) < 0.5, torch.rand(frames, space, generator=g) < 0.4
    scores, shares = _shares(high, inside)
    for i in range(sites):
        own = [float((high[i, f] & inside[f]).sum() / inside[f].sum()) for f in range(frames) if inside[f].any()]
        assert math.isnan(scores[i]) if not own else scores[i].item() == pytest.approx(sum(own) / len(own), abs=1e-6)
        assert shares[i].item() == pytest.approx(high[i].float().mean().item())


def test_masks_of_pixels_become_masks_of_tokens():
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, :2, :2] = True  # a whole token
    mask[1, 0, 2:] = True  # half of one
    mask[1, 3, 0] = True  # a quarter
    tokens = to_tokens(mask, Grid(2, 2, 2))
    assert tokens.tolist() == [[[True, False], [False, False]], [[False, True], [False, False]]]


def test_predictions_of_every_shape():
    grid = Grid(2, 3, 4)
    video = torch.randn(1, 5, 2, 3, 4)
    for shown in (video, video.transpose(1, 2), (video,), video[0].transpose(0, 1), video.flatten(2).mT):
        assert torch.equal(_prediction(shown, grid), video)
    assert _prediction(torch.randn(1, 4, 6, 8), Grid(1, 3, 4)).shape == (1, 4, 1, 6, 8)
    with pytest.raises(ConfigError, match="are not found"):
        _prediction(torch.randn(1, 7, 5), grid)
    with pytest.raises(ConfigError, match="returns no floating-point tensor"):
        _prediction((1, torch.ones(3)), grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_threshold": "1"}, "token_threshold is a multiple of the mean attention; got '1'"),
        ({"token_threshold": 1e9}, "no token ever receives 1e[+]09 times the mean attention"),
        ({"block_threshold": "1"}, "block_threshold is a share of the foreground; got '1'"),
        ({"foreground": "otsu"}, "foreground is a segmenter .*; got 'otsu'"),
        ({"foreground": vdcache.calibration.Otsu}, "foreground is a segmenter"),
        ({"foreground": lambda picture: None}, "a segmenter returns a bool mask"),
        ({"foreground": [MASK] * 3}, "3 masks were given for 2 generations"),
        ({"prompts": "cat"}, None),
        ({"token_threshold": 0}, "token_threshold is a multiple of the mean attention, above 0; got 0"),
        ({"block_threshold": 1.5}, "block_threshold is a share of the foreground, 0 to 1; got 1.5"),
        ({"foreground": torch.zeros(2, 3, 3, dtype=torch.bool)}, r"multiples of the \(2, 2, 3\) video tokens; got \(2, 3, 3\)"),
        ({"foreground": torch.zeros(2, 3)}, r"got \(2, 3\)"),
        ({"foreground": torch.zeros(2, 2, 3)}, "is bool"),
        ({"foreground": MASK.expand(3, 2, 2, 3)}, "mask has 3 samples, and the model's batch 1"),
        ({"foreground": [MASK]}, "1 masks were given, and generation 1"),
        ({"grid": (2, 2)}, r"grid is \(frames, height, width\)"),
    ],
)
def test_bad_input(options, message):
    if message is None:
        for prompts, why in (("cat", r"give \['cat'\]"), ([], "prompts is empty"), (1, "prompts is a list")):
            with pytest.raises(ConfigError, match=why):
                vdcache.profile(Stack(False), generate, prompts=prompts)
        return
    with pytest.raises(ConfigError, match=message):
        profiled(blocks=1, **options)


def test_models_that_cannot_be_profiled_say_why():
    with pytest.raises(CacheStateError, match="did not call the model"):
        vdcache.profile(Stack(False), lambda m: None)

    def run(m):
        with torch.no_grad():
            m(latent(0), time_of(0), latent(1, 1, 3, 4))

    with pytest.raises(
        ConfigError, match=r"no attention over video tokens can be read in TinyDiT: .*give grid=\(frames, height, width\)"
    ):
        vdcache.profile(TinyDiT(), run)

    model = Stack(False, blocks=2).requires_grad_(True)
    found = vdcache.profile(model, lambda m: [m(*call(s)) for s in range(3)])  # without gradients, unless it asks for them
    assert len(found.foreground) + len(found.background) == 2
    with pytest.raises(ConfigError, match="gradients are enabled"), torch.enable_grad():
        vdcache.profile(model, lambda m: torch.enable_grad()(m)(*call(0)))

    class Float(Stack):
        def forward(self, x, timestep, text):
            return super().forward(x, torch.full((1,), timestep), text)

    def floats(m):
        with torch.no_grad():
            for step in range(3):
                x, _, text = call(step)
                m(x, 1000.0 - step, text)

    with pytest.raises(ConfigError, match="no timestep is seen"):
        vdcache.profile(Float(False, blocks=2), floats, foreground=MASK)

    def grows(m):
        generate(m, steps=2)
        with torch.no_grad():
            m(latent(0, 1, 4, 2, 2, 4), time_of(2), latent(9, 1, 3, 4))

    with pytest.raises(ConfigError, match="profile one size"):
        vdcache.profile(
            Stack(False, blocks=2), grows, foreground=lambda picture: torch.ones(picture.shape[:3], dtype=torch.bool)
        )


@torch._dynamo.config.patch(recompile_limit=3)
def test_profiling_again_and_again_meets_no_limit():
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert vdcache.profile(Stack(False, blocks=1), lambda m: generate(m, steps=2), foreground=MASK).blocks == (0,)


@pytest.mark.parametrize("kind", ["module", "function"])
def test_what_a_pipeline_keeps_is_the_plain_model_afterwards(kind):
    model = Stack(False, blocks=2)
    held = []

    def run(m):
        held.append(m)
        if len(held) > 1:
            raise KeyboardInterrupt
        return generate(m)

    given_model = model if kind == "module" else lambda *args: model(*args)
    vdcache.profile(given_model, run, foreground=MASK)
    with pytest.raises(KeyboardInterrupt):
        vdcache.profile(given_model, run, foreground=MASK)
    for m in held:
        before = len(m.vdcache.history)
        assert all(torch.equal(a, b) for a, b in zip(generate(m), generate(model), strict=True))
        assert len(m.vdcache.history) == before
    again = vdcache.compile(held[0], "every-2", num_steps=STEPS, inner="eager")
    generate(again)
    assert again.vdcache.history.computed_steps() == [0, 2, 4, 5]


def test_a_model_that_breaks_is_profiled_but_has_no_lists():
    class Broken(Stack):
        def forward(self, x, timestep, text):
            streams = self.start(x, timestep, text)
            for i in range(3):
                streams = self.block(i, streams)
            torch._dynamo.graph_break()
            for i in range(3, BLOCKS):
                streams = self.block(i, streams)
            return self.end(streams, x)

    with pytest.warns(vdcache.VdcacheWarning, match="3 attentions of Broken are left out: .*give grid="):
        half = vdcache.profile(Broken(False), generate, foreground=MASK)
    assert half.blocks == (0, 1, 2)
    torch._dynamo.reset()
    found = vdcache.profile(Broken(False), generate, foreground=MASK, grid=GRID)
    assert found.graphs > 1 and found.blocks == tuple(range(BLOCKS))
    np.testing.assert_array_equal(found.scores, profiled(prompts=(0,)).scores)
    with pytest.raises(ConfigError, match=f"its blocks lie in {found.graphs} of them"):
        vdcache.methods.profilingdit(found)


def test_series_of_unequal_length_keep_what_they_know():
    found = vdcache.profile(Stack(False), lambda m, n: generate(m, 0, n), prompts=[4, 2], foreground=MASK)
    assert found.scores.shape == (2, 4, BLOCKS) and np.isnan(found.scores[1, 2:]).all() and not np.isnan(found.scores[0]).any()
    assert found.distances.shape == (2, 3)
    np.testing.assert_array_equal(found.scores[0, :2], found.scores[1, :2])
    assert "nan" not in str(found) and Profile.from_json(found.to_json()) == found


def test_lists_are_those_of_the_file():
    found = profiled()
    assert len(found.block_scores) > 1
    for score in found.block_scores.values():
        at = found.with_threshold(score)
        assert Profile.from_json(at.to_json()) == at and Profile.from_json(at.to_json()).background == at.background


def test_a_grid_that_is_given():
    def run(m):
        with torch.no_grad():
            for step in range(2):
                m(latent(step), time_of(step), latent(1, 1, 3, 4))

    found = vdcache.profile(TinyDiT(), run, grid=(3, 1, 2), foreground=torch.ones(3, 1, 2, dtype=torch.bool))
    assert found.grid == (3, 1, 2) and len(found.blocks) == 2
    assert found.scores == pytest.approx(found.shares)  # everything is foreground


def test_a_model_with_one_block():
    found = vdcache.profile(Stack(False, blocks=1), generate, prompts=[0], foreground=MASK)
    assert found.foreground == (0,) and found.background == ()
    with pytest.raises(ConfigError, match="needs a list of background blocks, and it is empty"):
        vdcache.methods.profilingdit(found)
