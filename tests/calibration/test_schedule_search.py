"""Schedules: paths against brute force, errors against predictions, tables against residuals by hand, the search end to end."""

import functools
import io
import itertools
import math
import warnings
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import vdcache
from tests.support.block_lists import Stack, call
from tests.support.logs import informed
from tests.support.thorough import in_turn, some
from vdcache import Recipe, Schedule, VdcacheWarning, search_schedule
from vdcache.calibration import StepTable, step_table
from vdcache.calibration.paths import Path, best_paths, cost_of
from vdcache.calibration.schedule import Prediction, candidates
from vdcache.calibration.tables import StepTableBuilder
from vdcache.calibration.uncached_run import watch
from vdcache.errors import CacheStateError, ConfigError
from vdcache.passes import Emit
from vdcache.policies.weights import Newton
from vdcache.testing import TinyDiT, latent, time_of

STEPS = 8
TEXT, OTHER = latent(99, 1, 3, 4), latent(98, 1, 3, 4)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def sample(model, seed=0, steps=STEPS, texts=(TEXT,)):
    """A solver of first order: the latents of a generation, the first one and those after each step."""
    found = [latent(seed)]
    with torch.no_grad():
        for step in range(steps):
            x = found[-1]
            found.append(x - sum(model(x, time_of(step), text) for text in texts) / steps)
    return found


def final(model, seed=0):
    return sample(model, seed)[-1]


def search(model, run=final, computed=4, **options):
    options = {"prompts": [0, 3], "tries": 2, "inner": "eager", "console": Console(file=io.StringIO()), **options}
    return search_schedule(model, run, computed, **options)


def small():
    """What is searched: it is captured often."""
    return TinyDiT(blocks=1)


@functools.cache
def shared():
    """The table of the usual generations."""
    return tabled(model=small())


def tabled(run=final, prompts=(0, 3), model=None, **options):
    return step_table(model or TinyDiT(1), run, prompts=None if prompts is None else list(prompts), **options)


# --- paths ---------------------------------------------------------------------------------------------------------------------


def restated(errors, steps, objective):
    """What a list costs: each skipped step is predicted from the last two computed ones, or from the first alone."""
    costs = [0.0]
    for s in set(range(errors.shape[1])) - set(steps):
        *_, i, j = (-1, -1, *(c for c in steps if c < s))
        costs.append(errors[i + 1, j, s])
    return sum(costs) if objective == "sum" else max(costs)


def every_list(steps, computed):
    return [(0, *rest) for rest in itertools.combinations(range(1, steps), computed - 1)]


def numbers(steps, largest, seed):
    """A table of whole numbers, so that sums are exact in any order; NaN where nothing is predicted."""
    errors = np.random.default_rng(seed).integers(0, largest + 1, (steps + 1, steps, steps)).astype(float)
    i, j, s = np.indices(errors.shape)
    return np.where((i - 1 < j) & (j < s), errors, np.nan)


@given(st.data(), st.integers(3, STEPS), st.sampled_from(["sum", "max"]), st.sampled_from([1, 3, 1000]), SEEDS)
def test_best_paths_are_those_of_brute_force(data, steps, objective, largest, seed):
    errors, computed = numbers(steps, largest, seed), data.draw(st.integers(1, steps))
    every = sorted(restated(errors, path, objective) for path in every_list(steps, computed))
    for keep in (1, 5):
        found = best_paths(errors, computed, objective=objective, keep=keep)
        assert [p.cost for p in found] == every[:keep]
        assert len({p.steps for p in found}) == len(found)
        for path in found:
            assert path.steps in every_list(steps, computed)
            assert path.cost == restated(errors, path.steps, objective) == cost_of(errors, path.steps, objective)


@given(st.sets(st.integers(1, 11), max_size=11), st.sampled_from(["sum", "max"]), SEEDS)
def test_a_list_that_costs_nothing_is_found(rest, objective, seed):
    steps = (0, *sorted(rest))
    errors = numbers(12, 9, seed) + 1
    for s in set(range(12)) - {*steps}:
        *_, i, j = (-1, -1, *(c for c in steps if c < s))
        errors[i + 1, j, s] = 0
    assert best_paths(errors, len(steps), objective=objective) == [Path(0.0, steps)]


