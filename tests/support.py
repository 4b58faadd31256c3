"""What many tests need: small denoisers, a reference cache by hand, the skip oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vdcache.ir import dialect
from vdcache.ir.capture import capture, trace
from vdcache.ir.edit import inputs
from vdcache.passes import Canonicalise, MarkBranches, Pipeline, variant_io


class TinyDiT(nn.Module):
    """The least that is a DiT: a sinusoidal timestep, one attention and one MLP branch a block, adaLN gates."""

    def __init__(self, blocks: int = 2, dim: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inp, self.out = nn.Linear(4, dim), nn.Linear(dim, 4)
        self.time = nn.Linear(8, 2 * dim)
        self.text = nn.Linear(4, dim)
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(blocks))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(dim, 16), nn.GELU(), nn.Linear(16, dim)) for _ in range(blocks))
        self.eval().requires_grad_(False)

    def waves(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        angles = timestep.float()[:, None] * torch.exp(-torch.arange(4, device=timestep.device))
        return torch.cat([angles.sin(), angles.cos()], -1).to(dtype)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        gates = self.time(self.waves(timestep, x.dtype))[:, None].chunk(2, -1)
        h = self.inp(x) + self.text(text).mean(1, keepdim=True)
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            h = h + gates[0] * F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            h = h + gates[1] * mlp(h)
        return self.out(h)

    def branches(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """What all branches together add to the stream: computed apart, for the reference cache."""
        gates = self.time(self.waves(timestep, x.dtype))[:, None].chunk(2, -1)
        h = start = self.inp(x) + self.text(text).mean(1, keepdim=True)
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            q, k, v = qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            h = h + gates[0] * F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            h = h + gates[1] * mlp(h)
        return h - start

    def with_branches(self, x: Tensor, text: Tensor, total: Tensor) -> Tensor:
        return self.out(self.inp(x) + self.text(text).mean(1, keepdim=True) + total)


class Reference:
    """Caching by hand, told everything: recompute at steps 0, n, 2n … and the last."""

    def __init__(self, model: TinyDiT, every: int, steps: int) -> None:
        self.model, self.every, self.steps = model, every, steps
        self.kept: dict[Any, tuple[int, Tensor]] = {}
        self.due = -1

    def begin(self) -> None:
        self.kept.clear()
        self.due = -1

    def call(self, step: int, lane: Any, x: Tensor, t: Tensor, text: Tensor, *, again: bool = False) -> Tensor:
        key = (lane, x.shape, x.dtype, text.shape)
        due = step % self.every == 0 or step >= self.steps - 1
        if due:
            self.due = step
        if due or again or key not in self.kept or self.kept[key][0] < self.due:  # the lane sat out the last computed step
            self.kept[key] = step, self.model.branches(x, t, text)
            return self.model(x, t, text)
        return self.model.with_branches(x, text, self.kept[key][1])


def latent(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = shape or (1, 6, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def time_of(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([1000 - 50 * step], dtype=dtype)


def guarded(fn: Callable[..., Any], *args: Tensor, more: Sequence[Any] = (), verify: bool = True) -> fx.GraphModule:
    """The guarded graph of a function: canonicalise, mark-branches, and `more` passes, with every promise checked."""
    graph, _ = Pipeline((Canonicalise(), MarkBranches(), *more), verify=verify).run(trace(fn, *args).graph)
    return graph


class PoisonInterpreter(fx.Interpreter):
    """The skip oracle: replays recorded slot values with everything that only they need poisoned by NaN.

    If a region may be skipped, NaN inside it changes no output.
    """

    def __init__(self, graph: fx.GraphModule, recorded: dict[str, Tensor], dead: set[str]) -> None:
        super().__init__(graph)
        self.recorded, self.dead = recorded, dead

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.target is dialect.guard:
            base = self.env[n.args[2]] if len(n.args) > 2 else 0  # type: ignore[index]
            return base + self.recorded[str(n.args[1])]
        result = super().run_node(n)
        if n.name in self.dead and isinstance(result, Tensor) and result.is_floating_point():
            return result * torch.nan
        return result


def record_slots(graph: fx.GraphModule, *args: Tensor) -> dict[str, Tensor]:
    """The value that each slot would keep."""
    recorded: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "call_function" and n.target is dialect.guard:
                fresh = self.env[n.args[0]]  # type: ignore[index]
                base = self.env[n.args[2]] if len(n.args) > 2 else 0  # type: ignore[index]
                recorded[str(n.args[1])] = fresh - base
                return fresh
            return super().run_node(n)

    with torch.no_grad():
        Recorder(graph).run(*args)
    return recorded


def assert_skippable(graph: fx.GraphModule, *args: Tensor) -> None:
    """Poisoning every node that a full reuse would skip leaves the outputs what they are, up to rounding."""
    kept = record_slots(graph, *args)
    live = {graph.graph.output_node()}
    todo = list(live)
    while todo:
        node = todo.pop()
        parents = list(node.all_input_nodes)
        if node.target is dialect.guard:
            parents = [node.args[2]] if len(node.args) > 2 else []
        for parent in parents:
            if parent not in live:
                live.add(parent)
                todo.append(parent)
    dead = {n.name for n in graph.graph.nodes if n not in live and n.op == "call_function"}
    with torch.no_grad():
        want, got = graph(*args), PoisonInterpreter(graph, kept, dead).run(*args)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def run_variant(graph: fx.GraphModule, *args: Tensor, extra: Sequence[Tensor] = ()) -> list[Tensor]:
    io = variant_io(graph)
    assert len(inputs(graph.graph)) == len(args) + len(extra), io
    with torch.no_grad():
        return list(graph(*args, *extra))


def captured(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The one graph that Dynamo makes of a model, in vdcache's form, and its inputs."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def door(graph: fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        found.append((capture(graph, given).graph, list(given)))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=door)(*args, **kwargs)
    ((graph, given),) = found
    return graph, given


def values_of(graph: fx.GraphModule, given: Sequence[Any]) -> dict[str, Any]:
    """The value of every node."""
    values: dict[str, Any] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Watch(graph).run(*given)
    return values
