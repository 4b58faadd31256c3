"""Random residual nets: valid by construction, their `repr` is their reproducer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "random nets (residual_nets, Net and WIDTH of vdcache.testing) need hypothesis: pip install 'vdcache[testing]'",
        name=error.name,
    ) from error

__all__ = ["WIDTH", "Net", "residual_nets"]

WIDTH = 4
STEPS = ("matmul", "relu", "cast", "view")  # what a branch body is made of
JOINS = ("add", "swapped", "gated", "addcmul", "alpha")  # how its result joins the stream
BETWEEN = ("", "cast", "view", "constant", "norm", "scale")  # what lies between two branches


@dataclass(frozen=True)
class Net:
    """A stream of branches: (between, body, join, leaks) each."""

    branches: tuple[tuple[str, tuple[str, ...], str, bool], ...]

    def __call__(self, x: Tensor, w: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        leaked = []
        for between, body, join, leaks in self.branches:
            x = _between(between, x, w)
            h = x
            for step in body:
                h = _step(step, h, w)
            if leaks:
                leaked.append(h.sum())
            x = _join(join, x, h, gate)
        return (x, *leaked)

    def works(self) -> int:
        """How many branches hold real work, and so must be found."""
        return sum("matmul" in body for _, body, _, _ in self.branches)


def _step(step: str, h: Tensor, w: Tensor) -> Tensor:
    if step == "matmul":
        return h @ w
    if step == "relu":
        return torch.relu(h)
    if step == "cast":
        return h.double().float()
    return h.reshape(-1, 2, WIDTH // 2).flatten(1)


def _join(join: str, x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    if join == "add":
        return x + h
    if join == "swapped":
        return h + x
    if join == "gated":
        return x + gate * h
    if join == "addcmul":
        return torch.addcmul(x, gate, h)
    return torch.add(x, h, alpha=0.5)


def _between(between: str, x: Tensor, w: Tensor) -> Tensor:
    if between == "cast":
        return x.double().float()
    if between == "view":
        return x.reshape(-1, 2, WIDTH // 2).reshape(-1, WIDTH)
    if between == "constant":
        return x + torch.ones(WIDTH)
    if between == "norm":
        return torch.nn.functional.layer_norm(x, (WIDTH,))
    if between == "scale":
        return x * 0.7
    return x


def residual_nets(max_branches: int = 4) -> st.SearchStrategy[Net]:
    """Nets of one to `max_branches` branches: functions of x [N, WIDTH], w [WIDTH, WIDTH] and gate [WIDTH].

    Branches with and without work, leaks, gates, casts, norms and broadcasts are among them, so a pass has work on some and
    refuses others (`assert_reaches` proves it for a pass).
    """
    body = st.lists(st.sampled_from(STEPS), min_size=1, max_size=3).map(tuple)
    branch = st.tuples(st.sampled_from(BETWEEN), body, st.sampled_from(JOINS), st.booleans())
    return st.lists(branch, min_size=1, max_size=max_branches).map(lambda b: Net(tuple(b)))
