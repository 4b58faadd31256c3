"""One option for each layer, so that the time stays within a budget and the loss is least (Efficient-vDiT, arXiv 2502.06155).

Sums are compared exactly: floats are whole multiples of a power of two, and Python's integers have no largest one. The solver for
integer programs works in floats, on what is left once the Lagrangian has ruled out most options.
"""

from __future__ import annotations

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

_SUM_BITS = 52  # a budget that was summed in floats is off by up to 2⁻⁵² of itself for each layer
_NODES = 500  # of the search tree; a limit in seconds would make the choice depend on the machine


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


def dynamic(losses: Any, times: Any, budget: float, *, objective: str = "sum") -> Allocation:
    """Minimise the loss by integer programming (`scipy.optimize.milp`).

    Options that cannot be part of a better choice than the one of `lagrangian`, by its λ, are left out first: what remains is
    mostly a few layers. Of choices that are equally good the one of `lagrangian` is taken, or else the first that the solver
    finds, which is always the same one. "max" finds the smallest cap on losses under which the fastest options fit by bisection.

    Args:
        losses: losses[j][a] ≥ 0 of option a of layer j, in any unit; inf forbids an option.
        times: times[j][a] ≥ 0, in any unit.
        budget: the largest sum of times, in that unit.
        objective: "sum" for the least sum of losses (Efficient-vDiT, appendix A); "max" for the least largest loss (section 3.3),
            and the least sum under that.

    Returns:
        The optimum. If the solver gives up first, the best choice found and the bound that is proved, with `exact` False.

    Raises:
        ConfigError: an argument is not as above, no choice is within the budget, or scipy is missing where it is needed.
    """
    if objective not in ("sum", "max"):
        raise ConfigError(f'objective is "sum", the least sum of losses, or "max", the least largest loss; got {objective!r}')
    problem = _problem(losses, times, budget)
    if objective == "max":
        problem = _capped(problem)
    best, lines = _relaxed(problem)
    bound = _dual(problem, lines, best)
    if bound < _loss(best):
        best, bound = _optimum(_promising(problem, lines, _loss(best)), best, bound)
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
    _check_layers(rows, spans)
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


def _check_layers(rows: list[list[float]], spans: list[list[float]]) -> None:
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
    while True:
        falls = (
            (option.loss - own.loss, option.time - own.time, j, option)
            for j, (own, front) in enumerate(zip(found, problem.fronts))
            for option in front
            if option.time - own.time <= left
        )
        fall, takes, j, option = min(falls)  # an option may take the place of itself, so there is one
        if fall >= 0:
            return found
        found[j], left = option, left - takes


def _capped(problem: _Problem) -> _Problem:
    """Without the options whose loss is above the smallest cap under which some choice fits."""

    def under(cap: int) -> list[list[_Option]]:
        return [[option for option in front if option.loss <= cap] for front in problem.fronts]

    def fits(cap: int) -> bool:
        fronts = under(cap)
        return all(fronts) and sum(front[0].time for front in fronts) <= problem.limit

    caps = sorted({option.loss for front in problem.fronts for option in front})
    return replace(problem, fronts=under(caps[bisect_right(caps, False, key=fits)]))


def _optimum(left: _Problem, best: Selection, bound: Fraction) -> tuple[Selection, Fraction]:
    """The best choice of these options if it beats `best`, and the bound that is proved, by a mixed-integer linear program.

    One binary variable says of each option whether it is taken; each layer takes one, and their times stay within the limit.
    """
    spare = left.limit - sum(front[0].time for front in left.fronts)
    if spare < 0:
        return best, Fraction(_loss(best))  # nothing better fits
    fronts = [[option for option in front if option.time - front[0].time <= spare] for front in left.fronts]
    options = [option for front in fronts for option in front]
    of_layer = np.repeat(np.arange(len(fronts)), [len(front) for front in fronts])
    # The solver stops within 1e-6 of the optimum and of a limit, so losses are given in 1e-4 of what can be won at most, and times
    # in parts of what can be spent.
    gap = _loss(best) - bound
    losses = np.array([float((option.loss - front[-1].loss) / gap * 10_000) for front in fronts for option in front])
    times = np.array([(option.time - front[0].time) / (spare or 1) for front in fronts for option in front])
    milp, constraint = _solver()
    limits = [constraint(of_layer == np.arange(len(fronts))[:, None], 1, 1), constraint(times[None], -np.inf, 1)]
    while True:
        result = milp(
            losses,
            integrality=np.ones(len(options)),
            bounds=(0, 1),
            constraints=limits,
            options={"mip_rel_gap": 0, "node_limit": _NODES},
        )
        if result.x is None:
            return best, bound
        taken = result.x > 0.5
        found = [option for option, yes in zip(options, taken) if yes]
        if _time(found) <= left.limit:
            better = min(best, found, key=_loss)
            return better, Fraction(_loss(better)) if result.status == 0 else bound
        # Too slow by less than the solver's tolerance: this very choice is forbidden, and no other one.
        limits.append(constraint(taken[None], -np.inf, len(fronts) - 1))


def _solver() -> tuple[Any, Any]:
    try:
        from scipy.optimize import LinearConstraint, milp
    except ImportError as error:
        raise ConfigError("the best masks within a budget need scipy: pip install 'vdcache[profile]'") from error
    return milp, LinearConstraint
