"""Pipelines that share something, and threads: nothing mixes."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch

import vdcache
from tests.pipelines.modes import cached, computed, due
from tests.pipelines.tiny import generator, made, sample
from vdcache.pipelines.pipeline_cache import applied_to
from vdcache.testing import TinyDiT, latent, time_of

pytest.importorskip("diffusers")
NAME = "CogVideoX"


def sharing(pipe):
    """Another pipeline of the same models, with a scheduler of its own."""
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    other = type(pipe)(**parts)
    other.set_progress_bar_config(disable=True)
    return other


def test_two_pipelines_that_share_a_transformer_interleaved():
    """Every step of the first one runs a whole call of the second."""
    first = made(NAME)
    second = sharing(first)
    plain = sample(first, NAME, 4, seed=2)
    cached(first, "every-2")
    assert torch.equal(sample(second, NAME, 4, seed=2), plain), "the other pipeline is left alone"
    cached(second, "every-3")
    want = sample(first, NAME, 5), sample(second, NAME, 4, seed=2)
    inner = []

    def nested(pipe, i, t, kwargs):
        inner.append(sample(second, NAME, 4, seed=2))
        return {}

    assert torch.equal(sample(first, NAME, 5, callback_on_step_end=nested), want[0])
    assert len(inner) == 5 and all(torch.equal(i, want[1]) for i in inner)
    assert computed(first) == [due(5)] and computed(second) == [due(4, 3)]
    vdcache.remove(first)
    assert torch.equal(sample(second, NAME, 4, seed=2), want[1])
    vdcache.remove(second)
    assert first.transformer.forward.__func__ is type(first.transformer).forward
    assert torch.equal(sample(second, NAME, 4, seed=2), plain)


def test_two_models_of_one_class_share_what_is_compiled_and_no_state():
    pipe = made("Wan 2.2")
    cached(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample(pipe, "Wan 2.2", 8)
    first, second = applied_to(pipe).denoisers.values()
    assert first._compiled is second._compiled and first.session is not second.session
    assert first.session.graphs == second.session.graphs
    assert first.session.store is not second.session.store


@pytest.mark.parametrize("shared", [False, True], ids=["own models", "one model"])
def test_threads(shared):
    """Three threads with a pipeline each, of other lengths, at once: also while things are compiled."""
    pipes = [made(NAME)]
    pipes += [sharing(pipes[0]) if shared else made(NAME) for _ in range(2)]
    steps = (4, 5, 7)
    want = [sample(cached(made(NAME)), NAME, n, seed=i) for i, n in enumerate(steps)]
    torch._dynamo.reset()
    for pipe in pipes:
        cached(pipe)
    got: list[list] = [[], [], []]
    errors: list[BaseException] = []
    together = threading.Barrier(3)

    def run(i):
        try:
            together.wait(timeout=60)
            for _ in range(3):
                got[i].append(sample(pipes[i], NAME, steps[i], seed=i))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for i, n in enumerate(steps):
        assert len(got[i]) == 3 and all(torch.equal(g, want[i]) for g in got[i])
        assert computed(pipes[i]) == [due(n)]


def test_copies_run_beside_the_original():
    pipe = cached(made(NAME))
    want = sample(pipe, NAME, 5)
    other = copy.deepcopy(pipe)
    inner = []

    def nested(pipe, i, t, kwargs):
        inner.append(sample(other, NAME, 3, seed=1))
        return {}

    assert torch.equal(sample(pipe, NAME, 5, callback_on_step_end=nested), want)
    assert len(inner) == 5 and all(torch.equal(i, inner[0]) for i in inner)


def test_lanes_whose_inputs_are_built_afresh():
    """Every lane gets new tensors for latent and timestep, a latent of its own, and a timestep a token (as Cosmos and Wan 2.2 do)."""
    from vdcache import Session  # noqa: F401

    model = TinyDiT(1)
    fast = vdcache.compile(model, "every-2", num_steps=5, inner="eager")
    with torch.no_grad():
        fast.vdcache.begin(5)
        for step in range(5):
            fast.vdcache.step()
            for lane in ("cond", "uncond"):
                fast.vdcache.lane(lane)
                x = latent(step + (100 if lane == "cond" else 0), 1, 6, 4)
                fast(x.clone(), time_of(step).clone(), latent(7, 1, 3, 4))
    assert fast.vdcache.history.computed_steps() == due(5)
    pipe = cached(made("Wan 2.2 TI2V"))
    sample(pipe, "Wan 2.2 TI2V", 5, generator=generator(3))
    assert computed(pipe) == [due(5)]


def test_offloading_that_replaces_parameters_makes_no_new_model():
    """Weights are other objects at every step, in the middle of a generation."""
    pipe = cached(made(NAME))
    want = sample(pipe, NAME, 5)

    def replaced(pipe, i, t, kwargs):
        for module in pipe.transformer.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(p.detach().clone(), requires_grad=False)
        return {}

    assert torch.equal(sample(pipe, NAME, 5, callback_on_step_end=replaced), want)
    assert computed(pipe) == [due(5)]
