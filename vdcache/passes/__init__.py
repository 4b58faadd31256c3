"""Rewrites of a graph, one a file, and the order in which they run."""

from vdcache.passes.base import Pass, PassResult, Pipeline, Refusal, Step
from vdcache.passes.canonicalise import Canonicalise
from vdcache.passes.dead_code import DeadCode
from vdcache.passes.emit_attention import EmitAttention
from vdcache.passes.mark_branches import MarkBranches
from vdcache.passes.merge_slots import MergeSlots
from vdcache.passes.observe import Observe
from vdcache.passes.specialise import Specialise, VariantIO, variant_io

PASSES: dict[str, type[Pass]] = {
    p.name: p for p in (Canonicalise, MarkBranches, MergeSlots, Observe, EmitAttention, Specialise, DeadCode)
}

__all__ = [
    "PASSES",
    "Canonicalise",
    "DeadCode",
    "EmitAttention",
    "MarkBranches",
    "MergeSlots",
    "Observe",
    "Pass",
    "PassResult",
    "Pipeline",
    "Refusal",
    "Specialise",
    "Step",
    "VariantIO",
    "variant_io",
]
