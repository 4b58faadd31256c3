"""Random histories of calls against a machine that knows the truth (`tests.support.histories`), and lanes that come and go."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import vdcache
from tests.support.histories import Machine, histories
from tests.support.thorough import examples
from vdcache.testing import TinyDiT, latent, time_of


def test_nothing_is_stale_whatever_happens_and_reuse_happens_where_it_may():
    """Thousands of them run under `make thorough`."""
    may: Counter[str] = Counter()
    did: Counter[str] = Counter()
    for machine in histories(examples(40, 20)):
        assert not machine.stale, "\n".join(machine.stale)
        may += machine.may
        did += machine.did
    assert {kind: did[kind] / n for kind, n in may.items() if did[kind] < 0.95 * n} == {}


@pytest.mark.parametrize("move", sorted(Machine(0, []).moves()))
def test_every_move_by_itself(move, both):
    machine = Machine(7, both)
    with torch.no_grad():
        for truth in both:
            machine.moves()[move](truth)
    assert not machine.stale, "\n".join(machine.stale)


@pytest.fixture(scope="module")
def both():
    from tests.support.histories import handles

    return handles()


@torch.no_grad()
def test_a_lane_that_missed_a_generations_first_step_gets_nothing_of_the_last_generation():
    torch._dynamo.reset()
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-4", num_steps=6, inner="eager")
    session = compiled.vdcache
    for generation, lanes in enumerate((("a", "b"), ("a",))):
        session.begin(6)
        session.step()
        for lane in lanes:
            session.lane(lane)
            compiled(latent(generation), time_of(0), latent(9))
    session.step()
    for lane, computed in (("a", False), ("b", True)):
        session.lane(lane)
        call = (latent(5), time_of(1), latent(9))
        assert torch.equal(compiled(*call), model(*call)) == computed
    assert session.history[-1].why == "nothing is stored for this lane"