def test_what_is_last_known_of_the_first_step_alone_is_priced_as_such():
    errors = np.full((4, 3, 3), 9.0)
    errors[0, 0, 1], errors[0, 0, 2], errors[1, 1, 2] = 1.0, 2.0, 4.0
    assert best_paths(errors, 1) == [Path(3.0, (0,))] and best_paths(errors, 1, objective="max") == [Path(2.0, (0,))]
    assert best_paths(errors, 2, keep=9) == [Path(1.0, (0, 2)), Path(4.0, (0, 1))]
    assert best_paths(errors, 3, keep=9) == [Path(0.0, (0, 1, 2))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"computed": 4}, "4 of 3 steps cannot be computed"),
        ({"computed": 0}, "the number of computed steps is a whole number of at least 1; got 0"),
        ({"computed": 1.5}, "the number of computed steps is a whole number of at least 1; got 1.5"),
        ({"keep": 0}, "the number of lists is a whole number of at least 1; got 0"),
        ({"objective": "mean"}, "objective is sum or max; got 'mean'"),
    ],
)
def test_paths_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        best_paths(np.zeros((4, 3, 3)), **{"computed": 2, **options})


# --- errors of predictions -----------------------------------------------------------------------------------------------------


def table_of(residuals):
    """A table of residuals [generations, steps, values]."""
    return StepTable(np.einsum("gsd,gtd->gst", residuals, residuals))


@given(st.integers(2, 7), st.integers(1, 3), SEEDS)
def test_errors_are_those_of_the_predictions(steps, generations, seed):
    r = np.random.default_rng(seed).standard_normal((generations, steps, 11))
    last, line = table_of(r).errors(Newton(0)), table_of(r).errors(Newton(1))
    assert last.shape == line.shape == (steps + 1, steps, steps)
    for i, j, s in itertools.product(range(-1, steps), range(steps), range(steps)):
        if not i < j < s:
            assert np.isnan(last[i + 1, j, s]) and np.isnan(line[i + 1, j, s])
            continue
        slope = (r[:, j] - r[:, i]) / (j - i) if i >= 0 else 0
        for found, predicted in ((last, r[:, j]), (line, r[:, j] + (s - j) * slope)):
            want = np.linalg.norm(predicted - r[:, s], axis=-1) / np.linalg.norm(r[:, s], axis=-1)
            assert found[i + 1, j, s] == pytest.approx(want.mean(), rel=1e-9)


@given(SEEDS)
def test_what_is_linear_in_the_step_is_predicted_without_error(seed):
    a, b = np.random.default_rng(seed).integers(-9, 10, (2, 2, 1, 5))
    r = (a + b * np.arange(STEPS)[:, None] + [0, 0, 0, 0, 100]).astype(float)
    errors = table_of(r).errors(Newton(1))
    for i, j, s in itertools.combinations(range(STEPS), 3):
        exact = (j - i) in (1, 2, 4)  # (s − j) / (j − i) is a binary fraction, and all sums are exact
        assert errors[i + 1, j, s] == 0 if exact else errors[i + 1, j, s] < 1e-6
    assert (errors[0, 0, STEPS - 1] > 0) == b.any()  # from one step alone no line is known


def test_a_residual_of_nothing_is_predicted_from_nothing():
    assert np.nanmax(table_of(np.zeros((1, 4, 3))).errors(Newton(1))) == 0


@pytest.mark.parametrize("order", [2, 6])
def test_orders_that_are_not_searched_are_refused(order):
    with pytest.raises(ConfigError, match=f"schedules are searched for orders 0, 1; got {order}"):
        table_of(np.ones((1, 3, 2))).errors(Newton(order))


# --- tables of a model ---------------------------------------------------------------------------------------------------------


def residuals_by_hand(seeds, texts=(TEXT,)):
    """What the blocks of TinyDiT add, by its own arithmetic: float64 [generations, lanes, steps, values]."""
    model, found = TinyDiT(1), []
    for seed in seeds:
        latents = sample(model, seed, texts=texts)[:-1]
        found.append([[model.branches(x, time_of(s), text).flatten() for s, x in enumerate(latents)] for text in texts])
    return np.array([[[v.double().numpy() for v in lane] for lane in one] for one in found])


def residuals_watched(seeds, texts=(TEXT,)):
    found = defaultdict(lambda: defaultdict(list))

    def listen(record, emitted, result):
        ((_, values),) = emitted
        found[record.generation][record.lane].append(values["residual"].clone().flatten().double().numpy())

    run = lambda m, seed: sample(m, seed, texts=texts)  # noqa: E731
    watch(TinyDiT(1), run, list(seeds), "test", passes=(Emit(location="residual"),), listen=listen)
    return np.array([list(lanes.values()) for lanes in found.values()])


