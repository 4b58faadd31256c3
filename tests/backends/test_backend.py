"""The torch.compile backend on real Dynamo graphs: what it computes, what it skips, what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import Tensor, nn

import vdcache
from tests.support.logs import informed
from vdcache.backends.eager import run_eagerly
from vdcache.runtime import registry
from vdcache.testing import Reference, TinyDiT, latent, time_of

STEPS = 8


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def text(length: int = 3, seed: int = 9) -> Tensor:
    return latent(seed, 1, length, 4)


def run(model, reference, calls, check=torch.testing.assert_close, again=()):
    """Feed `calls` of (step, lane, x, t, text) to both and compare every output.

    Args:
        again: steps that are computed although the schedule does not ask for it.
    """
    for step, lane, x, t, words in calls:
        check(model(x, t, words), reference.call(step, lane, x, t, words, again=step in again))


def generation(seed: int = 0, steps: int = STEPS, lanes: int = 1):
    for step in range(steps):
        x = latent(100 * seed + step)
        for lane in range(lanes):
            yield step, lane, x, time_of(step), text(seed=lane)


@torch.no_grad()
def test_recompute_all_is_bit_identical():
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "always", inner="eager")
    for _, _, x, t, words in generation():
        assert torch.equal(compiled(x, t, words), model(x, t, words))


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_every_n_follows_the_reference(every):
    model = TinyDiT(1)
    compiled = vdcache.compile(model, f"every-{every}", num_steps=STEPS, inner="eager")
    reference = Reference(model, every, STEPS)
    for seed in range(3):
        reference.begin()
        run(compiled, reference, generation(seed, lanes=2))
        due = [s for s in range(STEPS) if s % every == 0 or s == STEPS - 1]
        assert compiled.vdcache.history.computed_steps() == due


@torch.no_grad()
def test_string_door_needs_no_import_and_keeps_instances_apart():
    """Dynamo runs ONE graph for both instances; their states must not meet."""
    a, b = TinyDiT(seed=1), TinyDiT(seed=2)
    options = {"recipe": "every-4", "num_steps": STEPS, "inner": "eager"}
    fa, fb = (torch.compile(m, backend="vdcache", options=dict(options)) for m in (a, b))
    ra, rb = Reference(a, 4, STEPS), Reference(b, 4, STEPS)
    for (step, lane, x, t, words), (_, _, y, _, _) in zip(generation(0), generation(1), strict=True):
        torch.testing.assert_close(fa(x, t, words), ra.call(step, lane, x, t, words))
        torch.testing.assert_close(fb(y, t, words), rb.call(step, lane, y, t, words))


@torch.no_grad()
def test_handles_keep_two_generations_of_one_model_apart():
    model = TinyDiT(1)
    first = vdcache.compile(model, "every-4", num_steps=STEPS, inner="eager")
    second = vdcache.compile(model, "every-2", num_steps=STEPS, inner="eager")
    r1, r2 = Reference(model, 4, STEPS), Reference(model, 2, STEPS)
    for (step, lane, x, t, words), (_, _, y, _, _) in zip(generation(0), generation(1), strict=True):
        torch.testing.assert_close(first(x, t, words), r1.call(step, lane, x, t, words))
        torch.testing.assert_close(second(y, t, words), r2.call(step, lane, y, t, words))


def test_entry_point_in_a_fresh_process():
    program = """
        import sys, torch
        sys.path.insert(0, "")
        from vdcache.testing import TinyDiT, latent, time_of
        assert not [m for m in sys.modules if m.startswith("vdcache.backends")], "the entry point is what loads it"
        model = TinyDiT(1)
        fast = torch.compile(model, backend="vdcache", options={"recipe": "every-2", "num_steps": 4, "inner": "eager"})
        with torch.no_grad():
            for step in range(4):
                x, t, words = latent(step), time_of(step), latent(9, 1, 3, 4)
                same = torch.equal(fast(x, t, words), model(x, t, words))
                assert same == (step != 1), (step, same)
        print("done")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "done", done.stderr


