"""Which steps to compute on this model, with this solver and number of steps: found from one uncached run a prompt."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from vdcache.api import compile_with, original
from vdcache.backends import Settings
from vdcache.ir.checks import number, whole, whole_numbers
from vdcache.ir.errors import CacheStateError, ConfigError
from vdcache.ir.files import saved, text_of
from vdcache.passes import Emit, MarkBranches, MergeSlots
from vdcache.passes.predictors import LAST, Taylor
from vdcache.profiling.paths import best_paths, cost_of
from vdcache.profiling.watched import checked_prompts, until_forgotten, watch
from vdcache.recipe import Recipe
from vdcache.runtime.history import Record
from vdcache.runtime.schedules import Planned
from vdcache.runtime.session import Emitted

__all__ = ["Schedule", "search_schedule", "step_table"]

ORDERS = (0, 1)  # orders above do worse than these: they amplify what the solver does between steps
EARLY = (1.0, 2.0, 5.0)  # how many times more an error of the first step counts than one of the last


@dataclass(frozen=True)
class Schedule:
    """The computed steps of a generation, known before it runs: no metric, no sync, nothing but the clock.

    Args:
        steps: of a generation.
        computed: which are computed; the others are predicted.
        order: of the Taylor expansion that predicts them; 0 for the last value.
        error: relative error of the predicted values, summed over the skipped steps.
        psnr: of the final latents against the uncached ones, in dB of their range, where it was measured; over the prompts of the search.
    """

    steps: int
    computed: tuple[int, ...]
    order: int = 1
    error: float = 0.0
    psnr: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "computed", whole_numbers(self.computed, "the computed steps of a schedule"))
        whole(self.steps, "the number of steps of a schedule", 1)
        whole(self.order, "the order of a schedule's predictor")
        if not self.computed or self.computed[0] != 0 or list(self.computed) != sorted(set(self.computed)):
            raise ConfigError(f"a schedule computes step 0, and its steps ascend; got {list(self.computed)}")
        if self.computed[-1] >= self.steps:
            raise ConfigError(f"a schedule of {self.steps} steps has no step {self.computed[-1]} (counted from 0)")

    def recipe(self, name: str = "") -> Recipe:
        """The schedule as a recipe: the stream's whole difference, predicted. Other numbers of steps are refused."""
        rows = tuple(() if s in self.computed else ("all",) for s in range(self.steps))
        predictor = Taylor(self.order) if self.order else LAST
        name = name or f"schedule-{len(self.computed)}-of-{self.steps}"
        return Recipe(name, Planned(rows), (MarkBranches(), MergeSlots()), predictor=predictor)

    def diff(self, other: Schedule) -> str:
        """Both schedules, one under the other, and where they differ.

        Raises:
            ConfigError: they are for different numbers of steps.
        """
        if self.steps != other.steps:
            raise ConfigError(f"schedules of {self.steps} and {other.steps} steps cannot be compared step by step")
        marks = "".join("^" if (s in self.computed) != (s in other.computed) else " " for s in range(self.steps))
        return f"{self._row()}\n{other._row()}\n{marks.rstrip()}".rstrip()

    def _row(self) -> str:
        return "".join("█" if s in self.computed else "·" for s in range(self.steps))

    def __str__(self) -> str:
        psnr = f", {self.psnr:.1f} dB" if self.psnr is not None else ""
        return f"{self._row()}  {len(self.computed)} of {self.steps} steps, order {self.order}, error {self.error:.3g}{psnr}"

    def to_json(self, path: str | File | None = None) -> str:
        """The schedule as JSON text, also written to `path`."""
        return saved(json.dumps(asdict(self)), path)

    @staticmethod
    def from_json(text: str | File) -> Schedule:
        """What `to_json` wrote: text, or the path of a file.

        Raises:
            ConfigError: something else.
        """
        try:
            data = json.loads(text_of(text))
            return Schedule(**data)
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError("this is no schedule: it was not written by Schedule.to_json") from error


def _no_order(order: int) -> str:
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
            raise ConfigError(_no_order(order))
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