@pytest.mark.parametrize("texts", [(TEXT,), (TEXT, OTHER)], ids=["one lane", "two lanes"])
def test_a_table_holds_products_of_residuals_with_lanes_added_up(texts):
    got = tabled(lambda m, seed: sample(m, seed, texts=texts))
    watched, by_hand = residuals_watched((0, 3), texts), residuals_by_hand((0, 3), texts)
    assert watched.shape == (2, len(texts), STEPS, 48)
    np.testing.assert_allclose(watched, by_hand, atol=1e-5)
    want = np.einsum("glsd,gltd->gst", watched, watched)
    assert got.products.shape == (2, STEPS, STEPS) and got.products.dtype == np.float64 and got.steps == STEPS
    np.testing.assert_allclose(got.products, want, atol=1e-6 * want.max())
    assert abs(want[0] - want[1]).max() > 0.1  # the generations differ
    assert got.kept == len(texts) * STEPS * 48 * 4  # float32, and one generation at a time


def test_samples_of_a_batch_are_added_up():
    def run(model, seed):
        for s, x in enumerate(sample(TinyDiT(1), seed)[:-1]):
            model(torch.cat([x, 2 * x]), time_of(s), torch.cat([TEXT, OTHER]))

    model, by_hand = TinyDiT(1), []
    for s, x in enumerate(sample(TinyDiT(1), 0)[:-1]):
        parts = [model.branches(a, time_of(s), text) for a, text in ((x, TEXT), (2 * x, OTHER))]
        by_hand.append(torch.cat(parts).flatten().double().numpy())
    want = np.array(by_hand) @ np.array(by_hand).T
    np.testing.assert_allclose(tabled(run, (0,)).products[0], want, atol=1e-6 * want.max())


def test_every_generation_has_a_table_of_its_own():
    both = tabled().products
    np.testing.assert_array_equal(tabled(prompts=(3,)).products, both[[1]])
    together = tabled(lambda m: [sample(m, 0), sample(m, 3)], None)  # told apart by the timestep
    np.testing.assert_array_equal(together.products, both)


@pytest.mark.parametrize("two", [False, True])
def test_blocks_of_one_stream_and_of_two(two):
    model, rows = Stack(two), []
    with torch.no_grad():
        for step in range(4):
            streams = start = model.start(*call(step))
            for i in range(6):
                streams = model.block(i, streams)
            # of all streams that the outputs are made of: this model returns something of the text as well
            rows.append(torch.cat([(a - b).flatten().double() for a, b in zip(streams, start, strict=True)]).numpy())
    want = np.array(rows) @ np.array(rows).T
    got = tabled(lambda m: [m(*call(step)) for step in range(4)], None, model)
    np.testing.assert_allclose(got.products[0], want, atol=1e-6 * want.max())


def test_tables_that_cannot_be_made_say_why():
    with pytest.raises(ConfigError, match=r"the generations have \[6, 8\] steps; search one number of steps at a time"):
        tabled(lambda m, n: sample(m, 0, n), (8, 6))
    with pytest.raises(CacheStateError, match=r"run\(model\) did not call the model"):
        tabled(lambda m: None, None)
    for prompts, message in (("cat", r"give \['cat'\]"), (1, "prompts is a list"), ([], "prompts is empty")):
        with pytest.raises(ConfigError, match=message):
            step_table(TinyDiT(1), final, prompts=prompts)

    class Flat(TinyDiT):
        def forward(self, x, timestep, text):
            return self.out(self.inp(x) + self.time(self.sinusoids(timestep, x.dtype))[:, None, :8])

    with pytest.raises(ConfigError, match="what the blocks add cannot be read: "):
        tabled(model=Flat())


def test_lanes_that_some_steps_lack_are_left_out():
    """Guidance for a part of the run: the table is that of the lane which every step has."""

    def guided(model, until):
        for s, x in enumerate(sample(TinyDiT(1))[:-1]):
            for text in (TEXT, OTHER) if s < until else (TEXT,):
                model(x, time_of(s), text)

    alone, late = (tabled(lambda m, n=n: guided(m, n), None) for n in (0, 6))
    np.testing.assert_array_equal(late.products, alone.products)


