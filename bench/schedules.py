"""At equal computed steps, what does choosing the steps give, and what is left of it under a better solver?

`vdcache-auto` on the shipped model, calibrated in use, by its first generation (four conditions in one batch), and tried on others: against
`vdcache.search_schedule` on four generations of one condition each, evenly spaced steps with the same predictor and with the last value,
AdaCache, and plain sampling with as many steps; under Euler, a second-order multistep solver and UniPC. PSNR to the same
solver's 30 steps and to the converged video; differences are paired over videos, with 95 % intervals.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vdcache
from bench.common import Bench, arguments
from bench.methods import Ways, difference, measured
from bench.profilingdit import psnr_of
from bench.solvers import SOLVERS, converged, generate
from vdcache.demo.data import random_conditions
from vdcache.demo.run import calibrated_recipe
from vdcache.demo.weights import load_model
from vdcache.passes import MarkBranches, MergeSlots

STEPS = 30
COUNTS = (9, 11, 13, 17)
KINDS = ("vdcache-auto", "searched", "published", "even", "adacache", "plain")
PUBLISHED = ("dpcache", "meancache")  # LeMiCa takes 240 generations a prompt
REUSE = 0.00753  # FLOPs of a reused step over those of a computed one


def even(count: int, order: int) -> vdcache.Recipe:
    steps = sorted({round(s) for s in np.linspace(0, STEPS - 1, count)})
    predictor: Any = vdcache.predictors.Taylor(order) if order else vdcache.predictors.LastValue()
    policy = vdcache.policies.SchedulePolicy(vdcache.policies.StepList(tuple(steps), of_steps=STEPS))
    return vdcache.Recipe(f"even-{count}-{order}", policy, (MarkBranches(), MergeSlots()), predictor=predictor)


def adacaches() -> list[vdcache.Recipe]:
    between = vdcache.methods.adacache(
        [(0.08, 4), (0.16, 3), (0.24, 2), (0.32, 2), (0.4, 1), (1.0, 1)], name="adacache-between"
    )
    return [calibrated_recipe(), *map(vdcache.methods.recipe, ("adacache-fast", "adacache-slow")), between]


def main() -> None:
    args = arguments(
        __doc__,
        lambda p: p.add_argument("--videos", type=int, default=32),
        lambda p: p.add_argument("--solvers", nargs="*", default=list(SOLVERS), choices=SOLVERS),
        lambda p: p.add_argument(
            "--kinds", nargs="*", default=list(KINDS), choices=KINDS, help="what is compared; rows of other runs may be added"
        ),
        lambda p: p.add_argument("--picture", type=Path, default=Path("docs/pictures/schedules.png")),
    )
    warnings.simplefilter("ignore")
    torch._dynamo.config.recompile_limit = 200
    torch._dynamo.config.accumulated_recompile_limit = 2000
    model = load_model()
    conditions = random_conditions(args.videos, torch.Generator().manual_seed(2025))
    for_search = random_conditions(4, torch.Generator().manual_seed(7))
    bench = Bench("schedules", "canonicalise,mark-branches,merge-slots")
    sure = converged(model, conditions)
    plain = torch.compile(model, dynamic=False)
    generate(plain, conditions[:4], steps=2)
    ways = Ways(model)
    for solver in args.solvers:
        full, times = measured(plain, conditions, solver)
        whole = median(times)
        to_sure = psnr_of(full, sure)[0]
        bench.row(
            f"{solver}: plain, {STEPS} steps, to converged",
            mean(to_sure),
            "dB",
            None,
            solver=solver,
            kind="plain",
            computed=STEPS,
        )
        known: dict[str, tuple[list[float], list[float]]] = {}

        def score(
            case: str, kind: str, videos: Tensor, computed: int, solver: str = solver, full: Tensor = full, **more: Any
        ) -> None:
            psnr, converging = psnr_of(videos, full)[0], psnr_of(videos, sure)[0]
            known[case] = psnr, converging
            bench.row(
                f"{solver}: {case}", mean(psnr), "dB", None, solver=solver, kind=kind, computed=computed, psnr=mean(psnr), psnr_converged=mean(converging),
                **more,
            )  # fmt: skip

        def cached(
            case: str, kind: str, recipe: vdcache.Recipe, solver: str = solver, whole: float = whole, **more: Any
        ) -> None:
            way = ways.take(recipe)
            session = way.vdcache
            generate(way, conditions[:4], steps=STEPS, begin=session.begin)
            session.history.records.clear()
            videos, seconds = measured(way, conditions, solver, session.begin)
            computed = [len(session.history.computed_steps(g)) for g in {r.generation for r in session.history.records}]
            score(case, kind, videos, round(mean(computed)), speed=whole / median(seconds), recipe=recipe.name, **more)

        for recipe in adacaches() if "adacache" in args.kinds else ():
            cached(recipe.name, "adacache", recipe)
        table = None
        if {"searched", "published"} & {*args.kinds}:
            table = vdcache.calibration.step_table(
                model, lambda m, c, s=solver: generate(m, [c], solver=s, seed=77), prompts=for_search
            )
        for count in COUNTS:
            found, seconds = in_use(model, for_search, solver, count)
            bench.row(
                f"{solver}: calibrating in use, {count} steps",
                len(found.tried) * count / STEPS,
                "uncached generations, by computed steps",
                "<= 2",
                by_time=seconds / whole,
                solver=solver,
                kind="calibration",
                tried=len(found.tried),
            )
            cached(
                f"vdcache-auto, {count} steps",
                "vdcache-auto",
                found.schedule.recipe(),
                steps=list(found.schedule.computed),
                order=found.schedule.order,
                predicted=found.schedule.psnr,
            )
            for method in (*(("auto",) if "searched" in args.kinds else ()), *(PUBLISHED if "published" in args.kinds else ())):
                found = vdcache.search_schedule(
                    model,
                    lambda m, c, s=solver: generate(m, [c], solver=s, seed=77),
                    count,
                    prompts=for_search,
                    method=method,
                    table=table,
                    console=None,
                )
                name = "searched" if method == "auto" else method
                cached(
                    f"{name}, {count} steps",
                    name,
                    found.recipe(),
                    steps=list(found.computed),
                    order=found.order,
                    predicted=found.psnr,
                )
            if "even" in args.kinds:
                cached(f"even, order 1, {count} steps", "even, order 1", even(count, 1))
                cached(f"even, last value, {count} steps", "even, last value", even(count, 0))
            if "plain" in args.kinds:
                score(f"plain, {count} steps", "plain", generate(plain, conditions, solver=solver, steps=count), count)
            rivals = ("searched", *PUBLISHED, "plain", "even, order 1", "even, last value")
            for other in (o for o in rivals if f"{o}, {count} steps" in known):
                compare(bench, solver, f"vdcache-auto, {count} steps", f"{other}, {count} steps", known)
        for row in [r for r in bench.rows if r.get("kind") == "adacache" and r["solver"] == solver]:
            near = min((c for c in COUNTS if c <= row["computed"]), key=lambda c: row["computed"] - c, default=COUNTS[0])
            compare(bench, solver, f"vdcache-auto, {near} steps", row["case"].partition(": ")[2], known)
        bench.write(args.json)
    draw(bench.rows, args.picture)


def in_use(model: Any, conditions: list[Any], solver: str, count: int) -> tuple[vdcache.calibration.Calibration, float]:
    """What `vdcache-auto` finds in one generation of four videos, for so many computed steps; and what the search took, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VDCACHE_CACHE_DIR"] = folder  # else it would know the schedule already
        speedup = STEPS / (count + (STEPS - count) * REUSE) - 1e-3
        way = vdcache.compile(
            model, vdcache.methods.auto(speedup=speedup), num_steps=STEPS, dynamic=False, search_share=math.inf
        )
        seconds = []
        for _ in range(2):  # the second time everything is compiled
            generate(way, conditions, solver=solver, seed=77, begin=way.vdcache.begin)
            found = way.vdcache.calibration
            seconds.append(found.seconds)
            for file in Path(folder).rglob("*.json"):
                file.unlink()
        del os.environ["VDCACHE_CACHE_DIR"]
    assert len(found.schedule.computed) == count, found
    return found, seconds[-1]


