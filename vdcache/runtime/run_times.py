"""What a person waits for: the first result, and what compiling costs and wins against the eager inner compiler."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median

from vdcache.runtime.device_time import RunningRecords
from vdcache.runtime.history import Record

__all__ = ["RunTimes"]


class RunTimes:
    """Of one session, by the host's clock, as far as its forwards are watched."""

    def __init__(self) -> None:
        self._began: float | None = None  # the first forward
        self.running = RunningRecords()
        self.first_result: float | None = None  # seconds until the last call of the first generation was over
        self.compiling = 0.0  # seconds in which forwards traced and compiled
        self.inside = 0.0  # seconds in which the graphs of this forward ran
        self.compiles = False  # a graph of this forward ran for the first time in a generation
        self.eager_call: float | None = None  # seconds of a computed call that the eager inner compiler ran

    def begin(self) -> float:
        """A forward begins. Returns the time."""
        self.inside, self.compiles = 0.0, False
        now = time.perf_counter()
        self._began = self._began or now
        return now

    def end(self, began: float, generation: int) -> None:
        """A forward is over.

        Args:
            began: what `begin` returned.
            generation: that it belongs to, −1 while nobody knows.
        """
        now = time.perf_counter()
        if self.compiles:
            self.compiling += max(0.0, now - began - self.inside)
        if generation <= 0 and self._began is not None:
            self.first_result = now - self._began

    def ran_eagerly(self, records: Sequence[Record]) -> None:
        """These calls of one generation ran under the eager inner compiler, and later ones do not."""
        if computed := [r.seconds for r in records if r.computed]:
            self.eager_call = median(computed)

    def lines(self, records: Sequence[Record]) -> list[str]:
        """For a summary of these records of one generation."""
        found = []
        if self.first_result is not None:
            found.append(f"first result after {self.first_result:.2f} s; tracing and compiling took {self.compiling:.2f} s")
        computed = [r.seconds for r in records if r.computed]
        if self.eager_call is not None and computed:
            won = len(computed) * (self.eager_call - median(computed))
            pays = (
                f"it pays from {math.ceil(self.compiling / won)} generations like this one on" if won > 0 else "it wins nothing"
            )
            found.append(
                f"a computed call took {1e3 * self.eager_call:.1f} ms eagerly, {1e3 * median(computed):.1f} ms compiled: {pays}"
            )
        return found
