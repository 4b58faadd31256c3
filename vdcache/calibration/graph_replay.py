"""Calls of a model, kept with their inputs, to be run again in parts: what a change in the middle of a graph does to its end."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vdcache.calibration.calibration import as_real
from vdcache.calibration.uncached_run import watch
from vdcache.errors import ConfigError
from vdcache.ir.edit import backward_slice
from vdcache.passes.tile_attention import AttentionOperands, place_of
from vdcache.patterns import Refusal, analyze
from vdcache.patterns.cost import flops

__all__ = ["GraphReplay", "RecordedCall", "ReplayRun", "record"]


@dataclass(frozen=True)
class RecordedCall:
    """One call that was kept.

    Args:
        prompt: the number of the prompt.
        inputs: of the graph; those that are no parameters are copies.
    """

    prompt: int
    inputs: tuple[Any, ...]


class GraphReplay:
    """A canonical graph with some calls of it; `sites` are the attentions that can have a mask, in the order of computation.

    Args:
        graph: not to be changed.
        static: positions of inputs that are parameters.
        calls: that were kept.
        grid, text: override what the graph shows (`passes.TileAttention`).

    Raises:
        ConfigError: no attention of the graph can have a mask.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        static: Sequence[int],
        calls: Sequence[RecordedCall],
        grid: Sequence[int] = (),
        text: Sequence[int] = (),
    ) -> None:
        self.graph, self.calls, self._static = graph, list(calls), frozenset(static)
        self.order = list(graph.graph.nodes)
        self._at = {n: i for i, n in enumerate(self.order)}
        nodes = {n.name: n for n in self.order}
        self.analysis = found = analyze(graph)
        self.places: dict[fx.Node, AttentionOperands] = {}
        self.modules: dict[fx.Node, str] = {}
        self.refused: list[Refusal] = []
        for branch, attention in found.denoising_attentions():
            place = place_of(nodes[attention.node], attention, found, grid, text)
            if isinstance(place, Refusal):
                self.refused.append(place)
            else:
                self.places[nodes[attention.node]] = place
                self.modules[nodes[attention.node]] = branch.module
        if not self.places:
            raise ConfigError(
                "no attention of this model can have a mask: "
                + ("; ".join(sorted({r.reason for r in self.refused})) or "it has none among video tokens")
            )
        self.sites = sorted(self.places, key=self._at.__getitem__)
        residual_adds = [b.residual_add for b in found if found.streams[b.stream].role in ("latent", "joint")]
        self.end = nodes[residual_adds[-1]]  # the final hidden states
        self._needed = backward_slice([self.end])
        self.fixed = self._needed.difference(*map(self._depending, self.sites))  # what no site changes
        self._last = {p: i for i, n in enumerate(self.order) if n in self._needed for p in n.all_input_nodes}

    def fingerprint(self) -> str:
        """Tells other inputs and other weights apart."""
        digest = hashlib.sha256()
        for i in sorted(self._static):
            value = self.calls[0].inputs[i]
            if isinstance(value, Tensor):
                some = as_real(value.detach()).flatten()[:4096].float().cpu()
                digest.update(f"{tuple(value.shape)}{value.dtype}{some.double().sum().item():.12e}".encode())
        for call in self.calls:
            for i, value in enumerate(call.inputs):
                if i not in self._static:
                    digest.update(
                        as_real(value.detach()).float().cpu().numpy().tobytes()
                        if isinstance(value, Tensor)
                        else repr(value).encode()
                    )
        return digest.hexdigest()[:32]

    def start(self, call: RecordedCall) -> ReplayRun:
        """Begin to run a call."""
        return ReplayRun(self, call)

    def flops_after(self, site: fx.Node | None) -> int:
        """FLOPs of what depends on a site, up to the end; without a site, of everything up to the end."""
        if site is None:
            return sum(flops(n) for n in self._needed)
        return sum(flops(n) for n in self._needed & self._depending(site))

    def _depending(self, site: fx.Node) -> set[fx.Node]:
        found = {site}
        for node in self.order[self._at[site] + 1 :]:
            if any(p in found for p in node.all_input_nodes):
                found.add(node)
        return found


