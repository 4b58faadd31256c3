"""inner="auto": the first of a known number of generations runs eagerly, and the others are compiled where that can pay."""

from __future__ import annotations

import re

import pytest
import torch

import vdcache
from vdcache.backends import program, variants
from vdcache.backends.eager import run_eagerly
from vdcache.testing import TinyDiT, latent, time_of

WORDS = latent(9, 1, 3, 4)
STEPS = 4


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def given_to_inductor(monkeypatch):
    """What Inductor is given, which runs eagerly in its place."""
    found = []

    def compile_own(graph, inputs, options, static):
        found.append(len(inputs))
        return run_eagerly(graph)

    monkeypatch.setattr(variants, "compile_own", compile_own)
    return found


def generation(model, number):
    outputs = []
    for step in range(STEPS):
        outputs.append(model(latent(10 * number + step), time_of(step), WORDS))
    return outputs


def printed(model):
    """The summary in one line: a table breaks its lines by its width."""
    return " ".join(str(model.vdcache.summary()).split())


@torch.no_grad()
@pytest.mark.parametrize(("generations", "at"), [(None, 0), (1, None), (3, 1)])
def test_when_inductor_is_asked(generations, at, given_to_inductor, monkeypatch):
    monkeypatch.setattr(program, "COMPILING", 0.0)  # it costs nothing, so it always pays where a generation is left
    model = vdcache.compile(TinyDiT(1), "every-2", num_steps=STEPS, inner="auto", generations=generations, outline=False)
    plain = vdcache.compile(model, "every-2", num_steps=STEPS, inner="eager")
    for number in range(3 if generations is None else generations):
        before = len(given_to_inductor)
        outputs = generation(model, number)
        asked = len(given_to_inductor) - before
        assert asked == (2 if number == at else 0), "what computes and what reuses, at once"
        assert all(map(torch.equal, outputs, generation(plain, number)))
        assert model.vdcache.history.computed_steps() == [0, 2, 3]


@torch.no_grad()
def test_what_cannot_pay_stays_eager(given_to_inductor, monkeypatch):
    monkeypatch.setattr(program, "COMPILING", 1e9)
    model = vdcache.compile(TinyDiT(1), "every-2", num_steps=STEPS, inner="auto", generations=3)
    for number in range(3):
        generation(model, number)
    assert not given_to_inductor
    assert "eagerly" not in printed(model)


@torch.no_grad()
def test_the_summary_says_what_was_measured(given_to_inductor, monkeypatch):
    monkeypatch.setattr(program, "COMPILING", 0.0)
    model = vdcache.compile(TinyDiT(1), "every-2", num_steps=STEPS, inner="auto", generations=2)
    generation(model, 0)
    said = re.search(r"first result after (\d+\.\d+) s; tracing and compiling took (\d+\.\d+) s", printed(model))
    assert said and 0 < float(said[2]) <= float(said[1])
    model.vdcache.times.first_result = 1.5
    generation(model, 1)
    assert "first result after 1.50 s" in printed(model), "of the first generation alone"
    assert re.search(r"eagerly, \d+\.\d ms compiled: it (pays from \d+ generations|wins nothing)", printed(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "auto", "generations": 0}, "generations, the number of runs of the denoising loop, is a whole number"),
        (
            {"inner": "inductor", "generations": 2},
            "generations tells inner='auto' whether compiling pays; got inner='inductor'",
        ),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(vdcache.errors.ConfigError, match=message):
        vdcache.compile(TinyDiT(1), "every-2", **options)
