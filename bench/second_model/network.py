"""The second model: diffusers' MMDiT on images, epsilon-prediction on a cosine schedule, and its three solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SD3Transformer2DModel, UniPCMultistepScheduler
from torch import Tensor

from bench.second_model.scenes import SIZE, TEXT_DIM, Scene, encode, unconditional

# The first 960 timesteps of the cosine schedule (squaredcos_cap_v2) of 1000. Behind them hardly any signal is left, and the
# clean image is the predicted noise over almost nothing: no solver bears that unless images are clipped, which would be
# unfair to solvers of higher order. The last signal kept, 0.06, is that at which Stable Diffusion's schedule ends.
TIMESTEPS = 960
_cosine: Any = DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2")
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": TIMESTEPS,
    "trained_betas": _cosine.betas[:TIMESTEPS].tolist(),
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",  # all solvers begin at the last timestep, with any number of steps
}
ARCHITECTURE: dict[str, Any] = {
    "sample_size": SIZE,
    "patch_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT_DIM,
    "caption_projection_dim": 128,
    "pooled_projection_dim": TEXT_DIM,
    "pos_embed_max_size": SIZE // 4,
    "qk_norm": "rms_norm",
}
SOLVERS = ("ddim", "dpm++2m", "unipc")
GUIDANCE = 2.5
BATCH = 4  # images at once


def untrained(seed: int = 0) -> Any:
    """The architecture with the weights that training begins with."""
    torch.manual_seed(seed)
    return SD3Transformer2DModel(**ARCHITECTURE)


def signal() -> Tensor:
    """Share of the image and of noise by timestep: float32 [TIMESTEPS, 2], of unit sum of squares."""
    made: Any = DDIMScheduler(**SCHEDULE)
    kept = made.alphas_cumprod
    return torch.stack([kept.sqrt(), (1 - kept).sqrt()], 1)


def scheduler(solver: str, steps: int) -> Any:
    """A scheduler of diffusers, ready for so many steps.

    DDIM is DPM-Solver++ of first order, which is the same update. diffusers' DDIMScheduler rounds the length of a step down
    to whole timesteps, which would harm few steps; with 30 steps the two agree (a test).
    """
    if solver == "unipc":
        made: Any = UniPCMultistepScheduler(**SCHEDULE, solver_order=2)
    elif solver in ("ddim", "dpm++2m"):
        made = DPMSolverMultistepScheduler(**SCHEDULE, solver_order=1 if solver == "ddim" else 2)
    else:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    made.set_timesteps(steps)
    if len(made.timesteps) > steps:  # where rounding of 960 / steps lets one more timestep, −1, in: seen with 13
        made.timesteps, made.num_inference_steps = made.timesteps[:steps], steps
        made.sigmas = torch.cat([made.sigmas[:steps], made.sigmas[-1:]])
    return made


def solve(
    predict: Callable[..., Any], scenes: Sequence[Scene], *, solver: str, steps: int, seed: int, guidance: float
) -> Tensor:
    """One batch of images, [B, 3, SIZE, SIZE]."""
    b = len(scenes)
    x = torch.randn(b, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    tokens, pooled = (torch.cat(halves) for halves in zip(encode(scenes), unconditional(b), strict=True))
    method = scheduler(solver, steps)
    with torch.no_grad():
        for timestep in method.timesteps:
            noise = predict(
                hidden_states=torch.cat([x, x]),
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                timestep=timestep.expand(2 * b),
                return_dict=False,
            )[0]
            with_text, without = noise.chunk(2)
            x = method.step(without + guidance * (with_text - without), timestep, x, return_dict=False)[0]
    return x


def generate(
    predict: Callable[..., Any],
    scenes: Sequence[Scene],
    *,
    solver: str = "ddim",
    steps: int = 30,
    seed: int = 0,
    guidance: float = GUIDANCE,
    begin: Callable[[int], None] | None = None,
) -> Tensor:
    """Images of the scenes, four a batch; batch i starts from the noise of `seed + i`.

    Args:
        predict: the model, called once a step with the conditional and the unconditional half in one batch.
        begin: told the number of steps before each batch: there a cache forgets the batch before.
    """
    images = []
    for i, start in enumerate(range(0, len(scenes), BATCH)):
        if begin is not None:
            begin(steps)
        part = scenes[start : start + BATCH]
        images.append(solve(predict, part, solver=solver, steps=steps, seed=seed + i, guidance=guidance))
    return torch.cat(images)


def psnr_of(images: Tensor, reference: Tensor) -> list[float]:
    """PSNR of each image in dB, at most 99; values of both go from −1 to 1."""
    errors = (images - reference).double().square().mean((1, 2, 3))
    return (10 * torch.log10(4 / errors.clamp(min=1e-12))).clamp(max=99).tolist()