@torch.no_grad()
def test_number_of_steps_is_learnt_and_said():
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-2", inner="eager")
    reference = Reference(model, 2, STEPS)
    for _, _, x, t, words in generation(0):
        assert torch.equal(compiled(x, t, words), model(x, t, words))
    assert compiled.vdcache.store.bytes() == 0, "nothing is kept while learning"
    with informed() as told:
        run(compiled, reference, generation(1))
    assert ["had 8 steps and was computed in full" in t for t in told] == [True]
    assert compiled.vdcache.history.computed_steps() == [0, 2, 4, 6, 7]


@torch.no_grad()
def test_more_steps_than_announced_are_computed_and_said():
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-2", num_steps=4, inner="eager")
    with pytest.warns(vdcache.VdcacheWarning, match="step 5 of a generation of 4 steps"):
        for step, _, x, t, words in generation(0, steps=6):
            out = compiled(x, t, words)
            if step >= 4:
                assert torch.equal(out, model(x, t, words))


@torch.no_grad()
@pytest.mark.parametrize("abort_after", [1, 2, 5, 7])
def test_an_aborted_generation_leaves_nothing(abort_after):
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager")
    reference = Reference(model, 3, STEPS)
    run(compiled, reference, [c for c in generation(0) if c[0] < abort_after])
    reference.begin()
    # One call and then another latent at its timestep may be windows: the next timestep tells.
    run(compiled, reference, generation(1), again=[1] if abort_after == 1 else [])


@torch.no_grad()
def test_changed_shape_starts_afresh():
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-8", num_steps=STEPS, inner="eager", dynamic=False)
    for tokens in (6, 10, 6):
        for step in range(3):
            x = latent(step, 1, tokens, 4)
            out = compiled(x, time_of(step), text())
            if step == 0:
                assert torch.equal(out, model(x, time_of(step), text()))
        assert [r.reused != () for r in compiled.vdcache.history.generation()] == [False, True, True]


@torch.no_grad()
def test_dynamic_shapes_with_a_third_size_at_a_reuse_step():
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-2", num_steps=STEPS, inner="eager", dynamic=True)
    reference = Reference(model, 2, STEPS)
    for tokens in (6, 9, 12, 7):
        reference.begin()
        calls = [(s, 0, latent(s, 1, tokens, 4), time_of(s), text()) for s in range(STEPS)]
        run(compiled, reference, calls)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, None])
def test_lanes_of_unequal_text_length(dynamic):
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-4", num_steps=STEPS, inner="eager", dynamic=dynamic)
    reference = Reference(model, 4, STEPS)
    for seed in range(2):
        reference.begin()
        for step in range(STEPS):
            x = latent(100 * seed + step)
            for lane, length in ((0, 3), (1, 7)):
                words = text(length, lane)
                out = compiled(x, time_of(step), words)
                # Dynamo makes another graph for the second length; a lane that moves to it computes once more.
                again = compiled.vdcache.history[-1].why == "nothing is stored for this lane"
                torch.testing.assert_close(out, reference.call(step, lane, x, time_of(step), words, again=again))
    again = [r for r in compiled.vdcache.history if r.why]
    assert len(again) <= (0 if dynamic else 2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float32])
def test_timesteps_of_any_type(dtype):
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager")
    reference = Reference(model, 3, STEPS)
    run(compiled, reference, [(s, 0, latent(s), time_of(s, dtype), text()) for s in range(STEPS)])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_colliding_16_bit_timesteps_are_still_steps(dtype):
    """Two neighbouring steps share a value, the first two among them: until the timestep changes twice they may be windows."""
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager")
    reference = Reference(model, 3, STEPS)
    values = torch.tensor([1000.0, 999.9, 900.0, 800.0, 799.9, 600.0, 500.0, 400.0]).to(dtype)
    assert values[0] == values[1] and values[3] == values[4]
    run(compiled, reference, [(s, 0, latent(s), values[s : s + 1], text()) for s in range(STEPS)], again=[1, 2])
    assert compiled.vdcache.history.computed_steps() == [0, 1, 2, 3, 6, 7]


