"""What repeats in a graph is traced once, and taken in again."""

from __future__ import annotations

import operator
import sys

import pytest
import torch
from torch import fx, nn

from vdcache.ir.capture import capture, readable
from vdcache.ir.regions import INVOKE, inline_regions, repeated_modules


class Block(nn.Module):
    """Enough operations to be worth a call."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        h = self.second(torch.tanh(self.first(x)))
        return x + torch.sin(h) * torch.cos(h) - h / 3


class Shifted(Block):
    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x):
        return super().forward(x * self.shift)


class Writing(Block):
    def forward(self, x):
        y = super().forward(x)
        x.mul_(2)
        return y


class Viewing(Block):
    def forward(self, x):
        return super().forward(x), x.transpose(0, 1)


class Drawing(Block):
    def forward(self, x):
        return super().forward(x) + torch.randn_like(x)


class Counting(Block):
    def forward(self, x):
        return super().forward(x) + torch.arange(x.shape[-1]) * 0.1


class Marked(Block):
    @torch.compiler.nested_compile_region
    def forward(self, x):
        return super().forward(x)


class Two(nn.Module):
    """A block of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, x):
        return self.b(self.a(x))


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x = x[0] + x[1].transpose(0, 1) if isinstance(x, tuple) else x
        return x


def dynamo_graph(model: nn.Module, *inputs: torch.Tensor, dynamic: bool = False):
    """What Dynamo gives a backend."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, example_inputs):
        before = [str(n) for n in graph.graph.nodes]
        regions = repeated_modules(graph)
        captured = capture(graph, example_inputs)
        assert [str(n) for n in graph.graph.nodes] == before, "Dynamo's graph is not ours to change"
        seen.append((regions, captured))
        return graph

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
    (found,) = seen
    return found


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ([Block(), Block(), Block()], [3]),
        ([Block(), Shifted(2.0), Block()], [2]),  # a number in the block is not a weight
        ([Shifted(float(i)) for i in range(3)], []),
        ([Two(), Two(), Two()], [3]),  # the outermost that repeats
        ([Two(), Block(), Block()], [4]),
        ([Counting(), Counting()], [2]),
        ([Drawing(), Drawing()], [2]),
        ([Writing(), Writing(), Writing()], []),
        ([Viewing(), Viewing(), Viewing()], []),
        ([nn.Linear(8, 8), nn.Linear(8, 8)], []),  # not worth a call
    ],
    ids=[
        "alike",
        "one other",
        "all others",
        "nested",
        "alone and nested",
        "own constants",
        "random",
        "writing",
        "viewing",
        "small",
    ],
)
def test_modules_that_repeat_are_found(blocks, found):
    regions, captured = dynamo_graph(Net(*blocks), torch.randn(4, 8))
    assert [len(r) for r in regions] == found
    assert not captured.graph.graph.find_nodes(op="call_function", target=INVOKE), "patterns read one flat graph"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "blocks", [[Block, Block, Block], [Two, Two], [Writing, Writing], [Block, Drawing, Block, Drawing], [Counting, Counting]]
)
def test_tracing_once_is_tracing_each(blocks, dynamic, monkeypatch):
    torch.manual_seed(0)
    model, x = Net(*(kind() for kind in blocks)), torch.randn(4, 8)
    _, once = dynamo_graph(model, x.clone(), dynamic=dynamic)
    monkeypatch.setattr(sys.modules["vdcache.ir.capture"], "repeated_modules", lambda graph: [])
    _, each = dynamo_graph(model, x.clone(), dynamic=dynamic)
    assert once.signature == each.signature
    lines = [[(str(n.target), str(getattr(n.meta.get("val"), "shape", ""))) for n in c.graph.graph.nodes] for c in (once, each)]
    assert lines[0] == lines[1]
    if Drawing not in blocks and not dynamic:
        inputs = [torch.randn(n.meta["val"].shape) for n in once.graph.graph.find_nodes(op="placeholder")]
        for a, b in zip(once.graph(*inputs), each.graph(*inputs), strict=True):
            assert torch.equal(a, b)


def test_what_repeats_keeps_the_names_of_its_own_modules():
    _, captured = dynamo_graph(Net(Block(), Block(), Block()), torch.randn(4, 8))
    layers = captured.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    innermost = [readable(list(node.meta["nn_module_stack"].values())[-1][0]) for node in layers]
    assert innermost == [f"blocks.{i}.{name}" for i in range(3) for name in ("first", "second")]


@torch.no_grad()
def test_regions_that_an_author_marked_are_taken_in():
    torch._dynamo.reset()
    model, x = Net(Marked(), Marked(), Marked()), torch.randn(4, 8)
    graphs = []

    def backend(graph, example_inputs):
        captured = capture(graph, example_inputs).graph
        graphs.append((graph.graph.find_nodes(op="call_function", target=INVOKE), captured))
        return captured

    assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    ((calls, captured),) = graphs
    assert len(calls) == 3 and not captured.graph.find_nodes(op="call_function", target=INVOKE)


def test_a_call_within_a_call_is_taken_in():
    inner, middle, outer = fx.Graph(), fx.Graph(), fx.Graph()
    x = inner.placeholder("x")
    inner.output((inner.call_function(torch.sin, (x,)),))
    x = middle.placeholder("x")
    call = middle.call_function(INVOKE, (middle.get_attr("deep"), "deep", x))
    middle.output((middle.call_function(torch.add, (middle.call_function(operator.getitem, (call, 0)), x)), x))
    x = outer.placeholder("x")
    call = outer.call_function(INVOKE, (outer.get_attr("mid"), "mid", x))
    first, second = (outer.call_function(operator.getitem, (call, i)) for i in range(2))
    outer.output(outer.call_function(torch.mul, (first, second)))
    mid = fx.GraphModule({"deep": fx.GraphModule({}, inner)}, middle)
    graph = fx.GraphModule({"mid": mid}, outer)
    assert inline_regions(graph) == 1
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_function"] == [
        str(t) for t in (torch.sin, torch.add, torch.mul)
    ]
    x = torch.randn(3)
    assert torch.equal(graph(x), (x.sin() + x) * x)
