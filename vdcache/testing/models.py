"""A few real architectures at small random sizes, to try a pass, a policy or a predictor on."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdcache.demo.model import DemoConfig, DemoDiT
from vdcache.testing.graphs import captured
from vdcache.testing.tiny import TinyDiT, latent, time_of

__all__ = ["Case", "build", "diffusers_class", "noise", "register", "small_models", "text", "value", "when"]


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

    def build(self, seed: int = 0) -> nn.Module:
        """The model, its parameters redrawn."""
        return build(self, seed)

    def graph(self, step: int = 3, tokens: int = 6) -> tuple[Any, list[Any]]:
        """The graph that torch.compile sees of one call, in vdcache's form, and its inputs."""
        return captured(self.build(), **self.call(step, tokens))


def build(case: Case, seed: int = 0) -> nn.Module:
    """The model with every parameter redrawn, so that no zero-initialised gate hides a branch."""
    torch.manual_seed(seed)
    model = case.make().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        scale = 0.2 if p.ndim < 2 else 0.5 * p[0].numel() ** -0.5
        offset = p if p.ndim < 2 else 0
        p.copy_(offset + scale * torch.randn(p.shape, generator=generator))
    return model


_MODELS: dict[str, Case] = {}


def diffusers_class(name: str, **config: Any) -> Callable[[], nn.Module]:
    """Makes a model of a class of diffusers."""

    def make() -> nn.Module:
        import diffusers

        made: nn.Module = getattr(diffusers, name)(**config)
        return made

    return make


def register(
    name: str,
    make: Callable[[], nn.Module],
    call: Callable[[int, int], dict[str, Any]],
    graphs: int = 1,
    seen: dict[str, int] | None = None,
    **branches: int,
) -> None:
    """Add one architecture; `self_attention=3, mlp=3` are its branches."""
    _MODELS[name] = Case(name, make, call, {k.replace("_", "-"): v for k, v in branches.items()}, graphs, seen)


@functools.cache
def small_models() -> dict[str, Case]:
    """Architectures by name: the least DiT, vdcache's demo model, and, where diffusers is installed, nine of its classes.

    Among them are a class-conditional DiT, cross-attention, one and two streams, spatial and temporal blocks, 3D attention.
    """
    if not _MODELS:
        _register_own()
        if importlib.util.find_spec("diffusers"):
            importlib.import_module("vdcache.testing.architectures")
    return dict(_MODELS)


def _register_own() -> None:

    config = DemoConfig(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=3
    )
    register(
        "tiny",
        lambda: TinyDiT(3),
        lambda s, n: {"x": latent(s), "timestep": time_of(s), "text": latent(7, 1, n, 4)},
        self_attention=3,
        mlp=3,
    )
    register(
        "demo",
        lambda: DemoDiT(config),
        lambda s, n: {
            "hidden_states": noise(1, 6, 3, 8, 8, step=s),
            "timestep": when(s),
            "encoder_hidden_states": text(1, n, 16),
        },
        self_attention=3,
        cross_attention=3,
        mlp=3,
    )


def noise(*shape: int, seed: int = 0, step: int = 0) -> Tensor:
    """A latent that moves a little from step to step."""
    base = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    drift = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))
    return base + 0.05 * step * drift


def text(*shape: int, seed: int = 7) -> Tensor:
    """An embedded text."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def when(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The timestep of a step, [1]."""
    return torch.tensor([1000 - 25 * step], dtype=dtype)


def value(output: Any) -> Tensor:
    """The tensor of what a model returns: alone, first of a tuple, or an output with a `sample`."""
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
