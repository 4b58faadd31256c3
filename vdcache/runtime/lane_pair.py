"""One lane of guidance predicted from the other: halves of one batch, or the second call of a step from the first."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vdcache.runtime.call import CallContext, CallKey, CompiledGraph, LaneScope
from vdcache.runtime.lane_table import RememberedInput
from vdcache.runtime.read import DeviceReads
from vdcache.runtime.session_warnings import SessionWarnings

__all__ = ["LanePair"]


@dataclass(frozen=True)
class _First:
    """A call of a step's first lane.

    Args:
        returned: what it returned.
        latent: what it was given; None where the graph has no latent.
    """

    key: CallKey
    returned: RememberedInput
    latent: Tensor | None


class LanePair:
    """What the first lane of a step returned, and whether the halves of a batch are two lanes."""

    def __init__(self, reads: DeviceReads, notices: SessionWarnings) -> None:
        self._reads, self._notices = reads, notices
        self._first: dict[tuple[Hashable, int], _First] = {}  # by graph and call, in this step
        self._other: dict[CallKey, CallKey] = {}  # of a second lane: the first one's, to which its kept difference is
        self._same_halves: bool | None = None  # of this generation's batch; None where nobody has looked

    def begin_generation(self) -> None:
        self._first.clear()
        self._other.clear()
        self._same_halves = None

    def begin_step(self) -> None:
        self._first.clear()

    def returned(self, lanes: LaneScope, call: CallContext, inputs: Sequence[Any], results: Sequence[Any]) -> None:
        """What a call returned: of the step's first lane it is remembered."""
        key, value = call.key, results[lanes.output]
        if lanes.mode != "calls" or not isinstance(value, Tensor):
            return
        first = self._first.get((key.graph, key.call))
        if first is None:
            self._first[key.graph, key.call] = _First(key, RememberedInput(value), _latent(call.graph, inputs))
        elif lanes.group not in call.plan.reuse:
            self._other[key] = first.key

    def first(self, lanes: LaneScope, who: Hashable, call: int) -> Tensor | None:
        """What the step's first lane returned, unless its owner has written into it since; None in a batch."""
        held = self._first.get((who, call)) if lanes.mode == "calls" else None
        return held.returned.earlier() if held is not None else None

    def why_not(self, lanes: LaneScope, call: CallContext, inputs: Sequence[Any]) -> str | None:
        """Why a lane cannot be predicted in this call; "" where it is the one that is always computed, None where it can."""
        latent = _latent(call.graph, inputs)
        if lanes.mode == "calls":
            if call.pair is None:
                return ""
            first = self._first[call.key.graph, call.key.call]
            if self._other.get(call.key, first.key) is not first.key:
                return "the conditioning of the lane that it is predicted from is new"
            return None if self._same(first.latent, latent) else "the lanes have different latents"
        if self._same_halves is None:
            self._same_halves = False
            if isinstance(latent, Tensor):
                one, other = latent.chunk(2)
                self._same_halves = bool(self._reads.read([(one == other).all()])[0][0])
            if not self._same_halves:
                self._notices.no_lanes()
        return None if self._same_halves else "the halves of the batch are not two lanes"

    def _same(self, first: Tensor | None, second: Tensor | None) -> bool:
        """Whether two lanes have one latent. One object that was written into in between is no longer what the first was given, but then
        the sampler has gone on, and it is another step.
        """
        if first is second:
            return True
        if first is None or second is None or first.shape != second.shape or first.dtype != second.dtype:
            return False
        return bool(self._reads.read([(first == second).all()])[0][0])


def _latent(graph: CompiledGraph, inputs: Sequence[Any]) -> Tensor | None:
    found = inputs[graph.inputs.latent] if graph.inputs.latent is not None else None
    return found if isinstance(found, Tensor) else None
