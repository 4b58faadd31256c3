"""From `package.module:function` to a model and its arguments."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from vdcache.errors import ConfigError

__all__ = ["load", "load_with_loop"]

_WANTED = "it returns (model, args, kwargs): a module or function, a tuple or list, a dict"


def load(target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Import and call the function that `target` names; the working directory is searched first.

    Raises:
        ConfigError: the module or the function does not exist, fails, or returns something else.
    """
    return load_with_loop(target)[:3]


def load_with_loop(target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any, dict[str, Any] | None]:
    """`load` for a function that may return (model, args, kwargs, loop, inputs): the denoising loop and one set of its inputs as well; None
    for both where it does not.

    Raises:
        ConfigError: as `load`.
    """
    found = _called(target)
    if not isinstance(found, tuple) or len(found) not in (3, 5):
        raise ConfigError(f"{target} returns {_what(found)}; {_WANTED}")
    model, args, kwargs, loop, inputs = (*found, None, None)[:5]
    wrong = len(found) == 5 and not (callable(loop) and isinstance(inputs, dict))
    if not callable(model) or not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict) or wrong:
        raise ConfigError(f"{target} returns ({', '.join(_what(x) for x in found)}); {_WANTED}")
    return model, tuple(args), kwargs, loop, inputs


def _called(target: str) -> Any:
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{target!r} is not package.module:function, as in my_models.wan:small; {_WANTED}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(f"there is no module {error.name!r} in {here} or among the installed packages") from error
        raise ConfigError(f"{module_name} needs {error.name!r}, which is not installed") from error
    except Exception as error:
        raise ConfigError(f"importing {module_name} fails: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module_name)
        what = "is not a function" if function is not None else "does not exist"
        raise ConfigError(f"{name!r} {what} in {module_name}; there are {there or 'no functions'}")
    try:
        found = function()
    except Exception as error:
        raise ConfigError(
            f"{target} fails: {type(error).__name__}: {error}; it is called without arguments and {_WANTED[3:]}"
        ) from error
    return found


def _what(value: object) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"
