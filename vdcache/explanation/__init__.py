"""What vdcache understands of a model, before anything runs: `vdcache.explain`."""

from vdcache.explanation.reader import explain
from vdcache.explanation.report import GraphFacts, Report, Slot, VariantCost

__all__ = ["GraphFacts", "Report", "Slot", "VariantCost", "explain"]
