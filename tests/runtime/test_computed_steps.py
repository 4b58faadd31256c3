"""When was each cached value computed?"""

from __future__ import annotations

import pytest
import torch

from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.policies.weights import Position
from vdcache.runtime.call import CallKey
from vdcache.runtime.computed_steps import ComputedSteps
from vdcache.runtime.store import Store

KEY = CallKey("graph", 0, (None, 1, 1), 0, ())
ALL = Plan.of(["all"])


def computed() -> tuple[ComputedSteps, Store]:
    store = Store()
    steps = ComputedSteps(store)
    for step in (0, 2):
        store.put(KEY, ["all/x"], [torch.ones(2)], [])
        steps.computed(KEY, ["all"], Position(step), RECOMPUTE)
    return steps, store


def test_it_knows_when_and_how_often():
    steps, _ = computed()
    assert steps.at(KEY, 2) and not steps.at(KEY, 0)
    assert list(steps.steps(KEY, "all")) == [Position(2), Position(0)]
    assert not steps.is_stale(KEY, ALL, 5)


def test_a_lane_that_sat_out_a_computed_step_is_stale():
    steps, _ = computed()
    steps.computed(CallKey("graph", 0, (None, 2, 2), 0, ()), ["all"], Position(4), RECOMPUTE)
    assert steps.is_stale(KEY, ALL, 5)


@pytest.mark.parametrize("forget", [ComputedSteps.clear, ComputedSteps.drop_values, lambda s: s.drop(KEY)])
def test_what_is_forgotten_was_never_computed(forget):
    steps, store = computed()
    forget(steps)
    assert store.get(KEY, ["all/x"]) is None
    assert not steps.at(KEY, 2)
    assert not steps.steps(KEY, "all")
