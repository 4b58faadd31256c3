"""Histories in which values were predicted from other steps, lanes or prompts than they belong to, as a hostile tester found them."""

from __future__ import annotations

import pytest
import torch

import vdcache
from vdcache import Recipe, Schedule
from vdcache.calibration.schedule import Prediction
from vdcache.errors import ConfigError
from vdcache.exporting.fixed import fixed
from vdcache.passes import MarkBranches, MarkLanes, MarkOutput, MergeSlots
from vdcache.policies import PlanTable, SchedulePolicy, StepList
from vdcache.policies.weights import Position, ring_weights
from vdcache.predictors import LastValue, MeanVelocity, Newton, Taylor
from vdcache.testing import TinyDiT, latent, time_of

WORDS, OTHERS = latent(5, 1, 3, 4), latent(6, 1, 3, 4)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def made(recipe, steps, model=None):
    return vdcache.compile(model or TinyDiT(1), recipe, num_steps=steps, inner="eager", strict=True)


def reused(compiled):
    return sorted({name.partition("/")[0] for name in compiled.vdcache.history[-1].reused})


def test_what_a_plan_does_not_need_was_not_computed_in_it():
    """Reusing what lies behind the branches leaves them out: their newest values stay those of the step before."""
    model = TinyDiT(1)
    table = PlanTable(((), (), (), ("b",), ("a",), ()))
    compiled = made(
        Recipe("x", table, (MarkBranches(group="a"), MarkOutput(base="zero", group="b")), predictor=Taylor(1)), 6, model
    )
    values = []
    for step in range(5):
        found = compiled(latent(step), time_of(step), WORDS)
        values.append(model.branches(latent(step), time_of(step), WORDS))
    want = model.with_branches(latent(4), WORDS, values[2] + 2 * (values[2] - values[1]))
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize(("predictor", "step_3"), [(LastValue(), ["all"]), (Taylor(1), [])], ids=str)
def test_halves_of_a_batch_of_different_steps_are_not_extrapolated_as_one(predictor, step_3):
    table = PlanTable(((), (), ("lane",), ("all",), ()))
    passes = (MarkBranches(), MarkLanes("batch", "second"))
    compiled = made(Recipe("x", table, passes, predictor=predictor), 5)
    for step in range(4):
        compiled(latent(step).repeat(2, 1, 1), time_of(step).repeat(2), torch.cat([WORDS, OTHERS]))
    assert reused(compiled) == step_3


@pytest.mark.parametrize("change", ["prompt", "latent"])
def test_a_lane_is_predicted_from_the_lane_that_it_was_compared_with(change):
    model = TinyDiT(seed=2)
    compiled = made("cfg-gate-0.5", 10, model)
    for step in range(10):
        late = step >= 7
        x, words = latent(step), WORDS + (late and change == "prompt")
        compiled(x, time_of(step), words)
        y = x + (step == 7 and change == "latent")
        found = compiled(y, time_of(step), OTHERS)
        if step == 7:
            assert torch.equal(found, model(y, time_of(step), OTHERS)) and not reused(compiled)
        elif step in (5, 6, 8, 9):
            assert reused(compiled) == ["lane"]


def test_a_value_that_is_no_number_leaves_no_difference_behind():
    compiled = made(
        Recipe("x", vdcache.methods.easycache(0.9).policy, vdcache.methods.easycache(0.9).passes, predictor=Taylor(1)), 16
    )
    for step in range(16):
        found = compiled(latent(step) * (float("nan") if step == 5 else 1), time_of(step), WORDS)
        assert step <= 5 or found.isfinite().all(), step


def test_where_a_part_was_no_number_nothing_older_is_reused():
    passes = (MarkBranches(kinds=("self-attention",), group="a"), MarkBranches(kinds=("mlp",), group="b"))
    compiled = made(Recipe("x", PlanTable(((), ("a",), ("b",), ("a", "b"), ())), passes), 5)
    for step in range(4):
        compiled(latent(step) * (float("nan") if step == 2 else 1), time_of(step), WORDS)
    assert not reused(compiled)


def test_a_rule_ends_with_its_policy():
    compiled = made(Recipe("x", SchedulePolicy(StepList((0, 2))), (MarkBranches(), MergeSlots()), predictor=Taylor(1)), 6)
    session = compiled.vdcache
    session.follow(session.policy, Newton(1, 1.0))
    assert session.rule == Newton(1, 1.0)
    session.policy = session.policy
    assert session.rule is None
    session.follow(session.policy, Newton(1, 1.0))
    session.reset()
    assert session.rule is None
    with pytest.raises(ConfigError, match=r"rule is a vdcache\.predictors\.WeightRule"):
        session.follow(session.policy, "taylor")


def test_a_fixed_graph_predicts_by_the_timesteps_of_its_schedule():
    """The weights of a package are those of a run; without timesteps there are none."""
    times = tuple(1000.0 * (1 - s / 8) ** 2 + 1 for s in range(8))
    schedule = Schedule(8, (0, 2, 5), power=0.75)
    args = (latent(0), time_of(0), WORDS)
    with pytest.raises(ConfigError, match="predicts by timesteps, which a fixed graph does not see"):
        fixed(TinyDiT(1), args, None, schedule)
    recipe = Recipe("x", schedule.policy(times), Prediction().passes, predictor=Newton(1, 0.75))
    steps = fixed(TinyDiT(1), args, None, recipe, 8).steps
    at = [Position(s, t) for s, t in enumerate(times)]
    want = ring_weights(Newton(1, 0.75), at[7], [at[5], at[2], at[0]])
    assert list(steps[7].numbers.values()) == pytest.approx(want)


def test_a_mean_velocity_that_stands_still():
    steps = [Position(s, 500.0) for s in (3, 2, 1, 0)]
    assert list(MeanVelocity((3,)).weights(Position(4, 500.0), steps))[:2] == [1.0, 0.0]
