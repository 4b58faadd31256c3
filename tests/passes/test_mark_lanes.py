"""Lanes as scope: one lane of guidance predicted from the other, in a batch of both and in two calls."""

from __future__ import annotations

import pytest
import torch

import vdcache
from tests.support.thorough import some
from tests.zoo import ZOO, build
from vdcache import Recipe
from vdcache.errors import ConfigError
from vdcache.ir.ops import is_work
from vdcache.passes import MarkLanes
from vdcache.passes.predictors import Frequencies, StepInfo
from vdcache.policies import EveryNth, Plan, SchedulePolicy
from vdcache.testing import TinyDiT, latent, time_of

STEPS = 7


def recipe(n=3, **options):
    return Recipe("lanes", SchedulePolicy(EveryNth(n), ("lane",)), (MarkLanes(**options),))


def both(x):
    return torch.cat([x, x])


def texts():
    return torch.cat([latent(1, 1, 3, 4), latent(2, 1, 3, 4)])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.mark.parametrize("predicted", ["first", "second"])
def test_a_lane_is_its_difference_to_the_other(predicted):
    model = TinyDiT(blocks=2)
    fast = vdcache.compile(model, recipe(predicted=predicted), num_steps=STEPS, inner="eager", strict=True)
    for step in range(STEPS):
        given = both(latent(step)), both(time_of(step)), texts()
        want = model(*given)
        out = fast(*given)
        own, other = (0, 1) if predicted == "first" else (1, 0)
        if step % 3 == 0:
            kept = want[own] - want[other]
            assert torch.equal(out, want)
        else:
            torch.testing.assert_close(out[other], want[other], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(out[own], want[other] + kept, rtol=1e-5, atol=1e-6)
    assert fast.vdcache.history.computed_steps() == [0, 3, 6]
    (graph,) = fast.vdcache.graphs
    assert fast.vdcache.store.peak_bytes == graph.variants.cache_bytes() == latent(0).numel() * 4


def test_two_calls_are_one_batch():
    model = TinyDiT(blocks=2)
    batch = vdcache.compile(model, recipe(predicted="second", mode="batch"), num_steps=STEPS, inner="eager")
    calls = vdcache.compile(model, recipe(mode="calls"), num_steps=STEPS, inner="eager")
    for _ in range(2):
        for step in range(STEPS):
            x, t, text = latent(step), time_of(step), texts()
            want = batch(both(x), both(t), text)
            got = torch.cat([calls(x, t, text[:1]), calls(x, t, text[1:])])
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    reused = [(r.step, r.lane) for r in calls.vdcache.history.generation() if r.reused]
    assert reused == [(s, 1) for s in range(STEPS) if s % 3]


def test_the_reference_is_not_what_the_caller_wrote_into():
    """A pipeline may work on the first lane's result before it asks for the second."""
    model = TinyDiT(blocks=2)
    fast = vdcache.compile(model, recipe(mode="calls"), num_steps=STEPS, inner="eager")
    for step in range(2):
        x, t, text = latent(step), time_of(step), texts()
        fast(x, t, text[:1]).mul_(100)
        assert torch.equal(fast(x, t, text[1:]), model(x, t, text[1:]))


def test_two_prompts_are_no_lanes():
    model = TinyDiT(blocks=2)
    fast = vdcache.compile(model, recipe(), num_steps=STEPS, inner="eager")
    with pytest.warns(vdcache.VdcacheWarning, match="the two halves of this batch are no lanes: their latents differ"):
        for step in range(STEPS):
            given = torch.cat([latent(step), latent(step + 50)]), both(time_of(step)), texts()
            assert torch.equal(fast(*given), model(*given))
    assert fast.vdcache.history.computed_steps() == list(range(STEPS))


PUBLISHED = ["wan", "latte", "cogvideox", "pixart", "sd3", "flux", "hunyuan_video", "ltx", "sana", "dit"]


@pytest.mark.parametrize("name", some(PUBLISHED, {"wan", "latte", "cogvideox", "flux"}.__contains__))
def test_half_of_a_real_model(name):
    """The lane that is computed is what the model gives for it, and the variant holds half of the work; or the refusal says why not."""
    if name not in ZOO:
        pytest.skip("another name in the zoo")
    model, case = build(name), ZOO[name]

    def doubled(step):
        def one(x):
            first = case.call(step, 6)["hidden_states"].shape[0] if "hidden_states" in case.call(step, 6) else 1
            return both(x) if isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == first else x

        return {k: one(v) for k, v in case.call(step, 6).items()}

    fast = vdcache.compile(model, recipe(predicted="second"), num_steps=4, inner="eager")
    for step in range(2):
        out, want = fast(**doubled(step)), model(**doubled(step))
        out, want = (o[0] if isinstance(o, (tuple, list)) else getattr(o, "sample", o) for o in (out, want))
        torch.testing.assert_close(out[: len(out) // 2], want[: len(want) // 2], rtol=1e-4, atol=1e-5)
    (graph,) = fast.vdcache.graphs
    if not graph.slots:
        assert any("batch" in str(r) for r in graph.guarded.refusals)
        return
    assert fast.vdcache.history[-1].reused == ("lane/output",)
    assert graph.variants.flops(Plan.of(["lane"])) == pytest.approx(graph.variants.flops(Plan()) / 2, rel=0.02)


def test_half_of_the_work_is_gone():
    model = TinyDiT(blocks=2)
    fast = vdcache.compile(model, recipe(), num_steps=STEPS, inner="eager")
    for step in range(2):
        fast(both(latent(step)), both(time_of(step)), texts())
    (graph,) = fast.vdcache.graphs
    half = graph.variants[Plan.of(["lane"])].graph
    assert {n.meta["val"].shape[0] for n in half.graph.nodes if is_work(n)} <= {1, 2, 6}
    assert graph.variants.flops(Plan.of(["lane"])) * 2 == graph.variants.flops(Plan())


def test_what_mixes_a_batch_is_refused():
    class Mixing(TinyDiT):
        def forward(self, x, timestep, text):
            out = super().forward(x, timestep, text)
            return out - out.mean(0, keepdim=True)

    fast = vdcache.compile(Mixing(blocks=1), recipe(mode="batch"), num_steps=STEPS, inner="eager", strict=True)
    with pytest.raises(vdcache.errors.CaptureError, match="mixes the samples of a batch"):
        fast(both(latent(0)), both(time_of(0)), texts())


def test_an_odd_batch_is_no_two_lanes():
    fast = vdcache.compile(TinyDiT(blocks=1), recipe(mode="batch"), num_steps=STEPS, inner="eager", strict=True)
    with pytest.raises(vdcache.errors.CaptureError, match="a batch of two lanes is even, and this one is 1"):
        fast(latent(0), time_of(0), latent(1, 1, 3, 4))


def test_attention_and_lane_together():
    """A variant that computes one lane alone keeps what it computes of it, and leaves the rest of what is kept as it was."""
    from vdcache.demo.model import DemoConfig, DemoDiT, with_positions

    torch.manual_seed(0)
    model = DemoDiT(DemoConfig(num_layers=2)).eval().requires_grad_(False)
    made = vdcache.methods.fastercache("open-sora", predicted="second")
    fast = vdcache.compile(model, made, num_steps=30, inner="eager")
    seen = set()
    for step in range(30):
        x = with_positions(both(0.1 * step * latent(7, 1, 3, 4, 8, 8) + latent(8, 1, 3, 4, 8, 8)))
        given = x, torch.full((2,), 1000.0 - 30 * step), latent(9, 2, 5, 32)
        out = fast(*given)
        torch.testing.assert_close(out, model(*given), rtol=0.3, atol=0.3)
        seen.add(str(Plan.of(s.partition("/")[0] for s in fast.vdcache.history[-1].reused)))
    assert seen == {"recompute", "reuse{attention}", "reuse{lane}", "reuse{attention,lane}"}


def test_frequencies_are_those_of_the_transform():
    x = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(0))
    when = StepInfo(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(9.0))
    got = Frequencies((1.2, 8, 20), (1.1, 0, 8)).predict([x], when)  # low in steps 8 and 9, high in 7 and 8
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1))
    y, z = torch.arange(7) - 3, torch.arange(6) - 3
    low = y[:, None] ** 2 + z[None, :] ** 2 <= int(6 * 0.2) ** 2
    spectrum = torch.where(low, spectrum * 1.2**2, spectrum * 1.1**2)
    want = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode is 'auto', 'batch' or 'calls'; got 'both'"),
        ({"predicted": "uncond"}, "predicted is 'first' or 'second'; got 'uncond'"),
        ({"group": "a/b"}, "group is a name of letters, digits and dots; got 'a/b'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        MarkLanes(**options)


@pytest.mark.parametrize("weight", [(0, 1, 2), (1.0, 2), 1.1, ("a", 0, 1)])
def test_bad_weights(weight):
    with pytest.raises(ConfigError, match=r"low is \(weight above 0, first step, last step\); got"):
        Frequencies(low=weight)
