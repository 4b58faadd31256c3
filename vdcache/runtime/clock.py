"""Which generation, step and lane is this call? (DESIGN section 7)

The clock sees what the graph sees: the values of its candidates (inputs with a path into a sinusoidal embedding) and the
latent. A new value is a new step; a jump back is a new generation; the same value with the same latent is the next
lane; with another latent it is a further step (second-order solvers, 16-bit timesteps that collide) or, at the
generation's first value, a restart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Clock", "Reading", "Tick"]


@dataclass(frozen=True)
class Reading:
    """What a call shows of its place in the run.

    Args:
        keys: the value of every candidate, flattened; a candidate that never changes is no timestep and does no harm.
        coarse: whether a candidate is a 16-bit number, so that neighbouring steps may share its value.
        form: shape, dtype and device of the latent.
    """

    keys: tuple[tuple[float, ...], ...]
    coarse: bool
    form: object


@dataclass(frozen=True)
class Tick:
    """Where a call stands. `new_step` marks the first lane of a step, `new_generation` the first of a generation."""

    generation: int
    step: int
    lane: int
    new_step: bool
    new_generation: bool
    timestep: float | None = None


class Clock:
    """Tells generation, step and lane from readings, one a call."""

    def __init__(self) -> None:
        self.generation = -1
        self.step = -1
        self.lane = 0
        self._reading: Reading | None = None
        self._direction = 0
        self._usual_direction = 0  # of the last generation that showed one: the second step of the next cannot tell alone

    def begin(self) -> None:
        """A new generation starts with the next reading, whatever it shows."""
        self._reading = None

    def tick(self, reading: Reading, same_latent: Callable[[], bool]) -> Tick:
        """Place one call.

        Args:
            same_latent: whether the latent is the one of the call before; asked only where the answer matters.
        """
        before = self._reading
        self._reading = reading
        if before is None or before.form != reading.form or len(before.keys) != len(reading.keys):
            return self._new_generation(reading)
        if before.keys == reading.keys:
            if same_latent():
                self.lane += 1
                return self._at(reading, new_step=False)
            if self.step == 0 and not reading.coarse:
                return self._new_generation(reading)
            return self._new_step(reading)
        direction = _direction(before.keys, reading.keys)
        expected = self._direction or self._usual_direction
        if expected and direction and direction != expected:
            return self._new_generation(reading)
        self._direction = self._direction or direction
        return self._new_step(reading)

    def _new_generation(self, reading: Reading) -> Tick:
        self._usual_direction = self._direction or self._usual_direction
        self._direction = 0
        self.generation += 1
        self.step, self.lane = 0, 0
        return self._at(reading, new_step=True, new_generation=True)

    def _new_step(self, reading: Reading) -> Tick:
        self.step, self.lane = self.step + 1, 0
        return self._at(reading, new_step=True)

    def _at(self, reading: Reading, new_step: bool, new_generation: bool = False) -> Tick:
        timestep = max(reading.keys[0]) if reading.keys and reading.keys[0] else None
        return Tick(self.generation, self.step, self.lane, new_step, new_generation, timestep)


def _direction(before: tuple[tuple[float, ...], ...], now: tuple[tuple[float, ...], ...]) -> int:
    """Where the first candidate that changed went: 1 up, −1 down, 0 where its largest value stayed."""
    for a, b in zip(before, now, strict=True):
        if a != b and a and b:
            return (max(b) > max(a)) - (max(b) < max(a))
    return 0
