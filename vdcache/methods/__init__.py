"""Published methods as recipes: its scope, its policy, its predictor, its constants, its source."""

from vdcache.methods.adacache import ADACACHE_CODEBOOKS, adacache
from vdcache.methods.attention import fastercache, pab, tgate
from vdcache.methods.auto import auto
from vdcache.methods.configs import from_config
from vdcache.methods.constants import MAGCACHE_RATIOS, MEANCACHE, PAB, TEACACHE_COEFFICIENTS
from vdcache.methods.forecasts import cfg_gate, foca, hicache, meancache, spectrum, zeus
from vdcache.methods.profilingdit import PROFILINGDIT_LISTS, profilingdit
from vdcache.methods.registry import describe, for_goal, recipe, recipes
from vdcache.methods.schedules import delta_dit, fora, l2c, magcache, smoothcache, taylorseer
from vdcache.methods.thresholds import dbcache, easycache, fbcache, seacache, teacache

__all__ = [
    "ADACACHE_CODEBOOKS",
    "MAGCACHE_RATIOS",
    "MEANCACHE",
    "PAB",
    "PROFILINGDIT_LISTS",
    "TEACACHE_COEFFICIENTS",
    "adacache",
    "auto",
    "cfg_gate",
    "dbcache",
    "delta_dit",
    "describe",
    "easycache",
    "fastercache",
    "fbcache",
    "foca",
    "for_goal",
    "fora",
    "from_config",
    "hicache",
    "l2c",
    "magcache",
    "meancache",
    "pab",
    "profilingdit",
    "recipe",
    "recipes",
    "seacache",
    "smoothcache",
    "spectrum",
    "taylorseer",
    "teacache",
    "tgate",
    "zeus",
]
