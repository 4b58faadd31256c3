"""Arguments that people give, brought into one form or refused with what was expected and what was got."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from vdcache.errors import ConfigError

__all__ = [
    "check_model",
    "is_pipeline",
    "number",
    "numbers",
    "step_count",
    "timestep",
    "whole",
    "whole_numbers",
]


def check_model(value: Any, caller: str) -> None:
    """Refuse what is not one model.

    Args:
        caller: the public function that was given it, for messages.

    Raises:
        ConfigError: a class, a whole pipeline, or what cannot be called.
    """
    if isinstance(value, type):  # Dynamo would patch the class itself, for good
        raise ConfigError(f"pass an instance, {value.__name__}(…), not the class")
    if is_pipeline(value):
        raise ConfigError(
            f"{caller} takes one model, and this {type(value).__name__} is a whole pipeline: vdcache.apply(pipe, recipe) makes a pipeline skip "
            f"work. For {caller} give its denoiser, as pipe.transformer is one"
        )
    if not callable(value):
        raise ConfigError(f"{caller} takes a module or a function; got {type(value).__name__}")


def is_pipeline(value: Any) -> bool:
    """Whether this looks like a diffusers pipeline: it holds components and makes a progress bar."""
    return isinstance(getattr(value, "components", None), Mapping) and callable(getattr(value, "progress_bar", None))


def whole_numbers(values: Any, subject: str) -> tuple[int, ...]:
    """Whole numbers as a tuple: from a list, a range, an array or a tensor.

    Raises:
        ConfigError: anything else: text, booleans, fractions.
    """
    message = f"{subject} is a list of whole numbers; got {values!r}"
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ConfigError(message)
    found = []
    for value in values:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise ConfigError(message)
        try:
            found.append(operator.index(value))
        except TypeError as error:
            raise ConfigError(message) from error
    return tuple(found)


def number(value: Any, subject: str) -> float:
    """A real number.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{subject}; got {value!r}")
    return float(value)


def whole(value: Any, subject: str, least: int = 0) -> int:
    """One whole number.

    Raises:
        ConfigError: anything else, or a number below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{subject} is a whole number of at least {least}; got {value!r}")
    return value


def step_count(value: Any) -> int:
    """How many denoising steps a generation has.

    Raises:
        ConfigError: no whole number of at least 1.
    """
    try:
        found = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = 0
    if found < 1:
        raise ConfigError(f"num_steps is the number of denoising steps, at least 1; got {value!r}")
    return found


def timestep(value: Any) -> float:
    """Where a denoising step stands on the model's scale: a finite number, or an array or tensor of one.

    Raises:
        ConfigError: anything else.
    """
    try:
        return numbers([value], "a timestep")[0]
    except (ConfigError, RuntimeError, ValueError) as error:  # torch and numpy refuse items of several
        raise ConfigError(
            f"session.step(timestep) takes where the step stands, one finite number or none; got {value!r}"
        ) from error


def numbers(values: Any, subject: str) -> tuple[float, ...]:
    """Finite real numbers as a tuple: from a list, an array or a tensor.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ConfigError(f"{subject} is a list of numbers; got {values!r}")
    found = []
    for value in values:
        item = value.item() if hasattr(value, "item") else value
        if isinstance(item, bool) or not isinstance(item, Real) or not math.isfinite(item):
            raise ConfigError(f"{subject} is a list of numbers; it holds {value!r}")
        found.append(float(item))
    return tuple(found)