class ReplayRun:
    """One call on its way through the graph: what comes next needs the values that are still alive, and no others."""

    def __init__(self, replay: GraphReplay, call: RecordedCall) -> None:
        self._of = replay
        placeholders = [n for n in replay.order if n.op == "placeholder"]
        self.values: dict[fx.Node, Any] = dict(zip(placeholders, call.inputs, strict=True))
        self._next = len(placeholders)
        with torch.no_grad():  # what no site changes, once and for all
            for node in replay.order:
                if node in replay.fixed and node not in self.values:
                    self.values[node] = _evaluate(replay.graph, node, self.values)

    def until(self, site: fx.Node) -> None:
        """Compute everything that comes before a site."""
        self._go(self.values, self._next, self._of._at[site])
        self._next = self._of._at[site]

    def put(self, site: fx.Node, value: Any) -> None:
        """Go past a site with a value of its own."""
        assert self._of.order[self._next] is site
        self.values[site] = value
        self._forget(self.values, self._next)
        self._next += 1

    def end_with(self, site: fx.Node, value: Any) -> Tensor:
        """The final hidden states if the site gave `value`; this run stays where it is."""
        values = dict(self.values)
        values[site] = value
        end = self._of._at[self._of.end] + 1
        self._go(values, self._of._at[site] + 1, end)
        return values[self._of.end]  # type: ignore[no-any-return]

    def finish(self) -> Tensor:
        """The final hidden states."""
        end = self._of._at[self._of.end] + 1
        self._go(self.values, self._next, end)
        self._next = end
        return self.values[self._of.end]  # type: ignore[no-any-return]

    def compute(self, node: fx.Node) -> Any:
        """What a node gives, from the values so far."""
        return _evaluate(self._of.graph, node, self.values)

    def _go(self, values: dict[fx.Node, Any], start: int, stop: int) -> None:
        """Compute the needed nodes from `start` to `stop`, and forget what nothing after them reads."""
        of = self._of
        with torch.no_grad():
            for i in range(start, stop):
                node = of.order[i]
                if node not in of._needed:
                    continue
                if node not in values:
                    values[node] = _evaluate(of.graph, node, values)
                self._forget(values, i)

    def _forget(self, values: dict[fx.Node, Any], i: int) -> None:
        """Drop what the node at `i` was the last to read."""
        for parent in self._of.order[i].all_input_nodes:
            if self._of._last.get(parent) == i and parent.op != "placeholder":
                values.pop(parent, None)


def _evaluate(graph: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        found: Any = graph
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    return node.target(*args, **kwargs)  # type: ignore[operator,misc]


def record(
    model: Callable[..., Any],
    run: Callable[..., Any],
    prompts: Iterable[Any] | None,
    caller: str,
    *,
    keep: int,
    seed: int = 0,
    grid: Sequence[int] = (),
    text: Sequence[int] = (),
) -> GraphReplay:
    """Run the model uncached and keep `keep` calls of every prompt, at random.

    Raises:
        ConfigError: Dynamo splits the model, or no attention of it can have a mask.
        CacheStateError: `run` did not call the model.
    """
    draw = random.Random(seed)
    prompt = 0
    kept: dict[Any, dict[int, list[tuple[Any, ...]]]] = defaultdict(lambda: defaultdict(list))
    seen: dict[tuple[Any, int], int] = defaultdict(int)

    def now(number: int) -> None:
        nonlocal prompt
        prompt = number

    def take(program: Any, inputs: Sequence[Any]) -> None:
        if not program.guarded.analysis.denoising_attentions():
            return
        own = kept[program][prompt]
        seen[program, prompt] += 1
        place = len(own) if len(own) < keep else draw.randrange(seen[program, prompt])
        if place >= keep:
            return
        fixed = set(program.inputs.static)
        copy = tuple(v if i in fixed or not isinstance(v, Tensor) else v.detach().clone() for i, v in enumerate(inputs))
        own[place : place + 1] = [copy]

    watched = watch(model, run, prompts, caller, on_inputs=take, prompt_is=now, dynamic=False)
    if not kept:
        raise ConfigError(
            f"{caller}: no attention over video tokens is found in {watched.name}: "
            + ("; ".join(watched.reasons) or "it has none on a residual stream in one graph")
        )
    calls = {p: sum(n for (q, _), n in seen.items() if q is p) for p in kept}
    program = max(kept, key=calls.__getitem__)
    found = [RecordedCall(number, inputs) for number, own in kept[program].items() for inputs in own]
    return GraphReplay(program.guarded.module, program.inputs.static, found, grid, text)


def final_states(replay: GraphReplay) -> list[Tensor]:
    """The final hidden states of every call, untouched."""
    return [replay.start(call).finish() for call in replay.calls]
