"""What a calibration found, and where it is kept: one file for each model, solver, number of steps, size and goal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdcache.ir.errors import ConfigError
from vdcache.ir.files import cache_folder, saved, text_of, write_aside
from vdcache.runtime.schedules import same_times
from vdcache.scheduling.choose import Goal
from vdcache.scheduling.schedule import Schedule, candidates_up_to
from vdcache.scheduling.table import StepTable

__all__ = ["Calibration", "Key", "find", "folder", "keep", "key_of", "solver_of", "versions"]

SAMPLED = 8  # parameters, and as many numbers of each, that tell one model from another of the same form


@dataclass(frozen=True)
class Key:
    """What a calibration holds for.

    Args:
        model: a digest of the graph, the forms of its parameters and some of their numbers.
        steps: of a generation.
        sizes: shapes and types of what the model is given.
        times: timesteps of the generation; empty where they are not known.
        solver: a digest of the sampler's updates; empty where they could not be told.
    """

    model: str
    steps: int
    sizes: str
    times: tuple[float, ...] = ()
    solver: str = ""


@dataclass(frozen=True)
class Calibration:
    """A schedule, what it was chosen for, and what was measured on the way.

    Args:
        key: what it holds for.
        goal: what was asked.
        schedule: what was chosen; its `psnr` is over the generations of the calibration.
        products: of `StepTable`.
        tried: every schedule that was run, with its mean PSNR; not all were run on every prompt.
        reuse_cost: of a reused step, as a share of a computed one, by FLOPs.
        seconds: what the search took, after the uncached generations.
        note: what could not be done.
        versions: of vdcache and torch.
    """

    key: Key
    goal: Goal
    schedule: Schedule
    products: tuple[tuple[tuple[float, ...], ...], ...] = ()
    tried: tuple[Schedule, ...] = ()
    reuse_cost: float = 0.0
    seconds: float = 0.0
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> StepTable:
        """The measured table of steps."""
        return StepTable(np.array(self.products))

    @property
    def speedup(self) -> float:
        """Of a generation, by FLOPs of the model."""
        n, m = self.schedule.steps, len(self.schedule.computed)
        return n / (m + (n - m) * self.reuse_cost)

    def front(self) -> list[tuple[int, float]]:
        """For every number of computed steps the least predicted error, in dB below the value that is predicted."""
        n = self.schedule.steps
        ranked = candidates_up_to(self.table, max(1, n - 1), [self.schedule.order])
        found = [(c, own[0].error / max(1, n - c)) for c, own in enumerate(ranked, start=1)]
        return [(c, -20 * float(np.log10(max(e, 1e-9)))) for c, e in found]

    def __str__(self) -> str:
        s = self.schedule
        lines = [f"{s}", f"for {self.goal}: {self.speedup:.2f}× by FLOPs; {self.key.steps} steps of {self.key.sizes}"]
        if self.tried:
            lines.append(f"{len(self.tried)} schedules were run in {self.seconds:.0f} s")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)

    def draw(self, path: str | Path | None = None) -> Any:
        """A picture: the error of each step predicted from each other, the chosen steps, quality against computed steps.

        Args:
            path: where it goes; its ending names the format. Without, the matplotlib figure is returned.
        """
        from vdcache.scheduling.figure import draw

        return draw(self, path)

    def to_json(self, path: str | Path | None = None) -> str:
        """The calibration as JSON text, also written to `path`."""
        return saved(json.dumps(asdict(self), indent=None), path)

    @staticmethod
    def from_json(text: str | Path) -> Calibration:
        """What `to_json` wrote: text, or the path of a file.

        Raises:
            ConfigError: something else.
        """
        try:
            data = json.loads(text_of(text))
            key = {**data.pop("key")}
            key["times"] = tuple(key["times"])
            data["key"], data["goal"], data["schedule"] = Key(**key), Goal(**data["goal"]), Schedule(**data["schedule"])
            data["tried"] = tuple(Schedule(**s) for s in data["tried"])
            data["products"] = tuple(tuple(map(tuple, g)) for g in data["products"])
            return Calibration(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError("this is no calibration: it was not written by Calibration.to_json") from error


def folder() -> Path:
    """Where calibrations are kept."""
    return cache_folder() / "schedules"


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _stem(key: Key, goal: Goal) -> str:
    return f"{key.model}-{key.steps}-{_digest(key.sizes, str(goal))}"


def keep(found: Calibration) -> Path:
    """Write a calibration where `find` looks; one of another solver stays beside it."""
    path = folder() / f"{_stem(found.key, found.goal)}-{_digest(found.key.times, found.key.solver)}.json"
    write_aside(path, found.to_json())
    return path


def find(key: Key, goal: Goal, without: Iterable[Key] = ()) -> Calibration | None:
    """The newest calibration for this model, number of steps, sizes and goal, whose timesteps begin as `key` says.

    Args:
        without: keys that turned out not to hold.
    """
    known = []
    for path in folder().glob(f"{_stem(key, goal)}-*.json"):
        try:
            one = Calibration.from_json(path)
        except (ConfigError, OSError):
            continue  # of another version, or half gone: it is measured again
        fits = one.key.sizes == key.sizes and one.goal == goal and one.schedule.steps == key.steps
        if fits and same_times(one.key.times, key.times) and one.key not in set(without):
            known.append((path.stat().st_mtime, one))
    return max(known, key=lambda k: k[0])[1] if known else None


def key_of(program: Any, inputs: Sequence[Any], steps: int) -> Key:
    """What a calibration of this graph, with these parameters and sizes, holds for."""
    params = [inputs[i] for i in program.static if isinstance(inputs[i], Tensor)]
    forms = [(tuple(p.shape), str(p.dtype)) for p in params]
    some = [p for p in params if p.is_floating_point()][:: max(1, len(params) // SAMPLED)][:SAMPLED]
    numbers = [p.detach().reshape(-1)[:SAMPLED].double().cpu().tolist() for p in some]
    targets = [n.target for n in program.guarded.graph.nodes if n.op == "call_function"]
    nodes = [str(t) if isinstance(t, torch._ops.OpOverload) else getattr(t, "__name__", "") for t in targets]
    sizes = " ".join(
        f"{'×'.join(map(str, v.shape))}:{str(v.dtype).removeprefix('torch.')}" if isinstance(v, Tensor) else type(v).__name__
        for v in (inputs[i] for i in program.activations)
    )
    return Key(_digest(nodes, forms, numbers), steps, sizes)


def solver_of(updates: Sequence[Sequence[float]]) -> str:
    """A digest of a sampler's updates: their weights, roughly."""
    return _digest([[round(w, 2) + 0.0 for w in u] for u in updates])


def versions() -> dict[str, str]:
    import vdcache

    return {"vdcache": vdcache.__version__, "torch": torch.__version__}
