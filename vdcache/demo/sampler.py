"""Euler's method on the straight path from noise to video, with classifier-free guidance in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vdcache.demo.conditions import Condition, encode, unconditional
from vdcache.demo.data import FRAMES, SIZE
from vdcache.demo.model import with_positions

__all__ = ["GUIDANCE", "sample"]

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
    x = torch.randn(b, 3, FRAMES, SIZE, SIZE, generator=generator).to(device, dtype)
    text = torch.cat([encode(conditions), unconditional(b)]).to(device, dtype)
    sigmas = torch.linspace(1.0, 0.0, steps + 1)
    with torch.no_grad():
        for i in range(steps):
            timestep = (1000 * sigmas[i]).expand(2 * b).to(device)
            with_text, without = velocity(with_positions(torch.cat([x, x])), timestep, text).chunk(2)
            direction = without + guidance * (with_text - without)
            x = x + (sigmas[i + 1] - sigmas[i]).item() * direction
            on_step(i)
    return x
