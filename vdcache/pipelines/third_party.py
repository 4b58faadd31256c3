"""What is private to diffusers, accelerate and cache-dit, in one place.

Seen to work with diffusers 0.42.1, accelerate 1.15.0, cache-dit 1.5.3, transformers 4.57 and 5.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

__all__ = ["ForwardLocation", "boundary", "cache_on", "instead_of", "is_encoder", "layer_hooks", "places", "runs_loop"]


class ForwardLocation:
    """Somewhere that a module's forward is kept: in its own dict, or behind the hooks of offloading."""

    def __init__(self, held: dict[str, Any], key: str) -> None:
        self.held, self.key = held, key

    def get(self) -> Any:
        return self.held.get(self.key)

    def put(self, value: Any) -> None:
        if value is None:
            self.held.pop(self.key, None)
        else:
            self.held[self.key] = value


def places(module: nn.Module) -> Iterator[ForwardLocation]:
    """Where the forward of a module is kept, from what is called first to what the hooks call in the end."""
    place: ForwardLocation | None = ForwardLocation(module.__dict__, "forward")
    while place is not None:
        yield place
        place = _behind(module, place.get())


def _behind(module: nn.Module, forward: Any) -> ForwardLocation | None:
    if not isinstance(forward, functools.partial):
        return None
    function = forward.func
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)) if _is_plain(function) else {}
    if "function_reference" in cells:  # diffusers' HookRegistry
        kept = cells["function_reference"].cell_contents
        return ForwardLocation(kept.__dict__, "forward" if kept.original_forward is None else "original_forward")
    if "_old_forward" in module.__dict__:  # accelerate
        return ForwardLocation(module.__dict__, "_old_forward")
    return None


def _is_plain(function: Any) -> bool:
    return isinstance(function, types.FunctionType)


def cache_on(pipe: Any, name: str, module: nn.Module) -> str | None:
    """The line that turns off a cache that somebody else has enabled; None where there is none."""
    if getattr(module, "is_cache_enabled", False):
        return f"pipe.{name}.disable_cache()"
    if getattr(module, "_is_cached", False) or getattr(pipe, "_is_cached", False):
        return "cache_dit.disable_cache(pipe)"
    for child in module.modules():
        registry = getattr(child, "_diffusers_hook", None)
        for hook_name, hook in getattr(registry, "hooks", {}).items():
            if getattr(hook, "_is_stateful", False):
                return (
                    f"from diffusers.hooks import HookRegistry; "
                    f"HookRegistry.check_if_exists_or_initialize(pipe.{name}).remove_hook({hook_name!r}, recurse=True)"
                )
    return None


def layer_hooks(module: nn.Module) -> set[str]:
    """The hooks that stand in front of single layers, by the names of their classes."""
    found = set()
    for layer in (m for m in module.modules() if "forward" in m.__dict__ and not any(m.children())):
        registry, own = getattr(layer, "_diffusers_hook", None), getattr(layer, "_hf_hook", None)
        found |= {type(h).__name__ for h in (*getattr(registry, "hooks", {}).values(), *([own] if own is not None else []))}
    return found


def instead_of(hooks: set[str]) -> str:
    """What to use instead of hooks on single layers."""
    if hooks == {"LayerwiseCastingHook"}:  # of enable_layerwise_casting
        return "leave out enable_layerwise_casting, or keep the weights small by quantising them (torchao's weights of 8 bits are cached like any)"
    return "offload whole models (enable_model_cpu_offload) or whole blocks (enable_group_offload with offload_type='block_level') instead"


def is_encoder(module: nn.Module) -> bool:
    """Whether a component turns text or pictures into what a denoiser takes, or latents into pictures."""
    transformers = sys.modules.get("transformers")
    of_text = transformers is not None and isinstance(module, transformers.PreTrainedModel)
    return of_text or (callable(getattr(module, "encode", None)) and callable(getattr(module, "decode", None)))


def boundary(pipe: Any, schedulers: list[Any]) -> float | None:
    """The timestep from which on the second of two denoisers runs, where the pipeline's configuration says it."""
    ratio = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    if ratio is None or not schedulers:
        return None
    return float(ratio) * float(schedulers[0].config.num_train_timesteps)


def runs_loop(pipe: Any) -> bool:
    """Whether the pipeline's own code asks for a progress bar: every loop of diffusers does."""
    for kind in type(pipe).__mro__:
        for function in vars(kind).values():
            if "progress_bar" in _names(function) and function.__name__ != "progress_bar":
                return True
    return False


def _names(function: Callable[..., Any] | Any) -> set[str]:
    import inspect

    function = inspect.unwrap(function) if callable(function) else function
    code = getattr(function, "__code__", None)
    return set(code.co_names) if code is not None else set()
