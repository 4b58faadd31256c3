"""What a person waits for, by a clock that the test turns."""

from __future__ import annotations

import pytest

from vdcache.policies import Plan
from vdcache.policies.plan import RECOMPUTE
from vdcache.runtime import run_times
from vdcache.runtime.history import Record
from vdcache.runtime.run_times import RunTimes


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_times.time, "perf_counter", lambda: now[0])

    def pass_(seconds):
        now[0] += seconds

    return pass_


def forward(times, clock, seconds, inside, generation, compiles=False):
    began = times.begin()
    clock(seconds)
    times.inside, times.compiles = inside, compiles
    times.end(began, generation)


def records(*seconds, reused=()):
    return [
        Record(0, i, 0, None, Plan.of(["all"]) if i in reused else RECOMPUTE, ("all/a",) if i in reused else (), seconds=s)
        for i, s in enumerate(seconds)
    ]


def test_the_first_result_ends_the_first_generation(clock):
    times = RunTimes()
    forward(times, clock, 10.0, 2.0, 0, compiles=True)
    clock(1.0)
    forward(times, clock, 2.0, 2.0, 0)
    clock(50.0)
    forward(times, clock, 4.0, 1.0, 1, compiles=True)
    assert (times.first_result, times.compiling) == (13.0, 11.0)
    assert times.lines(records(1.0)) == ["first result after 13.00 s; tracing and compiling took 11.00 s"]


@pytest.mark.parametrize(
    ("eager", "now", "said"),
    [
        (3.0, (1.0, 0.5, 1.0), "pays from 3 generations"),  # 2 computed calls of 2 s less win 11 s back in 2.75
        (1.0, (1.0, 0.5, 1.0), "wins nothing"),
        (0.5, (1.0, 0.5, 1.0), "wins nothing"),
    ],
)
def test_break_even(eager, now, said, clock):
    times = RunTimes()
    times.compiling = 11.0
    times.ran_eagerly(records(eager, 0.1, eager, reused=(1,)))
    (line,) = times.lines(records(*now, reused=(1,)))
    assert said in line and f"a computed call took {1e3 * eager:.1f} ms eagerly, 1000.0 ms compiled" in line
