"""torch.compile with Dynamo's recompile limit to itself: what else one forward was compiled with does not count.

Dynamo counts the graphs of a forward's code, and gives up at eight; another recipe on the same model is another graph. torch 2.13 can count
those of one torch.compile apart (`isolate_recompiles`). Before, Dynamo is shown the graphs of that torch.compile alone when it counts. The
private names that this takes are in this file only. Seen to work on torch 2.11.0, 2.12.1 and 2.13.0.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import nn

__all__ = ["compile_isolated"]


def compile_isolated(fn: Callable[..., Any], *, limit: int | None = None, **options: Any) -> Any:
    """`torch.compile(fn, **options)`.

    Args:
        limit: how many graphs Dynamo may make of one forward before it gives up; its own limit without.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        more = {"isolate_recompiles": True} | ({} if limit is None else {"recompile_limit": limit})
        return torch.compile(fn, **options, **more)  # type: ignore[call-overload]
    compiled = torch.compile(fn, **options)
    run = compiled.forward if isinstance(compiled, nn.Module) else compiled
    callback = inspect.getclosurevars(run).nonlocals.get("callback") if inspect.isfunction(run) else None
    if callable(convert := getattr(callback, "_torchdynamo_orig_backend", None)):
        callback._torchdynamo_orig_backend = _Isolated(convert, limit)  # type: ignore[union-attr]
    return compiled


class _Isolated:
    """Dynamo's conversion of a frame, which sees only the graphs that it made itself. Dynamo calls it under its own lock."""

    def __init__(self, convert: Any, limit: int | None) -> None:
        self._convert = convert
        self._patch = {} if limit is None else {"recompile_limit": limit}
        self._torchdynamo_orig_backend = convert._torchdynamo_orig_backend
        # Codes that it gave up, how many graphs there were, and what was answered.
        self._given_up: weakref.WeakKeyDictionary[CodeType, tuple[int, Any]] = weakref.WeakKeyDictionary()

    @property
    def _clone_with_backend(self) -> Any:
        return self._convert._clone_with_backend

    def __call__(self, frame: Any, cache_entry: Any, hooks: Any, frame_state: Any, skip: int = 0) -> Any:
        from torch._dynamo.types import FrameAction

        own = _own(cache_entry, _innermost(self))
        before, answer = self._given_up.get(frame.f_code, (-1, None))
        if before == len(own):
            return answer
        with torch._dynamo.config.patch(self._patch) if self._patch else contextlib.nullcontext():
            answer = self._convert(frame, _linked(own), hooks, frame_state, skip=skip + 1)
        if answer.frame_exec_strategy.cur_action == FrameAction.RUN_ONLY:
            answer.apply_to_code = False  # else the code is given up for everybody
            self._given_up[frame.f_code] = len(own), answer
        return answer


class _Entry:
    """An entry of Dynamo's cache whose successor is another."""

    def __init__(self, entry: Any, successor: _Entry | None) -> None:
        self._entry, self.next = entry, successor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)


def _own(entry: Any, backend: Any) -> list[Any]:
    """The entries that a backend made."""
    own = []
    while entry is not None:
        if entry.backend is backend:
            own.append(entry)
        entry = entry.next
    return own


def _linked(entries: list[Any]) -> _Entry | None:
    """A list as Dynamo reads it: the first entry, and from each the next."""
    first = None
    for entry in reversed(entries):
        first = _Entry(entry, first)
    return first


def _innermost(backend: Any) -> Any:
    while (inner := getattr(backend, "_torchdynamo_orig_backend", None)) is not None:
        backend = inner
    return backend