def test_values_of_another_form_have_nothing_in_common():
    found = StepTableBuilder(4)
    for step, rows in enumerate((2, 2, 1, 1)):
        found.add(step, 0, {"a": torch.ones(rows, 3)})
    np.testing.assert_array_equal(found.products(), [[6, 6, 0, 0], [6, 6, 0, 0], [0, 0, 3, 3], [0, 0, 3, 3]])
    found = StepTableBuilder(2)
    for step, lane in enumerate("ab"):  # no lane has all steps
        found.add(step, lane, {"a": torch.ones(1, 2)})
    np.testing.assert_array_equal(found.products(), [[2, 0], [0, 2]])
    found.add(3, "a", {"a": torch.ones(1, 2)})
    with pytest.raises(ConfigError, match="no value of step 2 of a generation was seen"):
        found.products()


def test_the_memory_is_said():
    text = io.StringIO()
    step_table(TinyDiT(1), lambda m: sample(m), console=Console(file=text))
    assert text.getvalue() == "step_table keeps 0.0 MiB a step and lane while a generation runs\n"


# --- schedules -----------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.data(), st.sampled_from([0, 1]), st.floats(0, 1e6), st.none() | st.floats(-50, 150))
def test_json_round_trip(steps, data, order, error, psnr):
    rest = data.draw(st.sets(st.integers(1, steps - 1))) if steps > 1 else set()
    schedule = Schedule(steps, (0, *sorted(rest)), order, error, psnr)
    assert Schedule.from_json(schedule.to_json()) == schedule
    recipe = schedule.recipe()
    assert Recipe.from_json(recipe.to_json()) == recipe
    reused = [s for s, groups in enumerate(recipe.policy.reuse) if groups]
    assert reused == [s for s in range(steps) if s not in schedule.computed]


def test_json_round_trip_through_a_file(tmp_path):
    schedule = Schedule(STEPS, [0, 2, 5], 1, 0.25, 31.5)
    text = schedule.to_json(tmp_path / "schedule.json")
    assert schedule.computed == (0, 2, 5) and (tmp_path / "schedule.json").read_text() == text
    assert Schedule.from_json(tmp_path / "schedule.json") == schedule


@pytest.mark.parametrize(
    "text",
    [
        *("nonsense", "[]", "3", "null", "{}", '{"steps": 8}', '{"steps": 8, "computed": [0], "threshold": 1}'),
        *('{"steps": 8, "computed": 0}', '{"steps": 8, "computed": [1, 2]}', '{"steps": 8, "computed": [0, 8]}'),
    ],
)
def test_json_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "other.json").write_text(text)
    for given_text in (text, tmp_path / "other.json"):
        with pytest.raises(ConfigError, match=r"this is no schedule: it was not written by Schedule.to_json"):
            Schedule.from_json(given_text)


