"""Probing recipes through torch.compile: against caches by hand, in lanes, generations, shapes and graphs of their own, and what they keep and compile."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vdcache
from tests.support.thorough import some
from tests.zoo import noise, text, when
from vdcache import Recipe, dump
from vdcache.backends import Settings, variants
from vdcache.backends.program import Program
from vdcache.errors import ConfigError
from vdcache.ir.capture import capture
from vdcache.ir.edit import copy_graph
from vdcache.ir.ops import is_work
from vdcache.methods import dbcache, easycache, fbcache, seacache, teacache
from vdcache.methods.registry import NAMES
from vdcache.passes import MarkBranches, MergeSlots, Probe
from vdcache.policies import RECOMPUTE, Bounds, EasyCache, Plan, Threshold
from vdcache.runtime import registry
from vdcache.testing import TinyDiT, latent

STEPS = 12
REUSE = Plan.of(["all"])
WORDS = latent(9, 1, 3, 4), latent(10, 1, 3, 4)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def moving(step, seed=0, shape=(1, 6, 4), dtype=torch.float32):
    """A latent that moves, now faster and now slower."""
    return (latent(seed, *shape) + (0.3 * step + math.sin(2.1 * step)) * 0.1 * latent(seed + 1, *shape)).to(dtype)


def time_of(step):
    """Timesteps so near that what the blocks add changes with the latent, not with its gates."""
    return torch.tensor([900 - 0.02 * step])


def compiled(model, recipe, steps=STEPS, **options):
    return vdcache.compile(model, recipe, num_steps=steps, inner="eager", **options)


def run(model, steps=STEPS, words=WORDS[:1], seed=0, dtype=torch.float32, shape=(1, 6, 4)):
    """One generation: what the model returns at every step and lane."""
    return [
        [model(moving(s, seed, shape, dtype), time_of(s), w.to(dtype).expand(shape[0], -1, -1)) for w in words]
        for s in range(steps)
    ]


def same(a, b):
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def size(value):
    return value.abs().mean().item()


class Layered(TinyDiT):
    """TinyDiT, block by block."""

    def stream(self, x, t, words):
        """The stream before the first block and after each."""
        gates = self.time(self.sinusoids(t, x.dtype))[:, None].chunk(2, -1)
        found = [self.inp(x) + self.text(words).mean(1, keepdim=True)]
        for i in range(len(self.qkv)):
            found.append(self.block(i, found[-1], gates))
        return found

    def block(self, i, h, gates):
        q, k, v = self.qkv[i](h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = h + gates[0] * F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return h + gates[1] * self.mlp[i](h)


class Hand:
    """A cache by hand: the first lane decides, each keeps its own. `decide` and `after` are the method's."""

    def __init__(self, model, steps=STEPS, first=1, last=0):
        self.model, self.steps, self.first, self.last = model, steps, first, last
        self.computed, self.kept, self.state = [], {}, {}

    def __call__(self, step, lane, x, t, words):
        if lane == 0:
            self.due = self.decide(step, x, t, words)
            if step < self.first or step >= self.steps - self.last:
                self.due = True
            if self.due:
                self.computed.append(step)
        return self.answer(lane, x, t, words)


class HandFirstBlock(Hand):
    """‖R₁ − R₁ at the last computed step‖ / ‖R₁ then‖; the blocks after the first `front` and before the last `back` are skipped."""

    def __init__(self, model, threshold, front=1, back=0, **bounds):
        super().__init__(model, **bounds)
        self.threshold, self.front, self.back = threshold, front, back

    def decide(self, step, x, t, words):
        h = self.model.stream(x, t, words)
        r, before = h[self.front] - h[0], self.state.get("r")
        due = before is None or step < self.first or not size(r - before) / size(before) < self.threshold
        if due:
            self.state["r"] = r
        return due

    def answer(self, lane, x, t, words):
        h = self.model.stream(x, t, words)
        end = len(h) - 1 - self.back
        if self.due:
            self.kept[lane] = h[end] - h[self.front]
            return self.model.out(h[-1])
        gates = self.model.time(self.model.sinusoids(t, x.dtype))[:, None].chunk(2, -1)
        value = h[self.front] + self.kept[lane]
        for i in range(end, len(h) - 1):
            value = self.model.block(i, value, gates)
        return self.model.out(value)


