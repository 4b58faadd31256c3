"""What is private to diffusers, accelerate and cache-dit, in one place.

Seen to work with diffusers 0.42.1, accelerate 1.15.0, cache-dit 1.5.3, transformers 4.57 and 5.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["boundary", "cache_on", "is_encoder", "runs_loop"]


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
