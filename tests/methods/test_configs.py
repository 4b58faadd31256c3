"""Configurations of diffusers and cache-dit as recipes: what they compute is what those libraries compute."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from typing import Any

import pytest
import torch

import vdcache
from vdcache import Recipe
from vdcache.policies.scheduled import CombinedPolicy

pytest.importorskip("diffusers")


def made(**fields: Any) -> Any:
    """A configuration with these fields, as a library of another version may have them."""
    return dataclasses.make_dataclass("Config", [(n, Any, dataclasses.field(default=v)) for n, v in fields.items()])()


def computed(recipe: Recipe, steps: int, group: str = "") -> list[int]:
    """The steps that a schedule computes a group of slots in."""
    state = recipe.policy.start(steps)
    times = [1000 * (1 - s / steps) for s in range(steps)]
    plans = [recipe.policy.plan(state, s, times[: s + 1]) for s in range(steps)]
    return [s for s, p in enumerate(plans) if group not in p.reuse and (group or not p.reuse)]


def quiet(config: Any) -> Recipe:
    """What carries over in full says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return vdcache.methods.from_config(config)


def test_first_block_cache():
    from diffusers import FirstBlockCacheConfig

    recipe = quiet(FirstBlockCacheConfig(threshold=0.2))
    assert str(recipe) == str(vdcache.methods.fbcache(0.2))


def test_magcache_computes_the_steps_that_diffusers_computes():
    """Against the loop of diffusers' hook, written out."""
    from diffusers import MagCacheConfig

    ratios = [1.0, 1.02, 0.99, 0.97, 0.985, 0.99, 0.96, 0.95, 0.93, 0.9]
    config = MagCacheConfig(threshold=0.06, max_skip_steps=2, retention_ratio=0.2, num_inference_steps=10, mag_ratios=ratios)
    want, ratio, error, row = [], 1.0, 0.0, 0
    for step in range(10):
        skip = False
        if step >= int(0.2 * 10 + 0.5):
            ratio, row = ratio * ratios[step], row + 1
            error += abs(1 - ratio)
            skip = error <= 0.06 and row <= 2
        if not skip:
            want.append(step)
            ratio, error, row = 1.0, 0.0, 0
    assert 2 < len(want) < 10
    assert computed(quiet(config), 10) == want


def test_magcache_that_calibrates_or_has_no_ratios():
    from diffusers import MagCacheConfig

    with pytest.raises(vdcache.errors.ConfigError, match=r"vdcache\.calibration\.magnitudes"):
        vdcache.methods.from_config(MagCacheConfig(calibrate=True))
    with pytest.raises(vdcache.errors.ConfigError, match="no mag_ratios"):
        vdcache.methods.from_config(
            made(threshold=0.1, max_skip_steps=3, retention_ratio=0.2, num_inference_steps=28, mag_ratios=None, calibrate=False)
        )


@pytest.mark.parametrize(("n", "first", "order"), [(5, 3, 1), (4, 1, 2), (3, 7, 0)])
def test_taylorseer_computes_the_steps_that_diffusers_computes(n, first, order):
    """Its own decision, asked step by step."""
    from diffusers import TaylorSeerCacheConfig

    hooks = importlib.import_module("diffusers.hooks.taylorseer_cache")

    class Manager:
        def __init__(self) -> None:
            self.state = hooks.TaylorSeerState(max_order=order)

        def get_state(self) -> Any:
            return self.state

    config = TaylorSeerCacheConfig(cache_interval=n, disable_cache_before_step=first, max_order=order)
    hook = hooks.TaylorSeerCacheHook(n, first, torch.float32, Manager())
    want = [s for s in range(30) if hook._measure_should_compute()[0]]
    recipe = quiet(config)
    assert computed(recipe, 30) == want
    assert recipe.predictor == vdcache.predictors.Taylor(order)


def test_taylorseer_says_what_it_cannot_carry_over():
    from diffusers import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(disable_cache_after_step=40, cache_identifiers=["blocks.*attn"])
    with pytest.warns(vdcache.VdcacheWarning, match=r"disable_cache_after_step.*cache_identifiers \(branches are found"):
        vdcache.methods.from_config(config)
    assert "merge-slots" in str(quiet(TaylorSeerCacheConfig(use_lite_mode=True)).pipeline)


