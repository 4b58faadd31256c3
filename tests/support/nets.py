"""What holds of every net whose branches are marked."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vdcache.ir import cache_guards
from vdcache.passes import Pipeline, variant_io
from vdcache.testing import Net, assert_bit_identical, assert_round_trip, assert_skipped, run_pass, trace, variant


def assert_reuse_gives_the_same(marked: fx.GraphModule, *inputs: Tensor) -> None:
    """A computed step is the graph bit for bit, and a reused step on the input that was kept gives the same again."""
    full, reuse = variant(marked), variant(marked, ["all"])
    with torch.no_grad():
        want, outputs = marked(*inputs), full(*inputs)
        assert_bit_identical(marked, lambda *x: full(*x)[: len(want)], *inputs)
        kept = dict(zip(variant_io(full).saves, outputs[len(want) :], strict=True))
        got = reuse(*inputs, *[kept[s] for s in variant_io(reuse).reads])
        torch.testing.assert_close(list(got), list(want), rtol=1e-4, atol=1e-4)


def marked_net(pipeline: Pipeline, net: Net, *inputs: Tensor) -> fx.GraphModule:
    """The net under a pipeline: bit for bit the same, skippable, with a text that parses back, and right where it is reused."""
    plain = trace(net, *inputs).graph
    marked = run_pass(pipeline, plain).graph
    assert_bit_identical(plain, marked, *inputs)
    if cache_guards(marked.graph):
        assert_skipped(marked, *inputs)
    assert_round_trip(marked)
    assert_reuse_gives_the_same(marked, *inputs)
    return marked