def compare(bench: Bench, solver: str, ours: str, other: str, known: dict[str, tuple[list[float], list[float]]]) -> None:
    lead, half = difference(known[ours][0], known[other][0])
    lead_sure, half_sure = difference(known[ours][1], known[other][1])
    bench.row(
        f"{solver}: {ours} over {other}", lead, "dB more", None, solver=solver, half=half, lead_converged=lead_sure, lead_converged_half=half_sure,
        kind="difference", ours=ours, other=other,
    )  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel a solver: PSNR to its own 30 steps against computed steps; the chosen steps below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    solvers = list(dict.fromkeys(r["solver"] for r in rows))
    fig, axes = plt.subplots(
        2,
        len(solvers),
        figsize=(4.3 * len(solvers), 5.4),
        layout="constrained",
        squeeze=False,
        height_ratios=(3, 1),
        sharey="row",
    )
    kinds = (
        ("vdcache-auto", "#2b6cb0", "o"),
        ("searched", "#2c7a7b", "."),
        ("even, order 1", "#63b3ed", "s"),
        ("even, last value", "#a0aec0", "s"),
        ("adacache", "#dd6b20", "^"),
        ("plain", "#4a5568", "x"),
    )
    names = {
        "vdcache-auto": "vdcache-auto, calibrated in use",
        "searched": "searched on four generations",
        "even, order 1": "even steps, order 1",
        "even, last value": "even steps, last value",
        "adacache": "AdaCache",
        "plain": "fewer steps, nothing cached",
    }
    for top, low, solver in zip(*axes, solvers, strict=True):
        for kind, color, mark in kinds:
            own = sorted(
                (r["computed"], r["psnr"]) for r in rows if r["solver"] == solver and r.get("kind") == kind and "psnr" in r
            )
            if own:
                line = "" if kind == "adacache" else "-"
                top.plot(*zip(*own, strict=True), marker=mark, linestyle=line, color=color, markersize=5, label=names[kind])
        top.set(title={"euler": "Euler", "dpm++2m": "DPM-Solver++ 2M", "unipc": "UniPC"}[solver], xlabel="computed steps of 30")
        top.grid(alpha=0.25)
        for r in (r for r in rows if r["solver"] == solver and r.get("kind") == "vdcache-auto"):
            low.plot(r["steps"], [r["computed"]] * len(r["steps"]), "s", color="#2b6cb0", markersize=4)
        low.set(xlim=(-1, STEPS), yticks=COUNTS, xlabel="step", ylim=(7, 19))
        for ax in (top, low):
            ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("PSNR to the solver's 30 steps, dB")
    axes[1, 0].set_ylabel("steps chosen")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=140)
    plt.close(fig)


if __name__ == "__main__":
    main()
