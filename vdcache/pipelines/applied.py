"""The module of the release before: `vdcache.pipelines.pipeline_cache` holds it now. It goes with the next release."""

import warnings

from vdcache.pipelines.pipeline_cache import applied_to

__all__ = ["applied_to"]

warnings.warn(
    "vdcache.pipelines.applied is vdcache.pipelines.pipeline_cache now; the old module goes with the next release",
    DeprecationWarning,
    stacklevel=2,
)
