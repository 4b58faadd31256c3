"""What drives the schedule: clock, policies, store, session, history. Knows nothing of graphs but their inputs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdcache.runtime.clock import Clock, Reading, Tick
    from vdcache.runtime.history import History, Record
    from vdcache.runtime.measures import Layout, Measured
    from vdcache.runtime.plan import RECOMPUTE, Plan
    from vdcache.runtime.policies import AdaCache, Always, Codebook, EveryN, MoReg, Policy
    from vdcache.runtime.probing import Bounds, EasyCache, Threshold
    from vdcache.runtime.schedules import MagCache, Planned, Scheduled, Together
    from vdcache.runtime.session import Session
    from vdcache.runtime.steps import Gated, Grid, Intervals, Listed
    from vdcache.runtime.store import Store
    from vdcache.runtime.windows import Bursts, Windowed

_HOMES = {
    "AdaCache": "vdcache.runtime.policies",
    "Always": "vdcache.runtime.policies",
    "Bounds": "vdcache.runtime.probing",
    "Bursts": "vdcache.runtime.windows",
    "Clock": "vdcache.runtime.clock",
    "Codebook": "vdcache.runtime.policies",
    "EasyCache": "vdcache.runtime.probing",
    "EveryN": "vdcache.runtime.policies",
    "Gated": "vdcache.runtime.steps",
    "Grid": "vdcache.runtime.steps",
    "History": "vdcache.runtime.history",
    "Intervals": "vdcache.runtime.steps",
    "Layout": "vdcache.runtime.measures",
    "Listed": "vdcache.runtime.steps",
    "MagCache": "vdcache.runtime.schedules",
    "Measured": "vdcache.runtime.measures",
    "MoReg": "vdcache.runtime.policies",
    "Plan": "vdcache.runtime.plan",
    "Planned": "vdcache.runtime.schedules",
    "Policy": "vdcache.runtime.policies",
    "RECOMPUTE": "vdcache.runtime.plan",
    "Reading": "vdcache.runtime.clock",
    "Record": "vdcache.runtime.history",
    "Scheduled": "vdcache.runtime.schedules",
    "Session": "vdcache.runtime.session",
    "Store": "vdcache.runtime.store",
    "Threshold": "vdcache.runtime.probing",
    "Tick": "vdcache.runtime.clock",
    "Together": "vdcache.runtime.schedules",
    "Windowed": "vdcache.runtime.windows",
}

__all__ = [
    "RECOMPUTE",
    "AdaCache",
    "Always",
    "Bounds",
    "Bursts",
    "Clock",
    "Codebook",
    "EasyCache",
    "EveryN",
    "Gated",
    "Grid",
    "History",
    "Intervals",
    "Layout",
    "Listed",
    "MagCache",
    "Measured",
    "MoReg",
    "Plan",
    "Planned",
    "Policy",
    "Reading",
    "Record",
    "Scheduled",
    "Session",
    "Store",
    "Threshold",
    "Tick",
    "Together",
    "Windowed",
]


def __getattr__(name: str) -> Any:
    """Names load when they are first used: plans and history are needed where there is no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
