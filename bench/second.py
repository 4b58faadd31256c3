"""Do the claims hold on a second trained model of another kind, that nothing was tuned to?

The model of `bench.second_model` (an MMDiT on images, epsilon-prediction, a cosine schedule), under DDIM, DPM-Solver++ and UniPC.
30 steps are the reference; scenes are held out from training and calibration, differences are paired over images, with 95 %
intervals. Each row has these leads over plain sampling:

- `lead_own`: over the same solver with as many steps as fit into the row's time, in PSNR to that solver's 30 steps;
- `lead`: over the best of the three solvers with as many steps, in the same PSNR;
- `lead_converged`: the same, in PSNR to the converged image (240 steps of UniPC);
- `lead_flops`: as `lead`, with as many steps as need the row's FLOPs, which other work on the machine does not change.

`vdcache-auto` is calibrated in use, by its first generation, on other scenes; "searched, both scopes" is `vdcache.search_schedule` on
the same scenes, which also tries branches before their gates. Losses are rows like all others.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import vdcache
from bench.common import Bench, arguments, timed
from bench.methods import Ways, difference, flops_share
from bench.schedules import even
from bench.second_model.classifier import judge, load_classifier
from bench.second_model.network import BATCH, SOLVERS, generate, psnr_of
from bench.second_model.scenes import Scene, random_scenes
from bench.second_model.train import load

STEPS = 30
COUNTS = (7, 9, 11, 13, 17)
LADDER = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 20, 25)
TIMED = 3  # batches of each row that are timed beside plain ones
CONVERGED = ("unipc", 240)
SEED = 0  # of the first batch's noise


def recipes(counts: Sequence[int]) -> list[tuple[str, str, vdcache.Recipe]]:
    """(method, setting, recipe) of every row but those of vdcache-auto."""
    named, methods = vdcache.methods.recipe, vdcache.methods
    found = [("even steps, Taylor 1", str(n), even(n, 1)) for n in counts]
    found += [("even steps, last value", str(n), even(n, 0)) for n in counts]
    found += [("every-N", str(n), named(f"every-{n}")) for n in (2, 3, 4)]
    found += [("AdaCache", name, named(f"adacache-{name}")) for name in ("slow", "fast")]
    found += [("TeaCache", f"{t:g}", methods.teacache(t)) for t in (0.08, 0.12, 0.2)]
    found += [("FBCache", f"{t:g}", methods.fbcache(t)) for t in (0.08, 0.12)]
    found += [("EasyCache", f"{t:g}", methods.easycache(t)) for t in (0.025, 0.05)]
    found += [("FORA", "3", methods.fora(3)), ("TaylorSeer 1", "3", methods.taylorseer(3, 1))]
    found += [("Spectrum", f"{g:g}", methods.spectrum(g)) for g in (0.75, 3.0)]
    found += [("HiCache", "3", methods.hicache(3)), ("FoCa", "3", methods.foca(3))]
    found += [("ZEUS", str(n), methods.zeus(n)) for n in (2, 3)]
    return found


@dataclass
class Comparison:
    """Plain sampling of all solvers, and the rows of what is compared with it."""

    bench: Bench
    scenes: Sequence[Scene]
    sure: Tensor
    classifier: Any
    full: dict[str, Tensor] = field(default_factory=dict)  # 30 steps by solver
    plain: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # images by solver and steps

    def reference(self, run: Any, solvers: Sequence[str]) -> None:
        for solver in solvers:
            self.full[solver] = generate(run, self.scenes, solver=solver, steps=STEPS, seed=SEED)
            self.plain[solver, STEPS] = self.full[solver]
            for n in LADDER:
                self.plain[solver, n] = generate(run, self.scenes, solver=solver, steps=n, seed=SEED)
        for (solver, n), images in self.plain.items():
            psnr, to_sure = psnr_of(images, self.full[solver]), psnr_of(images, self.sure)
            self.bench.row(
                f"{solver}: plain, {n} steps", mean(psnr), "dB", solver=solver, method="plain", setting=str(n), computed=n, speed=STEPS / n,
                psnr=mean(psnr), psnr_converged=mean(to_sure), words=self.words(images), images=len(self.scenes),
            )  # fmt: skip

    def words(self, images: Tensor) -> float:
        """Share of the words that the images show."""
        return judge(images, self.scenes, self.classifier).words

    def lead(self, images: Tensor, target: Tensor, solvers: Sequence[str], steps: int) -> tuple[float, float, str]:
        """Mean lead in dB over the best of the solvers with so many plain steps, half of its interval, and that solver."""
        best = max(solvers, key=lambda s: mean(psnr_of(self.plain[s, steps], target)))
        return *difference(psnr_of(images, target), psnr_of(self.plain[best, steps], target)), best

    def score(self, solver: str, method: str, setting: str, images: Tensor, speed: float, flops: float, **more: Any) -> None:
        psnr, to_sure = psnr_of(images, self.full[solver]), psnr_of(images, self.sure)
        steps, by_flops = (min((*LADDER, STEPS), key=lambda n: (abs(n - STEPS * share), -n)) for share in (1 / speed, flops))
        own, own_half, _ = self.lead(images, self.full[solver], [solver], steps)
        lead, half, rival = self.lead(images, self.full[solver], list(self.full), steps)
        lead_sure, half_sure, rival_sure = self.lead(images, self.sure, list(self.full), steps)
        lead_flops, half_flops, _ = self.lead(images, self.full[solver], list(self.full), by_flops)
        interval = difference(psnr, [0.0] * len(psnr))[1]
        self.bench.row(
            f"{solver}: {method} {setting}", mean(psnr), "dB", solver=solver, method=method, setting=setting, speed=speed, psnr=mean(psnr),
            psnr_half=interval, psnr_converged=mean(to_sure), words=self.words(images), images=len(images), rival_steps=steps, lead_own=own,
            lead_own_half=own_half, lead=lead, lead_half=half, rival=rival, lead_converged=lead_sure, lead_converged_half=half_sure,
            rival_converged=rival_sure, flops=flops, rival_steps_flops=by_flops, lead_flops=lead_flops, lead_flops_half=half_flops, **more,
        )  # fmt: skip


def main() -> None:
    args = arguments(
        __doc__,
        lambda p: p.add_argument("--images", type=int, default=32),
        lambda p: p.add_argument(
            "--solvers", nargs="*", default=list(SOLVERS), choices=SOLVERS, help="that caching is tried under"
        ),
        lambda p: p.add_argument("--only", nargs="*", default=None, help="methods begin so"),
        lambda p: p.add_argument("--inner", default="inductor", choices=("inductor", "eager"), help="what compiles both sides"),
    )
    torch._dynamo.config.recompile_limit = 200
    torch._dynamo.config.accumulated_recompile_limit = 2000
    model = load()
    scenes = random_scenes(args.images, torch.Generator().manual_seed(2025), held_out=True)
    others = random_scenes(BATCH, torch.Generator().manual_seed(7))
    bench = Bench("second", f"inner={args.inner}; converged: {CONVERGED[1]} steps of {CONVERGED[0]}")
    plain: Any = torch.compile(model, dynamic=False) if args.inner == "inductor" else model
    generate(plain, others, steps=2)
    sure = generate(plain, scenes, solver=CONVERGED[0], steps=CONVERGED[1], seed=SEED)
    table = Comparison(bench, scenes, sure, load_classifier())
    table.reference(plain, SOLVERS)
    bench.write(args.json)
    ways = Ways(model, inner=args.inner)
    for solver in args.solvers:

        def cached(method: str, setting: str, recipe: vdcache.Recipe, solver: str = solver, **more: Any) -> Any:
            way = ways.take(recipe)
            session = way.vdcache
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                generate(way, others, solver=solver, seed=77, begin=session.begin)  # compiles what it needs
                session.history.records.clear()
                session.store.peak_bytes = 0
                images, seconds, beside = [], [], []
                for i, start in enumerate(range(0, len(scenes), BATCH)):
                    part = scenes[start : start + BATCH]
                    if i < TIMED:
                        beside.append(timed(lambda: generate(plain, part, solver=solver, steps=STEPS)))
                    began = time.perf_counter()
                    images.append(generate(way, part, solver=solver, steps=STEPS, seed=SEED + i, begin=session.begin))
                    seconds.append(time.perf_counter() - began)
            computed = [len(session.history.computed_steps(g)) for g in {r.generation for r in session.history.records}]
            table.score(
                solver, method, setting, torch.cat(images), median(p / c for p, c in zip(beside, seconds, strict=False)),
                flops_share(way), computed=mean(computed),
                cache_mib=session.store.peak_bytes / 2**20, recipe=recipe.name, warnings=told(caught), **more,
            )  # fmt: skip
            bench.write(args.json)
            return way

        def wanted(method: str) -> bool:
            return not args.only or method.startswith(tuple(args.only))

        if wanted("vdcache-auto"):
            way = ways.take(even(15, 1))
            generate(way, others, solver=solver, seed=77, begin=way.vdcache.begin)
            reuse = (flops_share(way) * STEPS - 15) / (STEPS - 15)
            for count in (None, *COUNTS):
                speedup = None if count is None else STEPS / (count + (STEPS - count) * reuse) - 1e-3
                found, seconds, said = in_use(model, others, solver, speedup, args.inner)
                name = "default" if count is None else str(count)
                if found is None:
                    bench.row(
                        f"{solver}: vdcache-auto {name}, not calibrated", float("nan"), "dB", solver=solver, warnings=said
                    )
                    continue
                cached(
                    "vdcache-auto", name, found.schedule.recipe(), steps=list(found.schedule.computed),
                    predictor=str(found.schedule.prediction.rule),
                    predicted=found.schedule.psnr, tried=len(found.tried), calibration_seconds=seconds, calibration_warnings=said,
                )  # fmt: skip
        if wanted("searched"):

            def run(m: Any, solver: str = solver) -> Tensor:
                return generate(m, others, solver=solver, seed=77)

            steps = vdcache.calibration.step_table(model, run)
            for count in COUNTS:
                best = vdcache.search_schedule(
                    model, run, count, orders=(1,), scopes=("blocks", "branches"), table=steps, inner=args.inner
                )
                cached(
                    "searched, both scopes", str(count), best.recipe(), steps=list(best.computed),
                    predictor=str(best.prediction.rule), scope=best.scope, predicted=best.psnr,
                )  # fmt: skip
        for method, setting, recipe in recipes(COUNTS):
            if wanted(method):
                cached(method, setting, recipe)
    bench.write(args.json)
    Console(width=150).print(as_table(bench.rows))


def told(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """What vdcache warned of."""
    return [str(w.message) for w in caught if issubclass(w.category, vdcache.VdcacheWarning)]


def in_use(
    model: Any, scenes: Sequence[Scene], solver: str, speedup: float | None, inner: str
) -> tuple[vdcache.calibration.Calibration | None, float, list[str]]:
    """What `vdcache-auto` finds in one generation of four images, the seconds of its search, and its warnings."""
    before = os.environ.get("VDCACHE_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        os.environ["VDCACHE_CACHE_DIR"] = folder  # else it would know the schedule already
        try:
            way = vdcache.compile(
                model, vdcache.methods.auto(speedup=speedup), num_steps=STEPS, dynamic=False, inner=inner, search_share=math.inf
            )
            generate(way, scenes, solver=solver, seed=77, begin=way.vdcache.begin)
            found = way.vdcache.calibration
        finally:
            if before is None:
                del os.environ["VDCACHE_CACHE_DIR"]
            else:
                os.environ["VDCACHE_CACHE_DIR"] = before
    return found, found.seconds if found is not None else float("nan"), told(caught)


def as_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, title="The second model", title_justify="left")
    columns = (
        "solver",
        "method",
        "setting",
        "computed",
        "×",
        "PSNR",
        "to converged",
        "words",
        "plain",
        "lead, own",
        "lead, best",
        "lead, converged",
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=True)
    for r in (r for r in rows if "method" in r and "psnr" in r):
        leads = [
            f"{r[k]:+.1f} ± {r[f'{k}_half']:.1f}" if k in r else ""
            for k in ("lead_own", "lead", "lead_flops", "lead_converged")
        ]
        table.add_row(
            r["solver"], r["method"], r["setting"], f"{r['computed']:g}", f"{r['speed']:.2f}", f"{r['psnr']:.1f}", f"{r['psnr_converged']:.1f}",
            f"{r['words']:.2f}", str(r.get("rival_steps", "")), *leads,
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
