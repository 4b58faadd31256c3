"""Every published cache method on one trained model: what does each give, and when are fewer steps worth more?

Every method at up to four settings, under Euler, a second-order multistep solver and UniPC: steps and FLOPs computed, time over
plain torch.compile, PSNR and SSIM to the same solver's 30 steps, PSNR to the converged video, whether the videos still do as
told, bytes kept. The rival of each row is plain sampling under the same solver with as many steps as fit into the row's time;
differences are paired over videos, with 95 % intervals. Beside them, in the same run, what a user would take instead
(`bench.peers`), compiled.

First of all, for each method that a peer also has: are the same steps computed at the same thresholds?

FLOPs are those of the graphs that ran. Settings of one method share their compiled graphs: only the policy is exchanged, as it
may be.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vdcache
from bench.common import Bench, arguments, timed
from bench.profilingdit import psnr_of
from bench.solvers import SOLVERS, converged, generate
from vdcache.demo.conditions import Condition
from vdcache.demo.data import random_conditions
from vdcache.demo.judge import judge
from vdcache.demo.run import CONDITIONS, calibrated_recipe
from vdcache.demo.sampler import sample
from vdcache.demo.weights import load_model
from vdcache.policies.plan import RECOMPUTE

STEPS = 30
LADDER = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 25)


@dataclass(frozen=True)
class Entry:
    """One method at one setting."""

    method: str
    setting: str
    recipe: vdcache.Recipe = field(compare=False)
    everywhere: bool = False  # under every solver, not only Euler


def entries(model: nn.Module) -> list[Entry]:
    """Every method, from gentle to aggressive."""

    def run(model: Any, condition: Condition) -> Tensor:
        return sample(model, [condition], steps=STEPS, seed=900)

    prompts = random_conditions(4, torch.Generator().manual_seed(11))
    ratios = vdcache.calibration.magnitudes(model, run, prompts=prompts)
    errors = vdcache.calibration.step_errors(model, run, prompts=prompts)
    profile = vdcache.profile(model, run, prompts=prompts)
    found: list[Entry] = []

    def add(method: str, settings: dict[str, vdcache.Recipe], everywhere: Sequence[int] = (1, 2)) -> None:
        found.extend(Entry(method, name, made, i in everywhere) for i, (name, made) in enumerate(settings.items()))

    named = vdcache.methods.recipe
    add("every-N", {f"{n}": named(f"every-{n}") for n in (2, 3, 4, 5)})
    books = {"slow": named("adacache-slow"), "calibrated": calibrated_recipe(), "fast": named("adacache-fast")}
    add("AdaCache", books | {"fast + MoReg": named("adacache-fast+moreg")})
    add("FBCache", {f"{t:g}": vdcache.methods.fbcache(t) for t in (0.06, 0.08, 0.12, 0.2)})
    add("DBCache F1", {f"{t:g}": vdcache.methods.dbcache(1, 0, t, warm_up=4) for t in (0.06, 0.08, 0.12, 0.2)})
    add(
        "DBCache F1 + Taylor 1",
        {
            f"{t:g}": vdcache.methods.dbcache(1, 0, t, warm_up=4, predictor=vdcache.predictors.Taylor(1))
            for t in (0.06, 0.08, 0.12, 0.2)
        },
    )
    add("TeaCache", {f"{t:g}": vdcache.methods.teacache(t) for t in (0.08, 0.12, 0.2, 0.3)})
    add("SeaCache", {f"{t:g}": vdcache.methods.seacache(t) for t in (0.1, 0.2, 0.3, 0.5)})
    add("EasyCache", {f"{t:g}": vdcache.methods.easycache(t) for t in (0.025, 0.05, 0.1, 0.2)})
    add(
        "MagCache",
        {
            f"{t:g}, {k}": vdcache.methods.magcache(ratios, threshold=t, max_consecutive=k)
            for t, k in ((0.06, 2), (0.12, 3), (0.24, 4), (0.5, 6))
        },
    )
    add("FORA", {f"{n}": vdcache.methods.fora(n) for n in (2, 3, 4, 5)})
    add("TaylorSeer 1", {f"{n}": vdcache.methods.taylorseer(n, 1) for n in (2, 3, 4, 5)})
    add("TaylorSeer 2", {f"{n}": vdcache.methods.taylorseer(n, 2) for n in (2, 3, 4, 5)})
    add("Δ-DiT", {f"{n}": vdcache.methods.delta_dit(n) for n in (2, 3, 4, 5)})
    add("T-GATE", {f"{n}": vdcache.methods.tgate(n) for n in (20, 15, 10, 5)})
    window = (0.0, 1000.0)
    add("PAB", {f"{a}/{c}": vdcache.methods.pab(a, 0, c, window=window) for a, c in ((2, 2), (2, 4), (3, 6), (5, 10))})
    add("SmoothCache", {f"{a:g}": vdcache.methods.smoothcache(errors.schedule(a)) for a in (0.1, 0.15, 0.25, 0.35)})
    add(
        "FasterCache",
        {name: vdcache.methods.fastercache(name, predicted="second") for name in ("cogvideox", "latte", "open-sora")},
    )
    lists = {
        "even": vdcache.policies.LinearIntervals(6, 12, 2, "even", of_steps=50),
        "decreasing": vdcache.policies.LinearIntervals(6, 12, 2, of_steps=50),
    }
    add("ProfilingDiT", {name: vdcache.methods.profilingdit(profile, when=when) for name, when in lists.items()}, (0, 1))
    # what no paper has, from the same parts: the delta of all blocks extrapolated, at steps that a probe or a schedule chooses
    all_blocks = (vdcache.passes.MarkBranches(), vdcache.passes.MergeSlots())
    own = {
        f"TeaCache {t:g}": vdcache.Recipe(
            f"own-{t:g}",
            vdcache.methods.teacache(t).policy,
            vdcache.methods.teacache(t).passes,
            predictor=vdcache.predictors.Taylor(1),
        )
        for t in (0.08, 0.12, 0.2)
    }
    add(
        "all blocks + Taylor 1",
        own
        | {
            "every 3": vdcache.Recipe(
                "own-3", vdcache.methods.fora(3).policy, all_blocks, predictor=vdcache.predictors.Taylor(1)
            )
        },
    )
    return found


class Ways:
    """Compiled models by scope and predictor; a policy is exchanged without compiling."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.options, self.made = model, options, {}

    def take(self, recipe: vdcache.Recipe) -> Any:
        key = f"{recipe.pipeline} | {recipe.predictor}"
        if key not in self.made:
            self.made[key] = vdcache.compile(self.model, recipe, num_steps=STEPS, dynamic=False, **self.options)
        way = self.made[key]
        way.vdcache.prepare = lambda n: recipe.for_steps(n).policy
        way.vdcache.reset()
        return way


