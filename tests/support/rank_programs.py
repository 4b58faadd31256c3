"""What single ranks run in tests: functions of the rank, called by `tests.support.ranks`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vdcache
from tests.support.parallel import UlyssesDiT
from vdcache.demo.model import DemoConfig, DemoDiT, with_positions
from vdcache.ir.ops import communicates

SMALL = DemoConfig(num_layers=2, num_attention_heads=4, attention_head_dim=8, ffn_dim=32)


def small() -> DemoDiT:
    """The shipped network with few weights, gates open enough that every branch matters."""
    torch.manual_seed(0)
    return DemoDiT(SMALL).eval().requires_grad_(False)


def video(frames: int = 2, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(1, 3, frames, height, width, generator=torch.Generator().manual_seed(seed))


def sample(model: Any, steps: int, frames: int = 2, seed: int = 0) -> Tensor:
    """A generation by Euler's method."""
    x, text = video(frames, seed=seed), torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(seed + 1))
    for step in range(steps):
        v = model(with_positions(x), torch.tensor([1000.0 * (1 - step / steps)]), text)
        x = x - v / steps
    return x


def generation(rank: int, recipe: str, steps: int, frames: int, seed: int = 0) -> dict[str, Any]:
    """One generation of the spread model and of the whole one, under the same recipe."""
    alone = vdcache.compile(small(), recipe, num_steps=steps, inner="eager", strict=True)
    spread = vdcache.compile(UlyssesDiT(small()), recipe, num_steps=steps, inner="eager", strict=True)
    wanted, found = sample(alone, steps, frames, seed), sample(spread, steps, frames, seed)
    (graph,) = spread.vdcache.graphs
    return {
        "error": float((wanted - found).abs().max() / wanted.abs().max()),
        "alone": alone.vdcache.history.computed_steps(),
        "spread": spread.vdcache.history.computed_steps(),
        "measures": [r.measures[0].change for r in spread.vdcache.history if r.measures],
        "collectives": {str(p): sum(map(communicates, graph.variants[p].graph.graph.nodes)) for p in graph.variants.plans},
        "bytes": (spread.vdcache.store.peak_bytes, alone.vdcache.store.peak_bytes),
        "exchanges": graph.agreement.exchanges,
    }



def calibrated(rank: int, folder: str, steps: int) -> dict[str, Any]:
    """Four generations of `vdcache-auto`, each rank with its own folder of calibrations."""
    os.environ["VDCACHE_CACHE_DIR"] = folder + str(rank)
    spread = vdcache.compile(UlyssesDiT(small()), speedup=2, num_steps=steps, inner="eager", search_share=math.inf)
    plans = []
    for seed in range(4):
        sample(spread, steps, seed=seed)
        plans.append(spread.vdcache.history.computed_steps())
    found = spread.vdcache.calibration
    return {
        "plans": plans,
        "schedule": None if found is None else str(found.schedule),
        "tentative": None if found is None else found.tentative,
        "tried": [] if found is None else [(t.computed, t.psnr) for t in found.tried],
        "files": sorted(p.name for p in Path(folder + str(rank)).rglob("*.json")),
        "apart": spread.vdcache.ranks.apart,
    }
