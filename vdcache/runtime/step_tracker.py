"""Which generation and step is this call? (DESIGN section 7)

The step tracker sees what the graph sees: the values of the timestep inputs (inputs with a path into a sinusoidal embedding), and whether a call
repeats an earlier one of the same step with another latent. A new value is a new step; a jump back is a new generation; the same
value is another lane, unless it repeats a call of this step with another latent. Windows and tiles do that at every timestep, the
first among them; solvers of second order do it at every timestep but the first. So a generation whose first timestep is repeated
has windows, whose calls are one step; in any other a repeated call is a further step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Reading", "StepTracker", "Tick"]

MOST_ENDS = 64  # timesteps that are remembered
NEAR_TOP = 0.9  # of the largest timestep, which is 1 or 1000
Form = tuple[tuple[int, ...], object, object]  # shape, dtype, device


@dataclass(slots=True)
class Reading:
    """What a call shows of its place in the run.

    Args:
        keys: the value of every candidate, flattened; a candidate that never changes is no timestep and does no harm.
        coarse: whether a candidate is a 16-bit number, so that neighbouring steps may share its value.
        form: shape, dtype and device of the latent; None where no latent is known.
    """

    keys: tuple[tuple[float, ...], ...]
    coarse: bool
    form: Form | None


@dataclass(slots=True)
class Tick:
    """Where a call stands.

    Args:
        generation, step, lane: each counted from 0; `lane` is the place among the calls of the step.
        new_step: the first call of a step.
        new_generation: the first call of a generation.
        repeated: a call of this step with the same conditioning had another latent, or a neighbouring step may be such a call:
            nobody can tell whose values are cached.
        unsure: nobody knows yet which way the timesteps of this session run, and this one went up to where runs begin: what was before may be another's.
        mixed: some samples of the batch went on, others began anew: this generation says nothing of how long one is.
    """

    generation: int
    step: int
    lane: int
    new_step: bool
    new_generation: bool
    timestep: float | None = None
    repeated: bool = False
    mixed: bool = False
    unsure: bool = False


class _Directions:
    """Which way runs of a session go: where they began and ended, as far as each showed it."""

    def __init__(self) -> None:
        self.usual = 0  # of the last generation that showed one
        self._began: dict[float, int] = {}  # timesteps at which generations began, and their directions
        self._ended: dict[float, int] = {}

    def ran(self, began: float | None, ended: float | None, direction: int) -> None:
        """A generation went from one timestep to another."""
        self.usual = direction
        for seen, at in ((self._began, began), (self._ended, ended)):
            if at is not None:
                seen[at] = direction
            if len(seen) > MOST_ENDS:
                del seen[next(iter(seen))]

    def expected(self, began: float | None) -> int:
        """Which way a generation will go that begins here. A run the other way round (inversion) begins where others ended."""
        return self.usual if began is None else self._began.get(began) or -self._ended.get(began, -self.usual)


class StepTracker:
    """Tells generation and step from readings, one a call."""

    def __init__(self) -> None:
        self.generation = -1
        self.step = -1
        self.lane = 0
        self._reading: Reading | None = None
        self._first: Reading | None = None  # of this generation
        self._first_repeats = False  # the first timestep came again with another latent, as every later one has so far
        self._repeats = False  # the current timestep did
        self._single = 0  # how many timesteps after the first one did not
        self._direction = 0
        self._expected = 0  # the direction that this generation will take, guessed at its first call
        self._in_doubt = False  # the guess was wrong for the generation before, which had one step
        self._directions = _Directions()
        self._last: Reading | None = None  # the last reading of this generation
        self._which = 0  # the candidate that is the timestep, as far as is known

    def begin(self) -> None:
        """A new generation starts with the next reading, whatever it shows."""
        self._reading = None

    def tick(self, reading: Reading, repeated: Callable[[], bool], last: bool = False) -> Tick:
        """Place one call.

        Args:
            repeated: whether a call of this step had the same conditioning and another latent; asked only where it matters.
            last: the current step is the last one that was announced.
        """
        before = self._reading
        self._reading = reading
        if before is None or self._first is None or len(before.keys) != len(reading.keys):
            return self._new_generation(reading)
        if before.keys == reading.keys:
            return self._same_timestep(reading, repeated, last)
        if before.keys != self._first.keys and not self._repeats:
            self._first_repeats = False  # no windows: those are there at every timestep
            self._single += 1
        self._repeats = False
        if before.form != reading.form and (last or not _same_but_for_batch(before.form, reading.form)):
            return self._new_generation(reading)
        direction = self._direction_to(before, reading)
        if direction is None:
            return self._new_generation(reading, mixed=True)
        if direction and direction == -(self._direction or self._expected):
            guessed_wrong = not self._direction and self.step == 0
            if not (guessed_wrong and self._in_doubt):
                return self._new_generation(reading, in_doubt=guessed_wrong)
        nothing_known = not self._direction and not self._directions.usual
        unsure = direction > 0 and nothing_known and self._is_near_top(before, reading)
        self._direction = self._direction or direction
        self._in_doubt = False
        return self._new_step(reading, unsure=unsure)

    def _same_timestep(self, reading: Reading, repeated: Callable[[], bool], last: bool) -> Tick:
        if not repeated():
            self.lane += 1
            return self._at(reading)
        first = self._first is not None and self._first.keys == reading.keys
        if not self._first_repeats and (last or (self._single > 1 and not reading.coarse)):
            return self._new_generation(reading)  # the last one is complete, or was cut short: its solver repeats no timestep
        self._repeats, self._first_repeats = True, self._first_repeats or first
        if reading.coarse or not self._first_repeats:
            return self._new_step(reading, repeated=self._first_repeats)
        self.lane += 1
        return self._at(reading, repeated=True)

    def _new_generation(self, reading: Reading, *, mixed: bool = False, in_doubt: bool = False) -> Tick:
        if self._direction and self._first is not None and self._last is not None:
            self._directions.ran(self._timestep(self._first), self._timestep(self._last), self._direction)
        self._direction, self._expected = 0, self._directions.expected(self._timestep(reading))
        self._first, self._first_repeats, self._repeats, self._single = reading, False, False, 0
        self._in_doubt = in_doubt
        self.generation += 1
        self.step, self.lane = 0, 0
        return self._at(reading, new_step=True, new_generation=True, mixed=mixed)

    def _new_step(self, reading: Reading, *, repeated: bool = False, unsure: bool = False) -> Tick:
        self.step, self.lane = self.step + 1, 0
        return self._at(reading, new_step=True, repeated=repeated, unsure=unsure)

    def _at(
        self,
        reading: Reading,
        *,
        new_step: bool = False,
        new_generation: bool = False,
        repeated: bool = False,
        mixed: bool = False,
        unsure: bool = False,
    ) -> Tick:
        self._last = reading
        timestep = max(reading.keys[0]) if reading.keys and reading.keys[0] else None
        return Tick(self.generation, self.step, self.lane, new_step, new_generation, timestep, repeated, mixed, unsure)

    def _timestep(self, reading: Reading) -> float | None:
        found = reading.keys[self._which] if self._which < len(reading.keys) else ()
        return max(found) if found else None

    def _is_near_top(self, before: Reading, now: Reading) -> bool:
        """Whether a timestep is one at which runs begin that fall: models whose timesteps rise come there by small steps."""
        last, value = self._timestep(before), self._timestep(now)
        return last is not None and value is not None and value >= NEAR_TOP * (1.0 if max(last, value) <= 1 else 1000.0)

    def _direction_to(self, before: Reading, now: Reading) -> int | None:
        """Where the first candidate that changed went: 1 up, −1 down, 0 where that cannot be said; None where some of its values
        went up and others down.
        """
        for which, (a, b) in enumerate(zip(before.keys, now.keys, strict=True)):
            if a == b or not a or not b:
                continue
            self._which = which
            if len(a) != len(b):  # a lane more or less in the batch
                return (max(b) > max(a)) - (max(b) < max(a))
            signs = {(y > x) - (y < x) for x, y in zip(a, b, strict=True)} - {0}
            return signs.pop() if len(signs) == 1 else None if signs else 0
        return 0


def _same_but_for_batch(a: Form | None, b: Form | None) -> bool:
    """Whether two latents are alike but for the number of samples, which guidance changes when it begins or ends."""
    if a is None or b is None:
        return a is b
    return a[0][1:] == b[0][1:] and len(a[0]) == len(b[0]) and a[1:] == b[1:]