class HandTea(Hand):
    """Changes of what the first block reads, added up since the last computed step; all blocks are skipped."""

    def __init__(self, model, threshold, polynomial=(1.0, 0.0), **bounds):
        super().__init__(model, last=1, **bounds)
        self.threshold, self.polynomial = threshold, polynomial

    def decide(self, step, x, t, words):
        m, before = self.model.stream(x, t, words)[0], self.state.get("m")
        self.state["m"] = m
        if step < self.first or step >= self.steps - self.last:
            self.state["sum"] = 0.0
            return True
        change = size(m - before) / size(before)
        value = 0.0
        for c in self.polynomial:
            value = value * change + c
        self.state["sum"] += value
        if due := not self.state["sum"] < self.threshold:
            self.state["sum"] = 0.0
        return due

    def answer(self, lane, x, t, words):
        h = self.model.stream(x, t, words)
        if self.due:
            self.kept[lane] = h[-1] - h[0]
            return self.model.out(h[-1])
        return self.model.out(h[0] + self.kept[lane])


class HandEasy(Hand):
    """The rate at which outputs follow inputs, of the first lane; the whole model is skipped."""

    def __init__(self, model, threshold, first):
        super().__init__(model, first=first, last=1)
        self.threshold = threshold

    def decide(self, step, x, t, words):
        s = self.state
        due = step < self.first or step >= self.steps - 1 or "k" not in s
        if due:
            s["e"] = 0.0
        else:
            s["e"] += s["k"] * size(x - s["x"]) / size(s["out"])
            if due := not s["e"] < self.threshold:
                s["e"] = 0.0
        s["x"] = x
        if due:
            out = self.model(x, t, words)
            if "out" in s:
                s["k"] = size(out - s["out"]) / size(x - s["at"])
            s["out"], s["at"] = out, x
        return due

    def answer(self, lane, x, t, words):
        if self.due:
            self.kept[lane] = self.model(x, t, words) - x
        return x + self.kept[lane]


HANDS = {
    "fbcache": (lambda: fbcache(0.06), lambda m: HandFirstBlock(m, 0.06)),
    "dbcache": (lambda: dbcache(1, 1, 0.08, warm_up=3), lambda m: HandFirstBlock(m, 0.08, 1, 1, first=3)),
    "dbcache 2": (lambda: dbcache(2, 0, 0.1, warm_up=2), lambda m: HandFirstBlock(m, 0.1, 2, 0, first=2)),
    "teacache": (lambda: teacache(0.15), lambda m: HandTea(m, 0.15)),
    "teacache polynomial": (lambda: teacache(0.2, (4.0, 1.0, 0.02)), lambda m: HandTea(m, 0.2, (4.0, 1.0, 0.02))),
    "easycache": (lambda: easycache(0.15, first=2), lambda m: HandEasy(m, 0.15, 2)),
}


FOUR = ["fbcache", "dbcache", "teacache", "easycache"]


@pytest.mark.parametrize(
    ("name", "lanes"),
    some(
        [*((name, 1) for name in HANDS), ("fbcache", 2), ("teacache", 2)],
        {("dbcache", 1), ("teacache polynomial", 1), ("easycache", 1), ("fbcache", 2)}.__contains__,
    ),
)
def test_a_cache_by_hand(name, lanes):
    """Computed steps and outputs. Of two lanes the first decides for both: by itself the second would often say otherwise."""
    model = Layered(blocks=3)
    fast = compiled(model, HANDS[name][0](), strict=True)
    for generation in range(2):
        hand = HANDS[name][1](model)
        for step in range(STEPS):
            for lane, words in enumerate(WORDS[:lanes]):
                args = moving(step, 20 * generation), time_of(step), words
                want = hand(step, lane, *args)
                torch.testing.assert_close(fast(*args), want, rtol=1e-4, atol=1e-5)
                assert fast.vdcache.history[-1].computed == hand.due
        assert fast.vdcache.history.computed_steps() == hand.computed
        assert 2 < len(hand.computed) < STEPS, "the case says nothing"
    plans = {(r.generation, r.step): set() for r in fast.vdcache.history}
    for r in fast.vdcache.history:
        plans[r.generation, r.step].add(r.plan)
    assert all(len(p) == 1 for p in plans.values())


