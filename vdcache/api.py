"""`vdcache.compile` and `torch.compile(model, backend="vdcache")`: what names recipes and compilers, and makes sessions for them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import fx

from vdcache.backends.dynamo import compile_graph
from vdcache.backends.inductor import CUDA_GRAPHS
from vdcache.backends.runner import compile_with
from vdcache.backends.settings import Settings
from vdcache.calibration.auto_calibrator import AutoCalibrator
from vdcache.distributed.agreement import Ranks
from vdcache.errors import ConfigError
from vdcache.methods.recipe import Recipe
from vdcache.methods.registry import for_goal
from vdcache.policies.base import Always
from vdcache.runtime.session import Session
from vdcache.util.checks import check_model

__all__ = ["backend", "check_options", "compile", "settings_of"]

_SHARED: list[Any] = []  # who runs models together that are compiled by torch.compile, by group
_TORCH_COMPILE = ("fullgraph", "dynamic", "mode")


def compile(
    model: Callable[..., Any],
    recipe: str | Recipe | None = None,
    *,
    speedup: float | None = None,
    quality_db: float | None = None,
    num_steps: int | None = None,
    inner: str = "inductor",
    strict: bool = False,
    inductor: Mapping[str, Any] | None = None,
    tiles: str = "auto",
    outline: bool | str = "auto",
    search_share: float = 0.1,
    generations: int | None = None,
    cache_budget: int | str | None = None,
    cuda_graphs: bool = False,
    hoist: bool | None = None,
    pipeline: Any = None,
    group: Any = None,
    **torch_compile: Any,
) -> Any:
    """Compile a denoiser so that it skips work by a caching recipe.

    Args:
        model: a module or function that is called once a denoising step (or once a lane of guidance).
        recipe: a `Recipe` or a name from `vdcache.recipes()`; by default `vdcache-auto`, whose first generation runs uncached.
        speedup, quality_db: the goal of `vdcache-auto`, one of the two: how many times fewer FLOPs (2 if neither is given), or the
            minimum PSNR of the final latents to the uncached ones, in dB.
        num_steps: denoising steps of a generation; learnt from the first generation if not given.
        inner: "inductor", "eager", or "auto".
        generations: how many generations the model is expected to run, for inner="auto": it runs the first one eagerly and compiles the rest
            if that can pay. Default: everything is compiled.
        strict: raise where vdcache would otherwise step aside with a warning.
        inductor: Inductor's own settings.
        tiles: how attention under masks is computed: "auto" measures on this device, or "gather", "merged", "flex", "triton", "masked".
        outline: compile blocks that are equal up to weights once, and call them: True, False, or "auto", which leaves out blocks so small
            that a call would make them longer.
        search_share: the most that the search of `vdcache-auto` adds to one generation, as a share of an uncached one, in whole steps that are
            saved up over generations. `math.inf` searches all at once, when the first generation ends.
        cache_budget: what cached values may take, in bytes or as text ("4GiB"). Where the recipe's would take more, fewer values a slot are kept, or
            the last one alone, or nothing, and a warning says which. Default: what is free on a GPU, where values that do not fit go to main
            memory; no bound elsewhere.
        cuda_graphs: have Inductor record the compiled graphs as CUDA graphs, and copy what they return. An experiment: it was tested with
            simulated replays, and has not run on a GPU.
        hoist: compute values that depend on the prompt or the timestep alone once, and keep them. Exact, with any recipe. Default: the recipe's
            own setting, True for `exact` alone.
        pipeline: passes in place of the recipe's: a `Pipeline`, its text, or a sequence of passes.
        group: the ranks that run this model together and so take the same decisions: a process group, a DeviceMesh, numbers of ranks,
            or a `vdcache.distributed.Ranks`. Default: the ranks of the process groups of the collectives in its graph.
        torch_compile: `fullgraph`, `dynamic`, `mode` of torch.compile. A recipe with masks compiles every size on its own
            (dynamic=False) unless told otherwise.

    Returns what torch.compile returns, with the `Session` as its attribute `vdcache`: its history, its summary, and
    `begin`, `step`, `lane` for callers who announce generations, steps and lanes. The model itself is not changed. A copy or a pickle of a compiled module
    is compiled with the same options and has its own session, which starts empty.

    Raises:
        ConfigError: `model` is not a model, or a recipe or option is unknown. Raised before anything runs.
    """
    check_model(model, "compile")
    check_options(torch_compile, compile)
    options = {
        "recipe": recipe,
        "speedup": speedup,
        "quality_db": quality_db,
        "num_steps": num_steps,
        "inner": inner,
        "strict": strict,
        "inductor": inductor,
        "tiles": tiles,
        "outline": outline,
        "search_share": search_share,
        "generations": generations,
        "cache_budget": cache_budget,
        "cuda_graphs": cuda_graphs,
        "hoist": hoist,
        "pipeline": pipeline,
        "group": group,
    }
    settings = settings_of(options)
    return compile_with(model, settings, **torch_compile)


def backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The entry point `vdcache` of `torch_dynamo_backends`.

    Args:
        options: `recipe`, `num_steps`, `inner`, `strict`, `inductor` (`Settings`).
        mode: as torch.compile's; "reduce-overhead" runs plain, because CUDA graphs are not supported yet. "max-autotune" caches,
            without CUDA graphs.

    Raises:
        ConfigError: an option that does not exist or cannot be.
        CaptureError: under `strict`, a graph that vdcache does not understand or that holds nothing to cache.
    """
    settings = settings_of(options)
    # Every graph has its own settings here: those of one model have one agreement.
    settings = replace(settings, ranks=next((r for r in _SHARED if r == settings.ranks), settings.ranks))
    if settings.ranks not in _SHARED:
        _SHARED.append(settings.ranks)
    return compile_graph(graph, example_inputs, settings, mode)


