"""What single ranks run in tests: functions of the rank, called by `tests.support.ranks`."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vdcache
import vdcache.backends.dynamo as dynamo
from tests.support.parallel import UlyssesDiT
from vdcache.demo.model import DemoConfig, DemoDiT, with_positions
from vdcache.errors import CaptureError
from vdcache.ir.ops import communicates
from vdcache.methods import adacache, teacache
from vdcache.passes import Canonicalise, MarkBranches
from vdcache.policies import EveryN

SMALL = DemoConfig(num_layers=1, num_attention_heads=4, attention_head_dim=8, ffn_dim=32)


def small(layers: int = 1) -> DemoDiT:
    """The shipped network with few weights, gates open enough that every branch matters."""
    torch.manual_seed(0)
    return DemoDiT(replace(SMALL, num_layers=layers)).eval().requires_grad_(False)


def video(size: int = 8, seed: int = 0) -> Tensor:
    """Two frames for an even number of tokens, one for an odd one."""
    return torch.randn(1, 3, 1 + (size % 8 == 0), size, size, generator=torch.Generator().manual_seed(seed))


def sample(
    model: Any, steps: int, seed: int = 0, size: int = 8, before: Callable[[int, dict[str, Any]], None] | None = None
) -> Tensor:
    """A generation by Euler's method.

    Args:
        before: may change what the model is given in a step.
    """
    x = video(size, seed)
    text = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(seed + 1))
    for step in range(steps):
        call = {"x": x, "timestep": torch.tensor([1000.0 * (1 - step / steps)]), "text": text}
        if before is not None:
            before(step, call)
        v = model(with_positions(call["x"]), call["timestep"], call["text"])
        x = x - v / steps
    return x


def spread_model(recipe: Any, steps: int, *, whole: bool = True, layers: int = 1, **options: Any) -> Any:
    return vdcache.compile(UlyssesDiT(small(layers), whole=whole), recipe, num_steps=steps, inner="eager", **options)


def agreement_of(model: Any) -> Any:
    return model.vdcache.graphs[0].agreement


def generation(rank: int, recipe: str, steps: int, size: int, layers: int = 1) -> dict[str, Any]:
    """One generation of the spread model and of the whole one, under the same recipe."""
    alone = vdcache.compile(small(layers), recipe, num_steps=steps, inner="eager", strict=True)
    spread = spread_model(recipe, steps, strict=True, layers=layers)
    wanted, found = sample(alone, steps, size=size), sample(spread, steps, size=size)

    def metrics(model: Any) -> list[float]:
        return [m.change for r in model.vdcache.history for m in (*r.measures, *r.probe)]

    return {
        "error": float((wanted - found).abs().max() / wanted.abs().max()),
        "plans": [alone.vdcache.history.computed_steps(), spread.vdcache.history.computed_steps()],
        "metrics": [metrics(alone), metrics(spread)],
        "bytes": [alone.vdcache.store.peak_bytes, spread.vdcache.store.peak_bytes],
        "exchanges": agreement_of(spread).exchanges,
    }


def collectives(rank: int, recipe: str) -> dict[str, list[int]]:
    """Exchanges in each variant, and FLOPs, where each rank returns its own tokens."""
    model = spread_model(recipe, 6, strict=True, whole=False)
    for step in range(6):
        model(with_positions(video()), torch.tensor([1000.0 - step]), torch.ones(1, 5, 32))
    (graph,) = model.vdcache.graphs
    found = {str(p): sum(map(communicates, graph.variants[p].graph.graph.nodes)) for p in graph.variants.plans}
    return {"collectives": found, "computed": model.vdcache.history.computed_steps()}


def alone_in_data(rank: int) -> list[Any]:
    """Each rank has its own model, request and number of steps: nothing is exchanged, and nobody waits."""
    model = vdcache.compile(small(), "adacache-fast", num_steps=4 + 3 * rank, inner="eager", strict=True)
    sample(model, 4 + 3 * rank, seed=rank)
    return [model.vdcache.graphs[0].agreement, bool(model.vdcache.ranks), model.vdcache.history.computed_steps()]


# ---- decisions at the edge of a threshold -----------------------------------------------------------------------------


def at_the_edge(rank: int, kind: str, seeds: list[int], steps: int = 8) -> dict[str, Any]:
    """Runs whose thresholds are one of their own metrics, or next to it. Returns every plan, and how often ranks alone would differ."""
    recipe = {"adacache": adacache([(0.2, 2), (1e9, 1)]), "teacache": teacache(0.2)}[kind]
    model = spread_model(recipe, steps)
    session = model.vdcache
    sample(model, steps)
    plans, straddled = [], 0
    own: list[list[float]] = []
    true_total = session.ranks.total

    def total(topic: str, numbers: list[float]) -> Any:
        if len(numbers) > 1:
            own.append([numbers[0] / max(numbers[1], 1e-30)])
        return true_total(topic, numbers)

    session.ranks.total = total
    for seed in seeds:
        own.clear()
        session.prepare = lambda n: recipe.policy
        sample(model, steps, seed)
        seen = [m.change for r in session.history.generation() for m in (*r.measures, *r.probe)]
        if not seen:
            continue
        at = seen[seed % len(seen)] + (0.0, 1e-7, -1e-7, 1e-6, -1e-6)[seed % 5]
        mine = own[seed % len(seen)][0] if len(own) > seed % len(seen) else at
        edge = {"adacache": adacache([(at, 3), (1e9, 1)]), "teacache": teacache(max(at, 0))}[kind].policy
        session.prepare = lambda n, edge=edge: edge
        sample(model, steps, seed)
        plans.append(session.history.computed_steps())
        straddled += mine != seen[seed % len(seen)]
    return {"plans": plans, "own metrics that differ": straddled, "apart": session.ranks.apart}


# ---- planted faults ---------------------------------------------------------------------------------------------------


def fault(rank: int, name: str, timeout: float = 5.0, steps: int = 8) -> dict[str, Any]:
    """A generation in which something is wrong on rank 1 from step 3 on, after one in which nothing is."""
    bad = rank == 1
    recipe: Any = adacache([(0.3, 3), (1e9, 1)]) if name in METRIC_FAULTS else "every-3"
    number = steps
    if bad and name == "another recipe":
        recipe = "every-2"
    if bad and name == "another number of steps":
        number = steps - 2
    if bad and name == "other branches":
        recipe = vdcache.Recipe("every-3", EveryN(3), (Canonicalise(), MarkBranches(kinds=("mlp",))))
    broken = bad and name == "no capture"
    capture = dynamo.capture
    if broken:
        dynamo.capture = _refuse
    try:
        model = spread_model(recipe, number)
        sample(model, steps)
    finally:
        dynamo.capture = capture
    session = model.vdcache
    if not broken:
        agreement_of(model).timeout = timeout
    began, said = time.monotonic(), ""
    try:
        sample(model, steps, 1, before=(lambda step, call: FAULTS[name](step, call, model)) if bad and name in FAULTS else None)
    except Exception as error:  # noqa: BLE001 — whatever it is, the test is told
        said = f"{type(error).__name__}: {error}"
    history = [] if broken else session.history.generation()
    return {
        "seconds": time.monotonic() - began,
        "error": said,
        "reused": [r.step for r in history if r.reused],
        "apart": session.ranks.apart,
        "why": sorted({r.why for r in history}),
    }


def _refuse(*_: Any) -> None:
    raise CaptureError("this rank cannot capture")


def _at(step: int) -> Callable[[Callable[..., None]], Callable[[int, dict[str, Any], Any], None]]:
    def only(do: Callable[..., None]) -> Callable[[int, dict[str, Any], Any], None]:
        return lambda at, call, model: do(call, model) if at == step else None

    return only


def _after(step: int) -> Callable[[Callable[..., None]], Callable[[int, dict[str, Any], Any], None]]:
    def since(do: Callable[..., None]) -> Callable[[int, dict[str, Any], Any], None]:
        return lambda at, call, model: do(call, model) if at >= step else None

    return since


def _metric(factor: float) -> Callable[[int, dict[str, Any], Any], None]:
    @_at(1)
    def plant(call: dict[str, Any], model: Any) -> None:
        ranks, total = model.vdcache.ranks, model.vdcache.ranks.total
        ranks.total = lambda topic, numbers: total(topic, [factor * numbers[0], *numbers[1:]] if len(numbers) else numbers)

    return plant


def _own_metric(call: dict[str, Any], model: Any) -> None:
    ranks, total = model.vdcache.ranks, model.vdcache.ranks.total

    def alone(topic: str, numbers: Any) -> Any:
        total(topic, numbers)
        return [numbers[0] * 1000, *numbers[1:]] if numbers else None

    ranks.total = alone


def _weight(call: dict[str, Any], model: Any) -> None:
    next(p for p in model.parameters() if p.dim() == 2).mul_(1.0)


def _other_weight(call: dict[str, Any], model: Any) -> None:
    module = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    module.weight = torch.nn.Parameter(module.weight.clone() * 1.5, requires_grad=False)


def _put(**values: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], Any], None]:
    def plant(call: dict[str, Any], model: Any) -> None:
        for key, change in values.items():
            call[key] = change(call[key])

    return plant


def _raise(call: dict[str, Any], model: Any) -> None:
    raise MemoryError("no memory is left on this rank")


def _raise_inside(call: dict[str, Any], model: Any) -> None:
    _after_exchange(model, lambda: (_ for _ in ()).throw(MemoryError("no memory is left on this rank")))


def _die(call: dict[str, Any], model: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_inside(call: dict[str, Any], model: Any) -> None:
    _after_exchange(model, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _after_exchange(model: Any, do: Callable[[], Any]) -> None:
    """When the ranks have agreed on the plan, and the others communicate within the model."""
    agreement, exchange = agreement_of(model), agreement_of(model).exchange

    def then(topic: str, *rest: Any) -> Any:
        found = exchange(topic, *rest)
        if topic == "plan":
            do()
        return found

    agreement.exchange = then


METRIC_FAULTS = ("a metric", "a metric that is no number", "a metric after it was agreed", "nothing to compare with")
FAULTS: dict[str, Callable[[int, dict[str, Any], Any], None]] = {
    "a metric": _metric(3.0),
    "a metric that is no number": _metric(math.nan),
    "a metric after it was agreed": _at(1)(_own_metric),
    "nothing to compare with": _at(2)(lambda call, model: model.vdcache.store.drop()),
    "nothing is stored": _at(4)(lambda call, model: model.vdcache.store.drop()),
    "a generation that ends": _at(4)(lambda call, model: model.vdcache.end()),
    "a session that is reset": _at(4)(lambda call, model: model.vdcache.reset()),
    "a lane's name": _at(4)(lambda call, model: model.vdcache.lane("other")),
    "a weight that is written": _at(4)(_weight),
    "another weight": _at(4)(_other_weight),
    "another object for the prompt": _after(2)(_put(text=Tensor.clone)),
    "another prompt": _at(4)(_put(text=lambda text: text + 1)),
    "a latent that is no number": _at(3)(_put(x=lambda x: x * math.nan)),
    "a clock that stands": _at(4)(_put(timestep=lambda t: t + 125.0)),
    "a clock that jumps back": _after(4)(_put(timestep=lambda t: t + 500.0)),
    "a rank that is late": _at(4)(lambda call, model: time.sleep(1.0)),
    "a rank that hangs": _at(4)(lambda call, model: time.sleep(9.0)),
    "an error before the call": _at(4)(_raise),
    "an error within the call": _at(4)(_raise_inside),
    "killed before the call": _at(4)(_die),
    "killed within the call": _at(4)(_die_inside),
}
OTHER_FAULTS = (
    "another recipe",
    "another number of steps",
    "other branches",
    "no capture",
)  # that are there from the beginning
ENDS = (
    "a rank that hangs",
    "an error before the call",
    "an error within the call",
    "killed before the call",
    "killed within the call",
)


# ---- calibration -------------------------------------------------------------------------------------------------------


def calibrated(rank: int, folder: str, steps: int) -> dict[str, Any]:
    """Four generations of `vdcache-auto`, each rank with its own folder of calibrations."""
    os.environ["VDCACHE_CACHE_DIR"] = folder + str(rank)
    spread = vdcache.compile(UlyssesDiT(small()), speedup=2, num_steps=steps, inner="eager", search_share=math.inf)
    plans = []
    for seed in range(4):
        sample(spread, steps, seed=seed)
        plans.append(spread.vdcache.history.computed_steps())
    found = spread.vdcache.calibration
    return {
        "plans": plans,
        "schedule": None if found is None else str(found.schedule),
        "tentative": None if found is None else found.tentative,
        "tried": [] if found is None else [(t.computed, t.psnr) for t in found.tried],
        "files": sorted(p.name for p in Path(folder + str(rank)).rglob("*.json")),
        "apart": spread.vdcache.ranks.apart,
    }
