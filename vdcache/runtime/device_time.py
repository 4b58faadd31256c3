"""How long a call keeps its device busy. A GPU works on after the host has gone on, so the host's clock tells launches alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vdcache.runtime.history import Record

__all__ = ["DeviceTime", "RunningRecords"]


class DeviceTime:
    """Two events on the stream that the call is issued to. Nothing waits for them until somebody asks for the seconds.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.restart()

    @staticmethod
    def of(inputs: Sequence[Any], positions: Iterable[int]) -> DeviceTime | None:
        """For a call with these inputs; None where no GPU works on them, or the call is being captured into a CUDA graph.

        Args:
            positions: of the inputs that tell the device.
        """
        if not torch.cuda.is_initialized():
            return None
        given = (inputs[i] for i in positions)
        device = next((x.device for x in given if isinstance(x, Tensor) and x.device.type == "cuda"), None)
        return None if device is None or torch.cuda.is_current_stream_capturing() else DeviceTime(device)

    def restart(self) -> None:
        """Count from here, as what was before was no work of the call."""
        self._begin.record(self._stream)

    def stop(self) -> None:
        self._end.record(self._stream)

    def done(self) -> bool:
        """Whether the device has come to the end, so that `seconds` would not wait."""
        return self._end.query()

    def seconds(self) -> float:
        """Between the two events; waits for the second one."""
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3


class RunningRecords:
    """Records of calls that a device may still be working on, oldest first: their seconds are read when it is done with them."""

    def __init__(self) -> None:
        self._running: deque[Record] = deque()

    def add(self, record: Record) -> None:
        self._running.append(record)
        while self._running and self._running[0].settle():
            self._running.popleft()
