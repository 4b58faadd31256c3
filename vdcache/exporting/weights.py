"""The weights of a package: every tensor once, by content, in one file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

__all__ = ["Weights"]

PAGE = 4096  # so that a runtime can map a large tensor; small ones are packed


class Weights:
    """Writes tensors one after another, each content once.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._places: dict[bytes, tuple[int, int]] = {}

    def add(self, array: np.ndarray) -> tuple[int, int]:
        """Where in the file the numbers of an array lie: offset and length in bytes."""
        data = np.ascontiguousarray(array)
        raw = data.astype(data.dtype.newbyteorder("<"), copy=False).tobytes()
        key = hashlib.sha256(raw).digest()
        if key not in self._places:
            align = PAGE if len(raw) >= 16 * PAGE else 64
            self._file.write(b"\0" * (-self._file.tell() % align))
            self._places[key] = (self._file.tell(), len(raw))
            self._file.write(raw)
        return self._places[key]

    def flush(self) -> None:
        """What was added can be read from the file."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()
