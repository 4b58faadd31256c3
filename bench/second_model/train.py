"""Trains the second model, on images drawn on the spot.

    python -m bench.second_model.train

The network learns the noise. The condition is dropped in one image of ten, for classifier-free guidance. Timesteps are drawn
uniformly, and the squared error is weighted by 1 / ᾱ up to a bound: unweighted, high noise would hardly count, and with it what
the words say. Matrices inside the blocks are trained with Muon, all else with AdamW. What is saved is the exponential moving
average of the weights, in float16.

Training goes on from its checkpoint where it was cut off.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.second_model.network import ARCHITECTURE, GUIDANCE, SCHEDULE, TIMESTEPS, signal, untrained
from bench.second_model.scenes import VOCABULARY, draw, encode, random_scenes, unconditional

ASSETS = Path(__file__).parents[1] / "assets"
WEIGHTS = ASSETS / "second_model.safetensors"
TRAINING: dict[str, Any] = {
    "steps": 6000,
    "batch": 32,  # images a step
    "rate": 3e-3,  # peak learning rate of both optimisers
    "warm_up": 180,  # steps
    "fall_from": 0.5,  # share of the steps after which the rate falls to zero
    "dropped": 0.1,  # share of images without condition
    "largest_weight": 10.0,  # of the squared error
    "average": 0.05,  # the average looks back over this share of the steps done
    "seed": 0,
}


def definition() -> str:
    """Digest of data, architecture, schedule and training: a change of any of them makes the weights another model's."""
    generator = torch.Generator().manual_seed(0)
    scenes = random_scenes(16, generator)
    drawn = [[round(float(c), 2) for c in image.mean((1, 2))] for image in draw(scenes, generator)]
    betas = [round(beta, 5) for beta in SCHEDULE["trained_betas"]]
    fixed = [ARCHITECTURE, {**SCHEDULE, "trained_betas": betas}, TRAINING, GUIDANCE, VOCABULARY, list(map(str, scenes)), drawn]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def load(path: Path = WEIGHTS) -> nn.Module:
    """The trained model in float32. Raises ValueError where the weights are not those of this definition."""
    with safe_open(path, "pt") as file:
        made_for = (file.metadata() or {}).get("definition")
    if made_for != definition():
        raise ValueError(
            f"{path} was trained for the definition {made_for}, and this is {definition()}: run `python -m bench.second_model.train`"
        )
    model = untrained()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


def loss_of(predict: Callable[..., Any], generator: torch.Generator, batch: int, held_out: bool = False) -> Tensor:
    """Weighted squared error of the predicted noise on a fresh batch; 0-d."""
    scenes = random_scenes(batch, generator, held_out)
    image = draw(scenes, generator)
    dropped = torch.rand(batch, generator=generator) < TRAINING["dropped"]
    text, bag = (
        torch.where(dropped.view(-1, *[1] * (told.ndim - 1)), nothing, told)
        for told, nothing in zip(encode(scenes), unconditional(batch), strict=True)
    )
    timestep = torch.randint(TIMESTEPS, (batch,), generator=generator)
    noise = torch.randn(image.shape, generator=generator)
    kept, added = signal()[timestep].view(batch, 2, 1, 1, 1).unbind(1)
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):  # the fused backward is slower on so few tokens
        predicted = predict(
            hidden_states=kept * image + added * noise,
            encoder_hidden_states=text,
            pooled_projections=bag,
            timestep=timestep,
            return_dict=False,
        )[0]
    weight = (1 / kept**2).clamp(max=TRAINING["largest_weight"])
    return (weight * (predicted.float() - noise) ** 2).mean()


def prepared() -> Any:
    """The network before training: every block begins as the identity, and the output as zero."""
    model = untrained(TRAINING["seed"])
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for layer in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def optimisers_of(model: Any) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.transformer_blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=TRAINING["rate"], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=TRAINING["rate"], betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    out: Annotated[Path, typer.Option(help="Where the float16 weights go.")] = WEIGHTS,
    folder: Annotated[Path, typer.Option(help="Where the checkpoint and the log are kept.")] = Path("/tmp/second"),
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
) -> None:
    """Train the second model and save its weights."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / "checkpoint.pt", folder / "log.jsonl"
    generator = torch.Generator().manual_seed(TRAINING["seed"])
    model = prepared()
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimisers = optimisers_of(model)
    first, seconds, losses = 0, 0.0, []
    if checkpoint.exists():
        kept = torch.load(checkpoint)
        if kept["definition"] != definition():
            raise ValueError(f"{checkpoint} belongs to another definition: delete it")
        first, seconds, average = kept["step"], kept["seconds"], kept["average"]
        model.load_state_dict(kept["model"])
        for optimiser, state in zip(optimisers, kept["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        generator.set_state(kept["generator"])
    run = torch.compile(model, dynamic=False, options={"pattern_matcher": False})
    began = time.monotonic() - seconds
    total = TRAINING["steps"]
    for step in range(first + 1, total + 1):
        factor = min(1.0, step / TRAINING["warm_up"], (1 - step / total) / (1 - TRAINING["fall_from"]))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = TRAINING["rate"] * max(factor, 1e-3)
        loss = loss_of(run, generator, TRAINING["batch"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        weight = max(1 / (TRAINING["average"] * step + 1), 1e-3)
        with torch.no_grad():
            for name, value in model.state_dict().items():
                average[name].lerp_(value, min(1.0, weight))
        losses.append(loss.item())
        if step % 50 == 0:
            row = {"step": step, "loss": sum(losses) / len(losses), "minutes": (time.monotonic() - began) / 60}
            losses.clear()
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if not row["loss"] < 10:
                raise RuntimeError(f"the loss is {row['loss']} at step {step}")
        if step % save_every == 0 or step == total:
            seconds = time.monotonic() - began
            states = [optimiser.state_dict() for optimiser in optimisers]
            state = {"step": step, "model": model.state_dict(), "average": average, "optimisers": states, "seconds": seconds}
            state |= {"generator": generator.get_state(), "definition": definition()}
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
            save(average, folder / "weights.safetensors", step)
    save(average, out, total)


def save(weights: dict[str, Tensor], path: Path, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: value.to(torch.float16).contiguous() for name, value in weights.items()}
    save_file(halves, path, {"definition": definition(), "step": str(step)})


if __name__ == "__main__":
    typer.run(train)
