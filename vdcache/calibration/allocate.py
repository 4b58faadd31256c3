"""One option for each layer, so that the time stays within a budget and the loss is least (Efficient-vDiT, arXiv 2502.06155).

Sums are compared exactly: floats are whole multiples of a power of two, and Python's integers have no largest one.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from vdcache.errors import ConfigError
from vdcache.util.checks import number, whole

__all__ = ["Allocation", "dynamic", "lagrangian"]

_INPUT_BITS = 49  # a time is known to 2⁻⁴⁹ of itself: it comes out of a few float operations, of 2⁻⁵³ each
_SUM_BITS = 52  # a budget that was summed in floats is off by up to 2⁻⁵² of itself for each layer


@dataclass(frozen=True)
class Allocation:
    """What was chosen, and how good it is.

    Args:
        choice: of each layer, which of its options.
        loss: of the choice: the sum over layers, or the largest one ("max").
        time: of the choice, summed over layers; within the budget up to float rounding.
        bound: no choice within the budget has a smaller loss, up to float rounding.
        exact: loss and bound are equal up to float rounding, so that the choice is proved to be optimal.
    """

    choice: tuple[int, ...]
    loss: float
    time: float
    bound: float
    exact: bool


def lagrangian(losses: Any, times: Any, budget: float, *, iterations: int = 200) -> Allocation:
    """Relax the budget with a multiplier λ ≥ 0, and search for the best λ (Efficient-vDiT, appendix A, equations 4 to 9).

    Each λ lets every layer choose for itself, the least L + λT, and g = ΣT − budget says where λ moves: up where the choice is
    too slow, down where it fits. The size of the step is not a schedule, which would depend on the units: λ goes to where the
    last slow and the last fitting choice cost the same. So it ends at the λ of the greatest bound, mostly after a dozen steps.
    Time that the fitting choice leaves is then given to the layers whose loss it lowers most.

    Args:
        losses: losses[j][a] ≥ 0 of option a of layer j, in any unit; inf forbids an option.
        times: times[j][a] ≥ 0, in any unit.
        budget: the largest sum of times, in that unit.
        iterations: the most values of λ that are tried.

    Returns:
        The best choice found, and the greatest value of the dual function as its bound. It may be short of the optimum.

    Raises:
        ConfigError: losses, times, budget or iterations are not as above, or no choice is within the budget.
    """
    whole(iterations, "iterations, how many multipliers are tried,", 1)
    problem = _problem(losses, times, budget)
    best, lines = _relaxed(problem, iterations)
    return problem.allocation(best, _dual(problem, lines, best))


def dynamic(losses: Any, times: Any, budget: float, *, objective: str = "sum", resolution: int = 4096) -> Allocation:
    """Minimise the loss by dynamic programming over time, on a grid.

    Times beyond each layer's least one are rounded up to the grid for the choice, so that it fits, and down for the bound, so
    that all that fits is in it. Options that cannot be part of a better choice than the one of `lagrangian`, by its λ, are left
    out first: what remains is mostly a few layers, which spend the whole grid on a small part of the budget. The result is exact
    where times are multiples of budget / resolution, and mostly elsewhere. "max" needs no grid for its loss: the smallest cap on
    losses under which the fastest options fit is found by bisection.

    Args:
        losses: losses[j][a] ≥ 0 of option a of layer j, in any unit; inf forbids an option.
        times: times[j][a] ≥ 0, in any unit.
        budget: the largest sum of times, in that unit.
        objective: "sum" for the least sum of losses (Efficient-vDiT, appendix A); "max" for the least largest loss (section 3.3),
            and the least sum under that.
        resolution: the steps of the grid.

    Raises:
        ConfigError: an argument is not as above, or no choice is within the budget.
    """
    whole(resolution, "resolution, the steps of the grid of times,", 1)
    if objective not in ("sum", "max"):
        raise ConfigError(f'objective is "sum", the least sum of losses, or "max", the least largest loss; got {objective!r}')
    problem = _problem(losses, times, budget)
    if objective == "max":
        problem = _capped(problem)
    best, lines = _relaxed(problem)
    bound = _dual(problem, lines, best)
    while bound < _loss(best):
        left = _promising(problem, lines, _loss(best))
        if sum(front[0].time for front in left.fronts) > problem.limit:
            bound = Fraction(_loss(best))  # nothing better fits
            break
        below = _on_grid(left, resolution, up=False)
        above = below if _time(below) <= problem.limit else _filled(problem, _on_grid(left, resolution, up=True))
        better = min(best, above, key=_loss)
        bound = max(bound, Fraction(min(_loss(below), _loss(better))))
        if better is best:
            break
        best = better
    found = problem.allocation(best, bound)
    if objective == "max":
        loss = max(row[option.which] for row, option in zip(problem.losses, best))
        return replace(found, loss=loss, bound=loss, exact=True)
    return found


class _Option(NamedTuple):
    """One option of a layer: which one, and its loss and time in whole units."""

    which: int
    loss: int
    time: int


Selection = list[_Option]  # one of each layer
Line = tuple[int, int, int]  # Σ min(q·L + p·T), p and q of a multiplier λ = p/q


def _loss(choice: Selection) -> int:
    return sum(option.loss for option in choice)


def _time(choice: Selection) -> int:
    return sum(option.time for option in choice)


@dataclass(frozen=True)
class _Problem:
    """Losses and times as given, and in whole units.

    Args:
        fronts: of each layer the options that no other one equals or beats in both, so that times rise and losses fall.
        budget: in whole units.
        limit: the budget and what float rounding may have taken from it.
        unit: how many units a loss of 1 has.
    """

    losses: list[list[float]]
    times: list[list[float]]
    fronts: list[list[_Option]]
    budget: int
    limit: int
    unit: int

    def allocation(self, choice: Selection, bound: Fraction) -> Allocation:
        loss = math.fsum(row[option.which] for row, option in zip(self.losses, choice))
        time = math.fsum(row[option.which] for row, option in zip(self.times, choice))
        # `_dual` may have counted as the budget the time of another choice, which differs from this one's by rounding.
        least = min(float(bound / self.unit), loss)
        exact = loss - least <= loss * len(choice) * 2.0**-_SUM_BITS
        return Allocation(tuple(option.which for option in choice), loss, time, least, exact)


def _problem(losses: Any, times: Any, budget: Any) -> _Problem:
    """Checked, and in whole units.

    Raises:
        ConfigError: what `dynamic` says of losses, times and budget.
    """
    rows, spans = _rows(losses, "losses"), _rows(times, "times")
    if len(rows) != len(spans):
        raise ConfigError(f"losses are of {len(rows)} layers and times of {len(spans)}: give both of every layer")
    if not rows:
        raise ConfigError("losses and times are empty: give those of at least one layer")
    for j, (row, span) in enumerate(zip(rows, spans)):
        if len(row) != len(span):
            raise ConfigError(f"layer {j} has {len(row)} losses and {len(span)} times: give one of each for every option")
        if not row:
            raise ConfigError(f"layer {j} has no options: give at least one, such as the layer as it is")
        for a, value in enumerate(span):
            if math.isinf(value):
                raise ConfigError(f"times[{j}][{a}] is inf: give its time, and a loss of inf to forbid the option")
        if all(map(math.isinf, row)):
            raise ConfigError(f"layer {j} has no option that is allowed: its losses are all inf; give at least one finite loss")
    most = number(budget.item() if hasattr(budget, "item") else budget, "budget is a positive number, in the unit of the times")
    if not 0 < most < math.inf:
        raise ConfigError(f"budget is a positive number, in the unit of the times; got {most}")
    loss_unit = _unit(value for row in rows for value in row if value < math.inf)
    time_unit = _unit([most, *(value for span in spans for value in span)])
    fronts = []
    for row, span in zip(rows, spans):
        front: list[_Option] = []
        for time, loss, a in sorted((span[a], row[a], a) for a in range(len(row)) if row[a] < math.inf):
            if not front or loss < row[front[-1].which]:
                front.append(_Option(a, _wholes(loss, loss_unit), _wholes(time, time_unit)))
        fronts.append(front)
    whole_budget = _wholes(most, time_unit)
    # 64 of 2⁻⁵²: the rounding of a time and of the budget themselves
    limit = whole_budget + (whole_budget * (len(rows) + 64) >> _SUM_BITS)
    fastest = [front[0] for front in fronts]
    if _time(fastest) > limit:
        least = math.fsum(span[option.which] for span, option in zip(spans, fastest))
        raise ConfigError(
            f"budget {most!r} is too small: the fastest options of the {len(rows)} layers take {least!r} together; "
            "give at least that, or faster options"
        )
    return _Problem(rows, spans, fronts, whole_budget, limit, loss_unit)


def _rows(values: Any, what: str) -> list[list[float]]:
    """Numbers of each option of each layer, at least 0; inf is one.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise ConfigError(f"{what} is a list of layers, each a list of numbers, one for each option; got {values!r}")
    rows = []
    for j, given in enumerate(values):
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
            raise ConfigError(f"{what}[{j}] is a list of numbers, one for each option of layer {j}; got {given!r}")
        row = []
        for a, item in enumerate(given):
            plain = item.item() if hasattr(item, "item") and getattr(item, "ndim", 0) == 0 else item
            value = number(plain, f"{what}[{j}][{a}] is a number of at least 0")
            if not value >= 0:
                raise ConfigError(f"{what}[{j}][{a}] is a number of at least 0; got {value}: measure that option again")
            row.append(value)
        rows.append(row)
    return rows


