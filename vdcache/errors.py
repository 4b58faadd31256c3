"""What can go wrong, and how vdcache says so."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from types import FrameType

__all__ = [
    "CacheStateError",
    "CaptureError",
    "ConfigError",
    "ContractError",
    "RankError",
    "VdcacheError",
    "VdcacheWarning",
    "inform_once",
    "warn",
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


class RankError(VdcacheError, RuntimeError):
    """Processes that run one model together can go on no longer: one of them is gone, or came to no decision in time."""


class VdcacheWarning(UserWarning):
    """vdcache stepped aside, or did something that the user should know about."""


def warn_once(said: set[str], message: str, *, key: str | None = None) -> None:
    """Warn, unless `said` (owned by the session or program that speaks) holds this message's key already."""
    if (key or message) not in said:
        said.add(key or message)
        warn(message)


def inform_once(said: set[str], message: str, *, key: str | None = None) -> None:
    """As `warn_once`, where nothing is wrong: a record of the logger "vdcache", level INFO.

    A person sees it on standard error without setting anything; handlers and levels of logging decide where there are some.
    """
    if (key or message) not in said:
        said.add(key or message)
        _inform(message)


def warn(message: str) -> None:
    """A `VdcacheWarning` at the user's line."""
    warnings.warn(message, VdcacheWarning, stacklevel=_users_level())


def _inform(message: str) -> None:
    log = logging.getLogger("vdcache")
    silenced = log.manager.disable >= logging.INFO or (log.level and not log.isEnabledFor(logging.INFO))
    if silenced:
        return
    if not log.hasHandlers():  # nobody has set up logging
        sys.stderr.write(f"{message}\n")
        return
    # past the level of the root logger, which hides information from those who set none for vdcache
    log.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, message, (), None))


def _users_level() -> int:
    """The `stacklevel`, for the caller of this, of the user's own line.

    Under a compiled model that is the line that calls it, not one of its forward, which runs within. Where no frame is the user's (the
    command line, another library's thread), the library's line that calls, else a level beyond the stack: Python then names no file.
    """
    frames = [*_outward(sys._getframe(1))]
    # torch 2.11 to 2.13: what torch.compile puts around a model
    doors = [i for i, f in enumerate(frames) if f.f_code.co_name == "compile_wrapper" and "_dynamo" in f.f_code.co_filename]
    beyond = [(i, f) for i, f in enumerate(frames, start=1) if not _is_machinery(f) and i > (doors[0] if doors else 0)]
    own = (i for i, f in beyond if not _is_installed(f))
    return next(own, next((i for i, _ in beyond), len(frames) + 1))


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_machinery(frame: FrameType) -> bool:
    """Of vdcache, torch or Python's own library, or of generated code."""
    name, file = frame.f_globals.get("__name__"), frame.f_code.co_filename
    generated = (file.startswith("<") and name is None) or file.startswith("<frozen")
    of_python = file.startswith(_PYTHON) and not _is_installed(frame)
    return str(name).partition(".")[0] in ("vdcache", "torch") or file.startswith(_OWN) or generated or of_python


def _is_installed(frame: FrameType) -> bool:
    """Of an installed package, or its command."""
    file = frame.f_code.co_filename
    return "site-packages" in file or "dist-packages" in file or file.startswith(_COMMANDS)


_OWN = os.path.dirname(__file__) + os.sep
_PYTHON = sysconfig.get_path("stdlib") + os.sep
_COMMANDS = sysconfig.get_path("scripts") + os.sep