def test_pyramid_attention_broadcast():
    from diffusers import PyramidAttentionBroadcastConfig

    recipe = quiet(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=4,
            cross_attention_timestep_skip_range=(200, 900),
        )
    )
    assert isinstance(recipe.policy, CombinedPolicy)
    times = [1000 * (1 - s / 20) for s in range(20)]
    assert computed(recipe, 20, "spatial") == [s for s in range(20) if not (s % 2 and 100 < times[s] < 800)]
    assert computed(recipe, 20, "cross") == [s for s in range(20) if not (s % 4 and 200 < times[s] < 900)]
    with pytest.raises(vdcache.errors.ConfigError, match="reuses nothing"):
        vdcache.methods.from_config(PyramidAttentionBroadcastConfig())
    with pytest.warns(vdcache.VdcacheWarning, match="spatial_attention_block_identifiers"):
        vdcache.methods.from_config(
            PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, spatial_attention_block_identifiers=("own",))
        )


def test_fastercache():
    from diffusers import FasterCacheConfig

    recipe = quiet(FasterCacheConfig())
    assert [str(p) for p in recipe.passes][-1].startswith("mark-lanes")
    distilled = quiet(FasterCacheConfig(is_guidance_distilled=True))
    assert "mark-lanes" not in str(distilled.pipeline)
    times = [1000 * (1 - s / 20) for s in range(20)]
    assert computed(recipe, 20, "lane") == [s for s in range(20) if not (s % 5 and times[s] < 641)]
    with pytest.warns(vdcache.VdcacheWarning, match="attention_weight_callback"):
        vdcache.methods.from_config(FasterCacheConfig(attention_weight_callback=lambda module: 0.3))


def test_seacache():
    from diffusers import SeaCacheConfig

    recipe = quiet(SeaCacheConfig(threshold=0.3, retention_steps=3))
    assert recipe.policy.bounds.first == 3
    with pytest.warns(vdcache.VdcacheWarning, match="power_exp"):
        vdcache.methods.from_config(SeaCacheConfig(power_exp=2.0))


def test_dbcache():
    cache_dit = pytest.importorskip("cache_dit")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=2,
        Bn_compute_blocks=1,
        residual_diff_threshold=0.12,
        max_warmup_steps=4,
        max_continuous_cached_steps=3,
    )
    assert str(quiet(config)) == str(vdcache.methods.dbcache(2, 1, 0.12, warm_up=4, max_consecutive=3))
    with pytest.warns(vdcache.VdcacheWarning, match=r"enable_separate_cfg.*force_refresh_step_hint"):
        vdcache.methods.from_config(cache_dit.DBCacheConfig(enable_separate_cfg=True, force_refresh_step_hint=9))


@pytest.mark.parametrize("policy", ["dynamic", "static"])
def test_dbcache_with_a_mask_of_steps(policy):
    mask = [1, 1, 0, 0, 1, 0, 1, 0]
    config = made(
        cache_type="DBCache",
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=0.3,
        steps_computation_mask=None,
        steps_computation_policy="dynamic",
    )
    config.steps_computation_mask, config.steps_computation_policy = mask, policy
    recipe = quiet(config)
    if policy == "static":
        assert computed(recipe, 8) == [s for s, m in enumerate(mask) if m]
    else:
        assert recipe.policy.bounds.mask == tuple(mask)


def test_no_configuration():
    with pytest.raises(vdcache.errors.ConfigError, match="takes a cache configuration of diffusers or cache-dit; got dict"):
        vdcache.methods.from_config({"threshold": 0.1})
    with pytest.raises(vdcache.errors.ConfigError, match="is no cache configuration that vdcache knows: it has length"):
        vdcache.methods.from_config(made(length=3))
    from diffusers import FirstBlockCacheConfig

    with pytest.raises(vdcache.errors.ConfigError, match="not the class"):
        vdcache.methods.from_config(FirstBlockCacheConfig)
    config = made(cache_type="DBPrune", Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=0.3)
    with pytest.raises(vdcache.errors.ConfigError, match="DBPrune"):
        vdcache.methods.from_config(config)
