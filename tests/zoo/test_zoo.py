"""Real architectures: what is found, that recomputing is bit-exact, that reuse adds what was recorded."""

from __future__ import annotations

import functools

import pytest
import torch

import vdcache
from tests.support.thorough import THOROUGH, some
from tests.zoo import ZOO, build
from vdcache.explanation.reader import _report
from vdcache.ir.capture import CapturedForward, CapturedPart
from vdcache.methods import recipe
from vdcache.testing import assert_round_trip

STEPS = 5
# through explain's own door, as are all with graph breaks
EXPLAINED = ["wan", "latte", "pixart", "cogvideox"] if THOROUGH else ["wan"]
UNEQUAL = ["wan", "flux", "chroma", "pixart", "sd3", "hunyuan_video", "open_sora", "qwenimage", "lumina"]
SEVEN = ["wan", "hunyuan_video", "flux", "cogvideox", "latte", "sd3", "sana"]  # of every structure one
# Architectures that are built as another one, which `make test` looks at in their place.
LIKE = {
    "bria": "flux",
    "bria_fibo": "flux",
    "chroma": "flux",
    "flux2": "flux",
    "hunyuan_image": "hunyuan_video",
    "cogview3plus": "cogvideox",
    "sana_video": "sana",
    "longcat_image": "flux",
    "ovis_image": "flux",
    "cogview4": "qwenimage",
    "joyimage": "qwenimage",
    "krea2": "z_image",
    "lumina2": "z_image",
    "qwenimage21": "omnigen",
    "ernie_image": "lumina",
    "ideogram4": "lumina",
    "nucleus_image": "prx",
    "dreamlite": "transformer_2d",
    "stable_audio_3": "stable_audio",
    "longcat_audio": "ace_step",
    "allegro": "pixart",
    "anyflow": "wan",
    "anyflow_far": "wan",
    "chronoedit": "wan_i2v",
    "ltx": "wan",
    "cosmos": "wan",
    "helios": "wan",
    "skyreels_v2": "wan",
    "cosmos_transfer25": "wan",
    "framepack": "hunyuan_video",
    "kandinsky6": "kandinsky5",
    "ltx23": "ltx2",
    "open_sora_masked": "open_sora",
    "open_sora_plan": "pixart",
    "open_sora_plan_sparse": "pixart",
    "sit": "dit_original",
    "audio_video": "ltx2",
    "easyanimate": "cogvideox",
    "demo": "wan",
}


def one_or_two(kept):
    """All pairs of an architecture and a recipe, of which `make test` runs those that are listed for the recipe."""
    return some(((name, recipe) for name in SEVEN for recipe in kept), lambda pair: pair[0] in kept[pair[1]])


def value(output):
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", output)


def report_of(compiled, model, chosen="every-3"):
    """What explain says of the graphs that were compiled: it reads them from the same capture, so the model is not traced again."""
    found = CapturedForward([CapturedPart(program.guarded.captured) for program in compiled.vdcache.graphs])
    return _report(type(model).__name__, found, recipe(chosen), STEPS)


