"""What a reuse call costs the host, counted in Python calls, which do not depend on the machine."""

from __future__ import annotations

import sys

import pytest
import torch

import vdcache
from vdcache.backends.program import Program
from vdcache.testing import TinyDiT, latent, time_of

WORDS = latent(9, 1, 3, 4)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def python_calls(monkeypatch):
    """How many Python functions every call of a graph has called, the variant's own left out."""
    found, real = [], Program.__call__

    def call(self, *inputs):
        count = 0

        def each(frame, event, argument):
            nonlocal count
            count += event == "call" and "vdcache" in frame.f_code.co_filename

        sys.setprofile(each)
        try:
            return real(self, *inputs)
        finally:
            sys.setprofile(None)
            found.append(count)

    monkeypatch.setattr(Program, "__call__", call)
    return found


@torch.no_grad()
@pytest.mark.parametrize(("says", "most"), [(True, 86), (False, 128)])
def test_a_reuse_call_makes_few_python_calls(says, most, python_calls):
    """83 where the caller says the step, 124 where the step is told by the timestep; once they were 120 and 170."""
    model = vdcache.compile(TinyDiT(), vdcache.methods.adacache([(1e9, 100)]), num_steps=12, inner="eager")
    if says:
        model.vdcache.begin()
    for step in range(8):
        if says:
            model.vdcache.step()
        model(latent(step), time_of(step), WORDS)
    assert not any(r.computed for r in model.vdcache.history.records[3:])
    assert max(python_calls[3:]) <= most, python_calls
