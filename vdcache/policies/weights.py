"""Predictors that are weighted sums: how much of each cached value a reused step is given, by the positions of the computed steps.

Nearly every published predictor substitutes Σ w_j v_j for a value, over the newest computed values v_0, v_1, …; only the rule for
the weights differs. A rule is a frozen value with one pure function of positions, so it is tested exactly, the compiled graphs
hold one sum for all rules (`passes.predictors.Ring`), and another rule for as many values compiles nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Protocol, runtime_checkable

import numpy as np

from vdcache.util.fields import Bound, Checked, above, at_least, between, some

__all__ = [
    "RULES",
    "STEP_INFO",
    "AdamsBashforth",
    "ByStep",
    "Chebyshev",
    "Extrapolated",
    "Fixed",
    "FoCa",
    "Hermite",
    "MeanVelocity",
    "Newton",
    "Numbers",
    "Position",
    "RingWeights",
    "Scaled",
    "StepNumbers",
    "Table",
    "Taylor",
    "WeightRule",
    "ring_weights",
]

MOST = 16  # values that a slot may keep
_FEW = Bound(lambda values: 1 <= len(values) <= MOST and all(map(math.isfinite, values)), ", 1 to 16 finite ones")
_ROWS = Bound(lambda rows: bool(rows) and max(map(len, rows)) <= MOST, ", at least one, of at most 16 weights each")
_PAIRS = Bound(
    lambda rules: bool(rules) and all(a[0] < b[0] for a, b in itertools.pairwise(rules)),
    noun="(first step, rule) pairs in ascending order, at least one",
)


class Position(NamedTuple):
    """Where a step stands.

    Args:
        step: its number, counted from 0.
        timestep: in the model's units; None under explicit control without one.
    """

    step: int
    timestep: float | None = None


@runtime_checkable
class WeightRule(Protocol):
    """How much of each cached value a reused step is given."""

    @property
    def tensors(self) -> int:
        """How many values a slot keeps, 1 to 16."""

    def weights(self, now: Position, computed: Sequence[Position]) -> Sequence[float]:
        """The weights of the newest values, newest first: at most `tensors`, and at most one for each computed step.

        Args:
            now: the reused step.
            computed: all computed steps of the generation so far, newest first; at least one.
        """


def ring_weights(rule: WeightRule, now: Position, computed: Sequence[Position]) -> list[float]:
    """The weights of what a slot holds: its newest value v_0, and the differences v_(j-1) − v_j for j = 1 … `tensors` − 1.

    They span the same sums, Σ w_j v_j = (Σ w_j) v_0 − Σ_j (w_j + w_(j+1) + …)(v_(j-1) − v_j), and a rounded difference is no rounded
    value. Zeros stand where fewer steps were computed.
    """
    given = list(rule.weights(now, computed)) if computed else [1.0]
    tails = [math.fsum(given[j:]) for j in range(len(given))]
    return [tails[0], *(-t for t in tails[1:]), *[0.0] * (rule.tensors - len(given))]


class Numbers(Protocol):
    """What the graph of a predictor is told of a step, as float32, 0-d inputs."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def values(self, now: Position, computed: Sequence[Position], rule: WeightRule | None = None) -> Sequence[float]:
        """One number for each name, of a step after some computed ones (newest first; there may be none).

        Args:
            rule: in the place of the recipe's, where that is one of at least as many values.
        """


@dataclass(frozen=True)
class RingWeights:
    """The weights of a ring by a rule."""

    rule: WeightRule

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"weight_{i}" for i in range(self.rule.tensors))

    def values(self, now: Position, computed: Sequence[Position], rule: WeightRule | None = None) -> list[float]:
        kept = self.rule.tensors
        found = ring_weights(rule if rule is not None and rule.tensors <= kept else self.rule, now, computed)
        return [*found, *[0.0] * (kept - len(found))]


class StepNumbers:
    """The steps since the last computed one (1 where there is none), how many were computed, and the number of the step."""

    names = ("elapsed", "computed", "step")

    def values(self, now: Position, computed: Sequence[Position], rule: WeightRule | None = None) -> tuple[float, float, float]:
        elapsed = now.step - computed[0].step if computed else 1
        return float(elapsed), float(len(computed)), float(now.step)


STEP_INFO = StepNumbers()


