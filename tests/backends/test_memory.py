"""The memory of a cache: what is kept where not everything fits, and what a computed step frees before it runs."""

from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vdcache
from vdcache.backends import memory, program
from vdcache.backends.memory import cache_plans, chosen_plan
from vdcache.errors import ConfigError
from vdcache.passes import MarkBranches, MergeSlots
from vdcache.passes.predictors import LAST, ByGroup, Frequencies, read_predictor
from vdcache.policies.weights import Newest, Position, Taylor
from vdcache.predictors import Blended
from vdcache.runtime import Store
from vdcache.runtime import store as store_module
from vdcache.testing import TinyDiT, latent, time_of
from vdcache.util.sizes import byte_count, bytes_text

VALUE = 192  # bytes of a slot's value: 3 × 4 × 4 numbers of 4 bytes


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def recipe(predictor=LAST, every=2):
    return vdcache.Recipe("kept", vdcache.policies.EveryN(every), (MarkBranches(), MergeSlots()), predictor=predictor)


@torch.no_grad()
def run(model, steps=8, lanes=2, size=4):
    return [
        model(latent(step, 1, size, 4), time_of(step), latent(lane, 1, 3, 4)) for step in range(steps) for lane in range(lanes)
    ]


def compiled(budget, predictor=LAST, model=None, **options):
    options = {"num_steps": 8, "inner": "eager", **options}
    return vdcache.compile(model or TinyDiT(), recipe(predictor), cache_budget=budget, **options)


def said(model, **how):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        results = run(model, **how)
    return results, [str(w.message) for w in heard if "may be taken" in str(w.message)]


def value_bytes():
    """Of one value of the slot, as the recipe that keeps one tells it."""
    model = compiled(None)
    run(model, lanes=1)
    return model.vdcache.graphs[0].variants.cache_bytes()


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_what_is_tried_in_which_order():
    names = [p.name for p in cache_plans(Taylor(3), cuda=True)]
    assert names == [
        "as the recipe asks",
        "the newest 3 values of a slot",
        "the newest 2 values of a slot",
        "in main memory",
        "the last value of a slot",
        "nothing: every step is computed",
    ]
    assert [p.name for p in cache_plans(LAST, cuda=False)] == ["as the recipe asks", "nothing: every step is computed"]


def test_what_is_no_weighted_sum_is_whole_or_gone():
    def mean(values, when):
        return sum(values) / len(values)

    mixed = ByGroup((("a", Blended(mean, 3)), ("b", Frequencies())), Taylor(2))
    two, one = (memory._limited(mixed, n) for n in (2, 1))
    assert two == ByGroup((("a", LAST), ("b", Frequencies())), Newest(Taylor(2), 2))
    assert one == ByGroup((("a", LAST), ("b", Frequencies())), LAST)


def test_fewer_values_are_a_lower_order():
    steps, now = [Position(s) for s in (6, 4, 1)], Position(7)
    lower = Newest(Taylor(2), 2)
    assert lower.tensors == 2 and lower.weights(now, steps) == Taylor(1).weights(now, steps)
    assert Newest(Taylor(1), 5).tensors == 2
    assert read_predictor(str(lower)) == lower


@pytest.mark.parametrize(
    ("budget", "lanes", "main", "name"),
    [
        (600, 1, 0, "as the recipe asks"),
        (599, 1, 0, "the newest 2 values of a slot"),
        (600, 2, 0, "the last value of a slot"),
        (399, 1, 600, "in main memory"),
        (399, 1, 599, "the last value of a slot"),
        (399, 2, 0, "nothing: every step is computed"),
    ],
)
def test_the_first_that_fits_is_taken(monkeypatch, budget, lanes, main, name):
    monkeypatch.setattr(memory, "_free_main_memory", lambda: main)
    plans = cache_plans(Taylor(2), cuda=True)
    sizes = dict(zip(plans, (600, 400, 600, 200, 0), strict=True))
    plan, message = chosen_plan(plans, sizes.__getitem__, lanes, budget)
    assert plan.name == name
    assert bool(message) == (plan is not plans[0]) and (not message or f"{budget} B may be taken" in message)


