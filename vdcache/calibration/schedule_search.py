"""Which steps to compute on this model, with this solver and number of steps: found from one uncached run a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vdcache.calibration.choose import choose
from vdcache.calibration.loop import SamplingLoop
from vdcache.calibration.published_searches import SEARCHES, search
from vdcache.calibration.schedule import PREDICTIONS, SCOPES, Schedule
from vdcache.calibration.tables import ORDERS, StepTable, no_order
from vdcache.errors import ConfigError
from vdcache.policies.goal import Goal
from vdcache.util.checks import whole, whole_numbers

__all__ = ["search_schedule", "step_table"]


def step_table(
    model: Callable[..., Any],
    run: Callable[..., Any],
    *,
    prompts: Iterable[Any] | None = None,
    inner: str = "eager",
    console: Console | None = None,
) -> StepTable:
    """Run the model uncached, and relate what all blocks add at every step to every other step.

    One generation's values are held at a time, a sample of tokens of large ones: at most 256 MiB for two lanes.

    Args:
        model, run, prompts: as `vdcache.profile` takes them.
        inner: compiler.
        console: where the memory is said.

    Raises:
        ConfigError: the value cannot be read, or generations of unequal length.
        CacheStateError: `run` did not call the model.
    """
    loop = SamplingLoop(model, run, prompts, "step_table", inner=inner, console=console)
    try:
        return loop.table()
    finally:
        loop.forget()


def search_schedule(
    model: Callable[..., Any],
    run: Callable[..., Any],
    computed: int | None = None,
    *,
    speedup: float | None = None,
    quality_db: float | None = None,
    prompts: Iterable[Any] | None = None,
    orders: Sequence[int] = ORDERS,
    scopes: Sequence[str] = ("blocks",),
    method: str = "auto",
    tries: int | None = None,
    table: StepTable | None = None,
    inner: str = "inductor",
    path: str | Path | None = None,
    console: Console | None = None,
) -> Schedule:
    """The best list of computed steps for this model, solver and number of steps.

        schedule = vdcache.search_schedule(model, lambda m, p: sample(m, p), 11, prompts=["a cat", "a dog"])
        fast = vdcache.compile(model, schedule.recipe(), num_steps=30)

    One uncached generation of each prompt measures how well each step is predicted from any earlier computed steps. Dynamic
    programming finds the lists with the smallest total error and the smallest maximum error, with uniform weights and with larger weights
    for early steps. The best lists, at most 20 in all, run on the first prompt, the better half of them on the next, and so on; the one
    whose results are nearest to the uncached ones is returned. All this costs at most three uncached generations a prompt; with
    `quality_db` the cost has no bound.

    Args:
        model, run, prompts: as `vdcache.profile` takes them. `run` must give the same result for the same prompt: seed it. The
            returned tensor is compared, or the latents that the last step is given if `run` returns none.
        computed: how many steps may be computed; or
        speedup: how many times fewer computed steps than the generation has, at least 1; or
        quality_db: the minimum PSNR of the final latents to the uncached ones: the fewest steps that reach it are found, with `tries` lists
            (default 1) for each number of steps that is tried.
        orders: of the predictors that are tried (0, 1). Order 1 extrapolates in the step's number and in powers of the timestep.
        scopes: what is predicted: "blocks", what all blocks add together; "branches", the output of each branch before its
            gate, which is more accurate on some models and keeps one or two tensors a branch. Both may be given.
        method: "auto", as above; or a published search to compare with, which decides by its table alone: "dpcache" (with order 1), "lemica" (a run for
            every stretch of up to ten steps and every prompt), "meancache" (its path, with the last value). Those take `computed` or
            `speedup`, and none of `orders`, `scopes`, `tries`.
        tries: how many lists are run on the first prompt; None for as many as fit into three generations, 0 for
            none: the list with the smallest predicted error is returned.
        table: the result of `step_table`, to search for several numbers of computed steps without measuring again.
        inner: compiler of the runs.
        path: a file that keeps what was measured: an interrupted search goes on where it was, and gives the same.
        console: where the progress is shown.

    Raises:
        ConfigError: more computed steps than the generation has, an order that does not exist, a value that cannot be read, a quality
            that no schedule reaches (the message gives the best that is reached).
        CacheStateError: `run` did not call the model, or gives another result each time.
    """
    goal = Goal(computed, speedup, quality_db)
    if method not in ("auto", *SEARCHES):
        raise ConfigError(f"method is auto, {', '.join(SEARCHES)}; got {method!r}")
    if method != "auto" and quality_db is not None:
        raise ConfigError(f"method={method!r} takes computed=… or speedup=…: it has no rule for a quality")
    if tries is not None:
        whole(tries, "tries, the lists that are run,", int(quality_db is not None))
    orders = whole_numbers(orders, "orders")
    if not orders:
        raise ConfigError("orders is empty; give 0, 1 or both")
    if wrong := set(orders) - set(ORDERS):
        raise ConfigError(no_order(min(wrong)))
    scopes = (scopes,) if isinstance(scopes, str) else tuple(scopes)
    if not scopes or set(scopes) - set(SCOPES):
        raise ConfigError(f"scopes are of {', '.join(SCOPES)}, at least one; got {list(scopes)}")
    if method != "auto" and (orders != ORDERS or scopes != ("blocks",) or tries is not None):
        raise ConfigError(f"method={method!r} is a search by its own rule: it takes no orders=, scopes= or tries=")
    console = console or Console(stderr=True)
    loop = SamplingLoop(model, run, prompts, "search_schedule", inner=inner, console=console, path=path)
    try:
        with progress(console, loop):
            table = table or loop.table()
            if method != "auto":
                return search(method, table, loop, goal.count(table.steps), loop.search.scored)
            return choose(
                table,
                loop,
                goal,
                predictions=[p._replace(scope=s) for s in scopes for p in PREDICTIONS if p.order in orders],
                tries=tries,
                scored=loop.search.scored,
            )
    finally:
        loop.forget()


def progress(console: Console, loop: SamplingLoop) -> Progress:
    """Says what is being run, for as long as it is entered."""
    shown = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True)
    bar = shown.add_task("uncached", total=None)
    loop.search.scored.tick = lambda text: shown.update(bar, description=text)
    return shown
