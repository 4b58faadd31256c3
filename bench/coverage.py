"""On how many architectures does each tool really skip work, and what does it do on the others?

Every model of the test zoo goes through three tools in one run: vdcache, diffusers' cache hooks and cache-dit, all as installed.
Each tool gets a fresh model with random weights and runs 6 denoising steps of one lane. The FLOPs of every step are counted
where ATen runs them: torch's FlopCounterMode, with its formula of attention also for the CPU kernel and for flex attention,
which it leaves out by itself. The share is what the cheapest step leaves out of the same step of the plain model.

    skips          a step costs at least 0.5 % less than the plain one
    silent no-op   accepted, ran, and no step costs less
    refused        raised when it was applied, or left the model alone and said so in a warning
    breaks         accepted, then the forward raised or gave another shape

A tool that skips then runs once more with the same input at every step: a cache that is right gives the plain output back. Where
the cheapest step is more than 1 % away from it (relative L2), it is marked ≠; `same_input_error` has the distance. How good a
sampled picture is, or how fast a step, is not measured: weights are random, models have two or three blocks, and a tool that
computes one block of three, as first-block caches do, can leave out no more than two thirds here, and far more of forty blocks.

What each tool was given. Nothing was written for one model. Where a zoo entry wraps a diffusers model as its pipeline would,
diffusers' hooks and cache-dit got the diffusers model inside.

vdcache: `vdcache.compile(model, "every-2", num_steps=6, inner="eager")`, nothing else. One generation compiles, the next is
counted. The run on the same input says `session.begin()` and `session.step()`, as the timestep stands still in it.

diffusers' hooks: `apply_*` of diffusers.hooks on the bare transformer, inside `cache_context` with step, step count, timestep
and sigma at every call, each set to skip whenever it may:
 first-block: threshold 1e9;
 mag: threshold 1e9, ratios of 1, no retention;
 sea: threshold 1e9, order 0, one retained step, and, for models that diffusers has no callback for, one that takes the first
  floating tensor of three dimensions or more for the latents;
 pab: every range 1000, all timesteps, identifiers that match every name, the timestep callback;
 faster: as guidance-distilled (the zoo's calls have one lane), range 1000, identifiers that match every name, the timestep
  callback;
 taylorseer: order 0, float32, from the second step on; thrice: with its default identifiers, in lite mode, and with
  `cache_identifiers` of one pattern that names the items of every block or layer list;
 text-kv: it takes no settings.
Layer skip leaves layers out of every step and keeps nothing, so it is no cache and not among them. "diffusers hooks" of a model
is the best of the nine, known only after trying all.

cache-dit: `cache_dit.enable_cache(transformer, cache_config=DBCacheConfig(...))`: one block computed (F1B0), one step of
warm-up, threshold 1e9, no bounds on cached steps, no separate guidance. Where that does not skip, or is marked ≠, what its
documentation asks of a user with another model: a `BlockAdapter` of the transformer's block lists and a forward pattern. Every
list of two or more modules directly under the transformer is tried with each of the six patterns, and those that skip and are
right go into one adapter together. This is a search for each model, which vdcache does not get: read the picture's † so.

Best means, in this order: skips and gives the same output for the same input, by share; skips; refused; silent no-op; breaks.
"""

from __future__ import annotations

import gc
import logging
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode, sdpa_flop_count

import vdcache
from bench.common import Bench, arguments
from tests.zoo import ZOO, Case, build

STEPS = 6
LESS = 0.005
SAME = 0.01
HUGE = 1e9
TOOLS = ("vdcache", "diffusers hooks", "cache-dit")
VERDICTS = ("skips", "refused", "silent no-op", "breaks")
UNSUPPORTED = re.compile(
    r"no transformer blocks found|fail-open|is None!|not ModuleList|steps aside|runs? as plain|not support", re.I
)
ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}