# ---- under a budget ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("values", [0, 1, 2, 3])
def test_a_cache_stays_within_its_budget(lanes, values):
    """At every moment; and what still fits is kept, as a recipe that asks for no more would."""
    one = value_bytes()
    torch._dynamo.reset()
    model = compiled(values * lanes * one, Taylor(2))
    _, messages = said(model, lanes=lanes)
    session = model.vdcache
    assert session.store.peak_bytes <= values * lanes * one
    assert bool(messages) == (values < 3)
    with_less = {0: None, 1: LAST, 2: Taylor(1), 3: Taylor(2)}[values]
    assert bool(values) == any(r.reused for r in session.history)
    second = run(model, lanes=lanes)  # nothing is left to be decided
    assert session.store.peak_bytes == values * lanes * one
    torch._dynamo.reset()
    if with_less is None:
        assert all(r.computed for r in session.history)
        want = [TinyDiT()(latent(s, 1, 4, 4), time_of(s), latent(n, 1, 3, 4)) for s in range(8) for n in range(lanes)]
    else:
        plain = compiled(None, with_less)
        want = run(plain, lanes=lanes)
    assert all(torch.equal(a, b) for a, b in zip(second, want, strict=True))


def test_it_is_said_once_for_each_choice():
    one = value_bytes()
    torch._dynamo.reset()
    model = compiled(2 * one, Taylor(2))
    _, messages = said(model)
    assert len(messages) == 2 and said(model)[1] == []
    first, second = messages
    assert f"take {bytes_text(3 * one)}, and {bytes_text(2 * one)} may be taken" in first and "the newest 2 values" in first
    assert f"(2 lanes of {bytes_text(3 * one)})" in second and "the last value of a slot" in second


def test_a_budget_that_is_enough_changes_nothing():
    want = run(compiled(None, Taylor(2)))
    torch._dynamo.reset()
    got, messages = said(compiled("1GiB", Taylor(2)))
    assert not messages and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_sizes_that_are_symbols_are_known_at_the_first_call():
    one = value_bytes()
    torch._dynamo.reset()
    model = compiled(2 * one, Taylor(2), dynamic=True)
    with torch.no_grad():
        torch._dynamo.reset()
    said(model, lanes=1)
    assert model.vdcache.store.peak_bytes <= 2 * one and any(r.reused for r in model.vdcache.history)


def test_what_is_free_on_a_gpu_is_the_budget_there(monkeypatch):
    one = value_bytes()
    torch._dynamo.reset()
    monkeypatch.setattr(program, "free_bytes", lambda values: 2 * one)
    model = compiled(None, Taylor(2))
    _, messages = said(model, lanes=1)
    assert len(messages) == 1 and model.vdcache.store.peak_bytes == 2 * one


@pytest.mark.parametrize(
    ("text", "count"), [("4GiB", 4 << 30), ("1.5 GB", 1_500_000_000), ("500mib", 500 << 20), ("12", 12), (7, 7), ("0 B", 0)]
)
def test_bytes_as_people_write_them(text, count):
    assert byte_count(text, "it") == count


@pytest.mark.parametrize("wrong", ["four", "4 GiBs", "-1", -1, 2.5, True, []])
def test_what_is_no_number_of_bytes_is_refused(wrong):
    with pytest.raises(ConfigError, match="cache_budget is a number of bytes or a text such as '4GiB' or '500MB'; got"):
        vdcache.compile(TinyDiT(), "every-2", cache_budget=wrong)


def test_explain_shows_what_each_choice_takes():
    one = value_bytes()
    args = latent(0, 1, 4, 4), time_of(0), latent(1, 1, 3, 4)
    report = vdcache.explain(TinyDiT(), *args, recipe=recipe(Taylor(2)))
    assert [(c.name, c.bytes) for c in report.memory] == [
        ("as the recipe asks", 3 * one),
        ("the newest 2 values of a slot", 2 * one),
        ("in main memory (on a GPU)", 0),
        ("the last value of a slot", one),
        ("nothing: every step is computed", 0),
    ]
    assert "memory of one lane" in str(report) and f"{2 * one} B  the newest 2 values" in str(report)


# ---- main memory ---------------------------------------------------------------------------------------------------


