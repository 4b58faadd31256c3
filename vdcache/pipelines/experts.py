"""Which of several denoisers runs at which timestep, so that each knows how many steps are its own."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Experts"]


class Experts:
    """Goes by the boundary, where the pipeline's configuration has one, else by the loops before."""

    def __init__(self) -> None:
        # Who ran from a timestep on, in the order of a loop. Only where somebody else begins: timesteps may be others in every request.
        self._known: dict[float, frozenset[str]] = {}

    def learn(self, ran: Sequence[tuple[float, str]]) -> None:
        """Keep who ran at which timestep of a whole loop. A loop that contradicts what is known counts alone."""
        found: dict[float, set[str]] = {}
        for time, name in ran:
            found.setdefault(time, set()).add(name)
        if not found:
            return
        if any(not self._at(t) & names for t, names in found.items()):
            self._known.clear()
        self._known |= {t: frozenset(names) for t, names in found.items()}
        times = list(found)
        known = sorted(self._known.items(), reverse=times[0] >= times[-1])
        self._known = dict(own for before, own in zip([None, *known], known) if before is None or before[1] != own[1])

    def share(self, name: str, times: Sequence[float], edge: float | None) -> int:
        """How many of the steps that are left belong to the denoiser that runs at the first of them.

        Args:
            times: timesteps of the steps that are left.
            edge: below it another denoiser runs.
        """
        if edge is not None:
            own = [(t >= edge) == (times[0] >= edge) for t in times]
        elif name in self._at(times[0]):
            own = [name in self._at(t) for t in times]
        else:
            return len(times)
        return own.index(False) if False in own else len(own)

    def _at(self, time: float) -> frozenset[str]:
        """Who runs at a timestep; between two known ones, who ran at the earlier step."""
        if not self._known:
            return frozenset()
        known = list(self._known)
        falls = known[0] >= known[-1]
        before = [t for t in known if (t >= time if falls else t <= time)]
        return self._known[before[-1] if before else known[0]]
