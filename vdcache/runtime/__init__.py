"""What drives the schedule: step tracker, policies, store, session, history. Knows nothing of graphs but their inputs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdcache.runtime.history import History, Record
    from vdcache.runtime.metrics import MetricSpec, MetricValue
    from vdcache.runtime.plan import RECOMPUTE, Plan
    from vdcache.runtime.policies import AdaCache, Always, Codebook, EveryN, MoReg, Policy
    from vdcache.runtime.probing import Bounds, EasyCache, Threshold
    from vdcache.runtime.schedules import CombinedPolicy, MagCache, PlanTable, SchedulePolicy
    from vdcache.runtime.session import Session
    from vdcache.runtime.step_tracker import Reading, StepTracker, Tick
    from vdcache.runtime.steps import EveryNth, LinearIntervals, StepList, TGateSteps
    from vdcache.runtime.store import Store
    from vdcache.runtime.windows import BroadcastWindow, TimestepWindow

_HOMES = {
    "AdaCache": "vdcache.runtime.policies",
    "Always": "vdcache.runtime.policies",
    "Bounds": "vdcache.runtime.probing",
    "BroadcastWindow": "vdcache.runtime.windows",
    "StepTracker": "vdcache.runtime.step_tracker",
    "Codebook": "vdcache.runtime.policies",
    "EasyCache": "vdcache.runtime.probing",
    "EveryN": "vdcache.runtime.policies",
    "TGateSteps": "vdcache.runtime.steps",
    "EveryNth": "vdcache.runtime.steps",
    "History": "vdcache.runtime.history",
    "LinearIntervals": "vdcache.runtime.steps",
    "MetricSpec": "vdcache.runtime.metrics",
    "StepList": "vdcache.runtime.steps",
    "MagCache": "vdcache.runtime.schedules",
    "MetricValue": "vdcache.runtime.metrics",
    "MoReg": "vdcache.runtime.policies",
    "Plan": "vdcache.runtime.plan",
    "PlanTable": "vdcache.runtime.schedules",
    "Policy": "vdcache.runtime.policies",
    "RECOMPUTE": "vdcache.runtime.plan",
    "Reading": "vdcache.runtime.step_tracker",
    "Record": "vdcache.runtime.history",
    "SchedulePolicy": "vdcache.runtime.schedules",
    "Session": "vdcache.runtime.session",
    "Store": "vdcache.runtime.store",
    "Threshold": "vdcache.runtime.probing",
    "Tick": "vdcache.runtime.step_tracker",
    "CombinedPolicy": "vdcache.runtime.schedules",
    "TimestepWindow": "vdcache.runtime.windows",
}

__all__ = [
    "RECOMPUTE",
    "AdaCache",
    "Always",
    "Bounds",
    "BroadcastWindow",
    "Codebook",
    "CombinedPolicy",
    "EasyCache",
    "EveryN",
    "EveryNth",
    "History",
    "LinearIntervals",
    "MagCache",
    "MetricSpec",
    "MetricValue",
    "MoReg",
    "Plan",
    "PlanTable",
    "Policy",
    "Reading",
    "Record",
    "SchedulePolicy",
    "Session",
    "StepList",
    "StepTracker",
    "Store",
    "TGateSteps",
    "Threshold",
    "Tick",
    "TimestepWindow",
]


def __getattr__(name: str) -> Any:
    """Names load when they are first used: plans and history are needed where there is no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
