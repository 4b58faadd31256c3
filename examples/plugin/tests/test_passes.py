"""Both passes: what they write, what they refuse, that computed steps do not change, that reuse leaves out what it promises."""

import pytest
import torch
from vdcache_window import KeepWindowResidual, WindowAttention

import vdcache
from vdcache.passes import Canonicalise
from vdcache.testing import (
    RecordingBackend,
    TinyDiT,
    assert_bit_identical,
    assert_pass,
    assert_refuses,
    assert_skipped,
    dump,
    latent,
    run_pass,
    small_models,
    time_of,
    trace,
    variant,
)

BLOCK = """
%0 = input() : f32[1,6,4]
%1 = parameter() : f32[4,4]
%2 = input() : f32[1]
%3 = linear(%0, %1)
%4 = unsqueeze(%3, 1)
%5 = scaled_dot_product_attention(%4, %4, %4)
%6 = squeeze.dim(%5, 1)
%7 = linear(%6, %1)
%8 = add(%0, %7)
return (%8)"""


def test_keeps_the_residual():
    before = dump(Canonicalise().run(trace(TinyDiT(1), latent(0), time_of(0), latent(1)).graph).graph)
    line = next(x for x in before.splitlines() if "scaled_dot" in x)
    number = int(line.split(" ")[0][1:])
    result = run_pass(KeepWindowResidual(window=1), before)
    got = dump(result.graph).splitlines()
    assert result.rewrites == 1
    assert got[number : number + 5] == [
        f"%{number} = new_ones(%0, [6, 6], dtype=torch.bool) : b1[6,6]",
        f"%{number + 1} = triu(%{number}, -1) : b1[6,6]",
        f"%{number + 2} = tril(%{number + 1}, 1) : b1[6,6]",
        line.replace(f"%{number} =", f"%{number + 3} =").replace(") :", f", %{number + 2}) :"),
        line.replace(f"%{number} =", f"%{number + 4} ="),
    ]
    slot = "all/s0.b0.self-attention.scaled_dot_product_attention"
    assert f"cache_guard(%{number + 4}, '{slot}', %{number + 3})" in got[number + 5]


def test_temporal_attention_sees_near_frames():
    graph, inputs = small_models()["latte"].graph() if "latte" in small_models() else pytest.skip("latte is diffusers'")
    before = Canonicalise().run(graph).graph
    result = run_pass(WindowAttention(frames=1), before)
    sites = [a for a in vdcache.analyze(before).attentions if a.layout == "temporal"]
    assert result.rewrites == len(sites) > 0
    frames = sites[0].q_len
    assert frames is not None
    text = dump(result.graph)
    assert text.count("triu(") == len(sites) and f"b1[{frames},{frames}]" in text
    assert any("not over frames" in reason for r in result.refusals for reason in r.reasons)
    everything = run_pass(WindowAttention(frames=frames), before).graph  # a window of all frames leaves nothing out
    with torch.no_grad():
        torch.testing.assert_close(everything(*inputs)[0], before(*inputs)[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(result.graph(*inputs)[0], before(*inputs)[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("a_pass", "change", "reason"),
    [
        (WindowAttention(), ("", ""), "it runs over .* tokens, not over frames"),
        (KeepWindowResidual(window=1), ("%4, %4, %4)", "%4, %4, %4, None, 0.0, True)"), "it has a mask or drops weights"),
        (KeepWindowResidual(window=3), ("", ""), "its 6 tokens all lie in a window of 3"),
    ],
)
def test_what_is_left_alone(a_pass, change, reason):
    model = TinyDiT(1)
    text = dump(Canonicalise().run(trace(model, latent(0), time_of(0), latent(1)).graph).graph)
    if change[0]:
        line = next(x for x in text.splitlines() if "scaled_dot" in x)
        text = text.replace(line, line.replace(") :", ", None, 0.0, True) :"))
    assert_refuses(a_pass, text, reason)


def test_nothing_to_do_is_no_rewrite():
    assert_pass(KeepWindowResidual(), BLOCK, BLOCK)  # no timestep, no denoising block


def test_options_are_checked():
    for kind in (WindowAttention, KeepWindowResidual):
        with pytest.raises(vdcache.errors.ConfigError, match="at least 1, got 0"):
            kind(0)


def test_computed_steps_are_bit_identical_and_reuse_skips():
    graph, inputs = small_models()["tiny"].graph()
    before = Canonicalise().run(graph).graph
    marked = run_pass(KeepWindowResidual(window=1), before).graph
    assert_bit_identical(before, marked, *inputs)
    assert_skipped(marked, *inputs)
    full, reuse = variant(marked), variant(marked, ["all"])
    with torch.no_grad():
        *outputs, _, _, _ = full(*inputs)
        assert torch.equal(outputs[0], before(*inputs)[0])
        kept = full(*inputs)[len(outputs) :]
        torch.testing.assert_close(reuse(*inputs, *kept)[0], outputs[0], rtol=1e-4, atol=1e-5)
    attentions = [n for n in reuse.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    assert len(attentions) == 3 and all(len(n.args) == 4 for n in attentions), "only windowed attention is left"


def test_in_a_real_compilation(vdcache_clean):
    case = small_models()["tiny"]
    backend = RecordingBackend("every-2", pipeline="keep-window-residual{window=1}", num_steps=4)
    compiled = torch.compile(case.build(), backend=backend, dynamic=False)
    with torch.no_grad():
        for step in range(4):
            compiled(**case.call(step, 6))
    stage = backend.stage("keep-window-residual")
    assert (stage.rewrites, stage.refusals) == (3, ())
    assert "cache_guard(" not in dump(stage.before) and dump(stage.after).count("cache_guard(") == 3
