"""How attention under masks is computed: what is measured and remembered, and what a gather becomes in a graph."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

import vdcache
from tests.support.block_lists import Stack, call
from tests.support.thorough import THOROUGH, examples, some
from tests.support.tile_masks import bias_of, cases, noise, tensors
from vdcache.attention import autotune as choosing
from vdcache.attention import flex
from vdcache.attention.autotune import TuningResult, autotune, measure
from vdcache.attention.masks import Frames, Skip, Window
from vdcache.attention.merged import why_not_merged
from vdcache.attention.tiles import LOWERINGS, TILE_ATTENTION, gather, tiled
from vdcache.backends import lowering
from vdcache.backends.lowering import lower_tiles, tile_sites
from vdcache.ir.capture import trace
from vdcache.ir.edit import copy_graph
from vdcache.passes import Canonicalise, Pipeline, TileAttention

aten = torch.ops.aten
ATTENDS = aten.scaled_dot_product_attention.default


def new_process(monkeypatch):
    monkeypatch.setattr(choosing, "_known", {})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for what was measured."""
    new_process(monkeypatch)
    monkeypatch.setenv("VDCACHE_CACHE_DIR", str(tmp_path / "own"))
    return tmp_path / "own" / "lowerings.json"


@pytest.fixture
def measured(monkeypatch):
    """What `autotune` asks to be measured; the answers are made up."""
    asked = []

    def answer(query, key, value, bias, on, scale):
        asked.append((query, key, value, bias, on, scale))
        return TuningResult("masked", {"dense": 4.0, "gather": 3.0, "masked": 2.0}, on.density)

    monkeypatch.setattr(choosing, "measure", answer)
    return asked


ON = Frames(1).on(4, 2, 2)


def operands(form="heads", dtype=torch.float32, of_keys=2, tokens=16):
    return tuple(noise(1, n, tokens, 4, seed=s, dtype=dtype, form=form) for s, n in enumerate((2, of_keys, of_keys)))


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_what_was_measured_is_remembered(cache, measured):
    first = autotune(*operands(), None, ON, None)
    assert first == TuningResult("masked", {"dense": 4.0, "gather": 3.0, "masked": 2.0}, ON.density)
    assert (first.speedup, first.of_ideal) == (2.0, 2.0 * ON.density)
    assert autotune(*operands(), None, ON, None) == first and len(measured) == 1
    assert list(json.loads(cache.read_text()).values()) == [
        {"lowering": "masked", "seconds": first.seconds, "density": ON.density}
    ]
    assert [p.name for p in cache.parent.iterdir()] == [cache.name], "nothing is left beside it"
    autotune(*operands(), None, ON, None, again=True)
    assert len(measured) == 2


def test_every_form_is_measured_once(cache, measured):
    on = Frames(2).on(4, 2, 2)
    text = Frames(1).on(3, 2, 2, text=(0, 4))
    forms = [
        (*operands(), None, ON, None),
        (*operands("tokens"), None, ON, None),
        (*operands(dtype=torch.bfloat16), None, ON, None),
        (*operands(of_keys=1), None, ON, None),
        (*operands(), bias_of("bool", 1, 1, 16, None), ON, None),
        (*operands(), bias_of("float", 1, 1, 16, torch.float32), ON, None),
        (*operands(), None, on, None),
        (*operands(), None, text, None),
        (*operands(), None, Frames(1).on(2, 2, 4), None),
    ]
    for _ in range(2):
        for form in forms:
            autotune(*form)
    assert len(measured) == len(json.loads(cache.read_text())) == len(forms)
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        autotune(*forms[0])
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    assert len(measured) == len(forms) + 1, "other threads take other times"


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"3", b"\xff\xfe"])
def test_a_file_that_is_none_is_written_anew(cache, measured, content):
    cache.parent.mkdir()
    cache.write_bytes(content)
    found = autotune(*operands(), None, ON, None)
    assert autotune(*operands(), None, ON, None) == found and len(measured) == 1


def test_a_lowering_that_is_gone_is_measured_again(cache, measured, monkeypatch):
    autotune(*operands(), None, ON, None)
    known = json.loads(cache.read_text())
    next(iter(known.values()))["lowering"] = "gone"
    cache.write_text(json.dumps(known))
    new_process(monkeypatch)
    assert autotune(*operands(), None, ON, None).lowering == "masked" and len(measured) == 2


