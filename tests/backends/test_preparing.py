"""No compilation in the middle of a denoising loop: what later steps may reuse is compiled with a generation's first step."""

from __future__ import annotations

import pytest
import torch

import vdcache
from vdcache.backends.variants import VariantCompiler
from vdcache.policies import EveryN
from vdcache.testing import TinyDiT, latent, time_of

WORDS = latent(9, 1, 3, 4)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled_at(monkeypatch):
    """Generation and step of every graph that is compiled, in order."""
    now, found = [(0, 0)], []
    real = VariantCompiler.compile

    def compile(self, graph, inputs):
        found.append(now[0])
        return real(self, graph, inputs)

    monkeypatch.setattr(VariantCompiler, "compile", compile)

    def at(generation, step):
        now[0] = (generation, step)

    at.found = found
    return at


def run(model, at, number, steps, tokens=6, *, begins=False):
    if begins:
        model.vdcache.begin(steps)
    for step in range(steps):
        at(number, step)
        if begins:
            model.vdcache.step()
        model(latent(10 * number + step, 1, tokens, 4), time_of(step), WORDS)


@torch.no_grad()
@pytest.mark.parametrize("begins", [True, False])
def test_a_generation_compiles_with_its_first_step(compiled_at, begins):
    model = vdcache.compile(TinyDiT(1), "every-2", num_steps=4, inner="eager")
    for number in range(2):
        run(model, compiled_at, number, 4, begins=begins)
    assert compiled_at.found == [(0, 0), (0, 0)], "what computes, then what reuses"
    assert model.vdcache.history.computed_steps() == [0, 2, 3]


@torch.no_grad()
def test_every_plan_of_a_recipe(compiled_at):
    model = vdcache.compile(TinyDiT(4), vdcache.methods.delta_dit(2), num_steps=8, inner="eager")
    run(model, compiled_at, 0, 8)
    plans = {record.plan for record in model.vdcache.history}
    assert len(plans) == 3 and compiled_at.found == [(0, 0)] * 3


@torch.no_grad()
def test_what_probes(compiled_at):
    """A graph that is split at its probe: the head, what computes, what reuses."""
    model = vdcache.compile(TinyDiT(4), vdcache.methods.dbcache(1, 0, 1e9, warm_up=1), num_steps=6, inner="eager")
    run(model, compiled_at, 0, 6)
    assert any(record.reused for record in model.vdcache.history)
    assert compiled_at.found == [(0, 0)] * 3


@torch.no_grad()
def test_nothing_is_compiled_ahead_while_the_number_of_steps_is_learnt(compiled_at):
    model = vdcache.compile(TinyDiT(1), "every-2", inner="eager")
    for number in range(2):
        run(model, compiled_at, number, 4)
    assert compiled_at.found == [(0, 0), (1, 0)]


@torch.no_grad()
def test_a_generation_of_one_step_compiles_nothing_for_others(compiled_at):
    model = vdcache.compile(TinyDiT(1), "every-2", inner="eager")
    for number in range(2):
        run(model, compiled_at, number, 1, begins=True)
    assert compiled_at.found == [(0, 0)]


@torch.no_grad()
def test_a_session_that_follows_another_policy_compiles_with_its_next_call(compiled_at):
    model = vdcache.compile(TinyDiT(1), "every-2", num_steps=6, inner="eager")
    model.vdcache.prepare, model.vdcache.policy = None, vdcache.policies.Always()
    run(model, compiled_at, 0, 6)
    model.vdcache.follow(EveryN(2))
    run(model, compiled_at, 1, 6)
    assert compiled_at.found == [(0, 0), (1, 0)]


@torch.no_grad()
def test_a_graph_that_is_compiled_for_each_size(compiled_at, monkeypatch):
    """Where the graph for all sizes would take a guard that nobody checks: each size is compiled with the first step that has it."""
    monkeypatch.setattr(VariantCompiler, "compile_later", lambda self, graph, more: None)
    model = vdcache.compile(TinyDiT(1), "every-2", num_steps=4, dynamic=True, inner="eager")
    for number, tokens in enumerate((6, 9, 6)):
        run(model, compiled_at, number, 4, tokens, begins=True)
        assert model.vdcache.history.computed_steps() == [0, 2, 3]
    assert compiled_at.found == [(0, 0), (0, 0), (1, 0)], "what computes for all sizes, what reuses for each"


@torch.no_grad()
def test_after_warm_up_nothing_is_compiled(compiled_at):
    model = vdcache.compile(TinyDiT(1), "every-2", inner="eager")
    run(model, compiled_at, 0, 1)
    model.vdcache.warm_up()
    assert compiled_at.found == [(0, 0)] * 2
    model.vdcache.reset()
    for number in range(1, 3):
        run(model, compiled_at, number, 4)
    assert len(compiled_at.found) == 2 and model.vdcache.history.computed_steps() == [0, 2, 3]
