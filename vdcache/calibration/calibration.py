"""What a calibration found, and where it is kept: one file for each model, solver, number of steps, size and goal."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vdcache
from vdcache.calibration import calibration_figure
from vdcache.calibration.choose import ScheduleScores
from vdcache.calibration.schedule import Prediction, Schedule, candidates_up_to
from vdcache.calibration.tables import StepTable
from vdcache.errors import ConfigError
from vdcache.policies.goal import Goal
from vdcache.policies.scheduled import same_times
from vdcache.runtime.read import read
from vdcache.util.checks import number, whole
from vdcache.util.files import cache_folder, write_aside
from vdcache.util.json import read_json, write_json

__all__ = [
    "Calibration",
    "CalibrationKey",
    "as_real",
    "find",
    "folder",
    "keep",
    "key_of",
    "of_other_sizes",
    "time_of",
    "weights_of",
]


@dataclass(frozen=True)
class CalibrationKey:
    """What a calibration holds for.

    Args:
        model: a digest of the graph, the forms of its parameters and some of their numbers.
        steps: of a generation.
        sizes: shapes and types of what the model is given.
        times: timesteps of the generation; empty where they are not known.
        latent: shape and type of the latent, which `sizes` has too; "" where nobody knows it.

    Raises:
        ConfigError: timesteps that are none, or not one a step.
    """

    model: str
    steps: int
    sizes: str
    times: tuple[float, ...] = ()
    latent: str = ""

    def __post_init__(self) -> None:
        whole(self.steps, "the number of steps that a calibration is for")
        object.__setattr__(self, "times", tuple(number(t, "a timestep is a number") for t in self.times))

    def is_like(self, other: CalibrationKey) -> bool:
        """Whether both are for one model, number of steps and sizes, and for the same timesteps as far as both know them."""
        same = (self.model, self.steps, self.sizes) == (other.model, other.steps, other.sizes)
        return same and same_times(self.times, other.times)

    def apart(self, other: CalibrationKey) -> float:
        """How far the sizes of two keys of one model, number of steps and timesteps are apart: 0 where the latents are of one form, the logarithm
        of the ratio of their elements where they have as many dimensions and one type; else, or where nobody knows, infinity."""
        if self.model != other.model or self.steps != other.steps or not same_times(self.times, other.times):
            return math.inf
        (a, kind), (b, other_kind) = _form(self.latent), _form(other.latent)
        if not a or not b or len(a) != len(b) or kind != other_kind:
            return math.inf
        return 0.0 if a == b else max(abs(math.log(math.prod(a) / math.prod(b))), 1e-9)


def _form(text: str) -> tuple[list[int], str]:
    shape, _, kind = text.partition(":")
    sizes = shape.split("×")
    return ([max(1, int(n)) for n in sizes] if all(n.isascii() and n.isdigit() for n in sizes) else []), kind


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
        tentative: the search for a better one is not over.
        searches: how many sessions have begun one.
        versions: of vdcache and torch.
        path: the file that it is kept in, where it was read from one or written to one; deleting it makes vdcache calibrate anew.
    """

    key: CalibrationKey
    goal: Goal
    schedule: Schedule
    products: tuple[tuple[tuple[float, ...], ...], ...] = field(default=(), repr=False)
    tried: tuple[Schedule, ...] = ()
    reuse_cost: float = 0.0
    seconds: float = 0.0
    note: str = ""
    tentative: bool = False
    searches: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    path: Path | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        number(self.seconds, "the seconds of a calibration are a number")
        if not 0 <= number(self.reuse_cost, "the cost of a reused step is a share") <= 1 or not isinstance(self.note, str):
            raise ConfigError(
                f"a calibration has a cost of reuse from 0 to 1 and a note; got {self.reuse_cost} and {self.note!r}"
            )
        if self.key.steps != self.schedule.steps or len(self.key.times) not in (0, self.key.steps):
            raise ConfigError(
                f"a calibration for {self.key.steps} steps has a schedule of as many and a timestep for each, or none; got "
                f"{self.schedule.steps} and {len(self.key.times)}"
            )
        n = self.key.steps
        if self.tentative and not (self.products and all([len(row) for row in own] == [n] * n for own in self.products)):
            raise ConfigError(f"a search goes on from a table of {n} × {n} steps, and this calibration has none")

    @staticmethod
    def of(
        key: CalibrationKey,
        goal: Goal,
        schedule: Schedule,
        table: StepTable,
        scored: ScheduleScores,
        *,
        reuse_cost: float,
        began: float,
        note: str = "",
        tentative: bool = False,
        searches: int = 1,
    ) -> Calibration:
        """What a search found that began at `time.perf_counter() == began`."""
        return Calibration(
            key=key,
            goal=goal,
            schedule=schedule,
            products=tuple(tuple(map(tuple, g)) for g in table.products.tolist()),
            tried=_tried(scored, table.steps),
            reuse_cost=reuse_cost,
            seconds=time.perf_counter() - began,
            note=note,
            tentative=tentative,
            searches=searches,
            versions={"vdcache": vdcache.__version__, "torch": torch.__version__},
        )

    @property
    def table(self) -> StepTable:
        """The measured table of steps."""
        return StepTable(np.array(self.products), times=self.key.times)

    @property
    def speedup(self) -> float:
        """Of a generation, by FLOPs of the model."""
        n, m = self.schedule.steps, len(self.schedule.computed)
        return n / (m + (n - m) * self.reuse_cost)

    def front(self) -> list[tuple[int, float]]:
        """For every number of computed steps the least predicted error, in dB below the value that is predicted."""
        n = self.schedule.steps
        ranked = candidates_up_to(self.table, max(1, n - 1), [self.schedule.prediction])
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
        return calibration_figure.draw(self, path)

    def to_json(self, path: str | Path | None = None) -> str:
        """The calibration as JSON text, also written to `path`."""
        return write_json(self, path, without=["path"])  # a copy of the file lies elsewhere

    @staticmethod
    def from_json(text: str | Path) -> Calibration:
        """What `to_json` wrote: text, or the path of a file.

        Raises:
            ConfigError: something else.
        """
        found = read_json(Calibration, text, "calibration")
        return replace(found, path=text if isinstance(text, Path) else None)


