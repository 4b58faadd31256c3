"""How well each step of a generation is predicted from others: products of what the blocks add, gathered in one uncached run."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vdcache.errors import ConfigError
from vdcache.policies.weights import Newton, Position

__all__ = ["ORDERS", "StepTable", "StepTableBuilder", "no_order"]

ORDERS = (0, 1)  # orders above do worse than these: they amplify what the solver does between steps
LIMIT = 256 * 2**20  # bytes that one generation's values may take
COLUMNS = 1 << 18  # of the values that are multiplied at one time, in float64

_Lane = tuple[int | str, int]  # and the number of the call within it
_Values = dict[str, tuple[torch.Size, Tensor]]  # by name: the shape of a value, and what is kept of it


def no_order(order: int) -> str:
    return f"schedules are searched for orders {', '.join(map(str, ORDERS))}; got {order}"


@dataclass(frozen=True)
class StepTable:
    """Products of what all blocks add at one step with what they add at another, of an uncached run.

    Every prediction that adds up values of computed steps has its error from these alone.

    Args:
        products: ⟨r_s, r_t⟩ over tokens and channels, float64 [generations, steps, steps]; lanes and samples are summed.
        kept: bytes that were held at one time.
        times: timesteps of the steps; empty where not all are known.
    """

    products: np.ndarray
    kept: int = 0
    times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.times) != self.steps:
            object.__setattr__(self, "times", ())

    @property
    def steps(self) -> int:
        """Of a generation."""
        return int(self.products.shape[-1])

    def errors(self, rule: Newton) -> np.ndarray:
        """Relative error of predicting step s from the computed steps j and, for order 1, i before it: [i + 1, j, s], i = −1 for none.
        Mean over generations; NaN where i < j < s does not hold.

        Raises:
            ConfigError: another order than 0 or 1.
        """
        if rule.order not in ORDERS:
            raise ConfigError(no_order(rule.order))
        n, g = self.steps, self.products
        at = [Position(s, self.times[s] if self.times else None) for s in range(n)]
        size = np.sqrt(np.maximum(np.einsum("gss->gs", g), 1e-30))
        found = np.full((n + 1, n, n), np.nan)
        for j in range(n):
            s = np.arange(j + 1, n)
            own, cross = g[:, s, s], g[:, j, s]
            last = np.maximum(g[:, j, j, None] - 2 * cross + own, 0)
            found[: j + 1, j, s] = (np.sqrt(last) / size[:, s]).mean(0)
            for i in range(j) if rule.order else ():
                a, b = np.array([rule.weights(at[t], (at[j], at[i])) for t in s]).reshape(-1, 2).T  # r_s ≈ a r_j + b r_i
                square = (
                    a * a * g[:, j, j, None] + b * b * g[:, i, i, None] + own
                    + 2 * a * b * g[:, i, j, None] - 2 * a * cross - 2 * b * g[:, i, s]
                )  # fmt: skip
                found[i + 1, j, s] = (np.sqrt(np.maximum(square, 0)) / size[:, s]).mean(0)
        return found


class StepTableBuilder:
    """The values of one uncached generation as they come, and what they have in common when it is over.

    Of large values a sample of tokens is kept, the same ones at every step, so that one generation takes no more than `limit`
    bytes for two lanes. Differences of neighbouring steps cancel nearly all of a value, so values are kept in float32 and
    multiplied in float64.

    Args:
        steps: of the generation; a guess does, it only divides the limit.
        limit: bytes.
    """

    def __init__(self, steps: int | None, limit: int = LIMIT) -> None:
        self._steps, self._limit = steps or 50, limit
        self._held: dict[_Lane, dict[int, _Values]] = defaultdict(dict)
        self._chosen: dict[tuple[torch.Size, torch.device], Tensor | None] = {}

    @property
    def bytes(self) -> int:
        """Held now."""
        return sum(map(_bytes, (values for calls in self._held.values() for values in calls.values())))

    def will_hold(self) -> int:
        """Bytes at the end of the generation, told from its first calls."""
        return sum(_bytes(next(iter(calls.values()))) for calls in self._held.values()) * self._steps

    def add(self, step: int, lane: int | str, values: Mapping[str, Tensor]) -> None:
        """Take the values of one call.

        Args:
            step: of the generation, counted from 0.
            lane: of guidance.
            values: by name, each [..., channels].
        """
        if not values:
            return
        call = next(n for n in itertools.count() if step not in self._held.get((lane, n), {}))  # models of several graphs
        self._held[lane, call][step] = {n: (v.shape, self._sample(v.detach(), len(values))) for n, v in values.items()}

    def _sample(self, value: Tensor, beside: int) -> Tensor:
        rows = value.reshape(-1, value.shape[-1]) if value.dim() > 1 else value.reshape(1, -1)
        form = (value.shape, value.device)
        if form not in self._chosen:
            room = self._limit // (self._steps * 2 * beside * 4 * rows.shape[1])
            some = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(0))[: max(1, room)]
            self._chosen[form] = None if room >= rows.shape[0] else some.sort().values.to(value.device)
        chosen = self._chosen[form]
        return (rows if chosen is None else rows[chosen]).float().flatten().clone()

    def products(self) -> np.ndarray:
        """⟨a, b⟩ of the values of all pairs of steps, [steps, steps]; lanes and values add up.

        Lanes that some steps lack (guidance for a part of the run) are left out: the error of one step from another is that of
        values which both have. Values of another form (a batch of 2, then 1) have nothing in common, as none is reused for another.

        Raises:
            ConfigError: no value, or a step without any.
        """
        if not self._held:
            raise ConfigError("no value of the generation was seen")
        steps = 1 + max(step for calls in self._held.values() for step in calls)
        whole = {key: calls for key, calls in self._held.items() if len(calls) == steps} or self._firsts(steps)
        alike: dict[Hashable, dict[int, list[Tensor]]] = defaultdict(dict)
        for key, calls in whole.items():
            for step, values in calls.items():
                form = tuple((name, shape) for name, (shape, _) in values.items())
                alike[key, form][step] = [v for _, v in values.values()]
        found = np.zeros((steps, steps))
        for own in alike.values():
            at = np.ix_([*own], [*own])
            for same in zip(*own.values(), strict=True):
                for parts in zip(*(v.split(COLUMNS) for v in same), strict=True):
                    wide = torch.stack(parts).double()
                    found[at] += (wide @ wide.T).cpu().numpy()
        return found

    def _firsts(self, steps: int) -> dict[_Lane, dict[int, _Values]]:
        """One lane for every step, where no lane has them all: the first one that has it."""
        found: dict[_Lane, dict[int, _Values]] = defaultdict(dict)
        for step in range(steps):
            key = next((key for key, calls in self._held.items() if step in calls), None)
            if key is None:
                raise ConfigError(f"no value of step {step} of a generation was seen")
            found[key][step] = self._held[key][step]
        return found


def _bytes(values: _Values) -> int:
    return sum(v.numel() * v.element_size() for _, v in values.values())
