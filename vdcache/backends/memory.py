"""How much of a cache fits: which values a slot keeps, and where, decided before the first computed step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vdcache.passes.predictors import LAST, AnyPredictor, ByGroup
from vdcache.policies.weights import Newest, WeightRule
from vdcache.util.sizes import bytes_text

__all__ = ["CachePlan", "cache_plans", "chosen_plan", "free_bytes"]

OF_MAIN_MEMORY = 0.5  # of what is free of it, which a cache may take


@dataclass(frozen=True)
class CachePlan:
    """One way to keep the values of a recipe.

    Args:
        name: in words.
        predictor: what is substituted.
        on_host: kept in main memory between the steps, and brought back for each reused one.
        caches: whether anything is kept; where nothing is, every step is computed.
    """

    name: str
    predictor: AnyPredictor | ByGroup
    on_host: bool = False
    caches: bool = True


def cache_plans(predictor: AnyPredictor | ByGroup, *, cuda: bool) -> list[CachePlan]:
    """The ways to keep a recipe's values, the best first; each takes less of the device's memory than the one before.

    Args:
        predictor: of the recipe.
        cuda: whether there is main memory beside the device's.
    """
    most = max((p.tensors for p in _predictors(predictor)), default=1)
    found = [CachePlan("as the recipe asks", predictor)]
    fewer = [(n, _limited(predictor, n)) for n in range(most - 1, 1, -1)]
    found += [CachePlan(f"the newest {n} values of a slot", p) for n, p in fewer if p != predictor]
    if cuda:
        found.append(CachePlan("in main memory", predictor, on_host=True))
    if most > 1:
        found.append(CachePlan("the last value of a slot", _limited(predictor, 1)))
    return [*found, CachePlan("nothing: every step is computed", LAST, caches=False)]


def _predictors(predictor: AnyPredictor | ByGroup) -> list[AnyPredictor]:
    return [*(p for _, p in predictor.groups), predictor.other] if isinstance(predictor, ByGroup) else [predictor]


def _limited(predictor: AnyPredictor | ByGroup, tensors: int) -> AnyPredictor | ByGroup:
    """A predictor that keeps so many values at most. What is no weighted sum is whole or gone."""
    if isinstance(predictor, ByGroup):
        groups = tuple((group, _one(p, tensors)) for group, p in predictor.groups)
        return ByGroup(groups, _one(predictor.other, tensors))
    return _one(predictor, tensors)


def _one(predictor: AnyPredictor, tensors: int) -> AnyPredictor:
    if predictor.tensors <= tensors:
        return predictor
    return Newest(predictor, tensors) if tensors > 1 and isinstance(predictor, WeightRule) else LAST


def chosen_plan(
    plans: Sequence[CachePlan], bytes_of: Callable[[CachePlan], int | None], lanes: int, budget: int
) -> tuple[CachePlan, str]:
    """The first plan whose values fit, and what a user is told of it; "" where it is what the recipe asks for.

    Args:
        bytes_of: bytes of one lane; None where nobody knows, which counts as fitting.
        lanes: how many there are.
        budget: bytes of the device's memory.
    """
    asked = bytes_of(plans[0])
    for plan in plans:
        need = bytes_of(plan) if plan.caches else 0
        limit = _free_main_memory() if plan.on_host else budget
        if need is None or need * lanes <= limit:
            break
    if plan is plans[0] or asked is None:
        return plan, ""
    many = f" ({lanes} lanes of {bytes_text(asked)})" if lanes > 1 else ""
    kept = f", which takes {bytes_text(need * lanes)}" if plan.caches and need is not None else ""
    return plan, (
        f"the cached values of the recipe take {bytes_text(asked * lanes)}{many}, and {bytes_text(budget)} may be taken; kept is instead: "
        f"{plan.name}{kept}. cache_budget= says what may be taken; vdcache.explain(model, …, recipe=…) shows what each choice takes"
    )


def free_bytes(values: Sequence[Any]) -> int | None:
    """Bytes that are free on the CUDA device of some tensors, what torch has reserved and not given out among them; None elsewhere."""
    device = next((v.device for v in values if isinstance(v, torch.Tensor) and v.device.type != "cpu"), None)
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _free_main_memory() -> int:
    """Bytes of main memory that a cache may take."""
    try:
        return int(OF_MAIN_MEMORY * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):  # no POSIX system
        return 0
