"""The three doors lead to one form, with mutations, autocast and symbols intact."""

import contextlib
import sys
import threading

import pytest
import torch
from torch import nn

from vdcache.errors import CaptureError
from vdcache.ir import capture, dump, exported, trace
from vdcache.testing import TinyDiT, latent, time_of


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x):
        self.n.add_(1)
        return self.lin(x) * self.n


def through_dynamo(model, *args, dynamic=False):
    torch._dynamo.reset()
    found = []

    def door(graph, inputs):
        found.append((capture(graph, inputs), list(inputs)))
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=door, dynamic=dynamic)(*args)
    return found[0]


def test_composites_stay_whole():
    captured, _ = through_dynamo(TinyDiT(), latent(0), time_of(0), latent(1, 1, 3, 4))
    text = dump(captured.graph)
    assert "scaled_dot_product_attention" in text and "linear(" in text and "gelu(" in text


@torch.no_grad()
def test_mutations_come_first_and_are_named():
    captured, inputs = through_dynamo(Counter(), latent(0))
    ((output, position),) = captured.signature.mutations
    assert output == 0 and inputs[position].shape == ()
    assert captured.signature.results == 1
    assert len(captured.signature.static) == 3, "weight, bias and buffer"
    assert not any(n.target is torch.ops.aten.add_.Tensor for n in captured.graph.graph.nodes)


@torch.no_grad()
@pytest.mark.parametrize("door", ["trace", "export"])
def test_modules_enter_without_dynamo(door):
    model, x = Counter(), latent(0)
    captured = trace(model, x) if door == "trace" else exported(model, (x,))
    state = [*model.parameters(), *model.buffers()]
    updated, out = captured.graph(*state, x)
    assert torch.equal(updated, torch.ones(())) and torch.equal(out, model.lin(x))
    assert captured.signature.static == frozenset({0, 1, 2})
    assert captured.signature.mutations == ((0, 2),)


@torch.no_grad()
def test_autocast_is_kept_as_casts():
    def fn(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return (x @ w).float()

    x, w = torch.randn(4, 4), torch.randn(4, 4)
    captured = trace(fn, x, w)
    assert "bf16" in dump(captured.graph)
    assert torch.equal(captured.graph(x, w)[0], fn(x, w))


def test_symbols_survive():
    captured, inputs = through_dynamo(TinyDiT(), latent(0), time_of(0), latent(1, 1, 3, 4), dynamic=True)
    assert any(isinstance(i, torch.SymInt) for i in inputs)
    assert "f32[1,s" in dump(captured.graph)


def test_what_cannot_be_exported_says_where():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match="Branching cannot be exported as one graph"):
        exported(Branching(), (torch.randn(2),))


class Broken(TinyDiT):
    """As many graphs as it has blocks, and one more."""

    def block(self, i, h, gates):
        torch._dynamo.graph_break()
        return h + self.mlp[i](h)

    def forward(self, x, timestep, text):
        gates = self.time(self.sinusoids(timestep, x.dtype))
        h = self.inp(x)
        for i in range(len(self.mlp)):
            h = self.block(i, h, gates)
        return self.out(h)


def test_two_threads_do_not_mix_their_graphs(monkeypatch):
    """The graphs of one model were given to whoever asked last."""
    module = sys.modules["vdcache.ir.capture"]
    torch._dynamo.reset()
    both, found = threading.Barrier(2, timeout=60), {}
    monkeypatch.setattr(module, "_counting", contextlib.nullcontext())  # not even where they really run at once

    class Waits(Broken):
        def forward(self, x, timestep, text):
            torch.compiler.disable(both.wait)()
            return super().forward(x, timestep, text)

    def collect(blocks):
        found[blocks] = len(module.parts(Waits(blocks=blocks), (latent(0), time_of(0), latent(1, 1, 3, 4)), {}).found)

    threads = [threading.Thread(target=collect, args=(blocks,)) for blocks in (2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[4] - found[2] == 2, found
