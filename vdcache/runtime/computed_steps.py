"""When was each cached value computed? What is older than the step that computed it last must not be reused."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

from vdcache.policies.plan import Plan
from vdcache.policies.weights import Position
from vdcache.runtime.call import CallKey
from vdcache.runtime.store import Store

__all__ = ["ComputedSteps"]

LaneKey = tuple[int | str | None, int, int]


@dataclass(slots=True)
class _OfCall:
    """What equal calls have computed.

    Args:
        steps: of each group, the computed steps, newest first.
        latest: the last step that computed any group; −1 before.
    """

    steps: dict[str, list[Position]]
    latest: int = -1


_NEVER = _OfCall({})


class ComputedSteps:
    """The last computed step of every group of a call, within one generation; what is dropped here is dropped in the store.

    Args:
        store: holds the values.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: dict[tuple[Hashable, ...], CallKey] = {}
        self._computed: dict[CallKey, _OfCall] = {}
        # Graph, call and group -> the last step that was planned to compute it.
        self._due: dict[tuple[Hashable, int, str], int] = {}
        self._ambiguous: dict[LaneKey, int] = {}  # lanes, and the last step of several latents

    def key(self, graph: Hashable, call: int, lane: LaneKey, weights: int, forms: Hashable) -> CallKey:
        """The one key of equal calls."""
        parts = graph, call, lane, weights, forms
        if (found := self._keys.get(parts)) is None:
            found = self._keys[parts] = CallKey(*parts)
        return found

    def computed(self, key: CallKey, groups: Iterable[str], at: Position, planned: Plan) -> None:
        """A call has computed these groups.

        Args:
            planned: of the step; what it does not reuse is computed by every lane of it.
        """
        if (own := self._computed.get(key)) is None:
            own = self._computed[key] = _OfCall({})
        for group in groups:
            own.latest = at.step
            own.steps.setdefault(group, []).insert(0, at)
            if group not in planned.reuse:
                self._due[key.graph, key.call, group] = at.step

    def at(self, key: CallKey, step: int) -> bool:
        """Whether this very call computed something in this step."""
        own = self._computed.get(key)
        return own is not None and own.latest == step

    def steps(self, key: CallKey, group: str) -> Sequence[Position]:
        """The steps of this generation in which a group was computed, newest first."""
        return self._computed.get(key, _NEVER).steps.get(group, ())

    def is_stale(self, key: CallKey, plan: Plan, step: int) -> bool:
        """Whether the model was computed at a later step than this lane last was, as where guidance was off in between."""
        own, due = self._computed.get(key, _NEVER).steps, self._due
        return any(g in own and own[g][0].step < due.get((key.graph, key.call, g), -1) for g in plan.reuse)

    def had_several_latents(self, lane: LaneKey, step: int) -> None:
        self._ambiguous[lane] = step

    def is_ambiguous(self, key: CallKey, plan: Plan) -> bool:
        """Whether the lane was last computed in a step in which it had several latents, so that nobody knows whose values are kept."""
        if not self._ambiguous or (several := self._ambiguous.get(key.lane)) is None:
            return False
        own = self._computed.get(key, _NEVER).steps
        return any(g not in own or own[g][0].step <= several for g in plan.reuse)

    def drop(self, key: CallKey) -> None:
        self._store.drop(key)
        self._computed.pop(key, None)

    def drop_lanes(self, ids: Collection[int]) -> None:
        """Everything of the lanes with these ids."""
        gone = set(ids)
        for key in [k for k in self._computed if gone & set(k.lane[1:])]:
            self.drop(key)
        self._keys = {parts: key for parts, key in self._keys.items() if not gone & set(key.lane[1:])}
        self._ambiguous = {lane: step for lane, step in self._ambiguous.items() if not gone & set(lane[1:])}

    def drop_values(self) -> None:
        """Every value, as where a call raised or a weight changed."""
        self._store.drop()
        self._computed.clear()

    def clear(self) -> None:
        """A generation is over."""
        self.drop_values()
        self._keys.clear()
        self._due.clear()
        self._ambiguous.clear()
