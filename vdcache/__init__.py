"""vdcache: diffusion transformers several times faster without retraining, for any model, by compiling.

    model = torch.compile(model, backend="vdcache", options={"recipe": "adacache-fast", "num_steps": 30})

or, with a handle on what happens,

    model = vdcache.compile(model, recipe="adacache-fast", num_steps=30)
    model.vdcache.history, model.vdcache.summary()
"""

from __future__ import annotations

from typing import Any

import lazy_loader

from vdcache.util import renamed

__version__ = "0.1.0"

# Public names stand in __init__.pyi and load when they are first used: `import vdcache` costs nothing and imports no torch.
_load, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", *_names]

renamed.find_moved_modules()


def __getattr__(name: str) -> Any:
    if name in _names:
        value = _load(name)
    elif name in renamed.PUBLIC:
        value = renamed.moved_name(name)
    else:
        raise AttributeError(f"module 'vdcache' has no attribute {name!r}")
    globals()[name] = value
    return value
