"""What the graphs of a step measured, of all its lanes and of all ranks, read as late as possible."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdcache.policies.metrics import MetricSpec, MetricValue, count_of, measured
from vdcache.runtime.agreement import SessionRanks
from vdcache.runtime.call import CompiledGraph, ProbeResult
from vdcache.runtime.read import DeviceReads
from vdcache.runtime.session_warnings import SessionWarnings

__all__ = ["PendingSums", "StepMetrics"]


@dataclass
class PendingSums:
    """Sums of one call that the policy has not seen yet.

    Args:
        sums: float, on the device that computed them.
        layouts: what they are sums of, in order.
        elements: of each observed value.
        comparable: whether there was an earlier value to compare with.
    """

    sums: Tensor
    layouts: tuple[MetricSpec, ...]
    elements: tuple[int, ...]
    comparable: bool


class StepMetrics:
    """The metrics of one step after another.

    Args:
        ranks: with whom what was measured is added up.
    """

    def __init__(self, notices: SessionWarnings, reads: DeviceReads, ranks: SessionRanks) -> None:
        self._notices, self._reads, self._ranks = notices, reads, ranks
        self._pending: list[PendingSums] = []

    def observe(self, pending: PendingSums) -> None:
        """Sums of a call of this step, which are read when the next one is planned."""
        self._pending.append(pending)

    def clear(self) -> None:
        """Nobody will ask for what was measured."""
        self._pending.clear()

    def unread(self) -> list[Tensor]:
        """The sums of this step, for who reads something else of the device anyway."""
        return [p.sums for p in self._pending]

    def told(self, numbers: Sequence[Sequence[float]]) -> None:
        """What was read, in the order of `unread`: these sums wait for no device any more."""
        for p, values in zip(self._pending, numbers, strict=True):
            p.sums = torch.tensor(values, dtype=torch.float64)

    def of_step(self) -> tuple[MetricValue, ...] | None:
        """What the step before measured, lanes added up; None where a lane had nothing to compare with. They are taken: asked again there
        is nothing."""
        pending, self._pending = self._pending, []
        if not pending:
            return None
        numbers = self._reads.read([p.sums for p in pending])
        if not all(p.comparable for p in pending):
            if self._ranks:
                self._ranks.total("metrics", ())  # another rank may have something to compare with
            return None
        totals: dict[MetricSpec, list[float]] = {}
        elements: dict[MetricSpec, int] = {}
        for p, sums in zip(pending, numbers, strict=True):
            for layout, own, n in zip(p.layouts, _parts(p.layouts, sums), p.elements, strict=True):
                totals[layout] = [a + b for a, b in zip(totals.get(layout, [0.0] * len(own)), own, strict=True)]
                elements[layout] = elements.get(layout, 0) + n
        flat = [number for own in totals.values() for number in own]
        result = self._of_all_ranks("metrics", list(totals), flat, list(elements.values()))
        if result is None:
            return None
        if not all(math.isfinite(m.change) for m in result):
            self._notices.observed_is_no_number()
        return result

    def of_probes(self, graph: CompiledGraph, seen: ProbeResult, comparable: bool) -> tuple[MetricValue, ...] | None:
        """What was probed at this step; None where there is nothing to compare with."""
        if comparable and seen.sums is not None:
            layouts, elements = [p.layout for p in graph.probes], [v.numel() for v in seen.values]
            return self._of_all_ranks("probes", layouts, self._reads.read([seen.sums])[0], elements)
        if self._ranks:
            self._ranks.total("probes", ())  # another rank may have something to compare with
        return None

    def _of_all_ranks(
        self, topic: str, layouts: Sequence[MetricSpec], sums: Sequence[float], elements: Sequence[int]
    ) -> tuple[MetricValue, ...] | None:
        """The metrics of values that lie in parts on several ranks: sums are added up before anything is divided, so they are those of the
        whole, however unequal the parts. None where a rank has nothing to compare with."""
        if self._ranks:
            found = self._ranks.total(topic, [*sums, *elements])
            if found is None:
                return None
            sums, elements = found[: len(sums)], [round(n) for n in found[len(sums) :]]
        return tuple(measured(*each) for each in zip(layouts, _parts(layouts, sums), elements, strict=True))


def _parts(layouts: Sequence[MetricSpec], sums: Sequence[float]) -> Iterator[Sequence[float]]:
    """The sums of each metric, of all of them in a row."""
    at = 0
    for layout in layouts:
        yield sums[at : at + (count := count_of(layout))]
        at += count
