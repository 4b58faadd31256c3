"""The Wiener filter of SeaCache against the definition of the Fourier transform, and its way into a graph."""

from __future__ import annotations

import pytest
import torch

from tests.support.published_rules import sea_filter
from tests.zoo import ZOO, graph_of
from vdcache.ir import dialect
from vdcache.ir.capture import trace
from vdcache.passes import Canonicalise, Pipeline, Probe
from vdcache.passes.filters import FILTERS, wiener
from vdcache.testing import TinyDiT, latent, time_of, values_of

SIGMAS = (0.0, 1e-7, 0.1, 0.5, 0.9, 1.0)


def by_definition(x, sigma):
    """The filter of [B, C, T, H, W], channel by channel."""
    return torch.tensor([[sea_filter(channel, sigma) for channel in own] for own in x.tolist()], dtype=x.dtype)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("shape", [(1, 2, 3, 4, 5), (2, 1, 1, 4, 4), (1, 1, 2, 1, 3), (1, 3, 4, 2, 2)])
def test_wiener_is_its_definition(sigma, shape):
    """In float64; channels and samples are filtered alone. Where σ is 0 or 1 the clamp keeps everything finite."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = wiener(x, torch.tensor(sigma, dtype=torch.float64), (2, 3, 4))
    torch.testing.assert_close(got, by_definition(x, sigma), rtol=1e-9, atol=1e-9)
    assert got.dtype == x.dtype and got.shape == x.shape


@pytest.mark.parametrize("sigma", SIGMAS)
def test_wiener_in_single_precision(sigma):
    x = torch.randn(1, 2, 3, 6, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(wiener(x, torch.tensor(sigma), (2, 3, 4)), by_definition(x, sigma), rtol=1e-4, atol=1e-4)


def test_wiener_of_an_image_is_that_of_one_frame():
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64)
    sigma = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(wiener(x, sigma, (2, 3)), wiener(x[:, :, None], sigma, (2, 3, 4))[:, :, 0])


def test_noise_leaves_the_mean_and_a_clean_signal_stays():
    x = torch.randn(1, 1, 2, 4, 4, dtype=torch.float64)
    size = x.numel()  # gains have a mean of 1, so the one frequency that is left has the gain of all
    torch.testing.assert_close(
        wiener(x, torch.ones(()).double(), (2, 3, 4)), (x.mean() * size).expand_as(x), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(wiener(x, torch.zeros(()).double(), (2, 3, 4)), x, rtol=1e-5, atol=1e-5)


def test_filters_by_name():
    assert {"wiener": wiener} == FILTERS


# ---- in a graph ------------------------------------------------------------------------------------------------------


def probed(graph, at):
    return Pipeline((Canonicalise(), Probe(location=at, filter="wiener", reference_step="step")), verify=True).run(graph)


@pytest.mark.parametrize(("name", "grid"), [("wan", (3, 4, 4)), ("hunyuan_video", (3, 6, 6))])
@torch.no_grad()
def test_in_a_graph(name, grid):
    """Tokens go back into their grid; the noise level is the timestep / 1000."""
    graph, given = graph_of(name)
    plain, _ = Pipeline((Canonicalise(), Probe(location="modulated", reference_step="step"))).run(graph)
    (mark,) = dialect.probes(plain.graph)
    value = values_of(plain, given)[mark.args[0].name].float()
    found, _ = probed(graph, "modulated")
    (mark,) = dialect.probes(found.graph)
    got = values_of(found, given)[mark.args[0].name]

    sigma = float(ZOO[name].call(3, 6)["timestep"].max()) / 1000
    want = by_definition(value.unflatten(1, grid).movedim(-1, 1), sigma).movedim(1, -1).flatten(1, 3)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_timesteps_from_1_to_0_are_the_noise_level_themselves():
    """The same graph takes both scales: it is told apart by the value, not by the model."""

    tiny = TinyDiT(blocks=1)

    def model(x, t, text):
        return tiny(x.flatten(2).transpose(1, 2), t, text).transpose(1, 2).unflatten(2, (2, 2, 3))

    x, text = latent(0, 1, 4, 2, 2, 3), latent(9, 1, 3, 4)
    values = {}
    for t in (300.0, 0.3):
        graph = trace(model, x, torch.tensor([t]), text).graph
        found, steps = probed(graph, "input")
        assert not steps[-1].refusals
        (mark,) = dialect.probes(found.graph)
        values[t] = values_of(found, [x, torch.tensor([t]), text])[mark.args[0].name]
    assert torch.equal(values[300.0], values[0.3])
    torch.testing.assert_close(values[0.3], by_definition(x, 0.3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "args", "why"),
    [
        (TinyDiT, (latent(0), time_of(0), latent(9, 1, 3, 4)), "does not show the grid of its tokens"),
        (lambda: lambda x, w: x + x @ w, (latent(0, 1, 2, 4, 4), latent(1, 4, 4)), "no timestep was found"),
    ],
)
def test_refusals(make, args, why):
    graph = trace(make(), *args).graph
    found, steps = probed(graph, "input")
    assert not dialect.probes(found.graph) and why in str(*steps[-1].refusals)


def test_sizes_that_are_symbols_are_refused():
    graph = trace(TinyDiT(), latent(0), time_of(0), latent(9, 1, 3, 4), dynamic=True).graph
    _, steps = probed(graph, "modulated")
    assert "sizes that are known when the model is compiled" in str(*steps[-1].refusals)


@torch.no_grad()
def test_a_latent_whose_frames_come_before_its_channels():
    """CogVideoX takes [B, T, C, H, W]: the filter must run over frames, never over channels."""
    graph, given = graph_of("cogvideox")
    found, _ = probed(graph, "input")
    x, sigma = ZOO["cogvideox"].call(3, 6)["hidden_states"], float(ZOO["cogvideox"].call(3, 6)["timestep"].max()) / 1000
    want = by_definition(x.transpose(1, 2), sigma).transpose(1, 2)
    (mark,) = dialect.probes(found.graph)
    torch.testing.assert_close(values_of(found, given)[mark.args[0].name], want, rtol=1e-4, atol=1e-4)
