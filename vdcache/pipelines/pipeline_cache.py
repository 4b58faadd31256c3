"""`vdcache.apply` and `vdcache.remove`: a pipeline's denoisers under their sessions, and everything put back."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from vdcache.api import check_options, settings_of
from vdcache.backends import Settings
from vdcache.backends.hooked import HookedModel
from vdcache.backends.runner import ModelRunner
from vdcache.errors import CacheStateError, CaptureError, ConfigError, warn_once
from vdcache.methods.recipe import Recipe
from vdcache.pipelines.denoiser import CacheContextHook, CompiledCallWrapper, Denoiser, ForwardWrapper
from vdcache.pipelines.experts import Experts
from vdcache.pipelines.forecast import most_reused
from vdcache.pipelines.loop import DenoisingLoop, ProgressBarHook
from vdcache.pipelines.third_party import cache_on, is_encoder, runs_loop
from vdcache.util.checks import is_pipeline

__all__ = ["PipelineCache", "applied_to", "apply", "remove"]

FEW_STEPS = 4
MOST_GRAPHS = 64  # a pipeline lives long: sizes, dtypes, adapters and offloading each make graphs of their own

Recipes = str | Recipe | None | Mapping[str, str | Recipe | None]
_runners: weakref.WeakValueDictionary[Any, ModelRunner] = weakref.WeakValueDictionary()
_making = threading.Lock()


def apply(
    pipe: Any,
    recipe: Recipes = None,
    *,
    speedup: float | None = None,
    quality_db: float | None = None,
    inner: str = "inductor",
    strict: bool = False,
    inductor: Mapping[str, Any] | None = None,
    tiles: str = "auto",
    outline: bool | str = "auto",
    group: Any = None,
    search_share: float = 0.1,
    generations: int | None = None,
    cache_budget: int | str | None = None,
    **torch_compile: Any,
) -> Any:
    """Make a diffusers pipeline skip work by a caching recipe.

    Every denoiser that the pipeline's loop calls is compiled when it is first called. Generations, steps and their number come
    from the pipeline's own loop, lanes of guidance from its `cache_context` or from the order of calls. The components stay the
    very objects that they are; called outside the pipeline, they run as before.

    Args:
        pipe: a pipeline.
        recipe: a `Recipe` or a name from `vdcache.recipes()`, by default `vdcache-auto`, whose first generation runs uncached. Or a mapping from
            names of components to recipes; components that are not in it stay unchanged.
        speedup, quality_db: what `vdcache-auto` is to reach, as for `vdcache.compile`.
        inner, generations: "inductor", "eager", or "auto", which runs the first of so many generations eagerly, and compiles the others if
            that can pay, as for `vdcache.compile`.
        strict: raise where vdcache would otherwise step aside with a warning.
        inductor: Inductor's own settings.
        tiles, outline, search_share: how attention under masks is computed, how blocks that repeat are compiled, how much of the search
            of `vdcache-auto` runs within one generation, as for `vdcache.compile`.
        cache_budget: bytes that the cached values of each model may take, or a text such as "4GiB", as for `vdcache.compile`.
        group: the ranks that run this pipeline together, as for `vdcache.compile`. Default: those that the collectives of each model reach.
        torch_compile: `fullgraph`, `dynamic`, `mode` of torch.compile.

    Returns the pipeline itself.

    Raises:
        ConfigError: `pipe` is not a pipeline, it has no denoiser, another library's cache is enabled, or a recipe is unknown.
    """
    _check_pipeline(pipe)
    if _bars(pipe) is not None:
        raise ConfigError(
            f"vdcache is applied to this pipeline already, with {applied_to(pipe).recipe_names}; for another recipe call vdcache.remove(pipe) first"
        )
    check_options(torch_compile, apply)
    options = {
        "inner": inner,
        "strict": strict,
        "inductor": inductor,
        "tiles": tiles,
        "outline": outline,
        "search_share": search_share,
        "generations": generations,
        "cache_budget": cache_budget,
        "group": group,
    }
    goal = {"speedup": speedup, "quality_db": quality_db}
    if isinstance(recipe, Mapping):
        if speedup is not None or quality_db is not None:
            raise ConfigError(
                "with a recipe for each component a goal stands there: {'transformer': vdcache.methods.auto(speedup=2.0)}"
            )
        settings: Settings | dict[str, Settings] = {n: settings_of({"recipe": r, **options}) for n, r in recipe.items()}
    else:
        settings = settings_of({"recipe": recipe, **goal, **options})
    applied = PipelineCache(pipe, settings, torch_compile)
    applied.check()
    applied.scan()
    ProgressBarHook(pipe, applied).install()
    return pipe


def remove(pipe: Any) -> Any:
    """Take vdcache off a pipeline: every object is where it was, every cached value is freed.

    Returns the pipeline itself.

    Raises:
        ConfigError: vdcache was not applied to it.
    """
    applied = applied_to(pipe)
    applied.release()
    bars = _bars(pipe)
    assert bars is not None
    bars.uninstall()
    return pipe


def applied_to(pipe: Any) -> PipelineCache:
    """What vdcache holds of a pipeline.

    Raises:
        ConfigError: vdcache was not applied to it.
    """
    if (bars := _bars(pipe)) is None:
        kind = type(pipe).__name__
        if not callable(pipe):
            raise ConfigError(f"this takes a pipeline after vdcache.apply; got {kind}")
        hint = "vdcache.apply(pipe, recipe) does that"
        if isinstance(pipe, nn.Module):
            hint = "that is for pipelines; `with vdcache.record() as history:` shows what a compiled model did"
        raise ConfigError(f"vdcache is not applied to this {kind}; {hint}")
    return cast(PipelineCache, bars.applied)


def _bars(pipe: Any) -> ProgressBarHook | None:
    found = getattr(pipe, "__dict__", {}).get("progress_bar")
    while found is not None and not isinstance(found, ProgressBarHook):
        found = getattr(found, "__wrapped__", None)
    return found


def _check_pipeline(pipe: Any) -> None:
    if isinstance(pipe, type):
        raise ConfigError(f"pass a pipeline that is made, {pipe.__name__}.from_pretrained(…), not the class")
    if isinstance(pipe, nn.Module):
        raise ConfigError(
            f"apply takes a whole pipeline; got the model {type(pipe).__name__}, for which there is vdcache.compile(model, recipe)"
        )
    if not is_pipeline(pipe):
        raise ConfigError(
            f"apply takes a diffusers pipeline (a DiffusionPipeline: it has components and a progress bar); got {type(pipe).__name__}. "
            "For the denoiser of a loop of your own there is vdcache.compile(model, recipe)"
        )
    if not runs_loop(pipe):
        raise ConfigError(
            f"{type(pipe).__name__} never asks for self.progress_bar, which tells vdcache where its loop begins and ends; write "
            "`with self.progress_bar(total=steps)` around the loop, or use vdcache.compile(model, recipe)"
        )


class PipelineCache:
    """What vdcache holds of one pipeline.

    Args:
        pipe: held weakly.
        settings: recipe and compiler, for all denoisers or for each by its component's name.
        torch_compile: what torch.compile is given besides.
    """

    def __init__(self, pipe: Any, settings: Settings | dict[str, Settings], torch_compile: Mapping[str, Any]) -> None:
        self._pipe = weakref.ref(pipe)
        self.settings, self.torch_compile = settings, dict(torch_compile)
        self.denoisers: dict[str, Denoiser] = {}
        self.experts = Experts()
        self._loop: weakref.ref[DenoisingLoop] | None = None
        self._said: set[str] = set()
        self._runners: list[ModelRunner] = []

    @property
    def pipe(self) -> Any:
        return self._pipe()

    @property
    def recipe_names(self) -> str:
        each = self.settings.values() if isinstance(self.settings, dict) else [self.settings]
        return ", ".join(dict.fromkeys(f"'{s.recipe.name}'" for s in each))

    def for_copy(self, pipe: Any) -> PipelineCache:
        """The same for a copy of the pipeline, with a state of its own. What it holds is found when its first loop begins."""
        if isinstance(self.settings, dict):
            return PipelineCache(pipe, {n: _fresh(s) for n, s in self.settings.items()}, self.torch_compile)
        return PipelineCache(pipe, _fresh(self.settings), self.torch_compile)

    # ---- what the pipeline consists of -------------------------------------------------------------------------------

    def candidates(self) -> dict[str, nn.Module]:
        """Components that may be denoisers: modules that are no encoders."""
        modules = {n: m for n, m in self.pipe.components.items() if isinstance(m, nn.Module) and not is_encoder(m)}
        if isinstance(self.settings, dict):
            modules = {n: m for n, m in modules.items() if n in self.settings}
        own: dict[int, str] = {}
        return {n: m for n, m in modules.items() if own.setdefault(id(m), n) == n}

    def schedulers(self) -> list[Any]:
        parts = self.pipe.components.values()
        return [p for p in parts if callable(getattr(p, "step", None)) and callable(getattr(p, "set_timesteps", None))]

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: nothing here could be a denoiser, no scheduler, compiled or cached by somebody else.
        """
        kind, found = type(self.pipe).__name__, self.candidates()
        if isinstance(self.settings, dict):
            there = sorted(n for n, m in self.pipe.components.items() if isinstance(m, nn.Module))
            if wrong := [n for n in self.settings if n not in found]:
                raise ConfigError(f"{kind} has no denoiser called {wrong[0]!r}; its modules are {', '.join(there) or 'none'}")
        if not found:
            held = ", ".join(f"{n} ({type(m).__name__})" for n, m in self.pipe.components.items() if m is not None) or "nothing"
            raise ConfigError(f"{kind} holds no denoiser, only encoders and the like: {held}. Give it its transformer first")
        if not self.schedulers():
            raise ConfigError(f"{kind} holds no scheduler, whose step() tells vdcache where a denoising step ends")
        for name, module in found.items():
            if line := cache_on(self.pipe, name, module):
                raise ConfigError(
                    f"{name} has a cache enabled already, and two would cache each other's values; turn it off first: {line}"
                )
            if "_orig_mod" in module._modules:
                raise ConfigError(
                    f"{name} is compiled already, and apply compiles it itself: pipe.{name} = pipe.{name}._orig_mod gives back the model"
                )
            if getattr(module, "_compiled_call_impl", None) is not None:
                raise ConfigError(
                    f"{name} is compiled in place already ({name}.compile()), and apply compiles it itself: "
                    f"pipe.{name}._compiled_call_impl = None gives back the model"
                )

    def scan(self) -> None:
        """Find the denoisers that the pipeline holds now: components may be exchanged between calls."""
        found = self.candidates()
        for name, denoiser in list(self.denoisers.items()):
            if denoiser.module is None or denoiser.module is not found.get(name):
                self._let_go(self.denoisers.pop(name))
        for name, module in found.items():
            if name not in self.denoisers:
                settings = self.settings[name] if isinstance(self.settings, dict) else self.settings
                self.denoisers[name] = Denoiser(name, module, _fresh(settings), functools.partial(self._runner, settings))
            ForwardWrapper.put_on(module).users.add(self)
            CacheContextHook.put_on(module)
            if CompiledCallWrapper.put_on(module):
                self.say(
                    f"{name} was compiled in place ({name}.compile()) after vdcache.apply, which compiles it itself: in the pipeline vdcache's "
                    f"compilation runs, elsewhere yours. vdcache.apply(pipe, recipe, mode=…, dynamic=…) takes torch.compile's options",
                    key=f"in place {name}",
                )

    def denoiser(self, module: nn.Module) -> Denoiser | None:
        return next((d for d in self.denoisers.values() if d.module is module), None)

    def _runner(self, settings: Settings, forward: Callable[..., Any]) -> ModelRunner:
        """The compiled forward: models of one class share it, also those of other pipelines."""
        key: Any = (forward, settings, tuple(sorted(self.torch_compile.items())))
        try:
            hash(key)
        except TypeError:  # a policy or predictor of the user's own that has no hash
            key = object()
        with _making:
            found = _runners.get(key)
            if found is None:
                found = _runners[key] = ModelRunner(
                    forward, _fresh(settings), recompile_limit=MOST_GRAPHS, slots_are_told=True, **self.torch_compile
                )
            self._runners.append(found)  # as long as this pipeline is cached
        return found

    def release(self) -> None:
        """Let go of everything."""
        if (loop := self._running()) is not None:
            loop.end()
        for denoiser in self.denoisers.values():
            self._let_go(denoiser)
        self.denoisers.clear()
        self._runners.clear()

    def _let_go(self, denoiser: Denoiser) -> None:
        denoiser.session.end()
        denoiser.session.invariants.clear()
        module = denoiser.module
        if module is None or (switch := ForwardWrapper.on(module)) is None:
            return
        switch.users.discard(self)
        if not switch.users:
            switch.take_off()
            CompiledCallWrapper.take_off(module)
            if (lanes := CacheContextHook.on(module)) is not None:
                lanes.uninstall()

    # ---- what happens --------------------------------------------------------------------------------------------

    def begin(self, total: int | None, iterable: Any) -> DenoisingLoop:
        """The pipeline's loop begins."""
        running = self._running()
        if running is not None:
            if running.thread != threading.get_ident():
                raise CacheStateError(
                    f"this {type(self.pipe).__name__} is running in another thread, and a pipeline has one scheduler: give every thread a "
                    "pipeline of its own, type(pipe)(**components) with a copy of the scheduler; they may share the models"
                )
            running.end()
        self.scan()
        loop = DenoisingLoop(self, total, iterable)
        self._loop = weakref.ref(loop)
        loop.begin()
        return loop

    def _running(self) -> DenoisingLoop | None:
        loop = self._loop() if self._loop is not None else None
        return None if loop is None or loop.over else loop

    def say(self, message: str, key: str | None = None) -> None:
        warn_once(self._said, f"vdcache: {message}", key=key)

    def foreign_cache(self, denoiser: Denoiser) -> str:
        """Why the denoiser is left alone in this loop; "" where it is not."""
        line = cache_on(self.pipe, denoiser.name, denoiser.module)
        if line is None:
            return ""
        self.say(f"{denoiser.name} has another cache enabled, so vdcache leaves it alone; to use vdcache: {line}")
        return "another cache is enabled"

    def look_for_slots(self, denoiser: Denoiser) -> None:
        """Warn once, by its name, of a denoiser for which the recipe does nothing."""
        recipe = denoiser.settings.recipe
        graphs = denoiser.session.graphs
        if denoiser.helper or len(recipe.plans()) < 2 or any(getattr(g, "slots", ()) for g in graphs):
            return
        others = [
            n
            for n, d in self.denoisers.items()
            if d is not denoiser and d.checked and any(getattr(g, "slots", ()) for g in d.session.graphs)
        ]
        message = f"the recipe '{recipe.name}' finds no slot in {denoiser.name} ({type(denoiser.module).__name__}), so every step of it is computed"
        message += f"; {', '.join(others)} is cached" if others else ""
        if hooks := HookedModel.of(denoiser.module).staying:
            hint = (
                f"Hooks on its single layers ({', '.join(sorted(hooks))}) break it into pieces that hold no branch. vdcache replaces those of "
                "diffusers and accelerate that only bring weights (offloading, layerwise casting); take the others off"
            )
        else:
            hint = f"vdcache.apply(pipe, {{{denoiser.name!r}: another_recipe, …}}) gives each its own; vdcache.explain shows what there is"
            hint += f". {why[0].upper()}{why[1:]}" if (why := denoiser.why_no_slot) else ""
        if denoiser.settings.strict:
            raise CaptureError(f"{message}. {hint}")
        self.say(f"{message}. {hint}", key=f"no slot {denoiser.name}")

    def say_how_little(self, denoiser: Denoiser, steps: int) -> None:
        """Few steps leave little to skip; nobody should have to find that out by measuring."""
        policy = denoiser.session.policy
        if len(policy.plans()) < 2 or ((reused := most_reused(policy, steps)) and steps > FEW_STEPS):
            return
        which = f" (steps {', '.join(map(str, reused))}, counted from 0)" if reused else ""
        least = "the first step has nothing to reuse" if steps == 1 else "little can be skipped"
        self.say(
            f"{denoiser.name}: {steps} {'steps' if steps > 1 else 'step'}, so {least}: '{denoiser.settings.recipe.name}' reuses at most "
            f"{len(reused)} of {steps}{which}",
            key=f"few {denoiser.name} {steps}",
        )


def _fresh(settings: Settings) -> Settings:
    """The same settings that have said nothing yet."""
    return replace(settings, programs=[], _said=set())
