"""One graph of Dynamo's, brought under its session or compiled plainly."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from vdcache.backends.eager import run_eagerly
from vdcache.backends.hooks import hook_in_the_way
from vdcache.backends.inductor import compile_now, frame_of_backend_call
from vdcache.backends.program import Program
from vdcache.backends.settings import Settings
from vdcache.backends.verdict import Verdict, breaks_since
from vdcache.errors import CaptureError, ConfigError, VdcacheError
from vdcache.ir import dialect
from vdcache.ir.capture import Captured, capture, faked
from vdcache.ir.ops import ATTENTION, allow_skipping, groups_of, is_work
from vdcache.ir.stand_ins import brought, stored
from vdcache.passes import HoistInvariants, TileAttention
from vdcache.policies.base import Deciding
from vdcache.runtime.agreement import Agreement

__all__ = ["Backend", "compile_graph"]


class Backend:
    """The backend with its settings bound: what `vdcache.compile` hands to torch.compile."""

    def __init__(self, settings: Settings, mode: str | None = None, verdict: Verdict | None = None) -> None:
        self.settings, self.mode, self._verdict = settings, mode, verdict
        self.called = False  # Dynamo has handed over a graph

    def __call__(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.called = True
        return compile_graph(graph, example_inputs, self.settings, self.mode, self._verdict)

    def __repr__(self) -> str:
        return f"vdcache({self.settings.recipe.name})"


def compile_graph(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    settings: Settings,
    mode: str | None = None,
    verdict: Verdict | None = None,
) -> Callable[..., Any]:
    """Bring one Dynamo graph under its session, or compile it plainly where that cannot be done.

    Args:
        verdict: of the model, where somebody judges it when its forward has run; else each graph is judged alone.
    """
    if mode is not None:
        settings = _with_mode(settings, mode)
    if why := _why_plain(example_inputs, mode):
        return _plain(graph, example_inputs, settings, why)
    family, frame, split = frame_of_backend_call()
    resumes = frame.startswith("torch_dynamo_resume_in")
    began = time.perf_counter()
    try:
        captured = capture(graph, example_inputs)
        agreement = _agreed(captured, settings)
        program = Program(captured, settings, family, resumes, verdict, agreement)
        program.capturing = time.perf_counter() - began
    except VdcacheError as error:
        if settings.strict or isinstance(error, ConfigError):
            raise
        _step_aside(graph, example_inputs, settings, str(error))
        return _plain(graph, example_inputs, settings, str(error))
    if verdict is None and not program.slots and hook_in_the_way():
        settings.warn_once(
            "hooks",
            "vdcache: Dynamo breaks this model at the hooks of its layers (offloading, layerwise casting), and a backend is given only pieces that "
            "hold nothing to cache. vdcache.compile(model) takes the hooks off while the compiled model runs: use it instead of "
            "torch.compile(model, backend='vdcache')",
        )
    found = _Found(graph, example_inputs, program, verdict, whole=split is None and not resumes)
    if verdict is not None:
        verdict.ends = verdict.ends or split or ""
    if (run := found.instead(nested=split == "" and not resumes)) is not None:
        return run
    program.compile_first(captured.wrapped.flat(faked(example_inputs)))
    settings.programs.append(program)
    return program if not captured.wrapped else lambda *inputs: program(*captured.wrapped.flat(inputs))


def _agreed(captured: Captured, settings: Settings) -> Agreement | None:
    """The ranks that run a graph together, if there are others: they skip its collectives together."""
    if settings.ranks is None:
        return None
    found = settings.ranks.of(groups_of(captured.graph.graph), lambda m: settings.warn_once("groups", f"vdcache: {m}"))
    if found is None:
        return None
    allow_skipping(captured.graph.graph)
    return found


def _step_aside(graph: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings, why: str) -> None:
    """Where other ranks run this graph too, tell them that this one runs it plainly. Nothing is known of it but what Dynamo saw."""
    if settings.ranks is None:
        return
    groups = list(groups_of(graph.graph))
    for value in example_inputs:
        if (mesh := getattr(value, "device_mesh", None)) is not None:
            cut = [dim for dim, placement in enumerate(value.placements) if not placement.is_replicate()]
            groups += [mesh.get_group(dim) for dim in cut]
    if (agreement := settings.ranks.of(groups, lambda message: None)) is not None:
        agreement.step_aside(why.partition("\n")[0])


def _why_plain(example_inputs: Sequence[Any], mode: str | None) -> str:
    """Why a graph is compiled as without vdcache, before anything is looked at; "" where it is not."""
    if mode == "reduce-overhead":  # is nothing but CUDA graphs
        return f"mode={mode!r} uses CUDA graphs, which vdcache does not support yet"
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs):
        return "gradients are enabled, and cached values have none; sample under torch.no_grad() or torch.inference_mode()"
    return ""


@dataclass(frozen=True)
class _Found:
    """A graph that was understood, and what to say and do where the recipe has nothing to do in it.

    Args:
        whole: it is a forward of its own, which Dynamo has not broken.
    """

    graph: fx.GraphModule
    example_inputs: Sequence[Any]
    program: Program
    verdict: Verdict | None
    whole: bool

    @property
    def size(self) -> int:
        """Operations that do work."""
        return sum(map(is_work, self.program.guarded.module.graph.nodes))

    @property
    def only_hoists(self) -> bool:
        """Whether the recipe asks for no slot."""
        return all(isinstance(p, (TileAttention, HoistInvariants)) for p in self.program.settings.recipe.passes)

    @property
    def reuses(self) -> bool:
        """Whether something in the graph need not be computed in every step."""
        return bool(self.program.slots) or (self.only_hoists and bool(self.program.side.groups))

    def instead(self, nested: bool) -> Callable[..., Any] | None:
        """What runs in the place of the program where the recipe has nothing to do in it.

        Args:
            nested: it is a function that the model calls, and that nothing goes on from.
        """
        program, recipe, masked = self.program, self.program.settings.recipe, self.program.guarded.masked
        if self.verdict is not None:
            for what, there in (("slot", self.reuses), ("probe", program.probes), ("mask", masked)):
                if there:
                    self.verdict.has(what)
        if self.whole and program.slots and not program.probes and isinstance(recipe.policy, Deciding):
            return self.nothing()
        if not masked:
            self.say_no_mask()
        wanted = any(not isinstance(p, TileAttention) for p in recipe.passes)
        if (
            wanted
            and not self.reuses
            and not (masked and self.only_hoists)
            and not dialect.emissions(program.guarded.body.graph)
        ):
            return self.without_slot(nested)
        return None

    def say_no_mask(self) -> None:
        """Where the recipe has masks, say that none is in this graph."""
        if not (reasons := _no_mask(self.program, self.whole)):
            return
        message = f"the masks of '{self.program.settings.recipe.name}' are on no attention of this graph: {reasons}"
        if self.verdict is not None:
            self.verdict.lacks("mask", self.size, message)
        elif self.program.settings.strict:
            raise CaptureError(message)
        else:
            self.program.settings.warn_once("no mask", f"vdcache: {message}")

    def without_slot(self, nested: bool) -> Callable[..., Any] | None:
        """What runs in the place of a graph without a slot; None where it is brought under its session all the same."""
        program, settings, verdict = self.program, self.program.settings, self.verdict
        # One with a timestep input may be part of a model that breaks further out: then it is this graph that tells the time.
        if (self.whole and not program.inputs.timesteps) or (self.whole and settings.strict and verdict is None):
            return self.nothing()
        if verdict is not None:
            verdict.lacks("slot", self.size, _nothing(program, "model"))
        elif self.whole:
            settings.warn_once("timestep alone", _nothing(program))
        if not self.whole and (not self.size or (nested and not program.inputs.timesteps)):
            return _inner(self.graph, self.example_inputs, settings)
        return None

    def nothing(self) -> Callable[..., Any]:
        """The recipe finds nothing to do: say so, and compile plainly."""
        program, settings = self.program, self.program.settings
        if self.verdict is not None:
            self.verdict.lacks("probe" if program.slots else "slot", self.size, _nothing(program, "model"))
            return _inner(self.graph, self.example_inputs, settings)
        message = _nothing(program)
        if settings.strict:
            raise CaptureError(message)
        if broken := next(iter(breaks_since({})), ""):
            message += (
                f"\nOther graphs may be cached, if it is the model's forward that Dynamo has broken in this process: {broken}"
            )
        return _plain(self.graph, self.example_inputs, settings, message)


def _no_mask(program: Program, whole: bool) -> str:
    """Why no mask was put on an attention of this graph; empty where none was asked for or there is none to put it on."""
    if not any(isinstance(p, TileAttention) for p in program.settings.recipe.passes):
        return ""
    attends = any(n.target in ATTENTION for n in program.guarded.module.graph.nodes)
    ran = [s for s in program.guarded.steps if s.text.startswith(TileAttention.name)]
    reasons = [str(r) for s in ran for r in s.refusals]
    if not attends and not (whole and (reasons or program.inputs.timesteps)):
        return ""  # a small graph beside the model's
    if not ran:
        return "it does not show whose tokens attend: no residual stream runs through it, as where Dynamo splits a block"
    return "; ".join(reasons)


def _nothing(program: Program, where: str = "graph") -> str:
    what = "no slot" if not program.slots else "nothing to probe"
    found = f"the recipe '{program.settings.recipe.name}' finds {what} in this {where}"
    if refusals := "".join(f"\n  {r}" for r in program.guarded.refusals):
        return f"{found}; every candidate:{refusals}"
    if branches := len(program.guarded.analysis.branches):
        return f"{found}: its passes ({program.settings.recipe.pipeline}) mark none of the {branches} branches"
    return f"{found}: it has no addition of a value to what was computed from it"


def _plain(graph: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings, why: str) -> Callable[..., Any]:
    """Compile as without vdcache, and say once why."""
    if settings.strict:
        raise CaptureError(f"strict=True: {why}")
    settings.warn_once(why, f"vdcache steps aside, the graph runs as plain torch.compile would run it: {why}")
    return _inner(graph, example_inputs, settings)


def _inner(graph: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> Callable[..., Any]:
    if settings.inner == "eager":
        run = graph.forward if torch.is_grad_enabled() else run_eagerly(graph)
    else:
        run = compile_now(graph, example_inputs, dict(settings.inductor))
    if not any(stored(x) is not None for x in example_inputs):
        return run
    return lambda *inputs: run(*(x if (weight := stored(x)) is None else brought(weight, x) for x in inputs))


def _with_mode(settings: Settings, mode: str) -> Settings:
    """Inductor's settings of a torch.compile mode, under the user's own."""
    if mode == "default":
        return settings
    try:
        known = dict(torch._inductor.list_mode_options(mode))
    except RuntimeError as error:
        raise ConfigError(
            f"torch.compile has no mode {mode!r}; there are default, max-autotune, max-autotune-no-cudagraphs, reduce-overhead"
        ) from error
    return replace(settings, inductor=tuple(sorted({**known, **dict(settings.inductor)}.items())))
