"""The calibrations that a session may follow: its own, and those that others keep on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from vdcache.calibration.calibration import Calibration, CalibrationKey, find, keep, of_other_sizes
from vdcache.policies.goal import Goal
from vdcache.runtime.agreement import SessionRanks

__all__ = ["KnownCalibrations"]

NEAR = 1.4  # logarithm of the ratio of latents' elements, up to which one size begins with the schedule of the other


class KnownCalibrations:
    """What is known for one goal. Ranks that run the model together know what the first of them does.

    Args:
        goal: that they are for.
        ranks: of the session.
    """

    def __init__(self, goal: Goal, ranks: SessionRanks) -> None:
        self._goal, self._ranks = goal, ranks
        self._own: dict[
            CalibrationKey, Calibration
        ] = {}  # what this session follows, should the disk take none; the newest last
        self.frozen = False  # only what is known now is followed, whatever others keep
        self.last: Calibration | None = None  # that was found or taken

    def freeze(self, like: KnownCalibrations | None) -> None:
        """Learn nothing more but what `like` knows."""
        self.frozen = True
        self._own |= like._own if like is not None else {}

    def own(self, key: CalibrationKey) -> Calibration | None:
        """What this session follows for the very key."""
        return self._own.get(key)

    def follow(self, found: Calibration) -> None:
        """The newest for its key."""
        self._own.pop(found.key, None)
        self._own[found.key] = found

    def of(self, key: CalibrationKey) -> Calibration | None:
        """What was found before, by this session or any other, for a generation whose timesteps begin as the key's. What was found for a
        prompt of another length serves it too: the latent, which is what a schedule is about, has the same form."""
        known = [*reversed(self._own.values())]
        own = next((c for c in known if c.key.is_like(key)), None)
        if (own is None or own.tentative) and not self.frozen:
            kept = self.on_disk(key)
            own = kept if own is None or (kept is not None and not kept.tentative) else own
        if own is not None:
            return own
        others = [c for c in known if c.key.apart(key) == 0]
        if not others and not self.frozen:
            others = [c for c in self._of_other_sizes(key) if c.key.apart(key) == 0]
        return min(others, key=lambda c: c.tentative, default=None)

    def begun_for(self, key: CalibrationKey) -> Calibration | None:
        """A tentative calibration for `key` with the schedule of a near size, which is followed until the search for this one has found its
        own; None where there is none, or where only running tells whether it is good enough."""
        if self.frozen or self._goal.quality_db is not None:
            return None
        known = [c for c in [*reversed(self._own.values()), *self._of_other_sizes(key)] if 0 < c.key.apart(key) <= NEAR]
        near = min((c for c in known if not c.tentative), key=lambda c: c.key.apart(key), default=None)
        if near is None:
            return None
        return replace(
            near,
            key=replace(key, times=near.key.times),
            schedule=replace(near.schedule, psnr=None),
            tried=(),
            seconds=0.0,
            note=f"begun with the schedule of {near.key.sizes}; the search goes on within later generations",
            tentative=True,
            searches=0,
            path=None,
        )

    def on_disk(self, key: CalibrationKey) -> Calibration | None:
        """As `find`."""
        found = find(key, self._goal) if self._ranks.is_first else None
        return next(iter(self._of_first("calibration", [found] if found is not None else [])), None)

    def save(self, found: Calibration) -> tuple[Calibration, str]:
        """Keep a calibration for other processes. Returns it with its path, and in words where it is."""
        try:
            if self._ranks.is_first:
                found = replace(found, path=keep(found))
        except OSError as error:
            return found, f"not kept for other processes: {error}"
        return found, f"kept in {found.path}" if found.path is not None else "kept by the first rank"

    def forget_tentative(self, key: CalibrationKey) -> None:
        """Let go of what was followed meanwhile, here and on disk.

        Args:
            key: without timesteps.
        """
        for left in [c for c in self._own.values() if c.tentative and replace(c.key, times=()) == key]:
            self.forget(left)
            if left.path is not None:
                with contextlib.suppress(OSError):  # a folder that cannot be written
                    left.path.unlink(missing_ok=True)

    def forget(self, known: Calibration) -> None:
        """Follow it no longer."""
        del self._own[known.key]

    def _of_other_sizes(self, key: CalibrationKey) -> Sequence[Calibration]:
        """As `of_other_sizes`."""
        return self._of_first("calibrations", of_other_sizes(key, self._goal) if self._ranks.is_first else [])

    def _of_first(self, topic: str, found: Sequence[Calibration]) -> Sequence[Calibration]:
        """What the first rank has found."""
        if not self._ranks:
            return found
        texts = self._ranks.first(topic, [c.to_json() for c in found])
        return found if self._ranks.is_first else [Calibration.from_json(text) for text in texts]
