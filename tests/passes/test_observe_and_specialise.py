"""observe and specialise: what is measured, what a variant takes and returns, what is gone."""

import pytest
import torch
from expecttest import assert_expected_inline

from vdcache.errors import ConfigError
from vdcache.passes import DeadCode, MergeSlots, Observe, Specialise, VariantIO, VariantOutputs, variant_io
from vdcache.predictors import Taylor
from vdcache.testing import (
    TinyDiT,
    assert_bit_identical,
    assert_round_trip,
    dump,
    guarded,
    latent,
    parse,
    run_pass,
    run_variant,
    time_of,
    variant,
)

X, W = torch.randn(1, 6, 4), torch.randn(4, 4)


def net(x, w):
    x = x + x @ w
    return x + torch.relu(x @ w)


GUARDED = """
%0 = input() : f32[3,4]
%1 = parameter() : f32[4,4]
%2 = matmul(%0, %1)
%3 = cache_guard(%2, 'all/a'BASE)
%4 = relu(%3)
return (%4)"""


@pytest.mark.parametrize("base", ["", ", %0"])
def test_plans(base):
    text = GUARDED.replace("BASE", base)
    saved = "%4 = sub(%2, %0)\n%5 = relu(%2)\nreturn (%5, %4)"
    after = "%0 = input() : f32[3,4]\n%1 = parameter() : f32[4,4]\n%2 = matmul(%0, %1)\n"
    after += saved.replace("%5", "%6").replace("%4", "%3").replace("%6", "%4") if base else "%3 = relu(%2)\nreturn (%3, %2)"
    assert dump(variant(text)) == dump(parse(after))
    reused = "%0 = input() : f32[3,4]\n%1 = parameter() : f32[4,4]\n%2 = input() : f32[3,4]\n"
    reused += "%3 = add(%0, %2)\n%4 = relu(%3)\nreturn (%4)" if base else "%3 = relu(%2)\nreturn (%3)"
    assert dump(variant(text, ["all"])) == dump(parse(reused))


def test_groups_are_reused_apart():
    text = GUARDED.replace("BASE", "").replace("%4 = relu(%3)", "%5 = relu(%3)\n%4 = cache_guard(%5, 'other/b')")
    assert "relu" in dump(variant(text, ["all"])) and "matmul" not in dump(variant(text, ["all"]))
    assert dump(variant(text, ["other"])).endswith("return (%2)") and "matmul" not in dump(variant(text, ["other"]))
    assert "matmul" in dump(variant(text, ["nothing"]))


def test_what_is_kept_is_dense_and_of_its_type():
    text = """
%0 = input() : bf16[3,4]
%1 = parameter() : bf16[4,4]
%2 = matmul(%0, %1)
%3 = t(%2)
%4 = cache_guard(%3, 'all/a')
%5 = relu(%4)
return (%5)"""
    assert "clone(%3, memory_format=torch.contiguous_format)" in dump(variant(text))
    reuse = variant(text, ["all"], Taylor(1))
    assert "f32[4,3]" in dump(reuse)
    assert_round_trip(reuse)  # what follows the prediction has the type that it had: types are worked out anew


def test_observations_are_measured_where_their_group_is_computed():
    text = """
%0 = input() : f32[3,4]
%1 = parameter() : f32[4,4]
%2 = matmul(%0, %1)
%3 = cache_guard(%2, 'all/a')
%4 = add(%0, %3)
%5 = observe(%2, 'all/o', 'l1', (), 0)
return (%4)"""
    full = dump(variant(text))
    assert "observe" not in full and "stack" in full and full.count("sum(") == 3
    reuse = variant(text, ["all"])
    assert "sum(" not in dump(reuse) and variant_io(reuse).previous == () and variant_io(reuse).measures == ()


def test_what_the_model_writes_is_written():
    text = """
%0 = input() : f32[4]
%1 = parameter() : f32[1]
%2 = add(%1, 1)
%3 = mul(%0, 2)
return (%2 -> %1, %3)"""
    graph = variant(text)
    assert "copy_.default(%1, %2)" in dump(graph) and dump(graph).endswith("return (%3)")


def test_the_observed_value_has_the_streams_type():
    """Also where gate and sum are computed in float32: what is kept takes the bytes of the stream."""
    text = """
%0 = input() : bf16[1,6,4]
%1 = parameter() : bf16[4,4]
%2 = input() : f32[4]
%3 = linear(%0, %1)
%4 = _to_copy(%3, dtype=torch.float32)
%5 = mul(%4, %2)
%6 = _to_copy(%0, dtype=torch.float32)
%7 = add(%6, %5)
%8 = _to_copy(%7, dtype=torch.bfloat16)
return (%8)"""
    result = run_pass(Observe(kind="other"), text)
    (line,) = (x for x in dump(result.graph).splitlines() if "observe(" in x)
    assert line.endswith("bf16[1,6,4]")
    assert_round_trip(result.graph)


