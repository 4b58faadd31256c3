"""Small packages that tests share, and the same generation written by hand."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vdcache
from vdcache.testing import TinyDiT, latent

STEPS = 6
SCHEDULE = vdcache.Schedule(STEPS, (0, 2, 3), order=0)
FORMATS = ("onnx", "onnx-single", "onnx-unrolled")


@functools.cache
def model() -> TinyDiT:
    return TinyDiT(blocks=2, dim=32, seed=1)


def call(step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return latent(1), times(step), latent(2, 1, 3, 4)


def times(step: int) -> Tensor:
    return torch.full((1,), 1000.0 - 150 * step)


def loop(model: Any, noise: Tensor, text: Tensor) -> Tensor:
    """Two calls a step, as for guidance."""
    x = noise
    for step in range(STEPS):
        with_text = model(x, times(step), text)
        without = model(x, times(step), text * 0)
        x = x - 0.1 * (without + 2 * (with_text - without))
    return x


def inputs(seed: int = 3) -> dict[str, Tensor]:
    return {"noise": latent(seed), "text": latent(2, 1, 3, 4)}


def by_hand(seed: int = 3) -> Tensor:
    """The generation with what the branches add kept from the computed steps, without vdcache."""
    kept: dict[str, Tensor] = {}
    given = inputs(seed)
    x = given["noise"]
    with torch.no_grad():
        for step in range(STEPS):
            results = []
            for lane, text in (("cond", given["text"]), ("uncond", given["text"] * 0)):
                if step in SCHEDULE.computed:
                    kept[lane] = model().branches(x, times(step), text)
                results.append(model().with_branches(x, text, kept[lane]))
            x = x - 0.1 * (results[1] + 2 * (results[0] - results[1]))
    return x


def exported(path: Path, format: str = "onnx", **more: Any) -> Path:
    vdcache.export(model(), call(), schedule=SCHEDULE, path=path, format=format, loop=loop, inputs=inputs(), **more)
    return path


def tiny() -> Any:
    """A target of the command line."""
    return model(), call(), {}, loop, inputs()


def nothing() -> Any:
    """Another model."""
    return TinyDiT(blocks=2, dim=32, seed=2), call(), {}, loop, inputs()
