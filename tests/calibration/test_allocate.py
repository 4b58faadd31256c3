"""Allocation of options to layers: against every choice there is, by hand, in any unit, ties, bad input."""

import itertools
import math
import random
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vdcache.calibration.allocate import Allocation, dynamic, lagrangian
from vdcache.errors import ConfigError

EPS = 2.0**-52
few = settings(max_examples=100, deadline=None)


@st.composite
def instances(draw, most=12):
    """Losses and times of up to five layers in whole numbers, some losses inf, and a budget that some choice meets.

    Where every unit of time costs as much loss, no multiplier tells options apart, and all is left to the solver.
    """
    losses, times, alike = [], [], draw(st.booleans())
    for _ in range(draw(st.integers(1, 5))):
        options = draw(st.integers(1, 4))
        numbers = st.lists(st.integers(0, most), min_size=options, max_size=options)
        times.append(draw(numbers))
        values = [most - t for t in times[-1]] if alike else draw(numbers)
        allowed = draw(st.integers(0, options - 1))
        losses.append([loss if a == allowed or draw(st.integers(0, 5)) else math.inf for a, loss in enumerate(values)])
    least = sum(min(t for t, loss in zip(*pair) if loss < math.inf) for pair in zip(times, losses))
    return losses, times, draw(st.integers(max(1, least), max(1, least, sum(map(max, times)))))


def optimum(losses, times, budget, total=sum):
    """The least loss of every choice within the budget."""
    choices = itertools.product(*(range(len(row)) for row in losses))
    fitting = (c for c in choices if sum(row[a] for row, a in zip(times, c)) <= budget)
    return min(total([row[a] for row, a in zip(losses, c)]) for c in fitting)


def assert_adds_up(found, losses, times, budget, total=math.fsum):
    assert found.loss == total([row[a] for row, a in zip(losses, found.choice)]) < math.inf
    assert found.time == math.fsum(row[a] for row, a in zip(times, found.choice)) <= budget
    assert 0 <= found.bound <= found.loss


# --- against every choice ------------------------------------------------------------------------------------------------------


@few
@example(([[3], [12, 6], [12, 2], [12, 11], [0]], [[9], [0, 6], [0, 10], [0, 1], [12]], 37), 7 / 30)
@given(instances(), st.sampled_from([1, 2**-20, 0.1, 1e-6, 7 / 30, 1e9]))
def test_dynamic_is_exact_in_any_unit(instance, unit):
    losses, times, budget = instance
    scaled = [[t * unit for t in row] for row in times]
    found = dynamic(losses, scaled, budget * unit)
    assert found.loss == found.bound == optimum(losses, times, budget) and found.exact
    assert sum(row[a] for row, a in zip(times, found.choice)) <= budget


@pytest.mark.parametrize("unit", [0.1, 1e-6, 7 / 30])
def test_dynamic_is_exact_where_multipliers_say_nothing(unit):
    parts = range(2, 42, 2)
    for budget in range(1, 400, 14):
        found = dynamic([[0, t] for t in parts], [[t * unit, 0] for t in parts], budget * unit)
        assert found.loss == found.bound == sum(parts) - budget // 2 * 2 and found.exact