@torch.no_grad()
def test_second_order_solver_evaluates_twice_a_timestep():
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-3", num_steps=7, inner="eager")
    reference = Reference(model, 3, 7)
    times = [0, 1, 1, 2, 2, 3, 3]
    for seed in range(2):
        reference.begin()
        run(compiled, reference, [(s, 0, latent(10 * seed + s), time_of(times[s]), text()) for s in range(7)])


@torch.no_grad()
def test_latents_cast_for_each_lane():
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager")
    reference = Reference(model, 3, STEPS)
    for step in range(STEPS):
        wide = latent(step, dtype=torch.float64)
        run(compiled, reference, [(step, lane, wide.float(), time_of(step), text(seed=lane)) for lane in range(2)])


@torch.no_grad()
def test_latent_updated_in_place_between_steps():
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager")
    reference = Reference(model, 3, STEPS)
    x = latent(0)
    values = torch.tensor([1000.0, 999.9, 900, 800, 799.9, 600, 500, 400]).to(torch.float16)
    for step in range(STEPS):
        calls = [(step, lane, x, values[step : step + 1], text(seed=lane)) for lane in range(2)]
        run(compiled, reference, calls, again=[1, 2])
        x.add_(0.1 * latent(50 + step))


def test_inference_mode():
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager")
    reference = Reference(model, 3, STEPS)
    with torch.inference_mode():
        for seed in range(2):
            reference.begin()
            x = latent(seed)
            for step in range(STEPS):
                run(compiled, reference, [(step, lane, x, time_of(step), text(seed=lane)) for lane in range(2)])
                x += 0.1 * latent(step)


@torch.no_grad()
def test_returned_output_may_be_written_into():
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager")
    reference = Reference(model, 3, STEPS)
    for step, lane, x, t, words in generation():
        out = compiled(x, t, words)
        torch.testing.assert_close(out, reference.call(step, lane, x, t, words))
        out.fill_(float("nan"))


class Bare(nn.Module):
    """A stream that is the input itself and the output itself: nothing stands between the store and the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        angles = timestep.float()[:, None] * torch.exp(-torch.arange(4))
        branch = self.b(torch.tanh(self.a(x) + self.time(torch.cat([angles.sin(), angles.cos()], -1))[:, None]))
        return x + branch, branch


@torch.no_grad()
def test_stored_value_is_not_the_one_the_caller_holds():
    model = Bare()
    compiled = vdcache.compile(model, "every-8", num_steps=STEPS, inner="eager")
    x = latent(0)
    total, branch = compiled(x, time_of(0))
    kept = branch.clone()
    total.fill_(float("nan"))
    branch.fill_(float("nan"))
    y = latent(1)
    torch.testing.assert_close(compiled(y, time_of(1))[0], y + kept)


class Counting(TinyDiT):
    """Counts its calls in a buffer and halves an input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x, timestep, text, scratch):
        self.calls.add_(1)
        scratch.mul_(0.5)
        return super().forward(x, timestep, text) + 0 * scratch.sum()


@torch.no_grad()
def test_mutations_happen_at_every_step():
    model = Counting()
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager")
    scratch = torch.ones(2)
    for _, _, x, t, words in generation():
        compiled(x, t, words, scratch)
    assert model.calls.item() == STEPS
    torch.testing.assert_close(scratch, torch.full((2,), 0.5**STEPS))
    assert compiled.vdcache.history.computed_steps() == [0, 3, 6, 7]


class Autocasting(TinyDiT):
    def forward(self, x, timestep, text):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x, timestep, text).float()


@torch.no_grad()
def test_autocast_inside_the_model_is_bit_identical():
    model = Autocasting(1)
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager")
    for step, _, x, t, words in generation():
        out = compiled(x, t, words)
        assert torch.equal(out, model(x, t, words)) == (step in (0, 3, 6, 7))


class Excluding(TinyDiT):
    """Excludes its last layer from the caller's autocast."""

    def forward(self, x, timestep, text):
        h = super().forward(x, timestep, text)
        with torch.autocast("cpu", enabled=False):
            return h.float() @ self.inp.weight.T @ self.inp.weight


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_autocast_around_the_model(inner):
    model = Excluding(1)
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner=inner)
    with torch.autocast("cpu", torch.bfloat16):
        for step, _, x, t, words in generation():
            out, want = compiled(x, t, words), model(x, t, words)
            assert out.dtype == torch.float32
            if inner == "eager":
                assert torch.equal(out, want) == (step in (0, 3, 6, 7))
            elif step in (0, 3, 6, 7):
                torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


