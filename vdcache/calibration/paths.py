"""Which steps to compute: the best lists by what skipping costs, by dynamic programming over the last two computed steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vdcache.errors import ConfigError
from vdcache.util.checks import whole

__all__ = ["Path", "best_paths", "cost_of", "paths_up_to"]

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
    return paths_up_to(errors, computed, objective=objective, keep=keep)[-1]


def paths_up_to(errors: Errors, computed: int, *, objective: str = "sum", keep: int = 1) -> list[list[Path]]:
    """As `best_paths`, for 1, 2 … `computed` computed steps at the cost of the last alone."""
    steps = errors.shape[1]
    whole(computed, "the number of computed steps", 1)
    whole(keep, "the number of lists", 1)
    if computed > steps:
        raise ConfigError(f"{computed} of {steps} steps cannot be computed")
    if objective not in ("sum", "max"):
        raise ConfigError(f"objective is sum or max; got {objective!r}")
    join = np.add if objective == "sum" else np.maximum
    # skipped[j, n, i + 1]: of the steps after j and before n; n follows j, which follows i
    accumulate = np.cumsum if objective == "sum" else np.maximum.accumulate
    skipped = np.full((steps, steps + 1, steps + 1), np.inf)
    for i in range(-1, steps):
        for j in range(i + 1, steps):
            skipped[j, j + 1, i + 1] = 0.0
            skipped[j, j + 2 :, i + 1] = accumulate(errors[i + 1, j, j + 1 :])
    # costs[j, i + 1, k]: of the k-th best list whose last computed steps are i and j
    costs = np.full((steps, steps + 1, keep), np.inf)
    costs[0, 0, 0] = 0.0
    before: list[np.ndarray] = []  # [j, n, k]: which (i + 1, k) a list that ends with j and n comes from
    found = []
    for count in range(1, computed + 1):
        ends = join(costs, skipped[:, steps, :, None])
        ends = ends.transpose(1, 0, 2)  # of equal lists the one that comes first by i
        best = np.argsort(ends, axis=None, kind="stable")[:keep]
        places = [np.unravel_index(at, ends.shape) for at in best if np.isfinite(ends.reshape(-1)[at])]
        found.append([Path(float(ends[p]), _traced(before, *map(int, p))) for p in places])
        if count < computed:
            onward, came = np.full_like(costs, np.inf), np.zeros((steps, steps, keep), dtype=np.intp)
            for j in range(count - 1, steps - 1):  # so many computed steps end no earlier than this
                some = join(costs[j, None, : j + 1], skipped[j, j + 1 : steps, : j + 1, None])  # [n, i + 1, k]
                came[j, j + 1 :], onward[j + 1 :, j + 1] = _smallest(some.reshape(len(some), -1), keep)
            costs = onward
            before.append(came)
    return found


def _smallest(values: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """In each row where the smallest are, the first of equal ones first, and what they are. `values` is used up.

    Few are wanted of many: to look for each of them takes a tenth of the time of sorting.
    """
    order, found = np.zeros((len(values), keep), dtype=np.intp), np.full((len(values), keep), np.inf)
    rows = np.arange(len(values))
    for k in range(min(keep, values.shape[1])):
        order[:, k] = at = values.argmin(1)
        found[:, k] = values[rows, at]
        values[rows, at] = np.inf
    return order, found


def _traced(before: list[np.ndarray], i: int, j: int, k: int) -> tuple[int, ...]:
    """The computed steps of a list, from its end; `i` is one more than the last but one."""
    path = [j]
    for came in reversed(before):
        last = i - 1
        i, k = divmod(int(came[last, j, k]), came.shape[-1])
        j = last
        path.append(j)
    return tuple(reversed(path))


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