@pytest.mark.parametrize("unit", [0.1, 1e-6, 7 / 30])
def test_dynamic_is_exact_on_a_large_model(unit):
    draw = random.Random(0)
    for _ in range(20):
        times = [draw.sample(range(1, 60), 4) for _ in range(30)]
        losses = [[draw.randrange(100) for _ in row] for row in times]
        least, most = sum(map(min, times)), sum(map(max, times))
        budget = draw.randrange(least, (least + most) // 2)
        whole = dynamic(losses, times, budget)
        found = dynamic(losses, [[t * unit for t in row] for row in times], budget * unit)
        assert whole.exact and found.exact and found.loss == whole.loss == found.bound
        assert sum(row[a] for row, a in zip(times, found.choice)) <= budget


@few
@given(instances(most=1000))
def test_dynamic_is_exact_in_fine_units(instance):
    losses, times, budget = instance
    found = dynamic(losses, times, budget)
    assert_adds_up(found, losses, times, budget)
    assert found.bound == found.loss == optimum(losses, times, budget) and found.exact


@few
@given(instances())
def test_minimax_is_exact(instance):
    losses, times, budget = instance
    found = dynamic(losses, times, budget, objective="max")
    assert_adds_up(found, losses, times, budget, max)
    assert found.loss == found.bound == optimum(losses, times, budget, max) and found.exact
    capped = [[loss if loss <= found.loss else math.inf for loss in row] for row in losses]
    assert sum(row[a] for row, a in zip(losses, found.choice)) == optimum(capped, times, budget)


@few
@given(instances())
def test_lagrangian_is_between_its_bound_and_the_optimum(instance):
    losses, times, budget = instance
    found = lagrangian(losses, times, budget)
    assert_adds_up(found, losses, times, budget)
    best = optimum(losses, times, budget)
    assert found.bound <= best <= found.loss
    assert found.exact == (found.bound == found.loss)


@few
@given(instances())
def test_bound_of_the_lagrangian_is_the_greatest_of_all_multipliers(instance):
    losses, times, budget = instance
    layers = [[(Fraction(loss), t) for loss, t in zip(*pair) if loss < math.inf] for pair in zip(losses, times)]
    pairs = itertools.chain.from_iterable(itertools.permutations(layer, 2) for layer in layers)
    multipliers = {Fraction(0), *((l1 - l2) / (t2 - t1) for (l1, t1), (l2, t2) in pairs if t1 < t2 and l1 > l2)}
    dual = max(sum(min(loss + x * t for loss, t in layer) for layer in layers) - x * budget for x in multipliers)
    assert lagrangian(losses, times, budget).bound == float(dual)


@few
@given(instances(), st.integers(1, 4))
def test_few_multipliers_fit_and_bound_too(instance, iterations):
    losses, times, budget = instance
    found = lagrangian(losses, times, budget, iterations=iterations)
    assert_adds_up(found, losses, times, budget)
    assert found.bound <= optimum(losses, times, budget) <= found.loss


def random_instance(seed, layers, options):
    """Floats as measurements give them: sparser is faster, and loses more; a budget between the fastest and the slowest."""
    draw = random.Random(seed)
    times = [sorted(draw.uniform(0.5, 3) for _ in range(options)) for _ in range(layers)]
    losses = [sorted((draw.expovariate(1) ** 2 for _ in range(options)), reverse=True) for _ in range(layers)]
    least, most = sum(min(row) for row in times), sum(max(row) for row in times)
    return losses, times, least + draw.uniform(0.02, 0.9) * (most - least)


@pytest.mark.parametrize("seed", range(10))
def test_no_single_layer_can_use_the_time_that_is_left(seed):
    losses, times, budget = random_instance(seed, 60, 8)
    for found in (lagrangian(losses, times, budget), dynamic(losses, times, budget)):
        for row, span, a in zip(losses, times, found.choice):
            assert all(loss >= row[a] for loss, t in zip(row, span) if found.time - span[a] + t <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_floats(seed):
    losses, times, budget = random_instance(seed, 5, 4)
    best = optimum(losses, times, budget, math.fsum)
    assert_adds_up(fine := dynamic(losses, times, budget), losses, times, budget)
    assert fine.loss == pytest.approx(best, rel=5 * EPS, abs=0) and fine.exact
    assert_adds_up(found := lagrangian(losses, times, budget), losses, times, budget)
    assert found.bound <= best * (1 + 5 * EPS) and found.loss >= best


@pytest.mark.parametrize("seed", range(3))
def test_both_ways_agree_on_a_large_model(seed):
    losses, times, budget = random_instance(seed, 60, 8)
    relaxed, exact = lagrangian(losses, times, budget), dynamic(losses, times, budget)
    for found in (relaxed, exact):
        assert_adds_up(found, losses, times, budget)
    assert relaxed.bound <= exact.bound <= exact.loss <= relaxed.loss and exact.exact
    # The optimum of the relaxation mixes two options of one layer, so no more than the loss of one layer parts them.
    assert relaxed.loss - relaxed.bound <= max(map(max, losses))


# --- by hand -------------------------------------------------------------------------------------------------------------------

LOSSES = [[0, 3, 8], [0, 5, 6], [0, 1]]
TIMES = [[6, 3, 1], [6, 4, 1], [6, 4]]


@pytest.mark.parametrize(
    ("budget", "choice", "loss"),
    [(18, (0, 0, 0), 0), (17, (0, 0, 1), 1), (16, (0, 0, 1), 1), (13, (1, 0, 1), 4), (8, (1, 2, 1), 10), (6, (2, 2, 1), 15)],
)
def test_known_optimum(budget, choice, loss):
    found = dynamic(LOSSES, TIMES, budget)
    assert found == Allocation(choice, loss, found.time, loss, exact=True)
    assert found.time <= budget


def test_known_minimax():
    assert dynamic(LOSSES, TIMES, 11, objective="max") == Allocation((1, 1, 1), 5.0, 11.0, 5.0, exact=True)
    # Under a cap of 3 the first layer may be sparse, and the second one must not.
    assert dynamic(LOSSES, TIMES, 14, objective="max") == Allocation((1, 0, 1), 3.0, 13.0, 3.0, exact=True)


def test_lagrangian_where_the_relaxation_is_tight():
    # λ = 5/3 per unit of time is where the second layer hands over, and the choice uses all of the budget.
    assert lagrangian(LOSSES, TIMES, 13) == Allocation((1, 0, 1), 4.0, 13.0, 4.0, exact=True)


def test_lagrangian_says_where_it_is_short_of_the_optimum():
    # Half of a second sparse layer would do: the bound is below, and nothing proves that the choice is best.
    assert lagrangian([[0, 4], [0, 4]], [[2, 0], [2, 0]], 3) == Allocation((0, 1), 4.0, 2.0, 2.0, exact=False)
    # The option between the two is above the line from the first to the last, which no multiplier chooses; filling finds it.
    assert lagrangian([[0, 9, 10]], [[10, 6, 0]], 7) == Allocation((1,), 9.0, 6.0, 3.0, exact=False)
    # Filling frees no time again, so the greater fall of loss stays out of reach of what the smaller one has left.
    assert lagrangian([[0, 8], [0, 9]], [[2, 0], [3, 0]], 3) == Allocation((0, 1), 9.0, 2.0, 6.0, exact=False)
    assert dynamic([[0, 8], [0, 9]], [[2, 0], [3, 0]], 3) == Allocation((1, 0), 8.0, 3.0, 8.0, exact=True)


@pytest.mark.parametrize("solve", [lagrangian, dynamic])
def test_time_that_is_left_lowers_the_loss(solve):
    found = solve([[0, 7], [0, 9], [0, 100]], [[3, 0], [3, 0], [20, 0]], 10)
    assert found.choice == (0, 0, 1) and found.time == 6


@pytest.mark.parametrize("objective", ["sum", "max"])
@pytest.mark.parametrize("budget", [4.0000001, 4])
def test_the_tightest_budget_is_met(objective, budget):
    found = dynamic([[1, 2], [1, 2], [1, 2]], [[2, 1], [2.3, 1.3], [2.7, 1.7]], budget, objective=objective)
    assert found.choice == (1, 1, 1) and found.time == 4


def test_a_budget_that_is_nearly_spent_by_the_fastest_options():
    times = [[1000.003, 1000.0], [1000.002, 1000.0], [1000.002, 1000.0]]
    found = dynamic([[0, 5], [0, 3], [0, 3]], times, 3000.0041)
    assert found.choice == (1, 0, 0) and found.exact


@pytest.mark.parametrize("solve", [lagrangian, dynamic])
@pytest.mark.parametrize(("fastest", "budget"), [([0.1, 0.2], 0.3), ([0.1] * 10, 0.1 * 10), ([0.1] * 1000, sum([0.1] * 1000))])
def test_a_budget_that_rounding_takes_from_is_met(solve, fastest, budget):
    found = solve([[0, 1]] * len(fastest), [[1, t] for t in fastest], budget)
    assert found.choice == (1,) * len(fastest) and found.exact
    assert found.time == math.fsum(fastest)


def test_a_choice_that_is_too_slow_by_less_than_the_tolerance_of_the_solver_is_not_taken():
    # Both layers would be dense at 1e-9 of the budget more, which floats of the solver do not tell from it.
    losses, times = [[0, 4, 9], [0, 5, 9]], [[0.5, 0.3, 0], [0.5, 0.4, 0]]
    found = dynamic(losses, times, 1 - 1e-9)
    assert found == Allocation((1, 0), 4.0, 0.8, 4.0, exact=True)


def test_a_solver_that_gives_up_leaves_the_relaxation_and_its_bound(monkeypatch):
    import scipy.optimize

    monkeypatch.setattr(scipy.optimize, "milp", lambda *args, **kwargs: scipy.optimize.OptimizeResult(x=None, status=1))
    losses, times = [[0, 8], [0, 9]], [[2, 0], [3, 0]]
    assert dynamic(losses, times, 3) == lagrangian(losses, times, 3) == Allocation((0, 1), 9.0, 2.0, 6.0, exact=False)


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert dynamic([[0, 1]], [[1, 0]], 1).exact  # the relaxation is the optimum
    with pytest.raises(ConfigError, match=re.escape("need scipy: pip install 'vdcache[profile]'")):
        dynamic([[0, 8], [0, 9]], [[2, 0], [3, 0]], 3)


def test_exact_up_to_the_rounding_of_losses():
    # Time costs the same in all three layers but for the rounding of the losses, by which the bound is an ulp lower.
    parts = [0.2, 0.4, 0.5]
    found = lagrangian([[0, 3 * x] for x in parts], [[x, 0] for x in parts], 0.5)
    assert found.choice == (1, 1, 0) and found.exact
    assert found.loss * (1 - 3 * EPS) <= found.bound <= found.loss == pytest.approx(1.8, rel=4 * EPS, abs=0)


@pytest.mark.parametrize("solve", [lagrangian, dynamic])
def test_exact_where_the_multiplier_dwarfs_the_loss(solve):
    # Without the third layer's sparse option a loss of 1e9 would be paid: that is what time costs here.
    found = solve([[1e-3, 1e9], [1e-3, 1e9], [1e-3, 2]], [[0.3, 0.1], [0.3, 0.1], [0.7, 0.1]], 0.7)
    assert found.choice == (0, 0, 1) and found.loss == found.bound and found.exact


# --- units and ties ------------------------------------------------------------------------------------------------------------

WAYS = [lagrangian, dynamic, lambda *a: dynamic(*a, objective="max")]


@pytest.mark.parametrize("solve", WAYS)
@pytest.mark.parametrize("seed", range(10))
def test_units_are_arbitrary(solve, seed):
    losses, times, budget = random_instance(seed, 8, 5)
    plain = solve(losses, times, budget)
    small = solve([[1e-9 * x for x in row] for row in losses], [[1e-6 * t for t in row] for row in times], 1e-6 * budget)
    assert small.choice == plain.choice and small.exact == plain.exact
    assert small.loss == pytest.approx(1e-9 * plain.loss, rel=4 * EPS, abs=0)
    assert small.bound == pytest.approx(1e-9 * plain.bound, rel=16 * EPS, abs=0)


@few
@given(instances(), st.sampled_from(WAYS), st.integers(-40, 40), st.integers(-40, 40))
def test_powers_of_two_change_nothing_but_the_unit(instance, solve, a, b):
    losses, times, budget = instance
    plain = solve(losses, times, budget)
    found = solve([[x * 2.0**a for x in row] for row in losses], [[t * 2.0**b for t in row] for row in times], budget * 2.0**b)
    assert found == Allocation(plain.choice, plain.loss * 2.0**a, plain.time * 2.0**b, plain.bound * 2.0**a, plain.exact)


@pytest.mark.parametrize("solve", WAYS)
def test_a_budget_above_all_needs_takes_the_least_losses_and_of_equal_ones_the_fastest(solve):
    found = solve([[2, 1, 1, 1], [0, 0], [5]], [[1, 4, 3, 3], [0, 2], [9]], 1e6)
    assert found == Allocation((2, 0, 0), found.loss, 12.0, found.loss, exact=True)


@pytest.mark.parametrize("solve", WAYS)
@pytest.mark.parametrize("budget", [1, 3, 4, 7, 20])
def test_layers_that_are_all_alike(solve, budget):
    found = solve([[0, 1]] * 20, [[1, 0]] * 20, budget)
    assert found.time <= budget and found.choice.count(1) >= 20 - budget
    if solve in WAYS[:2]:
        assert found.choice.count(0) == budget and found.exact


@pytest.mark.parametrize("solve", WAYS)
def test_losses_that_are_all_alike_take_the_least_time(solve):
    assert solve([[1, 1, 1]] * 3, [[3, 2, 1]] * 3, 5).choice == (2, 2, 2)
    assert solve([[0, 0], [0]], [[0, 0], [0]], 1) == Allocation((0, 0), 0.0, 0.0, 0.0, exact=True)


@pytest.mark.parametrize("solve", WAYS)
def test_forbidden_options_are_not_taken(solve):
    assert solve([[math.inf, 3], [1, math.inf]], [[0, 2], [2, 0]], 4).choice == (1, 0)


@pytest.mark.parametrize("solve", WAYS)
def test_arrays_and_tensors(solve):
    expected = solve([[0, 3], [0, 2]], [[4, 1], [4, 1]], 6)
    for kind in (np.array, torch.tensor, lambda x: np.array(x, dtype=np.float32), lambda x: tuple(map(tuple, x))):
        assert solve(kind([[0, 3], [0, 2]]), kind([[4, 1], [4, 1]]), np.float64(6)) == expected
    assert solve([torch.tensor([0, 3]), np.array([0, 2])], [[4, 1], [4, 1]], torch.tensor(6.0)) == expected
    assert all(type(a) is int for a in expected.choice) and type(expected.exact) is bool


# --- bad input -----------------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("solve", WAYS)
@pytest.mark.parametrize(
    ("losses", "times", "budget", "message"),
    [
        ([], [], 1, "losses and times are empty: give those of at least one layer"),
        ([[1], [1]], [[1]], 3, "losses are of 2 layers and times of 1: give both of every layer"),
        ([[1], []], [[1], []], 3, "layer 1 has no options: give at least one, such as the layer as it is"),
        ([[1], [1, 2]], [[1], [1]], 3, "layer 1 has 2 losses and 1 times: give one of each for every option"),
        ([[1, NAN]], [[1, 2]], 3, "losses[0][1] is a number of at least 0; got nan: measure that option again"),
        ([[1], [-2]], [[1], [1]], 3, "losses[1][0] is a number of at least 0; got -2.0: measure that option again"),
        ([[1, 2]], [[NAN, 2]], 3, "times[0][0] is a number of at least 0; got nan: measure that option again"),
        ([[1, 2]], [[1, -0.5]], 3, "times[0][1] is a number of at least 0; got -0.5: measure that option again"),
        ([[1, 2]], [[1, INF]], 3, "times[0][1] is inf: give its time, and a loss of inf to forbid the option"),
        ([[1], [INF, INF]], [[1], [1, 2]], 3, "layer 1 has no option that is allowed: its losses are all inf; give at least"),
        ([["1"]], [[1]], 3, "losses[0][0] is a number of at least 0; got '1'"),
        ([[1]], [[True]], 3, "times[0][0] is a number of at least 0; got True"),
        ([1], [[1]], 3, "losses[0] is a list of numbers, one for each option of layer 0; got 1"),
        (np.array([1.0]), [[1]], 3, "losses[0] is a list of numbers, one for each option of layer 0; got "),
        ([[1]], ["1"], 3, "times[0] is a list of numbers, one for each option of layer 0; got '1'"),
        (7, [[1]], 3, "losses is a list of layers, each a list of numbers, one for each option; got 7"),
        ([[1]], torch.tensor(1), 3, "times is a list of layers, each a list of numbers, one for each option; got tensor(1)"),
        ([[1]], [[1]], 0, "budget is a positive number, in the unit of the times; got 0"),
        ([[1]], [[1]], -2, "budget is a positive number, in the unit of the times; got -2"),
        ([[1]], [[1]], NAN, "budget is a positive number, in the unit of the times; got nan"),
        ([[1]], [[1]], INF, "budget is a positive number, in the unit of the times; got inf"),
        ([[1]], [[1]], "1", "budget is a positive number, in the unit of the times; got '1'"),
        ([[1]], [[1]], None, "budget is a positive number, in the unit of the times; got None"),
        (
            [[1, INF], [1, 2]],
            [[1.5, 0], [3, 2]],
            3,
            "budget 3.0 is too small: the fastest options of the 2 layers take 3.5 together; give at least that, or faster options",
        ),
    ],
)
def test_bad_input(solve, losses, times, budget, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        solve(losses, times, budget)


def test_bad_options():
    with pytest.raises(
        ConfigError, match=re.escape('objective is "sum", the least sum of losses, or "max", the least largest')
    ):
        dynamic([[1]], [[1]], 1, objective="mean")
    with pytest.raises(
        ConfigError, match=r"iterations, how many multipliers are tried, is a whole number of at least 1; got 2\.5"
    ):
        lagrangian([[1]], [[1]], 1, iterations=2.5)


@pytest.mark.parametrize("solve", WAYS)
def test_the_least_time_of_the_message_is_a_budget(solve):
    losses, times = [[0, 1]] * 7, [[1, 0.1 * k / 3] for k in range(1, 8)]
    with pytest.raises(ConfigError, match="too small") as error:
        solve(losses, times, 0.9)
    least = float(re.search(r"take (\S+) together", str(error.value))[1])
    assert solve(losses, times, least).choice == (1,) * 7
