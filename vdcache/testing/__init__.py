"""For tests of passes, policies and predictors, of vdcache and of other packages. Nothing else in vdcache imports it.

    from vdcache.testing import assert_pass, assert_refuses, assert_skipped

`pytest_plugins = "vdcache.testing.plugin"` gives the same as fixtures. `residual_nets` needs hypothesis, `small_models` is larger
where diffusers is installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "parse": "vdcache.ir.parse",
    "dump": "vdcache.ir.dump",
    "trace": "vdcache.ir.capture",
    "PoisonInterpreter": "vdcache.ir.oracle",
    "example_inputs": "vdcache.ir.oracle",
    "record_slots": "vdcache.ir.oracle",
    "values_of": "vdcache.ir.oracle",
    "assert_bit_identical": "vdcache.testing.asserts",
    "assert_close": "vdcache.testing.asserts",
    "assert_pass": "vdcache.testing.asserts",
    "assert_policy": "vdcache.testing.asserts",
    "assert_predictor": "vdcache.testing.asserts",
    "assert_reaches": "vdcache.testing.asserts",
    "assert_refuses": "vdcache.testing.asserts",
    "assert_round_trip": "vdcache.testing.asserts",
    "assert_skipped": "vdcache.testing.asserts",
    "captured": "vdcache.testing.graphs",
    "guarded": "vdcache.testing.graphs",
    "run_pass": "vdcache.testing.graphs",
    "run_variant": "vdcache.testing.graphs",
    "variant": "vdcache.testing.graphs",
    "RecordingBackend": "vdcache.testing.recording",
    "RecordedPass": "vdcache.testing.recording",
    "Case": "vdcache.testing.models",
    "build": "vdcache.testing.models",
    "small_models": "vdcache.testing.models",
    "Trial": "vdcache.testing.trying",
    "Trials": "vdcache.testing.trying",
    "try_recipe": "vdcache.testing.trying",
    "Reference": "vdcache.testing.tiny",
    "TinyDiT": "vdcache.testing.tiny",
    "latent": "vdcache.testing.tiny",
    "time_of": "vdcache.testing.tiny",
    "Net": "vdcache.testing.nets",
    "WIDTH": "vdcache.testing.nets",
    "residual_nets": "vdcache.testing.nets",
}
__all__ = list(_PUBLIC)

if TYPE_CHECKING:
    from vdcache.ir.capture import trace
    from vdcache.ir.dump import dump
    from vdcache.ir.oracle import PoisonInterpreter, example_inputs, record_slots, values_of
    from vdcache.ir.parse import parse
    from vdcache.testing.asserts import (
        assert_bit_identical,
        assert_close,
        assert_pass,
        assert_policy,
        assert_predictor,
        assert_reaches,
        assert_refuses,
        assert_round_trip,
        assert_skipped,
    )
    from vdcache.testing.graphs import captured, guarded, run_pass, run_variant, variant
    from vdcache.testing.models import Case, build, small_models
    from vdcache.testing.nets import WIDTH, Net, residual_nets
    from vdcache.testing.recording import RecordedPass, RecordingBackend
    from vdcache.testing.tiny import Reference, TinyDiT, latent, time_of
    from vdcache.testing.trying import Trial, Trials, try_recipe


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vdcache.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