def test_easycache_measures_both_lanes_as_one_batch():
    model = Layered(blocks=3)
    recipe = easycache(0.15, first=2)
    apart, joined = compiled(model, recipe), compiled(model, recipe)
    for step in range(STEPS):
        x, t = moving(step), time_of(step)
        two = [apart(x, t, w) for w in WORDS]
        one = joined(x.expand(2, -1, -1).contiguous(), t.expand(2), torch.cat(WORDS))
        torch.testing.assert_close(torch.cat(two), one, rtol=1e-4, atol=1e-5)
    assert apart.vdcache.history.computed_steps() == joined.vdcache.history.computed_steps()
    assert 2 < len(joined.vdcache.history.computed_steps()) < STEPS


NEVER = {
    "fbcache": fbcache(0.0),
    "dbcache": dbcache(1, 1, 0.0),
    "teacache": teacache(0.0),
    "teacache timestep": teacache(0.0, location="timestep"),
    "easycache": easycache(0.0),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    some(
        [*((name, torch.float32) for name in NEVER), ("dbcache", torch.bfloat16)],
        lambda case: case[0] not in ("teacache", "fbcache") and case != ("dbcache", torch.float32),
    ),
)
def test_recomputing_everything_is_the_model_bit_for_bit(name, dtype):
    model = TinyDiT(blocks=3).to(dtype)
    fast = compiled(model, NEVER[name], strict=True)
    with pytest.warns(vdcache.VdcacheWarning, match="reused nothing"):
        assert same(run(fast, words=WORDS, dtype=dtype), run(model, words=WORDS, dtype=dtype))
    assert fast.vdcache.history.computed_steps() == list(range(STEPS))


@pytest.mark.parametrize("name", FOUR)
def test_a_reused_step_holds_nothing_of_what_it_skips(name):
    """Matrix products and attentions, counted: 4 in a block, 4 around them."""
    fast = compiled(TinyDiT(blocks=3), HANDS[name][0](), strict=True)
    run(fast)
    (graph,) = fast.vdcache.graphs
    works = {plan: sum(map(is_work, graph.variants[plan].graph.graph.nodes)) for plan in (RECOMPUTE, REUSE)}
    head = sum(map(is_work, graph.variants.head.graph.graph.nodes))
    assert head + works[RECOMPUTE] == 3 * 4 + 4, "nothing is computed twice"
    left = {"fbcache": (3 + 4, 1), "dbcache": (3 + 4, 4 + 1), "teacache": (2, 1), "easycache": (0, 0)}
    assert (head, works[REUSE]) == left[name]


@pytest.mark.parametrize("name", some(FOUR, {"dbcache", "teacache"}.__contains__))
def test_generations_know_nothing_of_each_other(name):
    """A second one is as the first; one that follows an aborted one is as a fresh one."""
    model = Layered(blocks=3)
    fast = compiled(model, HANDS[name][0]())
    first = run(fast)
    assert same(run(fast), first)
    steps = fast.vdcache.history.computed_steps()
    run(fast, steps=5, seed=40)  # aborted: the timestep jumps back
    with pytest.warns(vdcache.VdcacheWarning, match="ended after 5 of 12"):
        assert same(run(fast), first)
    assert fast.vdcache.history.computed_steps() == steps
    fast.vdcache.begin(STEPS)
    run(fast, steps=1, seed=60)
    fast.vdcache.begin(STEPS)
    assert same(run(fast), first)
    assert fast.vdcache.history.computed_steps() == steps


