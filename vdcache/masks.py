"""Masks of attention: which tile of a video attends to which."""

from vdcache.attention.masks import (
    AttentionMask,
    Dense,
    Diagonal,
    Frames,
    MultiDiagonal,
    Radial,
    Skip,
    Stripes,
    Window,
    parse_mask,
)

__all__ = [
    "AttentionMask",
    "Dense",
    "Diagonal",
    "Frames",
    "MultiDiagonal",
    "Radial",
    "Skip",
    "Stripes",
    "Window",
    "parse_mask",
]
