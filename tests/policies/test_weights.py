"""Predictors that are weighted sums: against the published formulas, restated as recursions on the values themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.predicting import Predicting
from vdcache.errors import ConfigError
from vdcache.passes.predictors import read_predictor
from vdcache.policies.weights import STEP_INFO, Position, RingWeights, ring_weights
from vdcache.predictors import (
    AdamsBashforth,
    ByStep,
    Chebyshev,
    Extrapolated,
    Fixed,
    FoCa,
    Hermite,
    MeanVelocity,
    Newton,
    Scaled,
    Table,
    Taylor,
    WeightRule,
)
from vdcache.testing.asserts import assert_predictor

RULES = [
    *(Taylor(0), Taylor(3), Hermite(2), Newton(3), AdamsBashforth(3), Fixed(), Scaled(1.25), Extrapolated(0.5), FoCa()),
    *(
        Chebyshev(tensors=6),
        Chebyshev(3, 1.0, 8, 50, 0.4, 2),
        MeanVelocity((3,)),
        Table(((1.0,), (2.0, -1.0), (0.5, 0.25, 0.25))),
    ),
    ByStep(((2, Taylor(2)), (9, Hermite(1)))),
    *(Newton(1, 1 / 3), Hermite(1, 2**-0.5), Chebyshev(3, 1 / 3), Scaled(1 / 3), Extrapolated(1 / 3)),  # no digit is lost
]
steps_and_values = st.lists(st.tuples(st.integers(1, 4), st.floats(-3, 3)), min_size=1, max_size=9)


def at(steps, timestep=lambda s: None):
    return [Position(s, timestep(s)) for s in reversed(steps)]


def predict(rule, now, values, timestep=lambda s: None):
    """The weighted sum itself, of values by step."""
    steps = sorted(values)
    weights = rule.weights(Position(now, timestep(now)), at(steps, timestep))
    assert len(weights) <= min(rule.tensors, len(steps))
    return math.fsum(w * values[s] for w, s in zip(weights, reversed(steps), strict=False))


def drawn(pairs):
    """Values by step, from gaps and values."""
    steps = np.cumsum([gap for gap, _ in pairs]).tolist()
    return dict(zip(steps, (v for _, v in pairs), strict=True))


def counting(until):
    return {s: float(s) for s in range(until)}


# ---- examples of METHODS_2026, part A --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "now", "values", "want"),
    [
        (Chebyshev(), 5, dict.fromkeys(range(5), 1.0), 0.93868),
        (Chebyshev(ridge=1e-9), 5, dict.fromkeys(range(5), 1.0), 1.0),
        (Chebyshev(), 5, counting(5), 4.0909),
        (Chebyshev(ridge=1e-13), 5, counting(5), 5.0),
        (Chebyshev(ridge=1e-9), 48, {s: (2 * s / 50 - 1) ** 3 for s in range(0, 46, 5)}, 0.778688),
        (FoCa(), 2, counting(2), 2.0),
        (FoCa(), 3, counting(2), 3.0),
        (FoCa(), 4, counting(2), 4.0),
        (FoCa(), 5, counting(2), 3.25),
        (Fixed((2.0, -1.0)), 3, counting(3), 3.0),  # ZEUS
        (Fixed((2.0, -1.0)), 4, counting(3), 3.0),
        (Newton(1), 7, {4: 1.0, 6: 2.0}, 2.5),  # SeaCache
        (Hermite(1, 2**-0.5), 9, counting(5), 9.0),  # exact on a line
        (Hermite(1, 0.5), 9, counting(5), 6.5),  # half of the slope
        (Table(((), (), (2.0, -1.0))), 2, {0: 3.0, 1: 5.0}, 7.0),  # least squares on a line
        (AdamsBashforth(2), 2, {0: 1.0, 1: 3.0}, 4.0),
    ],
    ids=str,
)
def test_examples(rule, now, values, want):
    assert predict(rule, now, values) == pytest.approx(want, abs=1e-4)


def test_the_mean_velocity_of_a_line():
    """v = 0.3 + 2 σ, Δσ = −0.02: two steps back the mean is 1.56, j = −0.5, and 1.54 becomes 1.53; K = 6 gives 5/12 of the slope."""

    def sigma(step):
        return 0.66 - 0.02 * step

    values = {s: 0.3 + 2 * sigma(s) for s in range(3)}
    assert [values[1], values[2]] == pytest.approx([1.58, 1.54])
    assert predict(MeanVelocity((2,)), 3, values, lambda s: 1000 * sigma(s)) == pytest.approx(1.53)
    assert predict(MeanVelocity((1,)), 3, values) == values[2]
    values = {s: 0.3 + 2 * sigma(s) for s in range(8)}
    assert predict(MeanVelocity((6,)), 8, values) == pytest.approx(values[7] - 0.04 * 5 / 12)


# ---- the recursions themselves ---------------------------------------------------------------------------------------


@given(steps_and_values, st.integers(1, 7), st.integers(0, 4), st.floats(0.2, 2))
def test_hermite_is_hicache(pairs, ahead, order, sigma):
    values = drawn(pairs)
    factors, before = [], None
    for step, value in values.items():
        new = [value]
        for i in range(min(order, len(factors))):
            new.append((new[i] - factors[i]) / (step - before))
        factors, before = new, step
    x = sigma * ahead
    hermite = [1.0, 2 * x, 4 * x**2 - 2, 8 * x**3 - 12 * x, 16 * x**4 - 48 * x**2 + 12]
    want = sum(f * sigma**i * hermite[i] / math.factorial(i) for i, f in enumerate(factors))
    assert predict(Hermite(order, sigma), before + ahead, values) == pytest.approx(want, rel=1e-6, abs=1e-6)


@given(steps_and_values, st.integers(1, 7), st.integers(0, 5))
def test_newton_is_the_interpolating_polynomial(pairs, ahead, order):
    kept = dict(list(drawn(pairs).items())[-(order + 1) :])
    now = max(kept) + ahead
    origin = max(kept)
    polynomial = np.polyfit([s - origin for s in kept], list(kept.values()), len(kept) - 1)
    got = predict(Newton(order), now, kept)
    assert got == pytest.approx(np.polyval(polynomial, now - origin), rel=1e-4, abs=1e-3)


@given(steps_and_values, st.integers(1, 7), st.floats(0.01, 2), st.floats(0, 1), st.sampled_from([1, 2]))
def test_chebyshev_is_spectrum(pairs, ahead, ridge, share, order):
    """The coefficients by Cholesky, as the reference forms them, and its forward difference."""
    values = drawn(pairs)
    steps = list(values)
    now = steps[-1] + ahead

    def row(step):
        tau, found = 2 * step / 50 - 1, [1.0]
        found.append(tau)
        while len(found) < 5:
            found.append(2 * tau * found[-1] - found[-2])
        return torch.tensor(found, dtype=torch.float64)

    x, h = torch.stack([row(s) for s in steps]), torch.tensor(list(values.values()), dtype=torch.float64)[:, None]
    coefficients = torch.cholesky_solve(x.T @ h, torch.linalg.cholesky(x.T @ x + ridge * torch.eye(5, dtype=torch.float64)))
    smooth = (row(now) @ coefficients).item()
    newest = list(values.values())[::-1]
    forward = newest[0]
    if len(steps) > 1:
        k = (now - steps[-1]) / (steps[-1] - steps[-2])
        forward += k * (newest[0] - newest[1])
        if order == 2 and len(steps) > 2:
            forward += k * (k - 1) / 2 * (newest[0] - 2 * newest[1] + newest[2])
    rule = Chebyshev(4, ridge, 16, 50, share, order)
    assert predict(rule, now, values) == pytest.approx(share * smooth + (1 - share) * forward, rel=1e-5, abs=1e-5)


@given(
    st.lists(st.booleans(), min_size=3, max_size=14),
    st.lists(st.floats(-3, 3), min_size=15, max_size=15),
    st.floats(-900, -0.5),
    st.lists(st.integers(1, 5), min_size=1, max_size=15),
)
def test_mean_velocity_is_meancache(computed, values, gap, spans):
    """MeanCache's log of velocities and latents under Euler, computed and predicted ones alike."""

    class All(MeanVelocity):  # the reference keeps every step
        tensors = 16

    rule, log, latents, seen = All(tuple(spans)), [], [0.0], {}
    for step in range(len(computed)):
        if computed[step] or step < 6:
            velocity = seen[step] = values[step]
        else:
            span = min(spans[min(step, len(spans) - 1)], len(log))
            start, length = len(log) - span, span * gap
            mean = (latents[step] - latents[start]) / length
            slope = (log[start] - mean) / length if span > 1 else 0.0
            velocity = log[-1] - slope * gap
            for timestep in (lambda s: None, lambda s: 1000 + gap * s):
                assert predict(rule, step, seen, timestep) == pytest.approx(velocity, rel=1e-6, abs=1e-6)
        log.append(velocity)
        latents.append(latents[-1] + velocity * gap)


