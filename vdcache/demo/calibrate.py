"""Measures a codebook for the shipped model (arXiv 2411.02397, supplement A.2).

    python -m vdcache.demo.calibrate

The four steps of the paper: 16 random prompts; the range of the metric over the denoising of the uncached model; that range split
uniformly, one interval a rate; rates by choice of quality against speed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

import vdcache
from vdcache.demo.data import random_conditions
from vdcache.demo.sampler import sample
from vdcache.demo.weights import load_model


def calibrate(
    out: Annotated[Path, typer.Option(help="Where the codebook goes.")] = Path("vdcache/demo/codebook.json"),
    prompts: Annotated[int, typer.Option(help="Random prompts.")] = 16,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 30,
    rates: Annotated[str, typer.Option(help="Rates from the smallest change to the largest.")] = "6,5,4,3,2,1",
    weights: Annotated[Path | None, typer.Option(help="Weights, if not the shipped ones.")] = None,
) -> None:
    """Measure the metric on the uncached model and write a codebook."""
    chosen = [int(r) for r in rates.split(",")]
    model = load_model(weights)
    # A codebook whose only rate is 1 recomputes every step, and so observes the uncached model.
    watch = vdcache.compile(model, vdcache.methods.adacache([(1.0, 1)], name="watch"), num_steps=steps, inner="eager")
    conditions = random_conditions(prompts, torch.Generator().manual_seed(2024))
    changes: list[float] = []
    for i, condition in enumerate(track(conditions, "observing", console=Console())):
        sample(watch, [condition], steps=steps, seed=100 + i)
        records = watch.vdcache.history.generation()
        changes += [m.change for r in records for m in r.measures]
    low, high = min(changes), max(changes)
    width = (high - low) / len(chosen)
    entries = [[round(low + width * (i + 1), 4), rate] for i, rate in enumerate(chosen)]
    quartiles = torch.tensor(changes).quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist()
    data = {"entries": entries, "steps": steps, "prompts": prompts, "range": [low, high], "quartiles": quartiles}
    out.write_text(json.dumps(data, indent=1) + "\n")
    Console().print(data)


if __name__ == "__main__":
    typer.run(calibrate)
