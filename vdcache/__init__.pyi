from . import calibration, errors, masks, methods, policies, predictors
from .api import compile
from .attention.tiles import tile_attention
from .calibration.mask_search import search_masks
from .calibration.profiler import profile
from .calibration.schedule import Schedule
from .calibration.schedule_search import search_schedule
from .calibration.thresholds import calibrate
from .errors import VdcacheError, VdcacheWarning
from .explanation.reader import explain
from .exporting.exporter import export
from .exporting.verifying import verify
from .ir.capture import trace
from .ir.dump import dump
from .ir.parse import parse
from .methods import recipes
from .methods.recipe import Recipe
from .passes.base import Pass, PassResult
from .passes.pipeline import Pipeline
from .passes.predictors import Predictor
from .passes.rewrite import Rewrite
from .passes.watching import debug
from .patterns import analyze
from .patterns.match import Pattern
from .pipelines.compiled_file import load_compiled, save_compiled
from .pipelines.pipeline_cache import apply, remove
from .pipelines.summary import summary
from .policies.base import Policy
from .policies.plan import Plan
from .quality.compare import compare
from .runtime.history import record
from .runtime.session import Session

__version__: str

__all__ = [
    "Pass",
    "PassResult",
    "Pattern",
    "Pipeline",
    "Plan",
    "Policy",
    "Predictor",
    "Recipe",
    "Rewrite",
    "Schedule",
    "Session",
    "VdcacheError",
    "VdcacheWarning",
    "__version__",
    "analyze",
    "apply",
    "calibrate",
    "calibration",
    "compare",
    "compile",
    "debug",
    "dump",
    "errors",
    "explain",
    "export",
    "load_compiled",
    "masks",
    "methods",
    "parse",
    "policies",
    "predictors",
    "profile",
    "recipes",
    "record",
    "remove",
    "save_compiled",
    "search_masks",
    "search_schedule",
    "summary",
    "tile_attention",
    "trace",
    "verify",
]
