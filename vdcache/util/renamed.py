"""Names of the release before: still read in imports and files, with a `DeprecationWarning`. They go with the next release."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = [
    "CLASSES",
    "DIALECT",
    "FIELDS",
    "MODULES",
    "OPTIONS",
    "POLICIES",
    "PUBLIC",
    "current",
    "find_moved_modules",
    "moved",
    "moved_name",
    "with_current_fields",
]

# Classes whose names stand in saved recipes.
CLASSES = {
    "Auto": "Goal",
    "Bursts": "BroadcastWindow",
    "Gated": "TGateSteps",
    "Grid": "EveryNth",
    "Intervals": "LinearIntervals",
    "Listed": "StepList",
    "Planned": "PlanTable",
    "Scheduled": "SchedulePolicy",
    "Together": "CombinedPolicy",
    "Windowed": "TimestepWindow",
}
# Names of `vdcache` itself, and where they are now.
_HOMES = {
    "methods": "adacache auto dbcache delta_dit easycache fastercache fbcache fora l2c magcache pab profilingdit seacache smoothcache "
    "taylorseer teacache tgate",
    "masks": "AttentionMask Dense Diagonal Frames MultiDiagonal Radial Skip Stripes Window",
    "policies": "Always Bounds Codebook CombinedPolicy EveryNth LinearIntervals MoReg PlanTable SchedulePolicy StepList Threshold TimestepWindow",
    "predictors": "Blended ByGroup Extrapolated LastValue Scaled Taylor",
    "calibration": "Calibration MaskPlan Otsu Profile Sam2 StepErrors StepTable Thresholds TileReport magnitudes step_errors step_table tiles",
    "errors": "CacheStateError CaptureError ConfigError ContractError",
    "passes": "Refusal TileAttention",
    "patterns": "Match",
    "ir": "Fact",
    "runtime": "History",
    "explanation": "Report",
    "quality": "Comparison",
}
PUBLIC = {
    "anatomy": "vdcache.analyze",
    "NoMatch": "vdcache.patterns.Refusal",
    **{name: f"vdcache.{home}.{name}" for home, names in _HOMES.items() for name in names.split()},
    **{old: f"vdcache.policies.{new}" for old, new in CLASSES.items() if old not in ("Auto", "Bursts", "Gated")},
}
# Names of `vdcache.runtime`.
POLICIES = {
    name: f"vdcache.policies.{name}"
    for name in (
        *_HOMES["policies"].split(),
        *("AdaCache", "BroadcastWindow", "EasyCache", "EveryN", "MagCache", "MetricSpec", "MetricValue", "Plan", "Policy"),
        *("RECOMPUTE", "TGateSteps"),
    )
}
# Modules, and the one that holds what they held.
MODULES = {
    "vdcache.backends.kernels": "vdcache.attention",
    "vdcache.cli_output": "vdcache.cli.output",
    "vdcache.cli_packages": "vdcache.cli.packages",
    "vdcache.info": "vdcache.cli.info",
    "vdcache.opt": "vdcache.cli.opt",
    "vdcache.ir.checks": "vdcache.util.checks",
    "vdcache.ir.errors": "vdcache.errors",
    "vdcache.ir.files": "vdcache.util.files",
    "vdcache.ir.masks": "vdcache.attention.masks",
    "vdcache.ir.plugins": "vdcache.util.plugins",
    "vdcache.ir.tiles": "vdcache.attention.tiles",
    "vdcache.pipelines.applied": "vdcache.pipelines.pipeline_cache",
    "vdcache.profiling": "vdcache.calibration",
    "vdcache.recipe": "vdcache.methods.recipe",
    "vdcache.renamed": "vdcache.util.renamed",
    "vdcache.report": "vdcache.runtime.summary",
    "vdcache.scheduling": "vdcache.calibration",
    **{f"vdcache.backends.kernels.{m}": f"vdcache.attention.{m}" for m in ("autotune", "block_sparse", "flex", "triton")},
    **{
        f"vdcache.runtime.{old}": f"vdcache.policies.{new}".removesuffix(".")
        for old, new in {
            "bound": "simulate",
            "metrics": "metrics",
            "plan": "plan",
            "policies": "",
            "probing": "thresholds",
            "schedules": "scheduled",
            "steps": "steps",
            "windows": "windows",
        }.items()
    },
    **{
        f"vdcache.profiling.{old}": f"vdcache.calibration.{new}"
        for old, new in {
            "allocate": "allocate",
            "calibrate": "thresholds",
            "errors": "branch_errors",
            "figure": "profile_figure",
            "graph_replay": "graph_replay",
            "loop": "loop",
            "profiler": "profiler",
            "result": "profile",
            "schedule": "schedule_search",
            "search": "mask_search",
            "segment": "segment",
            "tiles": "tile_report",
            "uncached_run": "uncached_run",
        }.items()
    },
    **{
        f"vdcache.scheduling.{old}": f"vdcache.calibration.{new}"
        for old, new in {
            "auto_calibrator": "auto_calibrator",
            "calibration": "calibration",
            "choose": "choose",
            "figure": "calibration_figure",
            "metric_log": "metric_log",
            "paths": "paths",
            "schedule": "schedule",
            "table": "tables",
            "trajectory_replay": "trajectory_replay",
        }.items()
    },
}
# Fields of dataclasses that are saved as JSON.
FIELDS = {
    "Bounds": {"in_a_row": "max_consecutive", "in_all": "max_total"},
    "MagCache": {"in_a_row": "max_consecutive"},
    "Profile": {"of": "block_kind"},
    "ProfiledAttention": {"of": "block_kind"},
}
# Fields that nothing reads any more.
GONE = {"Goal": ("group",)}
# Options of passes in the text of pipelines.
OPTIONS = {
    "emit": {"at": "location"},
    "mark-branches": {"apart": "per_block", "of": "block_kind", "out_of": "expected_blocks"},
    "observe": {"within": "block_range"},
    "probe": {"at": "location", "since": "reference_step"},
}
# Functions in the text of graphs.
DIALECT = {"guard": "cache_guard"}


def current(names: Mapping[str, str], name: str, what: str) -> str:
    """The name that `name` has now, with a `DeprecationWarning` where it is an old one.

    Args:
        names: old name → new name.
        what: is called so, for the warning: "the class", "the option of pass 'probe'".
    """
    if name not in names:
        return name
    new = names[name]
    warnings.warn(
        f"{what} {name!r} is called {new!r} now; the old name goes with the next release", DeprecationWarning, stacklevel=3
    )
    return new


def with_current_fields(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a saved dataclass under the names that they have now.

    Args:
        kind: the present name of the class.
    """
    names = FIELDS.get(kind, {})
    return {current(names, n, f"the field of {kind}"): v for n, v in values.items() if n not in GONE.get(kind, ())}


def moved_name(name: str, module: str = "vdcache") -> Any:
    """What was `module.name`, with a `DeprecationWarning` that says where it is now."""
    return moved(f"{module}.{name}", (PUBLIC if module == "vdcache" else POLICIES)[name], 5)


def moved(old: str, new: str, level: int = 4) -> Any:
    """What `new` names, with a `DeprecationWarning` for the name `old`."""
    _warn(old, new, level)
    home, _, name = new.rpartition(".")
    return getattr(importlib.import_module(home), name)


def find_moved_modules() -> None:
    """From now on modules are found under the names that they had, too."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MovedModules())  # before a folder that moved is searched for files under its old name


def _warn(old: str, new: str, level: int = 4) -> None:
    warnings.warn(f"{old} is {new} now; the old name goes with the next release", DeprecationWarning, stacklevel=level)


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module of an old name as the one that it is now: the same object, no second copy."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        _warn(fullname, MODULES[fullname])
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MODULES[spec.name])
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # which the machinery has just written over
