"""Names of the release before: still read in imports and files, with a `DeprecationWarning`. They go with the next release."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

__all__ = ["CLASSES", "DIALECT", "FIELDS", "OPTIONS", "PUBLIC", "current", "with_current_fields"]

# Classes whose names stand in saved recipes.
CLASSES = {
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
# Names of `vdcache` itself.
PUBLIC = {
    "anatomy": "analyze",
    **{old: new for old, new in CLASSES.items() if old not in ("Bursts", "Gated")},
}
# Fields of dataclasses that are saved as JSON.
FIELDS = {
    "Bounds": {"in_a_row": "max_consecutive", "in_all": "max_total"},
    "MagCache": {"in_a_row": "max_consecutive"},
    "Profile": {"of": "block_kind"},
    "ProfiledAttention": {"of": "block_kind"},
}
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
    return {current(FIELDS.get(kind, {}), name, f"the field of {kind}"): value for name, value in values.items()}