def flops_share(way: Any) -> float:
    """FLOPs of the last generation over those of a plain one."""
    total = full = 0
    for record in way.vdcache.history.generation():
        for graph in way.vdcache.graphs:
            plan = graph.narrow(record.plan) if record.reused else RECOMPUTE
            total += graph.variants.flops(plan)
            full += sum(map(vdcache.patterns.cost.flops, graph.guarded.module.graph.nodes))
    return total / full


def difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences, and half of the 95 % interval."""
    d = [x - y for x, y in zip(a, b, strict=True)]
    return mean(d), 1.96 * stdev(d) / math.sqrt(len(d)) if len(d) > 1 else math.nan


@dataclass
class Reference:
    """Plain sampling under one solver: 30 steps, and the ladder of fewer."""

    full: Tensor
    ladder: dict[int, tuple[list[float], list[float]]]  # PSNR to the full one and to the converged one, video by video


def reference(
    plain: Callable[..., Tensor], conditions: Sequence[Condition], solver: str, sure: Tensor, bench: Bench
) -> Reference:
    full = generate(plain, conditions, solver=solver, steps=STEPS)
    to_sure = psnr_of(full, sure)[0]
    verdict = judge(full, conditions)
    bench.row(
        f"{solver}: plain, {STEPS} steps", mean(to_sure), "dB", solver=solver, method="plain", setting=str(STEPS), computed=STEPS, speed=1.0, flops=1.0,
        psnr=99.0, psnr_converged=mean(to_sure), colour=verdict.colour, direction=verdict.direction, cache_mib=0.0,
    )  # fmt: skip
    ladder = {STEPS: ([99.0] * len(conditions), to_sure)}
    for n in LADDER:
        videos = generate(plain, conditions, solver=solver, steps=n)
        ladder[n] = psnr_of(videos, full)[0], psnr_of(videos, sure)[0]
        verdict = judge(videos, conditions)
        bench.row(
            f"{solver}: plain, {n} steps", mean(ladder[n][0]), "dB", solver=solver, method="plain", setting=str(n), computed=n, speed=STEPS / n,
            flops=n / STEPS, psnr=mean(ladder[n][0]), psnr_converged=mean(ladder[n][1]), colour=verdict.colour, direction=verdict.direction, cache_mib=0.0,
        )  # fmt: skip
    return Reference(full, ladder)


def measured(
    run: Callable[..., Tensor], conditions: Sequence[Condition], solver: str, begin: Any = None
) -> tuple[Tensor, list[float]]:
    """Videos, and the seconds of each batch of four."""
    videos, seconds = [], []
    for i in range(0, len(conditions), 4):
        began = time.perf_counter()
        videos.append(generate(run, conditions[i : i + 4], solver=solver, steps=STEPS, seed=i // 4, begin=begin))
        seconds.append(time.perf_counter() - began)
    return torch.cat(videos), seconds


def score(
    bench: Bench,
    case: str,
    videos: Tensor,
    speed: float,
    ref: Reference,
    sure: Tensor,
    conditions: Sequence[Condition],
    **more: Any,
) -> None:
    """One row: against the full and the converged videos, and against the plain rival of equal time."""
    psnr, ssim = psnr_of(videos, ref.full)
    to_sure = psnr_of(videos, sure)[0]
    verdict = judge(videos, conditions)
    wanted = STEPS / speed
    rival = min(ref.ladder, key=lambda n: (abs(n - wanted), -n))
    lead, half = difference(psnr, ref.ladder[rival][0])
    lead_sure, half_sure = difference(to_sure, ref.ladder[rival][1])
    bench.row(
        case, mean(psnr), "dB", speed=speed, psnr=mean(psnr), ssim=mean(ssim), psnr_converged=mean(to_sure), colour=verdict.colour,
        direction=verdict.direction, rival_steps=rival, lead=lead, lead_half=half, lead_converged=lead_sure, lead_converged_half=half_sure, **more,
    )  # fmt: skip


def main() -> None:
    args = arguments(
        __doc__,
        lambda p: p.add_argument("--videos", type=int, default=32),
        lambda p: p.add_argument("--solvers", nargs="*", default=list(SOLVERS), choices=SOLVERS),
        lambda p: p.add_argument("--only", nargs="*", default=None, help="methods begin so"),
        lambda p: p.add_argument("--same-steps", type=int, default=1, help="0 leaves out the comparison of steps"),
        lambda p: p.add_argument("--peers", type=int, default=1, help="0 leaves out the peers"),
        lambda p: p.add_argument("--picture", type=Path, default=Path("docs/pictures/methods.png")),
    )
    torch._dynamo.config.recompile_limit = 200
    torch._dynamo.config.accumulated_recompile_limit = 2000
    warnings.simplefilter("ignore")
    model = load_model()
    conditions = random_conditions(args.videos, torch.Generator().manual_seed(2025))
    bench = Bench("methods", "of each row: see its recipe")
    if args.same_steps:
        same_steps(bench, model)
        bench.write(args.json)
    sure = converged(model, conditions)
    plain = torch.compile(model, dynamic=False)
    generate(plain, conditions[:4], steps=2)
    refs = {solver: reference(plain, conditions, solver, sure, bench) for solver in args.solvers}
    ways = Ways(model)
    for entry in entries(model):
        if args.only and not entry.method.startswith(tuple(args.only)):
            continue
        way = ways.take(entry.recipe)
        session = way.vdcache
        generate(way, conditions[:4], steps=STEPS, begin=session.begin)  # compiles what it needs
        base = [timed(lambda: generate(plain, conditions[:4], steps=STEPS)) for _ in range(2)]
        for solver in args.solvers if entry.everywhere else args.solvers[:1]:
            session.history.records.clear()
            session.store.peak_bytes = 0
            videos, seconds = measured(way, conditions, solver, session.begin)
            base.append(timed(lambda: generate(plain, conditions[:4], solver=solver, steps=STEPS)))
            told = session.graphs[0].variants.cache_bytes()
            score(
                bench, f"{solver}: {entry.method} {entry.setting}", videos, median(base) / median(seconds), refs[solver], sure, conditions,
                solver=solver, method=entry.method, setting=entry.setting, recipe=str(entry.recipe), computed=len(session.history.computed_steps()),
                flops=flops_share(way), cache_mib=session.store.peak_bytes / 2**20, cache_mib_told=None if told is None else told / 2**20,
                variants=len(session.graphs[0].variants),
            )  # fmt: skip
            bench.write(args.json)
    if args.peers:
        beside(bench, plain, conditions, refs[args.solvers[0]], sure)
        bench.write(args.json)
    Console(width=150).print(as_table(bench.rows))
    draw(bench.rows, args.picture)


# ---- the peers -----------------------------------------------------------------------------------------------------


def same_steps(bench: Bench, model: nn.Module) -> None:
    """At the same thresholds, are the same steps computed as by a peer? Eager, on the demo's four conditions."""
    from bench import peers

    peers.quieten()
    ratios = peers.mag_ratios()
    sea = {"at": "input"}
    pairs: list[tuple[Any, vdcache.Recipe]] = []
    for t in (0.06, 0.08, 0.12, 0.2):
        pairs.append((peers.first_block(t), vdcache.methods.fbcache(t)))
        pairs.append((peers.dbcache(t), vdcache.methods.dbcache(1, 0, t, warm_up=4)))
        pairs.append((peers.dbcache(t, first=2), vdcache.methods.dbcache(2, 0, t, warm_up=4)))
    for t, k, r in ((0.03, 1, 0.2), (0.06, 2, 0.2), (0.12, 3, 0.2), (0.3, 5, 0.1)):
        pairs.append((peers.mag(t, k, r), vdcache.methods.magcache(ratios, threshold=t, max_consecutive=k, retention=r)))
    for t, k in ((0.08, 2), (0.12, 2), (0.2, 2), (0.4, 4)):
        own = vdcache.methods.seacache(t, **sea)
        bounds = vdcache.policies.Bounds(1, 1, max_consecutive=k)
        policy = vdcache.policies.Threshold(t, accumulate=True, bounds=bounds)
        pairs.append((peers.sea(t, k), vdcache.Recipe(own.name, policy, own.passes, predictor=vdcache.predictors.Taylor(1))))
    for a, c, w in ((2, 2, (100, 800)), (2, 4, (50, 900)), (3, 6, (0, 950))):
        pairs.append((peers.broadcast(a, c, w), vdcache.methods.pab(a, 0, c, window=w)))
    for peer, recipe in pairs:
        theirs = layers_steps(peer)
        torch._dynamo.reset()
        way = vdcache.compile(model, recipe, num_steps=STEPS, inner="eager")
        generate(way, CONDITIONS, begin=way.vdcache.begin)
        ours = way.vdcache.history.computed_steps()
        differ = sorted(set(ours) ^ set(theirs))
        bench.row(
            f"same steps: {peer.name} {peer.setting}",
            len(differ),
            "steps differ",
            None,
            ours=ours,
            theirs=theirs,
            recipe=recipe.name,
        )
    torch._dynamo.reset()


