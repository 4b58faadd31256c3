"""On a GPU: the same results, and no wait for the device where none is needed."""

from __future__ import annotations

import pytest
import torch

import vdcache
from vdcache.testing import Reference, TinyDiT, latent, time_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: torch sees no GPU here"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_steps_follow_the_reference(inner):
    model = TinyDiT().cuda()
    compiled = vdcache.compile(model, "every-3", num_steps=6, inner=inner)
    reference = Reference(model, 3, 6)
    for step in range(6):
        x, words = latent(step).cuda(), latent(9, 1, 3, 4).cuda()
        for lane in range(2):
            out = compiled(x, time_of(step).cuda(), words + lane)
            want = reference.call(step, lane, x, time_of(step).cuda(), words + lane)
            torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_reuse_call_never_waits_under_explicit_control_and_once_through_the_bare_door():
    model = TinyDiT().cuda()
    compiled = vdcache.compile(model, vdcache.methods.adacache([(1e9, 3)]), num_steps=9, inner="eager")
    session = compiled.vdcache
    x, words = latent(0).cuda(), latent(9, 1, 3, 4).cuda()
    session.begin(9)
    for step in range(9):
        session.step()
        t = time_of(step).cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            compiled(x, t, words)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert any(r.reused for r in session.history)
    session.begin()
    for step in range(9):
        compiled(latent(step).cuda(), time_of(step).cuda(), words)
    assert max(r.syncs for r in session.history.generation()) == 1


@torch.no_grad()
def test_demo_runs(tmp_path):
    from vdcache.demo.run import run_demo

    rows = run_demo(tmp_path, rounds=1)
    assert {r.recipe for r in rows} >= {"eager", "torch.compile", "adacache-fast"}


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_predictions_take_their_times_from_the_host(inner):
    from tests.support.drift import Drift
    from vdcache.passes import MarkBranches, MergeSlots

    model = Drift(1).cuda()
    recipe = vdcache.Recipe(
        "line",
        vdcache.policies.SchedulePolicy(vdcache.policies.StepList((1, 3))),
        (MarkBranches(), MergeSlots()),
        predictor=vdcache.predictors.Taylor(1),
    )
    compiled = vdcache.compile(model, recipe, num_steps=6, inner=inner)
    for step in range(6):
        x, t, words = latent(step, 1, 4, 4).cuda(), time_of(step).cuda(), torch.ones(1, 1, 4).cuda()
        torch.testing.assert_close(compiled(x, t, words), model(x, t, words), rtol=1e-3, atol=1e-3)
    assert compiled.vdcache.history.computed_steps() == [0, 1, 3]


@torch.no_grad()
def test_profiles_and_block_lists():
    pytest.importorskip("diffusers")
    from tests.support.block_lists import STEPS, ByHand, Stack, call

    model = Stack(True).cuda()

    def generate(m):
        return [m(*(t.cuda() for t in call(step)))[0] for step in range(STEPS)]

    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[:, 0] = True
    there = vdcache.profile(model, generate, foreground=mask)
    here = vdcache.profile(Stack(True), lambda m: [m(*call(step)) for step in range(STEPS)], foreground=mask)
    assert abs(there.scores - here.scores).mean() < 0.05  # a token at the threshold may fall to the other side
    compiled = vdcache.compile(model, vdcache.methods.profilingdit([1, 2, 4], when=[0, 3]), num_steps=STEPS, inner="eager")
    hand = ByHand(model)
    for step in range(STEPS):
        args = [t.cuda() for t in call(step)]
        for a, b in zip(compiled(*args), hand(*args, set() if step in (0, 3) else {1, 2, 4}), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_records_seconds_are_those_of_the_device():
    """A long kernel is launched in no time: the history must tell how long it ran."""
    model = TinyDiT().cuda()
    compiled = vdcache.compile(model, "always", num_steps=4, inner="eager")
    compiled(latent(0).cuda(), time_of(0).cuda(), latent(9).cuda())
    x = torch.randn(1, 8192, 4, device="cuda")
    torch.cuda.synchronize()
    compiled(x, time_of(1).cuda(), latent(9).cuda())
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    compiled(x, time_of(2).cuda(), latent(9).cuda())
    end.record()
    record = compiled.vdcache.history[-1]
    assert 0 < record.seconds <= begin.elapsed_time(end) / 1e3 * 1.001 and record.host_seconds > 0


@torch.no_grad()
def test_a_prompt_that_is_cast_at_every_call_costs_one_read_and_keeps_its_cache():
    model = TinyDiT().cuda()
    compiled = vdcache.compile(model, "every-2", num_steps=8, inner="eager")
    session, words = compiled.vdcache, latent(9).cuda()
    session.begin(8)
    for step in range(8):
        session.step()
        compiled(latent(step).cuda(), time_of(step).cuda(), words.clone())
    assert session.history.computed_steps() == [0, 2, 4, 6, 7]
    assert [r.syncs for r in session.history] == [0] + [1] * 7


@torch.no_grad()
def test_a_prompt_that_is_exchanged_computes():
    model = TinyDiT().cuda()
    compiled = vdcache.compile(model, "every-2", num_steps=8, inner="eager")
    for step in range(8):
        x, t, words = latent(step).cuda(), time_of(step).cuda(), latent(9 if step < 3 else 10).cuda()
        out = compiled(x, t, words)
        if step == 3:
            assert torch.equal(out, model(x, t, words))
    assert compiled.vdcache.history.computed_steps() == [0, 2, 3, 4, 6, 7]
