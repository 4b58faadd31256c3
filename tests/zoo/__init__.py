"""Published architectures at small random sizes: real classes, random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tests.support import captured

__all__ = ["ZOO", "Case", "build", "graph_of"]


@dataclass(frozen=True)
class Case:
    """One architecture.

    Args:
        make: builds the model at a small size.
        call: keyword arguments of the model at a denoising step, with a text of so many tokens (a model without text takes
            no notice of the second).
        branches: read off the architecture by hand, never off the tool: how many residual contributions of each kind.
        graphs: into how many graphs Dynamo breaks one forward.
        seen: what is left of `branches` where a break cuts branches apart, or where graphs that blocks share compute what the last
            block does not need.
    """

    name: str
    make: Callable[[], nn.Module]
    call: Callable[[int, int], dict[str, Any]]
    branches: dict[str, int]
    graphs: int = 1
    seen: dict[str, int] | None = None

    def __str__(self) -> str:
        return self.name


ZOO: dict[str, Case] = {}


def register(
    name: str,
    make: Callable[[], nn.Module],
    call: Callable[[int, int], dict[str, Any]],
    graphs: int = 1,
    seen: dict[str, int] | None = None,
    **branches: int,
) -> None:
    """Add one architecture; `self_attention=3, mlp=3` are its branches."""
    ZOO[name] = Case(name, make, call, {k.replace("_", "-"): v for k, v in branches.items()}, graphs, seen)


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


@functools.cache
def graph_of(name: str) -> tuple[fx.GraphModule, list[Any]]:
    """The captured graph of one architecture at step 3 with 6 tokens of text, and its inputs; not to be changed."""
    return captured(build(name), **ZOO[name].call(3, 6))


def noise(*shape: int, seed: int = 0, step: int = 0) -> Tensor:
    """A latent that moves a little from step to step."""
    base = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    drift = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))
    return base + 0.05 * step * drift


def text(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def when(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([1000 - 25 * step], dtype=dtype)


from tests.zoo import diffusers_models, image_mmdit, image_single, own, papers, video  # noqa: E402, F401
