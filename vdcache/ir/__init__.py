"""One graph form: how models enter it, what its nodes mean, how it prints, what may be known of it."""

from vdcache.ir.capture import Captured, Signature, capture, signature, trace
from vdcache.ir.dialect import cache_guard, cache_guards, group_of, observations, observe
from vdcache.ir.dump import dump, type_of
from vdcache.ir.errors import (
    CacheStateError,
    CaptureError,
    ConfigError,
    ContractError,
    VdcacheError,
    VdcacheWarning,
    warn_once,
)
from vdcache.ir.exported import exported
from vdcache.ir.facts import Fact, check
from vdcache.ir.parse import parse

__all__ = [
    "CacheStateError",
    "CaptureError",
    "Captured",
    "ConfigError",
    "ContractError",
    "Fact",
    "Signature",
    "VdcacheError",
    "VdcacheWarning",
    "cache_guard",
    "cache_guards",
    "capture",
    "check",
    "dump",
    "exported",
    "group_of",
    "observations",
    "observe",
    "parse",
    "signature",
    "trace",
    "type_of",
    "warn_once",
]
