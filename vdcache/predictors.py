"""What is substituted for a value that is not computed."""

from vdcache.passes.predictors import Blended, ByGroup, Extrapolated, LastValue, Predictor, Scaled, Taylor

__all__ = ["Blended", "ByGroup", "Extrapolated", "LastValue", "Predictor", "Scaled", "Taylor"]
