"""What drives the schedule: clock, policies, store, session, history. Knows nothing of graphs but their inputs."""

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