@pytest.mark.parametrize(
    ("computed", "message"),
    [
        ((), r"a schedule computes step 0, and its steps ascend; got \[\]"),
        ((1, 2), r"a schedule computes step 0, and its steps ascend; got \[1, 2\]"),
        ((0, 3, 2), r"its steps ascend; got \[0, 3, 2\]"),
        ((0, 2, 2), r"its steps ascend; got \[0, 2, 2\]"),
        ((0, -1), r"its steps ascend; got \[0, -1\]"),
        ((0, 8), r"a schedule of 8 steps has no step 8 \(counted from 0\)"),
    ],
)
def test_lists_that_are_no_schedule_are_refused(computed, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(STEPS, computed)


def test_schedules_as_text():
    one, other = Schedule(STEPS, (0, 2, 5), 1, 0.12345, 33.333), Schedule(STEPS, (0, 3, 5), 0, 2.0)
    assert str(one) == "█·█··█··  3 of 8 steps, order 1, result at 33.3 dB (measured)"
    assert str(other) == "█··█·█··  3 of 8 steps, order 0, blocks off by 40.0% in a reused step (predicted)"
    assert one.diff(other) == "█·█··█··\n█··█·█··\n  ^^"
    assert one.diff(one) == "█·█··█··\n█·█··█··"
    with pytest.raises(ConfigError, match="schedules of 8 and 6 steps cannot be compared step by step"):
        one.diff(Schedule(6, (0, 2, 5)))


def taylor(values, computed, step, order):
    """TaylorSeer's equations 3 and 4 in float64: F, ΔF and Δ²F at the last computed step, as far as they are known."""
    steps = [c for c in computed if c <= step]
    *_, c, b, a = (None, None, *steps)
    slope = (values[a] - values[b]) / (a - b) if b is not None else 0 * values[a]
    before = (values[b] - values[c]) / (b - c) if c is not None else 0 * values[a]
    bend = (slope - before) / (a - b) if c is not None else 0 * values[a]
    x = step - a
    return values[a] + (order >= 1) * slope * x + (order >= 2) * bend * x**2 / 2


@pytest.mark.parametrize(("computed", "order"), in_turn([(0,), (0, 2, 5), (0, 1, 2, 6), (0, 3, 4, 7)], [1, 0, 2]))
@torch.no_grad()
def test_a_recipe_computes_its_steps_and_predicts_the_others(order, computed):
    model, schedule = TinyDiT(1), Schedule(STEPS, computed, order)
    fast = vdcache.compile(model, schedule.recipe(), num_steps=STEPS, inner="eager", strict=True)
    latents = sample(model)[:-1]
    adds = [model.branches(x, time_of(s), TEXT).double() for s, x in enumerate(latents)]
    for _ in range(2):  # generations
        for s, x in enumerate(latents):
            got, full = fast(x, time_of(s), TEXT), model(x, time_of(s), TEXT)
            assert torch.equal(got, full) == (s in computed)
            predicted = taylor(adds, computed, s, order).float()
            torch.testing.assert_close(got, model.with_branches(x, TEXT, predicted))
        assert fast.vdcache.history.computed_steps() == list(computed)
    (graph,) = fast.vdcache.graphs
    assert len(schedule.recipe().policy.plans()) == len(graph.variants) == 2
    assert schedule.recipe().name == f"schedule-{len(computed)}-of-8" and schedule.recipe("mine").name == "mine"


def test_a_schedule_of_all_steps_is_the_model():
    model = TinyDiT(1)
    fast = vdcache.compile(model, Schedule(STEPS, tuple(range(STEPS))).recipe(), num_steps=STEPS, inner="eager")
    assert torch.equal(final(fast), final(model))


def test_a_recipe_read_back_does_the_same():
    recipe = Schedule(STEPS, (0, 2, 5)).recipe()
    one, other = (
        final(vdcache.compile(TinyDiT(1), r, num_steps=STEPS, inner="eager"))
        for r in (recipe, Recipe.from_json(recipe.to_json()))
    )
    assert torch.equal(one, other) and not torch.equal(one, final(TinyDiT(1)))


def test_another_number_of_steps_is_refused():
    model, recipe = TinyDiT(1), Schedule(STEPS, (0, 2, 5)).recipe()
    message = "the table of plans is for 8 steps, and the generation has 6"
    with pytest.raises(ConfigError, match=message):  # at once, before anything runs
        vdcache.compile(model, recipe, num_steps=6, inner="eager")
    with pytest.raises(ConfigError, match=message):
        vdcache.compile(model, recipe, num_steps=STEPS, inner="eager").vdcache.begin(6)
    # A number that is learnt in the middle of a run loses nobody's work: every step is computed, and a warning says why.
    learns = vdcache.compile(model, recipe, inner="eager")
    with (
        informed() as told,
        pytest.warns(VdcacheWarning, match=f"'schedule-3-of-8' cannot be followed, and every step is computed: {message}"),
    ):
        runs = [sample(learns, 0, 6) for _ in range(3)]
    assert ["the first generation had 6 steps and was computed in full" in t for t in told] == [True]
    assert all(torch.equal(run[-1], sample(model, 0, 6)[-1]) for run in runs)


# --- the search ----------------------------------------------------------------------------------------------------------------


def psnr(a, b):
    return 10 * math.log10((b.max() - b.min()).item() ** 2 / (a - b).square().mean().item())


def measured(model, schedule, prompts, of):
    """The PSNR of a compilation of its own, over the prompts."""
    fast = vdcache.compile(model, schedule.recipe(), num_steps=STEPS, inner="eager", strict=True)
    found = []
    for seed in prompts:
        fast.vdcache.begin()
        found.append(psnr(of(sample(fast, seed)), of(sample(model, seed))))
    return sum(found) / len(found)


RESULTS = {
    "tensor": (final, lambda latents: latents[-1]),
    "dict": (lambda m, seed: {"sample": final(m, seed)}, lambda latents: latents[-2]),  # what the last step is given
}


@pytest.mark.parametrize("kind", some(RESULTS, "dict".__eq__))
def test_the_best_of_its_tries_is_returned(kind):
    (run, of), model, tries, prompts = RESULTS[kind], small(), 4, (3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", VdcacheWarning)  # a search has nothing to warn of
        found = search(model, run, 5, tries=tries, prompts=prompts)
    ranked = candidates(tabled(prompts=prompts, model=small()), 5)
    heads = sorted({c.prediction: c for c in reversed(ranked)}.values(), key=ranked.index)
    assert {c.order for c in heads} == {0, 1} and len(heads) < tries
    near = max(heads, key=lambda c: measured(model, c, prompts[:1], of)).prediction
    tried = [*heads, *(c for c in ranked if c.prediction == near and c not in heads)][:tries]
    scores = [measured(model, c, prompts, of) for c in tried]
    best = tried[scores.index(max(scores))]
    assert (found.computed, found.order, found.error) == (best.computed, best.order, best.error)
    assert found.psnr == pytest.approx(max(scores), abs=1e-4)
    assert len(set(scores)) == tries and best != tried[0]  # the measurement was needed


def test_without_tries_the_first_candidate_is_returned_unmeasured():
    table = shared()
    first = search(small(), tries=0)
    assert first == candidates(table, 4)[0] and first.psnr is None

    def never(model, seed):
        raise AssertionError("nothing is to be run")

    assert search(small(), never, tries=0, table=table) == first
    every = search(small(), never, computed=STEPS, tries=5, table=table)
    assert every.computed == tuple(range(STEPS)) and every.error == 0


def test_a_shared_table_gives_the_same_answer():
    model, table = small(), shared()
    assert search(model, computed=5, table=table) == search(model, computed=5)


def test_how_often_it_runs():
    runs = []
    search(small(), lambda m, seed: runs.append(seed) or final(m, seed), tries=3)
    assert runs == [0, 3, 0, 0, 0, 3, 3]  # the table, whose results are the uncached ones; all tries; the better half of them


@pytest.mark.parametrize("prompts", some([1, 2, 5], {1, 2}.__contains__))
def test_a_search_costs_at_most_three_generations_a_prompt(prompts):
    model = small()
    with vdcache.record() as history:
        search(model, prompts=list(range(prompts)), tries=None)
    computed = len({(r.generation, r.step) for r in history if r.computed})
    assert len({r.generation for r in history}) > prompts and computed <= 3 * prompts * STEPS


def test_one_order_alone():
    for order in (0, 1):
        assert search(small(), orders=(order,), tries=1, table=shared()).order == order
        assert {c.order for c in candidates(shared(), 4, [Prediction(order)])} == {order}


def test_powers_of_the_timestep_are_rules_of_their_own():
    """Values on a line in the timestep to the power ¾ are predicted without error by that rule alone, and it comes first."""
    times = tuple(1000.0 - 10 * s * (s + 3) for s in range(8))
    line = np.array([[t**0.75 * np.ones(3) for t in times]])
    table = replace(table_of(line), times=times)
    assert np.nanmax(table.errors(Newton(1, 0.75))[1:]) < 1e-6 < 1e-3 < np.nanmax(table.errors(Newton(1))[1:])
    found = candidates(table, 4)
    assert found[0].prediction.rule == Newton(1, 0.75) and {c.prediction.rule for c in found[:4]} == {
        Newton(1, 0.75),
        *(Newton(n) for n in (0, 1)),
        Newton(1, 1.0),
    }
    assert "order 1 in the timestep to the power 0.75" in str(found[0])
    assert found[0].recipe().predictor == Newton(1, 0.75)
    assert Schedule.from_json(found[0].to_json()) == found[0]
    even = replace(table_of(line), times=tuple(1000.0 - 10 * s for s in range(8)))
    assert {c.power for c in candidates(even, 4)} == {0.0, 0.75}  # the timestep itself goes as the number of the step does


@settings(deadline=None)
@given(st.integers(2, STEPS), st.data(), SEEDS)
def test_candidates_are_lists_of_the_right_length_and_each_comes_once(steps, data, seed):
    computed = data.draw(st.integers(1, steps))
    table = table_of(np.random.default_rng(seed).standard_normal((2, steps, 7)))
    found = candidates(table, computed)
    assert len({(c.computed, c.order) for c in found}) == len(found) > 0
    for c in found:
        assert c.steps == steps and len(c.computed) == computed
        assert c.error == pytest.approx(restated(table.errors(Newton(c.order)), c.computed, "sum"), rel=1e-9)
    lists = every_list(steps, computed)
    for order, early, objective in itertools.product((0, 1), (1, 2, 5), ("sum", "max")):
        errors = table.errors(Newton(order)) * np.linspace(
            early, 1, steps
        )  # a step counts as much as any other, or more when early
        costs = [restated(errors, p, objective) for p in lists]
        own = [restated(errors, c.computed, objective) for c in found if c.order == order or computed == 1]
        assert min(own) == pytest.approx(min(costs), rel=1e-9)
    best = min(restated(table.errors(Newton(order)), p, "sum") for order in (0, 1) for p in lists)
    assert found[0].error == pytest.approx(best, rel=1e-9)


def test_a_model_that_is_a_function_and_one_that_was_compiled():
    model, few = small(), {"prompts": [0], "tries": 1}
    want = search(model, **few)
    assert search(lambda *args: model(*args), **few) == want
    compiled = vdcache.compile(model, "every-2", num_steps=STEPS, inner="eager")
    assert search(compiled, **few) == want
    final(compiled)
    assert compiled.vdcache.history.computed_steps() == [0, 2, 4, 6, 7] and len(compiled.vdcache.history) == STEPS


def test_a_search_without_prompts_runs_once_for_each_result():
    want = search(small(), prompts=[3], tries=1)
    assert search(small(), lambda m: final(m, 3), prompts=None, tries=1) == want == search(small(), prompts=iter([3]), tries=1)


def test_nothing_of_the_model_is_changed():
    model = small()
    torch.compile(model)  # leaves a mark of its own
    before, weights = dict(model.__dict__), {k: v.clone() for k, v in model.state_dict().items()}
    forward, code = type(model).forward, type(model).forward.__code__
    search(model)
    assert model.__dict__.keys() == before.keys() and all(model.__dict__[k] is v for k, v in before.items())
    assert type(model).forward is forward and forward.__code__ is code and "forward" not in model.__dict__
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not hasattr(module, "vdcache")
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(final(model), final(small()))


@torch._dynamo.config.patch(recompile_limit=3)
def test_searching_again_and_again_meets_no_limit():
    model, table = small(), shared()
    found = [search(model, prompts=[0], tries=1, table=table) for _ in range(5)]
    assert len(set(found)) == 1 and found[0].psnr < 150


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"computed": 0}, "computed is a whole number of at least 1 or none; got 0"),
        ({"computed": True}, "computed is a whole number of at least 1 or none; got True"),
        ({"tries": -1}, "tries, the lists that are run, is a whole number of at least 0; got -1"),
        ({"orders": ()}, "orders is empty; give 0, 1 or both"),
        ({"orders": (0, 2)}, "schedules are searched for orders 0, 1; got 2"),
        ({"computed": 9}, "9 computed steps were asked for, and a generation has 8"),
        ({"prompts": []}, "search_schedule: prompts is empty"),
        ({"inner": "gcc"}, "inner is inductor, eager or auto; got 'gcc'"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ConfigError, match=message):
        search(small(), **options)


