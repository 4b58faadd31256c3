"""Composite operations stay whole while a graph is captured.

Torch answers for one composite operation at a time, and there are more than 500 of them: that took two thirds of the time in which a
small graph is captured. What it writes is the same each time, so it is kept and exchanged for what stood there.

This is the only file that touches torch's tables of kernels. Seen to work on torch 2.11, 2.12 and 2.13.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_impls import op_implementations_dict
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

__all__ = ["whole_composites"]

Kernels = dict[Any, Callable[..., Any]]


@dataclass(frozen=True)
class _Tables:
    """What torch makes of the tables when every composite operation is to stay whole.

    Args:
        plain: the kernels of each operation before.
        whole: and after.
        rules: how each is followed with fake tensors where no rule was before.
    """

    plain: dict[Any, Kernels]
    whole: dict[Any, Kernels]
    rules: Kernels

    @classmethod
    def written(cls) -> _Tables:
        """Let torch write them, and put everything back."""
        from torch.export.exported_program import _override_composite_implicit_decomp

        ops = _composites()
        before, plain = dict(op_implementations_dict), {op: dict(op.py_kernels) for op in ops}
        with _override_composite_implicit_decomp({op: functools.partial(_stay_whole, op) for op in ops}):
            whole = {op: dict(op.py_kernels) for op in ops}
            rules = {op: op_implementations_dict[op] for op in ops if op not in before}
        # torch.export's run_decompositions drops this one for good, and then no graph with a changing float could be captured.
        rules[torch.ops.aten.item.default] = op_implementations_dict[torch.ops.aten._local_scalar_dense.default]
        op_implementations_dict.update(before)  # torch drops those that it found as well
        return cls(plain, whole, rules)

    def hold(self) -> bool:
        """Whether nobody has registered a kernel since."""
        return all(op.py_kernels == kernels for op, kernels in self.plain.items())


def _stay_whole(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Stay one operation, unless a tensor subclass asks what it is made of, as a DTensor does of one for which it has no rule."""
    if any(isinstance(x, Tensor) and is_traceable_wrapper_subclass(x) for x in tree_leaves((args, kwargs))):
        return op._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
    return NotImplemented


@functools.cache
def _composites() -> tuple[Any, ...]:
    """Operations that dispatch would decompose."""
    from torch._export.utils import _collect_all_valid_cia_ops

    return tuple(_collect_all_valid_cia_ops())


class _Exchange:
    """The tables are the process's, so of captures in several threads the first puts the others in and the last takes them out."""

    def __init__(self) -> None:
        self.lock, self.entered = threading.Lock(), 0
        self.tables: _Tables | None = None
        self.saved: dict[Any, Kernels] = {}
        self.added: list[Any] = []

    def enter(self) -> None:
        with self.lock:
            if not self.entered:
                self._put()
            self.entered += 1

    def leave(self) -> None:
        with self.lock:
            self.entered -= 1
            if not self.entered:
                self._take()

    def _put(self) -> None:
        if self.tables is None or not self.tables.hold():
            self.tables = _Tables.written()
        self.saved = {op: op.py_kernels for op in self.tables.whole}
        for op, kernels in self.tables.whole.items():
            op.py_kernels = dict(kernels)
            op._dispatch_cache.clear()
        self.added = [op for op in self.tables.rules if op not in op_implementations_dict]
        op_implementations_dict.update({op: self.tables.rules[op] for op in self.added})

    def _take(self) -> None:
        for op, kernels in self.saved.items():
            op.py_kernels = kernels
            op._dispatch_cache.clear()
        for op in self.added:
            op_implementations_dict.pop(op, None)


_exchange = _Exchange()


@contextlib.contextmanager
def whole_composites() -> Iterator[None]:
    """What is traced in this block keeps composite operations (`linear`, `layer_norm` …) as they are."""
    _exchange.enter()
    try:
        yield
    finally:
        _exchange.leave()
