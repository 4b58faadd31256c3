"""Schedules against their closed form, the published lists as data, policies side by side."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import vdcache
from vdcache import Recipe
from vdcache.errors import ConfigError
from vdcache.methods import PROFILINGDIT_LISTS, profilingdit, recipe
from vdcache.passes import MarkBranches, MergeSlots
from vdcache.policies import (
    RECOMPUTE,
    AdaCache,
    Codebook,
    CombinedPolicy,
    EveryN,
    GrowingIntervals,
    LeadingSteps,
    LinearIntervals,
    MetricValue,
    Plan,
    SchedulePolicy,
    StepList,
)
from vdcache.testing import TinyDiT, latent, time_of


def closed_form(warm_up, t_max, t_min, num_steps):
    """Equations 11, 12 and 15, restated."""
    steps, s = list(range(warm_up)), warm_up
    while s < num_steps:
        steps.append(s)
        exact = t_max - (t_max - t_min) * (s - warm_up) / (num_steps - warm_up)
        s += max(1, math.floor(exact + 0.5))
    return tuple(steps)


intervals = st.tuples(st.integers(0, 12), st.floats(1, 15), st.floats(1, 15)).map(lambda t: (t[0], max(t[1:]), min(t[1:])))


@given(intervals, st.integers(13, 80))
def test_intervals_are_the_closed_form(constants, num_steps):
    assert LinearIntervals(*constants).computed(num_steps) == closed_form(*constants, num_steps)


@given(intervals, st.integers(13, 80))
def test_orders_compute_as_many_steps(constants, num_steps):
    decreasing, increasing, even = (
        LinearIntervals(*constants, order=o).computed(num_steps) for o in ("decreasing", "increasing", "even")
    )
    assert len(decreasing) == len(increasing) == len(even) and len(set(even)) == len(even)
    warm_up = constants[0]
    assert decreasing[: warm_up + 1] == increasing[: warm_up + 1] == even[: warm_up + 1] == tuple(range(warm_up + 1))

    def gaps(steps):
        return [b - a for a, b in itertools.pairwise([*steps[warm_up:], num_steps])]

    assert gaps(increasing) == gaps(decreasing)[::-1]
    assert max(gaps(even)) - min(gaps(even)) <= 1
    assert all(0 <= s < num_steps for s in (*increasing, *even))


def test_gaps_shrink_after_the_warm_up():
    steps = LinearIntervals(6, 12, 2).computed(50)
    assert steps == (0, 1, 2, 3, 4, 5, 6, 18, 27, 34, 40, 44, 47)
    assert LinearIntervals(6, 6, 6).computed(50)[6:] == (6, 12, 18, 24, 30, 36, 42, 48)


def test_the_published_list_is_no_instance_of_the_formula():
    """At most 5 of its 8 steps are met by constants that give as many, in either reading of which step T belongs to: it is data."""
    published = set(PROFILINGDIT_LISTS["hunyuanvideo steps"])
    assert published == {6, 18, 26, 32, 38, 42, 46, 48}

    def at_target(warm_up, t_max, t_min):  # T of the step that is asked, not of the last computed one
        steps, last = [warm_up], warm_up
        for s in range(warm_up + 1, 50):
            if s - last >= math.floor(t_max - (t_max - t_min) * (s - warm_up) / (50 - warm_up) + 0.5):
                steps.append(s)
                last = s
        return steps

    best = [0, 0]
    for t_max, t_min in itertools.product([x / 8 for x in range(8, 130)], repeat=2):
        if t_max >= t_min:
            for reading, steps in enumerate((closed_form(6, t_max, t_min, 50)[6:], at_target(6, t_max, t_min))):
                if len(steps) == len(published):
                    best[reading] = max(best[reading], len(published & set(steps)))
    assert best == [5, 5]


def test_lists_are_taken_as_they_are_or_scaled():
    assert StepList((3, 7)).computed(10) == (0, 1, 2, 3, 7)
    assert StepList((6, 18, 48), of_steps=50).computed(50) == (*range(6), 6, 18, 48)
    assert StepList((6, 18, 48), of_steps=50).computed(25) == (0, 1, 2, 3, 9, 24)
    assert StepList((6, 18, 48), of_steps=50).computed(4) == (0, 1, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepList(()), "at least one, in ascending order"),
        (lambda: StepList((3, 3)), "in ascending order"),
        (lambda: StepList((-1, 3)), "whole numbers of at least 0"),
        (lambda: StepList((3, 30)).computed(30), r"computes step 30 .* has 30 steps"),
        (lambda: LinearIntervals(6, 4, 0.5), "t_min .* at least 1; got 0.5"),
        (lambda: LinearIntervals(6, 4, math.nan), "t_min"),
        (lambda: LinearIntervals(6, 2, 4), "t_max .* at least t_min=4; got 2"),
        (lambda: LinearIntervals(6, math.inf, 4), "t_max"),
        (lambda: LinearIntervals(-1, 4, 2), "warm_up .* got -1"),
        (lambda: LinearIntervals(6, 4, 2, "random"), "order is 'decreasing', 'increasing' or 'even'; got 'random'"),
        (lambda: LinearIntervals(30, 4, 2).computed(30), "warm-up of 30 steps leaves nothing to reuse in a generation of 30"),
        (lambda: SchedulePolicy(StepList((0,)), ()), r"groups is a list of words, at least one; got \(\)"),
        (lambda: SchedulePolicy(StepList((0,)), ("a",), "often"), "turn is 'alternate', 'split' or 'together'; got 'often'"),
        (lambda: SchedulePolicy((0, 2.5)), r"steps is a list of whole numbers .*; got \(0, 2.5\)"),
        (lambda: SchedulePolicy((0,), "all"), "groups is a list of words, at least one; got 'all'"),
        (lambda: StepList("024"), "list of whole numbers"),
        (lambda: StepList(3), "list of whole numbers"),
        (lambda: StepList((True, False)), "list of whole numbers"),
        (lambda: LinearIntervals("6", 4, 2), "warm_up is a whole number of at least 0; got '6'"),
        (lambda: LinearIntervals(6, None, 2), "t_max is a number of at least 1; got None"),
        (lambda: CombinedPolicy(()), "at least one"),
        (lambda: CombinedPolicy((EveryN(2), EveryN(3))), "reuse the group 'all'"),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def plans(policy, num_steps):
    state = policy.start(num_steps)
    found = []
    for step in range(num_steps):
        found.append(str(policy.plan(state, step)))
        state = policy.observe(state, step, policy.plan(state, step), None)
    return found


def test_one_group_after_the_other():
    when = StepList((1, 4, 6))
    alternate = plans(SchedulePolicy(when, ("a", "b")), 10)
    assert alternate == ["recompute"] * 2 + ["reuse{a}"] * 2 + ["recompute", "reuse{b}", "recompute"] + ["reuse{a}"] * 3
    split = plans(SchedulePolicy(when, ("a", "b"), "split"), 10)
    assert split == ["recompute"] * 2 + ["reuse{a}"] * 2 + ["recompute", "reuse{a}", "recompute"] + ["reuse{b}"] * 3


@given(st.sets(st.integers(0, 19), min_size=1), st.sampled_from(["alternate", "split"]), st.integers(1, 3))
def test_a_schedule_computes_exactly_its_steps(steps, turn, groups):
    when = StepList(tuple(sorted(steps)))
    policy = SchedulePolicy(when, tuple("abc"[:groups]), turn)
    found = plans(policy, 20)
    assert [s for s, p in enumerate(found) if p == "recompute"] == list(when.computed(20))
    assert set(found) <= {str(p) for p in policy.plans()}


def test_policies_side_by_side_each_see_their_own_plan():
    ada = AdaCache(Codebook.of([(1.0, 3)]), group="one")
    both = CombinedPolicy((ada, EveryN(2, group="two")))
    assert set(both.plans()) == {RECOMPUTE, Plan.of(["one"]), Plan.of(["two"]), Plan.of(["one", "two"])}
    state, alone = both.start(12), ada.start(12)
    for step in range(12):
        plan = both.plan(state, step)
        own = ada.plan(alone, step)
        assert plan.reuse == own.reuse | EveryN(2, group="two").plan(12, step).reuse
        measures = None if own or step == 0 else (MetricValue("one/x", 0.1, 0.1),)
        state, alone = both.observe(state, step, plan, measures), ada.observe(alone, step, own, measures)
        assert state[0] == alone


def test_published_presets_are_data():
    assert PROFILINGDIT_LISTS["hunyuanvideo single"] == (0, 2, 4, 5, 6, 7, *range(10, 22), 23, 25, 26, 27, 31, 33)
    assert len(PROFILINGDIT_LISTS["hunyuanvideo single"]) == 24 and len(PROFILINGDIT_LISTS["wan2.1"]) == 28
    two = plans(recipe("profilingdit-hunyuanvideo").policy, 50)
    assert [s for s, p in enumerate(two) if "single" not in p] == [*range(6), 6, 18, 26, 32, 38, 42, 46, 48]
    assert [s for s, p in enumerate(two) if "double" not in p] == [*range(6), 6, 12, 18, 24, 30, 36, 42, 48]
    assert len(set(two)) == 4
    one = plans(recipe("profilingdit-wan2.1").policy, 50)
    assert [s for s, p in enumerate(one) if p == "recompute"] == [*range(6), 6, 12, 18, 24, 30, 36, 42, 48]


@pytest.mark.parametrize("name", ["profilingdit-hunyuanvideo", "profilingdit-wan2.1"])
def test_presets_scale_to_other_steps_and_say_so(name):
    said = []
    scaled = recipe(name).for_steps(30, said.append)
    assert len(said) == 1 and "made for 50 steps and is scaled to 30" in said[0]
    assert recipe(name).for_steps(50, said.append) == recipe(name) and len(said) == 1
    recipe(name).for_steps(4, said.append)
    assert "scaled to 4: computed are" in said[-1]
    found = plans(scaled.policy, 30)
    assert len(found) == 30 and found[:4] == ["recompute"] * 4


@given(
    st.lists(st.integers(0, 30), min_size=1, unique=True),
    st.lists(st.integers(0, 30), min_size=1, unique=True),
    st.sampled_from(["background", "foreground", "split", "alternate"]),
    st.sampled_from([None, LinearIntervals(2, 4, 1), StepList((0, 5))]),
    st.sampled_from(["run", "block"]),
)
def test_recipes_of_block_lists_round_trip(background, foreground, reuse, when, span):
    assume(not set(background) & set(foreground))
    made = profilingdit(background, foreground, when=when, reuse=reuse, span=span, block_kind="single")
    assert Recipe.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    "name", ["always", "every-3", "adacache-fast+moreg", "profilingdit-hunyuanvideo", "profilingdit-wan2.1"]
)
def test_presets_round_trip(name):
    assert Recipe.from_json(recipe(name).to_json()) == recipe(name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: profilingdit([]), "reuse='background' needs a list of background blocks"),
        (lambda: profilingdit([1], reuse="split"), "reuse='split' needs a list of foreground blocks"),
        (lambda: profilingdit([1, 2], [2, 3]), "block 2 is in the foreground and in the background list"),
        (lambda: profilingdit([1], reuse="backgrund"), "reuse is background, foreground, split, alternate; got 'backgrund'"),
        (lambda: profilingdit([1, 1]), "names 1 twice"),
        (
            lambda: profilingdit([1], block_kind="triple"),
            "block-kind is 'single' or 'double', or empty for all blocks; got 'triple'",
        ),
        (lambda: profilingdit([1], span="all"), "span is 'run' or 'block'; got 'all'"),
        (lambda: profilingdit([1], when=[]), "at least one, in ascending order"),
        (lambda: profilingdit([1], when="every-3"), "steps is a list of whole numbers .*; got 'every-3'"),
        (lambda: profilingdit([1], when=3), "list of whole numbers .*; got 3"),
        (lambda: profilingdit("0,4"), "background is a list of whole numbers; got '0,4'"),
        (lambda: profilingdit([True, False]), "list of whole numbers"),
        (lambda: profilingdit([0.0, 4]), "list of whole numbers"),
        (lambda: recipe("profilingdit"), r"vdcache.methods.profilingdit\(vdcache.profile\(model, run\)\)"),
    ],
)
def test_bad_recipes(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("kind", [list, range, torch.tensor, __import__("numpy").array])
def test_lists_of_any_kind_become_numbers(kind):
    steps = range(0, 10, 5) if kind is range else kind([0, 5])
    made = profilingdit(kind(4) if kind is range else kind([0, 1, 2, 3]), when=steps)
    assert made == profilingdit((0, 1, 2, 3), when=(0, 5)) == Recipe.from_json(made.to_json())
    with pytest.raises(ConfigError, match="block 0 is in the foreground"):
        profilingdit(torch.tensor([0, 4]), torch.tensor([0, 1]))


def test_files_that_are_no_recipe(tmp_path):
    recipe("every-3").to_json(tmp_path / "r.json")
    with pytest.raises(ConfigError, match=r"a file is given as pathlib\.Path"):
        Recipe.from_json(str(tmp_path / "r.json"))
    with pytest.raises(ConfigError, match="no recipe"):
        Recipe.from_json('{"vdcache profile": 1}')

    class Own(EveryN):
        pass

    with pytest.raises(ConfigError, match="Own is none of vdcache's own policies"):
        Recipe("own", Own(3)).to_json()


def test_a_policy_and_a_scope_of_different_groups_are_an_error():
    torch._dynamo.reset()
    never = Recipe("never", SchedulePolicy((0, 2)), (MarkBranches(group="background"), MergeSlots(group="background")))
    compiled = vdcache.compile(TinyDiT(1), never, num_steps=4, inner="eager")
    with (
        torch.no_grad(),
        pytest.raises(
            ConfigError, match="'never' never reuses what it guards: its policy reuses all, its slots belong to background"
        ),
    ):
        compiled(latent(0), time_of(0), latent(9, 1, 3, 4))
    report = vdcache.explain(TinyDiT(1), latent(0), time_of(0), latent(9, 1, 3, 4), recipe=never)
    assert "never reuses what it guards" in report.nothing


def test_a_policy_that_cannot_run_is_an_error_at_once():
    late = Recipe("late", SchedulePolicy(LinearIntervals(20, 4, 2)), (MarkBranches(), MergeSlots()))
    with pytest.raises(ConfigError, match="warm-up of 20 steps"):
        vdcache.compile(TinyDiT(1), late, num_steps=8, inner="eager")


@torch.no_grad()
def test_with_learnt_steps_it_steps_aside_and_says_so():
    late = Recipe("late", SchedulePolicy(LinearIntervals(20, 4, 2)), (MarkBranches(), MergeSlots()))
    torch._dynamo.reset()
    model = TinyDiT(1)
    compiled = vdcache.compile(model, late, inner="eager")
    text = latent(9, 1, 3, 4)
    with pytest.warns(vdcache.VdcacheWarning, match="'late' cannot be followed, and every step is computed: a warm-up of 20"):
        for _ in range(2):
            for step in range(6):
                x = latent(step)
                assert torch.equal(compiled(x, time_of(step), text), model(x, time_of(step), text))


@pytest.mark.parametrize(
    ("steps", "growth", "computed"),
    [
        (50, 0.75, [*range(5), 6, 8, 11, 15, 20, 25, 31, 38, 46]),
        (50, 3.0, [*range(5), 6, 11, 19, 30, 44]),
        (28, 0.75, 11),
        (28, 3.0, 8),
        (20, 0.75, 9),
        (20, 3.0, 8),
    ],
)
def test_intervals_of_spectrum(steps, growth, computed):
    found = GrowingIntervals(growth=growth).computed(steps)
    assert list(found) == computed if isinstance(computed, list) else len(found) == computed


@pytest.mark.parametrize(("share", "many"), [(0.0, 1), (0.5, 5), (0.79, 7), (1.0, 10)])
def test_leading_steps(share, many):
    assert LeadingSteps(share).computed(10) == tuple(range(many))
