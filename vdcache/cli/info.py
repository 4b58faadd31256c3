"""What this machine offers vdcache: versions, devices, compilers."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata

__all__ = ["facts"]

TORCH_TESTED = ("2.11.", "2.12.", "2.13.")
TORCH_RANGE = ">=2.11,<2.14"


def facts() -> list[tuple[str, str]]:
    """(what, text) rows: versions, devices, what is usable and why something is not."""
    import torch

    import vdcache

    version = torch.__version__.split("+")[0]
    tested = "tested" if version.startswith(TORCH_TESTED) else f"in the range {TORCH_RANGE}, not tested by us"
    rows = [
        ("vdcache", vdcache.__version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} ({tested})"),
        ("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"),
        ("cuda", torch.cuda.get_device_name() if torch.cuda.is_available() else _no_cuda()),
        ("backend", _backend()),
        ("inductor", _inductor()),
    ]
    for package, what in (
        ("triton", "GPU kernels"),
        ("diffusers", "pipelines"),
        ("torchmetrics", "vdcache demo"),
        ("matplotlib", "timeline pictures"),
        ("imageio", "vdcache demo"),
        ("onnxscript", "vdcache export"),
        ("onnxruntime", "vdcache run"),
    ):
        rows.append((package, _version(package, what)))
    return rows


def _no_cuda() -> str:
    import torch

    return "not usable: this torch is built without CUDA" if torch.version.cuda is None else "not usable: torch sees no GPU"


def _backend() -> str:
    found = metadata.entry_points(group="torch_dynamo_backends")
    if any(e.name == "vdcache" for e in found):
        return "registered: torch.compile(model, backend='vdcache')"
    return "not registered: vdcache is on the path but not installed; pip install it"


def _inductor() -> str:
    compiler = next((c for c in ("g++", "clang++", "cl") if shutil.which(c)), None)
    if compiler is None:
        return "not usable on the CPU: no C++ compiler found; install g++, or use inner='eager'"
    return f"usable: {shutil.which(compiler)}"


def _version(package: str, what: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"not installed (only needed for {what})"
