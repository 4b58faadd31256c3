"""`vdcache.calibrate`: the thresholds, rates or steps of a recipe for a model that nobody tuned it on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from vdcache.calibration.auto_calibrator import CACHED, cost_of_reuse
from vdcache.calibration.branch_errors import magnitudes
from vdcache.calibration.calibration import Calibration, keep
from vdcache.calibration.choose import choose
from vdcache.calibration.loop import SamplingLoop
from vdcache.calibration.metric_log import MetricLog, MetricRecorder, replayed
from vdcache.calibration.schedule_search import progress
from vdcache.calibration.uncached_run import watch
from vdcache.errors import ConfigError, warn
from vdcache.methods import for_goal
from vdcache.methods import recipe as recipe_of
from vdcache.methods.recipe import Recipe
from vdcache.policies.adacache import AdaCache, Codebook
from vdcache.policies.goal import Goal
from vdcache.policies.metrics import MetricValue
from vdcache.policies.scheduled import MagCache
from vdcache.runtime.history import Record
from vdcache.util.checks import whole_numbers
from vdcache.util.files import saved, text_of

__all__ = ["Expected", "Thresholds", "calibrate"]

RATES = ((6, 5, 4, 3, 2, 1), (3, 2, 1, 1, 1, 1))  # AdaCache-fast and -slow; any others do
HALVINGS = 40


@dataclass(frozen=True)
class Expected:
    """The share of steps that a recipe is expected to compute.

    Args:
        mean, low, high: over prompts.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.0%} of the steps computed ({self.low:.0%} to {self.high:.0%} over prompts)"


