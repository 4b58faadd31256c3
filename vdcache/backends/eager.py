"""The eager inner compiler: a variant runs as the ATen operations that it is made of. Fast to set up and bit-exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

__all__ = ["run_eagerly"]


def run_eagerly(graph: fx.GraphModule) -> Callable[..., Sequence[Any]]:
    """The graph as a callable that returns a sequence."""

    def run(*inputs: Any) -> Sequence[Any]:
        with torch.no_grad():
            return graph(*inputs)  # type: ignore[no-any-return]

    return run
