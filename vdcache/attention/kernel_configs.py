"""Sizes of blocks that the Triton kernel is tuned over, by architecture: none of them spills registers.

Which ones was found by compiling ahead of time (`bench/kernels.py`, whose rows a test holds against these lists): what spills is
slower than the next smaller block, and is left out. An architecture without lists of its own takes those of the next older one.
"""

from __future__ import annotations

__all__ = ["CONFIGS", "FLOAT", "Config", "configs_for", "float_configs"]

Config = tuple[int, int, int, int]  # queries and keys of a block, warps, stages

_SMALL: tuple[Config, ...] = ((32, 64, 4, 2), (16, 64, 4, 3))
_NARROW: tuple[Config, ...] = ((128, 64, 8, 2), (64, 64, 4, 3), (32, 64, 4, 3), (16, 64, 4, 3))
_HOPPER: tuple[Config, ...] = ((128, 64, 8, 3), (64, 64, 4, 3), (32, 64, 4, 3), (16, 64, 4, 3))
_WIDE: tuple[Config, ...] = ((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 4, 3), (16, 64, 4, 3))
_WIDE_BIASED: tuple[Config, ...] = ((128, 64, 8, 3), (64, 64, 8, 2), (16, 64, 4, 2))
# By compute capability, whether the head dimension is above 64, and whether there is a bias of keys.
CONFIGS: dict[tuple[int, bool, bool], tuple[Config, ...]] = {
    (80, False, False): _NARROW,
    (80, False, True): _NARROW,
    (80, True, False): ((64, 32, 8, 2), *_SMALL),
    (80, True, True): _SMALL,
    (89, False, False): _NARROW,
    (89, False, True): _NARROW,
    (89, True, False): _SMALL,
    (89, True, True): _SMALL,
    (90, False, False): ((128, 128, 8, 2), *_HOPPER),
    (90, False, True): ((128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (32, 64, 4, 3), (16, 64, 4, 2)),
    (90, True, False): _WIDE,
    (90, True, True): _WIDE_BIASED,
    (100, False, False): _HOPPER,
    (100, False, True): ((128, 64, 8, 3), (64, 64, 4, 3), (32, 64, 4, 3), (16, 64, 4, 2)),
    (100, True, False): _WIDE,
    (100, True, True): _WIDE_BIASED,
}
# In float32, without tensor cores, whose operands fill the registers.
FLOAT: dict[int, tuple[Config, ...]] = {
    80: ((16, 16, 8, 2),),
    89: ((16, 16, 4, 2),),
    90: ((16, 16, 4, 2),),
    100: ((32, 16, 8, 2), (16, 16, 4, 2)),
}


def float_configs(capability: int) -> tuple[Config, ...]:
    """The configurations for float32 on a device, 90 for capability 9.0."""
    return FLOAT[_arch(capability)]


def _arch(capability: int) -> int:
    return max((a for a in FLOAT if a <= capability), default=min(FLOAT))


def configs_for(capability: int, head_dim: int, biased: bool, longest: int) -> list[Config]:
    """The configurations worth a try in 16-bit floats, with blocks of queries no longer than the lists of queries are.

    Args:
        capability: of the device, 90 for 9.0.
        head_dim: 128 at most.
        biased: whether there is a bias of keys.
        longest: queries of a list, as a power of two from 16 on.
    """
    own = CONFIGS[_arch(capability), head_dim > 64, biased]
    largest = max((c[0] for c in own if c[0] <= longest), default=min(c[0] for c in own))
    return [c for c in own if min(largest, 64) <= c[0] <= longest] or [min(own)]
