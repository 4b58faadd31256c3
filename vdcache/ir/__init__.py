"""One graph form: how models enter it, what its nodes mean, how it prints, what may be known of it."""

from vdcache.ir.capture import Captured, Signature, capture, signature, trace
from vdcache.ir.dialect import cache_guard, cache_guards, observations, observe
from vdcache.ir.dump import dump, type_of
from vdcache.ir.exported import exported
from vdcache.ir.facts import Fact, check
from vdcache.ir.parse import parse

__all__ = [
    "Captured",
    "Fact",
    "Signature",
    "cache_guard",
    "cache_guards",
    "capture",
    "check",
    "dump",
    "exported",
    "observations",
    "observe",
    "parse",
    "signature",
    "trace",
    "type_of",
]
