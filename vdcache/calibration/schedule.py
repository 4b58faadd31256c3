"""A schedule: the computed steps of a generation, known before it runs; and which ones a table of steps speaks for."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import NamedTuple

import numpy as np

from vdcache.calibration.paths import cost_of, paths_up_to
from vdcache.calibration.tables import StepTable
from vdcache.errors import ConfigError
from vdcache.methods.recipe import Recipe
from vdcache.passes import MarkBranches, MergeSlots, Pass
from vdcache.passes.predictors import LAST
from vdcache.policies.scheduled import PlanTable
from vdcache.policies.weights import Newton, Taylor
from vdcache.runtime.history import Record, any_computed, by_generation
from vdcache.util.checks import number, whole, whole_numbers
from vdcache.util.json import read_json, write_json

__all__ = ["PREDICTIONS", "SCOPES", "Prediction", "Schedule", "all_blocks", "candidates", "candidates_up_to", "first_of_each"]

EARLY = (1.0, 2.0, 5.0)  # how many times more an error of the first step counts than one of the last
KEEP = 4  # lists of each objective, weighting and prediction: 24 of each prediction
POWERS = (0.0, 0.75, 1.0)  # of the timestep, of the rules of order 1; on trained models the best one lay between the last two
SCOPES = ("blocks", "branches")


class Prediction(NamedTuple):
    """How skipped steps are predicted.

    Args:
        order: of the polynomial; 0 is the last value.
        power: of the timestep, in which it is one; 0 for the step's number.
        scope: of "blocks", what all blocks add together; of "branches", what each branch gives before its gate, which a skipped step
            applies as it is in that step.
    """

    order: int = 1
    power: float = 0.0
    scope: str = "blocks"

    @property
    def rule(self) -> Newton:
        """The weights of computed steps."""
        return Newton(self.order, self.power)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """What marks the slots."""
        return all_blocks() if self.scope == "blocks" else (MarkBranches(gate="pre"),)


PREDICTIONS = (Prediction(0), *(Prediction(1, power) for power in POWERS))


@dataclass(frozen=True)
class Schedule:
    """The computed steps of a generation, known before it runs: no metric, no sync, nothing but the step number.

    Args:
        steps: of a generation.
        computed: which are computed; the others are predicted.
        order: of the polynomial that predicts them; 0 for the last value.
        power: of the timestep, in which it is a polynomial; 0 for one in the step's number (`predictors.Newton`).
        scope: "blocks", what all blocks add is predicted together; "branches", what each branch gives before its gate, which costs a tensor
            or two for each of them.
        error: relative error of the predicted values, summed over the skipped steps.
        psnr: of the final latents against the uncached ones, in dB of their range, where it was measured; over the prompts of the search.
    """

    steps: int
    computed: tuple[int, ...]
    order: int = 1
    error: float = 0.0
    psnr: float | None = None
    power: float = 0.0
    scope: str = "blocks"

    def __post_init__(self) -> None:
        object.__setattr__(self, "computed", whole_numbers(self.computed, "the computed steps of a schedule"))
        whole(self.steps, "the number of steps of a schedule", 1)
        whole(self.order, "the order of a schedule's predictor")
        number(self.power, "the power of a schedule's predictor is a number")
        if self.scope not in SCOPES:
            raise ConfigError(f"the scope of a schedule is {' or '.join(SCOPES)}; got {self.scope!r}")
        number(self.error, "the error of a schedule is a number")
        number(0.0 if self.psnr is None else self.psnr, "the PSNR of a schedule is a number or None")
        if not self.computed or self.computed[0] != 0 or list(self.computed) != sorted(set(self.computed)):
            raise ConfigError(f"a schedule computes step 0, and its steps ascend; got {list(self.computed)}")
        if self.computed[-1] >= self.steps:
            raise ConfigError(f"a schedule of {self.steps} steps has no step {self.computed[-1]} (counted from 0)")

    def policy(self, times: Sequence[float] = ()) -> PlanTable:
        """The schedule as a policy; `times` are the timesteps that it holds for, as `PlanTable` takes them."""
        return PlanTable(tuple(() if s in self.computed else ("all",) for s in range(self.steps)), tuple(times))

    def recipe(self, name: str = "") -> Recipe:
        """The schedule as a recipe. Other numbers of steps are refused."""
        name = name or f"schedule-{len(self.computed)}-of-{self.steps}"
        rule = Taylor(self.order) if not self.power else self.prediction.rule
        return Recipe(name, self.policy(), self.prediction.passes, predictor=rule if self.order else LAST)

    @property
    def prediction(self) -> Prediction:
        """How skipped steps are predicted."""
        return Prediction(self.order, self.power, self.scope)

    @staticmethod
    def of(
        steps: int, computed: Sequence[int], prediction: Prediction, *, error: float = 0.0, psnr: float | None = None
    ) -> Schedule:
        """The schedule whose skipped steps are predicted so."""
        return Schedule(steps, tuple(computed), prediction.order, error, psnr, prediction.power, prediction.scope)

    @staticmethod
    def from_history(history: Iterable[Record], order: int = 0) -> Schedule:
        """What an adaptive recipe did, as a schedule: a step is computed if it was in at least half of the generations.

        Args:
            history: of a session, or of `vdcache.record`, over one generation or more.
            order: of the predictor that the schedule is to have; the caching recipes that adapt have 0.

        Raises:
            ConfigError: no generation, generations of unequal length, or a recipe that reuses parts of the model apart
                (`Recipe.following` fixes those).
        """
        records = [*history]
        if apart := {p for r in records for p in r.plan.reuse} - {"all"}:
            raise ConfigError(
                f"this history reuses {', '.join(sorted(apart))} apart, and a schedule has one plan for all blocks; recipe.following(history) keeps "
                "them apart"
            )
        generations = by_generation(records, "a schedule")
        computed = [{s for s, own in g.items() if any_computed(own)} for g in generations]
        steps = len(generations[0])
        wanted = (s for s in range(steps) if 2 * sum(s in g for g in computed) >= len(computed))
        return Schedule(steps, tuple(sorted({0, *wanted})), order)

    def diff(self, other: Schedule) -> str:
        """Both schedules, one under the other, and where they differ.

        Raises:
            ConfigError: they are for different numbers of steps.
        """
        if self.steps != other.steps:
            raise ConfigError(f"schedules of {self.steps} and {other.steps} steps cannot be compared step by step")
        marks = "".join("^" if (s in self.computed) != (s in other.computed) else " " for s in range(self.steps))
        return f"{self._row()}\n{other._row()}\n{marks.rstrip()}".rstrip()

    def _row(self) -> str:
        return "".join("█" if s in self.computed else "·" for s in range(self.steps))

    def __str__(self) -> str:
        text = f"{self._row()}  {len(self.computed)} of {self.steps} steps, order {self.order}"
        if self.power:
            text += f" in the timestep to the power {self.power:g}"
        if self.scope != "blocks":
            text += ", each branch before its gate"
        if self.psnr is not None:
            return f"{text}, result at {self.psnr:.1f} dB (measured)"
        if self.error and len(self.computed) < self.steps:
            text += f", blocks off by {self.error / (self.steps - len(self.computed)):.1%} in a reused step (predicted)"
        return text

    def to_json(self, path: str | File | None = None) -> str:
        """The schedule as JSON text, also written to `path`."""
        return write_json(self, path)

    @staticmethod
    def from_json(text: str | File) -> Schedule:
        """What `to_json` wrote: text, or the path of a file.

        Raises:
            ConfigError: something else.
        """
        return read_json(Schedule, text, "schedule")


def all_blocks() -> tuple[Pass, ...]:
    """The scope of most schedules: what all blocks add, as one difference of each stream."""
    return MarkBranches(), MergeSlots()


def candidates(table: StepTable, computed: int, predictions: Sequence[Prediction] = PREDICTIONS) -> list[Schedule]:
    """The lists that the table speaks for, best first: the best of every prediction, then of every objective and weighting in turn.

    Raises:
        ConfigError: more computed steps than there are, or another order.
    """
    return candidates_up_to(table, computed, predictions)[-1]


def candidates_up_to(table: StepTable, computed: int, predictions: Sequence[Prediction] = PREDICTIONS) -> list[list[Schedule]]:
    """As `candidates`, for 1, 2 … `computed` computed steps."""
    if not np.isfinite(table.products).all():
        raise ConfigError(
            "the table of steps holds what is not a number: the model gave NaN or infinity in the run that it was measured in"
        )
    if computed > table.steps:
        raise ConfigError(f"{computed} computed steps were asked for, and a generation has {table.steps}")
    # A search in pieces asks the same again and again.
    numbers = np.ascontiguousarray(table.products, dtype=np.float64).tobytes()
    return [list(own) for own in _ranked(numbers, table.times, table.steps, computed, tuple(predictions))]


@functools.lru_cache(maxsize=8)
def _ranked(
    products: bytes, times: tuple[float, ...], steps: int, computed: int, predictions: tuple[Prediction, ...]
) -> list[list[Schedule]]:
    table = StepTable(np.frombuffer(products).reshape(-1, steps, steps), times=times)
    ranked: list[list[list[tuple[float, Schedule]]]] = [[] for _ in range(computed)]
    for prediction, errors in _apart({p: np.nan_to_num(table.errors(p.rule)) for p in predictions}).items():
        for early in EARLY:
            weights = np.linspace(early, 1.0, steps)
            for objective in ("sum", "max"):
                found = paths_up_to(errors * (weights / weights.mean()), computed, objective=objective, keep=KEEP)
                for own, paths in zip(ranked, found, strict=True):
                    sums = [(cost_of(errors, p.steps), p.steps) for p in paths]
                    own.append([(cost, Schedule.of(steps, chosen, prediction, error=cost)) for cost, chosen in sums])
    return [_in_turn(rows, count) for count, rows in enumerate(ranked, start=1)]


def _apart(errors: dict[Prediction, np.ndarray]) -> dict[Prediction, np.ndarray]:
    """Those without the powers that predict as one before them: where timesteps are even, they are as the numbers of the steps."""
    found: dict[Prediction, np.ndarray] = {}
    for one, own in errors.items():
        alike = [other for before, other in found.items() if before.scope == one.scope]
        if not one.power or not any(np.allclose(own, other, rtol=1e-6, atol=1e-12) for other in alike):
            found[one] = own
    return found


def _in_turn(rows: list[list[tuple[float, Schedule]]], computed: int) -> list[Schedule]:
    # A prediction that is worse everywhere comes last; lists that are found in several ways come once.
    rows.sort(key=lambda row: row[0][0])
    heads = first_of_each(row[0][1] for row in rows)
    found = [*heads, *(row[i][1] for i in range(KEEP) for row in rows if i < len(row))]
    return list(dict.fromkeys(found[:1] if computed == 1 else found))  # of one step every rule knows the last value alone


def first_of_each(schedules: Iterable[Schedule]) -> list[Schedule]:
    """The first schedule of every prediction, in order."""
    found: dict[Prediction, Schedule] = {}
    for one in schedules:
        found.setdefault(one.prediction, one)
    return list(found.values())
