"""Windowed attention with a kept residual, for any diffusion transformer, as a plug-in of vdcache."""

from vdcache_window.damped import Damped
from vdcache_window.doubling import Doubling
from vdcache_window.keep_window_residual import KeepWindowResidual
from vdcache_window.window_attention import WindowAttention

__all__ = ["Damped", "Doubling", "KeepWindowResidual", "WindowAttention"]
