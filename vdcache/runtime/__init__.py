"""What drives the schedule: clock, policies, store, session, history. Knows nothing of graphs but their inputs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdcache.runtime.clock import StepTracker, Reading, Tick
    from vdcache.runtime.history import History, Record
    from vdcache.runtime.measures import MetricSpec, MetricValue
    from vdcache.runtime.plan import RECOMPUTE, Plan
    from vdcache.runtime.policies import AdaCache, Always, Codebook, EveryN, MoReg, Policy
    from vdcache.runtime.probing import Bounds, EasyCache, Threshold
    from vdcache.runtime.schedules import MagCache, PlanTable, SchedulePolicy, CombinedPolicy
    from vdcache.runtime.session import Session
    from vdcache.runtime.steps import TGateSteps, EveryNth, LinearIntervals, StepList
    from vdcache.runtime.store import Store
    from vdcache.runtime.windows import BroadcastWindow, TimestepWindow

_HOMES = {
    "AdaCache": "vdcache.runtime.policies",
    "Always": "vdcache.runtime.policies",
    "Bounds": "vdcache.runtime.probing",
    "BroadcastWindow": "vdcache.runtime.windows",
    "StepTracker": "vdcache.runtime.clock",
    "Codebook": "vdcache.runtime.policies",
    "EasyCache": "vdcache.runtime.probing",
    "EveryN": "vdcache.runtime.policies",
    "TGateSteps": "vdcache.runtime.steps",
    "EveryNth": "vdcache.runtime.steps",
    "History": "vdcache.runtime.history",
    "LinearIntervals": "vdcache.runtime.steps",
    "MetricSpec": "vdcache.runtime.measures",
    "StepList": "vdcache.runtime.steps",
    "MagCache": "vdcache.runtime.schedules",
    "MetricValue": "vdcache.runtime.measures",
    "MoReg": "vdcache.runtime.policies",
    "Plan": "vdcache.runtime.plan",
    "PlanTable": "vdcache.runtime.schedules",
    "Policy": "vdcache.runtime.policies",
    "RECOMPUTE": "vdcache.runtime.plan",
    "Reading": "vdcache.runtime.clock",
    "Record": "vdcache.runtime.history",
    "SchedulePolicy": "vdcache.runtime.schedules",
    "Session": "vdcache.runtime.session",
    "Store": "vdcache.runtime.store",
    "Threshold": "vdcache.runtime.probing",
    "Tick": "vdcache.runtime.clock",
    "CombinedPolicy": "vdcache.runtime.schedules",
    "TimestepWindow": "vdcache.runtime.windows",
}

__all__ = [
    "RECOMPUTE",
    "AdaCache",
    "Always",
    "Bounds",
    "BroadcastWindow",
    "StepTracker",
    "Codebook",
    "EasyCache",
    "EveryN",
    "TGateSteps",
    "EveryNth",
    "History",
    "LinearIntervals",
    "MetricSpec",
    "StepList",
    "MagCache",
    "MetricValue",
    "MoReg",
    "Plan",
    "PlanTable",
    "Policy",
    "Reading",
    "Record",
    "SchedulePolicy",
    "Session",
    "Store",
    "Threshold",
    "Tick",
    "CombinedPolicy",
    "TimestepWindow",
]


def __getattr__(name: str) -> Any:
    """Names load when they are first used: plans and history are needed where there is no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
