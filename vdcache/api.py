"""`vdcache.compile`: torch.compile with this backend, and a handle on the session."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vdcache.backends import Backend, Settings
from vdcache.backends.isolated import compile_isolated
from vdcache.backends.verdict import Verdict
from vdcache.ir.checks import check_model
from vdcache.ir.errors import CaptureError, ConfigError, VdcacheError
from vdcache.recipe import Recipe
from vdcache.runtime import registry
from vdcache.runtime.session import Session

__all__ = ["ModelRunner", "check_options", "compile", "compile_with", "original"]

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
    pipeline: Any = None,
    **torch_compile: Any,
) -> Any:
    """Compile a denoiser so that it skips work by a caching recipe.

    Args:
        model: a module or function that is called once a denoising step (or once a lane of guidance).
        recipe: a `Recipe` or a name from `vdcache.recipes()`; `vdcache-auto` without: its first generation runs uncached.
        speedup, quality_db: what `vdcache-auto` is to reach, one of the two: how many times faster (by FLOPs; 2 if neither is
            given), or the least PSNR of the final latents to the uncached ones, in dB.
        num_steps: denoising steps of a generation; learnt from the first generation if not given.
        inner: "inductor" or "eager".
        strict: raise where vdcache would otherwise step aside with a warning.
        inductor: Inductor's own settings.
        tiles: how attention under masks is computed: "auto" measures on this device, or "gather", "flex", "triton", "masked".
        pipeline: passes in place of the recipe's: a `Pipeline`, its text, or a sequence of passes.
        torch_compile: `fullgraph`, `dynamic`, `mode` of torch.compile. A recipe with masks compiles every size on its own
            (dynamic=False) unless told otherwise.

    Returns what torch.compile returns, with the `Session` as its attribute `vdcache`: its history, its summary, and
    `begin`, `step`, `lane` for callers who say where they are. The model itself is not changed. A copy or a pickle of a compiled module
    is compiled with the same options and has its own session, which starts empty.

    Raises:
        ConfigError: no model, an unknown recipe or option, before anything runs.
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
        "pipeline": pipeline,
    }
    settings = Settings.of(options)
    return compile_with(model, settings, **torch_compile)


def compile_with(model: Callable[..., Any], settings: Settings, **torch_compile: Any) -> Any:
    """`compile` with settings that are made already."""
    session = settings.new_session()
    model = original(model)
    runner = ModelRunner(model, settings, **torch_compile)
    compiled = runner.compiled

    def under_session(run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def call(*args: Any, **kwargs: Any) -> Any:
            mine, claimed = session.claim(settings.new_session)
            try:
                return runner(mine, args, kwargs, run)
            finally:
                if claimed:
                    mine.release()

        return call

    if isinstance(compiled, nn.Module):
        # past OptimizedModule.__setattr__, which would write into the user's model
        compiled.__dict__["forward"] = under_session(compiled.forward)
        compiled.__dict__["vdcache"] = session
        compiled.__dict__["vdcache_original"] = model
        # A copy, also through a file, compiles anew: it shares neither a session nor a graph with this one.
        compiled.__dict__["__reduce__"] = lambda: (_compile_again, (model, settings.anew(), torch_compile))
        return compiled
    call = under_session(compiled)
    call.vdcache = session  # type: ignore[attr-defined]
    call.vdcache_original = model  # type: ignore[attr-defined]
    return call


def _compile_again(model: nn.Module, settings: Settings, torch_compile: dict[str, Any]) -> Any:
    """What copies and pickles of a compiled module are made by."""
    return compile_with(model, settings, **torch_compile)


class ModelRunner:
    """A model or function under this backend, which runs under any session: it holds no state of a generation itself.

    Args:
        model: what is compiled.
        settings: recipe and compiler.
        recompile_limit: how many graphs Dynamo may make of one forward before it gives up; its own limit without.
        slots_are_told: somebody else says where no graph of the model has a slot.
        torch_compile: `fullgraph`, `dynamic`, `mode` of torch.compile.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        settings: Settings,
        *,
        recompile_limit: int | None = None,
        slots_are_told: bool = False,
        **torch_compile: Any,
    ) -> None:
        self._but = ("slot", "probe") if slots_are_told else ()
        self.settings = settings
        self.verdict = Verdict(settings, model)
        self._backend = Backend(settings, torch_compile.pop("mode", None), self.verdict)
        if settings.recipe.fixed_sizes and torch_compile.get("dynamic") is None:
            torch_compile["dynamic"] = False  # a mask is cut for sizes: where they are symbols it fits none
        self.compiled: Any = compile_isolated(model, limit=recompile_limit, backend=self._backend, **torch_compile)

    def __call__(
        self, session: Session, args: Sequence[Any], kwargs: dict[str, Any], run: Callable[..., Any] | None = None
    ) -> Any:
        """One forward under a session.

        Args:
            run: the compiled callable, where it is not `compiled` itself.
        """
        if not self.verdict.settled:
            self.verdict.runs()
        try:
            with registry.using(session):
                result = session.watch(run or self.compiled, args, kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, VdcacheError):
                raise error.inner_exception from None  # what the user can catch and read
            raise
        except Exception as error:
            self.verdict.failed(error)
            raise
        if not self._backend.called:
            _never_called(self.settings, self.verdict.because())
        self.verdict.judge(session.step_index >= 0, self._but)
        return result


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


def original(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model that the user gave: compiling what was compiled before starts from there, and the new recipe alone acts."""
    while (inner := getattr(model, "__dict__", {}).get("vdcache_original")) is not None:
        model = inner
    return model


def _never_called(settings: Settings, because: str) -> None:
    """Dynamo ran the model without asking the backend once."""
    message = "vdcache: Dynamo compiled nothing of this model, so nothing is reused. " + (
        because
        or "Either torch.compile is disabled (TORCHDYNAMO_DISABLE, torch.compiler.disable), or this forward was compiled too often in this "
        "process (torch._dynamo.config.recompile_limit; torch._dynamo.reset() forgets)."
    )
    if settings.strict:
        raise CaptureError(message)
    settings.warn_once("never called", message)
