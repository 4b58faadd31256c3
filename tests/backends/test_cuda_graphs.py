"""CUDA graphs, simulated: every replay writes over whatever any replay has returned before."""

from __future__ import annotations

import pytest
import torch

import vdcache
from vdcache.backends import variants
from vdcache.backends.eager import run_eagerly
from vdcache.backends.inductor import on_one_device
from vdcache.passes import MarkBranches, MergeSlots
from vdcache.passes.predictors import LAST
from vdcache.predictors import Taylor
from vdcache.testing import TinyDiT, latent, time_of

STEPS, LANES = 8, 2


@pytest.fixture
def pool(monkeypatch):
    """In the place of Inductor: each graph returns its own static buffers, and a replay of any graph first poisons all of them."""
    torch._dynamo.reset()
    buffers, asked = [], []

    def compile_own(graph, inputs, options, static):
        asked.append(options.get("triton.cudagraphs"))
        run, own = run_eagerly(graph), []

        def replay(*given):
            results = run(*given)
            for buffer in buffers:
                buffer.fill_(torch.nan)
            if not own:
                own.extend(torch.empty_like(r) for r in results)
                buffers.extend(own)
            for buffer, result in zip(own, results, strict=True):
                buffer.copy_(result)
            return own

        return replay

    monkeypatch.setattr(variants, "compile_own", compile_own)
    yield asked
    torch._dynamo.reset()


def recipe(predictor):
    policy = vdcache.policies.EveryN(3)
    return vdcache.Recipe("kept", policy, (MarkBranches(), MergeSlots()), predictor=predictor)


@torch.no_grad()
def solve(model):
    """Guidance of two lanes, and a solver of two steps (Adams-Bashforth): it keeps the result of the step before."""
    words = [latent(9 + lane, 1, 3, 4) for lane in range(LANES)]
    x, before = latent(0), None
    for step in range(STEPS):
        cond, uncond = (model(x, time_of(step), w) for w in words)
        now = uncond + 3 * (cond - uncond)
        kept = (cond, uncond)  # of the model, as they were returned
        slope = now if before is None else 1.5 * now - 0.5 * (before[1] + 3 * (before[0] - before[1]))
        x, before = x + 0.1 * slope, kept
    return x


def compiled(name, **options):
    return vdcache.compile(TinyDiT(), name, num_steps=STEPS, **options)


CASES = [recipe(LAST), recipe(Taylor(2)), "adacache-fast", "exact"]


@pytest.mark.parametrize("name", CASES, ids=lambda c: c if isinstance(c, str) else str(c.predictor))
def test_nothing_that_outlives_a_call_is_in_the_pool(name, pool):
    model = compiled(name, cuda_graphs=True)
    got = solve(model), solve(model)
    assert set(pool) == {True} and len(pool) > 1
    torch._dynamo.reset()
    plain = compiled(name, inner="eager")
    want = solve(plain), solve(plain)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert model.vdcache.history.computed_steps() == plain.vdcache.history.computed_steps()


def test_without_the_copies_the_simulation_finds_it(pool, monkeypatch):
    monkeypatch.setattr(variants, "out_of_pool", lambda run: run)
    assert solve(compiled(recipe(Taylor(2)), cuda_graphs=True)).isnan().any()


def test_numbers_of_the_host_move_to_the_device():
    """A graph with an input on the CPU is not recorded. The meta device stands for a GPU."""
    here, number, words = torch.ones(3), torch.tensor(2.0), torch.empty(2, device="meta")
    assert [t.device.type for t in on_one_device([number, here, words, 3])[:3]] == ["meta", "cpu", "meta"]
    assert on_one_device([number, here])[0] is number
