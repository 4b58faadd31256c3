"""A real torch.compile whose graphs can be looked at before and after every pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from vdcache.api import settings_of
from vdcache.backends import Backend
from vdcache.ir.dump import dump
from vdcache.passes import Pass, Refusal
from vdcache.passes.watching import PassRun, listening

__all__ = ["RecordedPass", "RecordingBackend"]


@dataclass(frozen=True)
class RecordedPass:
    """One pass that ran while torch.compile compiled.

    Args:
        graph: which graph of the forward, counted from 0.
        before, after: the graph as it was and as it became; copies.
    """

    graph: int
    a_pass: Pass
    before: fx.GraphModule
    after: fx.GraphModule
    rewrites: int
    refusals: tuple[Refusal, ...]

    def __str__(self) -> str:
        return f"{self.a_pass}: {self.rewrites} rewrites\n{dump(self.after)}"


class RecordingBackend(Backend):
    """`torch.compile(model, backend=RecordingBackend("every-3"))`: vdcache's backend, and a `RecordedPass` for every pass.

    Args:
        recipe, options: as torch.compile's `options` for the backend "vdcache"; the inner compiler is "eager" and `strict` is True
            if not said otherwise.
    """

    def __init__(self, recipe: Any = None, **options: Any) -> None:
        super().__init__(settings_of({"inner": "eager", "strict": True, **options, "recipe": recipe}))
        self.stages: list[RecordedPass] = []
        self._graphs = 0

    def __call__(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        number, self._graphs = self._graphs, self._graphs + 1

        def keep(seen: PassRun) -> None:
            step = seen.step
            self.stages.append(RecordedPass(number, seen.a_pass, seen.before, seen.after, step.rewrites, step.refusals))

        with listening(keep):
            return super().__call__(graph, example_inputs)

    def stage(self, name: str, graph: int = 0) -> RecordedPass:
        """The first run of the pass of that name on a graph.

        Raises:
            KeyError: it did not run; the message names those that did.
        """
        for stage in self.stages:
            if stage.a_pass.name == name and stage.graph == graph:
                return stage
        raise KeyError(f"no pass {name!r} ran on graph {graph}; there ran {', '.join(s.a_pass.name for s in self.stages)}")

    @property
    def programs(self) -> list[Any]:
        """What was compiled: guarded graphs with their variants."""
        return self.settings.programs
