"""Processes (ranks) that run one model together take the same decisions.

Every decision is a pure function of policies, timesteps and step numbers, which all ranks have alike, and of what a rank reads from values,
which may differ from rank to rank: metrics, whether a prompt or a weight changed, whether something is stored. What was read is exchanged
before it decides anything: sums are added up, so a metric is that of the whole tensor; of yes and no, one rank's no counts; and every call
is followed as planned only where all ranks would follow the same plan with the same collectives. Else all compute.

This page says what an exchange is; `vdcache.distributed.agreement` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from vdcache.errors import RankError, warn_once

__all__ = ["Agreement", "AgreementFinder", "Place", "RanksApart", "SessionRanks"]

_T = TypeVar("_T")
Place = tuple[int, int]  # generation and step


class RanksApart(Exception):
    """From here on the ranks agree on nothing. Raised on all of them at the same exchange, with the same words."""


class Agreement(Protocol):
    """A group of ranks that exchange small values.

    All ranks must make the same exchanges in the same order.
    """

    @property
    def ranks(self) -> tuple[int, ...]: ...  # of the job, ascending

    @property
    def is_first(self) -> bool: ...  # whether this process speaks for all

    def exchange(self, topic: str, place: Place, value: Any) -> list[Any]:
        """What every rank gave, in the order of `ranks`.

        Args:
            topic: what is exchanged.
            place: where this rank stands, for messages.
            value: what JSON can hold.

        Raises:
            RanksApart: a rank has stepped aside, or exchanges something else.
            RankError: a rank failed, or did not come in time; the message names it and its step.
        """

    def step_aside(self, why: str) -> None:
        """This rank runs without vdcache from now on: all others learn it at their next exchange."""

    def explain(self, error: Exception, place: Place) -> Exception | None:
        """This rank failed: tell the others. What to raise in the place of the error, where another rank is its cause."""


class AgreementFinder(Protocol):
    """Finds the ranks that run a graph together."""

    def of(self, groups: Sequence[object], warn: Callable[[str], None]) -> Agreement | None:
        """The agreement of all ranks of some process groups. None where a rank is alone, or where nobody knows who belongs together.

        Args:
            groups: process groups or their names.
            warn: is told why nobody knows.
        """

    def anew(self) -> AgreementFinder:
        """The same for another model."""


class SessionRanks:
    """What one session agrees on with those of other ranks. With one rank alone every question has its own answer.

    Args:
        name: of the recipe, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name, self._said = name, set[str]()
        self._agreement: Agreement | None = None
        self.has_others = False  # there is, or was, somebody to agree with
        self.apart = ""  # why the ranks agree on nothing any more
        self.is_replay = False  # of what ran before: it is given up where the ranks part, because nobody waits for its result
        self.place: Place = (-1, -1)  # where this rank stands

    def __bool__(self) -> bool:
        """Whether there is anybody to agree with."""
        return self._agreement is not None and not self.apart

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all, as one that is alone does."""
        return self._agreement is None or self._agreement.is_first

    def join(self, agreement: Agreement | None) -> None:
        """Agree with these ranks, unless others are known already."""
        self._agreement = self._agreement or agreement
        self.has_others = self._agreement is not None

    def explain(self, error: Exception) -> Exception | None:
        """What to raise in the place of an error that another rank has caused; None for any other."""
        return None if self._agreement is None else self._agreement.explain(error, self.place)

    # ---- what is exchanged ---------------------------------------------------------------------------------------

    def any(self, topic: str, answer: bool) -> bool:
        """Whether any rank says yes."""
        found = self._exchange(topic, answer)
        return answer if found is None else any(found)

    def first(self, topic: str, value: Any) -> Any:
        """What the first rank says. Values are what JSON can hold."""
        found = self._exchange(topic, value)
        return value if found is None else found[0]

    def mean(self, topic: str, value: float) -> float:
        """The mean over ranks."""
        found = self._exchange(topic, value)
        return value if found is None else sum(found) / len(found)

    def together(self, topic: str, make: Callable[[], _T]) -> _T:
        """What `make` gives, if every rank can make it.

        Raises:
            Exception: what it raised on this rank.
            RankError: it raised on another rank.
        """
        error: Exception | None = None
        try:
            made = make()
        except Exception as failed:  # noqa: BLE001 — whatever it is, the other ranks must hear of it
            error = failed
        if self.any(topic, error is not None):
            raise error or RankError(f"another rank failed where this one did not ({topic})")
        if error is not None:
            raise error
        return made

    def total(self, topic: str, numbers: Sequence[float]) -> list[float] | None:
        """The sums over ranks, added up in the same order on all of them; None where a rank has other numbers, or none."""
        found = self._exchange(topic, list(numbers))
        if found is None:
            return None if self.apart else list(numbers)
        if len({len(own) for own in found}) > 1:
            return None
        return [sum(own) for own in zip(*found, strict=True)]

    def same_plan(self, plan: Sequence[str], collectives: Sequence[str], why: str) -> str:
        """Why this call is not to follow its plan; "" where all ranks would follow the same one.

        Args:
            plan: what this rank would reuse.
            collectives: what it would exchange within the model.
            why: why it would not reuse more.
        """
        found = self._exchange("plan", [[*self.place], sorted(plan), list(collectives), why])
        if found is None:
            return self.apart
        ranks = self._agreement.ranks  # type: ignore[union-attr]
        if all(own[:3] == found[0][:3] for own in found):
            return ""
        if any(own[0] != found[0][0] for own in found):
            reason = f"the ranks are not at the same step ({'; '.join(f'rank {r}: {_at(own[0])}' for r, own in zip(ranks, found, strict=True))})"
        else:
            most = max(len(own[1]) for own in found)
            less = next(((r, own) for r, own in zip(ranks, found, strict=True) if len(own[1]) < most), None)
            reason = "the ranks would reuse other branches, or communicate in another order"
            if less is not None:
                reason = f"rank {less[0]}: {less[1][3] or 'its policy computes more of this step'}"
        self._warn(f"vote {reason.partition('(')[0]}", f"all ranks compute a call that was to be reused, because {reason}")
        return reason

    def _exchange(self, topic: str, value: Any) -> list[Any] | None:
        if not self:
            return None
        try:
            return self._agreement.exchange(topic, self.place, value)  # type: ignore[union-attr]
        except RanksApart as apart:
            self.apart = str(apart)
            if self.is_replay:
                raise
            self._warn("apart", f"from now on all ranks compute every step, because {apart}")
            return None

    def _warn(self, key: str, message: str) -> None:
        """One rank speaks for all."""
        if self._agreement is not None and self._agreement.is_first:
            warn_once(self._said, f"vdcache: '{self._name}' on several ranks: {message}", key=key)


def _at(place: Sequence[int]) -> str:
    return f"step {place[1]} of generation {place[0]}"
