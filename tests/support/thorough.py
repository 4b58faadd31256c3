"""What `make test` samples, `make thorough` runs in full: VDCACHE_THOROUGH=1."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest

THOROUGH = os.environ.get("VDCACHE_THOROUGH", "") not in ("", "0")


def examples(full: int, sampled: int) -> int:
    """How many examples hypothesis draws."""
    return full if THOROUGH else sampled


def some(cases: Iterable[Any], kept: Callable[[Any], bool]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`: those that are not kept are left to `make thorough`."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if kept(case) else pytest.mark.thorough)
        for case in cases
    ]


def in_turn(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """All pairs, of which `make test` runs one for each of `first`, with each of `second` in turn."""
    first, second = list(first), list(second)
    place = {a: i for i, a in enumerate(first)}
    return some(((a, b) for a in first for b in second), lambda pair: second[place[pair[0]] % len(second)] == pair[1])
