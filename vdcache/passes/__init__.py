"""Rewrites of a graph, one a file, and the order in which they run."""

from vdcache.passes.base import Pass, PassRecord, PassResult, Refusal, put_cache_guard
from vdcache.passes.canonicalise import Canonicalise
from vdcache.passes.catalogue import PASSES
from vdcache.passes.dead_code import DeadCode
from vdcache.passes.emit import Emit
from vdcache.passes.emit_attention import EmitAttention
from vdcache.passes.hoist_invariants import HoistInvariants
from vdcache.passes.mark_branches import MarkBranches
from vdcache.passes.mark_lanes import MarkLanes
from vdcache.passes.mark_output import MarkOutput
from vdcache.passes.merge_slots import MergeSlots
from vdcache.passes.observe import Observe
from vdcache.passes.pipeline import Pipeline
from vdcache.passes.probe import Probe
from vdcache.passes.rewrite import Rewrite
from vdcache.passes.specialise import Specialise, VariantIO, VariantOutputs, variant_io
from vdcache.passes.split_at_probe import HeadIO, SplitAtProbe, head_io
from vdcache.passes.tile_attention import TileAttention

__all__ = [
    "PASSES",
    "Canonicalise",
    "DeadCode",
    "Emit",
    "EmitAttention",
    "HeadIO",
    "HoistInvariants",
    "MarkBranches",
    "MarkLanes",
    "MarkOutput",
    "MergeSlots",
    "Observe",
    "Pass",
    "PassRecord",
    "PassResult",
    "Pipeline",
    "Probe",
    "Refusal",
    "Rewrite",
    "Specialise",
    "SplitAtProbe",
    "TileAttention",
    "VariantIO",
    "VariantOutputs",
    "head_io",
    "put_cache_guard",
    "variant_io",
]
