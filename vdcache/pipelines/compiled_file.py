"""What was compiled, in one file: another process, or another machine of the same kind, starts with it instead of compiling.

The content is torch's own (`torch.compiler.save_cache_artifacts`); this file adds where it fits.
"""

from __future__ import annotations

import io
import json
import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import vdcache
from vdcache.errors import CacheStateError, ConfigError
from vdcache.ir.capture import captures_folder
from vdcache.ir.capture_cache import CaptureCache
from vdcache.pipelines.pipeline_cache import applied_to
from vdcache.runtime.session import Session
from vdcache.util.files import write_aside

__all__ = ["load_compiled", "save_compiled"]

HEADER, ARTIFACTS, CAPTURES = "vdcache.json", "artifacts", "captures/"


def save_compiled(compiled: Any, path: str | Path) -> int:
    """Write what this process has compiled into a file, so that another one need not compile it.

    Variants that no step has needed yet are compiled first. Torch does not tell models apart: what else the process has compiled is in the
    file too. On a CPU the C++ kernels themselves stay in Inductor's cache folder, and are built again where that is empty.

    Args:
        compiled: what `vdcache.compile` returned, after its first call; or a pipeline after `vdcache.apply` and its first call.
        path: of the file; one that is there is replaced.

    Returns the file's size in bytes.

    Raises:
        ConfigError: nothing that vdcache compiled.
        CacheStateError: nothing was compiled yet, or torch's caches are off.
    """
    own = getattr(compiled, "vdcache", None)
    sessions = [own] if isinstance(own, Session) else [d.session for d in applied_to(compiled).denoisers.values()]
    for session in sessions:
        session.warm_up()
    ran = any(session.graphs for session in sessions)
    saved = torch.compiler.save_cache_artifacts() if ran else None
    if saved is None:
        why = "Inductor compiled nothing, or torch's compile caches are off" if ran else "it was not called yet: call it once"
        raise CacheStateError(f"save_compiled: there is nothing to save, because {why}")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(HEADER, json.dumps(_here(), indent=1))
        file.writestr(ARTIFACTS, saved[0])
        for key, captured in CaptureCache.used.items():
            file.writestr(CAPTURES + key, captured)
    write_aside(Path(path), content.getvalue())
    return len(content.getvalue())


def load_compiled(path: str | Path) -> None:
    """Take over what `save_compiled` wrote: models that are compiled from here on, as they were then, find their graphs ready.

    Call it before the first call of a compiled model. Load files that you trust, alone: they hold code.

    Raises:
        ConfigError: no such file, or one that does not fit this torch, device or vdcache.
    """
    try:
        with zipfile.ZipFile(path) as file:
            written = dict(json.loads(file.read(HEADER)))
            artifacts = file.read(ARTIFACTS)
            captures = {n.removeprefix(CAPTURES): file.read(n) for n in file.namelist() if n.startswith(CAPTURES)}
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"load_compiled: {path} is no file of save_compiled ({error})") from error
    if wrong := _differences(written, _here()):
        raise ConfigError(f"load_compiled: {path} does not fit, and nothing is loaded: {wrong}. Save it anew here.")
    if torch.compiler.load_cache_artifacts(artifacts) is None:
        raise ConfigError(
            f"load_compiled: what {path} holds cannot be read by this torch, and nothing is loaded. Save it anew."
        )
    if folder := captures_folder():
        for key, captured in captures.items():
            CaptureCache(folder).put_bytes(key, captured)


def _here() -> dict[str, str]:
    """What a compiled graph is made for."""
    gpu = torch.cuda.is_available()
    return {
        "vdcache": vdcache.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name()
        if gpu
        else f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
    }


def _differences(written: Mapping[str, str], here: Mapping[str, str]) -> str:
    return ", ".join(f"{what} {written.get(what)} there, {own} here" for what, own in here.items() if written.get(what) != own)