def _text(value: float) -> str:
    """A number as texts hold it: short, and read back as it was."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _differences(steps: Sequence[float], most: int) -> list[list[float]]:
    """TaylorSeer's Δ⁰, Δ¹ … at the newest of some values, as weights of the values, newest first: Δⁱ is the difference of the newest two
    Δⁱ⁻¹ over the steps between them. As many as enough values allow, at most `most` + 1.
    """
    rows = [[[float(i == j) for j in range(len(steps))] for i in range(len(steps))]]  # Δ⁰ at each value
    for _ in range(min(most, len(steps) - 1)):
        before = rows[-1]
        rows.append(
            [
                [(a - b) / (steps[i] - steps[i + 1]) for a, b in zip(before[i], before[i + 1], strict=True)]
                for i in range(len(before) - 1)
            ]
        )
    return [row[0] for row in rows]


def _sum(factors: Sequence[float], rows: Sequence[Sequence[float]]) -> list[float]:
    """Σ factor · row."""
    return [math.fsum(f * w for f, w in zip(factors, column, strict=True)) for column in zip(*rows, strict=True)]


def _expanded(now: Position, computed: Sequence[Position], order: int, factor: Callable[[int, float], float]) -> list[float]:
    """Σ_i factor(i, x) Δⁱ, x steps after the newest value."""
    newest = [float(p.step) for p in computed[: order + 1]]
    rows = _differences(newest, order)
    return _sum([factor(i, now.step - newest[0]) for i in range(len(rows))], rows)


@dataclass(frozen=True)
class Taylor(Checked):
    """Taylor expansion over the computed steps (TaylorSeer, arXiv 2503.06923, equations 3 and 4).

    With Δ⁰F = F and ΔⁱF = (Δⁱ⁻¹F now − Δⁱ⁻¹F before) / k, k steps apart, a step x steps later is given Σ ΔⁱF · xⁱ / i!, over
    the orders for which enough steps were computed.

    Args:
        order: highest order; 0 is the last value. A slot keeps `order` + 1 tensors.

    Raises:
        ConfigError: an order below 0 or above 4.
    """

    order: Annotated[int, between(0, 4)] = 1

    @property
    def tensors(self) -> int:
        return self.order + 1

    def weights(self, now: Position, computed: Sequence[Position]) -> list[float]:
        return _expanded(now, computed, self.order, lambda i, x: x**i / math.factorial(i))

    def __str__(self) -> str:
        return f"taylor({self.order})"


@dataclass(frozen=True)
class Hermite(Checked):
    """Taylor's differences under scaled Hermite polynomials (HiCache, arXiv 2508.16984): Σ ΔⁱF · σⁱ H_i(σx) / i!, H the physicists'.

    At order 1 it moves 2σ² of the slope: half of it at σ = 0.5, and Taylor's at σ = 1/√2.

    Args:
        order: highest order. A slot keeps `order` + 1 tensors.
        sigma: the scale σ.

    Raises:
        ConfigError: an order below 0 or above 4, or no scale.
    """

    order: Annotated[int, between(0, 4)] = 1
    sigma: Annotated[float, above(0)] = 0.5

    @property
    def tensors(self) -> int:
        return self.order + 1

    def weights(self, now: Position, computed: Sequence[Position]) -> list[float]:
        def factor(i: int, x: float) -> float:
            return self.sigma**i * float(np.polynomial.hermite.hermval(self.sigma * x, [0] * i + [1])) / math.factorial(i)

        return _expanded(now, computed, self.order, factor)

    def __str__(self) -> str:
        return f"hermite({self.order}, {_text(self.sigma)})"


@dataclass(frozen=True)
class Newton(Checked):
    """The polynomial through the newest values (SeaCache's and AB-Cache's extrapolation, of order 1 and any).

    Args:
        order: of the polynomial; 0 is the last value. A slot keeps `order` + 1 tensors.
        power: of what it is a polynomial: of the step's number with 0, else of the timestep to this power, where timesteps are known. What
            the blocks add is seldom even in the steps: near the noise it moves slower or faster than near the end.

    Raises:
        ConfigError: an order below 0 or above 6, or a power outside of 0 to 4.
    """

    order: Annotated[int, between(0, 6)] = 1
    power: Annotated[float, between(0, 4)] = 0.0

    @property
    def tensors(self) -> int:
        return self.order + 1

    def weights(self, now: Position, computed: Sequence[Position]) -> list[float]:
        kept = computed[: self.tensors]
        at, here = [float(p.step) for p in kept], float(now.step)
        if self.power and all(p.timestep is not None for p in (now, *kept)):
            warped = [math.copysign(abs(p.timestep) ** self.power, p.timestep) for p in (now, *kept)]  # type: ignore[arg-type]
            if len(set(warped)) == len(warped):  # two steps at one timestep, as in solvers of second order
                here, *at = warped
        return [math.prod((here - b) / (a - b) for b in at if b != a) for a in at]

    def __str__(self) -> str:
        return f"newton({self.order}{f', {_text(self.power)}' if self.power else ''})"


_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class AdamsBashforth(Checked):
    """The slope that an Adams-Bashforth step would take, from values at equal distances: 3/2 v_0 − 1/2 v_1 at order 2.

    Args:
        order: of the method, which is the number of values; fewer where fewer were computed.

    Raises:
        ConfigError: an order below 1 or above 4.
    """

    order: Annotated[int, between(1, 4)] = 2

    @property
    def tensors(self) -> int:
        return self.order

    def weights(self, now: Position, computed: Sequence[Position]) -> tuple[float, ...]:
        return _ADAMS_BASHFORTH[min(self.order, len(computed)) - 1]

    def __str__(self) -> str:
        return f"adams_bashforth({self.order})"


@dataclass(frozen=True)
class Fixed(Checked):
    """The same weights at every reused step; the last value until enough steps were computed. ZEUS (arXiv 2604.01552) is (2, −1): a
    run of reused steps is given one extrapolation, which is not extrapolated itself.

    Args:
        values: the weights, newest first.

    Raises:
        ConfigError: no weights, more than 16, or others than numbers.
    """

    values: Annotated[tuple[float, ...], _FEW] = (2.0, -1.0)

    @property
    def tensors(self) -> int:
        return len(self.values)

    def weights(self, now: Position, computed: Sequence[Position]) -> tuple[float, ...]:
        return self.values if len(computed) >= len(self.values) else (1.0,)

    def __str__(self) -> str:
        return f"fixed({self.values})"


@dataclass(frozen=True)
class Scaled(Checked):
    """The last value times a factor of the elapsed steps: factor ** elapsed (MagCache's ratio of magnitudes, arXiv 2506.09045,
    held constant).

    Args:
        factor: above 0.

    Raises:
        ConfigError: another factor.
    """

    factor: Annotated[float, above(0)] = 1.0

    tensors = 1

    def weights(self, now: Position, computed: Sequence[Position]) -> tuple[float]:
        return (self.factor ** (now.step - computed[0].step),)

    def __str__(self) -> str:
        return f"scaled({_text(self.factor)})"


@dataclass(frozen=True)
class Extrapolated(Checked):
    """The last computed value and a share of its difference to the one before: a₁ + (a₁ − a₂) · w (FasterCache, arXiv
    2410.19355, equation 4).

    Args:
        weight: w where `ramp` is 0; else w = weight · (step − start) / ramp, which may grow over the run.
        start, ramp: steps, counted from 0.

    Raises:
        ConfigError: numbers that are none, or a negative ramp.
    """

    weight: float = 0.5
    start: int = 0
    ramp: Annotated[int, at_least(0)] = 0

    tensors = 2

    def weights(self, now: Position, computed: Sequence[Position]) -> tuple[float, ...]:
        share = self.weight * (now.step - self.start) / self.ramp if self.ramp else self.weight
        return (1 + share, -share) if len(computed) > 1 else (1.0,)

    def __str__(self) -> str:
        return f"extrapolated({_text(self.weight)}{f', {self.start}, {self.ramp}' if self.ramp else ''})"


@dataclass(frozen=True)
class FoCa(Checked):
    """FoCa (arXiv 2508.16211) as cache-dit has it: F̂(e) = F_0 + e/2 · [(F_0 − F_1) + (F̂(e−1) − F̂(e−2))], e steps after the newest
    value; from e = 4 on it falls back, 3/e · F̂(3) + (1 − 3/e) F_0.

    The second difference is of the predictions before; at e = 1 it is F_0 − F_1. cache-dit takes the last prediction before F_0 in
    place of F_1 there.
    """

    tensors = 2

    def weights(self, now: Position, computed: Sequence[Position]) -> tuple[float, ...]:
        if len(computed) < 2:
            return (1.0,)
        elapsed = now.step - computed[0].step
        moved = [0.0]  # F̂(e) − F_0, in units of F_0 − F_1
        last = 1.0
        for e in range(1, min(elapsed, 3) + 1):
            moved.append(e / 2 * (1 + last))
            last = moved[-1] - moved[-2]
        share = moved[-1] * (3 / elapsed if elapsed > 3 else 1.0)
        return (1 + share, -share)

    def __str__(self) -> str:
        return "foca()"


@dataclass(frozen=True)
class Chebyshev(Checked):
    """Ridge regression on Chebyshev polynomials of the step's number (Spectrum, arXiv 2603.01623): x(τ)ᵀ (XᵀX + λI)⁻¹ Xᵀ, which
    are weights of the values, τ = 2 step / `period` − 1, blended with a forward difference on the newest values.

    A ridge above 0 shrinks constants too: five values of 1 at steps 0 to 4 predict 0.939 at 5, with the published λ.

    Args:
        degree: highest polynomial.
        ridge: λ.
        tensors: how many values a slot keeps; the reference keeps all of a run.
        period: of τ; the reference takes 50, whatever the number of steps.
        share: of the regression; the rest is the forward difference of `order`.
        order: of that difference, 1 or 2.

    Raises:
        ConfigError: numbers outside of their ranges.
    """

    degree: Annotated[int, between(1, 12)] = 4
    ridge: Annotated[float, at_least(0)] = 0.1
    tensors: Annotated[int, between(2, MOST)] = MOST
    period: Annotated[int, at_least(1)] = 50
    share: Annotated[float, between(0, 1)] = 1.0
    order: Annotated[int, between(1, 2)] = 1

    def weights(self, now: Position, computed: Sequence[Position]) -> list[float]:
        steps = np.array([p.step for p in computed[: self.tensors]], dtype=float)
        rows = np.polynomial.chebyshev.chebvander(2 * steps / self.period - 1, self.degree)
        here = np.polynomial.chebyshev.chebvander(2 * now.step / self.period - 1, self.degree)[0]
        # As least squares with √λ I below X, which loses half as many digits as XᵀX does.
        ridged = np.concatenate([rows, math.sqrt(self.ridge) * np.eye(self.degree + 1)])
        smooth = here @ np.linalg.pinv(ridged, rcond=1e-12)[:, : len(steps)]
        return [float(w) for w in self.share * smooth + (1 - self.share) * self._forward(now.step, steps)]

    def _forward(self, step: int, steps: np.ndarray) -> np.ndarray:
        """h + kΔ + k (k − 1) Δ² / 2, with plain differences and k in units of the last gap."""
        weights = np.zeros(len(steps))
        weights[0] = 1.0
        if len(steps) > 1:
            k = (step - steps[0]) / (steps[0] - steps[1])
            weights[:2] += k * np.array([1.0, -1.0])
            if self.order == 2 and len(steps) > 2:
                weights[:3] += k * (k - 1) / 2 * np.array([1.0, -2.0, 1.0])
        return weights

    def __str__(self) -> str:
        return (
            f"chebyshev({self.degree}, {_text(self.ridge)}, {self.tensors}, {self.period}, {_text(self.share)}, {self.order})"
        )


@dataclass(frozen=True)
class MeanVelocity(Checked):
    """The last velocity moved along the trend of the mean one (MeanCache, arXiv 2601.19961): v̂ = v_last − j Δσ, with
    j = (v_first − ū) / (σ_last − σ_first) over the last K steps and ū the mean velocity over them. Predicted steps count as computed
    ones, and v_last is the newest of either.

    Under Euler ū = Σ v_k Δσ_k / Σ Δσ_k, so it needs no latents, and all of it is a sum of computed values. It is stated for what the
    sampler integrates (the scope `mark-output{base=zero}`); with weighted guidance it may be done for each lane. Δσ are differences of the
    timesteps, whose unit falls out, evenly between computed steps; where timesteps are not known, of the steps' numbers. The next step, which
    the paper's code reads from the sampler, is taken to be as far as the last one. A slot keeps K + 1 values, where the reference keeps all: a
    predicted step in the window that itself came of older ones is predicted anew from those.

    Args:
        spans: the paper's K, 1 to 8, of each step of the run; the last one holds for all steps after it. 1 is plain reuse.

    Raises:
        ConfigError: no spans, or others.
    """

    spans: Annotated[tuple[Annotated[int, between(1, 8)], ...], some] = (2,)

    @property
    def tensors(self) -> int:
        return max(self.spans) + 1

    def weights(self, now: Position, computed: Sequence[Position]) -> list[float]:
        kept = list(computed[: self.tensors])
        first = kept[-1].step
        at = _times([*reversed(kept), now])
        rows: list[list[float]] = []  # of each step from `first` on, as weights of the kept values
        computed_at = {p.step: i for i, p in enumerate(kept)}
        for step in range(first, now.step):
            if step in computed_at:
                rows.append([float(i == computed_at[step]) for i in range(len(kept))])
            else:
                rows.append(self._moved(rows, step, [at(s) for s in range(first, step + 1)]))
        return self._moved(rows, now.step, [at(s) for s in range(first, now.step + 1)])

    def _moved(self, rows: list[list[float]], step: int, at: Sequence[float]) -> list[float]:
        """The step after some, `at` their positions and its own."""
        span = min(self.spans[min(step, len(self.spans) - 1)], len(rows))
        newest, start = rows[-1], len(rows) - span
        if span < 2:
            return list(newest)
        gaps = [at[i + 1] - at[i] for i in range(start, len(rows))]
        if not sum(gaps):  # it stands where it stood
            return list(newest)
        mean = _sum([g / sum(gaps) for g in gaps], rows[start:])
        slope = [(a - b) / sum(gaps) for a, b in zip(rows[start], mean, strict=True)]
        return [w - s * gaps[-1] for w, s in zip(newest, slope, strict=True)]

    def __str__(self) -> str:
        return f"mean_velocity({self.spans})"


def _times(known: Sequence[Position]) -> Callable[[int], float]:
    """Where each step stands: known timesteps, evenly in between and beyond; the number where none is known."""
    if any(p.timestep is None for p in known):
        return float
    steps, times = [p.step for p in known], [float(p.timestep or 0.0) for p in known]

    return lambda step: float(np.interp(step, steps, times))


@dataclass(frozen=True)
class Table(Checked):
    """Weights from a table, a row a step of the run: fitted ones (L2P, arXiv 2604.26365), or MagCache's ratios of magnitudes, one a row.

    Args:
        rows: of each step the weights of the newest computed values, newest first; an empty row is the last value. Beyond the
            last row it is the last value, too.

    Raises:
        ConfigError: no rows, or a row of more than 16 weights.
    """

    rows: Annotated[tuple[tuple[float, ...], ...], _ROWS]

    @property
    def tensors(self) -> int:
        return max(1, *map(len, self.rows))

    def weights(self, now: Position, computed: Sequence[Position]) -> tuple[float, ...]:
        row = self.rows[now.step] if 0 <= now.step < len(self.rows) else ()
        return row if 0 < len(row) <= len(computed) else (1.0,)

    def __str__(self) -> str:
        return f"table({self.rows})"


@dataclass(frozen=True)
class ByStep(Checked):
    """One rule until a step, and others after it.

    Args:
        rules: (first step, rule) pairs in ascending order; before the first one it is the last value.

    Raises:
        ConfigError: other pairs.
    """

    rules: Annotated[tuple[tuple[int, WeightRule], ...], _PAIRS]

    @property
    def tensors(self) -> int:
        return max(rule.tensors for _, rule in self.rules)

    def weights(self, now: Position, computed: Sequence[Position]) -> Sequence[float]:
        found = [rule for first, rule in self.rules if first <= now.step]
        return found[-1].weights(now, computed) if found else (1.0,)

    def __str__(self) -> str:
        pairs = ", ".join(f"({first}, {rule})" for first, rule in self.rules)
        return f"by_step(({pairs}{',' if len(self.rules) == 1 else ''}))"


@dataclass(frozen=True)
class Newest(Checked):
    """A rule that is told of the newest computed steps alone, so that a slot keeps fewer values.

    Every rule is of a lower order where fewer steps were computed, as at the start of a generation; this one stays there.

    Args:
        rule: the rule.
        values: how many of the newest steps it is told of; a slot keeps as many values at most.

    Raises:
        ConfigError: no rule, or no number from 1 to 16.
    """

    rule: WeightRule
    values: Annotated[int, between(1, 16)] = 1

    @property
    def tensors(self) -> int:
        return min(self.values, self.rule.tensors)

    def weights(self, now: Position, computed: Sequence[Position]) -> Sequence[float]:
        return self.rule.weights(now, computed[: self.values])

    def __str__(self) -> str:
        return f"newest({self.rule}, {self.values})"


RULES: dict[str, type[WeightRule]] = {  # as texts name them
    "taylor": Taylor,
    "hermite": Hermite,
    "newton": Newton,
    "adams_bashforth": AdamsBashforth,
    "fixed": Fixed,
    "scaled": Scaled,
    "extrapolated": Extrapolated,
    "foca": FoCa,
    "chebyshev": Chebyshev,
    "mean_velocity": MeanVelocity,
    "table": Table,
    "by_step": ByStep,
    "newest": Newest,
}
