"""Trains the demo's video DiT by flow matching, on videos drawn on the spot.

    python -m vdcache.demo.train --minutes 110 --out vdcache/demo/weights.safetensors

The network learns the velocity of the straight path x_σ = (1 − σ)·video + σ·noise (rectified flow), with the
condition dropped in one video of ten for classifier-free guidance. Matrices inside the network are trained with
Muon, all else with AdamW; the rate warms up, stays, and falls to zero over the last 40 % of the time. The first part
of the time goes to clips of half the length, which cost less than half as much and already teach
shape, colour, texture and direction. What is saved is the exponential moving average of the weights, in float16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vdcache.demo.conditions import encode, unconditional
from vdcache.demo.data import FRAMES, draw, random_conditions
from vdcache.demo.model import DemoDiT, with_positions

WARM_UP, FALL_FROM = 0.01, 0.6  # shares of the training time
EMA_MEMORY = 0.05  # the average looks back over this share of the steps done so far


def train(
    minutes: Annotated[float, typer.Option(help="Wall-clock time to train for.")] = 110.0,
    out: Annotated[Path, typer.Option(help="Where the float16 weights go.")] = Path("weights.safetensors"),
    batch: Annotated[int, typer.Option(help="Videos a step.")] = 32,
    rate: Annotated[float, typer.Option(help="Peak learning rate, for both optimisers.")] = 3e-3,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    short_clips: Annotated[
        float, typer.Option(help="Share of the time, at the beginning, for clips of half the length.")
    ] = 0.3,
    start_from: Annotated[Path | None, typer.Option(help="Weights to go on from.")] = None,
    save_every: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 5.0,
) -> None:
    """Train the demo model and save its weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DemoDiT().to(device)
    nn.init.zeros_(model.proj_out.weight)
    if start_from is not None:
        weights = {k: v.float() for k, v in load_file(start_from).items()}
        model.load_state_dict(weights)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    matrices = [p for n, p in model.blocks.named_parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    velocity = torch.compile(model)

    def save() -> None:
        partial = out.with_suffix(".partial")
        save_file({k: v.to("cpu", torch.float16).contiguous() for k, v in average.items()}, partial)
        partial.replace(out)

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    began = saved = time.monotonic()
    step, shown = 0, 1.0
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=1.0, loss="")
        while (done := (time.monotonic() - began) / (60 * minutes)) < 1:
            factor = min(1.0, done / WARM_UP, (1 - done) / (1 - FALL_FROM))
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = rate * max(factor, 1e-3)
            frames = FRAMES // 2 if done < short_clips else FRAMES
            loss = loss_of(velocity, batch, frames, generator, device)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            step += 1
            weight = min(1.0, 1 / (EMA_MEMORY * step + 1)) if step < 20_000 else 1 / 1001
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    average[name].lerp_(value, weight)
            if step % 20 == 0:
                shown = 0.9 * shown + 0.1 * loss.item() if step > 20 else loss.item()
                progress.update(bar, completed=done, loss=f"step {step}, {frames} frames, loss {shown:.4f}")
                if not math.isfinite(shown):
                    raise RuntimeError(f"the loss is {shown} at step {step}: train with a smaller --rate")
                if step % 200 == 0:
                    print(f"{done:.3f} step {step} loss {shown:.4f}", flush=True)
            if time.monotonic() - saved > 60 * save_every:
                save()
                saved = time.monotonic()
    save()


def loss_of(velocity: Callable[..., Tensor], batch: int, frames: int, generator: torch.Generator, device: str) -> Tensor:
    """Mean squared error of the velocity on a fresh batch; 0-d."""
    conditions = random_conditions(batch, generator)
    video, _ = draw(conditions, generator, frames)
    text = encode(conditions)
    dropped = torch.rand(batch, generator=generator) < 0.1
    text = torch.where(dropped[:, None, None], unconditional(batch), text)
    # Half of the noise levels uniform, half around the noisier middle, where form and motion are decided.
    uniform = torch.rand(batch, generator=generator)
    middle = torch.sigmoid(torch.randn(batch, generator=generator) + 0.5)
    sigma = torch.where(torch.rand(batch, generator=generator) < 0.5, uniform, middle)
    noise = torch.randn(video.shape, generator=generator)
    noised = torch.lerp(video, noise, sigma.view(-1, 1, 1, 1, 1))
    predicted = velocity(with_positions(noised.to(device)), 1000 * sigma.to(device), text.to(device))
    return nn.functional.mse_loss(predicted, (noise - video).to(device))


if __name__ == "__main__":
    typer.run(train)