# ---- what the graphs are given ---------------------------------------------------------------------------------------


@given(st.sampled_from(RULES), steps_and_values, st.integers(1, 6))
def test_the_ring_gives_the_weighted_sum(rule, pairs, ahead):
    """The newest value and the differences of successive ones, as the compiled graphs keep them."""
    values = drawn(pairs)
    predicting = Predicting(rule)
    for step, value in values.items():
        predicting.computed(step, torch.tensor([value], dtype=torch.float64))
    now = max(values) + ahead
    scale = sum(map(abs, ring_weights(rule, Position(now), at(sorted(values)))))
    assert predicting.predicted(now).item() == pytest.approx(predict(rule, now, values), rel=1e-5, abs=1e-5 * max(scale, 1))


def test_half_precision_keeps_small_differences():
    """Values of 1000 that move by 8 a step, in bfloat16, whose spacing there is 4: a line is continued exactly, and no tensor is wider."""
    predicting = Predicting(Taylor(2))
    for step in range(4):
        predicting.computed(step, torch.tensor([1000.0 + 8 * step]).bfloat16())
    assert predicting.predicted(9).item() == 1072.0


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_keep_the_contract_and_print(rule):
    assert isinstance(rule, WeightRule)
    assert_predictor(rule, steps=5)
    assert read_predictor(str(rule)) == rule


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(()),
        lambda: Fixed((1.0,) * 17),
        lambda: Table(()),
        lambda: ByStep(()),
        lambda: ByStep(((3, Taylor(1)), (2, Taylor(1)))),
        lambda: ByStep(((0, "taylor"),)),
        lambda: MeanVelocity((0,)),
        lambda: Hermite(1, 0.0),
        lambda: Chebyshev(tensors=17),
    ],
)
def test_bad_rules(make):
    with pytest.raises(ConfigError):
        make()


def test_a_rule_holds_from_its_first_step_on():
    rule = ByStep(((2, Newton(1)), (4, Fixed((3.0, -2.0)))))
    assert [predict(rule, now, {-2: 1.0, -1: 2.0}) for now in (1, 2, 3, 4, 5)] == [2.0, 5.0, 6.0, 4.0, 4.0]


def test_functions_of_tensors_are_told_where_the_step_stands():
    assert STEP_INFO.values(Position(7), at([2, 5])) == (2.0, 2.0, 7.0)
    assert STEP_INFO.values(Position(3), ()) == (1.0, 0.0, 3.0)


def test_another_rule_is_taken_where_the_ring_has_its_values():
    told = RingWeights(Taylor(1))
    steps = at([0, 2])
    assert told.values(Position(4), steps, Newton(0)) == [1.0, 0.0]
    assert told.values(Position(4), steps, Fixed((3.0, -2.0))) == [1.0, 2.0]
    assert told.values(Position(4), steps, Taylor(2)) == told.values(Position(4), steps) == [1.0, 1.0]