def test_runs_that_cannot_be_compared_say_why():
    with pytest.raises(CacheStateError, match=r"search_schedule: run\(model\) did not call the model"):
        search(small(), lambda m, seed: None)
    table = shared()
    with pytest.raises(CacheStateError, match=r"search_schedule: run\(model\) did not call the model"):
        search(small(), lambda m, seed: None, table=table)
    sizes = itertools.count(1)
    with pytest.raises(
        CacheStateError, match=r"run gives \(1, 1, 4\) once and \(1, 2, 4\) another time; seed it, keep its sizes"
    ):
        search(small(), lambda m, seed: final(m, seed)[:, : next(sizes)], prompts=[0], table=table)


# --- what does not hold yet ----------------------------------------------------------------------------------------------------


def test_a_schedule_whose_result_is_not_a_number_does_not_win():
    model, table = small(), shared()
    first = search(model, table=table, tries=0)

    def run(m, seed):
        latents = sample(m, seed)
        broken = hasattr(m, "vdcache") and m.vdcache.history.computed_steps() == list(first.computed)
        return latents[-1] * (math.nan if broken else 1)

    found = search(model, run, table=table, tries=3)
    assert found.computed != first.computed and found.psnr < 100


@pytest.mark.parametrize("kind", ["module", "function"])
def test_what_a_pipeline_keeps_is_the_plain_model_afterwards(kind):
    model, held = small(), []
    search(model if kind == "module" else lambda *args: model(*args), lambda m, seed: held.append(m) or final(m, seed))
    assert all(torch.equal(final(m), final(model)) for m in held)


