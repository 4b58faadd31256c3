"""The one place that waits for values of a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DeviceReads", "read"]


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


class DeviceReads:
    """What one session reads of devices; `syncs` counts the waits of the current call."""

    def __init__(self) -> None:
        self.syncs = 0

    def read(self, values: Sequence[Tensor]) -> list[list[float]]:
        """The numbers of some tensors, flattened."""
        numbers, syncs = read(values)
        self.syncs += syncs
        return numbers

    @staticmethod
    def waits(values: Sequence[Tensor]) -> bool:
        """Whether reading any of these waits for a device."""
        return any(v.device.type != "cpu" for v in values)
