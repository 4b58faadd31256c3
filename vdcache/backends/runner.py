"""A model under this backend: compiled once, run under any session, and a handle on its own one."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vdcache.backends.dynamo import Backend
from vdcache.backends.hooked import HookedModel, differ
from vdcache.backends.settings import Settings
from vdcache.backends.verdict import Verdict
from vdcache.errors import CaptureError, VdcacheError
from vdcache.ir.capture import first_line
from vdcache.passes import TileAttention
from vdcache.runtime import registry
from vdcache.runtime.session import Session
from vdcache.util.isolated import compile_isolated

__all__ = ["ModelRunner", "compile_with", "original"]


def compile_with(model: Callable[..., Any], settings: Settings, **torch_compile: Any) -> Any:
    """The model compiled with these settings, and its session as the attribute `vdcache`."""
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

        # Where torch.compile goes on around it: inlined, the model would run without its session.
        return torch.compiler.disable(call)  # type: ignore[no-any-return]

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
        self._model, self.settings = model, settings
        # Models of which nothing is cached: a graph that is compiled plainly would bring all its weights at once.
        self._plain: weakref.WeakSet[nn.Module] = weakref.WeakSet()
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
                result = self._run(session, run or self.compiled, args, kwargs)
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

    def _run(self, session: Session, run: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One forward, with the hooks on inner modules off where the compiled graph can do their work."""
        root = self._model if isinstance(self._model, nn.Module) else next(iter(args), None)
        if torch.is_grad_enabled() or not isinstance(root, nn.Module) or root in self._plain:
            return session.watch(run, args, kwargs)
        hooked = HookedModel.of(root)
        expected = None if hooked.watched else hooked.watch(self._model, args, kwargs)
        if not hooked.layers or hooked.why_not:
            if hooked.why_not:
                self._leave(hooked, hooked.why_not)
            return session.watch(run, args, kwargs)
        try:
            with hooked.bare():
                result = session.watch(run, args, kwargs)
            if not session.graphs:
                self._plain.add(root)
            if expected is None or not self._computes(session) or not differ(result, expected, self.settings.starts_eagerly):
                return result
            why = "without them the model computes something else"  # it looks at its weights where the hooks have not brought them
            session.failed()
        except Exception as error:
            if isinstance(getattr(error, "inner_exception", error), VdcacheError):
                raise
            expected = self._model(*args, **kwargs)  # an error of the user's own is raised here once more
            why = f"without them the compiled model fails: {type(error).__name__}: {first_line(error)}"
        self._leave(hooked, why)
        return expected

    def _computes(self, session: Session) -> bool:
        """Whether the last call did what the model does without vdcache."""
        masked = any(isinstance(p, TileAttention) for p in self.settings.recipe.passes)
        return not masked and len(session.history) > 0 and not session.history[-1].plan

    def _leave(self, hooked: HookedModel, why: str) -> None:
        """The hooks of a model stay on, and every one of them cuts it."""
        hooked.why_not = why
        message = f"the hooks on inner modules of this model stay on, and what they cut in two is not cached: {why}"
        if self.settings.strict:
            raise CaptureError(message)
        self.settings.warn_once("hooks", f"vdcache: {message}")


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
