"""Generations run again without their sampler, against the sampler itself under the same schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vdcache
from tests.calibration.samplers import LINEAR, OTHER, TEXT, UNEVEN, Skipping, ancestral, clamped, euler, explicit, sigmas, time
from vdcache import Schedule
from vdcache.calibration.trajectory_replay import RecordedRun, Rerun, TrajectoryReplay
from vdcache.errors import ConfigError
from vdcache.policies.base import Always
from vdcache.testing import TinyDiT, latent

STEPS = 10
SCHEDULES = [Schedule(STEPS, c) for c in ((0,), (0, 1, 4, 7), (0, 3, 6), (0, 1, 2, 3, 5, 9), (0, 2, 4, 6, 8, 9))]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Wide(TinyDiT):
    """More channels come in than the sampler moves, or more come out."""

    def __init__(self, extra=0, made=4):
        super().__init__(blocks=1)
        torch.manual_seed(1)
        self.inp, self.out = nn.Linear(4 + extra, 8), nn.Linear(8, made)
        self.requires_grad_(False)


class Runner:
    """A model, its calls of one generation recorded, and the same sampling under schedules.

    Args:
        model: what is compiled.
        generation: (model, seed) -> the latents that the sampler made, the last one after the last call.
    """

    def __init__(self, model, generation, steps=STEPS):
        self.fast = vdcache.compile(model, Schedule(2, (0,)).recipe(), inner="eager")
        self.generation, self.steps = generation, steps
        self.recording = None

    def run(self, policy, recorder=None, seed=0):
        session = self.fast.vdcache
        session.policy, session.prepare, session.recorder = policy, lambda n: policy, recorder
        session.begin(self.steps)
        with torch.no_grad():
            return self.generation(self.fast, seed)

    def recorded(self, seed=0):
        def record(program, given, results, kept, entry):
            self.recording.add(program, given, results, entry)

        self.recording = RecordedRun()
        self.run(Always(), record, seed)
        return TrajectoryReplay(self.recording)


def psnr(a, b):
    a, b = a.flatten().float(), b.flatten().float()
    error = (a - b).square().mean().item()
    return 10 * math.log10((b.max() - b.min()).item() ** 2 / error) if error else math.inf


def last_given(replay, schedule):
    """The latent that the model is given last."""
    rerun = Rerun(replay, schedule.policy())
    while not rerun.is_over:
        rerun.step()
        rerun.rest()
    return rerun.latents[-2]


def guided(model, guidance):
    def call(x, level):
        t = time(level)
        if guidance == "none":
            return model(x, t, TEXT)
        if guidance == "calls":
            a, b = model(x, t, TEXT), model(x, t, OTHER)
        else:
            a, b = model(torch.cat([x, x]), t.expand(2), torch.cat([TEXT, OTHER])).chunk(2)
        return b + 3 * (a - b)

    return call


def check(runner, least=90.0, seen=lambda x: x):
    """The rerun's latents are those of the sampler under every schedule, and so is its end, up to the last update."""
    rerun = runner.recorded()
    assert psnr(rerun.wanted(), seen(runner.run(Always()))) >= least
    for schedule in SCHEDULES:
        want = seen(runner.run(schedule.policy()))
        assert runner.fast.vdcache.history.computed_steps() == list(schedule.computed)
        got = rerun.of(schedule.policy())
        assert got.shape == want.flatten().shape and got.dtype == torch.float32
        assert psnr(got, want) >= least, schedule
    assert not torch.equal(rerun.of(SCHEDULES[0].policy()), rerun.wanted())
    return rerun


@pytest.mark.parametrize(
    ("sampler", "guidance"),
    [(s, g) for s in LINEAR for g in ("none", "calls", "batch")],
)
def test_linear_samplers_are_told_from_one_generation(sampler, guidance):
    """The update after the last call is thrown away: what the model is given last is compared."""
    last = []

    def generation(model, seed):
        call = guided(model, guidance)
        last.clear()

        def seen(x, level):
            last.append(x)
            return call(x, level)

        steps = STEPS // 2 if sampler == "heun" else STEPS
        LINEAR[sampler](seen, latent(seed), sigmas(steps, 2.0))
        return last[-1].flatten()

    runner = Runner(TinyDiT(blocks=1), generation)
    rerun = runner.recorded()
    for schedule in SCHEDULES:
        want = runner.run(schedule.policy())
        assert runner.fast.vdcache.history.computed_steps() == list(schedule.computed)
        got = last_given(rerun, schedule)
        assert psnr(got, want) >= 75, (schedule, psnr(got, want))


@pytest.mark.parametrize("sampler", ["euler", "multistep"])
def test_the_end_is_exact_where_the_last_updates_are_alike(sampler):
    def generation(model, seed):
        return LINEAR[sampler](guided(model, "none"), latent(seed), sigmas(STEPS))

    check(Runner(TinyDiT(blocks=1), generation), 85)


