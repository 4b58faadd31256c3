"""What a session is told, checked when it is told."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vdcache import compile
from vdcache.errors import ConfigError
from vdcache.policies.base import EveryN
from vdcache.runtime.session import Session
from vdcache.testing import TinyDiT


def begun() -> Session:
    session = Session(EveryN(2), 4)
    session.begin()
    return session


@pytest.mark.parametrize("steps", ["5", 5.0, True, 0, -1, [5], torch.tensor(5.0)], ids=repr)
def test_a_number_of_steps_is_one(steps):
    for tell in (
        begun().begin,
        lambda n: Session(EveryN(2), n),
        lambda n: compile(TinyDiT(), "every-2", num_steps=n, inner="eager"),
    ):
        with pytest.raises(ConfigError, match="num_steps is the number of denoising steps, at least 1; got "):
            tell(steps)


@pytest.mark.parametrize("steps", [5, np.int64(5), torch.tensor(5)], ids=repr)
def test_whole_numbers_of_any_kind_are_steps(steps):
    session = begun()
    session.begin(steps)
    assert session.num_steps == 5 and type(session.num_steps) is int
    assert type(compile(TinyDiT(), "every-2", num_steps=steps, inner="eager").vdcache.num_steps) is int


@pytest.mark.parametrize("timestep", ["x", "5", True, [1], math.nan, torch.zeros(3), np.zeros(2)], ids=repr)
def test_a_timestep_is_a_number(timestep):
    session = begun()
    with pytest.raises(
        ConfigError, match=r"session.step\(timestep\) takes where the step stands, one finite number or none; got"
    ):
        session.step(timestep)
    assert session.step_index == -1, "what was refused has not begun"
    session.step(900.0)
    assert session.step_index == 0


@pytest.mark.parametrize("timestep", [500, 500.0, np.float32(500), torch.tensor(500), torch.tensor([500.0])], ids=repr)
def test_timesteps_as_schedulers_have_them(timestep):
    session = begun()
    session.step(timestep)
    assert session._planner.timesteps == [500.0] and type(session._planner.timesteps[0]) is float


@pytest.mark.parametrize("lane", [None, 1.5, ["cond"]], ids=repr)
def test_a_lane_has_a_name_or_a_number(lane):
    with pytest.raises(ConfigError, match=r"session.lane\(name\) takes a name or a number"):
        begun().lane(lane)