def test_gradients_enabled_runs_plain_with_one_warning():
    model = TinyDiT(1).requires_grad_(True)
    compiled = vdcache.compile(model, "every-2", num_steps=4, inner="eager")
    with pytest.warns(vdcache.VdcacheWarning, match="gradients are enabled"):
        out = compiled(latent(0), time_of(0), text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = compiled(latent(1), time_of(1), text())
    out.sum().backward()
    assert model.inp.weight.grad is not None
    assert len(compiled.vdcache.history) == 0


class FloatTime(TinyDiT):
    def forward(self, x, timestep: float, text):
        return super().forward(x, torch.full((1,), timestep), text)


@torch.no_grad()
def test_python_float_timestep_baked_into_the_graph_names_the_remedy():
    model = FloatTime(1)
    compiled = vdcache.compile(model, "every-4", num_steps=4, inner="eager", dynamic=False)
    with pytest.warns(vdcache.VdcacheWarning, match="pass a tensor") as said:
        for step in range(4):
            assert torch.equal(
                compiled(latent(step), 1000.0 - 50 * step, text()), model(latent(step), 1000.0 - 50 * step, text())
            )
    assert sum("pass a tensor" in str(w.message) for w in said) == 1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::vdcache.VdcacheWarning")
def test_python_float_timestep_that_became_an_input_is_never_stale():
    """Dynamo bakes the first value and makes the later ones an input, so the first step runs before a step is known."""
    model = FloatTime(1)
    compiled = vdcache.compile(model, "every-2", num_steps=5, inner="eager")
    for seed in range(3):
        kept = None
        for step in range(5):
            x, t = latent(10 * seed + step), 1000.0 - 50 * step
            out = compiled(x, t, text())
            full = model(x, t, text())
            if not torch.equal(out, full):
                torch.testing.assert_close(out, model.with_branches(x, text(), kept))
            else:
                kept = model.branches(x, torch.full((1,), t), text())


@torch.no_grad()
def test_explicit_control_wins_and_reads_nothing():
    model = FloatTime(1)
    compiled = vdcache.compile(model, "every-2", inner="eager", dynamic=False)
    session = compiled.vdcache
    reference = Reference(TinyDiT(1), 2, 4)
    for seed in range(2):
        session.begin(4)
        reference.begin()
        for step in range(4):
            session.step()
            x = latent(10 * seed + step)
            for lane in ("cond", "uncond"):
                session.lane(lane)
                words = text(seed=len(lane))
                out = compiled(x, 500.0, words)
                torch.testing.assert_close(out, reference.call(step, lane, x, torch.tensor([500.0]), words))
    assert {r.lane for r in session.history} == {"cond", "uncond"}
    assert session.history.computed_steps() == [0, 2, 3]
    assert all(r.syncs == 0 and r.timestep is None for r in session.history)


def test_step_without_begin_is_an_error():
    compiled = vdcache.compile(TinyDiT(1), "every-2", num_steps=4, inner="eager")
    with pytest.raises(vdcache.errors.CacheStateError, match=r"call session\.begin\(\) first"):
        compiled.vdcache.step()


class Breaking(TinyDiT):
    """Two graphs a forward."""

    def block(self, i, h, gates):
        q, k, v = self.qkv[i](h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = h + gates[0] * torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return h + gates[1] * self.mlp[i](h)

    def forward(self, x, timestep, text):
        gates = self.time(self.sinusoids(timestep, x.dtype))[:, None].chunk(2, -1)
        h = self.inp(x) + self.text(text).mean(1, keepdim=True)
        h = self.block(0, h, gates)
        torch._dynamo.graph_break()
        return self.out(self.block(2, self.block(1, h, gates), gates))


@torch.no_grad()
@pytest.mark.parametrize("door", ["handle", "string"])
def test_several_graphs_of_one_model_follow_one_clock(door):
    models = [Breaking(blocks=3, seed=s) for s in (0, 1)]
    options = {"recipe": "every-3", "num_steps": STEPS, "inner": "eager"}
    if door == "handle":
        compiled = [vdcache.compile(m, "every-3", num_steps=STEPS, inner="eager") for m in models]
    else:
        compiled = [torch.compile(m, backend="vdcache", options=dict(options)) for m in models]
    references = [Reference(m, 3, STEPS) for m in models]
    for seed in range(2):
        for reference in references:
            reference.begin()
        for step, lane, x, t, words in generation(seed):
            for model, reference in zip(compiled, references, strict=True):
                torch.testing.assert_close(model(x, t, words), reference.call(step, lane, x, t, words))
    for m in models:
        session = compiled[models.index(m)].vdcache if door == "handle" else registry.active(m.time.weight)
        generation_records = session.history.generation()
        assert len(generation_records) == 2 * STEPS, "both graphs report to one session"
        assert session.history.computed_steps() == [0, 3, 6, 7]


@torch.no_grad()
def test_reduce_overhead_runs_plain_with_a_warning():
    compiled = vdcache.compile(TinyDiT(1), "every-2", num_steps=4, inner="eager", mode="reduce-overhead")
    with pytest.warns(vdcache.VdcacheWarning, match="CUDA graphs"):
        compiled(latent(0), time_of(0), text())


@pytest.mark.parametrize("asked", ["max-autotune", "max-autotune-no-cudagraphs", "the process"])
@torch.no_grad()
def test_every_other_mode_caches_without_cuda_graphs(asked, monkeypatch):
    """Whether they come with the mode or with Inductor's settings for the process."""
    given = []

    def compile_own(graph, inputs, options, static):
        given.append(options)
        return run_eagerly(graph)

    monkeypatch.setattr("vdcache.backends.variants.compile_own", compile_own)
    model, mode = TinyDiT(1), None if asked == "the process" else asked
    compiled = vdcache.compile(model, "every-2", num_steps=4, mode=mode)
    graphs = torch._inductor.config.patch({"triton.cudagraphs": asked == "the process"})
    with warnings.catch_warnings(), informed() as said, graphs:
        warnings.simplefilter("error")
        for step in range(4):
            out = compiled(latent(step), time_of(step), text())
            assert torch.equal(out, model(latent(step), time_of(step), text())) == (step != 1)
    assert compiled.vdcache.history.computed_steps() == [0, 2, 3]
    assert all(options.get("max_autotune", False) == (mode is not None) for options in given)
    assert all(options.get("triton.cudagraphs", False) is False for options in given)
    assert len([m for m in said if "without CUDA graphs" in m]) == (asked != "max-autotune-no-cudagraphs")


@torch.no_grad()
def test_a_model_without_branches_runs_plain_or_raises_when_strict():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).requires_grad_(False)
    compiled = vdcache.compile(model, "every-2", num_steps=4, inner="eager")
    with pytest.warns(vdcache.VdcacheWarning, match="finds no slot"):
        assert torch.equal(compiled(latent(0)), model(latent(0)))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="finds no slot"):
        vdcache.compile(model, "every-2", num_steps=4, inner="eager", strict=True)(latent(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "adacache-fas"}, "did you mean adacache-fast"),
        ({"recipe": "every-0"}, "n is a whole number of at least 1; got 0"),
        ({"num_steps": 0}, "at least 1"),
        ({"inner": "tvm"}, "inductor, eager or auto"),
        ({"recipee": "always"}, "did you mean 'recipe'"),
        ({"inductor": 3}, "inductor is a dict of Inductor's settings"),
        ({"inductor": {"max_autotun": True}}, "Inductor has no setting 'max_autotun'; did you mean 'max_autotune'"),
        ({"inductor": {"triton.cudagraphs": True}}, "asks for CUDA graphs, whose replays overwrite .*cuda_graphs=True"),
        ({"cuda_graphs": 1}, "cuda_graphs is True or False; got 1"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options, message):
    compiled = torch.compile(TinyDiT(1), backend="vdcache", options=options)
    with torch.no_grad(), pytest.raises(Exception, match=message):
        compiled(latent(0), time_of(0), text())
    known = {k: v for k, v in options.items() if k != "recipee"}
    if known:
        with pytest.raises(vdcache.errors.ConfigError, match=message):
            vdcache.compile(TinyDiT(1), **known)