def test_the_weights_are_those_of_the_sampler():
    runner = Runner(TinyDiT(blocks=1), lambda m, seed: euler(guided(m, "none"), latent(seed), sigmas(STEPS, 3.0)))
    levels = sigmas(STEPS, 3.0)
    found = runner.recorded().solver
    assert len(found) == STEPS - 1
    for weights, (now, after) in zip(found, itertools.pairwise(levels), strict=False):
        assert weights == pytest.approx((1, after - now), abs=1e-3)


@pytest.mark.parametrize("where", ["behind", "before"])
def test_constant_channels_beside_the_latent(where):
    rest = latent(7, 1, 6, 2)

    def generation(model, seed):
        def call(x, level):
            return model(torch.cat([x, rest] if where == "behind" else [rest, x], -1), time(level), TEXT)

        return euler(call, latent(seed), sigmas(STEPS))

    runner = Runner(Wide(extra=2), generation)
    if where == "behind":
        check(runner)
    else:  # said, or done; never wrong
        with pytest.raises(ConfigError, match="do not have the form"):
            runner.recorded()


def test_a_first_frame_that_stays():
    first = latent(5, 1, 2, 4)

    def generation(model, seed):
        x = torch.cat([first, latent(seed)[:, 2:]], 1)
        for now, after in itertools.pairwise(sigmas(STEPS)):
            v = model(x, time(now), TEXT)
            x = torch.cat([first, (x - (now - after) * v)[:, 2:]], 1)
        return x

    rerun = check(Runner(TinyDiT(blocks=1), generation), seen=lambda x: x[:, 2:])
    assert rerun.wanted().numel() == 4 * 4


def test_learned_variances_come_out_beside():
    runner = Runner(Wide(made=8), lambda m, seed: euler(lambda x, s: m(x, time(s), TEXT)[..., :4], latent(seed), sigmas(STEPS)))
    check(runner)


def test_sixteen_bit_latents_and_a_state_in_float32():
    model = TinyDiT(blocks=1).bfloat16()

    def generation(m, seed):
        x = latent(seed, 1, 64, 4)
        for now, after in itertools.pairwise(sigmas(STEPS)):
            v = m(x.bfloat16(), time(now), TEXT.bfloat16())
            x = x - (now - after) * v.float()
        return x

    runner = Runner(model, generation)
    rerun = runner.recorded()
    for schedule in SCHEDULES:
        want = runner.run(schedule.policy())
        own = psnr(want, runner.run(Always()))
        assert psnr(rerun.of(schedule.policy()), want) > max(35, own + 6), schedule
        assert psnr(rerun.of(schedule.policy()), rerun.wanted()) == pytest.approx(own, abs=1.5)


@settings(max_examples=15, deadline=None)
@given(
    numbers=st.lists(st.tuples(*[st.floats(-0.3, 0.3)] * 3), min_size=STEPS, max_size=STEPS),
    keep=st.floats(0.8, 1.1),
)
def test_any_linear_sampler(shared, numbers, keep):
    """x ← a·x + b·v + c·v₋₁ + d·v₋₂ with weights that change from step to step."""
    last = []

    def generation(model, seed):
        x, outputs = latent(seed), []
        last.clear()
        for level, weights in zip(sigmas(STEPS)[:-1], numbers, strict=True):
            last.append(x)
            outputs.insert(0, model(x, time(level), TEXT))
            x = keep * x + 0.05 * outputs[0] + sum(w * v for w, v in zip(weights, outputs, strict=False))
        return last[-1].flatten()

    shared.generation = generation
    rerun = shared.recorded()
    for schedule in SCHEDULES[1:4]:
        want = shared.run(schedule.policy())
        assert psnr(last_given(rerun, schedule), want) >= 60


@pytest.fixture(scope="module")
def shared():
    return Runner(TinyDiT(blocks=1), None)


@pytest.mark.parametrize("sampler", [ancestral, clamped])
def test_samplers_that_are_not_linear_are_refused(sampler):
    runner = Runner(TinyDiT(blocks=1), lambda m, seed: sampler(guided(m, "none"), latent(seed), sigmas(STEPS)))
    with pytest.raises(ConfigError, match=r"the sampler's update after step \d+ does not follow from latents and outputs"):
        runner.recorded()


def test_random_numbers_of_sixteen_bit_samplers_are_refused():
    def generation(m, seed):
        noise = torch.Generator().manual_seed(7)
        x = latent(seed, 1, 64, 4).bfloat16()
        for now, after in itertools.pairwise(sigmas(STEPS)):
            x = x - (now - after) * m(x, time(now), TEXT.bfloat16())
            x = x + (now - after) * torch.randn(x.shape, generator=noise).bfloat16()
        return x

    with pytest.raises(ConfigError, match="does not follow from latents and outputs"):
        Runner(TinyDiT(blocks=1).bfloat16(), generation).recorded()


