"""What would a user take instead of vdcache, how much does it leave out, how fast is it, and how far from the plain video?

The shipped weights in diffusers' WanTransformer3DModel, which is the demo's network, with every cache that diffusers' hooks and
cache-dit have for it, from gentle to aggressive. Nothing is believed that a tool says of itself: FLOPs of every step are
counted where ATen runs them, in an eager generation of its own; the timed ones are not watched. A computed step is one with all
FLOPs of the plain model.

What each was given, and what it would not do by itself here:

- The demo puts the conditional and the unconditional half into one batch, so there is one cache context, and cache-dit is told
  `enable_separate_cfg=False`. FasterCache reads the unconditional half first; the halves are swapped for it.
- SeaCache knows Wan only where as many channels come in as go out; the demo feeds in positions besides, so it is given a
  callback that returns the noised video.
- MagCache gets the ratios that its own calibration prints, on four other conditions.
- TaylorSeer's default patterns are meant to match attention in full and do not match `attn1`: that row is kept, it skips
  nothing. It works with patterns for whole blocks, or for the branches of a block; or in lite mode, which predicts the
  velocity.
- Every tool is told that a generation begins (`reset` of diffusers, `refresh_context` of cache-dit).

Compiled means `torch.compile(model)` and, apart from it, `model.compile_repeated_blocks()`, both with the cache applied first,
default settings, after two warm-up generations, in a fresh Dynamo. What fails is a row as well. New graphs in a third
generation are recompiles.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import io
import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters

from bench.common import Bench, arguments, timed
from bench.coverage import Flops, first_line
from bench.profilingdit import psnr_of
from bench.solvers import generate
from vdcache.demo.conditions import Condition
from vdcache.demo.data import random_conditions
from vdcache.demo.model import DemoConfig, with_positions
from vdcache.demo.run import CONDITIONS
from vdcache.demo.weights import load_model

STEPS = 30
WAYS = ("eager", "whole", "regional")
FULL = 0.995  # a step with this share of the plain FLOPs counts as computed


def wan() -> nn.Module:
    """The shipped network in diffusers' class."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**DemoConfig().diffusers_kwargs()).eval().requires_grad_(False)
    missing, unexpected = model.load_state_dict(load_model().state_dict(), strict=False)
    assert not unexpected and all("rope" in name for name in missing), (missing, unexpected)
    return model


def difference() -> float:
    """Largest difference of the two classes, over the largest output."""
    mine, theirs = load_model(), wan()
    generator = torch.Generator().manual_seed(0)
    worst: list[float] = []
    for t in (1000.0, 500.0, 33.0):
        x, text = with_positions(torch.randn(4, 3, 8, 24, 24, generator=generator)), torch.randn(4, 5, 32, generator=generator)
        a = mine(x, torch.full((4,), t), text)
        b = theirs(x, torch.full((4,), t), text, return_dict=False)[0]
        worst.append(((a - b).abs().max() / a.abs().max()).item())
    return float(torch.tensor(worst).max())  # Python's max would lose a NaN


@dataclass
class Moment:
    """Where the loop is, for tools that ask."""

    step: int = 0
    steps: int = STEPS
    timestep: float = 1000.0


Apply = Callable[[nn.Module, Moment], Callable[[], None] | None]


@dataclass(frozen=True)
class Peer:
    """One tool at one setting.

    Args:
        apply: puts the cache on a fresh model; may return what makes it forget a generation.
        uncond_first: the tool takes the first half of the batch for the unconditional one.
    """

    name: str
    setting: str
    apply: Apply = field(compare=False)
    values: dict[str, Any] = field(default_factory=dict, compare=False)
    uncond_first: bool = False

    def velocity(self, way: str = "eager") -> Velocity:
        """A fresh model with the cache, as the sampler calls it; `begin` before each generation."""
        return Velocity(self, way)


