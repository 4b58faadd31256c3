"""Trains the demo's video DiT by flow matching, on videos drawn on the spot.

    python -m vdcache.demo.train --minutes 110 --out vdcache/demo/weights.safetensors

The network learns the velocity of the straight path x_σ = (1 − σ)·video + σ·noise (rectified flow), with the
condition dropped in one video of ten for classifier-free guidance. Matrices inside the network are trained with
Muon, all else with AdamW; the rate warms up, stays, and falls to zero over the last 40 % of the time. What is saved
is the exponential moving average of the weights, in float16.

Now and then it prints how much larger the loss becomes when one word of the condition is replaced by a wrong one: a
word that the network does not follow has a ratio of 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vdcache.demo.conditions import COLOURS, Condition, encode, unconditional
from vdcache.demo.data import draw, random_conditions
from vdcache.demo.model import DemoDiT, with_positions

WARM_UP, FALL_FROM = 0.01, 0.6  # shares of the training time
EMA_MEMORY = 0.05  # the average looks back over this share of the steps done so far


def train(
    minutes: Annotated[float, typer.Option(help="Wall-clock time to train for.")] = 90.0,
    out: Annotated[Path, typer.Option(help="Where the float16 weights go.")] = Path("weights.safetensors"),
    batch: Annotated[int, typer.Option(help="Videos a step.")] = 16,
    rate: Annotated[float, typer.Option(help="Peak learning rate, for both optimisers.")] = 3e-3,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help="What matrices are multiplied in: bfloat16 or float32.")] = "bfloat16",
    start_from: Annotated[Path | None, typer.Option(help="Weights to go on from.")] = None,
    save_every: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 5.0,
) -> None:
    """Train the demo model and save its weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DemoDiT().to(device)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.normal_(model.condition_embedder.text_embedder.linear_2.weight, std=0.2)  # words as loud as pixels from the start
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
    # On CPUs the fused attention's backward takes as long as all else together for clips this short; Inductor's pattern matcher
    # would put it back.
    unfused = device == "cpu"
    run = torch.compile(model, options={"pattern_matcher": False} if unfused else None)

    def velocity(*args: Tensor) -> Tensor:
        attention = sdpa_kernel(SDPBackend.MATH) if unfused else nullcontext()
        with attention, torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            return run(*args).float()

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
            loss = loss_of(velocity, batch, generator, device)
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
                progress.update(bar, completed=done, loss=f"step {step}, loss {shown:.4f}")
                if not math.isfinite(shown):
                    raise RuntimeError(f"the loss is {shown} at step {step}: train with a smaller --rate")
                if step % 500 == 0:
                    told = ", ".join(f"{word} {ratio:.3f}" for word, ratio in words_heard(velocity, device).items())
                    print(f"{done:.3f} step {step} loss {shown:.4f}; wrong word / right word: {told}", flush=True)
            if time.monotonic() - saved > 60 * save_every:
                save()
                saved = time.monotonic()
    save()


def loss_of(velocity: Callable[..., Tensor], batch: int, generator: torch.Generator, device: str) -> Tensor:
    """Mean squared error of the velocity on a fresh batch; 0-d."""
    conditions = random_conditions(batch, generator)
    video, _ = draw(conditions, generator)
    text = encode(conditions)
    dropped = torch.rand(batch, generator=generator) < 0.1
    text = torch.where(dropped[:, None, None], unconditional(batch), text)
    # Half of the noise levels uniform, half close to pure noise, where only the words say where the sprite goes.
    uniform = torch.rand(batch, generator=generator)
    sigma = torch.where(torch.rand(batch, generator=generator) < 0.5, uniform, 1 - 0.3 * uniform**2)
    noise = torch.randn(video.shape, generator=generator)
    predicted = velocity(*_inputs(video, noise, sigma, text, device))
    return nn.functional.mse_loss(predicted, (noise - video).to(device))


def _inputs(video: Tensor, noise: Tensor, sigma: Tensor, text: Tensor, device: str) -> tuple[Tensor, Tensor, Tensor]:
    noised = torch.lerp(video, noise, sigma.view(-1, 1, 1, 1, 1))
    return with_positions(noised.to(device)), 1000 * sigma.to(device), text.to(device)


@torch.no_grad()
def words_heard(velocity: Callable[..., Tensor], device: str, batch: int = 64) -> dict[str, float]:
    """How much larger the loss is with a wrong word than with the right one, at a noise level of 0.95, by kind of word."""
    generator = torch.Generator().manual_seed(0)
    conditions = [replace(c, speed="fast") for c in random_conditions(batch, generator)]
    video, _ = draw(conditions, generator)
    noise, sigma = torch.randn(video.shape, generator=generator), torch.full((batch,), 0.95)

    def loss(told: list[Condition]) -> float:
        predicted = velocity(*_inputs(video, noise, sigma, encode(told), device))
        return nn.functional.mse_loss(predicted, (noise - video).to(device)).item()

    opposite = {"up": "down", "down": "up", "left": "right", "right": "left"}
    colours = list(COLOURS)
    right = loss(conditions)
    return {
        "colour": loss([replace(c, colour=colours[colours.index(c.colour) - 3]) for c in conditions]) / right,
        "direction": loss([replace(c, direction=opposite[c.direction]) for c in conditions]) / right,
        "speed": loss([replace(c, speed="still") for c in conditions]) / right,
    }


if __name__ == "__main__":
    typer.run(train)
