"""Which steps to compute: the best lists by what skipping costs, by dynamic programming over the last two computed steps."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vdcache.ir.checks import whole
from vdcache.ir.errors import ConfigError

__all__ = ["Path", "best_paths", "cost_of"]

Errors = (
    np.ndarray
)  # [steps + 1, steps, steps]: of step s, predicted from the computed steps (i, j), is at [i + 1, j, s]; i = −1 is none


@dataclass(frozen=True, order=True)
class Path:
    """A list of computed steps.

    Args:
        cost: what skipping the others costs.
        steps: ascending, from 0.
    """

    cost: float
    steps: tuple[int, ...]


def best_paths(errors: Errors, computed: int, *, objective: str = "sum", keep: int = 1) -> list[Path]:
    """The `keep` best lists of that many computed steps, the first step among them, best first.

    A skipped step costs what predicting it from the last two computed ones costs: errors[i + 1, j, s] with i < j < s, where i = −1
    says that only j is known. Costs of steps add up, or the largest counts.

    Args:
        errors: [steps + 1, steps, steps], not negative.
        computed: how many steps are computed.
        objective: "sum" or "max".

    Raises:
        ConfigError: more computed steps than there are, or none; another objective.
    """
    steps = errors.shape[1]
    whole(computed, "the number of computed steps", 1)
    whole(keep, "the number of lists", 1)
    if computed > steps:
        raise ConfigError(f"{computed} of {steps} steps cannot be computed")
    if objective not in ("sum", "max"):
        raise ConfigError(f"objective is sum or max; got {objective!r}")
    join: Callable[[float, float], float] = (lambda a, b: a + b) if objective == "sum" else max
    # skipped[i + 1, j, n]: of the steps after j and before n
    accumulate = np.cumsum if objective == "sum" else np.maximum.accumulate
    skipped = np.zeros((steps + 1, steps, steps + 1))
    for i in range(-1, steps):
        for j in range(i + 1, steps - 1):
            skipped[i + 1, j, j + 2 :] = accumulate(errors[i + 1, j, j + 1 :])
    at: dict[tuple[int, int], list[Path]] = {(-1, 0): [Path(0.0, (0,))]}
    for _ in range(computed - 1):
        after: dict[tuple[int, int], list[Path]] = defaultdict(list)
        for (i, j), paths in at.items():
            for n in range(j + 1, steps):
                more = float(skipped[i + 1, j, n])
                after[j, n] += [Path(join(p.cost, more), (*p.steps, n)) for p in paths]
        at = {state: heapq.nsmallest(keep, paths) for state, paths in after.items()}
    ends = (Path(join(p.cost, float(skipped[i + 1, j, steps])), p.steps) for (i, j), paths in at.items() for p in paths)
    return heapq.nsmallest(keep, ends)


def cost_of(errors: Errors, steps: tuple[int, ...], objective: str = "sum") -> float:
    """What a list costs, skipped step by skipped step."""
    every, before = [0.0], {s: (steps[i - 1] if i else -1) for i, s in enumerate(steps)}
    last = 0
    for s in range(errors.shape[1]):
        if s in before:
            last = s
        else:
            every.append(float(errors[before[last] + 1, last, s]))
    return sum(every) if objective == "sum" else max(every)