@functools.cache
def _asks_for_its_backend() -> bool:
    """Whether Dynamo follows ACE-Step's question for its attention backend: that of torch 2.11 breaks the graph there."""
    from diffusers.models.transformers import ace_step_transformer

    def fn(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if ace_step_transformer._is_flash_attention_backend() else x * 2

    try:
        torch.compile(fn, backend="eager", fullgraph=True)(torch.ones(1))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


# One step more of a generation is computed, to learn that an input moves with the timestep: what a graph before the timestep makes of
# the latent.
LEARNT = {"glm_image"}


def test_what_stands_in_the_place_of_another_architecture_is_looked_at():
    assert set(LIKE) < set(ZOO) and not set(LIKE) & {*LIKE.values(), *SEVEN} and set(LIKE.values()) < set(ZOO)


@pytest.mark.parametrize("name", some(["wan", "sd3", "latte"], lambda name: name == "wan"))
@torch.no_grad()
def test_blocks_that_their_author_marked(name, monkeypatch):
    torch._dynamo.reset()
    model, case = build(name), ZOO[name]
    kinds = {type(block) for blocks in model.children() if isinstance(blocks, torch.nn.ModuleList) for block in blocks}
    for kind in kinds:
        monkeypatch.setattr(kind, "forward", torch.compiler.nested_compile_region(kind.forward))
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager", strict=True)
    for step in range(STEPS):
        out = value(compiled(**case.call(step, 6)))
        assert torch.equal(out, value(model(**case.call(step, 6)))) == (step in (0, 3, 4))
    assert compiled.vdcache.history.computed_steps() == [0, 3, 4]


@pytest.mark.parametrize("name", some(ZOO, lambda name: name in ("wan", "flux")))
@torch.no_grad()
def test_what_is_held_is_exact(name):
    """Two generations, the second of which finds all that is held; `bench.exact` looks at every architecture."""
    torch._dynamo.reset()
    model, case = build(name), ZOO[name]
    compiled = vdcache.compile(model, "exact", num_steps=STEPS, inner="eager")
    tables = compiled.vdcache.invariants
    for _ in range(2):
        misses = tables.misses
        for step in range(STEPS):
            assert torch.equal(value(compiled(**case.call(step, 6))), value(model(**case.call(step, 6))))
    if case.graphs == 1:
        assert tables.hits and tables.misses == misses


@pytest.mark.parametrize("name", some(ZOO, lambda name: name not in LIKE))
@torch.no_grad()
def test_architecture(name):
    """What is found is what the architecture has; computed steps are bit-exact, reused ones add what was recorded."""
    if name == "ace_step" and not _asks_for_its_backend():
        pytest.skip(
            f"torch {torch.__version__}: Dynamo breaks this model where it asks for its attention backend, in every attention"
        )
    torch._dynamo.reset()
    model, case = build(name), ZOO[name]
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager", strict=case.graphs == 1)
    session = compiled.vdcache
    for _ in range(2):
        for step in range(STEPS):
            out, want = value(compiled(**case.call(step, 6))), value(model(**case.call(step, 6)))
            learns = step == 1 and name in LEARNT
            if step in (0, 3, 4) or learns:
                assert torch.equal(out, want), "a computed step is the untouched model, bit for bit"
            else:
                assert not torch.equal(out, want), "a reused step skipped something"
    due = [0, *([1] if name in LEARNT else []), 3, 4]
    assert session.history.computed_steps(0) == session.history.computed_steps(1) == due

    # Reusing on the very input that was recorded gives the recorded output back: the sum of all contributions is kept whole.
    session.begin(STEPS)
    session.step()
    first = value(compiled(**case.call(0, 6)))
    session.step()
    second = value(compiled(**case.call(0, 6)))
    assert session.history[-1].reused
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)

    if case.graphs > 1 or name in EXPLAINED:
        report = vdcache.explain(model, recipe="every-3", **case.call(0, 6))
    else:
        report = report_of(compiled, model)
    assert report.count() == (case.seen or case.branches)
    assert len(report.graphs) == case.graphs
    # A reused step is as cheap as the coverage promises: whatever only branches need is gone.
    assert report.variants[-1].flops == pytest.approx(report.flops * (1 - report.coverage), rel=0.01)
    assert any(g.guarded.analysis.timestep_inputs for g in session.graphs)
    assert any(g.guarded.analysis.latent for g in session.graphs)

    # The text of every graph is the graph, guarded (which holds all that was captured) and specialised.
    for program in session.graphs:
        assert_round_trip(program.guarded.module)
        if THOROUGH or name in SEVEN:
            assert_round_trip(program.variants[program.variants.plans[-1]].graph)


# One model has an attention for the text alone, the other a mask. Those that join text and image run in `make thorough`.
@pytest.mark.parametrize("name", some(UNEQUAL, {"wan", "pixart"}.__contains__))
@torch.no_grad()
def test_two_lanes_with_texts_of_unequal_length(name):
    torch._dynamo.reset()
    model, case = build(name), ZOO[name]
    compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager")
    for generation in range(2):  # in the first, the second length makes Dynamo trace again, and a new graph has nothing stored
        for step in range(STEPS):
            for tokens in (6, 4):
                out, want = value(compiled(**case.call(step, tokens))), value(model(**case.call(step, tokens)))
                if step in (0, 3, 4) or generation:
                    assert torch.equal(out, want) == (step in (0, 3, 4))
    assert compiled.vdcache.history.computed_steps() == [0, 3, 4]