@pytest.mark.parametrize(
    "entry", [3, {}, {"lowering": "gather"}, {"lowering": "gather", "seconds": {}, "density": 1, "more": 2}]
)
def test_an_entry_of_another_form_is_measured_again(cache, measured, monkeypatch, entry):
    autotune(*operands(), None, ON, None)
    cache.write_text(json.dumps(dict.fromkeys(json.loads(cache.read_text()), entry)))
    new_process(monkeypatch)
    assert autotune(*operands(), None, ON, None).lowering == "masked" and len(measured) == 2


def test_where_nothing_can_be_written_it_is_measured_once_a_process(tmp_path, monkeypatch, measured):
    new_process(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VDCACHE_CACHE_DIR", str(tmp_path / "file" / "below"))
    for times in (1, 1, 2):
        assert autotune(*operands(), None, ON, None, again=times == 2).lowering == "masked" and len(measured) == times


def test_what_another_process_has_measured_is_read(cache, measured, monkeypatch):
    found = autotune(*operands(), None, ON, None)
    new_process(monkeypatch)
    assert autotune(*operands(), None, ON, None) == found and len(measured) == 1
    cache.unlink()
    assert autotune(*operands(), None, ON, None) == found and len(measured) == 1, "memory comes first"


def full(above, kind):
    """A `measure` that runs out of memory above so many elements of the queries."""
    asked = []

    def answer(query, key, value, bias, on, scale):
        asked.append([tuple(t.shape[:2]) for t in (query, key, value, bias) if t is not None])
        if query.numel() > above:
            raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return TuningResult("masked", {"dense": 4.0, "gather": 3.0, "masked": 2.0}, on.density)

    return asked, answer


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_where_memory_is_short_it_is_measured_on_some_heads(cache, monkeypatch, kind):
    """It ended the user's run."""
    q, k, v = (noise(2, n, 16, 4, seed=n) for n in (8, 4, 4))
    bias = torch.ones(1, 8, 1, 16, dtype=torch.bool)
    asked, answer = full(2 * 2 * 16 * 4, kind)
    monkeypatch.setattr(choosing, "measure", answer)
    found = autotune(q, k, v, bias, ON, None)
    assert asked == [
        [(2, 8), (2, 4), (2, 4), (1, 8)],
        [(2, 4), (2, 2), (2, 2), (1, 4)],
        [(2, 2), (2, 1), (2, 1), (1, 2)],
    ]
    assert found == TuningResult("masked", {"dense": 16.0, "gather": 12.0, "masked": 8.0}, ON.density), (
        "times are those of all heads"
    )
    assert autotune(q, k, v, bias, ON, None) == found and len(asked) == 3


def test_where_there_is_no_memory_at_all_nothing_is_kept(cache, monkeypatch):
    asked, answer = full(0, torch.OutOfMemoryError)
    monkeypatch.setattr(choosing, "measure", answer)
    assert autotune(*operands(), None, ON, None) == TuningResult("gather", {}, ON.density) and len(asked) == 2
    assert not cache.exists()
    autotune(*operands(), None, ON, None)
    assert len(asked) == 4, "later there may be some"


def test_other_errors_of_measuring_are_not_hidden(cache, monkeypatch):
    def answer(*given):
        raise RuntimeError("a bug")

    monkeypatch.setattr(choosing, "measure", answer)
    with pytest.raises(RuntimeError, match="a bug"):
        autotune(*operands(), None, ON, None)


def test_of_large_operands_some_heads_are_measured(cache, measured, monkeypatch):
    q, k, v = (noise(1, 8, 16, 4, seed=n) for n in range(3))
    monkeypatch.setattr(choosing, "MOST", 3 * 3 * 16 * 4 * 4)
    found = autotune(q, k, v, None, ON, None)
    ((random, *_),) = measured
    assert random.shape == (1, 3, 16, 4) and found.seconds["dense"] == pytest.approx(4.0 * 8 / 3)


def test_measuring_draws_nothing_from_the_users_generator(cache, measured):
    torch.manual_seed(3)
    want = torch.randn(4)
    torch.manual_seed(3)
    autotune(*operands(dtype=torch.float16), bias_of("bool", 1, 1, 16, None), ON, None)
    assert torch.equal(torch.randn(4), want)


@pytest.mark.parametrize("lowering", some(["flex", "triton"], "flex".__eq__))
def test_every_lowering_is_there_in_a_fresh_process(lowering):
    """They were made known by the import of another module."""
    program = f"""
        import torch, vdcache
        q, k, v = torch.randn(3, 1, 2, 16, 8)
        given = (q, k, v, "frames:1", (4, 2, 2))
        got = vdcache.tile_attention(*given, lowering={lowering!r})
        torch.testing.assert_close(got, vdcache.tile_attention(*given, lowering="masked"))
    """
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_the_folder_of_the_cache(tmp_path, monkeypatch, measured):
    monkeypatch.delenv("VDCACHE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    autotune(*operands(), None, ON, None)
    assert (tmp_path / "vdcache" / "lowerings.json").exists()


@pytest.mark.parametrize("form", ["heads", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_measured_has_the_form_of_what_is_given(cache, measured, form, dtype):
    """Size, order in memory, dtype; of fake tensors too."""
    given = (*operands(form, dtype, tokens=64), bias_of("bool", 1, 1, 64, None))
    with FakeTensorMode() as fake:
        given = tuple(map(fake.from_tensor, given))
    autotune(*given, ON, 0.3)
    ((*random, on, scale),) = measured
    assert [(t.shape, t.stride(), t.dtype) for t in random] == [(t.shape, t.stride(), t.dtype) for t in given]
    assert all(type(t) is torch.Tensor for t in random) and (on, scale) == (ON, 0.3)
    assert all(t.float().std() > 0 for t in random), "zeros and ones are faster than numbers"


def timed(monkeypatch, seconds):
    """Times that are made up, by lowering; what was timed."""
    asked = []

    def time(runs, *_):
        names = ["dense", "gather", *(n for n in LOWERINGS if n not in ("gather", *out))]
        asked.append(names[: len(runs)])
        return [seconds[n] for n in names[: len(runs)]]

    out = [n for n in LOWERINGS if n not in seconds]
    monkeypatch.setattr(choosing, "seconds_of", time)
    monkeypatch.setattr(choosing, "_can", lambda name, on, device: name not in out)
    return asked


def test_the_fastest_is_chosen(monkeypatch):
    timed(monkeypatch, {"dense": 4.0, "gather": 4.0, "masked": 3.0})
    found = measure(*operands(), None, ON, None)
    assert found == TuningResult("masked", {"dense": 4.0, "gather": 4.0, "masked": 3.0}, ON.density)
    timed(monkeypatch, {"dense": 4.0, "gather": 2.9, "masked": 3.0})
    assert measure(*operands(), None, ON, None).lowering == "gather"


def test_nothing_else_is_measured_where_a_gather_is_near_what_the_mask_could_save(monkeypatch):
    asked = timed(monkeypatch, {"dense": 4.0, "gather": 4.0 * ON.density / 0.91, "masked": 0.1})
    assert measure(*operands(), None, ON, None).lowering == "gather" and asked == [["dense", "gather"]]


def test_a_lowering_that_fails_is_not_chosen(monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel here")

    timed(monkeypatch, {"dense": 4.0, "gather": 4.0, "masked": 3.0})
    monkeypatch.setitem(LOWERINGS, "masked", fails)
    assert measure(*operands(), None, ON, None) == TuningResult("gather", {"dense": 4.0, "gather": 4.0}, ON.density)


def test_what_takes_too_long_is_not_measured(cache, monkeypatch):
    monkeypatch.setattr(choosing, "LONGEST", 1)
    monkeypatch.setattr(choosing, "seconds_of", None)
    found = autotune(*operands(), None, ON, None)
    assert found == TuningResult("gather", {}, ON.density) and found.speedup == 1.0 and not cache.exists()


def test_a_matrix_of_all_tokens_is_only_tried_where_it_is_small():
    cpu = torch.device("cpu")
    small, large = Frames(1).on(4, 32, 32), Frames(1).on(5, 32, 32)
    assert [choosing._can("masked", on, cpu) for on in (small, large)] == [True, False]


@pytest.mark.slow
def test_real_times():
    """Every lowering runs on a real device; flex attention compiles."""
    given = operands("tokens", tokens=6 * 64)
    found = measure(*given, None, Frames(1).on(6, 8, 8), None)
    assert {"dense", "gather"} <= set(found.seconds) and found.lowering in LOWERINGS
    assert all(s > 0 for s in found.seconds.values())
    assert found.seconds[found.lowering] == min(s for n, s in found.seconds.items() if n != "dense")


# ---- in a graph ------------------------------------------------------------------------------------------------------


def graph_of(q, k, v, on, scale, bias):
    """A graph that is the operation alone."""

    def fn(q, k, v, bias=None):
        return TILE_ATTENTION(q, k, v, bias, str(on.mask), list(on.grid), on.before, on.after, scale, "gather")

    given = (q, k, v) if bias is None else (q, k, v, bias)
    return trace(fn, *given).graph, given


def targets(graph):
    return [n.target for n in graph.graph.nodes if n.op == "call_function"]


# A tenth of the masks drawn has hundreds of slices, and each slice is traced: those are left to `make thorough`.
@given(cases().filter(lambda case: THOROUGH or case[0].pieces <= 48))
@settings(deadline=None, max_examples=examples(25, 10))
@torch.no_grad()
def test_a_gather_becomes_plain_attention_that_gives_the_same_to_the_bit(case):
    graph, given = graph_of(*tensors(case, torch.float32))
    want = graph(*given)[0]
    ((_, on),) = tile_sites(graph)
    lower_tiles(graph, "gather")
    if isinstance(on.mask, Skip):
        assert len(tile_sites(graph)) == 1
        return
    got, found = graph(*given)[0], targets(graph)
    assert found.count(ATTENDS) == len(on.groups) + bool(on.everywhere or on.text) and TILE_ATTENTION not in found
    assert torch.equal(got, want)


@torch.no_grad()
def test_the_tables_of_a_mask_are_no_part_of_the_graph():
    tiled.cache_clear()
    graph, given = graph_of(*operands("tokens"), ON, None, None)
    lower_tiles(graph, "gather")
    assert aten.nonzero.default not in targets(graph)
    torch.testing.assert_close(graph(*given)[0], gather(*given, ON, None, None))


def test_what_is_written_out_is_plain_aten():
    graph, _ = graph_of(*operands("tokens"), ON, None, None)
    gather(*operands("tokens"), ON, None, None)  # the tables are there
    lower_tiles(graph, "gather")
    assert {t.namespace for t in targets(graph)} == {"aten"}


def masked_graph(masks="frames:0"):
    graph = trace(Stack(True, blocks=2), *call(0)).graph
    return Pipeline((Canonicalise(), TileAttention(masks))).run(graph)[0]


GIVEN = (*Stack(True, blocks=2).state_dict().values(), *call(0))


@torch.no_grad()
def test_a_gather_inside_a_model():
    graph = masked_graph()
    want, plain = graph(*GIVEN), copy_graph(graph)
    assert lower_tiles(plain, "gather") == {} and not tile_sites(plain)
    assert all(torch.equal(a, b) for a, b in zip(plain(*GIVEN), want, strict=True))
    assert len(tile_sites(graph)) == 2, "only the copy is changed"
    attends = [n for n in plain.graph.nodes if n.target is ATTENDS]
    assert {n.meta["vdcache"] for n in attends} == {"tile-attention{masks=[frames:0]}"}
    assert [tuple(n.meta["val"].shape) for n in attends] == [(1, 2, 3, 4), (1, 4, 6, 4)] * 2, "the text, then the frames"


@pytest.mark.parametrize(
    ("name", "expand", "mask"), [("gather", False, "frames:0"), ("masked", True, "frames:0"), ("gather", True, "skip")]
)
@torch.no_grad()
def test_what_stays_one_operation(name, expand, mask):
    graph = masked_graph(mask)
    want = graph(*GIVEN)[0]
    lower_tiles(graph, name, expand=expand)
    assert [n.args[9] for n, _ in tile_sites(graph)] == [name] * 2
    torch.testing.assert_close(graph(*GIVEN)[0], want, rtol=1e-5, atol=1e-6)


@given(cases())
@settings(deadline=None, max_examples=examples(25, 10))
@torch.no_grad()
def test_what_is_merged_becomes_dense_calls_that_give_the_same(case):
    q, k, v, on, scale, _ = tensors(case, torch.float32)
    if q.shape[1] != k.shape[1] or why_not_merged(on):
        return
    graph, given = graph_of(q, k, v[..., : q.shape[3]], on, scale, None)
    lower_tiles(graph, "merged")
    assert TILE_ATTENTION not in targets(graph) and {t.namespace for t in targets(graph) if t is not operator.getitem} == {
        "aten"
    }
    torch.testing.assert_close(graph(*given)[0], gather(*given, on, scale, None), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gather", "merged"])
def test_on_a_gpu_it_stays_one_operation_that_runs_on_two_streams(name):
    graph, _ = graph_of(*operands("tokens"), ON, None, None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for node in graph.graph.nodes:
            if isinstance(value := node.meta.get("val"), torch.Tensor):
                node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    lower_tiles(graph, name)
    assert [n.args[9] for n, _ in tile_sites(graph)] == [name]


def test_masks_without_shared_keys_are_not_tried_merged():
    cpu = torch.device("cpu")
    assert choosing._can("merged", ON, cpu)
    assert not any(choosing._can("merged", on, cpu) for on in (Frames(0).on(4, 2, 2), Frames(4).on(4, 2, 2)))


def test_a_gather_of_many_pieces_stays_one_operation(monkeypatch):
    few, many = Frames(0), Window((1, 1, 1), (1, 1, 1))
    assert (few.on(2, 2, 3).pieces, many.on(2, 2, 3).pieces) == (4, 24)
    monkeypatch.setattr(lowering, "PIECES", 4)
    graph = masked_graph([few, many])
    lower_tiles(graph, "gather")
    assert [on.mask for _, on in tile_sites(graph)] == [many]


def test_each_attention_is_measured_and_gets_its_own(monkeypatch):
    asked = []

    def answer(query, key, value, bias, on, scale):
        asked.append((query.shape, key.shape, value.shape, bias, on.density, scale))
        return TuningResult(("masked", "gather")[len(asked) - 1], {"dense": 2.0, "masked": 1.0, "gather": 1.0}, on.density)

    monkeypatch.setattr(lowering, "autotune", answer)
    graph = masked_graph(["frames:0", "window:1x1x1:1x2x3"])
    names = [n.name for n, _ in tile_sites(graph)]
    found = lower_tiles(graph)
    assert list(found) == names and [c.lowering for c in found.values()] == ["masked", "gather"]
    assert [n.name for n, _ in tile_sites(graph)] == names[:1]
    size = torch.Size((1, 2, 15, 4))
    assert asked == [(size, size, size, None, Frames(0).density(2, 2, 3, text=3), None)] * 2


# ---- to the end ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_a_model_under_masks_through_inductor(cache):
    """What was measured is said, kept, and the result is that of the eager inner compiler up to rounding."""
    torch._dynamo.reset()
    model = Stack(True, blocks=2)
    eager = vdcache.compile(model, "tiles-0", inner="eager")
    want = [eager(*call(step)) for step in range(3)]
    compiled = vdcache.compile(model, "tiles-0+every-2", num_steps=3, tiles="auto", strict=True)
    for step in range(3):
        for a, b in zip(compiled(*call(step)), want[step], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5) == (step != 1)
    (graph,) = compiled.vdcache.graphs
    assert "2 attentions under masks (frames:0): " in graph.masks and "× as fast as dense attention" in graph.masks
    assert len(json.loads(cache.read_text())) == 1, "both attentions are of one form"


@torch.no_grad()
@pytest.mark.parametrize("lowering", ["gather", "merged", "flex"])
def test_a_lowering_that_is_given_through_inductor(lowering):
    """As after a start with choices on the disk: nothing has run under the mask yet."""
    torch._dynamo.reset()
    tiled.cache_clear()
    flex.block_mask.cache_clear()
    model = Stack(True, blocks=1)
    got = vdcache.compile(model, "tiles-0", tiles=lowering, strict=True)(*call(0))
    want = vdcache.compile(model, "tiles-0", inner="eager")(*call(0))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