def folder() -> Path:
    """Where calibrations are kept."""
    return cache_folder() / "schedules"


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _stem(key: CalibrationKey, goal: Goal) -> str:
    return f"{key.model}-{key.steps}-{_digest(key.sizes, str(goal))}"


def keep(found: Calibration) -> Path:
    """Write a calibration where `find` looks; one for other timesteps stays beside it."""
    path = folder() / f"{_stem(found.key, found.goal)}-{_digest([f'{t:.4g}' for t in found.key.times])}.json"
    write_aside(path, found.to_json())
    return path


def find(key: CalibrationKey, goal: Goal) -> Calibration | None:
    """The newest calibration for this model, number of steps, sizes and goal, whose timesteps begin as those of `key`."""
    return next((one for one in _read(f"{_stem(key, goal)}-*.json", goal) if one.key.is_like(key)), None)


def of_other_sizes(key: CalibrationKey, goal: Goal) -> list[Calibration]:
    """What is kept for this model, number of steps and goal at other sizes, and for timesteps that begin as those of `key`."""
    found = _read(f"{key.model}-{key.steps}-*.json", goal)
    return [one for one in found if one.key.apart(key) < math.inf and one.key.sizes != key.sizes]


def _read(pattern: str, goal: Goal) -> list[Calibration]:
    """The calibrations in files of such names, the newest first."""
    known = []
    for path in folder().glob(pattern):
        try:
            one, when = Calibration.from_json(path), path.stat().st_mtime
        except (ConfigError, OSError, RecursionError):
            continue  # of another version, or half gone: it is measured again
        if one.goal == goal:
            known.append((when, one))
    return [one for _, one in sorted(known, key=lambda k: -k[0])]


def key_of(program: Any, inputs: Sequence[Any], steps: int) -> CalibrationKey:
    """What a calibration of this graph, with these parameters and sizes, holds for; the timesteps come later."""

    def form(value: Tensor) -> str:
        return f"{'×'.join(map(str, value.shape))}:{str(value.dtype).removeprefix('torch.')}"

    sizes = " ".join(form(inputs[i]) for i in program.inputs.activations if isinstance(inputs[i], Tensor))
    params = [inputs[i] for i in program.inputs.static if isinstance(inputs[i], Tensor)]
    at = program.inputs.latent
    latent = "" if at is None else form(inputs[at])
    return CalibrationKey(
        _digest(program.guarded.structure, program.guarded.constants, weights_of(params)), steps, sizes, latent=latent
    )


def weights_of(params: Iterable[Tensor]) -> str:
    """A digest of parameters: the form of each, its first number and its last."""
    params = [p.detach() for p in params]
    some = [p[(at,) * p.dim()] for p in params if p.numel() and not p.is_meta for at in (0, -1)]
    numbers, _ = read([as_real(s).float() for s in some])
    return _digest([(tuple(p.shape), str(p.dtype)) for p in params], numbers)


def as_real(value: Tensor) -> Tensor:
    """Complex numbers (rotary tables) as both their parts; others as they are."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def time_of(program: Any, inputs: Sequence[Any], timestep: float | None) -> float:
    """The timestep of a call: of the session's, or read where the caller announces the steps."""
    if timestep is not None:
        return timestep
    value = next((inputs[i] for i in program.inputs.timesteps), 0.0)
    return max(read([value])[0][0]) if isinstance(value, Tensor) else float(value)


def _tried(scored: ScheduleScores, steps: int) -> tuple[Schedule, ...]:
    """Every schedule that was run, with its mean PSNR."""
    by: dict[tuple[tuple[int, ...], Prediction], list[float]] = {}
    for (computed, prediction, _), psnr in scored.known.items():
        by.setdefault((computed, prediction), []).append(psnr)
    return tuple(
        Schedule.of(steps, computed, p, psnr=float(np.mean(v)) if np.isfinite(v).all() else None)
        for (computed, p), v in by.items()
    )