class Velocity:
    def __init__(self, peer: Peer, way: str = "eager") -> None:
        self.peer, self.moment = peer, Moment()
        self.model: Any = wan()
        self.forget = peer.apply(self.model, self.moment)
        self.run: Any = torch.compile(self.model) if way == "whole" else self.model
        if way == "regional":
            self.model.compile_repeated_blocks()

    def begin(self, steps: int = STEPS) -> None:
        self.moment.step, self.moment.steps = 0, steps
        self.model._reset_stateful_cache()
        if self.forget is not None:
            self.forget()

    def __call__(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        now = self.moment
        now.timestep = float(timestep[0])
        given = {"hidden_states": hidden_states, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        if self.peer.uncond_first:
            given = {name: swapped(value) for name, value in given.items()}
        where = {"step_index": now.step, "num_inference_steps": now.steps, "timestep": now.timestep}
        with self.model.cache_context("cond_uncond", **where, sigma=now.timestep / 1000):
            out = self.run(**given, return_dict=False)[0]
        now.step += 1
        return swapped(out) if self.peer.uncond_first else out


def swapped(batch: Tensor) -> Tensor:
    return torch.cat(batch.chunk(2)[::-1])


def flops_of(velocity: Velocity, conditions: Sequence[Condition] = CONDITIONS, steps: int = STEPS) -> tuple[list[int], Tensor]:
    """FLOPs of every step of one eager generation, and its videos."""
    flops: list[int] = []

    def counted(*given: Tensor) -> Tensor:
        with Flops() as counter:
            out = velocity(*given)
        flops.append(counter.get_total_flops())
        return out

    return flops, generate(counted, conditions, steps=steps, begin=velocity.begin)


@functools.cache
def plain_flops() -> int:
    each = flops_of(Velocity(PLAIN), steps=2)[0]
    assert each[0] == each[1]
    return each[0]


def computed_steps(flops: Sequence[int]) -> list[int]:
    return [step for step, count in enumerate(flops) if count >= FULL * plain_flops()]


# ---- the peers -----------------------------------------------------------------------------------------------------

PLAIN = Peer("plain", "", lambda model, moment: None)


def hook(config: Callable[[Moment], Any]) -> Apply:
    return lambda model, moment: model.enable_cache(config(moment))


def first_block(threshold: float) -> Peer:
    from diffusers import FirstBlockCacheConfig

    return Peer("FBCache", f"{threshold:g}", hook(lambda _: FirstBlockCacheConfig(threshold)), {"threshold": threshold})


@functools.cache
def mag_ratios() -> tuple[float, ...]:
    """What MagCache's calibration prints for this model."""
    from diffusers import MagCacheConfig

    calibrating = Peer("MagCache", "", hook(lambda _: MagCacheConfig(num_inference_steps=STEPS, calibrate=True))).velocity()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        generate(calibrating, random_conditions(4, torch.Generator().manual_seed(11)), seed=900, begin=calibrating.begin)
    line = next(line for line in printed.getvalue().splitlines() if line.startswith("[") and "MagCache" not in line)
    return tuple(ast.literal_eval(line))


def mag(threshold: float, max_skip_steps: int, retention_ratio: float = 0.2) -> Peer:
    from diffusers import MagCacheConfig

    values = {"threshold": threshold, "max_skip_steps": max_skip_steps, "retention_ratio": retention_ratio}
    config = hook(lambda _: MagCacheConfig(num_inference_steps=STEPS, mag_ratios=list(mag_ratios()), **values))
    return Peer("MagCache", f"{threshold:g}, at most {max_skip_steps}", config, values)


def noised_video(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return list(kwargs["hidden_states"][:, :3].unbind(0))


def sea(threshold: float, max_consecutive_cached: int = 2) -> Peer:
    from diffusers import SeaCacheConfig

    values = {"threshold": threshold, "max_consecutive_cached": max_consecutive_cached}
    return Peer(
        "SeaCache",
        f"{threshold:g}, at most {max_consecutive_cached}",
        hook(lambda _: SeaCacheConfig(**values, raw_vision_callback=noised_video)),
        values,
    )


def broadcast(spatial: int, cross: int, timesteps: tuple[int, int]) -> Peer:
    from diffusers import PyramidAttentionBroadcastConfig

    def config(moment: Moment) -> Any:
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=spatial,
            cross_attention_block_skip_range=cross,
            spatial_attention_timestep_skip_range=timesteps,
            cross_attention_timestep_skip_range=timesteps,
            current_timestep_callback=lambda: moment.timestep,
        )

    values = {"spatial": spatial, "cross": cross, "timesteps": timesteps}
    return Peer("PAB", f"self {spatial}, cross {cross}, {timesteps[0]}–{timesteps[1]}", hook(config), values)


def faster(attention: int, uncond: int, below: int) -> Peer:
    from diffusers import FasterCacheConfig

    def config(moment: Moment) -> Any:
        return FasterCacheConfig(
            spatial_attention_block_skip_range=attention,
            spatial_attention_timestep_skip_range=(-1, below),
            unconditional_batch_skip_range=uncond,
            unconditional_batch_timestep_skip_range=(-1, below),
            attention_weight_callback=lambda module: 0.3,
            current_timestep_callback=lambda: moment.timestep,
        )

    values = {"attention": attention, "uncond": uncond, "below": below}
    return Peer(
        "FasterCache", f"attention {attention}, uncond {uncond}, below {below}", hook(config), values, uncond_first=True
    )


TAYLOR = {
    "default": {},
    "blocks": {"cache_identifiers": [r"blocks\.\d+"]},
    "branches": {"cache_identifiers": [r"blocks\.\d+\.(attn\d|ffn)"]},
    "lite": {"use_lite_mode": True},
}


def taylor(what: str, interval: int, before: int, order: int = 1) -> Peer:
    from diffusers import TaylorSeerCacheConfig

    values = {"cache_interval": interval, "disable_cache_before_step": before, "max_order": order}
    config = hook(lambda _: TaylorSeerCacheConfig(**values, taylor_factors_dtype=torch.float32, **TAYLOR[what]))
    return Peer(f"TaylorSeer, {what}", f"every {interval} after {before}", config, values)


def dbcache(threshold: float, first: int = 1, last: int = 0, taylor_order: int = 0, warmup: int = 4) -> Peer:
    def apply(model: nn.Module, moment: Moment) -> Callable[[], None]:
        import cache_dit
        from cache_dit.caching.block_adapters import FakeDiffusionPipeline

        def settings() -> dict[str, Any]:
            cache = cache_dit.DBCacheConfig(
                Fn_compute_blocks=first,
                Bn_compute_blocks=last,
                residual_diff_threshold=threshold,
                max_warmup_steps=warmup,
                enable_separate_cfg=False,
                num_inference_steps=moment.steps,
            )
            forecast = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=taylor_order) if taylor_order else None
            return {"cache_config": cache, "calibrator_config": forecast}

        cache_dit.enable_cache(model, **settings())
        # it marks the class of its stand-in pipeline as cached, so that the next model of this process would be left alone
        if "_is_cached" in vars(FakeDiffusionPipeline):
            del FakeDiffusionPipeline._is_cached
        made = {"called": False}

        def forget() -> None:
            if made["called"]:  # the context comes into being with the first call
                cache_dit.refresh_context(model, **{k: v for k, v in settings().items() if v is not None})
            made["called"] = True

        return forget

    name = f"DBCache F{first}B{last}" + (f" + TaylorSeer {taylor_order}" if taylor_order else "")
    values = {"threshold": threshold, "Fn": first, "Bn": last, "warmup": warmup, "taylor_order": taylor_order}
    return Peer(name, f"{threshold:g}, warm-up {warmup}", apply, values)


def peers() -> list[Peer]:
    """Every tool, from gentle to aggressive."""
    thresholds = (0.06, 0.08, 0.12, 0.2)
    grid = ((2, 12), (2, 3), (3, 3), (5, 3))
    return [
        *(first_block(t) for t in thresholds),
        *(mag(*values) for values in ((0.03, 1), (0.06, 2), (0.12, 3), (0.3, 5, 0.1))),
        *(sea(*values) for values in ((0.08, 2), (0.12, 2), (0.2, 2), (0.4, 4))),
        *(broadcast(*values) for values in ((2, 2, (100, 800)), (2, 4, (50, 900)), (3, 6, (0, 950)), (5, 10, (0, 1000)))),
        *(faster(*values) for values in ((2, 2, 400), (2, 3, 681), (2, 5, 850), (4, 10, 950))),
        taylor("default", 5, 3),
        *(taylor(what, *values) for what in ("blocks", "branches", "lite") for values in grid),
        *(dbcache(t) for t in thresholds),
        *(dbcache(t, first=2) for t in thresholds),
        *(dbcache(t, taylor_order=1) for t in thresholds),
    ]


# ---- what is measured ----------------------------------------------------------------------------------------------


class Complaints(logging.Handler):
    """Dynamo's warnings, kept instead of printed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().strip().splitlines()[0][:200])


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    handler, logger = Complaints(), logging.getLogger("torch._dynamo")
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)


def quieten() -> None:
    import cache_dit  # noqa: F401
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    for name in [n for n in logging.root.manager.loggerDict if n.lower().startswith("cache_dit")]:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def seconds(run: Callable[[], Any]) -> float:
    """CPU time where one thread computes, as others may have the core as well; else the clock's."""
    if torch.cuda.is_available() or torch.get_num_threads() > 1:
        return timed(run)
    began = time.process_time()
    run()
    return time.process_time() - began


def against(plain: Velocity, velocity: Velocity, rounds: int) -> tuple[float, list[Tensor]]:
    """Time of a generation over that of plain eager, in turn, so that a noisy machine is noisy for both; and its videos."""
    ratios, videos = [], []
    for _ in range(rounds):
        before = seconds(lambda: generate(plain, CONDITIONS, begin=plain.begin))
        ratios.append(seconds(lambda: videos.append(generate(velocity, CONDITIONS, begin=velocity.begin))) / before)
    return median(ratios), videos


def compiled(peer: Peer, way: str, eager: Tensor, rounds: int, base: dict[str, Any]) -> dict[str, Any]:
    """A peer under torch.compile: time, graphs, recompiles and what went wrong."""
    torch._dynamo.reset()
    counters.clear()
    found: dict[str, Any] = {"way": way, "error": ""}
    with heard() as lines:
        try:
            velocity = peer.velocity(way)
            found["warm_up"] = timed(lambda: generate(velocity, CONDITIONS, begin=velocity.begin))
            generate(velocity, CONDITIONS, begin=velocity.begin)
            graphs = counters["stats"]["unique_graphs"]
            found["time_of_eager"], videos = against(base["eager"], velocity, rounds)
            found["time_of_compiled"] = found["time_of_eager"] * base["eager_of_compiled"]
            found["recompiles"] = counters["stats"]["unique_graphs"] - graphs
            found["from_eager"] = max((v - eager).abs().max().item() for v in videos)
        except Exception as error:  # noqa: BLE001
            found["error"] = first_line(error)
    found["graphs"] = counters["stats"]["unique_graphs"]
    found["breaks"] = sum(counters["graph_break"].values())
    found["said"] = sorted({line for line in lines if "limit" in line})
    return found


def measure(bench: Bench, peer: Peer, ways: Sequence[str], rounds: int, base: dict[str, Any]) -> dict[str, Any]:
    case = {"name": peer.name, "setting": peer.setting, "values": peer.values}
    try:
        velocity = peer.velocity()
        flops, first = flops_of(velocity)
        videos = generate(velocity, base["conditions"], begin=velocity.begin)
        if not videos.isfinite().all():
            raise FloatingPointError("the videos hold NaN")  # for which `psnr_of` would say 99 dB
        of_eager, again = against(base["eager"], velocity, rounds)
    except Exception as error:  # noqa: BLE001
        bench.row(f"{peer.name}, {peer.setting}", float("nan"), "dB", **case, error=first_line(error))
        return bench.rows[-1]
    computed, share = computed_steps(flops), sum(flops) / (STEPS * plain_flops())
    psnr, ssim = psnr_of(videos, base["videos"])
    bench.row(
        f"{peer.name}, {peer.setting}",
        mean(psnr),
        "dB",
        **case,
        computed=computed,
        flops=[round(count / plain_flops(), 4) for count in flops],
        flops_share=share,
        time_of_eager=of_eager,
        time_of_compiled=of_eager * base["eager_of_compiled"],
        ssim=mean(ssim),
        largest_error=(videos - base["videos"]).abs().max().item(),
        same_again=all(torch.equal(first, a) for a in again),  # nothing of one generation is left for the next
        compiled=[],
    )
    row = bench.rows[-1]
    for way in ways:
        row["compiled"].append(compiled(peer, way, first, rounds, base))
    said = ", ".join(
        f"{f['way']} {f['time_of_compiled']:.2f} ({f['graphs']} graphs, {f['breaks']} breaks, {f['recompiles']} new)"
        if not f["error"]
        else f"{f['way']} failed: {f['error']}"
        for f in row["compiled"]
    )
    print(
        f"    {len(computed)} of {STEPS}, FLOPs {share:.2f}, of compiled: eager {row['time_of_compiled']:.2f}, {said}",
        flush=True,
    )
    return row


def baseline(bench: Bench, videos: int, rounds: int) -> dict[str, Any]:
    """Plain Wan: its videos, and how much slower it is eager than compiled."""
    conditions = random_conditions(videos, torch.Generator().manual_seed(2025))
    eager = PLAIN.velocity()
    plain = generate(eager, conditions)
    ratios = {}
    for way in WAYS[1:]:
        torch._dynamo.reset()
        run = PLAIN.velocity(way)
        generate(run, CONDITIONS, steps=2)
        ratios[way] = against(eager, run, max(3, rounds))[0]
    ratio = 1 / ratios["whole"]
    bench.row("Wan eager over Wan compiled", ratio, "", None)
    bench.row("regional over whole", ratios["regional"] * ratio, "", None)
    torch._dynamo.reset()
    return {"conditions": conditions, "videos": plain, "eager": eager, "eager_of_compiled": ratio}


def as_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        box=None, pad_edge=False, title="Peers: times are of plain torch.compile (and of plain eager)", title_justify="left"
    )
    for column in ("name", "setting", "computed", "FLOPs", "eager", "whole", "regional", "PSNR", "largest error"):
        table.add_column(column, justify="left" if column in ("name", "setting") else "right", no_wrap=True)

    def shown(f: dict[str, Any] | None) -> str:
        if f is None:
            return ""
        if f.get("error"):
            return "fails"
        return f"{f['time_of_compiled']:.2f} ({f['time_of_eager']:.2f})" + ("!" if f.get("recompiles") else "")

    for r in rows:
        if "name" not in r:
            continue
        if "error" in r:
            table.add_row(r["name"], r["setting"], r["error"])
            continue
        ways = {f["way"]: f for f in r["compiled"]}
        table.add_row(
            r["name"],
            r["setting"],
            str(len(r["computed"])),
            f"{r['flops_share']:.3f}",
            shown(r),
            shown(ways.get("whole")),
            shown(ways.get("regional")),
            f"{r['value']:.1f}",
            f"{r['largest_error']:.2f}",
        )
    return table