def step_table(
    model: Callable[..., Any], run: Callable[..., Any], *, prompts: Iterable[Any] | None = None, console: Console | None = None
) -> StepTable:
    """Run the model uncached, and relate what all blocks add at every step to every other step.

    One generation's values are held at a time: as many tensors of the latent stream as it has steps, and lanes.

    Args:
        model, run, prompts: as `vdcache.profile` takes them.
        console: where the memory is said.

    Raises:
        ConfigError: the value cannot be read, or generations of unequal length.
        CacheStateError: `run` did not call the model.
    """
    return _measured(model, run, prompts, console, "step_table")


def _measured(
    model: Callable[..., Any], run: Callable[..., Any], prompts: Iterable[Any] | None, console: Console | None, what: str
) -> StepTable:
    held: dict[tuple[int | str, str], list[Tensor]] = defaultdict(list)
    tables: list[np.ndarray] = []
    now, most, said = -1, 0, False

    def close() -> None:
        nonlocal most
        if not held:
            return
        most = max(most, sum(v.numel() * v.element_size() for values in held.values() for v in values))
        lengths = {len(v) for v in held.values()}
        if len(lengths) > 1:
            raise ConfigError(f"{what}: the lanes of a generation have {sorted(lengths)} steps")
        total: Any = 0.0
        for values in held.values():
            rows = [v.flatten() for v in values]
            total = total + _products(rows)
        tables.append(np.asarray(total))
        held.clear()

    def listen(record: Record, emitted: Sequence[Emitted], result: Any) -> None:
        nonlocal now, said
        if record.generation != now:
            close()
            now = record.generation
        for at, (_, values) in enumerate(emitted):
            for name, value in values.items():
                if not said and console is not None:
                    said = True
                    size = value.numel() * value.element_size() / 2**20
                    console.print(f"{what} keeps {size:.1f} MiB a step and lane while a generation runs", style="dim")
                held[record.lane, f"{name}@{at}"].append(value.detach().clone())

    watched = watch(model, run, prompts, what, passes=(Emit(at="residual"),), listen=listen)
    close()
    if not tables:
        raise ConfigError(f"{what}: what the blocks add cannot be read: {'; '.join(watched.reasons) or 'no stream was found'}")
    if len(sizes := {t.shape[0] for t in tables}) > 1:
        raise ConfigError(f"{what}: the generations have {sorted(sizes)} steps; search one number of steps at a time")
    return StepTable(np.stack(tables), most)


def _products(rows: Sequence[Tensor]) -> np.ndarray:
    """⟨a, b⟩ of all pairs, in float64: differences of neighbouring steps cancel nearly all of it."""
    found = np.zeros((len(rows), len(rows)))
    for i, a in enumerate(rows):
        wide = a.double()
        for j in range(i + 1):
            found[i, j] = found[j, i] = float(wide @ rows[j].double())
    return found


