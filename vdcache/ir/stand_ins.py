"""Parameters that stand in for weights kept in another form: on another device, or in a smaller type.

A stand-in has the shape, type and device that the weight has when its layer computes, and no memory. Dynamo traces with it; the captured
graph takes the stored weight and brings it into that form right before its first use (`vdcache.ir.capture`). So a step that does not
compute a layer neither casts nor moves its weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["brought", "stand_in", "stored"]

_STORED = "_vdcache_stored"


def stand_in(like: Tensor, fetch: Callable[[], Tensor]) -> Tensor:
    """A tensor of the form of `like`, and a parameter if that is one, without memory.

    Args:
        fetch: returns the stored weight, always of one type and device.
    """
    empty = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=like.device)
    empty.untyped_storage().resize_(0)
    found = nn.Parameter(empty, requires_grad=False) if isinstance(like, nn.Parameter) else empty
    setattr(found, _STORED, fetch)
    return found


def stored(value: object) -> Tensor | None:
    """The weight that a stand-in stands for; None for any other value."""
    fetch = getattr(value, _STORED, None)
    return None if fetch is None else fetch()


def brought(weight: Tensor, like: Tensor) -> Tensor:
    """The stored weight in the form of its stand-in. Moved first and cast there: the small type crosses the bus."""
    return weight.to(like.device).to(like.dtype)
