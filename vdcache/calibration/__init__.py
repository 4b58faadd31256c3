"""What measures a model: tables of steps, the search of schedules, thresholds, foreground and background, masks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