def test_observing_a_branch():
    graph = guarded(net, X, W, more=(MergeSlots(), Observe(kind="other", blocks=(0,), strides=(1,), frames=3)))
    assert_expected_inline(
        dump(variant(graph)),
        """\
%0 = input() : f32[1,6,4]
%1 = input() : f32[4,4]
%2 = input() : f32[1,6,4]
%3 = matmul(%0, %1) : f32[1,6,4]
%4 = _to_copy(%3, dtype=torch.float32) : f32[1,6,4]
%5 = _to_copy(%2, dtype=torch.float32) : f32[1,6,4]
%6 = sub(%5, %4) : f32[1,6,4]
%7 = abs(%6) : f32[1,6,4]
%8 = sum(%7) : f32[]
%9 = abs(%5) : f32[1,6,4]
%10 = sum(%9) : f32[]
%11 = abs(%4) : f32[1,6,4]
%12 = sum(%11) : f32[]
%13 = reshape(%4, [-1, 3, 8]) : f32[1,3,8]
%14 = slice(%13, 1, 1, 3) : f32[1,2,8]
%15 = slice(%13, 1, 0, 2) : f32[1,2,8]
%16 = sub(%14, %15) : f32[1,2,8]
%17 = abs(%16) : f32[1,2,8]
%18 = sum(%17) : f32[]
%19 = abs(%14) : f32[1,2,8]
%20 = sum(%19) : f32[]
%21 = abs(%15) : f32[1,2,8]
%22 = sum(%21) : f32[]
%23 = add(%0, %3) : f32[1,6,4]
%24 = matmul(%23, %1) : f32[1,6,4]
%25 = relu(%24) : f32[1,6,4]
%26 = add(%23, %25) : f32[1,6,4]
%27 = sub(%26, %0) : f32[1,6,4]
%28 = stack([%8, %10, %12, %18, %20, %22]) : f32[6]
return (%26, %27, %3, %28)""",
    )


@pytest.mark.parametrize("distance", ["l1", "l2", "cosine", "magnitude"])
def test_sums_are_those_of_the_distance(distance):
    graph = guarded(net, X, W, more=(Observe(kind="other", blocks=(0,), distance=distance, strides=(1, 2), frames=3),))
    full = variant(graph)
    previous = torch.randn(1, 6, 4)
    *_, value, sums = run_variant(full, X, W, extra=[previous])
    torch.testing.assert_close(value, X @ W)
    rows = value.reshape(1, 3, -1)
    ratio = value.norm(dim=-1) / previous.norm(dim=-1)
    want = {
        "l1": [(previous - value).abs().sum(), previous.abs().sum(), value.abs().sum()],
        "l2": [(previous - value).square().sum(), previous.square().sum(), value.square().sum()],
        "magnitude": [ratio.sum(), ratio.square().sum(), torch.tensor(6.0)],
        "cosine": [(previous * value).sum(), previous.square().sum(), value.square().sum()],
    }[distance]
    for i in (1, 2):
        late, early = rows[:, i:], rows[:, :-i]
        want += [(late - early).abs().sum(), late.abs().sum(), early.abs().sum()]
    torch.testing.assert_close(sums, torch.stack(want))


def test_slots_that_no_plan_reads_are_not_kept():
    graph = guarded(net, X, W)
    for options, kept in (({"save": "needed", "slots": ("all/s0.b0.other",)}, ("all/s0.b0.other",)), ({"save": "none"}, ())):
        assert variant_io(run_pass((Specialise(**options), DeadCode()), graph).graph).saves == kept


def test_the_middle_block_of_the_largest_stream_is_observed_by_default():
    model = TinyDiT(blocks=5)
    graph = guarded(model.forward, latent(0), time_of(0), latent(1, 1, 3, 4), more=(Observe(),))
    assert [s for s, *_ in variant_io(variant(graph)).measures] == ["all/observed.s0.b2.self-attention"]


def test_bad_observations():
    with pytest.raises(ConfigError, match="distance is 'l1', 'l2', 'cosine' or 'magnitude'; got 'l3'"):
        Observe(distance="l3")
    with pytest.raises(
        ConfigError, match=r"kind is 'self-attention', .* or 'residual', or empty for AdaCache's choice; got 'conv'"
    ):
        Observe(kind="conv")
    with pytest.raises(ConfigError, match=r"no block 9 to observe: 2 blocks \(0 to 1\)"):
        guarded(net, X, W, more=(Observe(kind="other", blocks=(9,)),))
    with pytest.raises(ConfigError, match="no mlp branch to observe; the graph has 2 other"):
        guarded(net, X, W, more=(Observe(kind="mlp"),))


def test_a_value_that_lies_otherwise_in_memory_fits_the_views_behind_it():
    """What is kept is dense, and `view` copies nothing: where the views of a guarded value need its own strides, reuse gives them."""
    text = """
%0 = input() : f32[1,2,6,4]
%1 = input() : f32[4,4]
%2 = transpose.int(%0, 1, 2)
%3 = clone(%2, memory_format=torch.contiguous_format)
%4 = transpose.int(%3, 1, 2)
%5 = cache_guard(%4, 'all/a')
%6 = transpose.int(%5, 1, 2)
%7 = view(%6, [1, 6, 8])
%8 = relu(%7)
return (%8)"""
    graph = parse(text)
    x = torch.randn(1, 2, 6, 4)
    full, reuse = variant(graph), variant(graph, ["all"])
    outputs = full(x, torch.ones(4, 4))
    assert outputs[-1].is_contiguous()
    assert_bit_identical(graph, lambda *args: reuse(*args, outputs[-1])[0], x, torch.ones(4, 4))
    unviewed = parse(text.replace("view(%6, [1, 6, 8])", "cos(%6)"))
    assert "clone" not in dump(variant(unviewed, ["all"])), "nothing is copied for nothing"


def test_what_a_variant_returns_is_read_in_the_order_in_which_it_is_made():
    made = VariantOutputs(["result", "other"], {"all/a": "kept"}, {"all/o": "seen"}, {"all/e": "shown"}, "sums")
    io = VariantIO(results=2, saves=("all/a",), previous=("all/o",), emits=("all/e",))
    assert io.unpack(made.flat()) == made
    assert VariantIO(results=2).unpack(["result", "other"]) == VariantOutputs(["result", "other"], {}, {}, {})
