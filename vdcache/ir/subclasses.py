"""Inputs that wrap other tensors (quantised weights are such), taken apart: a functional graph takes plain tensors only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["TensorSubclasses"]


class TensorSubclasses:
    """Which inputs of a graph wrap others, and how.

    Args:
        examples: the inputs, as Dynamo hands them to a backend.
    """

    def __init__(self, examples: Sequence[Any]) -> None:
        self._examples = list(examples)
        self._plain = not any(isinstance(x, Tensor) and is_traceable_wrapper_subclass(x) for x in examples)

    def __bool__(self) -> bool:
        return not self._plain

    def flat(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs with those that wrap others replaced by what they wrap."""
        return list(inputs) if self._plain else [leaf for x in inputs for leaf in _leaves(x)]

    def spread(self, values: Sequence[Any]) -> list[Any]:
        """One value an input, repeated for each of its plain tensors."""
        return [v for x, v in zip(self._examples, values, strict=False) for _ in _leaves(x)]

    def around(self, graph: nn.Module) -> nn.Module:
        """The graph as a module of plain tensors."""
        examples = self._examples

        class Around(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.graph = graph

            def forward(self, *flat: Any) -> Any:
                rest = iter(flat)
                return self.graph(*(_rebuilt(x, rest) for x in examples))

        return graph if self._plain else Around()


def _leaves(value: Any) -> list[Any]:
    if not isinstance(value, Tensor) or not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [leaf for name in names for leaf in _leaves(getattr(value, name))]


def _rebuilt(like: Any, rest: Iterator[Any]) -> Any:
    if not isinstance(like, Tensor) or not is_traceable_wrapper_subclass(like):
        return next(rest)
    names, context = like.__tensor_flatten__()
    inner = {name: _rebuilt(getattr(like, name), rest) for name in names}
    return type(like).__tensor_unflatten__(inner, context, like.size(), like.stride())
