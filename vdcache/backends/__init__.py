"""From a guarded graph to something that runs."""

from vdcache.backends.dynamo import Backend, backend
from vdcache.backends.settings import Settings

__all__ = ["Backend", "Settings", "backend"]
