"""What drives the schedule: clock, policies, store, session, history. Knows nothing of graphs but their inputs."""

from vdcache.runtime.clock import Clock, Reading, Tick
from vdcache.runtime.history import History, Record
from vdcache.runtime.measures import Layout, Measured
from vdcache.runtime.plan import RECOMPUTE, Plan
from vdcache.runtime.policies import AdaCache, Always, Codebook, EveryN, MoReg, Policy
from vdcache.runtime.schedules import Intervals, Listed, Scheduled, Together
from vdcache.runtime.session import Session
from vdcache.runtime.store import Store

__all__ = [
    "RECOMPUTE",
    "AdaCache",
    "Always",
    "Clock",
    "Codebook",
    "EveryN",
    "History",
    "Intervals",
    "Layout",
    "Listed",
    "Measured",
    "MoReg",
    "Plan",
    "Policy",
    "Reading",
    "Record",
    "Scheduled",
    "Session",
    "Store",
    "Tick",
    "Together",
]
