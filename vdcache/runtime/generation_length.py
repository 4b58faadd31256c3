"""How many steps does a generation have? What the caller announced, else what earlier generations have shown."""

from __future__ import annotations

from collections.abc import Sequence

from vdcache.runtime.session_warnings import SessionWarnings

__all__ = ["GenerationLength"]

MOST_LENGTHS = 64  # lengths of generations that are remembered


class GenerationLength:
    """The number of steps of the generation that runs, as far as it is known.

    Args:
        announced: by the caller, of every generation; None to learn it.
    """

    def __init__(self, announced: int | None, notices: SessionWarnings) -> None:
        self.steps = self.announced = announced
        self._notices = notices
        self._seen: dict[tuple[float, ...], int] = {}  # first two timesteps -> steps of the generation that began so

    def announce(self, steps: int | None) -> None:
        """Every generation has as many from the next one on; None to learn it."""
        self.steps = self.announced = steps

    def forget(self) -> None:
        """What ran so far teaches nothing."""
        self.steps = self.announced

    def ended(self, ran: int, timesteps: Sequence[float], *, skips: bool, said_by_caller: bool) -> None:
        """A generation is over.

        Args:
            ran: steps that it had.
            skips: whether the policy ever reuses anything; if not, nothing depends on the number of steps.
            said_by_caller: they began the next one, so it may have been cut short on purpose.
        """
        if self.announced is not None:
            if ran < self.announced and not said_by_caller and skips:
                self._notices.short(ran, self.announced)
            return
        if skips and self.steps is None:
            self._notices.learnt(ran)
        elif skips and ran != self.steps:
            self._notices.other_length(ran, self.steps)
        self.steps = self._seen[tuple(timesteps[:2])] = ran
        if len(self._seen) > MOST_LENGTHS:
            del self._seen[next(iter(self._seen))]

    def recall(self, timesteps: Sequence[float]) -> bool:
        """Runs of several lengths in turn: where an earlier one began with the same two timesteps, this one is as long. Whether that is news."""
        steps = self._seen.get(tuple(timesteps[:2])) if self.announced is None else None
        if steps is None or steps == self.steps:
            return False
        self.steps = steps
        return True
