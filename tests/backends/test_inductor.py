"""The same promises through Inductor: a few, because compiling takes seconds."""

from __future__ import annotations

import pytest
import torch

import vdcache
from tests.support.logs import informed
from vdcache.backends import variants
from vdcache.backends.eager import run_eagerly
from vdcache.ir.regions import INVOKE, inline_regions
from vdcache.testing import Reference, TinyDiT, latent, time_of

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_steps_follow_the_reference_and_computed_ones_equal_plain_inductor():
    model = TinyDiT()
    plain = torch.compile(model)
    compiled = torch.compile(model, backend="vdcache", options={"recipe": "every-3", "num_steps": 6})
    reference = Reference(model, 3, 6)
    for seed in range(2):
        reference.begin()
        for step in range(6):
            x, t, words = latent(10 * seed + step), time_of(step), latent(9, 1, 3, 4)
            out = compiled(x, t, words)
            torch.testing.assert_close(out, reference.call(step, 0, x, t, words), rtol=1e-4, atol=1e-5)
            if step in (0, 3, 5):
                torch.testing.assert_close(out, plain(x, t, words), rtol=1e-5, atol=1e-6)
            out.fill_(float("nan"))


@torch.no_grad()
def test_a_variant_compiled_late_is_right_at_four_sizes():
    """The reuse variant is first needed after Dynamo has returned, under symbols that it made, at a third size."""
    model = TinyDiT()
    compiled = vdcache.compile(model, vdcache.methods.adacache([(1e9, 2)]), num_steps=5, dynamic=True)
    reused = 0
    for tokens in (6, 9, 12, 7):
        kept = None
        for step in range(5):
            x, t, words = latent(step, 1, tokens, 4), time_of(step), latent(9, 1, 3, 4)
            out = compiled(x, t, words)
            if compiled.vdcache.history[-1].reused:
                reused += 1
                torch.testing.assert_close(out, model.with_branches(x, words, kept), rtol=1e-4, atol=1e-5)
            else:
                kept = model.branches(x, t, words)
                torch.testing.assert_close(out, model(x, t, words), rtol=1e-4, atol=1e-5)
        tokens_seen = {r.step: r.measures for r in compiled.vdcache.history.generation()}
        assert tokens_seen[1], "the observed branch was measured"
    assert reused == 4
    assert len(compiled.vdcache.graphs) == 1


@torch.no_grad()
def test_warm_up_compiles_everything_and_inference_mode_works():
    model = TinyDiT()
    compiled = vdcache.compile(model, "every-2", num_steps=4, inductor={"max_autotune": False})
    reference = Reference(model, 2, 4)
    with torch.inference_mode():
        compiled(latent(0), time_of(0), latent(9, 1, 3, 4))
        compiled.vdcache.warm_up()
        (graph,) = compiled.vdcache.graphs
        assert {str(plan) for plan in graph.variants.plans if graph.variants[plan]._compiled} == {"recompute", "reuse{all}"}
        compiled.vdcache.reset()
        for step in range(4):
            x, t, words = latent(step), time_of(step), latent(9, 1, 3, 4)
            torch.testing.assert_close(compiled(x, t, words), reference.call(step, 0, x, t, words), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("takes_calls", [True, False])
def test_blocks_that_repeat_are_compiled_once(takes_calls, monkeypatch):
    """Inductor is given one block and calls of it; where it refuses them, every block, and the user is told once."""
    given = []
    real = variants.compile_own

    def compile_own(graph, inputs, options, static):
        calls = len(graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph))
        if calls and not takes_calls:
            raise NotImplementedError("no calls here")
        given.append(calls)
        return real(graph, inputs, options, static)

    monkeypatch.setattr(variants, "compile_own", compile_own)
    model = TinyDiT(4)
    compiled = vdcache.compile(model, "every-2", num_steps=4, outline=True)
    with informed() as lines:
        for step in range(2):
            x, t, words = latent(step), time_of(step), latent(9, 1, 3, 4)
            out = compiled(x, t, words)
            if step == 0:
                torch.testing.assert_close(out, model(x, t, words), rtol=1e-5, atol=1e-6)
    assert compiled.vdcache.history[-1].reused
    assert given == ([4, 0] if takes_calls else [0, 0]), "what is computed, then what is reused"
    assert sum("no calls here" in line for line in lines) == (not takes_calls)


@torch.no_grad()
def test_inductor_is_given_what_a_variant_reads_and_told_which_of_it_stays(monkeypatch):
    """A step that reuses the blocks reads none of their weights. Weights stay where they are; nobody else tells Inductor so."""
    from torch._inductor import compile_fx, config

    given: list[tuple[int, list[int]]] = []
    real = compile_fx.get_input_idxs_to_check

    def to_check(inputs, static):
        given.append((len(inputs), list(static)))
        return real(inputs, static)

    monkeypatch.setattr(compile_fx, "get_input_idxs_to_check", to_check)
    model = TinyDiT(4)
    with config.patch(force_disable_caches=True):
        compiled = vdcache.compile(model, "every-2", num_steps=4)
        for step in range(2):
            compiled(latent(step), time_of(step), latent(9, 1, 3, 4))
    weights = len(list(model.parameters()))
    (all_inputs, all_static), (few_inputs, few_static) = given
    assert (all_inputs, len(all_static)) == (weights + 3, weights)
    of_blocks = sum(1 for name, _ in model.named_parameters() if name.startswith("blocks"))
    assert len(few_static) <= weights - of_blocks
    assert len(few_static) < few_inputs <= len(few_static) + 4, "what is not a weight: latent, timestep, what was kept"


@torch.no_grad()
@pytest.mark.parametrize(("outline", "calls"), [("auto", 0), (True, 4), (False, 0)])
def test_why_small_blocks_are_compiled_one_by_one_is_in_the_summary(monkeypatch, outline, calls):
    given = []

    def stub(graph, inputs, options, static):
        given.append(len(graph.graph.find_nodes(op="call_function", target=INVOKE)))
        inline_regions(graph)
        return run_eagerly(graph)

    monkeypatch.setattr("vdcache.backends.variants.compile_own", stub)
    torch._dynamo.reset()
    model = vdcache.compile(TinyDiT(4), "every-2", num_steps=2, outline=outline)
    for step in range(2):
        model(latent(step, 1, 6, 4), time_of(step), latent(9, 1, 3, 4))
    said = "compiled one by one: a block takes" in " ".join(str(model.vdcache.summary()).split())
    assert max(given) == calls and said == (outline == "auto")


def test_what_outline_may_be_is_told():
    with pytest.raises(vdcache.errors.ConfigError, match="outline is True, False or 'auto'; got 'yes'"):
        vdcache.compile(TinyDiT(), outline="yes")
