"""Published architectures at small random sizes: real classes, random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from vdcache.testing import Case, captured, small_models
from vdcache.testing.models import build as build_case
from vdcache.testing.models import diffusers_class, noise, text, when

__all__ = ["ZOO", "Case", "build", "diffusers_class", "graph_of", "noise", "register", "text", "when"]

ZOO: dict[str, Case] = {name: case for name, case in small_models().items() if name != "tiny"}


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
    return build_case(ZOO[name], seed)


@functools.cache
def graph_of(name: str) -> tuple[fx.GraphModule, list[Any]]:
    """The captured graph of one architecture at step 3 with 6 tokens of text, and its inputs; not to be changed."""
    return captured(build(name), **ZOO[name].call(3, 6))


from tests.zoo import image_mmdit, image_single, papers, video  # noqa: E402, F401
