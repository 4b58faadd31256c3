"""One lane of guidance predicted from the other: halves of one batch, or the second call of a step from the first."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from vdcache.runtime.call import CallKey, CompiledGraph, LaneScope
from vdcache.runtime.lane_table import RememberedInput
from vdcache.runtime.read import DeviceReads
from vdcache.runtime.session_warnings import SessionWarnings

__all__ = ["LanePair"]


class LanePair:
    """What the first lane of a step returned, and whether the halves of a batch are two lanes."""

    def __init__(self, reads: DeviceReads, notices: SessionWarnings) -> None:
        self._reads, self._notices = reads, notices
        self._first: dict[tuple[Hashable, int], RememberedInput] = {}  # what graphs returned in the first lane of this step
        self._same_halves: bool | None = None  # of this generation's batch; None where nobody has looked

    def begin_generation(self) -> None:
        self._first.clear()
        self._same_halves = None

    def begin_step(self) -> None:
        self._first.clear()

    def returned(self, lanes: LaneScope, key: CallKey, results: Sequence[Any]) -> None:
        """What a call returned: of the step's first lane it is remembered."""
        value, at = results[lanes.output], (key.graph, key.call)
        if lanes.mode == "calls" and isinstance(value, Tensor) and at not in self._first:
            self._first[at] = RememberedInput(value)

    def first(self, lanes: LaneScope, who: Hashable, call: int) -> Tensor | None:
        """What the step's first lane returned, unless its owner has written into it since; None in a batch."""
        held = self._first.get((who, call)) if lanes.mode == "calls" else None
        return held.earlier() if held is not None else None

    def why_not(self, lanes: LaneScope, graph: CompiledGraph, inputs: Sequence[Any], pair: Tensor | None) -> str | None:
        """Why a lane cannot be predicted in this call; "" where it is the one that is always computed, None where it can."""
        if lanes.mode == "calls":
            return "" if pair is None else None
        if self._same_halves is None:
            latent = inputs[graph.inputs.latent] if graph.inputs.latent is not None else None
            self._same_halves = False
            if isinstance(latent, Tensor):
                first, second = latent.chunk(2)
                self._same_halves = bool(self._reads.read([(first == second).all()])[0][0])
            if not self._same_halves:
                self._notices.no_lanes()
        return None if self._same_halves else "the halves of the batch are not two lanes"
