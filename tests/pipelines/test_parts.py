"""The parts of `vdcache.pipelines` alone: how much can be skipped, whose steps they are, how many there are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from vdcache.methods.registry import NAMES
from vdcache.pipelines.experts import Experts
from vdcache.pipelines.forecast import most_reused
from vdcache.pipelines.loop import evaluations
from vdcache.pipelines.override import Override

SAID = {n.name: n for n in NAMES}


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_how_much_can_be_skipped_is_known_of_every_recipe(name, steps):
    named = SAID[name]
    policy = named.make(*named.example).for_steps(steps).policy
    try:
        reused = most_reused(policy, steps)
    except ValueError:
        assert steps < 30  # its warm-up is longer: the loop says so
        return
    assert 0 not in reused and all(0 < s < steps for s in reused) and (steps > 1 or not reused)
    if steps == 30 and len(policy.plans()) > 1:
        assert reused


def test_most_reused_by_hand():
    from vdcache.methods import recipe

    assert most_reused(recipe("every-3").policy, 8) == [1, 2, 4, 5]
    assert most_reused(recipe("fbcache-0.1").policy, 4) == [1, 2, 3]
    assert most_reused(recipe("dbcache-1-0-0.1").policy, 10) == [8, 9]
    assert most_reused(recipe("teacache-0.1").policy, 5) == [1, 2, 3]


def test_experts():
    experts, times = Experts(), [1000.0, 900.0, 700.0, 400.0, 100.0]
    assert experts.share("high", times, None) == 5
    assert experts.share("high", times, 875.0) == 2 and experts.share("low", times[2:], 875.0) == 3
    experts.learn([(t, "high" if t >= 875 else "low") for t in times])
    assert experts.share("high", times, None) == 2 and experts.share("low", times[2:], None) == 3
    # between 900 and 700 nobody knows; the one that was there first keeps it
    assert experts.share("high", [1000.0, 950.0, 880.0, 800.0, 650.0], None) == 4
    experts.learn([(t, "high" if t >= 500 else "low") for t in times])  # another boundary: what was known is forgotten
    assert experts.share("high", times, None) == 3
    rising = Experts()
    rising.learn([(0.0, "a"), (0.5, "a"), (0.9, "b")])
    assert rising.share("a", [0.0, 0.3, 0.6, 0.95], None) == 3


def test_two_that_run_at_every_step_share_none():
    experts = Experts()
    experts.learn([(t, name) for t in (3.0, 2.0, 1.0) for name in ("video", "audio")])
    assert experts.share("video", [3.0, 2.0, 1.0], None) == experts.share("audio", [3.0, 2.0, 1.0], None) == 3


@pytest.mark.parametrize("rising", [False, True])
def test_timesteps_that_are_others_in_every_request_take_no_room(rising):
    """What is known holds where somebody else begins, and nothing more, however many requests there were."""
    experts = Experts()
    for request in range(600):
        times = sorted((1000.0 - 100 * i - request / 7 % 50 for i in range(10)), reverse=not rising)
        experts.learn([(t, "high" if t >= 500 else "low") for t in times])
    assert len(experts._known) == 2
    first = "low" if rising else "high"
    assert experts.share(first, times, None) == sum((t >= 500) != rising for t in times)


class Scheduler:
    def __init__(self, times, steps, order=1):
        self.timesteps, self.num_inference_steps, self.order = torch.tensor(times), steps, order

    def step(self, x):
        return self, x


@pytest.mark.parametrize(
    ("scheduler", "total", "want"),
    [
        (Scheduler([3.0, 2.0, 1.0], 3), 3, [3, 2, 1]),
        (Scheduler([4.0, 3.0, 2.0, 1.0], 4), 2, [2, 1]),  # from a picture
        (Scheduler([3.0, 2.0, 2.0, 1.0, 1.0], 3, order=2), 3, [3, 2, 2, 1, 1]),
        (Scheduler([3.0, 2.0, 2.0, 1.0, 1.0], 3, order=2), 2, [2, 1, 1]),
        (Scheduler([3.0, 2.0], None), None, [3, 2]),
    ],
)
def test_how_many_evaluations_a_loop_has(scheduler, total, want):
    assert evaluations([scheduler], total) == want


def test_an_override_leaves_copies_and_pickles_alone():
    scheduler = Scheduler([1.0], 1)
    override = Override(scheduler, "step")
    override.install()
    assert scheduler.step(5) == (scheduler, 5)
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert other.step(5) == (other, 5)
    override.uninstall()
    assert "step" not in scheduler.__dict__
    first, second = Override(scheduler, "step"), None
    first.install()
    second = Override(scheduler, "step", scheduler.__dict__["step"])
    second.install()
    first.uninstall()  # somebody else is in front: it stays, and does nothing
    assert scheduler.step(1) == (scheduler, 1)
    second.uninstall()
    assert scheduler.__dict__["step"] is first


def test_a_switch_behind_several_hooks_is_found_and_taken_off():
    hooks = pytest.importorskip("accelerate.hooks")
    diffusers = pytest.importorskip("diffusers.hooks")
    from vdcache.pipelines.denoiser import ForwardWrapper

    model = nn.Linear(2, 2)
    diffusers.HookRegistry.check_if_exists_or_initialize(model).register_hook(diffusers.ModelHook(), "own")
    hooks.add_hook_to_module(model, hooks.ModelHook())
    switch = ForwardWrapper.put_on(model)
    assert ForwardWrapper.on(model) is switch and ForwardWrapper.put_on(model) is switch and model.forward is not switch
    diffusers.HookRegistry.check_if_exists_or_initialize(model).register_hook(diffusers.ModelHook(), "later")
    assert ForwardWrapper.on(model) is switch
    x = torch.ones(1, 2)
    want = nn.functional.linear(x, model.weight, model.bias)
    assert torch.equal(model(x), want)
    switch.take_off()
    assert ForwardWrapper.on(model) is None and torch.equal(model(x), want)
