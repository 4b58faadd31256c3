"""Seconds of several ways to compute one thing, side by side on one device."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["seconds_of"]


def seconds_of(runs: Sequence[Callable[[], Any]], device: torch.device, seconds: float = 1.0) -> list[float]:
    """Medians of seconds, side by side, in about so much time each. Waits for `device` alone."""
    timed = _on_cuda if device.type == "cuda" else functools.partial(_on_host, device)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        once = sum(map(timed, runs)) / len(runs)
        rounds = max(3, min(30, int(seconds / max(once, 1e-6))))
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            for run, own in zip(runs, times, strict=True):
                own.append(timed(run))
    return [statistics.median(t) for t in times]


def _on_cuda(run: Callable[[], Any]) -> float:
    """Seconds of one run on the current CUDA device, by its own clock: what else the host does is not counted."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _on_host(device: torch.device, run: Callable[[], Any]) -> float:
    """Seconds of one run, waited for where the device is none that computes at once."""
    began = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began
