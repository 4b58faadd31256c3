"""What can go wrong, and how vdcache says so."""

from __future__ import annotations

import sys
import warnings

__all__ = [
    "CacheStateError",
    "CaptureError",
    "ConfigError",
    "ContractError",
    "VdcacheError",
    "VdcacheWarning",
    "warn_once",
]


class VdcacheError(Exception):
    """Anything that vdcache raises."""


class ConfigError(VdcacheError, ValueError):
    """The user asked for something that does not exist or cannot be: a recipe, an option, a codebook."""


class CaptureError(VdcacheError, RuntimeError):
    """A model or function cannot be brought into vdcache's graph form, or has nothing to cache (`strict=True`)."""


class ContractError(VdcacheError, RuntimeError):
    """A pass broke what it promised: a fact that it ensures does not hold on its result."""


class CacheStateError(VdcacheError, RuntimeError):
    """The session was used in an order that has no meaning, for example `step()` before `begin()`."""


class VdcacheWarning(UserWarning):
    """vdcache stepped aside, or did something that the user should know about."""


def warn_once(said: set[str], message: str, *, key: str | None = None) -> None:
    """Warn, unless `said` (owned by the session or program that speaks) holds this message's key already."""
    if (key or message) not in said:
        said.add(key or message)
        warnings.warn(message, VdcacheWarning, stacklevel=_users_level())


def _users_level() -> int:
    """The `stacklevel` of the line outside vdcache and torch that a warning is about; the caller's caller where there is none."""
    torch = sys.modules.get("torch")
    own = (__file__.rpartition("/")[0] + "/", *getattr(torch, "__path__", ()), "<")
    frame, level = sys._getframe(1), 1
    while frame is not None:
        if not frame.f_code.co_filename.startswith(own):
            return level
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    return 3
