"""Predictors against closed forms, by themselves and through torch.compile; lanes, generations, groups, bytes."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vdcache
from tests.support.drift import Drift
from tests.support.predicting import Predicting
from tests.support.thorough import examples, in_turn
from vdcache import Recipe, methods
from vdcache.errors import ConfigError
from vdcache.ir.dump import dump
from vdcache.methods import recipe
from vdcache.passes import MarkBranches, MergeSlots, variant_io
from vdcache.policies import CombinedPolicy, SchedulePolicy, StepList
from vdcache.predictors import Chebyshev, Extrapolated, Fixed, FoCa, Hermite, LastValue, Scaled, Taylor
from vdcache.testing import TinyDiT, latent, time_of
from vdcache.testing.graphs import guarded, run_variant, variant


def number(x):
    return torch.tensor(float(x))


def play(predictor, values, steps):
    """Computed at `steps`, with these values; the prediction for any step after the last."""
    predicting = Predicting(predictor)
    for step, value in zip(steps, values, strict=True):
        predicting.computed(step, value)
    return predicting.predicted


@given(st.integers(1, 4), st.floats(-2, 2), st.floats(-2, 2), st.integers(1, 4), st.integers(1, 6))
@settings(deadline=None)
def test_a_line_is_predicted_exactly_by_every_order(order, start, slope, gap, ahead):
    """A curve is not: the method takes backward differences for derivatives."""
    steps = [gap * i for i in range(order + 2)]
    got = play(Taylor(order), [number(start + slope * s) for s in steps], steps)(steps[-1] + ahead)
    assert got.item() == pytest.approx(start + slope * (steps[-1] + ahead), rel=1e-3, abs=1e-2)


@given(
    st.integers(0, 4),
    st.lists(st.floats(-3, 3), min_size=2, max_size=7),
    st.lists(st.integers(1, 5), min_size=6, max_size=6),
    st.integers(1, 6),
)
@settings(deadline=None)
def test_taylor_is_the_published_recursion(order, values, gaps, ahead):
    """TaylorSeer's code, restated: a list of factors, as many as enough computed steps allow."""
    steps = [sum(gaps[:i]) for i in range(len(values))]
    factors: list[float] = []
    for i, value in enumerate(values):
        new = [value]
        for n in range(order):
            if n < len(factors):
                new.append((new[n] - factors[n]) / (steps[i] - steps[i - 1]))
            else:
                break
        factors = new
    want = sum(f * ahead**n / math.factorial(n) for n, f in enumerate(factors))
    got = play(Taylor(order), [number(v) for v in values], steps)(steps[-1] + ahead)
    assert got.item() == pytest.approx(want, rel=1e-3, abs=1e-3)


def test_order_nought_is_the_last_value():
    assert torch.equal(play(Taylor(0), [number(3), number(5)], [0, 2])(4), number(5))
    assert torch.equal(play(LastValue(), [number(3), number(5)], [0, 2])(4), number(5))
    assert play(Scaled(0.5), [number(3), number(8)], [0, 2])(5).item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", [False, True])
@torch.no_grad()
def test_through_torch_compile_a_line_is_predicted_exactly(dtype, merged):
    torch._dynamo.reset()
    model = Drift(1).to(dtype)
    scope = (MarkBranches(), MergeSlots()) if merged else (MarkBranches(),)
    recipe = Recipe("line", SchedulePolicy(StepList((1, 4, 6))), scope, predictor=Taylor(1))
    compiled = vdcache.compile(model, recipe, num_steps=10, inner="eager", strict=True)
    for generation in range(2):
        for step in range(10):
            for lane in (1, 2):  # each has its own line
                x, text = latent(step + 20 * generation, 1, 4, 4, dtype=dtype), torch.full((1, 1, 4), float(lane), dtype=dtype)
                out, want = compiled(x, time_of(step), text), model(x, time_of(step), text)
                if step in (0, 1, 4, 6):
                    assert torch.equal(out, want)
                else:
                    tolerance = 1e-4 if dtype == torch.float32 else 0.1
                    torch.testing.assert_close(out, want, rtol=0, atol=tolerance)
    assert compiled.vdcache.history.computed_steps() == [0, 1, 4, 6]
    (graph,) = compiled.vdcache.graphs
    assert (
        compiled.vdcache.store.peak_bytes == 2 * graph.variants.cache_bytes() == 2 * 2 * dtype.itemsize * 16
    )  # lanes × tensors × bytes × numbers