def test_lanes_with_latents_of_their_own_are_refused():
    def generation(m, seed):
        return euler(lambda x, s: m(x, time(s), TEXT) + m(0.5 * x, time(s), OTHER), latent(seed), sigmas(STEPS))

    runner = Runner(TinyDiT(blocks=1), generation)

    def explicit(m, seed):  # told by the caller, or a further latent were a further step
        x = latent(seed)
        for now, after in itertools.pairwise(sigmas(STEPS)):
            m.vdcache.step()
            x = x - (now - after) * (m(x, time(now), TEXT) + m(0.5 * x, time(now), OTHER))
        return x

    runner.generation = explicit
    with pytest.raises(ConfigError, match="the lanes of a step are given different latents"):
        runner.recorded()


@pytest.mark.parametrize("of", UNEVEN, ids=lambda of: of.__name__)
def test_steps_that_differ_in_their_calls(of):
    """Guidance, reference tokens or skipped layers in some steps alone: every call is run again as it was made."""
    runner = Runner(Skipping(blocks=2), explicit(of, STEPS))
    rerun = runner.recorded()
    assert psnr(rerun.wanted(), runner.run(Always())) >= 85
    for schedule in SCHEDULES:
        assert psnr(rerun.of(schedule.policy()), runner.run(schedule.policy())) >= 85, schedule


def test_a_last_step_unlike_all_others_is_refused():
    def of(m, x, t, half):
        return m(x, t, TEXT) + m(x, t, OTHER) if t < 150 else m(x, t, TEXT)

    with pytest.raises(ConfigError, match="the last step of the generation calls the model another number of times"):
        Runner(TinyDiT(blocks=1), explicit(of, STEPS)).recorded()


def test_a_first_step_that_was_begun_twice_is_run_once():
    """A warm-up of one step with the seed of the run that follows cannot be told from a further lane."""
    model = TinyDiT(blocks=1)

    def generation(m, seed):
        for levels in (sigmas(STEPS)[:2], sigmas(STEPS)):
            x = euler(guided(m, "none"), latent(seed), levels)
        return x

    check(Runner(model, generation))


def test_one_step_is_refused():
    runner = Runner(TinyDiT(blocks=1), lambda m, seed: euler(guided(m, "none"), latent(seed), sigmas(1)), steps=1)
    with pytest.raises(ConfigError, match="a generation of one step shows no update"):
        runner.recorded()


def test_a_model_of_several_graphs_is_refused():
    class Broken(TinyDiT):
        def forward(self, x, timestep, text):
            h = super().forward(x, timestep, text)
            torch._dynamo.graph_break()
            return h + 0.1 * torch.tanh(super().forward(h, timestep, text))

    model = Broken(blocks=1)
    runner = Runner(model, lambda m, seed: euler(guided(m, "none"), latent(seed), sigmas(STEPS)))
    with pytest.raises(ConfigError, match="the model runs as several graphs"):
        runner.recorded()


def test_outputs_of_another_form_are_refused():
    runner = Runner(
        Wide(made=6), lambda m, seed: euler(lambda x, s: m(x, time(s), TEXT)[..., 1:5], latent(seed), sigmas(STEPS))
    )
    with pytest.raises(ConfigError, match="the model's outputs do not have the form of its latent"):
        runner.recorded()


def test_what_is_recorded_is_not_what_the_sampler_writes_into():
    def generation(m, seed):
        x = latent(seed)
        for now, after in itertools.pairwise(sigmas(STEPS)):
            v = m(x, time(now), TEXT)
            x -= (now - after) * v
            v.zero_()
        return x

    check(Runner(TinyDiT(blocks=1), generation))


def test_memory_counts_what_comes_again_once():
    runner = Runner(TinyDiT(blocks=1), lambda m, seed: euler(guided(m, "none"), latent(seed), sigmas(STEPS)))
    runner.recorded()
    latents = outputs = 6 * 4 * 4
    assert runner.recording.bytes == STEPS * (latents + outputs + 4) + TEXT.numel() * 4


def test_a_rerun_leaves_the_session_of_the_model_alone():
    runner = Runner(TinyDiT(blocks=1), lambda m, seed: euler(guided(m, "none"), latent(seed), sigmas(STEPS)))
    rerun = runner.recorded()
    session = runner.fast.vdcache
    before = len(session.history), session.step_index, session.policy
    rerun.of(SCHEDULES[1].policy())
    assert (len(session.history), session.step_index, session.policy) == before
    assert torch.equal(runner.run(SCHEDULES[1].policy()), runner.run(SCHEDULES[1].policy()))
