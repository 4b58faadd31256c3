"""A diffusers pipeline as a whole: its denoisers compiled, its loop followed, everything put back on request."""

from vdcache.pipelines.pipeline_cache import apply, remove
from vdcache.pipelines.summary import summary

__all__ = ["apply", "remove", "summary"]
