"""The clock alone: what a call shows of its place in the run, and where it is put."""

from __future__ import annotations

import pytest

from vdcache.runtime import Clock, Reading


def read(value, form="4x4", coarse=False):
    return Reading(((float(value),),), coarse, form)


def run(clock, *readings, same=False):
    """(generation, step, lane) of every call."""
    ticks = [clock.tick(r, lambda: same) for r in readings]
    return [(t.generation, t.step, t.lane) for t in ticks]


def test_steps_and_a_jump_back():
    assert run(Clock(), read(9), read(8), read(7), read(9), read(8)) == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0), (1, 1, 0)]


def test_another_shape_is_another_generation():
    """Also where the timestep goes on: values never cross shapes."""
    clock = Clock()
    assert run(clock, read(9), read(8), read(7, form="8x8"), read(6, form="8x8")) == [
        (0, 0, 0),
        (0, 1, 0),
        (1, 0, 0),
        (1, 1, 0),
    ]


def test_lanes_have_one_latent():
    assert run(Clock(), read(9), read(9), read(9), same=True) == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]


@pytest.mark.parametrize(("coarse", "placed"), [(False, (1, 0, 0)), (True, (0, 1, 0))])
def test_the_first_value_again_with_another_latent(coarse, placed):
    """A restart; a further step where timesteps are of 16 bits, which collide."""
    assert run(Clock(), read(9, coarse=coarse), read(9, coarse=coarse))[1] == placed


def test_a_later_value_again_is_a_further_step():
    assert run(Clock(), read(9), read(8), read(8))[-1] == (0, 2, 0)


def test_the_direction_is_that_of_the_generation_before():
    """The second step of a generation cannot tell alone whether it goes on or jumps back."""
    assert run(Clock(), read(9), read(8), read(9), read(8), read(9), read(7))[-3:] == [(1, 1, 0), (2, 0, 0), (2, 1, 0)]
    assert run(Clock(), read(1), read(2), read(1), read(2)) == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    aborted = Clock()
    assert run(aborted, read(9), read(8), read(9), read(9.5))[-1] == (2, 0, 0), "one step only, then another run"
