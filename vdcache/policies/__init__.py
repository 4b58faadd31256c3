"""When to recompute: plans, lists of steps, thresholds, AdaCache. Pure functions of what was measured; no torch."""

from vdcache.policies.adacache import AdaCache, Codebook, MoReg
from vdcache.policies.base import Always, Deciding, EveryN, Policy
from vdcache.policies.goal import Goal
from vdcache.policies.metrics import MetricSpec, MetricValue
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.policies.scheduled import CombinedPolicy, MagCache, PlanTable, SchedulePolicy
from vdcache.policies.steps import EveryNth, GrowingIntervals, LeadingSteps, LinearIntervals, StepList, TGateSteps
from vdcache.policies.thresholds import Bounds, EasyCache, Threshold
from vdcache.policies.windows import BroadcastWindow, TimestepWindow

__all__ = [
    "RECOMPUTE",
    "AdaCache",
    "Always",
    "Bounds",
    "BroadcastWindow",
    "Codebook",
    "CombinedPolicy",
    "Deciding",
    "EasyCache",
    "EveryN",
    "EveryNth",
    "Goal",
    "GrowingIntervals",
    "LeadingSteps",
    "LinearIntervals",
    "MagCache",
    "MetricSpec",
    "MetricValue",
    "MoReg",
    "Plan",
    "PlanTable",
    "Policy",
    "SchedulePolicy",
    "StepList",
    "TGateSteps",
    "Threshold",
    "TimestepWindow",
]