@pytest.mark.parametrize("name", some(["wan", "flux", "sd3", "latte"], "flux".__eq__))
@torch.no_grad()
def test_unmerged_reuse_equals_adding_recorded_contributions(name):
    """One slot a branch: a reused step equals the stream with each recorded contribution added by hand."""
    from vdcache.ir.capture import capture
    from vdcache.passes import Canonicalise, DeadCode, MarkBranches, MergeSlots, Pipeline, Specialise, variant_io

    torch._dynamo.reset()
    model, case = build(name), ZOO[name]
    found = []

    def door(graph, inputs):
        found.append((capture(graph, inputs).graph, list(inputs)))
        return graph.forward

    torch.compile(model, backend=door)(**case.call(0, 6))
    graph, inputs = found[0]
    results = []
    for more in ((), (MergeSlots(),)):
        marked, _ = Pipeline((Canonicalise(), MarkBranches(), *more)).run(graph)
        given = frozenset(Specialise.requires)
        full, _ = Pipeline((Specialise(), DeadCode()), verify=True, given=given).run(marked)
        reuse, _ = Pipeline((Specialise(reuse=frozenset({"all"})), DeadCode()), verify=True, given=given).run(marked)
        outputs = full(*inputs)
        kept = dict(zip(variant_io(full).saves, outputs[len(outputs) - len(variant_io(full).saves) :], strict=True))
        results.append((reuse(*inputs, *[kept[s] for s in variant_io(reuse).reads])[0], len(kept)))
    (apart, many), (merged, few) = results
    assert few < many
    torch.testing.assert_close(merged, apart, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_tensor_a_stream_whatever_the_depth():
    from vdcache.testing.architectures import _wan

    sizes = {}
    for depth in (2, 6):
        torch._dynamo.reset()
        model = _wan(depth).eval().requires_grad_(False)
        compiled = vdcache.compile(model, "adacache-fast", num_steps=30, inner="eager")
        compiled(**ZOO["wan"].call(0, 6))
        sizes[depth] = compiled.vdcache.graphs[0].variants.cache_bytes()
    stream = 1 * 3 * 4 * 4 * 24 * 4  # one float32 tensor of tokens × width
    assert sizes == {2: 2 * stream, 6: 2 * stream}


def test_the_zoo_is_large():
    assert len(ZOO) >= 45


@pytest.mark.parametrize("name", some(["wan", "flux", "sd3", "latte", "ltx2", "wan_vace"], "sd3".__eq__))
@torch.no_grad()
def test_reuse_in_16_bit_is_within_one_unit_of_the_stream(name):
    """base + (fresh − base) rounds twice: at most half a unit in the last place of the difference and half a one of the sum."""
    from vdcache.ir import dialect
    from vdcache.ir.capture import capture
    from vdcache.passes import Canonicalise, DeadCode, MarkBranches, MergeSlots, Pipeline, Specialise, variant_io

    torch._dynamo.reset()
    model, case = build(name).to(torch.bfloat16), ZOO[name]
    call = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim > 1 else v
        for k, v in case.call(0, 6).items()
    }
    found = []

    def door(graph, inputs):
        found.append((capture(graph, inputs).graph, list(inputs)))
        return graph.forward

    torch.compile(model, backend=door)(**call)
    graph, inputs = found[0]
    marked, _ = Pipeline((Canonicalise(), MarkBranches(), MergeSlots())).run(graph)
    full, _ = Pipeline((Specialise(), DeadCode()), given=frozenset(Specialise.requires)).run(marked)
    outputs = full(*inputs)
    io = variant_io(full)
    saved = dict(zip(io.saves, outputs[len(outputs) - len(io.saves) :], strict=True))

    values = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, node):
            values[node.name] = super().run_node(node)
            return values[node.name]

    Watch(marked).run(*inputs)
    merged = [g for g in dialect.cache_guards(marked.graph) if len(g.args) > 2]
    assert merged
    for cache_guard in merged:
        fresh, base, kept = values[cache_guard.args[0].name], values[cache_guard.args[2].name], saved[cache_guard.args[1]]
        assert fresh.dtype == base.dtype == kept.dtype
        unit = torch.finfo(fresh.dtype).eps * torch.stack([fresh.abs(), base.abs(), kept.abs()]).amax(0).double()
        assert ((base + kept).double() - fresh.double()).abs().le(unit).all()