@pytest.mark.parametrize("name", some(FOUR, {"fbcache", "easycache"}.__contains__))
def test_explicit_control(name):
    """The same steps and values as without, with no timestep read; lanes go by name."""
    model = Layered(blocks=3)
    fast = compiled(model, HANDS[name][0]())
    want = run(fast, words=WORDS)
    steps = fast.vdcache.history.computed_steps()
    session = fast.vdcache
    session.begin(STEPS)
    got = []
    for s in range(STEPS):
        session.step()
        own = []
        for lane, words in zip(("cond", "uncond"), WORDS, strict=True):
            session.lane(lane)
            own.append(fast(moving(s), time_of(s), words))
        got.append(own)
    assert same(got, want)
    assert session.history.computed_steps() == steps
    assert [r.lane for r in session.history.generation()] == ["cond", "uncond"] * STEPS
    assert all(r.timestep is None and r.syncs == 0 for r in session.history.generation())


@pytest.mark.parametrize("name", some(FOUR, {"teacache", "easycache"}.__contains__))
def test_what_is_not_a_number_is_computed_and_said(name):
    model = Layered(blocks=3)
    fast = compiled(model, HANDS[name][0](), steps=20)
    for s in range(20):
        x = moving(s) * (math.nan if s == 6 else 1.0)
        out = fast(x, time_of(s), WORDS[0])
        record = fast.vdcache.history[-1]
        if s in (6, 7):
            assert record.computed and record.why == "what was probed is not a number"
            assert torch.equal(out.isnan(), model(x, time_of(s), WORDS[0]).isnan())
        else:
            assert out.isfinite().all() and "number" not in record.why
    assert len([s for s in fast.vdcache.history.computed_steps() if s > 8]) < 11, "it recovers"


@pytest.mark.parametrize("name", some(["fbcache", "easycache"], "fbcache".__eq__))
def test_sizes_that_change_between_calls(name):
    """One dynamic graph: each generation is what a cache by hand makes of its own sizes."""
    model = Layered(blocks=3)
    fast = compiled(model, HANDS[name][0](), dynamic=True)
    for shape in ((2, 6, 4), (2, 9, 4), (3, 5, 4), (2, 6, 4)):
        hand = HANDS[name][1](model)
        for step in range(STEPS):
            args = (
                moving(step, 0, shape),
                time_of(step).expand(shape[0]).contiguous(),
                WORDS[0].expand(shape[0], -1, -1).contiguous(),
            )
            torch.testing.assert_close(fast(*args), hand(step, 0, *args), rtol=1e-4, atol=1e-5)
        assert fast.vdcache.history.computed_steps() == hand.computed
    assert len(fast.vdcache.graphs) == 1


def test_sizes_that_change_within_a_generation():
    """A new size has nothing to be compared with, and starts a generation of its own."""
    model = Layered(blocks=3)
    fast = compiled(model, fbcache(10.0))
    for step in range(8):
        tokens = 6 if step < 4 else 8
        args = moving(step, 0, (1, tokens, 4)), time_of(step), WORDS[0]
        out = fast(*args)
        assert torch.equal(out, model(*args)) == (step in (0, 4)) == fast.vdcache.history[-1].computed


@pytest.mark.parametrize("name", ["dbcache", "teacache"])
def test_in_16_bit(name):
    model = Layered(blocks=3).bfloat16()
    fast = compiled(model, HANDS[name][0](), strict=True)
    hand = HANDS[name][1](model)
    for step in range(STEPS):
        args = moving(step, dtype=torch.bfloat16), time_of(step), WORDS[0].bfloat16()
        out, want = fast(*args), hand(step, 0, *args)
        record = fast.vdcache.history[-1]
        assert out.dtype == torch.bfloat16 and out.isfinite().all()
        if record.computed:
            assert torch.equal(out, model(*args))
        elif record.computed == hand.due:
            torch.testing.assert_close(out, want, rtol=0.05, atol=0.05)
    assert 2 < len(fast.vdcache.history.computed_steps()) < STEPS


