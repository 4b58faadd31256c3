"""Positions and dependence in one graph, so that each question about dataflow costs one look-up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

__all__ = ["Index"]


class Index:
    """What depends on what in one graph. Valid until the graph changes.

    Every node carries one integer of bits: from which of the `asked` nodes it is computed. Asking about a tenth of the nodes
    (the operands of additions) keeps it small: 128 blocks take 4 MB.

    Args:
        activations: inputs that are not parameters or buffers; `inputs_of` answers in their order.
        asked: nodes on which dependence may be asked.
    """

    def __init__(self, graph: fx.Graph, activations: Sequence[fx.Node], asked: Iterable[fx.Node] = ()) -> None:
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.activations = tuple(activations)
        self._bit = {node: i for i, node in enumerate(dict.fromkeys([*activations, *asked]))}
        self._inputs_mask = (1 << len(self.activations)) - 1
        self._above: dict[fx.Node, int] = {}
        for node in self.nodes:
            bits = 0
            for parent in node.all_input_nodes:
                bits |= self._above[parent]
                if (bit := self._bit.get(parent)) is not None:
                    bits |= 1 << bit
            self._above[node] = bits

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        """Whether `node` is computed from `on`, an activation or one of the `asked` (a node does not depend on itself)."""
        return bool(self._above[node] >> self._bit[on] & 1)

    def inputs_of(self, node: fx.Node) -> int:
        """Mask of the activations that `node` is computed from, or is: bit i for activation i."""
        own = self._bit.get(node, len(self.activations))
        return self._above[node] & self._inputs_mask | (1 << own if own < len(self.activations) else 0)

    def mask_of(self, names: Iterable[str]) -> int:
        """Mask of the activations of these names."""
        wanted = set(names)
        return sum(1 << i for i, node in enumerate(self.activations) if node.name in wanted)

    def outputs(self) -> list[Any]:
        """What the graph returns."""
        results = self.nodes[-1].args[0]
        return list(results) if isinstance(results, (tuple, list)) else [results]