def main() -> None:
    args = arguments(
        __doc__,
        lambda p: p.add_argument("--videos", type=int, default=8),
        lambda p: p.add_argument("--rounds", type=int, default=3),
        lambda p: p.add_argument("--only", nargs="*", default=None, help="names of peers begin so"),
        lambda p: p.add_argument(
            "--compile-all", action="store_true", help="compile every setting, not only each tool's second"
        ),
        lambda p: p.add_argument("--ways", nargs="*", default=list(WAYS[1:]), choices=WAYS[1:], help="how to compile"),
        lambda p: p.add_argument("--steps-json", type=Path, default=None, help="where the lists of computed steps go"),
    )
    quieten()
    bench = Bench("peers")
    bench.row("Wan against the demo's class, largest relative difference", difference(), "", "< 1e-4")
    base = baseline(bench, args.videos, args.rounds)
    lists: dict[str, Any] = {"conditions": "vdcache.demo.run.CONDITIONS", "seed": 0, "steps": STEPS, "mag_ratios": mag_ratios()}
    lists["peers"] = []
    seen: Counter[str] = Counter()
    for peer in peers():
        seen[peer.name] += 1
        if args.only and not peer.name.startswith(tuple(args.only)):
            continue
        ways = args.ways if args.compile_all or seen[peer.name] == 2 else ()
        row = measure(bench, peer, ways, args.rounds, base)
        keys = ("name", "setting", "values", "computed", "flops")
        lists["peers"].append({k: row[k] for k in keys if k in row})
        gc.collect()
        bench.write(args.json)
        if args.steps_json:
            args.steps_json.write_text(json.dumps(lists, indent=1))
    Console(width=140).print(as_table(bench.rows))


if __name__ == "__main__":
    main()
