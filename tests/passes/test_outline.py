"""Blocks that repeat become calls of one graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from vdcache.ir.edit import copy_graph
from vdcache.ir.regions import INVOKE, inline_regions
from vdcache.passes.outline import CALL, Outline
from vdcache.testing import TinyDiT, latent, time_of, trace


def graph_of(model: nn.Module):
    """Its ATen graph, and real inputs for it."""
    args = latent(0), time_of(0), latent(1, 1, 3, 4)
    captured = trace(model, *args)
    return captured.graph, [*model.parameters(), *model.buffers(), *args]


class Loud(TinyDiT):
    """Its blocks return something as well, all or the last alone.

    Args:
        more: makes it of what the block's MLP adds.
    """

    def __init__(self, blocks: int, every: bool, more: Callable[[torch.Tensor], torch.Tensor] = lambda added: added) -> None:
        super().__init__(blocks)
        self.every, self.more = every, more

    def forward(self, x, timestep, text):
        gates = self.time(self.sinusoids(timestep, x.dtype))[:, None].chunk(2, -1)
        h, told = self.inp(x) + self.text(text).mean(1, keepdim=True), []
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            h = h + gates[0] * nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            added = gates[1] * mlp(h)
            told.append(self.more(added))
            h = h + added
        return self.out(h), *(told if self.every else told[-1:])


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "calls"),
    [(TinyDiT(4), 4), (TinyDiT(1), 0), (Loud(4, True), 4), (Loud(4, False), 3), (Loud(3, True, torch.randn_like), 0)],
    ids=["alike", "one block", "read outside", "the last is read outside", "random"],
)
def test_blocks_that_repeat_are_called(model, calls):
    graph, inputs = graph_of(model)
    outlined = copy_graph(graph)
    done = Outline().run(outlined)
    outlined.graph.lint()
    found = outlined.graph.find_nodes(op="call_function", target=INVOKE)
    assert done.rewrites == len(found) == calls
    assert len({str(n.args[0].target) for n in found}) == bool(calls), "one graph for all"
    if getattr(model, "more", None) is torch.randn_like:
        assert all("more than compute its value" in str(r) for r in done.refusals) and done.refusals
        return
    for a, b in zip(graph(*inputs), outlined(*inputs), strict=True):
        assert torch.equal(a, b)
    inline_regions(outlined)
    assert sorted(str(n.target) for n in outlined.graph.nodes) == sorted(str(n.target) for n in graph.graph.nodes)


class Wide(nn.Module):
    """Blocks of one linear layer and its activation, eight operations each.

    Args:
        width: of the stream.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)]) for _ in range(3))

    def forward(self, x):
        for one, other in self.blocks:
            x = x + other(nn.functional.gelu(one(nn.functional.layer_norm(x, x.shape[-1:])).sin().cos()).tanh().exp())
        return x


@pytest.mark.parametrize(
    ("device", "width", "tokens", "calls"),
    [("cpu", 8, 16, 0), ("cpu", 256, 4096, 3), ("meta", 256, 4096, 0), ("meta", 4096, 4096, 3)],
)
def test_a_block_that_takes_hardly_longer_than_a_call_stays_where_it_is(monkeypatch, device, width, tokens, calls):
    """By its FLOPs and bytes; nothing is timed. 2·2·4096·256² FLOPs take 10 ms of one thread, and on an accelerator no longer than a call."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with torch.device(device):
        model = Wide(width)
    graph = trace(model, torch.empty(1, tokens, width, device=device)).graph
    small, whole = copy_graph(graph), copy_graph(graph)
    done = Outline(CALL).run(small)
    assert done.rewrites == calls and len(small.graph.find_nodes(op="call_function", target=INVOKE)) == calls
    reasons = [reason for refusal in done.refusals for reason in refusal.reasons]
    assert [reason.startswith("a block takes") and reason.endswith("and a call 30 µs") for reason in reasons] == [True] * (
        not calls
    )
    assert Outline().run(whole).rewrites == 3
