"""The one place that waits for values of a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["read"]


def read(values: Sequence[Tensor]) -> tuple[list[list[float]], int]:
    """The numbers of some tensors, flattened, and how many device syncs it took: one for each device but the CPU.

    Numbers come back as float64, which holds every float and every integer up to 2^53 exactly.
    """
    found: list[list[float]] = [[] for _ in values]
    by_device: dict[torch.device, list[int]] = {}
    for i, value in enumerate(values):
        if value.device.type == "cpu":
            found[i] = value.detach().reshape(-1).double().tolist()
        else:
            by_device.setdefault(value.device, []).append(i)
    for members in by_device.values():
        flat = torch.cat([values[i].detach().reshape(-1).double() for i in members]).tolist()
        at = 0
        for i in members:
            found[i] = flat[at : at + values[i].numel()]
            at += values[i].numel()
    return found, len(by_device)
