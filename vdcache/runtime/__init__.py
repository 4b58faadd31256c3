"""What drives the schedule: step tracker, cache, session, history. Knows nothing of graphs but their inputs."""

from typing import Any

import lazy_loader

from vdcache.util import renamed

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    return renamed.moved_name(name, __name__) if name in renamed.POLICIES else _load(name)