def test_values_of_another_device_are_kept_in_main_memory(monkeypatch):
    """No GPU is at hand: tensors of the meta device stand for its values and for pinned memory."""
    asked = []

    def pinned(like):
        asked.append(tuple(like.shape))
        return torch.empty_like(like)

    monkeypatch.setattr(store_module, "_pinned", pinned)
    store, (a, b) = Store(), (torch.empty(4, device="meta"), torch.empty(2, 3, device="meta"))
    store.on_host, store.budget = True, 0
    assert store.put("k", ["a", "b"], [a, b], [])
    assert asked == [(4,), (2, 3)] and store.bytes() == store.peak_bytes == 0
    held = store._values["k"]
    assert held["a"] is not a and getattr(held["a"], store_module._HOME) == a.device
    assert [(v.device.type, tuple(v.shape)) for v in store.get("k", ["b", "a"])] == [("meta", (2, 3)), ("meta", (4,))]
    assert not store.put("k", ["c"], [torch.empty(4)], []), "what is on the CPU has nowhere to go"


def test_a_store_refuses_what_does_not_fit():
    store = Store()
    store.budget = 40
    assert store.put("a", ["s"], [torch.ones(5)], []) and store.put("a", ["s"], [torch.zeros(10)], [])
    assert not store.put("b", ["s"], [torch.ones(1)], []) and store.refused == {"b"} and store.get("b", ["s"]) is None
    assert store.bytes() == 40 and store.bytes(but={"a"}) == 0
    store.drop()
    assert not store.refused


# ---- what a computed step frees ------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of all storages that are alive, those made inside and those that it is told of; their peak."""

    def __init__(self, known):
        super().__init__()
        self.alive, self.peak = {}, 0
        for tensor in known:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = size
            weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor):
                self.add(made)
        return out


def peak_of_a_computed_step(predictor, monkeypatch, frees):
    """Peak bytes while the computing variant runs in step 4: what it makes, and what is cached."""
    torch._dynamo.reset()
    model = compiled(None, predictor)
    session = model.vdcache
    with monkeypatch.context() as patch:
        if not frees:
            real = Store.drop
            patch.setattr(Store, "drop", lambda self, key=None, *, but=None: None if but is not None else real(self, key))
        run(model, steps=4, lanes=1)
        variant = session.graphs[0].variants.recompute
        ready, seen = variant.ready, []

        def counted(inputs):
            call = ready(inputs)

            def inner(*args):
                with Live(v for own in session.store._values.values() for v in own.values()) as live:
                    result = call(*args)
                seen.append(live.peak)
                return result

            return inner

        patch.setattr(variant, "ready", counted)
        with torch.no_grad():
            model(latent(4, 1, 4, 4), time_of(4), latent(0, 1, 3, 4))
    return seen[-1]


@pytest.mark.parametrize(("predictor", "freed"), [(LAST, 1), (Taylor(1), 1), (Taylor(2), 1)], ids=str)
def test_a_computed_step_frees_what_it_replaces_before_it_runs(predictor, freed, monkeypatch):
    """All of it where one value is kept. Of several, the oldest difference: the newest value is subtracted, and the others move on."""
    one = value_bytes()
    with_free, without = (peak_of_a_computed_step(predictor, monkeypatch, frees) for frees in (True, False))
    assert without - with_free == freed * one


class Broken(torch.nn.Module):
    """Two graphs, each with a slot of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = TinyDiT(), TinyDiT()

    def forward(self, x, timestep, words):
        x = self.first(x, timestep, words)
        torch._dynamo.graph_break()
        return self.second(x, timestep, words)


@torch.no_grad()
def test_a_graph_beside_another_keeps_what_is_left():
    """The first graph of a broken model takes its part of the budget; the second is planned for the rest."""
    full = 3 * VALUE
    model = compiled(2 * full - 1, read_predictor("taylor(2)"), Broken(), dynamic=False)
    run(model, lanes=1)
    results, _ = said(model, lanes=1)
    records = [r for r in model.vdcache.history.generation() if r.reused]
    assert len({r.step for r in records}) > 1 and len(records) == 2 * len({r.step for r in records}), "both graphs reuse"
    assert model.vdcache.store.peak_bytes <= 2 * full - 1
    assert all(torch.isfinite(r).all() for r in results)


@torch.no_grad()
def test_a_lane_that_never_fits_is_said():
    """Of two lanes of different sizes the larger one has no room beside the other."""
    model = compiled(VALUE + VALUE * 4 // 3 - 1, dynamic=True)
    with pytest.warns(vdcache.VdcacheWarning, match="do not fit|may be taken"):
        for generation in range(2):
            model.vdcache.begin(8)
            for step in range(8):
                model.vdcache.step()
                for size in (3, 4):
                    got = model(latent(step, 1, size, 4), time_of(step), latent(generation, 1, 3, 4))
                    assert got.isfinite().all()
