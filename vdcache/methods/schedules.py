"""Methods whose steps are known before the run: FORA, TaylorSeer, Δ-DiT, SmoothCache, learning-to-cache, MagCache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vdcache.errors import ConfigError
from vdcache.methods.recipe import Recipe
from vdcache.passes import MarkBranches, MergeSlots
from vdcache.passes.mark_branches import TYPES
from vdcache.policies.scheduled import CombinedPolicy, MagCache, PlanTable, SchedulePolicy
from vdcache.policies.steps import EveryNth, LinearIntervals, StepList
from vdcache.policies.weights import Taylor
from vdcache.util.checks import number, numbers, whole, whole_numbers

__all__ = ["delta_dit", "first_then_every", "fora", "l2c", "magcache", "smoothcache", "taylorseer"]


def fora(n: int, *, name: str = "") -> Recipe:
    """FORA (arXiv 2407.01425): the first step and every n-th, counted from the last one; the kept values meet the gates of each
    step.

    Raises:
        ConfigError: n below 1.
    """
    return Recipe(
        name or f"fora-{n}", SchedulePolicy(EveryNth(n, from_end=True)), (MarkBranches(gate="pre"),), "arXiv 2407.01425"
    )


def first_then_every(n: int, first: int) -> SchedulePolicy:
    """Compute `first` steps and then every n-th.

    Raises:
        ConfigError: n or `first` below 1.
    """
    whole(n, "n, the distance of computed steps,", 1)
    warm_up = whole(first, "first, the number of steps that are computed first,", 1) - 1
    return SchedulePolicy(LinearIntervals(warm_up=warm_up, t_max=n, t_min=n))


def taylorseer(n: int, order: int, *, first: int = 3, name: str = "") -> Recipe:
    """TaylorSeer (arXiv 2503.06923): compute `first` steps and then every n-th, and expand what branches add in a Taylor series
    in between.

    Args:
        first: the code's first_enhance: 3 for FLUX, 1 for HunyuanVideo and Wan, 2 for DiT.

    Raises:
        ConfigError: n or `first` below 1, an order below 0 or above 4.
    """
    policy = first_then_every(n, first)
    name = name or f"taylorseer-{n}-{whole(order, 'order')}"
    return Recipe(name, policy, (MarkBranches(gate="pre"),), "arXiv 2503.06923", predictor=Taylor(order))


def delta_dit(n: int, *, blocks: int | float = 0.5, switch: float = 0.5, name: str = "") -> Recipe:
    """Δ-DiT (arXiv 2406.01125): compute every n-th step; in between leave out the rear blocks early in the run, the front
    blocks late.

    The constants of the paper could not be read, and no code is public: the defaults are ours.

    Args:
        blocks: how many blocks at either end, or which share of them; more than half may be left out, and those in the middle
            are left out all the time then.
        switch: the share of the run after which the front blocks are left out.

    Raises:
        ConfigError: n below 1, or a share that is none.
    """
    if (
        isinstance(blocks, bool)
        or not isinstance(blocks, (int, float))
        or not blocks > 0
        or (isinstance(blocks, float) and blocks > 1)
    ):
        raise ConfigError(f"blocks is a number of blocks, or a share of them as a fraction; got {blocks!r}")
    marks = [MarkBranches(group="rear", start=-blocks), MarkBranches(group="front", stop=blocks)]
    shared: tuple[str, ...] = ()
    if isinstance(blocks, int) or blocks > 0.5:  # a count may be more than half, which the model alone says
        # marked first, so that what is in both ends is in neither of their groups
        marks.insert(0, MarkBranches(group="both", start=-blocks, stop=blocks))
        shared = ("both",)
    passes = (*marks, *(MergeSlots(group=m.group) for m in marks))
    policy = SchedulePolicy(EveryNth(n), ("rear", "front"), "split", switch, shared)
    return Recipe(name or f"delta-dit-{n}", policy, passes, "arXiv 2406.01125")


_SAME = {"attn1": "attn", "attn2": "cross", "ff": "mlp", "ffn": "mlp"}


def smoothcache(schedule: Mapping[str, Sequence[int]] | str | Path, *, name: str = "smoothcache") -> Recipe:
    """SmoothCache (arXiv 2411.10510): a fixed list of computed steps for each type of branch, from a calibration.

    Args:
        schedule: {"attn": [1, 0, …], "cross": […], "mlp": […]}, 1 for computed, an entry for every step; or the path of such a
            JSON file. The names that the published files have for them (attn1, attn2, ff) are understood.
            `vdcache.calibration.step_errors(model, run).schedule(alpha)` makes one.

    Raises:
        ConfigError: no such schedule, lists of unequal length, a first step that is not computed.
    """
    data = _json(schedule) if isinstance(schedule, (str, Path)) else schedule
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"a schedule is a list of 0 and 1 for each type of branch, or the path of such a JSON file; got {data!r}"
        )
    lists = {_SAME.get(k, k): whole_numbers(v, f"the schedule of {k}") for k, v in data.items()}
    if len(lists) < len(data):
        raise ConfigError(f"a schedule has one list for each type of branch; {', '.join(data)} name one type twice")
    if not lists or any(k not in TYPES for k in lists):
        raise ConfigError(f"a schedule has a list for each of {', '.join(TYPES)}; got {', '.join(map(str, data)) or 'none'}")
    if any(set(v) - {0, 1} or not len(v) or v[0] != 1 for v in lists.values()):
        raise ConfigError("a schedule's lists hold 1 (computed) and 0 for every step, and begin with 1")
    if len(lengths := {len(v) for v in lists.values()}) > 1:
        raise ConfigError(f"the lists of a schedule are of unequal length: {sorted(lengths)}")
    passes = tuple(MarkBranches(kinds=TYPES[k], group=k, gate="pre") for k in lists)
    policies = [
        SchedulePolicy(StepList(tuple(s for s, c in enumerate(v) if c), of_steps=len(v)), (k,)) for k, v in lists.items()
    ]
    return Recipe(name, CombinedPolicy(tuple(policies)), passes, "arXiv 2411.10510")


def l2c(scores: Any, threshold: float = 0.1, *, name: str = "l2c") -> Recipe:
    """Learning-to-cache (arXiv 2406.01733): a trained table says which layers every second step may reuse.

    Args:
        scores: how much each layer matters at each step, [steps, 2 · blocks], attention and MLP of block 0, of block 1 …, rows
            from the last step to the first as the released routers count them; or the path of a released router (its parameters
            are put through a sigmoid), of which nothing but tensors is loaded.
        threshold: layers that score higher are computed.

    Raises:
        ConfigError: no such table, or an odd number of steps or layers.
    """
    if not isinstance(scores, (str, Path, Iterable)):
        raise ConfigError(f"scores is a table [steps, 2 · blocks], or the path of a released router; got {scores!r}")
    rows_in = _router(scores) if isinstance(scores, (str, Path)) else scores
    table = [numbers(row, "a row of the table of scores") for row in rows_in]
    if math.isnan(number(threshold, "threshold is a number")):
        raise ConfigError("threshold is a number; got nan")
    if len(table) < 2 or len(table) % 2 or len({len(row) for row in table}) != 1 or not len(table[0]) or len(table[0]) % 2:
        raise ConfigError("a table of scores has an even number of steps, and two columns for each block: attention and MLP")
    layers = [f"b{i // 2}.{'mlp' if i % 2 else 'attention'}" for i in range(len(table[0]))]
    rows = [
        ()
        if step % 2 == 0
        else tuple(g for g, s in zip(layers, table[len(table) - 1 - step], strict=True) if not s > threshold)
        for step in range(len(table))
    ]
    passes = (MarkBranches(gate="pre", per_block=True, expected_blocks=len(layers) // 2),)
    return Recipe(name, PlanTable(tuple(rows)), passes, "arXiv 2406.01733")


def _router(path: str | Path) -> list[list[float]]:
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{path}: no file of a router: {error}") from error
    state = loaded.get("routers", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(str(k).endswith(".prob") for k in state):
        raise ConfigError(f"{path}: a router holds a tensor 'j.prob' for every step j")
    try:
        rows = {int(str(k).split(".")[0]): v for k, v in state.items()}
    except ValueError as error:
        raise ConfigError(f"{path}: a router holds a tensor 'j.prob' for every step j, counted from 0") from error
    return [torch.sigmoid(rows[j].float()).flatten().tolist() for j in sorted(rows)]


def _json(path: str | Path) -> dict[str, Any]:
    import json

    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no JSON of a schedule: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a schedule is an object of lists")
    return data


def magcache(
    ratios: Sequence[float],
    *,
    threshold: float = 0.12,
    max_consecutive: int = 4,
    retention: float = 0.2,
    name: str = "magcache",
) -> Recipe:
    """MagCache (arXiv 2506.09045): reuse all blocks while the magnitude of what it adds is known to change little.

    Args:
        ratios: of every step, from `vdcache.calibration.magnitudes(model, run)` or `MAGCACHE_RATIOS`.
        threshold, max_consecutive, retention: `MagCache`.
    """
    policy = MagCache(numbers(ratios, "the ratios of magnitudes"), threshold, max_consecutive, retention)
    return Recipe(name, policy, (MarkBranches(), MergeSlots()), "arXiv 2506.09045")
