"""The step tracker alone: what a call shows of its place in the run, and where it is put."""

from __future__ import annotations

from vdcache.runtime import Reading, StepTracker


def read(*values, form=(1, 4, 4), coarse=False):
    return Reading((tuple(map(float, values)),), coarse, (form, "float32", "cpu"))


def run(tracker, *readings, repeated=True, last=False):
    """(generation, step, lane) of every call; by default what shares a timestep has another latent."""
    ticks = [tracker.tick(r, lambda: repeated, last) for r in readings]
    return [(t.generation, t.step, t.lane) for t in ticks]


def test_steps_and_a_jump_back():
    assert run(StepTracker(), read(9), read(8), read(7), read(9), read(8)) == [
        (0, 0, 0),
        (0, 1, 0),
        (0, 2, 0),
        (1, 0, 0),
        (1, 1, 0),
    ]


def test_another_shape_is_another_generation():
    """Also where the timestep goes on: values never cross shapes."""
    tracker = StepTracker()
    assert run(tracker, read(9), read(8), read(7, form=(1, 8, 8)), read(6, form=(1, 8, 8))) == [
        (0, 0, 0),
        (0, 1, 0),
        (1, 0, 0),
        (1, 1, 0),
    ]


def test_lanes_have_one_latent():
    assert run(StepTracker(), read(9), read(9), read(9), repeated=False) == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]


def test_windows_repeat_the_first_timestep_and_solvers_of_second_order_do_not():
    windows = StepTracker()
    assert run(windows, read(9), read(9), read(8), read(8)) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert run(StepTracker(), read(9), read(8), read(8), read(7), read(7))[-4:] == [(0, 1, 0), (0, 2, 0), (0, 3, 0), (0, 4, 0)]


def test_what_repeats_the_first_timestep_is_said():
    tracker = StepTracker()
    assert [tracker.tick(read(t), lambda: True).repeated for t in (9, 9, 8, 8)] == [False, True, False, True]
    solver = StepTracker()
    assert not any(solver.tick(read(t), lambda: True).repeated for t in (9, 8, 8, 7, 7))


def test_timesteps_of_16_bits_collide_also_the_first_two():
    """Each is a step; until the timestep changes nobody knows whether they are windows, and that is said."""
    tracker = StepTracker()
    ticks = [tracker.tick(read(t, coarse=True), lambda: True) for t in (9, 9, 8, 7)]
    assert [(t.step, t.repeated) for t in ticks] == [(0, False), (1, True), (2, False), (3, False)]


def test_after_the_last_step_a_repeated_timestep_begins_anew():
    tracker = StepTracker()
    run(tracker, read(9), read(8))
    assert run(tracker, read(8), last=True) == [(1, 0, 0)]


def test_rising_runs_and_falling_ones_in_turn():
    """From an end of the range there is one way to go."""
    tracker = StepTracker()
    run(tracker, read(7), read(8), read(9))
    assert run(tracker, read(9), last=True) == [(1, 0, 0)]
    assert run(tracker, read(8), read(7)) == [(1, 1, 0), (1, 2, 0)]
    assert run(tracker, read(7), last=True) == [(2, 0, 0)]
    assert run(tracker, read(8), read(9)) == [(2, 1, 0), (2, 2, 0)]


def test_a_wrong_guess_of_the_direction_is_made_once():
    tracker = StepTracker()
    run(tracker, read(9), read(8), read(7))
    assert run(tracker, read(7.5), read(8), read(8.5), read(9)) == [(1, 0, 0), (2, 0, 0), (2, 1, 0), (2, 2, 0)]


def test_samples_of_a_batch_that_go_different_ways_begin_anew():
    tracker = StepTracker()
    ticks = [tracker.tick(read(*t), lambda: True) for t in ((9, 5), (8, 4), (7, 9), (6, 8))]
    assert [(t.generation, t.step) for t in ticks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [t.mixed for t in ticks] == [False, False, True, False]


def test_a_sample_more_or_less_is_no_new_generation():
    tracker = StepTracker()
    readings = read(9, 9, form=(2, 4, 4)), read(8, 8, form=(2, 4, 4)), read(7), read(9, 9, form=(2, 4, 4))
    assert run(tracker, *readings) == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0)]


def test_the_direction_is_that_of_the_generation_before():
    """The second step of a generation cannot tell alone whether it goes on or jumps back."""
    assert run(StepTracker(), read(9), read(8), read(9), read(8), read(9), read(7))[-3:] == [(1, 1, 0), (2, 0, 0), (2, 1, 0)]
    assert run(StepTracker(), read(1), read(2), read(1), read(2)) == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    aborted = StepTracker()
    assert run(aborted, read(9), read(8), read(9), read(9.5))[-1] == (2, 0, 0), "one step only, then another run"
