"""Profiles: which blocks of a model look at the foreground."""

from vdcache.profiling.profiler import profile
from vdcache.profiling.result import Profile, ProfiledAttention
from vdcache.profiling.segment import Otsu, Sam2, Segmenter, principal_picture

__all__ = ["Otsu", "Profile", "ProfiledAttention", "Sam2", "Segmenter", "principal_picture", "profile"]