@torch.no_grad()
def test_observed_block_that_does_not_exist():
    compiled = vdcache.compile(TinyDiT(), vdcache.methods.adacache("fast", blocks=[7]), num_steps=30, inner="eager")
    with pytest.raises(Exception, match="no block 7 to observe: 2 blocks"):
        compiled(latent(0), time_of(0), text())


@torch.no_grad()
def test_a_metric_that_is_no_number_recomputes_and_is_said_once():
    model = TinyDiT(1)
    compiled = vdcache.compile(model, vdcache.methods.adacache([(1e9, 5)]), num_steps=STEPS, inner="eager")
    with pytest.warns(vdcache.VdcacheWarning, match="not a number") as said:
        for _step, _, x, t, words in generation():
            compiled(x * float("nan"), t, words)
    assert compiled.vdcache.history.computed_steps() == list(range(STEPS))
    assert sum("not a number" in str(w.message) for w in said) == 1


@torch.no_grad()
def test_threshold_change_compiles_nothing():
    from torch._dynamo.utils import counters

    model = TinyDiT(1)
    compiled = vdcache.compile(model, vdcache.methods.adacache([(1e9, 3)]), num_steps=STEPS, inner="eager")
    for _, _, x, t, words in generation():
        compiled(x, t, words)
    before = dict(counters["stats"])
    compiled.vdcache.policy = vdcache.methods.adacache([(1e9, 2)]).policy
    compiled.vdcache.prepare = None
    for _, _, x, t, words in generation(1):
        compiled(x, t, words)
    assert dict(counters["stats"]) == before
    assert compiled.vdcache.history.computed_steps(0) == [0, 1, 4, 6, 7]
    assert compiled.vdcache.history.computed_steps(1) == [0, 1, 3, 5, 6, 7]


