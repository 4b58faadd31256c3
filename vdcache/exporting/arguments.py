"""What `vdcache.export` is given, checked before anything is traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vdcache.backends.runner import original
from vdcache.errors import ConfigError
from vdcache.util.checks import check_model

__all__ = ["check_call", "check_loop"]


def check_call(model: Any, args: Any, kwargs: Any) -> None:
    """One call of the model, as export is given it.

    Raises:
        ConfigError: no model, no tuple of positional inputs, no mapping of others, or inputs that the model does not take.
    """
    check_model(model, "export")
    if isinstance(args, (str, Mapping, Tensor)) or not isinstance(args, Sequence):
        hint = (
            ": write (x,)" if isinstance(args, Tensor) else "; inputs by name are kwargs" if isinstance(args, Mapping) else ""
        )
        raise ConfigError(f"args is a tuple of the model's positional inputs; got {_described(args)}{hint}")
    if not isinstance(kwargs, Mapping):
        raise ConfigError(f"kwargs holds the model's inputs by name, as a dict; got {_described(kwargs)}")
    model = original(model)
    called = model.forward if isinstance(model, nn.Module) else model
    given = ", ".join([*map(_described, args), *(f"{n}={_described(v)}" for n, v in kwargs.items())])
    _bind(called, args, kwargs, "args and kwargs are one call of the model", given)


def check_loop(loop: Any, inputs: Any) -> None:
    """A denoising loop and one set of its tensors.

    Raises:
        ConfigError: no function, no mapping of tensors, or names that the loop does not take.
    """
    if not callable(loop):
        raise ConfigError(f"loop is a function, loop(model, **inputs); got {_described(loop)}")
    if not isinstance(inputs, Mapping):
        raise ConfigError(f"inputs holds the loop's tensors by the names of its arguments, as a dict; got {_described(inputs)}")
    if wrong := [n for n, v in inputs.items() if not isinstance(v, Tensor)]:
        raise ConfigError(
            f"the loop's inputs are tensors; {wrong[0]!r} is {type(inputs[wrong[0]]).__name__}: bind it, as functools.partial does"
        )
    _bind(loop, ("the model",), inputs, "the loop is called as loop(model, **inputs)", f"inputs {', '.join(inputs) or 'none'}")


def _bind(called: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], what: str, given: str) -> None:
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # written in C: whoever calls it will see
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(called, "__name__", type(called).__name__)
        raise ConfigError(f"{what}: {error}; got {given or 'nothing'}, and it is {name}{_short(signature)}") from error


def _short(signature: inspect.Signature) -> str:
    """Without annotations, which are long."""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {'×'.join(map(str, value.shape)) or 'no axes'}"
    return f"{value!r}" if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
