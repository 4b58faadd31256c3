"""How far is one video from another: what caching cost in quality."""

from vdcache.quality.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
