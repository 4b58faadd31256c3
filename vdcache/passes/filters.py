"""Filters that a value goes through before its change is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from vdcache.ir.edit import inline
from vdcache.ir.ops import tensor_of
from vdcache.patterns import Grid, Refusal, analyze

__all__ = ["FILTERS", "filtered", "sinusoids", "wiener"]


def filtered(graph: fx.GraphModule, value: fx.Node, name: str, *, provenance: str) -> fx.Node | Refusal:
    """A filtered value, added to the graph after it.

    The value is the latent, [B, C, T, H, W] or [B, C, H, W], or tokens [B, N, C] of a grid that the graph shows.
    """
    found = analyze(graph)
    nodes = {n.name: n for n in graph.graph.nodes}
    tensor = tensor_of(value)
    if tensor is None or not all(isinstance(s, int) for s in tensor.shape):
        return Refusal(value.name, "a filter over frequencies needs sizes that are known when the model is compiled")
    if not found.timestep_inputs:
        return Refusal(value.name, "the filter follows the noise level, and no timestep was found")
    timestep = nodes[found.timestep_inputs[0]]
    if tensor_of(timestep) is None:
        return Refusal(timestep.name, "the timestep is no tensor")
    laid = _video_axes(tuple(tensor.shape), found.grid)
    if laid is None:
        return Refusal(value.name, "the graph does not show the grid of its tokens, which the filter runs over")
    shape, axes = laid
    given = [n for n in graph.graph.nodes if n.op == "placeholder"]

    def run(x: Tensor, timestep: Tensor) -> Tensor:
        time = timestep.float().amax()
        return FILTERS[name](x.float().reshape(shape), torch.where(time > 1, time / 1000, time), axes).reshape(tensor.shape)

    with graph.graph.inserting_before((value if value.op == "call_function" else given[-1]).next):
        return inline(graph.graph, run, (value, timestep), provenance=provenance)


def _video_axes(shape: tuple[int, ...], grid: Grid | None) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """A shape in which frames, height and width are axes of their own, and which axes they are; None if nobody knows."""
    if len(shape) == 4:
        return shape, (2, 3)
    if len(shape) == 5:
        # channels stand before the frames or after them; the grid says which dimension counts frames
        frames = grid.frames if grid is not None else 0
        after = frames > 1 and shape[1] % frames == 0 and shape[2] % frames != 0
        return shape, (1, 3, 4) if after else (2, 3, 4)
    if len(shape) != 3 or grid is None:
        return None
    folded = shape[1] == grid.height * grid.width and shape[0] % grid.frames == 0  # as spatial attention has them
    if shape[1] != grid.tokens and not folded:
        return None
    batch = shape[0] if shape[1] == grid.tokens else shape[0] // grid.frames
    return (batch, grid.frames, grid.height, grid.width, shape[2]), (1, 2, 3)


def wiener(x: Tensor, sigma: Tensor, axes: Sequence[int], power: float = 3.0) -> Tensor:
    """The filter of SeaCache (arXiv 2602.18993): the best linear estimate of the clean signal at noise level `sigma`.

    With x = (1 − σ) s + σ n, white noise n and a signal whose power falls as P(f) = f^−power along each axis, the gain of an
    axis is (1 − σ) P / ((1 − σ)² P + σ²). Gains of the axes are multiplied, and scaled to a mean of 1 (equation 7), so that
    distances of different steps compare.

    Args:
        x: real, of any shape.
        sigma: 0-d, 0 (clean) to 1 (noise).
        axes: frames, height and width.
    """
    sigma = sigma.clamp(1e-6, 1 - 1e-6)
    mean = x.new_ones(())
    for axis in axes:
        n = x.shape[axis]
        k = x.new_ones(n).cumsum(0) - 1
        frequency = torch.minimum(k, n - k) / n
        clean = 1 / (frequency**power + 1e-16)
        gain = (1 - sigma) * clean / ((1 - sigma) ** 2 * clean + sigma**2 + 1e-16)
        mean = mean * gain.mean()
        x = (x.movedim(axis, -1) @ circulant(gain)).movedim(-1, axis)
    return x / mean


def circulant(gain: Tensor) -> Tensor:
    """The matrix [n, n] that multiplies the spectrum of n points by a real, symmetric gain [n]: a transform there and back,
    without complex numbers.
    """
    n = gain.shape[0]
    cosine, sine = sinusoids(gain, n)
    return (cosine @ (gain[:, None] * cosine) + sine @ (gain[:, None] * sine)) / n


def sinusoids(like: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """cos and sin of 2π j k / n, each [n, n]: the discrete Fourier transform as two real matrices, for sizes of latents."""
    ones = like.new_ones(n)
    k, size = ones.cumsum(0) - 1, ones.sum()  # as tensors: a size may be a symbol, which no number may be made of
    angle = torch.remainder(k[:, None] * k[None, :], size) * (2 * math.pi / size)
    return angle.cos(), angle.sin()


FILTERS: dict[str, Callable[[Tensor, Tensor, Sequence[int]], Tensor]] = {"wiener": wiener}
