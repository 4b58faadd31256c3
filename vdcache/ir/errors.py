"""The errors of `vdcache.errors`, which stand outside so that they load without torch."""

from vdcache.errors import (
    CacheStateError,
    CaptureError,
    ConfigError,
    ContractError,
    VdcacheError,
    VdcacheWarning,
    inform_once,
    warn,
    warn_once,
)

__all__ = [
    "CacheStateError",
    "CaptureError",
    "ConfigError",
    "ContractError",
    "VdcacheError",
    "VdcacheWarning",
    "inform_once",
    "warn",
    "warn_once",
]
