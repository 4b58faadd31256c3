"""Whose call is this? Sessions by the handle in force, else by the parameters that a graph receives and its settings.

A compiled graph is not a model: Dynamo runs one graph for every instance of a class, so no state lives in the graph. A model that is
compiled with two recipes has two sessions. Where several threads run a model at once, each has a session of its own.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vdcache.runtime.session import Session

__all__ = ["active", "find", "using"]

_handle: ContextVar[Session | None] = ContextVar("vdcache_session", default=None)
_by_parameter = WeakIdKeyDictionary()  # a graph's parameter -> the sessions of its model, each with its settings
_thread = threading.local()


class Owner(Protocol):
    """Who makes sessions: equal owners share one for a model."""

    def new_session(self) -> Session: ...


@contextlib.contextmanager
def using(session: Session) -> Iterator[None]:
    """Calls inside belong to `session`."""
    token = _handle.set(session)
    try:
        yield
    finally:
        _handle.reset(token)


def find(inputs: Sequence[Any], static: Sequence[int], *, drives: bool, resumes: bool, owner: Owner) -> Session | None:
    """The session that a call belongs to.

    Args:
        static: positions of the parameters among `inputs`.
        drives: whether the graph can tell the step, so that a session may begin with it.
        resumes: whether the graph goes on where another one of the same forward left off: it then joins that one's session.
        owner: the settings that the graph was compiled with; they make a session for a model that has none.

    Returns None for a graph that belongs to no session: it is computed in full.
    """
    if (session := _handle.get()) is not None:
        return session
    own = next((inputs[i] for i in static if isinstance(inputs[i], Tensor)), None)
    known: list[tuple[Owner, Session]] = _by_parameter.get(own, []) if own is not None else []
    session = next((s for o, s in known if o is owner or o == owner), None)
    if session is None and drives:
        session = owner.new_session()
    elif session is None and resumes:
        of, last = getattr(_thread, "last", (None, None))
        session = last() if last is not None and (of is owner or of == owner) else None
    if session is not None:
        if own is not None and not any(s is session for _, s in known):
            _by_parameter[own] = [*known, (owner, session)]
        if drives:
            _thread.last = owner, weakref.ref(session)
    return session


def active(parameter: Tensor) -> Session | None:
    """The session of the model that owns `parameter`, the last one if it has several; None if it has none."""
    known = _by_parameter.get(parameter)
    return known[-1][1] if known else None