@torch.no_grad()
def test_weights_changed_between_generations_are_not_stale():
    model = TinyDiT(1)
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager")
    reference = Reference(model, 3, STEPS)
    run(compiled, reference, generation(0))
    for p in model.parameters():
        p.mul_(1.5)
    reference.begin()
    run(compiled, reference, generation(1))


@torch.no_grad()
def test_store_is_empty_after_a_generation_and_knows_its_bytes():
    model = TinyDiT(blocks=6)
    compiled = vdcache.compile(model, vdcache.methods.adacache("fast"), num_steps=30, inner="eager")
    sizes = []
    for _step, _, x, t, words in generation(steps=30):
        compiled(x, t, words)
        sizes.append(compiled.vdcache.store.bytes())
    stream = 1 * 6 * 8 * 4
    assert max(sizes) == 2 * stream == compiled.vdcache.graphs[0].variants.cache_bytes()
    assert sizes[-1] == 0


@torch.no_grad()
def test_function_of_tensors():
    model = TinyDiT(1)
    compiled = vdcache.compile(lambda x, t, w: model(x, t, w), "every-3", num_steps=STEPS, inner="eager")
    run(compiled, Reference(model, 3, STEPS), generation())
    assert compiled.vdcache.history.computed_steps() == [0, 3, 6, 7]
    assert not hasattr(model, "vdcache")