# ---- models of several graphs ----------------------------------------------------------------------------------------


class Breaking(Layered):
    """A graph break after the first block."""

    def forward(self, x, timestep, words):
        gates = self.time(self.sinusoids(timestep, x.dtype))[:, None].chunk(2, -1)
        h = self.block(0, self.inp(x) + self.text(words).mean(1, keepdim=True), gates)
        torch._dynamo.graph_break()
        for i in range(1, len(self.qkv)):
            h = self.block(i, h, gates)
        return self.out(h)


def test_graphs_after_the_probe_follow_its_decision():
    """TeaCache: the first graph decides, and both skip all that they have."""
    model = Breaking(blocks=3)
    fast, hand = compiled(model, teacache(0.15)), HandTea(model, 0.15)
    for step in range(STEPS):
        args = moving(step), time_of(step), WORDS[0]
        torch.testing.assert_close(fast(*args), hand(step, 0, *args), rtol=1e-4, atol=1e-5)
        first, second = fast.vdcache.history[-2:]
        assert first.plan == second.plan and first.computed == second.computed == hand.due
    assert fast.vdcache.history.computed_steps() == hand.computed and 2 < len(hand.computed) < STEPS


def test_graphs_before_the_probe_are_computed():
    """Two blocks are probed, and the first graph has but one: it cannot know, and says so."""
    model = Breaking(blocks=4)
    scope = (MarkBranches(), MergeSlots(), Probe(location="residual", blocks=2))
    fast = compiled(model, Recipe("late", Threshold(10.0, bounds=Bounds(last=0)), scope))
    for step in range(STEPS):
        args = moving(step), time_of(step), WORDS[0]
        h = model.stream(*args)
        if step == 0:
            kept = h[4] - h[1]
        out = fast(*args)
        first, second = fast.vdcache.history[-2:]
        assert first.computed and second.computed == (step == 0)
        assert first.why == ("it runs before the policy can decide" if step else "")
        torch.testing.assert_close(out, model.out(h[1] + kept), rtol=1e-4, atol=1e-5)


def test_graphs_that_break_and_recompute_everything_are_the_model():
    model = Breaking(blocks=3)
    fast = compiled(model, fbcache(0.0))
    with pytest.warns(vdcache.VdcacheWarning, match="reused nothing"):
        assert same(run(fast, words=WORDS), run(model, words=WORDS))


# ---- what is kept, and what is compiled ------------------------------------------------------------------------------


@functools.cache
def demo():
    """The graph of a small video model with random weights, and its inputs by step."""
    from vdcache.demo.model import DemoConfig, DemoDiT

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}
    model = DemoDiT(DemoConfig(patch_size=(1, 2, 2), num_layers=3, **sizes)).eval().requires_grad_(False)
    first = [noise(1, 6, 3, 4, 4), when(0), text(1, 4, 16)]
    found = []

    def door(graph, given):
        found.append((capture(graph, given), list(given)))
        return graph.forward

    torch.compile(model, backend=door)(*first)
    ((graph, given),) = found
    places = [next(i for i, v in enumerate(given) if v is x) for x in first]

    def inputs(step):
        now = [noise(1, 6, 3, 4, 4, step=step), when(step), text(1, 4, 16)]
        return [now[places.index(i)] if i in places else v for i, v in enumerate(given)]

    return graph, inputs


def programmed(recipe, steps):
    """A program of the small video model, as the backend makes it, and its session."""
    settings = Settings(recipe, steps, inner="eager")
    graph, inputs = demo()
    made = Program(replace(graph, graph=copy_graph(graph.graph)), settings)
    session = settings.new_session()

    def call(step):
        with registry.using(session):
            return made(*inputs(step))

    return made, session, call


# the examples are for more blocks, and more frames, than three
OTHER = {"dbcache-N-N-D": ("1", "1", "0.08"), "tiles-N": ("1",)}
PRESETS = [n for n in NAMES if not n.name.startswith("profilingdit")]


