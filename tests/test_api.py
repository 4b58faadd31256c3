"""`vdcache.compile` and the handle that it returns: what it takes, what copies of it are."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import vdcache
from tests.support.thorough import some
from vdcache.testing import TinyDiT, latent, time_of

STEPS = 6
DUE = [0, 2, 4, 5]


def words():
    return latent(9, 1, 3, 4)


@torch.no_grad()
def outputs(model, seed=0):
    """One generation."""
    return [model(latent(10 * seed + step), time_of(step), words()) for step in range(STEPS)]


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "file": through_a_file,
}


@pytest.mark.parametrize(
    ("how", "used"),
    some(((how, used) for how in COPIES for used in (False, True)), lambda case: case[1] or case[0] == "deepcopy"),
)
def test_a_copy_is_a_cached_model_with_its_own_session(how, used):
    """A used one could neither be copied nor saved, and a new one lost its session."""
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-2", num_steps=STEPS, inner="eager")
    before = outputs(compiled)[:3] if used else []
    other = COPIES[how](compiled)
    assert isinstance(other, type(compiled)) and other.vdcache is not compiled.vdcache
    assert len(other.vdcache.history) == 0 and other.vdcache.store.bytes() == 0
    assert (other._orig_mod is model) == (how == "copy")
    # They alternate in one generation: no value of one may reach the other.
    mine, own = [], []
    with torch.no_grad():
        for step in range(STEPS):
            mine.append(compiled(latent(step), time_of(step), words()))
            own.append(other(latent(100 + step), time_of(step), words()))
    assert other.vdcache.history.computed_steps() == compiled.vdcache.history.computed_steps() == DUE
    again = vdcache.compile(model, "every-2", num_steps=STEPS, inner="eager")
    assert all(map(torch.equal, mine, outputs(again))) and all(map(torch.equal, own, outputs(again, seed=10)))
    assert all(map(torch.equal, before, mine))


def test_copies_of_a_copy_and_of_what_holds_it():
    compiled = vdcache.compile(TinyDiT(1), "every-2", num_steps=STEPS, inner="eager")
    outputs(compiled)
    held = copy.deepcopy(torch.nn.ModuleDict({"a": compiled, "b": compiled}))
    assert held["a"] is held["b"] and held["a"].vdcache is not compiled.vdcache
    other = copy.deepcopy(held["a"])
    outputs(other)
    assert other.vdcache.history.computed_steps() == DUE and len(held["a"].vdcache.history) == 0


def test_copies_of_the_string_backend():
    model = torch.compile(TinyDiT(1), backend="vdcache", options={"recipe": "every-2", "num_steps": STEPS, "inner": "eager"})
    outputs(model)
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with vdcache.record() as history:
        outputs(other)
    assert history.computed_steps() == DUE


class Pipe:
    """What every diffusers pipeline has; a call of it is a whole generation."""

    def __init__(self):
        self.components = {"transformer": TinyDiT(1)}

    def progress_bar(self, iterable=None, total=None):
        return iterable

    def __call__(self):
        return None


@pytest.mark.parametrize("what", ["compile", "explain", "export", "profile", "calibrate", "search_schedule"])
def test_a_whole_pipeline_is_told_of_apply(what):
    """It was accepted, and then no slot was found in it."""
    given = {"export": {"schedule": [0], "path": "p"}, "profile": {"run": 1}, "calibrate": {"run": 1}}
    given["search_schedule"] = {"run": 1, "speedup": 2.0}
    with pytest.raises(
        vdcache.errors.ConfigError, match=rf"{what} takes one model, and this Pipe is a whole pipeline: vdcache\.apply\("
    ):
        getattr(vdcache, what)(Pipe(), **given.get(what, {}))
