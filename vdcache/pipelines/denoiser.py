"""One denoiser of a pipeline: its session, and the switch in front of its forward."""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from vdcache.backends import Settings
from vdcache.backends.hooks import places
from vdcache.backends.runner import ModelRunner
from vdcache.pipelines.override import Override, method_of
from vdcache.runtime.session import Session

__all__ = ["CacheContextHook", "CompiledCallWrapper", "Denoiser", "ForwardWrapper", "here"]


class RunningLoop(Protocol):
    """A denoising loop that runs now."""

    def call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any: ...
    def holds(self, module: nn.Module) -> bool: ...

    lane_names: dict[int, str]


class _Here(threading.local):
    """The loops that run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.loops: list[Any] = []

    def of(self, module: nn.Module) -> RunningLoop | None:
        return next((loop for loop in reversed(self.loops) if loop.holds(module)), None)


here = _Here()


class ForwardWrapper(Override):
    """Stands where the forward of a module was, behind the hooks of offloading.

    Within the loop of a pipeline that vdcache is applied to, the loop runs the forward; everywhere else it runs as ever.
    """

    __slots__ = ("users",)

    def __init__(self, module: nn.Module, before: Callable[..., Any] | None) -> None:
        super().__init__(module, "forward", before)
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()  # the pipelines that it serves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.owner
        loop = here.of(module)
        return self.plain(*args, **kwargs) if loop is None else loop.call(module, self.plain, args, kwargs)

    @staticmethod
    def on(module: nn.Module) -> ForwardWrapper | None:
        """The switch of a module, wherever hooks have moved it."""
        return next((p.get() for p in places(module) if isinstance(p.get(), ForwardWrapper)), None)

    @staticmethod
    def put_on(module: nn.Module) -> ForwardWrapper:
        """The switch of a module, put there if there is none: as far behind hooks as it goes."""
        if (switch := ForwardWrapper.on(module)) is not None:
            return switch
        place = list(places(module))[-1]
        found = place.get()
        own = found is None or _is_method(found, module)
        switch = ForwardWrapper(module, None if own else found)
        place.put(switch)
        return switch

    def take_off(self) -> None:
        for place in places(self.owner):
            if place.get() is self:
                first = place.held is self.owner.__dict__ and place.key == "forward"
                place.put(self.before if self.before is not None or first else method_of(self.owner, "forward"))
                return


def _is_method(found: Any, module: nn.Module) -> bool:
    """Whether this is no more than the class's method, as removed hooks and copies leave it."""
    return isinstance(found, types.MethodType) and found.__self__ is module and found.__func__ is type(module).forward


class CompiledCallWrapper(Override):
    """Stands where `module.compile()` put what runs in the place of the forward and its hooks, which would go past the switch.

    Within a loop the hooks and the switch run, and vdcache compiles; everywhere else what the user compiled runs.
    """

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.owner
        return self.plain(*args, **kwargs) if here.of(module) is None else module._call_impl(*args, **kwargs)

    @staticmethod
    def put_on(module: nn.Module) -> bool:
        """Whether the module was compiled in place since this was asked last."""
        compiled = module.__dict__.get("_compiled_call_impl")
        if compiled is None or isinstance(compiled, CompiledCallWrapper):
            return False
        CompiledCallWrapper(module, "_compiled_call_impl", compiled).install()
        return True

    @staticmethod
    def take_off(module: nn.Module) -> None:
        if isinstance(own := module.__dict__.get("_compiled_call_impl"), CompiledCallWrapper):
            own.uninstall()


class CacheContextHook(Override):
    """Stands in front of `cache_context` and hears what the pipeline calls the lane.

    Args:
        owner: the module whose method it is.
        module: the denoiser, which may be a wrapper that hands the owner's attributes on.
        before: what the owner's dict held.
    """

    __slots__ = ("_module",)

    def __init__(self, owner: Any, module: nn.Module, before: Callable[..., Any] | None) -> None:
        super().__init__(owner, "cache_context", before)
        self._module = weakref.ref(module)

    @staticmethod
    def on(module: nn.Module) -> CacheContextHook | None:
        """What hears the lanes of a module."""
        found = getattr(module, "cache_context", None)
        return found if isinstance(found, CacheContextHook) else None

    @staticmethod
    def put_on(module: nn.Module) -> None:
        """Hear the lanes of a module, if the pipeline can name them."""
        found = getattr(module, "cache_context", None)
        if callable(found) and not isinstance(found, CacheContextHook):
            owner = getattr(found, "__self__", module)
            CacheContextHook(owner, module, owner.__dict__.get("cache_context")).install()

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Any:
        module = self._module()
        loop = None if module is None else here.of(module)
        with self.plain(name, **kwargs):
            if loop is not None:
                loop.lane_names[id(module)] = name
            try:
                yield
            finally:
                if loop is not None:
                    loop.lane_names.pop(id(module), None)


class Denoiser:
    """One module that a pipeline may call in its loop.

    Args:
        name: of the component.
        module: held weakly: the pipeline owns it.
        settings: recipe and compiler.
        runner: makes the compiled forward, shared among models of one class.
    """

    def __init__(
        self, name: str, module: nn.Module, settings: Settings, runner: Callable[[Callable[..., Any]], ModelRunner]
    ) -> None:
        self.name, self.settings = name, settings
        self._module, self._runner = weakref.ref(module), runner
        self._compiled: ModelRunner | None = None
        self.session: Session = settings.new_session()
        self.helper = False  # another denoiser takes what it returns: a ControlNet
        self.aside = ""  # why the loop that runs now is not cached
        self.checked = False  # slots were looked for
        self.step = -1  # of the loop, in which it was called last

    @property
    def module(self) -> Any:
        return self._module()

    @property
    def why_no_slot(self) -> str:
        """Why no graph of it has a slot, with every candidate; "" where some graph has one."""
        verdict = self._compiled.verdict if self._compiled is not None else None
        return (verdict.why("slot") or verdict.why("probe")) if verdict is not None else ""

    def at_step(self, step: int, timestep: float | None) -> None:
        """Be at a step of the loop."""
        if self.step != step:
            self.step = step
            self.session.step(timestep)

    def run(self, forward: Callable[..., Any], label: str | None, args: Any, kwargs: Any) -> Any:
        """One forward as one lane of the step; where the pipeline has no name for it, its conditioning tells."""
        if label is not None:
            self.session.lane(label)
        module = self.module
        function = getattr(forward, "__func__", None)
        bound = function is not None and getattr(forward, "__self__", None) is module
        if self._compiled is None:
            self._compiled = self._runner(function if bound else forward)  # type: ignore[arg-type]
        return self._compiled(self.session, (module, *args) if bound else args, kwargs)
