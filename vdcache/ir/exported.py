"""A whole model as one graph, by torch.export: the third door into vdcache's graph form, and the only one that keeps the weights."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdcache.errors import CaptureError, VdcacheError
from vdcache.ir.capture import Captured, Signature, first_line

__all__ = ["ExportedModel", "exported", "whole"]


@dataclass(frozen=True)
class ExportedModel:
    """A model as one graph.

    Args:
        captured: parameters, buffers and constants come first among the inputs, then what the user gives, flattened.
        state: parameters, buffers and constants by the position of their input.
        given: positions of the user's inputs, in the order of the flattened (args, kwargs).
        takes: the structure of (args, kwargs), a pytree's.
        returns: how the flat results become what the model returns (a pytree).
    """

    captured: Captured
    state: dict[int, Tensor]
    given: tuple[int, ...]
    takes: Any
    returns: Any


def exported(model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Captured:
    """Bring a whole model into functional ATen through torch.export: one graph, or an error that says where it breaks.

    Parameters and buffers come first among the inputs, then the tensors among `args` and `kwargs`.
    """
    return whole(model, args, kwargs).captured


def whole(model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, name: str = "") -> ExportedModel:
    """`exported`, with the values of what the model owns.

    Args:
        name: what messages call the model; its class's name without.

    Raises:
        CaptureError: torch.export does not take the model as one graph.
    """
    from torch.export.graph_signature import InputKind, OutputKind

    try:
        with torch.no_grad(), _without_its_graph(), warnings.catch_warnings():
            # of torch 2.13 about itself: it copies a class of its own that it calls deprecated
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            program = torch.export.export(model, args, kwargs or {}, strict=False).run_decompositions({})
    except VdcacheError:  # of what the model calls, and says enough
        raise
    except Exception as error:
        raise CaptureError(
            f"{name or type(model).__name__} cannot be exported as one graph: {type(error).__name__}: {first_line(error)}"
        ) from error
    graph, sig = program.graph_module, program.graph_signature
    index = {spec.arg.name: i for i, spec in enumerate(sig.input_specs)}
    by_target = {spec.target: i for i, spec in enumerate(sig.input_specs) if spec.target is not None}
    static = frozenset(i for i, spec in enumerate(sig.input_specs) if spec.kind is not InputKind.USER_INPUT)
    mutations = []
    for i, spec in enumerate(sig.output_specs):
        if spec.kind is OutputKind.BUFFER_MUTATION:
            mutations.append((i, by_target[spec.target]))
        elif spec.kind is OutputKind.USER_INPUT_MUTATION:
            mutations.append((i, index[spec.target]))  # type: ignore[index]
    names = tuple(spec.target or spec.arg.name for spec in sig.input_specs)
    signature = Signature(tuple(mutations), len(sig.output_specs) - len(mutations), static, names)
    graph.meta["vdcache"] = signature
    owned = {**program.constants, **program.state_dict}
    state = {i: owned[names[i]] for i in sorted(static) if isinstance(owned.get(names[i]), Tensor)}
    given = tuple(i for i in range(len(names)) if i not in static)
    return ExportedModel(Captured(graph, signature), state, given, program.call_spec.in_spec, program.call_spec.out_spec)


_EXPORTING = threading.RLock()  # standard error is one for all threads


@contextlib.contextmanager
def _without_its_graph() -> Iterator[None]:
    """Where torch.export fails it prints the graph so far, hundreds of lines, before the error. What else is printed meanwhile
    is printed at the end.
    """
    printed, graph = io.StringIO(), ""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    with _EXPORTING:
        log.addFilter(_is_of_use)
        try:
            with contextlib.redirect_stderr(printed):
                yield
        except Exception as error:
            graph = f"{getattr(error, 'partial_fx_graph', '')}\n"
            raise
        finally:
            log.removeFilter(_is_of_use)
            sys.stderr.write(printed.getvalue().replace(graph, "") if graph.strip() else printed.getvalue())


def _is_of_use(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Unable to find user code")
