"""A predictor at work without a model: what was computed, and what a later step is given."""

from __future__ import annotations

from typing import Any

import torch

from vdcache.passes.predictors import AnyPredictor, as_told, graph_of, numbers_of
from vdcache.policies.weights import Position


class Predicting:
    """What a slot keeps under a predictor, in eager arithmetic: the functions that are traced into the variants."""

    def __init__(self, predictor: AnyPredictor) -> None:
        self._graph, self._told = graph_of(predictor), numbers_of(predictor)
        self._kept: list[torch.Tensor] | None = None
        self._computed: list[Position] = []

    def computed(self, step: int, value: torch.Tensor, timestep: float | None = None) -> None:
        previous = [torch.zeros_like(value)] * self._graph.tensors if self._kept is None else self._kept
        self._kept = list(self._graph.store(value, previous, self._numbers(Position(step, timestep))))
        self._computed.insert(0, Position(step, timestep))

    def predicted(self, step: int, timestep: float | None = None) -> torch.Tensor:
        assert self._kept is not None
        return self._graph.predict(self._kept, self._numbers(Position(step, timestep)))

    def _numbers(self, at: Position) -> Any:
        return as_told(self._graph, [torch.tensor(float(n)) for n in self._told.values(at, self._computed)])