@torch.no_grad()
def test_nothing_of_a_generation_before_enters_a_prediction():
    torch._dynamo.reset()
    model = Drift(2)
    recipe = Recipe("two", SchedulePolicy(StepList((0, 3))), (MarkBranches(),), predictor=Taylor(2))
    new = vdcache.compile(model, recipe, num_steps=6, inner="eager")
    used = vdcache.compile(model, recipe, num_steps=6, inner="eager")

    def run(compiled, scale, steps=6):
        return [compiled(latent(s, 1, 4, 4), time_of(s), torch.full((1, 1, 4), scale)) for s in range(steps)]

    run(used, 7.0)
    used.vdcache.begin(6)
    run(used, 5.0, steps=2)  # aborted
    used.vdcache.begin(6)
    new.vdcache.begin(6)
    for a, b in zip(run(used, 1.0), run(new, 1.0), strict=True):
        assert torch.equal(a, b)


@given(st.sets(st.integers(0, 7), min_size=1), st.integers(0, 3))
@settings(deadline=None, max_examples=examples(20, 8))
@torch.no_grad()
def test_any_schedule_against_the_recursion_by_hand(steps, order):
    torch._dynamo.reset()
    model = TinyDiT(blocks=1)
    step_info = StepList(tuple(sorted(steps)))
    recipe = Recipe("t", SchedulePolicy(step_info), (MarkBranches(), MergeSlots()), predictor=Taylor(order))
    compiled = vdcache.compile(model, recipe, num_steps=8, inner="eager")
    text, predicting = latent(9, 1, 3, 4), Predicting(Taylor(order))
    for step in range(8):
        x = latent(step)
        out = compiled(x, time_of(step), text)
        if step in step_info.computed(8):
            assert torch.equal(out, model(x, time_of(step), text))
            predicting.computed(step, model.branches(x, time_of(step), text))
        else:
            total = predicting.predicted(step)
            torch.testing.assert_close(out, model.with_branches(x, text, total), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_groups_have_times_of_their_own():
    torch._dynamo.reset()
    model = TinyDiT(blocks=1)
    policy = CombinedPolicy((SchedulePolicy(StepList((0, 2, 4)), ("a",)), SchedulePolicy(StepList((0, 1, 5)), ("m",))))
    scope = (MarkBranches(kinds=("self-attention",), group="a"), MarkBranches(kinds=("mlp",), group="m"))
    compiled = vdcache.compile(model, Recipe("p", policy, scope, predictor=Taylor(1)), num_steps=8, inner="eager", strict=True)
    text = latent(9, 1, 3, 4)
    for step in range(8):
        x = latent(step)
        out = compiled(x, time_of(step), text)
        if step == 0:
            assert torch.equal(out, model(x, time_of(step), text))
    session = compiled.vdcache
    (graph,) = session.graphs
    assert {str(p) for p in graph.variants.plans} == {"recompute", "reuse{a}", "reuse{m}", "reuse{a,m}"}
    assert session.store.peak_bytes == graph.variants.cache_bytes() == 4 * (x.shape[1] * 8) * 4


@pytest.mark.slow
@torch.no_grad()
def test_under_inductor_with_dynamic_shapes():
    torch._dynamo.reset()
    model = Drift(1)
    recipe = Recipe("line", SchedulePolicy(StepList((1, 3))), (MarkBranches(), MergeSlots()), predictor=Taylor(1))
    compiled = vdcache.compile(model, recipe, num_steps=6, dynamic=True)
    for tokens in (4, 6):
        for step in range(6):
            x, text = latent(step, 1, tokens, 4), torch.ones(1, 1, 4)
            out = compiled(x, time_of(step), text)
            torch.testing.assert_close(out, model(x, time_of(step), text), rtol=1e-4, atol=1e-4)
    assert compiled.vdcache.history.computed_steps() == [0, 1, 3]


def test_a_predictor_of_ones_own():
    class Mean:
        """Half way between the last two computed values."""

        tensors = 2

        def store(self, new, previous, step_info):
            return new, torch.where(step_info.computed > 0, previous[0], new)

        def predict(self, cached, step_info):
            return (cached[0] + cached[1]) / 2

    torch._dynamo.reset()
    model, text = TinyDiT(blocks=1), latent(9, 1, 3, 4)
    compiled = vdcache.compile(
        model,
        Recipe("mean", SchedulePolicy(StepList((0, 1))), (MarkBranches(), MergeSlots()), predictor=Mean()),
        num_steps=3,
        inner="eager",
    )
    with torch.no_grad():
        outs = [compiled(latent(s), time_of(s), text) for s in range(3)]
        total = sum(model.branches(latent(s), time_of(s), text) for s in range(2)) / 2
        torch.testing.assert_close(outs[2], model.with_branches(latent(2), text, total), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make", [lambda: Taylor(-1), lambda: Taylor(5), lambda: Taylor(1.5), lambda: Scaled(0), lambda: Scaled(math.nan)]
)
def test_bad_predictors(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize("predictor", [LastValue(), Taylor(2), Scaled(0.98)])
def test_predictors_are_kept_with_their_recipe(predictor):
    made = Recipe("x", SchedulePolicy(StepList((0, 3))), (MarkBranches(),), predictor=predictor)
    assert Recipe.from_json(made.to_json()) == made


class TGateSteps:
    """FORA and TaylorSeer by hand on TinyDiT with one block: what is kept lies before the gate, and every step applies its own."""

    def __init__(self, model, predictor):
        self.model = model
        self.cached = {kind: Predicting(predictor) for kind in ("attention", "mlp")}

    def __call__(self, x, timestep, text, step, computed):
        m = self.model
        gates = m.time(m.sinusoids(timestep, x.dtype))[:, None].chunk(2, -1)
        h = m.inp(x) + m.text(text).mean(1, keepdim=True)
        for kind in ("attention", "mlp"):
            if computed:
                if kind == "attention":
                    q, k, v = m.qkv[0](h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
                    value = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                else:
                    value = m.mlp[0](h)
                self.cached[kind].computed(step, value)
            else:
                value = self.cached[kind].predicted(step)
            h = h + gates[kind == "mlp"] * value
        return m.out(h)


@pytest.mark.parametrize(
    ("name", "computed", "predictor"),
    [
        ("fora-3", [0, 3, 6, 9], LastValue()),
        ("fora-4", [0, 1, 5, 9], LastValue()),
        ("taylorseer-3-1", [0, 1, 2, 5, 8], Taylor(1)),
        ("taylorseer-4-2", [0, 1, 2, 6], Taylor(2)),
        ("hicache-4-1", [0, 1, 5, 9], Hermite(1, 0.5)),
        ("foca-3", [0, 1, 2, 5, 8], FoCa()),
    ],
)
@torch.no_grad()
def test_published_recipes_before_the_gate(name, computed, predictor):
    torch._dynamo.reset()
    model, text = TinyDiT(blocks=1), latent(9, 1, 3, 4)
    compiled = vdcache.compile(model, name, num_steps=10, inner="eager", strict=True)
    hand = TGateSteps(model, predictor)
    for step in range(10):
        x = latent(0) + 0.1 * step * latent(1)
        want = hand(x, time_of(step), text, step, step in computed)
        torch.testing.assert_close(compiled(x, time_of(step), text), want, rtol=1e-3, atol=1e-3)
    assert compiled.vdcache.history.computed_steps() == computed
    (graph,) = compiled.vdcache.graphs
    assert len(graph.slots) == 2 and compiled.vdcache.store.peak_bytes == graph.variants.cache_bytes()


@pytest.mark.parametrize(
    ("made", "computed", "predictor"),
    [
        (methods.spectrum(0.75), [0, 1, 2, 3, 4, 6, 8, 11], Chebyshev()),
        (methods.spectrum(3.0, share=0.4, tensors=4), [0, 1, 2, 3, 4, 6, 11], Chebyshev(share=0.4, tensors=4)),
        (methods.zeus(2, first=20, last=4), [0, 1, 2, 3, 4, 6, 8, 10, 11], Fixed()),
        (methods.zeus(3, first=8, last=4), [0, 1, 2, 5, 8, 11], Fixed()),
    ],
    ids=lambda v: getattr(v, "name", None),
)
@torch.no_grad()
def test_forecasts_of_hidden_states_and_outputs(made, computed, predictor):
    """By hand on TinyDiT: hidden states lie behind the last block, and its head runs at every step."""
    torch._dynamo.reset()
    model, text, predicting = TinyDiT(blocks=2), latent(9, 1, 3, 4), Predicting(predictor)
    compiled = vdcache.compile(model, made, num_steps=12, inner="eager", strict=True)
    hidden = made.name.startswith("spectrum")
    kept = []
    watching = model.out.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    for step in range(12):
        x = latent(0) + 0.1 * step * latent(1)
        if step in computed:
            want = model(x, time_of(step), text)
            predicting.computed(step, kept[-1] if hidden else want)
        else:
            want = model.out(predicting.predicted(step)) if hidden else predicting.predicted(step)
        watching.remove()
        torch.testing.assert_close(compiled(x, time_of(step), text), want, rtol=1e-3, atol=1e-3)
        watching = model.out.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    assert compiled.vdcache.history.computed_steps() == computed


@torch.no_grad()
def test_a_published_table_of_meancache():
    """Of 50 steps, at a model whose output is a line: K steps back the mean lags, and (K − 1) / 2K of the slope is regained."""
    torch._dynamo.reset()
    made = recipe("meancache-qwen-image-2512-17")
    assert len(made.policy.when.computed(50)) == 17 and made.predictor.tensors == 6
    assert [made.predictor.spans[s] for s in (10, 12, 44, 48)] == [2, 1, 5, 5]
    with pytest.raises(
        ConfigError, match="has no table of 12 steps for 'qwen-image'; there are qwen-image-2512 at 10, 17 steps"
    ):
        methods.meancache("qwen-image", 12)
    model, text, predicting = TinyDiT(blocks=1), latent(9, 1, 3, 4), Predicting(made.predictor)
    compiled = vdcache.compile(model, made, num_steps=50, inner="eager", strict=True)
    for step in range(50):
        x, when = latent(0) + 0.1 * step * latent(1), time_of(step)
        if step in made.policy.when.computed(50):
            want = model(x, when, text)
            predicting.computed(step, want, when.item())
        else:
            want = predicting.predicted(step, when.item())
        torch.testing.assert_close(compiled(x, when, text), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["fora-0", "taylorseer-0-1", "taylorseer-4-9", "taylorseer-4--1", "hicache-0-1", "foca-0", "zeus-1", "cfg-gate-1.5"]
)
def test_published_recipes_refuse_what_cannot_be(name):
    with pytest.raises(ConfigError):
        vdcache.methods.recipe(name)


# --- numbers at the end of a type, and what is none ----------------------------------------------------------------------------


class Loud(TinyDiT):
    """A branch that adds 200 times the stream: in float16 it is not far from the end at 65504."""

    def __init__(self):
        super().__init__(blocks=1)
        self.branch = nn.Linear(8, 8, bias=False)
        self.branch.weight = nn.Parameter(200 * torch.eye(8), requires_grad=False)
        self.inp.weight.copy_(torch.eye(4).repeat(2, 1))
        self.inp.bias.zero_()
        self.out.weight.mul_(1e-4)

    def forward(self, x, timestep, text):
        h = self.inp(x)
        h = h + (1 + 1e-3 * self.time(self.sinusoids(timestep, x.dtype))[:, None, :8]) * self.branch(h)
        return self.out(h)


PREDICTORS = [Taylor(1), Taylor(2), Scaled(1.5), Extrapolated(3.0)]


@pytest.mark.parametrize(("predictor", "merged"), in_turn(PREDICTORS, [True, False]), ids=str)
@torch.no_grad()
def test_predictions_stay_within_float16(merged, predictor):
    """Values that grow by 10,000 a step, and stop growing before the end of float16 where prediction begins."""
    torch._dynamo.reset()
    scope = (MarkBranches(), MergeSlots()) if merged else (MarkBranches(),)
    recipe = Recipe("r", SchedulePolicy(StepList((0, 1, 2))), scope, predictor=predictor)
    model, text = Loud().half(), latent(9, 1, 3, 4).half()
    fast = vdcache.compile(model, recipe, num_steps=8, inner="eager", strict=True)
    for step in range(8):
        x = (latent(0).sign() * 50 * min(step + 1, 3)).half()
        assert model(x, time_of(step), text).isfinite().all()
        assert fast(x, time_of(step), text).isfinite().all()
    assert fast.vdcache.history.computed_steps() == [0, 1, 2]


@torch.no_grad()
def test_sums_in_float32_stay_within_float16_where_they_are_cast_back():
    def net(x, w):
        for _ in range(2):
            x = (x.float() + torch.relu(x @ w).float() * 0.5).half()
        return x

    x, w = torch.full((2, 4), 30000.0).half(), torch.eye(4).half()
    reuse = variant(guarded(net, x, w), {"all"}, Taylor(1))
    cached = [torch.full(v.shape, 60000.0, dtype=v.dtype) for v in variant_io(reuse).read_values]
    (found,) = run_variant(reuse, x, w, extra=[*cached, *[number(3)] * 2])
    assert found.isfinite().all()


GUARDED = """
%0 = input() : TYPE[2]
%1 = relu(%0)
%2 = add(%0, %1)
%3 = cache_guard(%2, 'all/run.0', %0)
return (%3)"""


@pytest.mark.parametrize("predictor", [LastValue(), *PREDICTORS], ids=str)
def test_what_is_added_to_a_base_stays_within_float16(predictor):
    reuse = variant(GUARDED.replace("TYPE", "f16"), {"all"}, predictor)
    cached = [torch.full(v.shape, 60000.0, dtype=v.dtype) for v in variant_io(reuse).read_values]
    (found,) = run_variant(
        reuse, torch.full((2,), 60000.0).half(), extra=[*cached, *[number(1)] * len(variant_io(reuse).number_values)]
    )
    assert found.dtype == torch.float16 and found.tolist() == [65504.0] * 2
    opposite = torch.full((2,), -60000.0).half()
    (found,) = run_variant(reuse, opposite, extra=[*cached, *[number(1)] * len(variant_io(reuse).number_values)])
    assert found.isfinite().all() and (predictor != LastValue() or (found == 0).all())


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_types_with_room_are_not_clamped(kind):
    for predictor in (LastValue(), *PREDICTORS):
        assert "clamp" not in dump(variant(GUARDED.replace("TYPE", kind), {"all"}, predictor))


@pytest.mark.parametrize(
    ("recipe", "first"),
    in_turn(["every-3", "taylorseer-3-1", "fbcache-9", "teacache-0.5", vdcache.methods.adacache([(1e9, 5)])], [0, 6, 15]),
    ids=str,
)
@torch.no_grad()
def test_what_is_no_number_is_not_reused(first, recipe):
    """Steps that are given NaN, up to a computed one: the next ones compute until one gives numbers, and vdcache says so once."""
    torch._dynamo.reset()
    model, text = TinyDiT(), latent(9, 1, 3, 4)
    fast = vdcache.compile(model, recipe, num_steps=30, inner="eager")
    broken = False
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for step in range(30):
            given = (latent(0) + 1e-3 * step) * (math.nan if step >= first and not broken else 1)
            fast.vdcache.begin() if not step else None
            fast.vdcache.step()
            out = fast(given, time_of(step), text)
            assert out.isfinite().all() == given.isfinite().all(), step
            broken = broken or bool(given.isnan().any() and not fast.vdcache.history[-1].reused)
    texts = [str(w.message) for w in heard if "not a number" in str(w.message)]
    assert broken and texts and len(texts) == len(set(texts)) and sum("nothing of it is reused" in t for t in texts) <= 1
    assert any(r.reused for r in fast.vdcache.history)
