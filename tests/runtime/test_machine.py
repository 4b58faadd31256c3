"""Clock and session as a state machine: anything a sampler may do, compared with a cache by hand that is told everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import vdcache
from vdcache.testing import Reference, TinyDiT, latent, time_of

EVERY, STEPS = 3, 6
MODEL = TinyDiT()


class Sampler:
    """One pipeline with its own compiled model, and the reference beside it."""

    def __init__(self, name: int) -> None:
        self.name, self.seed = name, 100 * name
        torch._dynamo.reset()
        self.compiled = vdcache.compile(MODEL, f"every-{EVERY}", num_steps=STEPS, inner="eager", dynamic=True)
        self.reference = Reference(MODEL, EVERY, STEPS)
        self.step, self.running = 0, False

    def begin(self, tokens: int, evaluations: int, inference: bool) -> None:
        self.seed += 50
        self.inference = inference
        self.tokens, self.evaluations = tokens, evaluations
        self.step, self.running = 0, True
        self.reference.begin()

    def timestep(self) -> int:
        """Solvers of second order evaluate twice at every timestep but the first."""
        return self.step if self.evaluations == 1 else (self.step + 1) // 2


class Machine(RuleBasedStateMachine):
    """Two samplers, interleaved at will."""

    @initialize()
    def make(self) -> None:
        self.samplers = [Sampler(0), Sampler(1)]

    @rule(who=st.integers(0, 1), tokens=st.sampled_from([4, 6]), evaluations=st.sampled_from([1, 2]), inference=st.booleans())
    def begin(self, who: int, tokens: int, evaluations: int, inference: bool) -> None:
        """Start, also where a generation was under way: after its first call, too, at the same timestep."""
        self.samplers[who].begin(tokens, evaluations, inference)

    @precondition(lambda self: any(s.running for s in self.samplers))
    @rule(
        who=st.integers(0, 1),
        lanes=st.integers(1, 3),
        cast=st.booleans(),
        longer=st.booleans(),
    )
    def step(self, who: int, lanes: int, cast: bool, longer: bool) -> None:
        sampler = self.samplers[who]
        if not sampler.running:
            return
        with torch.inference_mode(sampler.inference), torch.no_grad():
            x = latent(sampler.seed + sampler.step, 1, sampler.tokens, 4)
            for lane in range(lanes):
                text = latent(7 + lane, 1, 3 + (lane if longer else 0), 4)
                seen = x.double().float() if cast else x
                t = time_of(sampler.timestep())
                out = sampler.compiled(seen, t, text)
                # Another graph of Dynamo's (inference tensors, a size of one) has nothing stored yet, and computes.
                again = sampler.compiled.vdcache.history[-1].why == "nothing is stored for this lane"
                want = sampler.reference.call(sampler.step, lane, seen, t, text, again=again)
                torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
                out.fill_(float("nan"))  # the output is the caller's
        sampler.step += 1
        sampler.running = sampler.step < STEPS


Machine.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking recompiles thousands of times
)
TestMachine = pytest.mark.filterwarnings("ignore::vdcache.VdcacheWarning")(Machine.TestCase)


@torch.no_grad()
def test_a_lane_that_missed_a_generations_first_step_gets_nothing_of_the_last_generation():
    torch._dynamo.reset()
    model = TinyDiT()
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