def layers_steps(peer: Any) -> list[int]:
    """The steps in which every layer of a peer's model runs, by hooks on its linear layers: faster than counting FLOPs."""
    velocity = peer.velocity()
    count = 0

    def hook(*given: Any) -> None:
        nonlocal count
        count += 1

    for layer in velocity.model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(hook)
    each: list[int] = []

    def counted(*given: Tensor) -> Tensor:
        nonlocal count
        count = 0
        out = velocity(*given)
        each.append(count)
        return out

    generate(counted, CONDITIONS, steps=STEPS, begin=velocity.begin)
    return [step for step, n in enumerate(each) if n == max(each)]


def beside(bench: Bench, plain: Any, conditions: Sequence[Condition], ref: Reference, sure: Tensor) -> None:
    """What a user would take instead, compiled, in the same run."""
    from bench import peers

    chosen = [
        peers.first_block(0.12),
        peers.dbcache(0.12),
        peers.dbcache(0.12, taylor_order=1),
        peers.mag(0.12, 3),
        peers.sea(0.2, 2),
        peers.broadcast(2, 4, (50, 900)),
        peers.faster(2, 5, 850),
        peers.taylor("branches", 3, 3),
        peers.taylor("lite", 3, 3),
    ]
    torch._dynamo.reset()
    for peer in chosen:
        found: dict[str, tuple[Tensor, float]] = {}
        for way in ("eager", "whole", "regional"):
            try:
                velocity = peer.velocity(way)
                for _ in range(2):
                    generate(velocity, conditions[:4], steps=STEPS, begin=velocity.begin)
                base = [timed(lambda: generate(plain, conditions[:4], steps=STEPS)) for _ in range(3)]
                times = [timed(lambda v=velocity: generate(v, conditions[:4], steps=STEPS, begin=v.begin)) for _ in range(3)]
                found[way] = velocity, median(base) / median(times)  # type: ignore[assignment]
            except Exception as error:  # noqa: BLE001
                bench.row(f"peer: {peer.name} {peer.setting}, {way}", math.nan, "dB", error=str(error).splitlines()[0][:200])
        best = max(found, key=lambda way: found[way][1])
        velocity, speed = found[best]  # type: ignore[assignment]
        videos = generate(velocity, conditions, steps=STEPS, begin=velocity.begin)  # type: ignore[attr-defined]
        flops = peers.flops_of(peer.velocity())[0]
        score(
            bench, f"peer: {peer.name} {peer.setting}, {best}", videos, speed, ref, sure, conditions, solver="euler", method=f"peer: {peer.name}",
            setting=peer.setting, way=best, speeds={w: s for w, (_, s) in found.items()}, computed=len(peers.computed_steps(flops)),
            flops=sum(flops) / (STEPS * peers.plain_flops()), cache_mib=None,
        )  # fmt: skip
        torch._dynamo.reset()
        generate(plain, conditions[:4], steps=2)