@pytest.fixture
def compilations(monkeypatch):
    made = []
    plain = variants.run_eagerly
    monkeypatch.setattr(variants, "run_eagerly", lambda graph: made.append(graph) or plain(graph))
    return made


@pytest.mark.parametrize("named", PRESETS, ids=lambda n: n.name)
@pytest.mark.filterwarnings("ignore::vdcache.VdcacheWarning")
def test_bytes_and_variants_are_known_before_the_run(named, compilations):
    graph, session, call = programmed(named.make(*OTHER.get(named.name, named.example)), 14)
    known = graph.variants.cache_bytes(), len(graph.variants)
    for step in range(14):
        assert all(r.isfinite().all() for r in call(step))
    # one lane of guidance alone has no other that it could be predicted from
    alone = sum(v.numel() * v.element_size() for v in graph.variants.compiler.pair)
    assert session.store.peak_bytes == known[0] - alone and known[0] == graph.variants.cache_bytes()
    most = known[1] + len(graph.side.groups)  # held values have graphs, too
    assert len(graph.variants) == known[1] and 1 <= len(compilations) <= most
    assert len(session.store) == 0, "nothing is kept after the last step"
    if named.name != "always":
        assert graph.slots or graph.masks or graph.holds, "the case says nothing"
    graph.warm_up()
    assert len(compilations) <= most


@pytest.mark.parametrize("named", [n for n in NAMES if n.name.startswith("profilingdit")], ids=lambda n: n.name)
def test_lists_of_other_models_are_refused(named):
    with pytest.raises(ConfigError, match=r"was made for a model with \d+ .*, and this one has"):
        programmed(named.make(), 50)


@pytest.mark.parametrize("make", [fbcache, seacache, teacache, easycache, lambda t: dbcache(1, 0, t)])
def test_a_threshold_is_in_no_graph(make, compilations):
    """Three thresholds: as many graphs for each, and the same ones."""
    found = []
    for threshold in (0.0, 0.1, 3.0):
        compilations.clear()
        graph, _, call = programmed(make(threshold), 8)
        call(0)
        graph.warm_up()
        found.append(sorted(dump(g) for g in compilations))
        assert len(graph.variants) == len(compilations) == 3
    assert found[0] == found[1] == found[2]


def test_another_threshold_in_a_run_compiles_nothing(compilations):
    model = TinyDiT(blocks=3)
    fast = compiled(model, fbcache(10.0))
    run(fast)
    before, session = len(compilations), fast.vdcache
    session.prepare = None
    for threshold in (0.0, 0.1, 0.5):
        session.policy = replace(session.policy, threshold=threshold)
        run(fast)
    assert before == len(compilations) == 3


def test_policies_that_decide_need_a_probe():
    with pytest.raises(ConfigError, match="Threshold asks for a probe, and none of its passes is one"):
        Recipe("blind", Threshold(0.1))
    with pytest.raises(ConfigError, match="EasyCache asks for a probe"):
        Recipe("blind", EasyCache(0.1))


def test_a_probe_that_the_model_does_not_have():
    """Eight blocks are probed and there are three: every step is computed, and somebody is told."""
    model = TinyDiT(blocks=3)
    scope = (MarkBranches(), MergeSlots(), Probe(location="residual", blocks=8))
    fast = compiled(model, Recipe("far", Threshold(10.0), scope))
    with pytest.warns(
        vdcache.VdcacheWarning,
        match="finds nothing to probe in this model; every candidate:\n  output: there are 3 denoising blocks, and 8",
    ):
        assert same(run(fast), run(model))


def test_strict_refuses_a_probe_that_the_model_does_not_have():
    scope = (MarkBranches(), MergeSlots(), Probe(location="residual", blocks=8))
    fast = compiled(TinyDiT(blocks=3), Recipe("far", Threshold(10.0), scope), strict=True)
    with pytest.raises(vdcache.errors.CaptureError, match="there are 3 denoising blocks, and 8 were asked for"):
        run(fast, steps=1)
