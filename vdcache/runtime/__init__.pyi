from .history import History, Record, record
from .session import Session
from .step_tracker import Reading, StepTracker, Tick
from .store import Store

__all__ = [
    "History",
    "Reading",
    "Record",
    "Session",
    "StepTracker",
    "Store",
    "Tick",
    "record",
]
