"""vdcache: diffusion transformers several times faster without retraining, for any model, by compiling.

    model = torch.compile(model, backend="vdcache", options={"recipe": "adacache-fast", "num_steps": 30})

or, with a handle on what happens,

    model = vdcache.compile(model, recipe="adacache-fast", num_steps=30)
    model.vdcache.history, model.vdcache.summary()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "compile": "vdcache.api",
    "export": "vdcache.exporting.exporter",
    "verify": "vdcache.exporting.verifying",
    "apply": "vdcache.pipelines",
    "remove": "vdcache.pipelines",
    "summary": "vdcache.pipelines",
    "compare": "vdcache.quality",
    "Comparison": "vdcache.quality",
    "explain": "vdcache.explanation.reader",
    "Report": "vdcache.explanation.report",
    "profile": "vdcache.profiling.profiler",
    "Profile": "vdcache.profiling.result",
    "StepErrors": "vdcache.profiling.errors",
    "magnitudes": "vdcache.profiling.errors",
    "step_errors": "vdcache.profiling.errors",
    "calibrate": "vdcache.profiling.calibrate",
    "Thresholds": "vdcache.profiling.calibrate",
    "Calibration": "vdcache.scheduling.calibration",
    "auto": "vdcache.methods",
    "search_schedule": "vdcache.profiling.schedule",
    "step_table": "vdcache.profiling.schedule",
    "Schedule": "vdcache.scheduling.schedule",
    "StepTable": "vdcache.scheduling.table",
    "search_masks": "vdcache.profiling.search",
    "MaskPlan": "vdcache.profiling.search",
    "tiles": "vdcache.profiling.tiles",
    "TileReport": "vdcache.profiling.tiles",
    "tile_attention": "vdcache.ir.tiles",
    "AttentionMask": "vdcache.ir.masks",
    "Dense": "vdcache.ir.masks",
    "Diagonal": "vdcache.ir.masks",
    "Frames": "vdcache.ir.masks",
    "MultiDiagonal": "vdcache.ir.masks",
    "Radial": "vdcache.ir.masks",
    "Skip": "vdcache.ir.masks",
    "Stripes": "vdcache.ir.masks",
    "Window": "vdcache.ir.masks",
    "TileAttention": "vdcache.passes.tile_attention",
    "Otsu": "vdcache.profiling.segment",
    "Sam2": "vdcache.profiling.segment",
    "trace": "vdcache.ir.capture",
    "dump": "vdcache.ir.dump",
    "parse": "vdcache.ir.parse",
    "Fact": "vdcache.ir.facts",
    "debug": "vdcache.passes.watching",
    "analyze": "vdcache.patterns",
    "NoMatch": "vdcache.patterns.facts",
    "Match": "vdcache.patterns.match",
    "Pattern": "vdcache.patterns.match",
    "Recipe": "vdcache.recipe",
    "recipes": "vdcache.methods",
    "adacache": "vdcache.methods",
    "dbcache": "vdcache.methods",
    "delta_dit": "vdcache.methods",
    "easycache": "vdcache.methods",
    "fastercache": "vdcache.methods",
    "fbcache": "vdcache.methods",
    "fora": "vdcache.methods",
    "l2c": "vdcache.methods",
    "magcache": "vdcache.methods",
    "pab": "vdcache.methods",
    "profilingdit": "vdcache.methods",
    "seacache": "vdcache.methods",
    "smoothcache": "vdcache.methods",
    "taylorseer": "vdcache.methods",
    "teacache": "vdcache.methods",
    "tgate": "vdcache.methods",
    "Session": "vdcache.runtime.session",
    "History": "vdcache.runtime.history",
    "record": "vdcache.runtime.history",
    "Plan": "vdcache.runtime.plan",
    "Policy": "vdcache.runtime.policies",
    "Always": "vdcache.runtime.policies",
    "Codebook": "vdcache.runtime.policies",
    "MoReg": "vdcache.runtime.policies",
    "LinearIntervals": "vdcache.runtime.steps",
    "StepList": "vdcache.runtime.steps",
    "SchedulePolicy": "vdcache.runtime.schedules",
    "CombinedPolicy": "vdcache.runtime.schedules",
    "EveryNth": "vdcache.runtime.steps",
    "PlanTable": "vdcache.runtime.schedules",
    "TimestepWindow": "vdcache.runtime.windows",
    "Threshold": "vdcache.runtime.probing",
    "Bounds": "vdcache.runtime.probing",
    "Predictor": "vdcache.passes.predictors",
    "LastValue": "vdcache.passes.predictors",
    "Taylor": "vdcache.passes.predictors",
    "Scaled": "vdcache.passes.predictors",
    "Extrapolated": "vdcache.passes.predictors",
    "Blended": "vdcache.passes.predictors",
    "ByGroup": "vdcache.passes.predictors",
    "Pass": "vdcache.passes.base",
    "PassResult": "vdcache.passes.base",
    "Rewrite": "vdcache.passes.rewrite",
    "Refusal": "vdcache.passes.base",
    "Pipeline": "vdcache.passes.base",
    "VdcacheError": "vdcache.ir.errors",
    "ConfigError": "vdcache.ir.errors",
    "CaptureError": "vdcache.ir.errors",
    "ContractError": "vdcache.ir.errors",
    "CacheStateError": "vdcache.ir.errors",
    "VdcacheWarning": "vdcache.ir.errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from vdcache.api import compile
    from vdcache.explanation.reader import explain
    from vdcache.explanation.report import Report
    from vdcache.exporting.exporter import export
    from vdcache.exporting.verifying import verify
    from vdcache.ir.capture import trace
    from vdcache.ir.dump import dump
    from vdcache.ir.errors import CacheStateError, CaptureError, ConfigError, ContractError, VdcacheError, VdcacheWarning
    from vdcache.ir.facts import Fact
    from vdcache.ir.masks import AttentionMask, Dense, Diagonal, Frames, MultiDiagonal, Radial, Skip, Stripes, Window
    from vdcache.ir.parse import parse
    from vdcache.ir.tiles import tile_attention
    from vdcache.methods import (
        adacache,
        auto,
        dbcache,
        delta_dit,
        easycache,
        fastercache,
        fbcache,
        fora,
        l2c,
        magcache,
        pab,
        profilingdit,
        recipes,
        seacache,
        smoothcache,
        taylorseer,
        teacache,
        tgate,
    )
    from vdcache.passes.base import Pass, PassResult, Pipeline, Refusal
    from vdcache.passes.predictors import Blended, ByGroup, Extrapolated, LastValue, Predictor, Scaled, Taylor
    from vdcache.passes.rewrite import Rewrite
    from vdcache.passes.tile_attention import TileAttention
    from vdcache.passes.watching import debug
    from vdcache.patterns import analyze
    from vdcache.patterns.facts import NoMatch
    from vdcache.patterns.match import Match, Pattern
    from vdcache.pipelines.pipeline_cache import apply, remove
    from vdcache.pipelines.summary import summary
    from vdcache.profiling.calibrate import Thresholds, calibrate
    from vdcache.profiling.errors import StepErrors, magnitudes, step_errors
    from vdcache.profiling.profiler import profile
    from vdcache.profiling.result import Profile
    from vdcache.profiling.schedule import search_schedule, step_table
    from vdcache.profiling.search import MaskPlan, search_masks
    from vdcache.profiling.segment import Otsu, Sam2
    from vdcache.profiling.tiles import TileReport, tiles
    from vdcache.quality import Comparison, compare
    from vdcache.recipe import Recipe
    from vdcache.runtime.history import History, record
    from vdcache.runtime.plan import Plan
    from vdcache.runtime.policies import Always, Codebook, MoReg, Policy
    from vdcache.runtime.schedules import CombinedPolicy, SchedulePolicy
    from vdcache.runtime.session import Session
    from vdcache.runtime.steps import LinearIntervals, StepList
    from vdcache.scheduling.calibration import Calibration
    from vdcache.scheduling.schedule import Schedule
    from vdcache.scheduling.table import StepTable


def __getattr__(name: str) -> Any:
    """Public names load when they are first used, so that `import vdcache` costs nothing and imports no torch."""
    if name not in _PUBLIC:
        from vdcache.renamed import PUBLIC, current

        if name in PUBLIC:
            return getattr(importlib.import_module(__name__), current(PUBLIC, name, "vdcache's"))
        raise AttributeError(f"module 'vdcache' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
