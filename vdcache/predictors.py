"""What is substituted for a value that is not computed: weighted sums of the last values by a rule, and functions of tensors."""

from vdcache.passes.predictors import Blended, ByGroup, LastValue, Predictor
from vdcache.policies.weights import (
    AdamsBashforth,
    ByStep,
    Chebyshev,
    Extrapolated,
    Fixed,
    FoCa,
    Hermite,
    MeanVelocity,
    Newton,
    Position,
    Scaled,
    Table,
    Taylor,
    WeightRule,
)

__all__ = [
    "AdamsBashforth",
    "Blended",
    "ByGroup",
    "ByStep",
    "Chebyshev",
    "Extrapolated",
    "Fixed",
    "FoCa",
    "Hermite",
    "LastValue",
    "MeanVelocity",
    "Newton",
    "Position",
    "Predictor",
    "Scaled",
    "Table",
    "Taylor",
    "WeightRule",
]