@torch.no_grad()
def test_records_of_the_string_door():
    model = TinyDiT(1)
    compiled = torch.compile(model, backend="vdcache", options={"recipe": "every-2", "num_steps": 4, "inner": "eager"})
    with vdcache.record() as history:
        for _, _, x, t, words in generation(steps=4):
            compiled(x, t, words)
    assert history.computed_steps() == [0, 2, 3]
    compiled(latent(0), time_of(0), text())
    assert len(history) == 4, "nothing is recorded outside"


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_dynamo_giving_up_is_said_once():
    model = FloatTime(1)
    compiled = vdcache.compile(model, "every-2", num_steps=4, inner="eager", dynamic=False)
    compiled.vdcache.begin(40)
    with torch._dynamo.config.patch(recompile_limit=2), pytest.warns(vdcache.VdcacheWarning, match="recompile_limit") as said:
        for step in range(5):
            compiled.vdcache.step()
            compiled(latent(step), 1000.0 - step, text())
    assert sum("recompile_limit" in str(w.message) for w in said) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: vdcache.compile(TinyDiT, "every-2"), "pass an instance, TinyDiT"),
        (lambda m: vdcache.explain(TinyDiT), "pass an instance, TinyDiT"),
        (lambda m: vdcache.compile("model.safetensors"), "takes a module or a function; got str"),
        (lambda m: vdcache.compile(m, options={"num_steps": 8}), "what stands there is given directly"),
        (lambda m: vdcache.compile(m, num_step=8), "did you mean 'num_steps'"),
        (lambda m: vdcache.compile(m, zzz=8), r"unknown argument 'zzz'\. There are"),
        (lambda m: vdcache.compile(m, "zzz"), r"'zzz'\. There are"),
    ],
)
def test_wrong_arguments_fail_at_once_and_leave_the_class_alone(call, message):
    before = TinyDiT.__call__
    with pytest.raises(vdcache.errors.ConfigError, match=message):
        call(TinyDiT(1))
    assert TinyDiT.__call__ is before


def test_a_session_prints_in_one_line():
    session = vdcache.compile(TinyDiT(1), "every-2", num_steps=4, inner="eager").vdcache
    assert repr(session) == "<Session every-2, 4 steps, 0 generations, 0 steps computed in the last>"


def test_every_compile_has_a_limit_of_its_own():
    """Dynamo counts all compilations of one forward together: the ninth recipe of a notebook once ran plain without a word."""
    model, text = TinyDiT(1), latent(9, 1, 3, 4)
    with torch.no_grad():
        for _ in range(10):
            compiled = vdcache.compile(model, "every-2", num_steps=4, inner="eager")
            for step in range(4):
                compiled(latent(step), time_of(step), text)
            assert compiled.vdcache.history.computed_steps() == [0, 2, 3]


@torch.no_grad()
def test_a_model_that_dynamo_never_hands_over_is_said():
    model, args = TinyDiT(1), (latent(0), time_of(0), latent(9, 1, 3, 4))
    model.forward = torch.compiler.disable(model.forward)
    with pytest.warns(vdcache.VdcacheWarning, match="Dynamo compiled nothing of this model"):
        vdcache.compile(model, "every-2", num_steps=4, inner="eager")(*args)
    with pytest.raises(vdcache.errors.CaptureError, match="Dynamo compiled nothing"):
        vdcache.compile(model, "every-2", num_steps=4, inner="eager", strict=True)(*args)


@torch.no_grad()
def test_compiling_what_is_compiled_starts_from_the_model():
    model, text = TinyDiT(1), latent(9, 1, 3, 4)
    for start in (model, lambda *args: model(*args)):
        nested = start
        for recipe in ("every-2", "every-3", "every-2", "always", "every-3"):
            nested = vdcache.compile(nested, recipe, num_steps=4, inner="eager")
        for step in range(4):
            nested(latent(step), time_of(step), text)
        assert nested.vdcache.history.computed_steps() == [0, 3]


@torch.no_grad()
def test_a_recipe_that_never_hits_says_so_once():
    def run(compiled, steps, times=2):
        import warnings

        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            for _ in range(times):
                for step in range(steps):
                    compiled(latent(step), time_of(step), latent(9, 1, 3, 4))
        return [str(w.message) for w in heard if "reused nothing" in str(w.message)]

    never = vdcache.methods.adacache([(1e-9, 6), (1.0, 1)])
    (said,) = run(vdcache.compile(TinyDiT(1), never, num_steps=8, inner="eager"), 8)
    assert "'adacache-custom' reused nothing in a generation of 8 steps; what it observes changed by" in said
    (few,) = run(vdcache.compile(TinyDiT(1), "every-2", num_steps=2, inner="eager"), 2)
    assert "Few steps leave little to skip" in few
    assert run(vdcache.compile(TinyDiT(1), "every-2", num_steps=6, inner="eager"), 6) == []
    assert run(vdcache.compile(TinyDiT(1), "always", num_steps=6, inner="eager"), 6) == []
