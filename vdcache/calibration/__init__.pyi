from .branch_errors import StepErrors, magnitudes, step_errors
from .calibration import Calibration
from .mask_search import MaskPlan, search_masks
from .profile import Profile, ProfiledAttention
from .published_searches import cem_steps, dpcache_steps, lemica_steps, meancache_steps
from .schedule import Schedule
from .schedule_search import search_schedule, step_table
from .segment import Otsu, Sam2, Segmenter, principal_picture
from .tables import StepTable
from .thresholds import Thresholds, calibrate
from .tile_report import TileReport, tiles

__all__ = [
    "Calibration",
    "MaskPlan",
    "Otsu",
    "Profile",
    "ProfiledAttention",
    "Sam2",
    "Schedule",
    "Segmenter",
    "StepErrors",
    "StepTable",
    "Thresholds",
    "TileReport",
    "calibrate",
    "cem_steps",
    "dpcache_steps",
    "lemica_steps",
    "magnitudes",
    "meancache_steps",
    "principal_picture",
    "search_masks",
    "search_schedule",
    "step_errors",
    "step_table",
    "tiles",
]
