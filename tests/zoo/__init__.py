"""Published architectures at small random sizes: real classes, random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ZOO", "Case", "build"]


@dataclass(frozen=True)
class Case:
    """One architecture.

    `branches` is read off the architecture by hand: how many residual contributions of each kind it has.
    `call(step)` gives the keyword arguments of the model at a denoising step.
    """

    name: str
    make: Callable[[], nn.Module]
    call: Callable[[int], dict[str, Any]]
    branches: dict[str, int]

    def __str__(self) -> str:
        return self.name


ZOO: dict[str, Case] = {}


def register(name: str, make: Callable[[], nn.Module], call: Callable[[int], dict[str, Any]], **branches: int) -> None:
    ZOO[name] = Case(name, make, call, {k.replace("_", "-"): v for k, v in branches.items()})


def build(name: str, seed: int = 0) -> nn.Module:
    """The model with every parameter redrawn, so that no zero-initialised gate hides a branch."""
    torch.manual_seed(seed)
    model = ZOO[name].make().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        scale = 0.2 if p.ndim < 2 else 0.5 * p[0].numel() ** -0.5
        offset = p if p.ndim < 2 else 0
        p.copy_(offset + scale * torch.randn(p.shape, generator=generator))
    return model


def noise(*shape: int, seed: int = 0, step: int = 0) -> Tensor:
    """A latent that moves a little from step to step."""
    base = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    drift = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))
    return base + 0.05 * step * drift


def text(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def when(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([1000 - 25 * step], dtype=dtype)


from tests.zoo import diffusers_models, own  # noqa: E402, F401
