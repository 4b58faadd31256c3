"""The shipped weights."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file

from vdcache.demo.model import DemoDiT
from vdcache.errors import ConfigError

__all__ = ["load_model", "weights_path"]


def weights_path() -> Path:
    """Where the trained weights lie: float16, made by `python -m vdcache.demo.train`."""
    return Path(str(resources.files("vdcache.demo") / "weights.safetensors"))


def load_model(path: Path | None = None, device: str | torch.device = "cpu") -> DemoDiT:
    """The trained model in float32, ready to sample."""
    path = path or weights_path()
    if not path.exists():
        raise ConfigError(f"there are no weights at {path}; train them with `python -m vdcache.demo.train --out {path}`")
    model = DemoDiT()
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.eval().requires_grad_(False).to(device)
