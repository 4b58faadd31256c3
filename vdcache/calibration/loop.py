"""The caller's own sampling, run in full and under schedules: one compiled model for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from vdcache.backends import Settings
from vdcache.backends.runner import compile_with, original
from vdcache.calibration.auto_calibrator import cost_of_reuse
from vdcache.calibration.calibration import CalibrationKey, key_of, time_of, weights_of
from vdcache.calibration.choose import ScheduleScores, psnr_of
from vdcache.calibration.schedule import Prediction, Schedule
from vdcache.calibration.tables import StepTable, StepTableBuilder
from vdcache.calibration.uncached_run import checked_prompts, until_forgotten
from vdcache.errors import CacheStateError, ConfigError
from vdcache.policies.base import Always, Policy
from vdcache.policies.weights import WeightRule
from vdcache.runtime.history import Record
from vdcache.util.checks import check_model
from vdcache.util.files import text_of, write_aside
from vdcache.util.json import from_plain

__all__ = ["SamplingLoop"]

SEEDED = 40.0  # dB that the second latent of a prompt keeps from run to run: its first step is always computed


@dataclass
class _Way:
    """The model, compiled for one order of prediction."""

    fast: Any
    given: Any
    forget: Callable[[], None]


@dataclass
class _Made:
    """One generation.

    Args:
        end: what `run` returned if it was a tensor, else the last latent that the model was given.
        starts: the first two latents.
        steps: how many it had.
    """

    end: Tensor
    starts: list[Tensor]
    steps: int


@dataclass
class _Search:
    """What a search has measured so far, and the file that keeps it, so that an interrupted one goes on where it was.

    Args:
        caller: the public function that asks, for messages.
        path: of the file; None keeps nothing.
        prompts: as the file writes them.
        weights: tells the model from others.
        key, times: of the generations.
        products: of `StepTable`, one array [steps, steps] a prompt.
        held: bytes that the recording of a generation takes.
        reuse_cost: of a reused step, as a share of a computed one.
    """

    caller: str
    path: Path | None
    prompts: list[str | int | float]
    weights: str
    key: CalibrationKey | None = None
    times: tuple[float, ...] = ()
    products: list[np.ndarray] = field(default_factory=list)
    held: int = 0
    reuse_cost: float = 0.0
    scored: ScheduleScores = field(default_factory=ScheduleScores)

    def __post_init__(self) -> None:
        self.scored.keep = lambda scored: self.save()
        if self.path is not None and self.path.exists():
            self._resume(self.path)

    def is_of(self, key: CalibrationKey) -> None:
        """The generations have this key.

        Raises:
            ConfigError: the file is of another model or of other sizes.
        """
        known = self.key
        if known is not None and (known.model, known.sizes) != (key.model, key.sizes) and self.path is not None:
            raise ConfigError(
                f"{self.caller}: {self.path} was measured with another model or other sizes ({known.sizes}, now {key.sizes}); "
                "give another path, or delete it"
            )
        self.key = key

    def save(self) -> None:
        if self.path is None:
            return
        data = {
            "vdcache search": 1,
            "prompts": self.prompts,
            "weights": self.weights,
            "key": None if self.key is None else asdict(self.key),
            "times": self.times,
            "held": self.held,
            "reuse_cost": self.reuse_cost,
            "products": [p.tolist() for p in self.products],
            "scored": [[*key, value] for key, value in self.scored.known.items()],
        }
        write_aside(self.path, json.dumps(data))

    def _resume(self, path: Path) -> None:
        try:
            data = json.loads(text_of(path))
            prompts, weights = list(data["prompts"]), str(data["weights"])
            self.products = [np.array(p) for p in data["products"]]
            # Files of earlier releases have the order alone.
            self.scored.known = {
                (tuple(c), Prediction(*(how if isinstance(how, list) else [int(how)])), int(p)): float(v)
                for c, how, p, v in data["scored"]
            }
            self.times, self.held, self.reuse_cost = tuple(data["times"]), int(data["held"]), float(data["reuse_cost"])
            self.key = from_plain(CalibrationKey | None, data["key"], "key")
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{self.caller}: {path} holds no search; give another path, or delete it") from error
        if prompts != self.prompts:
            raise ConfigError(f"{self.caller}: {path} is of the prompts {prompts}; given are {self.prompts}")
        if weights != self.weights:
            raise ConfigError(f"{self.caller}: {path} was measured with another model; give another path, or delete it")


class SamplingLoop:
    """`run(model, prompt)`, as a table of steps is measured with it and schedules are tried on it.

    Args:
        model, run, prompts: as `vdcache.profile` takes them.
        caller: the public function that asks, for messages.
        inner: compiler.
        console: where the memory is said; None says nothing.
        path: a file that keeps what was measured, so that an interrupted search goes on where it was.

    Raises:
        ConfigError: prompts is no list or is empty, or the file is of something else.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        run: Callable[..., Any],
        prompts: Iterable[Any] | None,
        caller: str,
        *,
        inner: str = "eager",
        console: Console | None = None,
        path: str | Path | None = None,
    ) -> None:
        check_model(model, caller)
        self._model, self._run, self._caller, self._inner, self._console = original(model), run, caller, inner, console
        self._given = checked_prompts(prompts, caller)
        self._ways: dict[Prediction, _Way] = {}
        self._full: dict[int, _Made] = {}  # uncached, by prompt
        self._heard: list[str] = []
        self._now: list[Tensor] = []  # latents of the generation that runs
        self._program: Any = None
        self._said = False  # how much memory it takes
        texts = [p if isinstance(p, (str, int, float)) else type(p).__name__ for p in self._given or [None]]
        weights = weights_of(self._model.parameters()) if isinstance(self._model, torch.nn.Module) else ""
        self.search = _Search(caller, None if path is None else Path(path), texts, weights)

    @property
    def prompts(self) -> int:
        return 1 if self._given is None else len(self._given)

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def table(self) -> StepTable:
        """Run every prompt uncached, and relate the steps.

        Raises:
            ConfigError: the values cannot be read, or generations of unequal length.
            CacheStateError: `run` did not call the model.
        """
        for prompt in range(self.prompts):
            if len(self.search.products) <= prompt:
                self._measure(prompt)
                self.search.save()
        if len(sizes := {len(p) for p in self.search.products}) > 1:
            raise ConfigError(
                f"{self._caller}: the generations have {sorted(sizes)} steps; search one number of steps at a time"
            )
        return StepTable(np.stack(self.search.products), self.search.held, self.search.times)

    def _measure(self, prompt: int) -> None:
        found: dict[int, StepTableBuilder] = {}
        times: dict[int, float] = {}

        def record(program: Any, inputs: Sequence[Any], results: Any, kept: dict[str, Tensor], entry: Record) -> None:
            if not program.slots:
                return
            own = found.setdefault(entry.generation, StepTableBuilder(None))
            own.add(entry.step, entry.lane, {n: kept[n] for n in program.slots if n in kept})
            if program is not self._program:
                self._program, self.search.reuse_cost = program, cost_of_reuse(way.fast.vdcache.graphs)
                self.search.is_of(key_of(program, inputs, 0))
            if entry.step not in times:
                times[entry.step] = time_of(program, inputs, entry.timestep)
            if not self._said and self._console is not None:
                self._said = True
                size = own.bytes / 2**20
                self._console.print(f"{self._caller} keeps {size:.1f} MiB a step and lane while a generation runs", style="dim")

        way = self._way(Prediction())
        way.fast.vdcache.recorder = record
        try:
            self._full[prompt] = self._sample(way, Always(), prompt, None)
        finally:
            way.fast.vdcache.recorder = None
        if not found:
            reasons = {why for g in way.fast.vdcache.graphs for r in g.guarded.refusals for why in r.reasons}
            why = "; ".join([*sorted(reasons), *self._heard]) or "no stream was found"
            raise ConfigError(f"{self._caller}: what the blocks add cannot be read: {why}")
        for own in found.values():
            self.search.held = max(self.search.held, own.bytes)
            try:
                self.search.products.append(own.products())
            except ConfigError as error:
                raise ConfigError(f"{self._caller}: {error}") from error
        self.search.times = tuple(times[s] for s in sorted(times))

    # ---- running -----------------------------------------------------------------------------------------------------

    def of(self, schedule: Schedule, prompt: int) -> Tensor:
        """What the generation of a prompt ends with under a schedule.

        Raises:
            CacheStateError: `run` gives another result for the same prompt each time.
            ConfigError: it takes another number of steps.
        """
        full = self._uncached(prompt, schedule.steps)
        policy = schedule.policy(self.search.times if len(self.search.times) == schedule.steps else ())
        made = self._sample(self._way(schedule.prediction), policy, prompt, schedule.steps, schedule.prediction.rule)
        self._same_steps(made, schedule.steps)
        if made.end.shape != full.end.shape or any(a.shape != b.shape for a, b in zip(made.starts, full.starts)):
            raise CacheStateError(
                f"{self._caller}: run gives {tuple(full.end.shape)} once and {tuple(made.end.shape)} another time; seed it, keep its sizes"
            )
        if any(psnr_of(a, b) < SEEDED for a, b in zip(made.starts, full.starts)):
            raise CacheStateError(f"{self._caller}: run gives another result for the same prompt each time: seed it")
        return made.end

    def wanted(self, prompt: int) -> Tensor:
        """What it ends with uncached."""
        return self._full[prompt].end

    def _uncached(self, prompt: int, steps: int) -> _Made:
        if prompt not in self._full:  # the table was measured before
            self._full[prompt] = self._sample(self._way(Prediction()), Always(), prompt, None)
            self._same_steps(self._full[prompt], steps)
        return self._full[prompt]

    def _same_steps(self, made: _Made, steps: int) -> None:
        if made.steps != steps:
            raise ConfigError(
                f"{self._caller}: run takes {made.steps} steps, and the table is of {steps} steps: measure one of this number"
            )

    def _sample(self, way: _Way, policy: Policy, prompt: int, steps: int | None, rule: WeightRule | None = None) -> _Made:
        session = way.fast.vdcache
        session.policy, session.prepare, session.rule = policy, lambda n: policy, rule
        self._now = []
        with torch.no_grad():
            session.begin(steps)
            made = self._run(way.given) if self._given is None else self._run(way.given, self._given[prompt])
        end = made if isinstance(made, Tensor) else (self._now[-1] if self._now else None)
        if (not len(session.history) and not self._heard) or (end is None and not self._heard):
            raise CacheStateError(
                f"{self._caller}: run(model) did not call the model that it was given: use its argument, as in "
                "`lambda model: sample(model)`"
            )
        if end is None:
            raise ConfigError(f"{self._caller}: what the blocks add cannot be read: {'; '.join(self._heard)}")
        count = 1 + max((r.step for r in session.history.generation()), default=-1)
        return _Made(end.detach().float().clone(), self._now[:2], count)

    def _way(self, prediction: Prediction) -> _Way:
        key = prediction._replace(power=0.0)  # which compiles nothing
        if key not in self._ways:
            recipe = Schedule(2, (0,), key.order, scope=key.scope).recipe()  # its plans are those of every other
            settings = Settings(recipe, inner=self._inner, on_warning=self._heard.append, on_inputs=self._take)
            fast = compile_with(self._model, settings)
            self._ways[key] = _Way(fast, *until_forgotten(fast, self._model))
        return self._ways[key]

    def _take(self, program: Any, inputs: Sequence[Any]) -> None:
        if program.inputs.latent is not None:
            self._now = [*self._now[:2], inputs[program.inputs.latent].detach().clone()]  # a sampler may write into it

    def forget(self) -> None:
        """A pipeline may hold what it was given: from here on it is the plain model."""
        for way in self._ways.values():
            way.forget()
