"""Euler's method on the straight path from noise to video, with classifier-free guidance in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vdcache.demo.conditions import Condition, encode, unconditional
from vdcache.demo.data import FRAMES, SIZE
from vdcache.demo.model import with_positions

__all__ = ["GUIDANCE", "denoiser", "sample"]

GUIDANCE = 2.5


def sample(
    velocity: Callable[..., Tensor],
    conditions: Sequence[Condition],
    *,
    steps: int = 30,
    guidance: float = GUIDANCE,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Videos of the conditions: [B, 3, FRAMES, SIZE, SIZE], about −1 to 1.

    Args:
        velocity: the model, called once a step with the conditional and the unconditional half in one batch.
        guidance: 1 is none.
        on_step: told each finished step, for progress bars.
    """
    b = len(conditions)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(b, 3, FRAMES, SIZE, SIZE, generator=generator).to(device, dtype)
    text = torch.cat([encode(conditions), unconditional(b)]).to(device, dtype)
    with torch.no_grad():
        return denoiser(steps, guidance, on_step)(velocity, noise, text)


def denoiser(
    steps: int = 30, guidance: float = GUIDANCE, on_step: Callable[[int], None] = lambda step: None
) -> Callable[[Callable[..., Tensor], Tensor, Tensor], Tensor]:
    """The loop of `sample` as a function of the model, noise [B, 3, T, H, W] and text [2 B, L, text_dim]: it draws nothing and reads no tensor, so
    it can be exported.
    """
    sigmas = torch.linspace(1.0, 0.0, steps + 1)
    times, widths = (1000 * sigmas).tolist(), (sigmas[1:] - sigmas[:-1]).tolist()

    def loop(velocity: Callable[..., Tensor], noise: Tensor, text: Tensor) -> Tensor:
        x = noise
        for i in range(steps):
            timestep = torch.full((text.shape[0],), times[i], device=x.device)
            with_text, without = velocity(with_positions(torch.cat([x, x])), timestep, text).chunk(2)
            direction = without + guidance * (with_text - without)
            x = x + widths[i] * direction
            on_step(i)
        return x

    return loop