def settings_of(options: Mapping[str, Any] | None) -> Settings:
    """Settings from the `options` of torch.compile; `pipeline` among them gives the recipe another scope.

    Raises:
        ConfigError: an option or a recipe that does not exist or cannot be.
    """
    options = dict(options or {})
    known = [
        *(f.name for f in fields(Settings) if f.compare and f.name != "ranks"),
        "speedup",
        "quality_db",
        "hoist",
        "pipeline",
        "group",
    ]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(
                f"unknown option {name!r}{hint} There are {', '.join(known)}; Inductor's own go under 'inductor'."
            )
    inductor = options.pop("inductor", None) or {}
    if not isinstance(inductor, Mapping):
        raise ConfigError(f"inductor is a dict of Inductor's settings, as {{'max_autotune': True}} is; got {inductor!r}")
    if inductor.get(CUDA_GRAPHS):
        raise ConfigError(
            f"inductor={{{CUDA_GRAPHS!r}: True}} asks for CUDA graphs, whose replays overwrite what earlier steps cached. Leave it out; "
            "cuda_graphs=True records them and copies what they return, mode='max-autotune' tunes kernels without CUDA graphs"
        )
    chosen = for_goal(options.pop("recipe", None), options.pop("speedup", None), options.pop("quality_db", None))
    if (passes := options.pop("pipeline", None)) is not None:
        chosen = chosen.with_passes(passes)
    group = options.pop("group", None)
    if (hoist := options.pop("hoist", None)) is not None:
        if not isinstance(hoist, bool):
            raise ConfigError(f"hoist is True or False; got {hoist!r}")
        chosen = chosen.hoisting(hoist)
    searches = None if chosen.goal is None else _searching_session
    return Settings(
        recipe=chosen, inductor=tuple(sorted(inductor.items())), make_session=searches, ranks=Ranks(group), **options
    )


def _searching_session(settings: Settings) -> Session:
    """A session that finds a schedule for the goal of its recipe."""
    recipe = settings.recipe
    assert recipe.goal is not None
    session = Session(Always(), settings.num_steps, name=recipe.name)
    session.recorder = AutoCalibrator(
        session,
        recipe.goal,
        share=settings.search_share,
        strict=settings.strict,
        warn=settings.warn_once,
        log=settings.log_once,
    )
    return session


def check_options(given: Mapping[str, Any], function: Callable[..., Any], rest: str = "torch_compile") -> None:
    """Refuse what torch.compile is not asked for here.

    Raises:
        ConfigError: an argument that neither `function` nor torch.compile has; the message names the nearest.
    """
    if unknown := [name for name in given if name not in _TORCH_COMPILE]:
        own = [name for name in inspect.signature(function).parameters if name not in ("model", "pipe", rest)]
        near = difflib.get_close_matches(unknown[0], [*own, *_TORCH_COMPILE], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        if unknown[0] == "options":
            hint = "; what stands there is given directly: vdcache.compile(model, recipe=…, num_steps=…)."
        raise ConfigError(f"unknown argument {unknown[0]!r}{hint} There are {', '.join([*own, *_TORCH_COMPILE])}.")