@dataclass(frozen=True)
class Thresholds:
    """What a recipe measures on this model when nothing is skipped; from it follow its thresholds, for any rates or speed.

    Args:
        base: the recipe.
        seen: one for each generation.
        reuse_cost: of a reused step, as a share of a computed one, by FLOPs.
    """

    base: Recipe
    seen: tuple[MetricLog, ...]
    reuse_cost: float = 0.0

    @property
    def steps(self) -> int:
        """Of a generation."""
        return self.seen[0].steps

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest change from one step to the next, uncached (arXiv 2411.02397, supplement A.2, ii)."""
        changes = [c for s in self.seen for c in s.changes()]
        if not changes:
            raise ConfigError(f"'{self.base.name}' measures nothing: its steps follow from numbers that are known before")
        return min(changes), max(changes)

    def codebook(self, rates: Sequence[int] = RATES[0]) -> Codebook:
        """The range, split uniformly, with a rate for each part (A.2, iii); the first rate is for the smallest changes.

        Raises:
            ConfigError: no rate, or one below 1.
        """
        rates = whole_numbers(rates, "rates")
        low, high = self.range
        if not low < high and len(rates) > 1:
            raise ConfigError(
                f"every change that was measured is {low:.3g}, so there is no range to split over {len(rates)} rates; calibrate with more steps or "
                "prompts"
            )
        return Codebook(tuple((low + (high - low) * (i + 1) / len(rates), r) for i, r in enumerate(rates)))

    def with_rates(self, *rates: int) -> Recipe:
        """The recipe with such rates: fewer, larger ones are faster (A.2, iv). Needs no further measurement.

        Raises:
            ConfigError: a recipe without a codebook, no rate, or one below 1.
        """
        policy = self.base.policy
        if not isinstance(policy, AdaCache):
            raise ConfigError(f"'{self.base.name}' has no codebook of rates; it has a threshold: for_speedup(…) finds one")
        name = f"{self.base.name}-calibrated"
        return replace(self.base, name=name, policy=replace(policy, codebook=self.codebook(rates)), books=())

    def expected(self, recipe: Recipe | None = None) -> Expected:
        """What a recipe with the same scope would compute, by replaying its policy on what was measured.

        Args:
            recipe: the calibrated one, or any that measures the same; the recipe as it was given if left out.

        Raises:
            ConfigError: it measures something else.
        """
        recipe = (recipe or self.base).for_steps(self.steps)
        if recipe.passes != self.base.passes:
            raise ConfigError(f"'{recipe.name}' measures something else than '{self.base.name}', which was calibrated")
        shares = []
        for seen in self.seen:
            plans = replayed(recipe.policy, seen)
            most = max(len(p.reuse) for p in recipe.policy.plans())
            shares.append(sum(len(p.reuse) < most for p in plans) / len(plans))
        return Expected(mean(shares), min(shares), max(shares))

    def for_speedup(self, speedup: float) -> Recipe:
        """The recipe with the threshold at which a generation is expected to be so many times faster, by FLOPs.

        Raises:
            ConfigError: a recipe without a threshold, or a speed that none reaches, with the best that one does.
        """
        policy = self.base.policy
        if not is_dataclass(policy) or "threshold" not in {f.name for f in fields(policy)}:
            hint = "with_rates(…) sets its rates" if isinstance(policy, AdaCache) else "it has nothing to choose"
            raise ConfigError(f"'{self.base.name}' has no single threshold: {hint}")
        goal = Goal(speedup=speedup)
        share = goal.count(self.steps, self.reuse_cost) / self.steps

        def at(threshold: float) -> Recipe:
            name = f"{self.base.name}-calibrated"
            return replace(self.base, name=name, policy=replace(policy, threshold=threshold))  # type: ignore[type-var]

        low, high = 0.0, 1.0
        while self.expected(at(high)).mean > share and high < 1e6:
            high *= 4
        if (best := self.expected(at(high)).mean) > share:
            fastest = 1 / (best + (1 - best) * self.reuse_cost)
            raise ConfigError(
                f"no threshold makes '{self.base.name}' {speedup:g} times faster; its bounds allow {fastest:.2f} times"
            )
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.expected(at(middle)).mean <= share else (middle, high)
        return at(high)

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False, title_justify="left", caption_justify="left")
        table.title = f"{self.base.name}: {len(self.seen)} generations of {self.steps} steps"
        for name in ("with", "computed", "over prompts", "speed"):
            table.add_column(name, justify="left" if name == "with" else "right")
        for text, made in self._choices():
            share = self.expected(made)
            speed = 1 / (share.mean + (1 - share.mean) * self.reuse_cost)
            table.add_row(text, f"{share.mean:.0%}", f"{share.low:.0%} to {share.high:.0%}", f"{speed:.2f}×")
        if any(s.pairs for s in self.seen):
            table.caption = f"changes from step to step: {self.range[0]:.3g} to {self.range[1]:.3g}"
        return table

    def _choices(self) -> Iterable[tuple[str, Recipe]]:
        if isinstance(self.base.policy, AdaCache):
            for rates in RATES:
                made = self.with_rates(*rates)
                yield str(self.codebook(rates)), made
            return
        yield "as given", self.base
        for speedup in (1.5, 2.0, 3.0):
            try:
                made = self.for_speedup(speedup)
            except ConfigError:
                continue
            yield f"threshold {made.policy.threshold:.4g}", made  # type: ignore[attr-defined]

    def __str__(self) -> str:
        console = Console(width=110, force_terminal=False)
        with console.capture() as out:
            console.print(self)
        return "\n".join(line.rstrip() for line in out.get().rstrip().splitlines())

    def to_json(self, path: str | Path | None = None) -> str:
        """What was measured as JSON text, also written to `path`."""
        seen = [
            {
                **asdict(replace(s, pairs={})),
                "pairs": {n: [[*at, asdict(m)] for at, m in own.items()] for n, own in s.pairs.items()},
            }
            for s in self.seen
        ]
        data = {"recipe": json.loads(self.base.to_json()), "reuse_cost": self.reuse_cost, "seen": seen}
        return saved(json.dumps(data), path)

    @staticmethod
    def from_json(text: str | Path) -> Thresholds:
        """What `to_json` wrote: text, or the path of a file.

        Raises:
            ConfigError: something else.
        """
        try:
            data = json.loads(text_of(text))
            seen = tuple(
                MetricLog(
                    s["steps"],
                    tuple(s["times"]),
                    {n: {(a, b): MetricValue(**m) for a, b, m in own} for n, own in s["pairs"].items()},
                    s["probes"],
                )
                for s in data["seen"]
            )
            return Thresholds(Recipe.from_json(json.dumps(data["recipe"])), seen, float(data["reuse_cost"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError("this holds no thresholds: it was not written by Thresholds.to_json") from error


def calibrate(
    model: Callable[..., Any],
    run: Callable[..., Any],
    recipe: str | Recipe | None = None,
    *,
    prompts: Iterable[Any] | None = None,
    speedup: float | None = None,
    quality_db: float | None = None,
    inner: str = "inductor",
    path: str | Path | None = None,
    console: Console | None = None,
) -> Calibration | Thresholds:
    """Measure what a recipe needs to know of this model, with this solver, number of steps and size.

        vdcache.calibrate(model, lambda m, p: sample(m, p), prompts=["a cat", "a dog"], speedup=2.0)
        fast = vdcache.compile(model, speedup=2.0)      # knows it from now on, in every process

        found = vdcache.calibrate(model, lambda m, p: sample(m, p), "adacache-fast", prompts=["a cat", "a dog"])
        print(found)                                    # rates, and what they are expected to compute
        fast = vdcache.compile(model, found.with_rates(6, 5, 4, 3, 2, 1))

    Args:
        model, run, prompts: as `vdcache.profile` takes them. For `vdcache-auto`, `run` must give the same result for the same
            prompt: seed it.
        recipe: `vdcache-auto` if left out, or one with thresholds: AdaCache, first-block caches, TeaCache, SeaCache, EasyCache,
            MagCache (whose ratios are measured as well).
        speedup, quality_db: of `vdcache-auto`; twice as fast if neither is given.
        inner: compiler.
        path: for `vdcache-auto`, a file that keeps what was measured: an interrupted calibration goes on where it was.
        console: where progress is shown.

    Returns a `Calibration` (kept on disk for `vdcache.compile`) for `vdcache-auto`, at the cost of at most three uncached
    generations a prompt; `Thresholds` for others, at the cost of one.

    Raises:
        ConfigError: a recipe with nothing to calibrate, a goal that is out of reach (the message gives the best that is not), values
            that cannot be read.
        CacheStateError: `run` did not call the model, or gives another result each time.
    """
    chosen = recipe_of(recipe)
    console = console or Console(stderr=True)
    if chosen.goal is not None:
        goal = for_goal(chosen, speedup, quality_db).goal or chosen.goal
        return _schedule(model, run, prompts, goal, inner, path, console)
    if speedup is not None or quality_db is not None:
        raise ConfigError(f"'{chosen.name}' is calibrated for any speed at once: leave out the goal, and ask what comes back")
    if path is not None:
        raise ConfigError(
            f"'{chosen.name}' is calibrated in one go, and path is for vdcache-auto: to_json keeps what comes back"
        )
    if isinstance(chosen.policy, MagCache):
        ratios = magnitudes(model, run, prompts=prompts, inner=inner)
        base = replace(chosen, name="magcache", policy=replace(chosen.policy, ratios=ratios))
        return Thresholds(base, (MetricLog(len(ratios), (), {}, {}),))
    return _thresholds(model, run, prompts, chosen, inner)


def _schedule(
    model: Any, run: Any, prompts: Any, goal: Goal, inner: str, path: str | Path | None, console: Console
) -> Calibration:
    loop = SamplingLoop(model, run, prompts, "calibrate", inner=inner, console=console, path=path)
    began = time.perf_counter()
    try:
        with progress(console, loop):
            table = loop.table()
            schedule = choose(
                table, loop, goal, predictions=CACHED, reuse_cost=loop.search.reuse_cost, scored=loop.search.scored
            )
    finally:
        loop.forget()
    done = loop.search
    assert done.key is not None
    key = replace(done.key, steps=table.steps, times=done.times)
    found = Calibration.of(key, goal, schedule, table, done.scored, reuse_cost=done.reuse_cost, began=began)
    try:
        return replace(found, path=keep(found))
    except OSError as error:
        warn(
            f"vdcache: the calibration is not kept for vdcache.compile to find: {error}; its to_json(path) writes it elsewhere"
        )
        return found


def _thresholds(model: Any, run: Any, prompts: Any, chosen: Recipe, inner: str) -> Thresholds:
    found: dict[int, MetricRecorder] = {}
    times: dict[int, dict[int, float]] = {}
    program: Any = None

    def record(graph: Any, inputs: Sequence[Any], results: Any, kept: dict[str, Tensor], entry: Record) -> None:
        nonlocal program
        if not graph.slots:
            return
        program = graph
        plan = graph.variants.plans[0]
        own = found.setdefault(entry.generation, MetricRecorder())
        own.add(entry.lane, kept, graph.needs(plan).layouts, graph.probes)
        if entry.timestep is not None:
            times.setdefault(entry.generation, {})[entry.step] = entry.timestep

    watched = watch(model, run, prompts, "calibrate", recipe=chosen, inner=inner, recorder=record)
    if not any(w.bytes for w in found.values()):
        why = "; ".join(watched.reasons) if program is None else ""
        raise ConfigError(
            f"'{chosen.name}' measures nothing on this model, so it has no threshold to calibrate" + (f": {why}" if why else "")
        )
    seen = tuple(w.measures([t for _, t in sorted(times.get(g, {}).items())]) for g, w in found.items())
    if len(sizes := {s.steps for s in seen}) > 1:
        raise ConfigError(f"calibrate: the generations have {sorted(sizes)} steps; calibrate one number of steps at a time")
    return Thresholds(chosen, seen, cost_of_reuse(watched.session.graphs))
