"""What a policy would do, told from one uncached generation: every measure that it could ever ask for, between any two steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdcache.calibration.tables import LIMIT
from vdcache.errors import ConfigError
from vdcache.policies.base import Policy
from vdcache.policies.metrics import MetricSpec, MetricValue, measured
from vdcache.policies.plan import Plan
from vdcache.policies.simulate import simulate
from vdcache.runtime.call import ProbeSpec
from vdcache.util.slots import group_of

__all__ = ["MetricLog", "MetricRecorder", "replayed"]


@dataclass(frozen=True)
class MetricLog:
    """Everything that a policy could measure in one generation.

    Args:
        steps: of the generation.
        times: its timesteps; empty where they are not known.
        pairs: of each observation and probe, by name, then by the earlier and the later step.
        probes: names of those that are looked at before a step is planned, and since when: "step" or "computed".
    """

    steps: int
    times: tuple[float, ...]
    pairs: Mapping[str, Mapping[tuple[int, int], MetricValue]]
    probes: Mapping[str, str]

    def changes(self) -> list[float]:
        """Changes from each step to the next, of everything."""
        return [own[s - 1, s].change for own in self.pairs.values() for s in range(1, self.steps)]


class MetricRecorder:
    """The values of one uncached generation as they come; of wide ones a sample of channels.

    Args:
        steps: of the generation; a guess does, it only divides the limit.
    """

    def __init__(self, steps: int | None = None) -> None:
        self._steps = steps or 50
        self._held: dict[str, dict[int | str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self._layouts: dict[str, MetricSpec] = {}
        self._since: dict[str, str] = {}

    @property
    def bytes(self) -> int:
        """Held now."""
        return sum(v.numel() * v.element_size() for own in self._held.values() for values in own.values() for v in values)

    def add(
        self, lane: int | str, values: Mapping[str, Tensor], layouts: Sequence[MetricSpec], probes: Sequence[ProbeSpec]
    ) -> None:
        """Take what one call observed and probed."""
        known = {o.name: o for o in layouts} | {p.layout.name: p.layout for p in probes}
        self._since |= {p.layout.name: p.reference_step for p in probes}
        for name, layout in known.items():
            if name in values:
                self._layouts[name] = layout
                self._held[name][lane].append(self._sample(values[name].detach(), len(known)))

    def _sample(self, value: Tensor, beside: int) -> Tensor:
        room = LIMIT // (self._steps * 2 * beside * 4)
        if value.dim() < 3 or value.numel() <= room:
            return value.float().clone()
        width = max(1, room * value.shape[-1] // value.numel())
        some = torch.randperm(value.shape[-1], generator=torch.Generator().manual_seed(0))[:width].sort().values
        return value[..., some.to(value.device)].float().clone()

    def measures(self, times: Sequence[float] = ()) -> MetricLog:
        """What they have in common, two steps at a time.

        Raises:
            ConfigError: nothing was seen, or lanes of unequal length.
        """
        if len(lengths := {len(v) for own in self._held.values() for v in own.values()}) != 1:
            raise ConfigError(
                f"what the policy looks at was seen in {sorted(lengths)} steps: every lane must have it at every step"
            )
        steps = lengths.pop()
        pairs: dict[str, dict[tuple[int, int], MetricValue]] = {}
        for name, own in self._held.items():
            layout, found = self._layouts[name], {}
            # A step is decided in its first lane; what is observed is added up when all of them are done.
            lanes = dict(list(own.items())[:1]) if name in self._since else own
            elements = sum(v[0].numel() for v in lanes.values())
            for late in range(1, steps):
                for early in range(late):
                    sums = [_sums(v[late], v[early], layout) for v in lanes.values()]
                    found[early, late] = measured(layout, [sum(s) for s in zip(*sums, strict=True)], elements)
            pairs[name] = found
        return MetricLog(steps, tuple(times), pairs, dict(self._since))


def _sums(now: Tensor, then: Tensor, layout: MetricSpec) -> list[float]:
    """As `passes.sums` forms them in a graph."""
    if layout.distance == "cosine":
        found = [then * now, then * then, now * now]
    elif layout.distance == "magnitude":
        ratio = now.norm(dim=-1) / then.norm(dim=-1)
        found = [ratio, ratio.square(), torch.ones_like(ratio)]
    else:
        size = torch.abs if layout.distance == "l1" else torch.square
        found = [size(then - now), size(then), size(now)]
    if layout.strides:
        rows = now.reshape(now.shape[0], layout.frames, -1)
        for i in layout.strides:
            late, early = rows[:, i:], rows[:, :-i]
            found += [(late - early).abs(), late.abs(), early.abs()]
    return torch.stack([f.sum() for f in found]).tolist()


def replayed(policy: Policy, seen: MetricLog) -> list[Plan]:
    """The plan of every step that a policy chooses, if values are those of the uncached generation.

    A cached generation drifts from it, so this is what to expect, not what will be.
    """
    groups = frozenset(g for p in policy.plans() for g in p.reuse)
    last: dict[str, int] = {}

    def probed(step: int) -> tuple[MetricValue, ...] | None:
        since = {n: step - 1 if kind == "step" else last.get(group_of(n), -1) for n, kind in seen.probes.items()}
        return tuple(seen.pairs[name][early, step] for name, early in since.items() if early >= 0) or None

    def observed(step: int, plan: Plan) -> tuple[MetricValue, ...] | None:
        measures = tuple(
            own[last[group], step]
            for name, own in seen.pairs.items()
            if name not in seen.probes and (group := group_of(name)) in last and group not in plan.reuse
        )
        last.update(dict.fromkeys(groups - plan.reuse, step))
        return measures or None

    return simulate(policy, seen.steps, times=seen.times, probed=probed, observed=observed)
