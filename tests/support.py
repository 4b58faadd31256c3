"""The names by which older tests know parts of `vdcache.testing`; new ones import them from there."""

from vdcache.testing import (  # noqa: F401
    PoisonInterpreter,
    Reference,
    TinyDiT,
    captured,
    guarded,
    latent,
    record_slots,
    run_variant,
    time_of,
    values_of,
)
from vdcache.testing import assert_skipped as assert_skippable  # noqa: F401