def _unit(values: Iterable[float]) -> int:
    """The smallest power of two of which all these are whole multiples of its inverse."""
    return max(value.as_integer_ratio()[1] for value in values)


def _wholes(value: float, unit: int) -> int:
    """How many 1/unit a number is."""
    top, bottom = value.as_integer_ratio()
    return top * (unit // bottom)


def _relaxed(problem: _Problem, iterations: int = 200) -> tuple[Selection, list[Line]]:
    """The best choice that the relaxation finds, and the multipliers that it tried."""
    slow, fits = [front[-1] for front in problem.fronts], [front[0] for front in problem.fronts]
    lines = [(_loss(slow), 0, 1)]
    if _time(slow) <= problem.limit:
        return slow, lines
    for _ in range(iterations):
        p, q = _loss(fits) - _loss(slow), _time(slow) - _time(fits)
        costs = [[q * option.loss + p * option.time for option in front] for front in problem.fronts]
        choice = [front[cost.index(min(cost))] for front, cost in zip(problem.fronts, costs)]
        lines.append((q * _loss(choice) + p * _time(choice), p, q))
        if lines[-1][0] == q * _loss(fits) + p * _time(fits):
            break  # the two are both the best of this λ, so no other λ bounds better
        if _time(choice) > problem.limit:
            slow = choice
        else:
            fits = choice
    return _filled(problem, fits), lines


def _dual(problem: _Problem, lines: list[Line], choice: Selection) -> Fraction:
    """The greatest bound of these multipliers.

    λ times the rounding of the budget may dwarf the loss, so a choice that uses the budget up to rounding counts as all of it.
    """
    used = _time(choice)
    budget = used if abs(used - problem.budget) <= problem.limit - problem.budget else problem.budget
    return max(Fraction(least - p * budget, q) for least, p, q in lines)


def _promising(problem: _Problem, lines: list[Line], loss: int) -> _Problem:
    """Without the options that the best multiplier proves to be in no choice of less loss than this."""
    least, p, q = max(lines, key=lambda line: Fraction(line[0] - line[1] * problem.limit, line[2]))
    most = q * loss + p * problem.limit - least  # what a choice may cost above the least, layers together
    fronts = []
    for front in problem.fronts:
        costs = [q * option.loss + p * option.time for option in front]
        worst = min(costs) + most
        fronts.append([option for option, cost in zip(front, costs) if cost < worst])
    return replace(problem, fronts=fronts)


def _filled(problem: _Problem, choice: Selection) -> Selection:
    """The choice, with the time that it leaves given to single layers, the greatest fall of loss first."""
    found, left = list(choice), problem.limit - _time(choice)
    falls: list[tuple[int, int, int, _Option]] = []  # fall of loss, negated, time that it takes, layer, option

    def offer(j: int) -> None:
        place = bisect_right(problem.fronts[j], found[j].time + left, key=lambda option: option.time) - 1
        option = problem.fronts[j][place]
        if option.loss < found[j].loss:
            heapq.heappush(falls, (option.loss - found[j].loss, option.time - found[j].time, j, option))

    for j in range(len(found)):
        offer(j)
    while falls:
        _, takes, j, option = heapq.heappop(falls)
        if takes <= left:
            found[j], left = option, left - takes
        offer(j)
    return found


def _capped(problem: _Problem) -> _Problem:
    """Without the options whose loss is above the smallest cap under which some choice fits."""

    def under(cap: int) -> list[list[_Option]]:
        return [[option for option in front if option.loss <= cap] for front in problem.fronts]

    def fits(cap: int) -> bool:
        fronts = under(cap)
        return all(fronts) and sum(front[0].time for front in fronts) <= problem.limit

    caps = sorted({option.loss for front in problem.fronts for option in front})
    return replace(problem, fronts=under(caps[bisect_right(caps, False, key=fits)]))


def _on_grid(problem: _Problem, resolution: int, *, up: bool) -> Selection:
    """The least sum of losses with times rounded to the grid, up or down.

    Every layer's least time is taken off first, so that some choice fits however it is rounded.
    """
    fronts, budget = problem.fronts, problem.budget
    base = sum(front[0].time for front in fronts)
    # a whole part of budget / resolution, so that its multiples stay exact; rounding stays far below it
    finest = 2 ** (_SUM_BITS - 3) // ((len(fronts) + 64) * resolution)
    steps = resolution * max(1, min(budget // max(1, budget - base), finest))
    if up:
        costs = [[-((front[0].time - option.time) * steps // budget) for option in front] for front in fronts]
        most = problem.limit
    else:
        # without its rounding error a multiple of the grid may be just below itself, and fall by a step
        costs = [[((o.time >> _INPUT_BITS) + o.time - front[0].time) * steps // budget for o in front] for front in fronts]
        most = problem.limit + (problem.limit >> _INPUT_BITS)
    capacity = (most - base) * steps // budget
    best = np.zeros(capacity + 1)  # least loss of the layers so far within so many steps
    taken = np.zeros((len(fronts), capacity + 1), dtype=np.min_scalar_type(max(map(len, fronts))))
    for j, (front, row) in enumerate(zip(fronts, costs)):
        found = np.full(capacity + 1, np.inf)
        for place, cost in enumerate(row):
            if cost > capacity:
                break
            here = best[: capacity + 1 - cost] + problem.losses[j][front[place].which]
            better = here < found[cost:]
            found[cost:][better] = here[better]
            taken[j, cost:][better] = place
        best = found
    at = int(best.argmin())  # the first one: of equal losses the least time
    choice = []
    for j in reversed(range(len(fronts))):
        place = int(taken[j, at])
        choice.append(fronts[j][place])
        at -= costs[j][place]
    return choice[::-1]
