"""A model under this backend: compiled once, run under any session, and a handle on its own one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vdcache.backends.dynamo import Backend
from vdcache.backends.settings import Settings
from vdcache.backends.verdict import Verdict
from vdcache.errors import CaptureError, VdcacheError
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
