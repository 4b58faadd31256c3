"""Whose call is this? Sessions by the handle in force, else by the parameters that a graph receives.

A compiled graph is not a model: Dynamo runs one graph for every instance of a class, so no state lives in the graph.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vdcache.runtime.session import Session

__all__ = ["active", "find", "using"]

_handle: ContextVar[Session | None] = ContextVar("vdcache_session", default=None)
_by_parameter = WeakIdKeyDictionary()  # a graph's parameter -> the session of its model
_thread = threading.local()


@contextlib.contextmanager
def using(session: Session) -> Iterator[None]:
    """Calls inside belong to `session`."""
    token = _handle.set(session)
    try:
        yield
    finally:
        _handle.reset(token)


def find(
    inputs: Sequence[Any], static: Sequence[int], *, drives: bool, resumes: bool, make: Callable[[], Session]
) -> Session | None:
    """The session that a call belongs to.

    Args:
        static: positions of the parameters among `inputs`.
        drives: whether the graph can tell the step, so that a session may begin with it.
        resumes: whether the graph goes on where another one of the same forward left off: it then joins that one's session.
        make: makes a session for a model that has none.

    Returns None for a graph that belongs to no session: it is computed in full.
    """
    if (session := _handle.get()) is not None:
        return session
    own = next((inputs[i] for i in static if isinstance(inputs[i], Tensor)), None)
    session = _by_parameter.get(own) if own is not None else None
    if session is None and drives:
        session = make()
    elif session is None and resumes:
        last = getattr(_thread, "last", None)
        session = last() if last is not None else None
    if session is not None:
        if own is not None and own not in _by_parameter:
            _by_parameter[own] = session
        if drives:
            _thread.last = weakref.ref(session)
    return session


def active(parameter: Tensor) -> Session | None:
    """The session of the model that owns `parameter`, if it has one."""
    return _by_parameter.get(parameter)
