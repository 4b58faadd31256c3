"""The sums that measures are made of, as nodes: what observations and probes have in common.

Variants return sums and not ratios, so that lanes can be added up before anything is divided (`runtime.metrics` divides).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from vdcache.ir.edit import call

__all__ = ["sums_of"]

aten = torch.ops.aten


def sums_of(
    g: fx.Graph,
    value: fx.Node,
    previous: fx.Node,
    distance: str,
    strides: Sequence[int] = (),
    frames: int = 0,
    *,
    provenance: str,
) -> list[fx.Node]:
    """The sums of one measure, each float32 and 0-d, at the graph's insertion point. P is the previous value, R this one.

    "l1": Σ|P−R|, Σ|P|, Σ|R|. "l2": the same of squares. "cosine": Σ P·R, Σ P², Σ R². "magnitude", over tokens (the last dimension is one
    token's): Σ ‖R‖/‖P‖, Σ (‖R‖/‖P‖)², Σ 1. Then for each stride i, over latent frames: Σ|R[i:]−R[:−i]|, Σ|R[i:]|, Σ|R[:−i]|.
    """

    def op(target: object, *args: object, **kwargs: object) -> fx.Node:
        return call(g, target, *args, provenance=provenance, **kwargs)

    def total(node: fx.Node) -> fx.Node:
        return op(aten.sum.default, node)

    now = op(aten._to_copy.default, value, dtype=torch.float32)
    then = op(aten._to_copy.default, previous, dtype=torch.float32)
    if distance == "cosine":
        sums = [total(op(aten.mul.Tensor, a, b)) for a, b in ((then, now), (then, then), (now, now))]
    elif distance == "magnitude":
        late, early = (op(aten.linalg_vector_norm.default, x, 2, [-1]) for x in (now, then))
        ratio = op(aten.div.Tensor, late, early)
        sums = [total(ratio), total(op(aten.square.default, ratio)), total(op(aten.ones_like.default, ratio))]
    else:
        size = aten.abs.default if distance == "l1" else aten.square.default
        sums = [total(op(size, op(aten.sub.Tensor, then, now))), total(op(size, then)), total(op(size, now))]
    if strides:
        # [B, frames * S, C] -> [B, frames, S * C]: one row a frame
        tokens, width = value.meta["val"].shape[1:]
        rows = op(aten.reshape.default, now, [-1, frames, int(tokens) // frames * int(width)])
        for i in strides:
            late = op(aten.slice.Tensor, rows, 1, i, frames)
            early = op(aten.slice.Tensor, rows, 1, 0, frames - i)
            sums += [total(op(aten.abs.default, x)) for x in (op(aten.sub.Tensor, late, early), late, early)]
    return sums