@dataclass
class Outcome:
    tool: str
    way: str
    verdict: str
    share: float = 0.0
    error: float | None = None
    note: str = ""

    @property
    def right(self) -> bool:
        return self.error is not None and self.error <= SAME

    def said(self) -> str:
        if self.verdict == "skips":
            return f"skips {self.share:.4f}" + ("" if self.right else f", but is {self.error:.2g} away on the same input")
        return f"{self.verdict}: {self.note}" if self.note else self.verdict

    @property
    def rank(self) -> tuple[bool, float, float]:
        return self.verdict == "skips" and self.right, -VERDICTS.index(self.verdict), self.share


@dataclass
class Run:
    """What six steps gave: outputs and FLOPs, or what they raised."""

    outputs: list[Tensor] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    error: str = ""


class Moment:
    """Where the denoising loop is, for the callbacks that tools ask for."""

    step = 0

    @property
    def timestep(self) -> int:
        return 1000 - 25 * self.step


class _Unseen(_FlopCounterMode):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def _handle_higher_order_ops(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func in self.counter.flop_registry:  # flex attention, for which torch has the formula and no way to it
            return self.counter._count_flops(func, func(*args, **kwargs), args, kwargs)
        return super()._handle_higher_order_ops(func, types, args, kwargs)


class Flops(FlopCounterMode):
    """torch's counter, unseen by Dynamo, which would otherwise run every graph as it came and leave out what vdcache made of it.

    Nothing is compiled under it, and it attributes nothing to modules.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=ATTENTION)

    def __enter__(self) -> Flops:
        self.flop_counts.clear()
        self.mode = _Unseen(self)
        self.mode.__enter__()
        return self

    def __exit__(self, *raised: Any) -> Any:
        return self.mode.__exit__(*raised)


class Heard(logging.Handler):
    """What the tools say, instead of printing it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def listen(self) -> None:
        for name, logger in list(logging.root.manager.loggerDict.items()):
            if isinstance(logger, logging.Logger) and name.split(".")[0] in {"CACHE_DIT", "cache_dit", "diffusers"}:
                logger.handlers = [self] if name in {"CACHE_DIT", "diffusers"} or not logger.propagate else []

    def refusal(self) -> str:
        """The first that says that the tool leaves this model alone; FasterCache's general caution is said of every model."""
        return next((x for x in self.lines if UNSUPPORTED.search(x) and "purely experimental" not in x), "")


HEARD = Heard()


def value(output: Any) -> Tensor:
    while isinstance(output, (tuple, list)):
        output = output[0]
    return getattr(output, "sample", output)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def inside(model: nn.Module) -> nn.Module:
    """The diffusers model that a zoo entry wraps, or the model itself."""
    children = list(model.children())
    if len(children) == 1 and type(children[0]).__module__.startswith("diffusers.") and not is_diffusers(model):
        return children[0]
    return model


def is_diffusers(model: nn.Module) -> bool:
    return type(model).__module__.startswith("diffusers.")


def run(call: Callable[..., Any], case: Case, around: Callable[[int], Any], still: bool = False) -> Run:
    result = Run()
    for step in range(STEPS):
        try:
            with around(step), Flops() as counter:
                output = value(call(**case.call(0 if still else step, 6)))
            result.outputs.append(output.detach().clone())
        except Exception as error:  # noqa: BLE001
            result.error = f"step {step}: {first_line(error)}"
            break
        result.flops.append(counter.get_total_flops())
    return result


def judge(tool: str, way: str, plain: Run, given: Run) -> Outcome:
    said = HEARD.refusal()
    if given.error:
        return Outcome(tool, way, "breaks", note=given.error)
    for step, (a, b) in enumerate(zip(given.outputs, plain.outputs, strict=True)):
        if a.shape != b.shape:
            return Outcome(tool, way, "breaks", note=f"step {step}: output of {tuple(a.shape)} instead of {tuple(b.shape)}")
    share = max(1 - a / b for a, b in zip(given.flops, plain.flops, strict=True))
    if share >= LESS:
        return Outcome(tool, way, "skips", share)
    return Outcome(tool, way, "refused" if said else "silent no-op", note=said.strip().splitlines()[0][:200] if said else "")


def deviation(plain: Run, given: Run) -> float:
    """How far the cheapest step is from the plain output, where every step had the same input."""
    if given.error:
        return float("inf")
    cheapest = min(range(STEPS), key=lambda step: given.flops[step] / plain.flops[step])
    want, got = plain.outputs[cheapest].double(), given.outputs[cheapest].double()
    return float(min((got - want).norm() / want.norm().clamp_min(1e-12), HUGE)) if got.isfinite().all() else HUGE


@dataclass
class Baseline:
    """The plain model on moving and on still input."""

    moving: Run
    still: Run


def baseline(name: str) -> Baseline:
    model, case = build(name), ZOO[name]
    moving, still = (run(model, case, lambda step: nullcontext(), still) for still in (False, True))
    assert not moving.error and not still.error, f"{name}: {moving.error or still.error}"
    return Baseline(moving, still)


def attempt(
    tool: str, way: str, name: str, plain: Baseline, apply: Callable[[nn.Module, Moment], Callable[[int], Any]]
) -> Outcome:
    """One tool in one way on a fresh model; `apply` returns what goes around every call."""
    outcome = None
    for still in (False, True):
        model, moment, case = build(name), Moment(), ZOO[name]
        HEARD.lines.clear()
        try:
            around = apply(inside(model), moment)
        except Exception as error:  # noqa: BLE001
            return Outcome(tool, way, "refused", note=first_line(error))
        given = run(model, case, around, still)
        if outcome is None:
            outcome = judge(tool, way, plain.moving, given)
            if outcome.verdict != "skips":
                break
        else:
            outcome.error = deviation(plain.still, given)
    return outcome


def through_vdcache(name: str, plain: Baseline) -> list[Outcome]:
    torch._dynamo.reset()
    model, case = build(name), ZOO[name]
    HEARD.lines.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            compiled = vdcache.compile(model, "every-2", num_steps=STEPS, inner="eager")
            for step in range(STEPS):
                compiled(**case.call(step, 6))
        except Exception as error:  # noqa: BLE001
            return [Outcome("vdcache", "every-2", "breaks", note=first_line(error))]
        given = run(compiled, case, lambda step: nullcontext())
        HEARD.lines += [str(w.message) for w in caught if issubclass(w.category, vdcache.VdcacheWarning)]
        outcome = judge("vdcache", "every-2", plain.moving, given)
        if outcome.verdict == "skips":
            session = compiled.vdcache
            session.begin(STEPS)
            outcome.error = deviation(plain.still, run(compiled, case, lambda step: nullcontext(session.step()), still=True))
    return [outcome]


def latents(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
    """SeaCache's callback for any model: each (channels, time, height, width)."""
    for x in (*args, *kwargs.values()):
        x = x[0] if isinstance(x, (list, tuple)) and x else x
        if isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 3:
            shaped = {3: lambda x: x.mT[:, :, None, None], 4: lambda x: x[:, :, None]}.get(x.ndim, lambda x: x)(x)
            return list(shaped.unbind(0))
    return None


def hooks() -> dict[str, Callable[[nn.Module, Moment], None]]:
    import diffusers.hooks as d
    from diffusers import Cosmos3OmniTransformer, WanTransformer3DModel

    everywhere, always = (".",), (-1, 10**6)

    def sea(model: nn.Module, moment: Moment) -> None:
        known = isinstance(model, (Cosmos3OmniTransformer, WanTransformer3DModel))
        callback = None if known else latents
        config = d.SeaCacheConfig(HUGE, 0, retention_steps=1, cache_end_steps=0, max_consecutive_cached=0)
        config.raw_vision_callback = callback
        d.apply_sea_cache(model, config)

    def pab(model: nn.Module, moment: Moment) -> None:
        kinds = ("spatial", "temporal", "cross")
        config = d.PyramidAttentionBroadcastConfig(
            **{f"{kind}_attention_block_skip_range": 1000 for kind in kinds},
            **{f"{kind}_attention_timestep_skip_range": always for kind in kinds},
            **{f"{kind}_attention_block_identifiers": everywhere for kind in kinds},
            current_timestep_callback=lambda: moment.timestep,
        )
        d.apply_pyramid_attention_broadcast(model, config)

    def faster(model: nn.Module, moment: Moment) -> None:
        config = d.FasterCacheConfig(
            spatial_attention_block_skip_range=1000,
            spatial_attention_timestep_skip_range=(-1, 1000),  # the first step is at 1000, and has nothing to reuse yet
            spatial_attention_block_identifiers=everywhere,
            attention_weight_callback=lambda module: 0.3,
            is_guidance_distilled=True,
            current_timestep_callback=lambda: moment.timestep,
        )
        d.apply_faster_cache(model, config)

    def taylor(**more: Any) -> Callable[[nn.Module, Moment], None]:
        settings = {
            "cache_interval": 10**6,
            "disable_cache_before_step": 1,
            "max_order": 0,
            "taylor_factors_dtype": torch.float32,
        }
        return lambda model, moment: d.apply_taylorseer_cache(model, d.TaylorSeerCacheConfig(**settings, **more))

    mag = {"threshold": HUGE, "max_skip_steps": 10**6, "retention_ratio": 0.0, "num_inference_steps": STEPS}
    return {
        "first-block": lambda m, _: d.apply_first_block_cache(m, d.FirstBlockCacheConfig(threshold=HUGE)),
        "mag": lambda m, _: d.apply_mag_cache(m, d.MagCacheConfig(**mag, mag_ratios=torch.ones(STEPS))),
        "sea": sea,
        "pab": pab,
        "faster": faster,
        "taylorseer": taylor(),
        "taylorseer lite": taylor(use_lite_mode=True),
        "taylorseer blocks": taylor(cache_identifiers=[r"[^.]*(block|layer)[^.]*\.\d+"]),
        "text-kv": lambda m, _: d.apply_text_kv_cache(m, d.TextKVCacheConfig()),
    }


def through_hooks(name: str, plain: Baseline) -> list[Outcome]:
    from diffusers import CacheMixin

    def applied(hook: Callable[[nn.Module, Moment], None]) -> Callable[[nn.Module, Moment], Callable[[int], Any]]:
        def apply(model: nn.Module, moment: Moment) -> Callable[[int], Any]:
            hook(model, moment)

            def around(step: int) -> Any:
                moment.step = step
                where = {"step_index": step, "num_inference_steps": STEPS, "timestep": moment.timestep}
                # the method of CacheMixin, also for models that do not inherit it
                return CacheMixin.cache_context(model, "cond", **where, sigma=1 - step / STEPS)

            return around

        return apply

    return [attempt("diffusers hooks", way, name, plain, applied(hook)) for way, hook in hooks().items()]


@contextmanager
def no_pipeline_state() -> Iterator[None]:
    """cache-dit marks the class of its stand-in pipeline as cached; each model starts without the mark."""
    from cache_dit.caching.block_adapters import FakeDiffusionPipeline

    try:
        yield
    finally:
        if "_is_cached" in vars(FakeDiffusionPipeline):
            del FakeDiffusionPipeline._is_cached


def through_cache_dit(name: str, plain: Baseline) -> list[Outcome]:
    import cache_dit

    HEARD.listen()

    def config() -> cache_dit.DBCacheConfig:
        return cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=HUGE,
            max_warmup_steps=1,
            max_cached_steps=-1,
            max_continuous_cached_steps=-1,
            enable_separate_cfg=False,
            num_inference_steps=STEPS,
        )

    def registered(model: nn.Module, moment: Moment) -> Callable[[int], Any]:
        cache_dit.enable_cache(model, cache_config=config())
        return lambda step: nullcontext()

    def adapted(lists: dict[str, cache_dit.ForwardPattern]) -> Callable[[nn.Module, Moment], Callable[[int], Any]]:
        def apply(model: nn.Module, moment: Moment) -> Callable[[int], Any]:
            adapter = cache_dit.BlockAdapter(
                transformer=model,
                blocks=[getattr(model, attribute) for attribute in lists],
                blocks_name=list(lists),
                forward_pattern=list(lists.values()),
            )
            cache_dit.enable_cache(adapter, cache_config=config())
            return lambda step: nullcontext()

        return apply

    def tried(way: str, apply: Callable[[nn.Module, Moment], Callable[[int], Any]]) -> Outcome:
        with no_pipeline_state():
            return attempt("cache-dit", way, name, plain, apply)

    outcomes = [tried("registered", registered)]
    if outcomes[0].verdict == "skips" and outcomes[0].right:
        return outcomes
    works: dict[str, cache_dit.ForwardPattern] = {}
    children = inside(build(name)).named_children()
    for attribute in [k for k, v in children if isinstance(v, nn.ModuleList) and len(v) > 1]:
        found = {}
        for pattern in cache_dit.ForwardPattern.supported_patterns():
            found[pattern] = tried(f"adapter: {attribute} {pattern.name}", adapted({attribute: pattern}))
        pattern, best = max(found.items(), key=lambda kv: kv[1].rank)
        outcomes.append(best)
        if best.verdict == "skips" and best.right:
            works[attribute] = pattern
    if len(works) > 1:
        outcomes.append(tried("adapter: " + ", ".join(f"{k} {p.name}" for k, p in works.items()), adapted(works)))
    return outcomes


def classes(names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Each model's class, and whether it is one of diffusers'."""
    models = {name: inside(build(name)) for name in names}
    return {name: (type(model).__name__, is_diffusers(model)) for name, model in models.items()}


def best_of(outcomes: list[Outcome]) -> Outcome:
    return max(outcomes, key=lambda outcome: outcome.rank)


def table(everything: dict[str, dict[str, list[Outcome]]], known: dict[str, tuple[str, bool]]) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {"skips": "green", "refused": "bright_black", "silent no-op": "red", "breaks": "dark_orange"}
    best = {name: {tool: best_of(outcomes) for tool, outcomes in tools.items()} for name, tools in everything.items()}
    console = Console(width=126)
    shown = Table(title="What the cheapest of six steps leaves out (≠ the same input gives another output)")
    for column, wide in zip(("model", "class", *TOOLS), (24, 25, 14, 24, 26), strict=True):
        shown.add_column(column, no_wrap=True, overflow="ellipsis", min_width=min(wide, 14), max_width=wide)
    for name, row in best.items():
        cells = []
        for o in row.values():
            text = f"{100 * o.share:.0f} % {'' if o.right else '≠ '}[dim]{o.way}[/]" if o.verdict == "skips" else o.verdict
            cells.append(f"[{colours[o.verdict]}]{text}[/]")
        shown.add_row(name, known[name][0], *cells)
    console.print(shown)

    counted = Table(title="Counts")
    for column in ("tool", "models", *VERDICTS, "≠", "median share"):
        counted.add_column(column, justify="left" if column == "tool" else "right")

    def count(label: str, taken: list[Outcome]) -> None:
        counts = Counter(o.verdict for o in taken)
        shares = sorted(o.share for o in taken if o.verdict == "skips")
        wrong = sum(o.verdict == "skips" and not o.right for o in taken)
        middle = f"{100 * shares[len(shares) // 2]:.0f} %" if shares else ""
        counted.add_row(label, str(len(taken)), *(str(counts[v]) for v in VERDICTS), str(wrong), middle)

    for tool in TOOLS:
        count(f"[bold]{tool}", [row[tool] for row in best.values()])
        count("  of diffusers' classes", [row[tool] for name, row in best.items() if known[name][1]])
        count("  of other classes", [row[tool] for name, row in best.items() if not known[name][1]])
        ways: dict[str, list[Outcome]] = {}
        for tools in everything.values():
            for o in tools[tool]:
                ways.setdefault(o.way, []).append(o)
        for way, taken in ways.items():
            if len(ways) > 1 and not way.startswith("adapter"):
                count(f"  [dim]{way}", taken)
        counted.add_section()
    console.print(counted)


def report(everything: dict[str, dict[str, list[Outcome]]], json: Path | None, picture: Path | None) -> None:
    bench = Bench("coverage", "every-2")
    versions = ", ".join(f"{package} {version(package)}" for package in ("diffusers", "cache-dit"))
    known = classes(everything)
    for name, tools in everything.items():
        for tool, outcomes in tools.items():
            best = best_of(outcomes)
            bench.row(
                f"{name}, {tool}",
                best.share,
                "share",
                model=name,
                model_class=known[name][0],
                of_diffusers=known[name][1],
                tool=tool,
                verdict=best.verdict,
                way=best.way,
                same_input_error=best.error,
                note=best.note,
                ways={outcome.way: outcome.said() for outcome in outcomes},
                versions=versions,
            )
    for tool in TOOLS:
        taken = [best_of(tools[tool]) for tools in everything.values()]
        bench.row(
            f"{tool}: models on which it skips",
            sum(o.verdict == "skips" for o in taken),
            "models",
            of=len(taken),
            verdicts=dict(Counter(o.verdict for o in taken)),
            same_input_other_output=sum(o.verdict == "skips" and not o.right for o in taken),
            versions=versions,
        )
    table(everything, known)
    bench.write(json)
    if picture:
        draw(picture, [row for row in bench.rows if "model" in row])


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """One picture of the best of each tool: a row a model, those together on which the tools do alike."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Patch, Rectangle

    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(row["model"], {})[row["tool"]] = row
    greens = LinearSegmentedColormap.from_list("share", ["#e3f4dc", "#7cc576", "#1d7a3a"])
    plain = {"refused": "#c4c9cf", "silent no-op": "#d8342c", "breaks": "#b8500c"}
    unlike = "#fbe3a6"

    def wrong(cell: dict[str, Any]) -> bool:
        error = cell["same_input_error"]
        return cell["verdict"] == "skips" and (error is None or error > SAME)

    def adapted(cell: dict[str, Any]) -> bool:
        return cell["verdict"] == "skips" and cell["way"].startswith("adapter")

    def order(name: str) -> tuple[Any, ...]:
        """What both others do by themselves first, then what needs more, gives wrong results, or does not skip."""
        kinds = [(VERDICTS.index(c["verdict"]), wrong(c), adapted(c)) for c in (cells[name][t] for t in TOOLS)]
        return *map(max, zip(*kinds)), [-cells[name][t]["value"] for t in reversed(TOOLS)]

    def skipping(names: list[str], tool: str) -> int:
        return sum(cells[n][tool]["verdict"] == "skips" for n in names)

    mine = sorted((n for n in cells if cells[n]["vdcache"]["of_diffusers"]), key=order)
    other = sorted((n for n in cells if not cells[n]["vdcache"]["of_diffusers"]), key=order)
    half = -(-len(mine) // 2)
    panels = [
        (f"{len(mine)} models of diffusers' classes", mine, mine[:half]),
        ("", mine, mine[half:]),
        (f"{len(other)} models of other code", other, other),
    ]
    panels = [panel for panel in panels if panel[2]]
    tall = max(len(names) for *_, names in panels)
    high = 2.55 + 0.265 * tall
    figure, axes = plt.subplots(1, len(panels), figsize=(15, high), squeeze=False)
    for axis, (label, whole, names) in zip(axes[0], panels, strict=True):
        axis.set(xlim=(0, 3), ylim=(tall, 0))
        axis.axis("off")
        axis.text(0, -2.1, label, ha="left", va="bottom", fontsize=12.5, weight="bold", color="#333")
        for x, tool in enumerate(TOOLS):
            axis.text(x + 0.5, -1.0, tool, ha="center", va="bottom", fontsize=10.5, weight="bold" if x == 0 else "normal")
            of = f"{skipping(whole, tool)} of {len(whole)}" if label else ""
            axis.text(x + 0.5, -0.2, of, ha="center", va="bottom", fontsize=9.5, color="#666")
        for y, name in enumerate(names):
            axis.text(-0.06, y + 0.5, name, ha="right", va="center", fontsize=9, family="monospace")
            for x, tool in enumerate(TOOLS):
                cell = cells[name][tool]
                verdict, share = cell["verdict"], cell["value"]
                colour = greens(share) if verdict == "skips" else plain[verdict]
                ink = "white" if verdict in ("silent no-op", "breaks") or (verdict == "skips" and share >= 0.75) else "#222"
                text = f"{100 * share:.0f} %" if verdict == "skips" else verdict
                if wrong(cell):
                    text, ink, colour = f"≠ {text}", "#a3200f", unlike
                if adapted(cell):
                    text += " †"
                axis.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.6))
                axis.text(x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=9, color=ink)
    everyone = list(cells)
    counts = [f"{tool} {skipping(everyone, tool)}" for tool in TOOLS]
    head = f"A denoising step gets cheaper on: {counts[0]} of {len(cells)} models, {counts[1]}, {counts[2]}"
    figure.text(0.012, 1 - 0.13 / high, head, fontsize=18, weight="bold", ha="left", va="top")
    lone = sum(cells[n]["cache-dit"]["verdict"] == "skips" and not adapted(cells[n]["cache-dit"]) for n in cells)
    about = (
        f"Share of a step's FLOPs that the cheapest of {STEPS} steps leaves out. Small models with random weights;"
        " every tool told to skip whenever it may.\n"
        "vdcache: one recipe for all. diffusers hooks: the best of nine hook settings for each model. cache-dit: "
        f"{lone} by itself, the rest (†) with block lists and a forward pattern found by trial."
    )
    figure.text(0.012, 1 - 0.56 / high, about, fontsize=11.5, color="#444", ha="left", va="top", linespacing=1.4)
    said = {
        "refused": "refused: an error or a warning says so",
        "silent no-op": "silent no-op: accepted, nothing skipped",
        "breaks": "breaks: accepted, then the forward fails",
    }
    used = {c["verdict"] for row in cells.values() for c in row.values()}
    legend = [Patch(color=greens(share), label=f"skips {100 * share:.0f} %") for share in (0.2, 0.6, 0.95)]
    if any(wrong(c) for row in cells.values() for c in row.values()):
        legend.append(
            Patch(color=unlike, label=f"≠ skips, but the same input gives an output more than {100 * SAME:.0f} % away")
        )
    legend += [Patch(color=plain[v], label=label) for v, label in said.items() if v in used]
    figure.legend(handles=legend, loc="lower left", ncols=len(legend), frameon=False, fontsize=10.5, bbox_to_anchor=(0.006, 0))
    hooks_one_by_one: dict[str, list[int]] = {}
    for row in rows:
        if row["tool"] == "diffusers hooks":
            for way, outcome in row["ways"].items():
                counted = hooks_one_by_one.setdefault(way, [0, 0])
                counted[0] += outcome.startswith("skips")
                counted[1] += outcome.startswith("skips") and "away" in outcome
    single = [f"{way} {skips}{f' ({bad} ≠)' if bad else ''}" for way, (skips, bad) in hooks_one_by_one.items()]
    lines = [f"diffusers' nine hook settings one by one, on how many of {len(cells)} models each skips:"]
    lines += ["   ·   ".join(single[i : i + 5]) for i in range(0, len(single), 5)]
    if len(panels) == 3 and len(other) > half + 4:
        figure.text(0.03, 0.62 / high, "\n".join(lines), fontsize=11, color="#444", ha="left", va="bottom", linespacing=1.5)
    figure.subplots_adjust(left=0.108, right=0.992, top=1 - 2.1 / high, bottom=0.45 / high, wspace=0.62)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0],
        lambda p: p.add_argument("--picture", type=Path, default=None, help="where the picture goes"),
        lambda p: p.add_argument("--models", nargs="*", default=None, help="only these of the zoo"),
    )
    names = args.models or list(ZOO)
    ways = {"vdcache": through_vdcache, "diffusers hooks": through_hooks, "cache-dit": through_cache_dit}
    everything: dict[str, dict[str, list[Outcome]]] = {name: {} for name in names}
    warnings.simplefilter("ignore")
    with torch.no_grad():
        plain = {name: baseline(name) for name in names}
        HEARD.listen()
        # a tool after the other, so that what one leaves behind in classes reaches none before it
        for tool, through in ways.items():
            began = time.perf_counter()
            for name in names:
                everything[name][tool] = through(name, plain[name])
                gc.collect()
            print(f"{tool}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        report(everything, args.json, args.picture)


if __name__ == "__main__":
    main()