def search_schedule(
    model: Callable[..., Any],
    run: Callable[..., Any],
    computed: int | None = None,
    *,
    speedup: float | None = None,
    quality_db: float | None = None,
    prompts: Iterable[Any] | None = None,
    orders: Sequence[int] = ORDERS,
    tries: int = 6,
    table: StepTable | None = None,
    inner: str = "inductor",
    console: Console | None = None,
) -> Schedule:
    """The best list of computed steps for this model, solver and number of steps.

        schedule = vdcache.search_schedule(model, lambda m, p: sample(m, p), 11, prompts=["a cat", "a dog"])
        fast = vdcache.compile(model, schedule.recipe(), num_steps=30)

    One uncached generation of every prompt shows how well each step's value is predicted from any computed ones. Dynamic programming finds the lists with the
    least error, added up and at its largest, with early steps weighing as much as late ones and more; the best of each are then run,
    and the one whose final latents are nearest to the uncached ones is returned. Costs 2 + tries × computed / steps generations of every
    prompt, and one more of the first, which shows that `run` is seeded.

    Args:
        model, run, prompts: as `vdcache.profile` takes them. `run` must give the same result for the same prompt: seed it. If it
            returns a tensor, that is compared, else the latents that the last step is given.
        computed: how many steps may be computed; or
        speedup: how many times fewer steps than the generation has, at least 1; or
        quality_db: the least PSNR of the final latents to the uncached ones: the fewest steps that reach it are found by
            halving, with `tries` lists each time.
        orders: of the predictor, of 0 and 1.
        tries: how many lists are run; 0 takes the first one as predicted.
        table: of `step_table`, to search for several numbers of computed steps with one calibration.
        inner: compiler of the runs.
        console: where the progress is shown.

    Raises:
        ConfigError: more computed steps than the generation has, an order that does not exist, a value that cannot be read, a quality
            that no schedule reaches (with the best that one does).
        CacheStateError: `run` did not call the model, or gives another result each time.
    """
    given = [n for n, v in (("computed", computed), ("speedup", speedup), ("quality_db", quality_db)) if v is not None]
    if len(given) != 1:
        raise ConfigError(f"search_schedule takes one of computed, speedup and quality_db; got {', '.join(given) or 'none'}")
    if computed is not None:
        whole(computed, "the number of computed steps", 1)
    if speedup is not None and not number(speedup, "speedup is how many times fewer steps are computed") >= 1:
        raise ConfigError(f"speedup is how many times fewer steps are computed, at least 1; got {speedup}")
    if quality_db is not None and not number(quality_db, "quality_db is a PSNR in dB") > 0:
        raise ConfigError(f"quality_db is a PSNR in dB, above 0; got {quality_db}")
    whole(tries, "tries, the lists that are run,", int(quality_db is not None))
    orders = whole_numbers(orders, "orders")
    if not orders:
        raise ConfigError("orders is empty; give 0, 1 or both")
    if wrong := set(orders) - set(ORDERS):
        raise ConfigError(_no_order(min(wrong)))
    prompts = checked_prompts(prompts, "search_schedule")
    console = console or Console(stderr=True)
    table = table or _measured(model, run, prompts, console, "search_schedule")
    results = _Results(model, run, prompts, table.steps, inner, console)
    try:
        if quality_db is not None:
            return _cheapest(table, results, orders, tries, float(quality_db))
        computed = max(1, int(table.steps / (speedup or 1) + 1e-9)) if computed is None else computed
        found = candidates(table, computed, orders)
        return found[0] if not tries or computed == table.steps else results.nearest(found[:tries])
    finally:
        results.forget()


def _cheapest(table: StepTable, results: _Results, orders: Sequence[int], tries: int, quality: float) -> Schedule:
    """The fewest computed steps that reach a quality."""
    low, high, best = 1, table.steps - 1, None  # fewer than `low` do not reach it
    most: Schedule | None = None
    while low <= high:
        middle = (low + high) // 2
        found = results.nearest(candidates(table, middle, orders)[:tries])
        if most is None or (found.psnr or 0) > (most.psnr or 0):
            most = found
        if (found.psnr or 0) >= quality:
            best, high = found, middle - 1
        else:
            low = middle + 1
    if best is None:
        reached = f"{most.psnr:.1f} dB with {len(most.computed)} of {table.steps} steps" if most is not None else "nothing"
        raise ConfigError(f"no schedule of {table.steps} steps reaches {quality:g} dB; the best reached is {reached}")
    return best


def candidates(table: StepTable, computed: int, orders: Sequence[int] = ORDERS) -> list[Schedule]:
    """The lists that the table speaks for, best first: of every order, objective and weighting in turn.

    Raises:
        ConfigError: more computed steps than there are, or another order.
    """
    if not np.isfinite(table.products).all():
        raise ConfigError(
            "the table of steps holds what is not a number: the model gave NaN or infinity in the run that it was measured in"
        )
    if computed > table.steps:
        raise ConfigError(f"{computed} computed steps were asked for, and a generation has {table.steps}")
    ranked: list[list[tuple[float, Schedule]]] = []
    for order in orders:
        errors = np.nan_to_num(table.errors(order))
        for early in EARLY:
            weights = np.linspace(early, 1.0, table.steps)
            for objective in ("sum", "max"):
                paths = best_paths(errors * (weights / weights.mean()), computed, objective=objective, keep=4)
                sums = [(cost_of(errors, p.steps), p.steps) for p in paths]
                ranked.append([(cost, Schedule(table.steps, steps, order, cost)) for cost, steps in sums])
    # An order that predicts worse everywhere comes last; lists that are found in several ways come once.
    ranked.sort(key=lambda row: row[0][0])
    in_turn = [row[i][1] for i in range(4) for row in ranked if i < len(row)]
    if computed == 1:  # of one step every order knows the last value alone
        in_turn = in_turn[:1]
    return list(dict.fromkeys(in_turn))