@pytest.mark.parametrize("known", [False, True])
def test_prompts_that_are_text_are_refused(known):
    with pytest.raises(ConfigError, match=r"prompts is a list of prompts; got 'cat': give \['cat'\]"):
        search(small(), lambda m, letter: final(m, ord(letter)), prompts="cat", table=shared() if known else None)


def test_prompts_that_are_no_list_are_refused():
    with pytest.raises(ConfigError, match="prompts is a list of prompts; got 1"):
        search(small(), prompts=1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_empty_prompts_are_refused_with_a_table_too():
    with pytest.raises(ConfigError, match="prompts is empty"):
        search(small(), prompts=[], table=shared())


def test_a_run_that_is_not_seeded_is_refused():
    seeds = itertools.count()
    with pytest.raises(CacheStateError, match="seed it"):
        search(small(), lambda m, seed: final(m, next(seeds)), prompts=[0])


def test_a_run_that_goes_past_the_model_is_refused_with_a_table_too():
    model = small()
    with pytest.raises(CacheStateError, match="did not call the model"):
        search(model, lambda m, seed: final(model, seed), table=shared())


@pytest.mark.parametrize("steps", [6, 10])
@pytest.mark.filterwarnings("ignore::vdcache.VdcacheWarning")
def test_a_table_of_another_number_of_steps_is_refused(steps):
    with pytest.raises(ConfigError, match=f"{steps} steps"):
        search(small(), lambda m, seed: sample(m, seed, steps)[-1], table=shared())


@pytest.mark.parametrize(("steps", "computed"), [(STEPS, (0, 1.5)), (STEPS, (0, "1")), (STEPS, 3), ("8", (0,)), (8.0, (0, 2))])
def test_steps_that_are_no_whole_numbers_are_refused(steps, computed):
    with pytest.raises(ConfigError):
        Schedule(steps, computed)


def test_steps_from_an_array_round_trip():
    schedule = Schedule(STEPS, np.array([0, 3]))
    assert Schedule.from_json(schedule.to_json()) == Schedule(STEPS, (0, 3))


def test_small_changes_between_steps_are_seen():
    x, e = latent(0), 1e-3

    def run(model):
        return [model(x * (1 + e * s * s), torch.tensor([1000 - e * s]), TEXT) for s in range(STEPS)]

    model = small()
    rows = [model.branches(x * (1 + e * s * s), torch.tensor([1000 - e * s]), TEXT) for s in range(STEPS)]
    want = table_of(torch.stack([r.flatten() for r in rows]).double()[None].numpy()).errors(Newton(1))
    np.testing.assert_allclose(tabled(run, None, model).errors(Newton(1)), want, rtol=0.01)


def test_a_residual_that_is_not_a_number_is_refused():
    rows = np.random.default_rng(0).standard_normal((1, 6, 5))
    rows[0, 3] = math.nan
    with pytest.raises(ConfigError, match="not a number"):
        candidates(table_of(rows), 3)


def test_lists_that_predict_the_same_are_tried_once():
    assert [c.computed for c in candidates(shared(), 1)] == [(0,)]


def test_the_memory_is_said_once():
    text = io.StringIO()
    tabled(console=Console(file=text, width=200))
    assert text.getvalue().count("\n") == 1


def test_orders_that_are_no_list_are_refused():
    with pytest.raises(ConfigError, match="orders"):
        search(small(), orders=1, table=shared())


def test_step_table_names_itself():
    with pytest.raises(CacheStateError, match=r"^step_table: run"):
        tabled(lambda m: None, None)


def test_both_scopes_are_run():
    """The best list of each prediction under each scope comes first; the recipe marks what its schedule says."""
    found = candidates(shared(), 4, [Prediction(1, 0.0, scope) for scope in ("blocks", "branches")])
    assert [c.scope for c in found[:2]] == ["blocks", "branches"] and found[0].computed == found[1].computed
    scored: list[float] = []
    for scope in ("blocks", "branches"):
        best = search(small(), orders=(1,), scopes=scope, tries=1, table=shared())
        assert best.scope == scope and best.recipe().passes == best.prediction.passes
        scored.append(best.psnr)
    assert scored[0] != scored[1]
    both = search(small(), orders=(1,), scopes=("blocks", "branches"), tries=2, table=shared())
    assert both.psnr == pytest.approx(max(scored))
    with pytest.raises(ConfigError, match="scopes are of blocks, branches, at least one; got \\['heads'\\]"):
        search(small(), scopes=("heads",), table=shared())
    with pytest.raises(ConfigError, match="the scope of a schedule is blocks or branches; got 'heads'"):
        Schedule(4, (0, 2), scope="heads")
