"""`vdcache opt`: run passes on the text of a graph, look at what they do, and find the one that breaks something."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from vdcache.errors import ConfigError, VdcacheError
from vdcache.ir.dump import dump
from vdcache.ir.edit import copy_graph
from vdcache.ir.facts import FACTS, Fact, check
from vdcache.ir.graph_files import save_graph
from vdcache.ir.oracle import example_inputs, unskippable
from vdcache.passes import Pass, PassRecord, Pipeline
from vdcache.passes.catalogue import known_facts, readable
from vdcache.passes.watching import changes_text, refusals_text

__all__ = ["CHECKS", "Broken", "Checker", "PipelineRun", "bisect", "checker", "run"]

Checker = Callable[[fx.GraphModule, fx.GraphModule], None]
CHECKS = {
    **{f.name: f"the fact that the graph is {f.name}" for f in FACTS},
    "runs": "the graph can be computed",
    "same": "it gives what the graph that came in gives, bit for bit, and whatever it returns besides",
    "skips": "NaN in everything that reuse leaves out changes no output",
}


@dataclass(frozen=True)
class PipelineRun:
    """What came of a graph.

    Args:
        texts: the graph before the first pass and after each.
    """

    graph: fx.GraphModule
    steps: tuple[PassRecord, ...]
    texts: tuple[str, ...]

    def report(self, *, changed: bool = False, timing: bool = False) -> str:
        """Before and after; instead with `changed`, what each pass changed. What was left alone follows."""
        if changed:
            parts = [f"# before\n{self.texts[0]}"]
            for step, before, after in zip(self.steps, self.texts, self.texts[1:], strict=False):
                what = changes_text(before, after) if before != after else "(no change)"
                parts.append(f"# {step.text}: {step.rewrites} rewrites\n{what}")
        else:
            parts = [f"# before\n{self.texts[0]}", f"# after {', '.join(s.text for s in self.steps)}\n{self.texts[-1]}"]
        for step in self.steps:
            if step.refusals:
                parts.append(f"# {step.text} left alone\n{refusals_text(step, self.graph)}")
        if timing:
            total = sum(s.seconds for s in self.steps)
            rows = [f"{s.seconds * 1e3:10.2f} ms  {s.rewrites:4d} rewrites  {s.text}" for s in self.steps]
            parts.append("\n".join(["# time", *rows, f"{total * 1e3:10.2f} ms"]))
        return "\n\n".join(parts)


@dataclass(frozen=True)
class Broken:
    """The first pass after which a check fails, and the check's own words."""

    index: int
    a_pass: Pass
    why: str

    def __str__(self) -> str:
        return f"pass {self.index + 1}, '{self.a_pass}', breaks it: {self.why}"


def run(graph: fx.GraphModule, pipeline: Pipeline, *, verify: bool = False, reproducer: Path | None = None) -> PipelineRun:
    """Run all passes.

    Args:
        verify: check every fact that is known to hold after every pass: what passes have ensured, and what every graph has.
        reproducer: where the graph and the rest of the pipeline are written when a pass fails.

    Raises:
        VdcacheError: a pass failed or broke a promise; a note names the reproducer.
    """
    graph = copy_graph(graph)
    texts: list[str] = [dump(graph)]
    steps: list[PassRecord] = []
    held = set(pipeline.given) - {Fact.PLAIN}  # passes that mark something end that
    for index, a_pass in enumerate(pipeline.passes):
        before = copy_graph(graph)
        try:
            graph, done = Pipeline((a_pass,), verify=verify, given=a_pass.requires).run(graph, copied=True)
            held = _still(held, a_pass) | a_pass.ensures
            if verify:
                for fact in held:
                    check(fact, graph.graph, after=f"'{a_pass}'")
        except VdcacheError as error:
            if reproducer is not None:
                rest = ",".join(map(readable, pipeline.passes[index:]))
                save_graph(reproducer, before, comment=f"{type(error).__name__}: {error}", pipeline=rest)
                error.add_note(f"written: {reproducer}; to see it again: vdcache opt --verify {reproducer}")
            raise
        steps += done
        texts.append(dump(graph))
    return PipelineRun(graph, tuple(steps), tuple(texts))


def _still(held: set[Fact], a_pass: Pass) -> set[Fact]:
    """The facts that a pass leaves: a variant is written to, where the model writes into its inputs."""
    return held - {Fact.FUNCTIONAL} if Fact.PLAIN in a_pass.ensures else held


def bisect(graph: fx.GraphModule, pipeline: Pipeline, holds: Checker) -> Broken | None:
    """The first pass after which `holds` raises, None where it holds after all. The passes are run once each, in order.

    Raises:
        ConfigError: it does not hold on the graph that came in.
    """
    came_in = copy_graph(graph)
    if why := _problem(holds, came_in, came_in):
        raise ConfigError(f"the check fails before the first pass: {why}")
    for index, a_pass in enumerate(pipeline.passes):
        try:
            graph, _ = Pipeline((a_pass,), given=a_pass.requires).run(graph)
        except VdcacheError as error:
            return Broken(index, a_pass, str(error))
        if why := _problem(holds, came_in, graph):
            return Broken(index, a_pass, why)
    return None


def _problem(holds: Checker, came_in: fx.GraphModule, graph: fx.GraphModule) -> str:
    try:
        holds(came_in, graph)
    except Exception as error:  # noqa: BLE001 — a check says no by raising, whatever it raises
        return f"{type(error).__name__}: {error}"
    return ""


def checker(name: str) -> Checker:
    """The check of a name, or "package.module:function" for one's own: a function of the graph that came in and the graph now,
    which raises where something is wrong.

    Raises:
        ConfigError: there is no such check.
    """
    if fact := next((f for f in (*FACTS, *known_facts()) if f.name == name), None):
        return lambda came_in, graph: check(fact, graph.graph, after="this pass")
    if name in _CHECKERS:
        return _CHECKERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigError(f"there is no check {name!r}; there are {', '.join(CHECKS)}, or your own as package.module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the check {name!r} cannot be imported: {error}") from error
    return found  # type: ignore[no-any-return]


def _runs(came_in: fx.GraphModule, graph: fx.GraphModule) -> None:
    with torch.no_grad():
        graph(*example_inputs(graph))


def _same(came_in: fx.GraphModule, graph: fx.GraphModule) -> None:
    with torch.no_grad():
        want, got = (pytree.tree_leaves(g(*example_inputs(g))) for g in (came_in, graph))
    for i, (a, b) in enumerate(zip(want, got, strict=False)):
        if isinstance(a, torch.Tensor) and not torch.equal(a.nan_to_num(), b.nan_to_num()):
            raise AssertionError(f"result {i} is another one, by {float((a.double() - b.double()).abs().max()):.3g} at most")


def _skips(came_in: fx.GraphModule, graph: fx.GraphModule) -> None:
    for i, (a, b) in enumerate(zip(*map(pytree.tree_leaves, unskippable(graph, *example_inputs(graph))), strict=True)):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4, msg=f"result {i} needs what is skipped")


_CHECKERS: dict[str, Any] = {"runs": _runs, "same": _same, "skips": _skips}
