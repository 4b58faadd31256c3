"""What a pass owes whoever runs it, looked at from outside."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from vdcache.errors import ConfigError, ContractError
from vdcache.ir import dialect
from vdcache.ir.capture import first_line
from vdcache.ir.dump import dump
from vdcache.ir.edit import evaluate
from vdcache.ir.facts import Fact, check, holding
from vdcache.util.fields import check_fields

__all__ = ["Contract", "check_facts", "check_options", "failed", "is_third_party"]

# What a pass must leave true where it was true, whatever it ensures.
_LASTING = (Fact.FUNCTIONAL, Fact.TYPED, Fact.GUARDED, Fact.OBSERVED, Fact.PROBED)


def is_third_party(a_pass: Any) -> bool:
    """Whether a pass is of another package: those are always held to their promises, since a user's model runs on them."""
    return type(a_pass).__module__.partition(".")[0] != "vdcache"


def check_facts(a_pass: Any) -> None:
    """Raise ConfigError where a pass requires or ensures what is no fact."""
    for what in ("requires", "ensures"):
        facts = getattr(a_pass, what)
        if isinstance(facts, str) or not isinstance(facts, Iterable) or any(not isinstance(f, Fact) for f in facts):
            raise ConfigError(f"'{a_pass.name}' {what} {facts!r}; give a frozenset of facts, as frozenset({{Fact.GUARDED}})")


def check_options(a_pass: Any) -> None:
    """Raise ConfigError where an option is not what its field says."""
    check_fields(a_pass, a_pass.name, lambda name: name.replace("_", "-"))


def failed(a_pass: Any, error: Exception) -> ContractError:
    """What to raise where a pass raised: with the line of the pass, because who compiles a model sees the message alone."""
    own = inspect.getsourcefile(type(a_pass))
    frames = traceback.extract_tb(error.__traceback__)
    at = next((f for f in reversed(frames) if f.filename == own), frames[-1] if frames else None)
    place = f" at {Path(at.filename).name}:{at.lineno}" if at is not None else ""
    return ContractError(f"'{a_pass}' failed{place}: {type(error).__name__}: {error}")


class Contract:
    """What a pass promises by running on a graph, noted before it runs."""

    def __init__(self, a_pass: Any, graph: fx.GraphModule) -> None:
        self._pass, self._text = a_pass, dump(graph)
        self._calls = {n: (n.target, n.args, n.kwargs) for n in graph.graph.nodes}
        # a specialised graph writes into what the model writes into
        lost = {Fact.FUNCTIONAL} if Fact.PLAIN in a_pass.ensures else set()
        self._facts = holding(graph.graph) & set(_LASTING) - lost | a_pass.ensures

    def check(self, graph: fx.GraphModule, rewrites: int) -> None:
        """Raise ContractError where a promise is broken."""
        try:
            graph.graph.lint()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ContractError(f"after '{self._pass}' the graph is no graph: {reason}") from error
        for fact in self._facts:
            check(fact, graph.graph, after=f"'{self._pass}'")
        self._check_values(graph)
        if not rewrites and dump(graph) != self._text:
            raise ContractError(f"'{self._pass}' reports no rewrites, but the graph has changed")

    def _check_values(self, graph: fx.GraphModule) -> None:
        """What the pass added or gave other arguments can be computed, and gives what its `meta["val"]` says."""
        for node in graph.graph.nodes:
            known = isinstance(node.target, torch._ops.OpOverload) and isinstance(node.meta.get("val"), torch.Tensor)
            if not known or self._calls.get(node) == (node.target, node.args, node.kwargs) or dialect.is_dialect(node):
                continue
            try:
                value = evaluate(node.target, node.args, node.kwargs)
            except Exception as error:
                raise ContractError(
                    f"after '{self._pass}' the graph cannot be computed: '{node.name}' is {node.target} of "
                    f"{_shapes(node)}: {type(error).__name__}: {first_line(error)}"
                ) from error
            told = node.meta["val"]
            if isinstance(value, torch.Tensor) and _size(value) != _size(told):
                raise ContractError(
                    f"after '{self._pass}' '{node.name}' gives {_form(value)}, and its meta['val'] says {_form(told)}"
                )


def _size(value: torch.Tensor) -> tuple[object, ...]:
    """Dtype and shape, as far as the sizes are numbers."""
    return (value.dtype, *(n if isinstance(n, int) else None for n in value.shape))


def _form(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _shapes(node: fx.Node) -> str:
    values = (n.meta.get("val") for n in node.all_input_nodes)
    return " and ".join(_form(v) for v in values if isinstance(v, torch.Tensor)) or "no tensor"