# ---- what a person sees --------------------------------------------------------------------------------------------


def as_table(rows: Iterable[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, title="Every method", title_justify="left")
    for column in (
        "solver",
        "method",
        "setting",
        "computed",
        "FLOPs",
        "×",
        "PSNR",
        "to converged",
        "colour",
        "way",
        "MiB",
        "rival",
        "lead",
        "lead, converged",
    ):
        table.add_column(column, justify="left" if column in ("solver", "method", "setting") else "right", no_wrap=True)
    for r in rows:
        if "method" not in r or "psnr" not in r:
            continue
        lead = f"{r['lead']:+.1f} ± {r['lead_half']:.1f}" if "lead" in r else ""
        lead_sure = f"{r['lead_converged']:+.1f} ± {r['lead_converged_half']:.1f}" if "lead" in r else ""
        mib = "" if r.get("cache_mib") is None else f"{r['cache_mib']:.2f}"
        table.add_row(
            r["solver"], r["method"], r["setting"], str(r["computed"]), f"{r['flops']:.2f}", f"{r['speed']:.2f}", f"{r['psnr']:.1f}",
            f"{r['psnr_converged']:.1f}", f"{r['colour']:.2f}", f"{r['direction']:.2f}", mib, str(r.get("rival_steps", "")), lead, lead_sure,
        )  # fmt: skip
    return table


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Quality against speed, one column a solver: the settings that no other one beats have names, all others are grey dots.

    Plain sampling with fewer steps is the line that a method has to pass.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if "method" in r and "psnr" in r and "disturbed" not in r]  # see bench/results/methods.json
    solvers = list(dict.fromkeys(r["solver"] for r in rows))
    scores = (("psnr", "PSNR to the same solver's 30 steps (dB)"), ("psnr_converged", "PSNR to the converged video (dB)"))
    figure, axes = plt.subplots(2, len(solvers), figsize=(6 * len(solvers), 11), sharex=True, squeeze=False)
    for column, solver in enumerate(solvers):
        for row, (key, title) in enumerate(scores):
            _draw_fronts(axes[row][column], [r for r in rows if r["solver"] == solver], key)
            axes[row][column].set_title(f"{solver}: {title}", fontsize=11)
        axes[1][column].set_xlabel("speed over plain torch.compile of 30 steps")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=10, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_fronts(axis: Any, rows: Sequence[dict[str, Any]], key: str) -> None:
    """One panel."""
    plain = sorted((r for r in rows if r["method"] == "plain" and r["psnr"] < 90), key=lambda r: r["speed"])
    axis.plot([r["speed"] for r in plain], [r[key] for r in plain], color="black", linewidth=2, label="plain, fewer steps")
    ours = [r for r in rows if r["method"] != "plain" and not r["method"].startswith("peer")]
    peers = [r for r in rows if r["method"].startswith("peer")]
    for points, style, colour, label in (
        (ours, "o", "0.72", "a recipe of vdcache"),
        (peers, "x", "crimson", "diffusers or cache-dit"),
    ):
        axis.plot(
            [r["speed"] for r in points], [r[key] for r in points], style, color=colour, markersize=5, label=label if points else None
        )  # fmt: skip
    front = [r for r in (*ours, *peers) if not any(o["speed"] >= r["speed"] and o[key] > r[key] for o in (*ours, *peers))]
    front.sort(key=lambda r: r["speed"])
    axis.plot(
        [r["speed"] for r in front], [r[key] for r in front], "o-", color="#2b6cb0", linewidth=1.2, markersize=6, label="no other is better and faster"
    )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xticks([1, 1.5, 2, 3, 4, 6], ["1×", "1.5×", "2×", "3×", "4×", "6×"])
    axis.set_xlim(1, 7)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    speeds, values = [r["speed"] for r in plain], [r[key] for r in plain]
    last = math.inf  # height of the name before, in pixels
    for r in front:
        if r[key] <= np.interp(r["speed"], speeds, values):
            continue  # fewer steps are better
        point = axis.transData.transform((r["speed"], r[key]))[1]
        last = min(point + 2, last - 15)
        axis.annotate(
            f"{r['method'].removeprefix('peer: ')} {r['setting']}".strip(),
            (r["speed"], r[key]),
            fontsize=8.5,
            color="crimson" if r in peers else "#1a365d",
            xytext=(9, (last - point) * 72 / axis.figure.dpi),
            textcoords="offset points",
        )


def redraw(rows: Path, picture: Path) -> None:
    draw(json.loads(rows.read_text()), picture)


if __name__ == "__main__":
    main()
