"""AdaCache (arXiv 2411.02397): the next computed step by how much the observed branches have changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from vdcache.errors import ConfigError
from vdcache.policies.metrics import MetricValue
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.util.checks import number
from vdcache.util.fields import Bound, Checked, at_least, one_of, some

__all__ = ["AdaCache", "AdaState", "Codebook", "MoReg", "scaled"]

Entries = Annotated[
    tuple[tuple[float, Annotated[int, at_least(1)]], ...],
    Bound(
        lambda entries: entries and all(a < b for (a, _), (b, _) in itertools.pairwise(entries)),
        noun="a list of (threshold, rate) entries, at least one, thresholds ascending, rates whole steps of at least 1",
    ),
]


@dataclass(frozen=True)
class Codebook(Checked):
    """From the size of the change to how many steps may pass until the next computed one (AdaCache equation 5).

    Args:
        entries: (threshold, rate) pairs of any number, thresholds ascending. The first entry with change < threshold decides;
            the last one takes everything (its threshold is never tested).

    Raises:
        ConfigError: no entry, thresholds that do not ascend, a rate below 1.
    """

    entries: Entries

    @staticmethod
    def of(entries: Mapping[float, int] | Sequence[tuple[float, int]] | Codebook) -> Codebook:
        if isinstance(entries, Codebook):
            return entries
        pairs = entries.items() if isinstance(entries, Mapping) else entries
        try:
            found = [(t, r) for t, r in pairs]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"a codebook is made of (threshold, rate) entries; got {entries!r}") from error
        return Codebook(tuple((number(t, "a threshold is a number"), r) for t, r in found))

    def rate(self, change: float) -> int:
        """Steps until the next computed one; 1 for a change that is not a finite number."""
        if not math.isfinite(change):
            return 1
        return next((r for t, r in self.entries[:-1] if change < t), self.entries[-1][1])

    def __str__(self) -> str:
        return "{" + ", ".join(f"{t:g}: {r}" for t, r in self.entries) + "}"


def scaled(codebook: Codebook, factor: float) -> Codebook:
    """The codebook for another number of steps: rates in proportion, at least 1; thresholds kept."""
    return Codebook(tuple((t, max(1, round(r * factor))) for t, r in codebook.entries))


MOREG_WINDOWS: Mapping[int, tuple[int, int]] = {30: (4, 26), 100: (10, 90)}  # the configs of the reference code


@dataclass(frozen=True)
class MoReg(Checked):
    """Motion regularisation (arXiv 2411.02397, section 4.3): videos that move are recomputed more often.

    Args:
        strides: distances in latent frames that the motion score looks at.
        window: first and last step (counted from 1, inclusive) in which it applies, in a generation of `of_steps`; scaled to
            other numbers of steps. None: that of the reference code, (4, 26) of 30 steps or (10, 90) of 100, whichever is
            nearer; under the rule "paper" every step, since equation 9 has no window.
        scale, power, divisor: m ← (m / scale)^power / divisor (the reference code's `moreg_hyp`).
        gradient: factor of the motion gradient (`mograd_mul`).
    """

    strides: Annotated[tuple[Annotated[int, at_least(1)], ...], some] = (1,)
    window: tuple[int, int] | None = None
    of_steps: int = 30
    scale: float = 0.385
    power: float = 8.0
    divisor: float = 1.0
    gradient: float = 10.0

    def applies(self, step: int, num_steps: int) -> bool:
        """Whether step `step` (counted from 0) lies in the window."""
        window, of_steps = self.window, self.of_steps
        if window is None:
            of_steps = min(MOREG_WINDOWS, key=lambda n: abs(n - num_steps))
            window = MOREG_WINDOWS[of_steps]
        factor = num_steps / of_steps
        return round(window[0] * factor) <= step + 1 <= round(window[1] * factor)


@dataclass(frozen=True)
class AdaState:
    """What AdaCache remembers: the last computed step, the rate in force, the last motion score."""

    num_steps: int
    last: int | None = None
    rate: int = 1
    motion: float = 1.0
    seen_motion: bool = False
    trace: tuple[tuple[int, float, int], ...] = ()  # (step, change as looked up, rate chosen)


@dataclass(frozen=True)
class AdaCache(Checked):
    """Recompute when the codebook says that the observed branch has changed enough (arXiv 2411.02397).

    Args:
        codebook: change -> steps until the next computed one.
        moreg: motion regularisation, or None.
        first, last: how many steps at the beginning and at the end are always computed (reference code: 1 and 2; the rate
            starts at 1, so the second step is computed as well).
        rule: how change and rate are formed, R the residual now, P at the computed step before, k steps apart:

            - "paper", equations 4 to 9 as printed: c = mean|P − R| / k with k the elapsed steps; m = mean|R[i:] − R[:−i]|;
              mg = (m − m_before) / k; c ← c · (m + mg), signed, at every step; recompute once rate steps have passed.
            - "code", the reference implementation: c = (‖P − R‖₁ / ‖P‖₁) / k with k the rate in force (not what really
              elapsed); m = ((motion / .385)^8); c ← c · (m + |10 · (m − m_before) / k|); recompute exactly at
              last + rate; m_before is kept from one generation to the next.
            - "vdcache": as "code", with the elapsed steps for k, recomputing from last + rate on, and a clean state in
              every generation.
        group: the group of slots that is reused.

    Raises:
        ConfigError: an unknown rule, or fewer than one first step.
    """

    codebook: Codebook
    moreg: MoReg | None = None
    first: Annotated[int, at_least(1)] = 1
    last: Annotated[int, at_least(0)] = 2
    rule: Annotated[str, one_of("vdcache", "paper", "code")] = "vdcache"
    group: str = "all"

    def plans(self) -> tuple[Plan, ...]:
        return (RECOMPUTE, Plan.of([self.group]))

    def start(self, num_steps: int, before: AdaState | None = None) -> AdaState:
        if self.rule == "code" and before is not None:
            return AdaState(num_steps, motion=before.motion, seen_motion=before.seen_motion)
        return AdaState(num_steps)

    def plan(self, state: AdaState, step: int, times: Sequence[float] = ()) -> Plan:
        if state.last is None or step < self.first or step >= state.num_steps - self.last:
            return RECOMPUTE
        passed = step - state.last
        due = passed == state.rate if self.rule == "code" else passed >= state.rate
        return RECOMPUTE if due else Plan.of([self.group])

    def observe(self, state: AdaState, step: int, plan: Plan, measures: Sequence[MetricValue] | None) -> AdaState:
        if plan:
            return state
        if measures is None or state.last is None:  # nothing before it to compare with
            return replace(state, last=step)
        elapsed = step - state.last
        k = state.rate if self.rule == "code" else elapsed
        if self.rule == "paper":
            change = _mean([m.change_absolute for m in measures]) / k
        else:
            change = _mean([m.change for m in measures]) / k
        state = replace(state, last=step)
        if self.moreg is not None and self._regularised(self.moreg, step, state.num_steps):
            state, factor = self._motion(self.moreg, state, measures, k)
            change *= factor
        rate = self.codebook.rate(change)
        return replace(state, rate=rate, trace=(*state.trace, (step, change, rate)))

    def _regularised(self, moreg: MoReg, step: int, num_steps: int) -> bool:
        return (self.rule == "paper" and moreg.window is None) or moreg.applies(step, num_steps)

    def _motion(self, moreg: MoReg, state: AdaState, measures: Sequence[MetricValue], k: int) -> tuple[AdaState, float]:
        """The factor of the change (equations 7 to 9)."""
        if self.rule == "paper":
            scores = [m.motion_absolute for m in measures if m.motion_absolute is not None]
            if not scores:
                return state, 1.0
            m = _mean(scores)
            if not math.isfinite(m):
                return state, math.nan
            gradient = (m - state.motion) / k if state.seen_motion else 0.0
            return replace(state, motion=m, seen_motion=True), m + gradient
        scores = [x.motion for x in measures if x.motion is not None]
        if not scores:
            return state, 1.0
        m = (_mean(scores) / moreg.scale) ** moreg.power / moreg.divisor
        if not math.isfinite(m):  # not remembered, or every later step would be no number either
            return state, math.nan
        gradient = moreg.gradient * (m - state.motion) / k
        return replace(state, motion=m, seen_motion=True), m + abs(gradient)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
