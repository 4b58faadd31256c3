"""Recipes: scope, policy and predictor together, under a name."""

from __future__ import annotations

from vdcache import Recipe
from vdcache.policies import Always
from vdcache_window.damped import Damped
from vdcache_window.doubling import Doubling
from vdcache_window.keep_window_residual import KeepWindowResidual
from vdcache_window.window_attention import WindowAttention


def window_residual(window: int) -> Recipe:
    """Reused steps attend in a window of N tokens and add what full attention had besides (DiTFastAttn)"""
    passes = (KeepWindowResidual(window=window),)
    return Recipe(f"window-residual-{window}", Doubling(), passes, "arXiv 2406.08552", predictor=Damped(0.0))


def window_temporal(frames: int) -> Recipe:
    """Temporal attention sees N frames before and after; nothing is cached"""
    return Recipe(f"window-temporal-{frames}", Always(), (WindowAttention(frames=frames),))
