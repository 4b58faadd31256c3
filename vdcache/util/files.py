"""What people keep as text: written beside its place and renamed, read from text or from a path."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vdcache.errors import ConfigError

__all__ = ["cache_folder", "saved", "text_of", "write_aside"]


def cache_folder() -> Path:
    """Where vdcache keeps what it measured on this machine: `VDCACHE_CACHE_DIR`, or the user's cache."""
    cache = os.environ.get("VDCACHE_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vdcache"
    return Path(cache)


def saved(text: str, path: str | Path | None) -> str:
    """The text, also written to `path` where one is given."""
    if path is not None:
        Path(path).write_text(text)
    return text


def text_of(source: str | Path) -> str:
    """JSON text as it is given, or of the file whose path is given.

    Raises:
        ConfigError: a path where there is no such file.
    """
    if isinstance(source, str) and source.lstrip()[:1] in ("{", "["):
        return source
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"there is no file {str(source)!r}, and it is no JSON text")
    return path.read_text()


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a whole file or none: beside its place, then renamed. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, delete=False) as aside:
        aside.write(content.encode() if isinstance(content, str) else content)
    try:
        os.replace(aside.name, path)
    except OSError:
        Path(aside.name).unlink(missing_ok=True)
        raise
