"""What vdcache tells that is no warning."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def informed() -> Iterator[list[str]]:
    """The messages of the logger "vdcache", as they come."""
    told: list[str] = []
    log, handler = logging.getLogger("vdcache"), logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        yield told
    finally:
        log.removeHandler(handler)
