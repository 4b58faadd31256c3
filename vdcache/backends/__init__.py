"""From a guarded graph to something that runs."""

from vdcache.backends.dynamo import Backend
from vdcache.backends.settings import Settings

__all__ = ["Backend", "Settings"]
