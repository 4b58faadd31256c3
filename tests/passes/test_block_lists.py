"""Slots on intervals of the stream (delta lists): random lists of blocks against a cache that adds block deltas by hand."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vdcache
from tests.support.block_lists import BLOCKS, STEPS, ByHand, Stack, call
from tests.support.thorough import examples
from tests.zoo import ZOO, build
from vdcache.errors import ConfigError
from vdcache.ir.capture import trace
from vdcache.ir.dialect import cache_guards
from vdcache.methods import profilingdit
from vdcache.passes import Canonicalise, MarkBranches, MergeSlots, Pipeline
from vdcache.patterns import analyze
from vdcache.testing import assert_skipped, guarded

MODELS = {two: Stack(two) for two in (False, True)}


def runs_of(blocks):
    blocks = sorted(blocks)
    return sum(1 for i, b in enumerate(blocks) if not i or blocks[i - 1] != b - 1)


lists = st.sets(st.integers(0, BLOCKS - 1), min_size=1, max_size=BLOCKS)


@given(lists, st.booleans(), st.sampled_from(["run", "block"]), st.sets(st.integers(0, STEPS - 1), min_size=1))
@settings(deadline=None, max_examples=examples(30, 5), suppress_health_check=list(HealthCheck))
@torch.no_grad()
def test_random_block_lists_against_deltas_by_hand(blocks, two, span, steps):
    torch._dynamo.reset()
    model = MODELS[two]
    when = vdcache.policies.StepList(tuple(sorted(steps)))
    compiled = vdcache.compile(
        model, profilingdit(sorted(blocks), when=when, span=span), num_steps=STEPS, inner="eager", strict=True
    )
    hand, computed = ByHand(model), set(when.computed(STEPS))
    for step in range(STEPS):
        got, want = compiled(*call(step)), hand(*call(step), set() if step in computed else blocks)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        if step in computed:
            for a, b in zip(got, model(*call(step)), strict=True):
                assert torch.equal(a, b)
    (graph,) = compiled.vdcache.graphs
    streams = 2 if two else 1
    assert len(graph.slots) == streams * (runs_of(blocks) if span == "run" else len(blocks))
    assert compiled.vdcache.history.computed_steps() == sorted(computed)


@given(lists, st.booleans())
@settings(deadline=None, max_examples=examples(20, 5))
def test_a_skipped_run_is_gone(blocks, two):
    graph = guarded(MODELS[two], *call(0), more=(MergeSlots(),)) if len(blocks) == BLOCKS else _guarded(two, blocks)
    if cache_guards(graph.graph):
        assert_skipped(graph, *MODELS[two].state_dict().values(), *call(0))


def _guarded(two, blocks):
    passes = (Canonicalise(), MarkBranches(blocks=tuple(sorted(blocks))), MergeSlots())
    return Pipeline(passes, verify=True).run(trace(MODELS[two], *call(0)).graph)[0]


@given(lists, lists, st.booleans(), st.sampled_from(["split", "alternate"]))
@settings(deadline=None, max_examples=examples(15, 4), suppress_health_check=list(HealthCheck))
@torch.no_grad()
def test_two_lists_in_turn(one, other, two, reuse):
    other = other - one
    if not other:
        return
    torch._dynamo.reset()
    model, when = MODELS[two], vdcache.policies.StepList((1, 3))
    made = profilingdit(sorted(one), sorted(other), when=when, reuse=reuse)
    compiled = vdcache.compile(model, made, num_steps=STEPS, inner="eager", strict=True)
    hand = ByHand(model)
    for step in range(STEPS):
        plan = made.policy.plan(made.policy.start(STEPS), step).reuse
        want = hand(*call(step), {"background": one, "foreground": other}[next(iter(plan))] if plan else set())
        for a, b in zip(compiled(*call(step)), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_two_clocks_drive_four_variants():
    """Slots of two groups with intervals of their own: what a step computes of one group is kept, whatever the other does."""
    torch._dynamo.reset()
    model = MODELS[True]
    policy = vdcache.policies.CombinedPolicy(
        (
            vdcache.policies.SchedulePolicy(vdcache.policies.StepList((0, 4)), ("front",)),
            vdcache.policies.SchedulePolicy(vdcache.policies.StepList((0, 2, 3)), ("rear",)),
        )
    )
    scope = (
        MarkBranches(group="front", blocks=(0, 1, 2)),
        MarkBranches(group="rear", blocks=(3, 5)),
        MergeSlots(group="front"),
        MergeSlots(group="rear"),
    )
    compiled = vdcache.compile(model, vdcache.Recipe("two", policy, scope), num_steps=STEPS, inner="eager", strict=True)
    hand = ByHand(model)
    for step in range(STEPS):
        plan = policy.plan(policy.start(STEPS), step).reuse
        want = hand(*call(step), {b for g in plan for b in {"front": {0, 1, 2}, "rear": {3, 5}}[g]})
        for a, b in zip(compiled(*call(step)), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    (graph,) = compiled.vdcache.graphs
    assert sorted(map(str, graph.variants.plans)) == ["recompute", "reuse{front,rear}", "reuse{front}", "reuse{rear}"]
    assert compiled.vdcache.store.peak_bytes == graph.variants.cache_bytes()


@torch.no_grad()
def test_groups_that_a_graph_lacks_make_no_variant():
    torch._dynamo.reset()
    policy = vdcache.policies.CombinedPolicy(
        (
            vdcache.policies.SchedulePolicy(vdcache.policies.StepList((0, 2)), ("here",)),
            vdcache.policies.SchedulePolicy(vdcache.policies.StepList((0,)), ("nowhere",)),
        )
    )
    compiled = vdcache.compile(
        MODELS[False], vdcache.Recipe("one", policy, (MarkBranches(group="here"),)), num_steps=4, inner="eager"
    )
    for step in range(4):
        out = compiled(*call(step))
        assert torch.equal(out[0], MODELS[False](*call(step))[0]) == (step in (0, 2))
    (graph,) = compiled.vdcache.graphs
    assert len(graph.variants.plans) == len(graph.variants) == len(graph.variants._made) == 2


@torch.no_grad()
def test_adacache_on_background_blocks_alone():
    """An adaptive policy on a block list: what is observed is compared with the last step that computed the list."""
    torch._dynamo.reset()
    from vdcache.passes import Observe

    model = MODELS[False]
    scope = (MarkBranches(blocks=(1, 2, 4)), MergeSlots(), Observe(blocks=(0,)))
    policy = vdcache.methods.adacache([(1e9, 2)]).policy
    compiled = vdcache.compile(model, vdcache.Recipe("ada", policy, scope), num_steps=STEPS, inner="eager", strict=True)
    for step in range(STEPS):
        compiled(*call(step))
    assert compiled.vdcache.history.computed_steps() == [0, 1, 3, 4, 5]
    measured = {r.step: r.measures for r in compiled.vdcache.history if r.measures}
    assert set(measured) <= {1, 3, 4}, "a step that reuses the list measures nothing"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((), "the list of blocks is empty"),
        ((0, 3, 3), "names 3 twice"),
        ((0, 6), r"there is no block 6: of blocks that attend over video tokens this graph has 6 \(0 to 5\)"),
        ((-1,), "there is no block -1"),
    ],
)
def test_bad_lists(blocks, message):
    with pytest.raises(ConfigError, match=message):
        _guarded(False, blocks)


def test_lists_that_belong_to_another_model():
    report = vdcache.explain(MODELS[False], *call(0), recipe="profilingdit-wan2.1")
    assert "made for a model with 40 blocks" in report.nothing and "this one has 6: profile the model" in report.nothing
    torch._dynamo.reset()
    with pytest.raises(ConfigError, match="made for a model with 40 blocks"):
        vdcache.compile(MODELS[False], "profilingdit-wan2.1", num_steps=50, inner="eager")(*call(0))


def test_a_model_with_one_block():
    graph = trace(Stack(False, blocks=1), *call(0)).graph
    with pytest.raises(ConfigError, match=r"there is no block 1: .* this graph has 1 \(0 to 0\)"):
        Pipeline((Canonicalise(), MarkBranches(blocks=(1,)))).run(graph)


def test_what_counts_as_a_block_of_the_model():
    """Refiners of the text do not count; single and double blocks are counted apart where that is asked for."""
    report = vdcache.explain(build("hunyuan_video"), **ZOO["hunyuan_video"].call(0, 6))
    (graph,) = report.graphs
    found = graph.analysis
    assert [len(found.denoising_blocks(of)) for of in ("", "double", "single")] == [4, 2, 2]
    assert len(found.blocks) == 5


def test_slots_of_a_list_are_named_by_their_group():
    graph = _guarded(False, {0, 2, 3})
    assert [str(g.args[1]) for g in cache_guards(graph.graph)] == ["all/run.0", "all/run.1"]
    assert analyze(graph).denoising_blocks()[0].index == 0
