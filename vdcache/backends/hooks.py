"""Hooks of diffusers and accelerate that stand in front of a module's forward: where the forward is, and what they do to weights.

What is private to these two packages about hooks is in this file. Seen to work with diffusers 0.42.1 and accelerate 1.15.0.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = [
    "ForwardLocation",
    "hook_in_the_way",
    "hooks_of",
    "on_disk",
    "only_bring_weights",
    "places",
    "streams_of",
    "weights_of",
]

# These do nothing but bring weights for one forward and put them away again. A hook that is not named here may do anything.
_BRING_WEIGHTS = {
    "diffusers.hooks.group_offloading": (
        "GroupOffloadingHook",
        "LazyPrefetchGroupOffloadingHook",
        "LayerExecutionTrackerHook",
    ),
    "diffusers.hooks.layerwise_casting": ("LayerwiseCastingHook", "PeftInputAutocastDisableHook"),
    "accelerate.hooks": ("AlignDevicesHook",),
}


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


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of a module."""
    own = module.__dict__.get("_hf_hook")
    theirs = getattr(module.__dict__.get("_diffusers_hook"), "hooks", {}).values()
    return [*theirs, *(() if own is None else getattr(own, "hooks", (own,)))]


def only_bring_weights(hooks: list[Any]) -> bool:
    """Whether hooks bring weights for one forward, and do nothing else. A subclass may do more."""
    kinds = {getattr(sys.modules.get(m), name, None) for m, names in _BRING_WEIGHTS.items() for name in names}
    return bool(hooks) and all(type(hook) in kinds for hook in hooks)


def weights_of(hooks: list[Any], name: str) -> Mapping[str, Tensor] | None:
    """Where hooks keep a weight themselves, leaving nothing in the module; None where it is on the disk, or nowhere.

    Args:
        name: of the weight, as seen from the module that the hooks stand in front of.
    """
    for hook in hooks:
        weights: Mapping[str, Tensor] | None = getattr(hook, "weights_map", None)
        if weights is not None and name in weights and weights[name] is weights[name]:  # the disk gives another each time
            return weights
    return None


def on_disk(hooks: list[Any]) -> bool:
    """Whether hooks leave memory without content in the module, and keep its weights on the disk."""
    return any(getattr(getattr(hook, "group", None), "offload_to_disk_path", None) is not None for hook in hooks)


def streams_of(hooks: list[Any]) -> set[Any]:
    """The streams on which hooks bring weights ahead of time."""
    found = {getattr(getattr(hook, "group", None), "stream", None) for hook in hooks}
    return found - {None}


def hook_in_the_way() -> bool:
    """Whether a hook is running below this call, so that Dynamo sees what is behind it on its own."""
    files = {getattr(sys.modules.get(m), "__file__", None) for m in (*_BRING_WEIGHTS, "diffusers.hooks.hooks")} - {None}
    frame: types.FrameType | None = sys._getframe(1)
    while files and frame is not None:
        if frame.f_code.co_filename in files:
            return True
        frame = frame.f_back
    return False