# each recipe with one or two of the seven
@pytest.mark.parametrize(
    ("name", "recipe"), one_or_two({"fora-3": ("wan", "sana"), "taylorseer-3-1": ("flux",), "blocks": ("cogvideox", "latte")})
)
@torch.no_grad()
def test_other_recipes(name, recipe):
    """Before the gate, along differences, and some blocks alone: computed steps stay bit-exact, others skip what they promise."""
    torch._dynamo.reset()
    model, case = build(name), ZOO[name]
    chosen = vdcache.methods.profilingdit([0, 2], when=[0, 3]) if recipe == "blocks" else recipe
    compiled = vdcache.compile(model, chosen, num_steps=STEPS, inner="eager", strict=True)
    for step in range(STEPS):
        out, want = value(compiled(**case.call(step, 6))), value(model(**case.call(step, 6)))
        assert torch.equal(out, want) == compiled.vdcache.history[-1].computed
        assert out.isfinite().all()
    (graph,) = compiled.vdcache.graphs
    assert compiled.vdcache.store.peak_bytes == graph.variants.cache_bytes()
    report = report_of(compiled, model, chosen)
    left = {slot for s in report.slots for slot in s.branches}
    skipped = sum(b.flops for b in report.branches if b.name in left)
    # what projects a condition or a modulation for skipped branches alone may go as well; a gate before which is kept stays
    assert report.variants[-1].flops == pytest.approx(report.flops - skipped, abs=0.05 * report.flops)


@pytest.mark.parametrize(
    ("name", "recipe"),
    one_or_two(
        {"fbcache-5": ("sd3",), "teacache-5": ("wan", "hunyuan_video"), "easycache-50": ("flux",), "pab-cogvideox": ("latte",)}
    ),
)
@torch.no_grad()
def test_recipes_that_probe(name, recipe):
    """The graph is split at the probe: computed steps stay bit-exact, reused ones differ, and what is kept was known."""
    torch._dynamo.reset()
    model, case = build(name), ZOO[name]
    compiled = vdcache.compile(model, recipe, num_steps=10, inner="eager", strict=True)
    for step in range(10):
        out, want = value(compiled(**case.call(step, 6))), value(model(**case.call(step, 6)))
        assert torch.equal(out, want) == compiled.vdcache.history[-1].computed
    (graph,) = compiled.vdcache.graphs
    assert len(compiled.vdcache.history.computed_steps()) < 10
    assert compiled.vdcache.store.peak_bytes == graph.variants.cache_bytes()


@pytest.mark.parametrize("name", some(["wan", "flux2", "cogvideox"], "wan".__eq__))
@torch.no_grad()
def test_graphs_for_many_sizes_show_the_same(name):
    """Sizes that are symbols hide neither timestep nor latent, and are no timestep themselves."""
    case, seen = ZOO[name], []
    for dynamic in (False, True):
        torch._dynamo.reset()
        model = build(name)
        compiled = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager", dynamic=dynamic)
        with torch._dynamo.config.patch(specialize_float=True):  # floats of the model are inputs otherwise
            for step in range(2):
                compiled(**case.call(step, 6))
        (graph,) = compiled.vdcache.graphs
        found = graph.guarded.analysis
        seen.append((len(found.timestep_inputs), len(found.latents), len(graph.inputs.latents), found.count()))
        assert compiled.vdcache.history[-1].reused
    assert seen[0] == seen[1]
