"""Inputs that wrap other tensors (quantised weights are such) or stand in for them: a functional graph takes plain tensors only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.traceback import preserve_node_meta
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vdcache.ir.stand_ins import brought, stored

__all__ = ["TensorSubclasses"]


class TensorSubclasses:
    """Which inputs of a graph wrap others or stand in for others, and how. Holds none of them.

    Args:
        examples: the inputs, as Dynamo hands them to a backend.
    """

    def __init__(self, examples: Sequence[Any]) -> None:
        self._apart = [stored(x) is not None or (isinstance(x, Tensor) and is_traceable_wrapper_subclass(x)) for x in examples]
        self._plain = not any(self._apart)

    def __bool__(self) -> bool:
        return not self._plain

    def flat(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs with those that wrap others replaced by what they wrap, and stand-ins by the stored weights."""
        if self._plain:
            return list(inputs)
        return [leaf for x, apart in zip(inputs, self._apart, strict=True) for leaf in (_leaves(x) if apart else (x,))]

    def spread(self, values: Sequence[Any], examples: Sequence[Any]) -> list[Any]:
        """One value an input, repeated for each of its plain tensors."""
        return [v for x, v in zip(examples, values, strict=False) for _ in _leaves(x)]

    def around(self, graph: nn.Module, examples: Sequence[Any]) -> nn.Module:
        """The graph as a module of plain tensors."""

        class Around(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.graph = graph

            def forward(self, *flat: Any) -> Any:
                rest = iter(flat)
                inputs = [_rebuilt(x, rest) for x in examples]
                if not isinstance(graph, fx.GraphModule):
                    return graph(*inputs)
                with preserve_node_meta():  # each new node has the module and the line of the one that it was made of
                    return fx.Interpreter(graph).run(*inputs)

        return graph if self._plain else Around()


def _leaves(value: Any) -> list[Any]:
    if (weight := stored(value)) is not None:
        return [weight]
    if not isinstance(value, Tensor) or not is_traceable_wrapper_subclass(value):
        return [value]
    return [leaf for inner in _inner(value).values() if isinstance(inner, Tensor) for leaf in _leaves(inner)]


def _rebuilt(like: Any, rest: Iterator[Any]) -> Any:
    if stored(like) is not None:
        return brought(next(rest), like)
    if not isinstance(like, Tensor) or not is_traceable_wrapper_subclass(like):
        return next(rest)
    inner = {name: _rebuilt(x, rest) if isinstance(x, Tensor) else x for name, x in _inner(like).items()}
    return type(like).__tensor_unflatten__(inner, like.__tensor_flatten__()[1], like.size(), like.stride())


def _inner(value: Any) -> dict[str, Any]:
    """What a tensor wraps, by name: tensors, and what describes them, as the mesh of a DTensor does."""
    return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}
