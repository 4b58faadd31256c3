"""How well each step of a generation is predicted from others: products of what the blocks add, gathered in one uncached run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vdcache.ir.errors import ConfigError

__all__ = ["ORDERS", "Gathering", "StepTable", "no_order"]

ORDERS = (0, 1)  # orders above do worse than these: they amplify what the solver does between steps
LIMIT = 256 * 2**20  # bytes that one generation's values may take
COLUMNS = 1 << 18  # of the values that are multiplied at one time, in float64


def no_order(order: int) -> str:
    return f"schedules are searched for orders {', '.join(map(str, ORDERS))}; got {order}"


@dataclass(frozen=True)
class StepTable:
    """Products of what all blocks add at one step with what they add at another, of an uncached run.

    Every prediction that adds up values of computed steps has its error from these alone.

    Args:
        products: ⟨r_s, r_t⟩ over tokens and channels, float64 [generations, steps, steps]; lanes and samples are summed.
        kept: bytes that were held at one time.
    """

    products: np.ndarray
    kept: int = 0

    @property
    def steps(self) -> int:
        """Of a generation."""
        return int(self.products.shape[-1])

    def errors(self, order: int) -> np.ndarray:
        """Relative error of predicting step s from the computed steps j and, for order 1, i before it: [i + 1, j, s], i = −1 for none.
        Mean over generations; NaN where i < j < s does not hold.

        Raises:
            ConfigError: another order than 0 or 1.
        """
        if order not in ORDERS:
            raise ConfigError(no_order(order))
        n, g = self.steps, self.products
        size = np.sqrt(np.maximum(np.einsum("gss->gs", g), 1e-30))
        found = np.full((n + 1, n, n), np.nan)
        for j in range(n):
            s = np.arange(j + 1, n)
            own, cross = g[:, s, s], g[:, j, s]
            last = np.maximum(g[:, j, j, None] - 2 * cross + own, 0)
            found[: j + 1, j, s] = (np.sqrt(last) / size[:, s]).mean(0)
            for i in range(j) if order else ():
                k = (s - j) / (j - i)
                a, b = 1 + k, -k  # r_s ≈ a r_j + b r_i
                square = (
                    a * a * g[:, j, j, None] + b * b * g[:, i, i, None] + own
                    + 2 * a * b * g[:, i, j, None] - 2 * a * cross - 2 * b * g[:, i, s]
                )  # fmt: skip
                found[i + 1, j, s] = (np.sqrt(np.maximum(square, 0)) / size[:, s]).mean(0)
        return found


class Gathering:
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
        self._held: dict[tuple[int | str, int, str], list[Tensor]] = defaultdict(list)
        self._chosen: dict[tuple[torch.Size, torch.device], Tensor | None] = {}

    @property
    def bytes(self) -> int:
        """Held now."""
        return sum(v.numel() * v.element_size() for values in self._held.values() for v in values)

    def will_hold(self) -> int:
        """Bytes at the end of the generation, told from its first calls."""
        return sum(v[0].numel() * v[0].element_size() for v in self._held.values()) * self._steps

    def add(self, lane: int | str, call: int, values: Mapping[str, Tensor]) -> None:
        """Take the values of one call.

        Args:
            lane: of guidance.
            call: the number of the call within the lane, for models of several graphs.
            values: by name, each [..., channels].
        """
        for name, value in values.items():
            self._held[lane, call, name].append(self._sample(value.detach(), len(values)))

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

        Raises:
            ConfigError: no value, or lanes of unequal length.
        """
        if not self._held:
            raise ConfigError("no value of the generation was seen")
        if len(lengths := {len(v) for v in self._held.values()}) > 1:
            raise ConfigError(f"the lanes of a generation have {sorted(lengths)} steps")
        found = np.zeros((next(iter(lengths)),) * 2)
        for values in self._held.values():
            for parts in zip(*(v.split(COLUMNS) for v in values), strict=True):
                wide = torch.stack(parts).double()
                found += (wide @ wide.T).cpu().numpy()
        return found
