"""The rivals' solvers: Euler is the demo's sampler, and all of them solve the same equation."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from bench import solvers
from bench.profilingdit import psnr_of
from bench.solvers import SOLVERS, converged, generate, in_two_lanes
from vdcache.demo.conditions import Condition
from vdcache.demo.model import DemoConfig, DemoDiT
from vdcache.demo.run import CONDITIONS
from vdcache.demo.sampler import sample


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DemoDiT(DemoConfig(num_layers=1)).eval().requires_grad_(False)


def gaussian(x, timestep, text):
    """The exact velocity where videos are Gaussian noise of deviation 1/2: cheap, and not straight."""
    sigma, x = timestep[0] / 1000, x[:, :3]
    keep = 0.25 * (1 - sigma) / (0.25 * (1 - sigma) ** 2 + sigma**2)
    return (x - keep * x) / sigma


def test_euler_is_the_demo_sampler(model):
    ours = generate(model, [*CONDITIONS, Condition()], steps=3, seed=7)
    assert torch.equal(ours[:4], sample(model, CONDITIONS, steps=3, seed=7))
    assert torch.equal(ours[4:], sample(model, [Condition()], steps=3, seed=8))


def test_all_solvers_reach_the_exact_solution():
    exact = 0.5 * torch.randn(1, 3, 8, 24, 24, generator=torch.Generator().manual_seed(0))
    errors = {}
    for solver in SOLVERS:
        at = [psnr_of(generate(gaussian, [Condition()], solver=solver, steps=n), exact)[0][0] for n in (10, 100, 300)]
        assert at[0] < at[1] < at[2] and at[2] > 45, (solver, at)
        errors[solver] = at[0]
    assert errors["dpm++2m"] > errors["euler"] + 6, "the second order must show"


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_network_is_asked_at_the_same_timesteps(solver):
    asked = []

    def velocity(x, timestep, text):
        asked.append(float(timestep[0]))
        return gaussian(x, timestep, text)

    videos = generate(velocity, [Condition()], solver=solver, steps=8)
    assert asked == [1000, 875, 750, 625, 500, 375, 250, 125] and videos.isfinite().all()


def test_begin_comes_before_each_batch_and_lanes_are_told(model):
    begun, lanes = [], []
    one = generate(model, [Condition()] * 5, steps=2, begin=begun.append)
    two = generate(in_two_lanes(model, lanes.append), [Condition()] * 5, steps=2)
    assert begun == [2, 2] and lanes == ["cond", "uncond"] * 4
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match=r"solver must be one of euler, dpm\+\+2m, unipc; got 'heun'"):
        generate(gaussian, [Condition()], solver="heun")


def test_the_converged_solution_is_kept_by_weights_conditions_and_seed(model, monkeypatch, tmp_path):
    monkeypatch.setattr(solvers, "CONVERGED", ("dpm++2m", 2))
    monkeypatch.setattr(solvers.tempfile, "gettempdir", lambda: str(tmp_path))
    first = converged(model, [Condition()], 0)
    monkeypatch.setattr(solvers, "generate", lambda *args, **kwargs: torch.zeros(1))
    assert torch.equal(converged(model, [Condition()], 0), first)
    assert converged(model, [Condition()], 1).numel() == 1
    assert converged(model, [Condition("cross")], 0).numel() == 1
    model.proj_out.bias += 1
    assert converged(model, [Condition()], 0).numel() == 1
    assert len(list((tmp_path / "vdcache-converged").iterdir())) == 4