class _Results:
    """What `run` ends with under a schedule. One compilation for all schedules of an order."""

    def __init__(
        self,
        model: Callable[..., Any],
        run: Callable[..., Any],
        prompts: list[Any] | None,
        steps: int,
        inner: str,
        console: Console,
    ) -> None:
        self._model, self._run, self._prompts, self._steps, self._inner = original(model), run, prompts, steps, inner
        self._console = console
        self._wanted: list[Tensor] | None = None
        self._compiled: dict[int, tuple[Any, Any, Callable[[], None]]] = {}  # by order: compiled, handed out, made plain again
        self._last: Tensor | None = None
        self._calls = 0

    def forget(self) -> None:
        """A pipeline may hold what it was given: from here on it is the plain model."""
        for _, _, forget in self._compiled.values():
            forget()

    def nearest(self, tried: Sequence[Schedule]) -> Schedule:
        """Run every candidate, and take the one whose results are nearest to the uncached ones."""
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            bar = progress.add_task("uncached", total=len(tried) + 1)
            if self._wanted is None:
                every = Schedule(self._steps, tuple(range(self._steps)), tried[0].order)
                self._wanted = self.of(every)
                again = self.of(every, first=True)
                if _psnr(again[0], self._wanted[0]) < 150 and not torch.equal(again[0], self._wanted[0]):
                    raise CacheStateError("search_schedule: run gives another result for the same prompt each time: seed it")
            scored = []
            for one in tried:
                progress.update(bar, advance=1, description=f"{len(one.computed)} steps, order {one.order}")
                psnr = float(np.mean([_psnr(a, b) for a, b in zip(self.of(one), self._wanted, strict=True)]))
                scored.append(replace(one, psnr=psnr))
        return max(scored, key=lambda s: -float("inf") if s.psnr is None else s.psnr)

    def of(self, schedule: Schedule, first: bool = False) -> list[Tensor]:
        """The result of every prompt, or of the first alone."""
        recipe = schedule.recipe()
        if schedule.order not in self._compiled:
            both = Schedule(self._steps, (0,), schedule.order).recipe()  # its plans are those of every other
            settings = Settings(both, num_steps=self._steps, inner=self._inner, hears=lambda message: None, takes=self._take)
            fast = compile_with(self._model, settings)
            self._compiled[schedule.order] = fast, *until_forgotten(fast, self._model)
        fast, given, _ = self._compiled[schedule.order]
        session = fast.vdcache
        session.prepare = lambda steps: recipe.policy
        found = []
        with torch.no_grad():
            for prompt in [None] if self._prompts is None else self._prompts[: 1 if first else None]:
                session.begin(self._steps)
                self._calls, self._last = 0, None
                made = self._run(given) if self._prompts is None else self._run(given, prompt)
                end = made if isinstance(made, Tensor) else self._last
                if not self._calls or end is None:
                    raise CacheStateError(
                        "search_schedule: run(model) did not call the model that it was given: use its argument, as in "
                        "`lambda model: sample(model)`"
                    )
                steps = 1 + max(r.step for r in session.history.generation())
                if steps != self._steps:
                    raise ConfigError(
                        f"search_schedule: run takes {steps} steps, and the table is of {self._steps} steps: measure one of this number"
                    )
                found.append(end.detach().float().clone())
        return found

    def _take(self, program: Any, inputs: Sequence[Any]) -> None:
        self._calls += 1
        if program.latent is not None:
            self._last = inputs[program.latent].clone()  # a sampler may write into it


def _psnr(a: Tensor, b: Tensor) -> float:
    """In dB of the range of `b`."""
    if a.shape != b.shape:
        raise CacheStateError(
            f"search_schedule: run gives {tuple(a.shape)} once and {tuple(b.shape)} another time; seed it, keep its sizes"
        )
    error = float((a - b).square().mean())
    peak = float(b.max() - b.min())
    if not error < float("inf"):  # NaN as well
        return float("-inf")
    return min(150.0, 10 * float(np.log10(max(peak * peak, 1e-30) / error))) if error > 0 else 150.0
