"""`vdcache demo`: the shipped model, plain, cached and under masks, side by side."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import vdcache
from vdcache.demo.conditions import Condition
from vdcache.demo.fixed import Velocity, packaged
from vdcache.demo.judge import motion
from vdcache.demo.progress import Stages
from vdcache.demo.sampler import sample
from vdcache.demo.weights import load_model
from vdcache.methods.recipe import Recipe
from vdcache.runtime.history import Record
from vdcache.runtime.summary import timeline

__all__ = ["CONDITIONS", "STATIC", "Row", "calibrated_recipe", "run_demo"]

STATIC = "static schedule (ONNX)"  # fixed graphs that onnxruntime runs
CONDITIONS = (
    Condition("disc", "red", "right", "still", "clouds"),
    Condition("triangle", "yellow", "up", "slow", "checks"),
    Condition("square", "cyan", "left", "fast", "stripes"),
    Condition("cross", "magenta", "down", "fast", "flat"),
)


@dataclass
class Row:
    """One line of the demo's table. PSNR in dB and SSIM are against the uncached compiled run; `rival` is plain generation with
    as many steps as fit into the same time."""

    recipe: str
    computed: float
    steps: int
    seconds: float
    speedup: float
    psnr: float | None
    ssim: float | None
    cache_mib: float
    compile_seconds: float
    rival_steps: int | None = None
    rival_psnr: float | None = None
    rival_ssim: float | None = None
    rival_wins: bool | None = None


def calibrated_recipe() -> Recipe:
    """AdaCache with the codebook that `python -m vdcache.demo.calibrate` measured on the shipped model, for 30 steps."""
    data = json.loads((resources.files("vdcache.demo") / "codebook.json").read_text())
    return vdcache.methods.adacache([(t, r) for t, r in data["entries"]], name="adacache-calibrated")


def default_recipes() -> list[str | Recipe]:
    exports = not torch.cuda.is_available() and all(find_spec(m) for m in ("onnx", "onnxscript", "onnxruntime"))
    static = [STATIC] if exports else []
    return [
        "vdcache-auto",
        "adacache-slow",
        "adacache-fast",
        "adacache-fast+moreg",
        calibrated_recipe(),
        "tiles-4",
        "tiles-4+adacache-fast",
        *static,
    ]


def run_demo(
    out: Path,
    *,
    recipes: Sequence[str | Recipe] | None = None,
    conditions: Sequence[Condition] = CONDITIONS,
    steps: int = 30,
    rounds: int = 3,
    inner: str = "inductor",
    weights: Path | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> list[Row]:
    """Generate, time and compare; writes `videos.gif`, `timeline.png` and `rows.json` into `out`, prints one table.

    Every way of generating runs once a round, in turn, so that a noisy machine is noisy for all; times are medians.
    """
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(weights, device)
    wanted = default_recipes() if recipes is None else list(recipes)
    chosen = [vdcache.methods.recipe(r) for r in wanted if r != STATIC]
    named = [r.name for r in chosen] + [STATIC] * (STATIC in wanted)

    def generate(
        velocity: Callable[..., Tensor], n: int = steps, tick: Callable[[], None] = lambda: None
    ) -> tuple[Tensor, float]:
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        video = sample(velocity, conditions, steps=n, seed=seed, device=device, on_step=lambda i: tick())
        if device == "cuda":
            torch.cuda.synchronize()
        return video, time.perf_counter() - began

    if not console.is_terminal:
        console.print(f"compiling {len(named) + 2} ways and generating {rounds} rounds with each; two to six minutes")
    with Stages(console) as stages:
        ways: dict[str, Callable[..., Tensor]] = {"eager": model}
        ways["torch.compile"] = torch.compile(model) if inner == "inductor" else model
        for r in chosen:
            ways[r.name] = vdcache.compile(model, r, num_steps=steps, inner=inner, search_share=math.inf)
        compile_seconds = {}
        if STATIC in wanted:
            exporting = stages.stage("exporting the static schedule", 1)
            exporting.now()
            began = time.perf_counter()
            ways[STATIC] = packaged(out / "package", conditions, steps, model)
            compile_seconds[STATIC] = time.perf_counter() - began
            exporting.done()
        compiling = stages.stage("compiling", len(ways))
        for i, (name, way) in enumerate(ways.items(), start=1):
            compiling.now(name, f"{i} of {len(ways)}")
            began = time.perf_counter()
            session = getattr(way, "__dict__", {}).get("vdcache")
            if session is not None and session.recorder is not None:
                # it calibrates itself, on a generation that is not one of those that are shown
                sample(way, conditions, steps=steps, seed=seed + 1, device=device)
            else:
                sample(way, conditions, steps=1, seed=seed, device=device)
            if session is not None:
                session.warm_up()
                session.reset()
            if isinstance(way, Velocity):
                way.begin()
            compile_seconds[name] = compile_seconds.get(name, 0.0) + time.perf_counter() - began
            compiling.done()
        videos: dict[str, Tensor] = {}
        times: dict[str, list[float]] = {name: [] for name in ways}
        generating = stages.stage("generating", rounds * len(ways) * steps)
        for turn in range(1, rounds + 1):
            for name, way in ways.items():
                generating.now(name, f"round {turn} of {rounds}")
                videos[name], seconds = generate(way, tick=generating.done)
                times[name].append(seconds)
        plain = median(times["torch.compile"])
        rivals: dict[str, tuple[int, Tensor]] = {}
        against = stages.stage("the honest rivals", len(named))
        for name in named:
            against.now(f"plain, in the time of {name}")
            n = max(1, round(steps * median(times[name]) / plain))
            rivals[name] = (n, generate(ways["torch.compile"], min(n, steps))[0])
            against.done()

    rows, runs = [], {}
    reference = videos["torch.compile"]
    for name, way in ways.items():
        session = getattr(way, "__dict__", {}).get("vdcache")
        runner = way.runner if isinstance(way, Velocity) else None
        history = session.history if session else runner.history if runner else None
        records: list[Record] = history.generation() if history else []
        if records:
            runs[name] = records
        psnr, ssim = quality(videos[name], reference) if name != "torch.compile" else (None, None)
        row = Row(
            recipe=name,
            computed=len(history.computed_steps()) if history else steps,
            steps=steps,
            seconds=median(times[name]),
            speedup=plain / median(times[name]),
            psnr=psnr,
            ssim=ssim,
            cache_mib=(session.store.peak_bytes if session else runner.cache_bytes if runner else 0) / 2**20,
            compile_seconds=compile_seconds[name],
        )
        if name in rivals:
            row.rival_steps, video = rivals[name]
            row.rival_psnr, row.rival_ssim = quality(video, reference)
            row.rival_wins = (row.rival_psnr or 0) > (psnr or 0)
        rows.append(row)
    shown = {n: videos[n] for n in ways if n != "eager"}
    write_gif(shown, rows, out / "videos.gif")
    timeline(runs, out / "timeline.png")
    details = {
        "machine": machine(),
        "conditions": [str(c) for c in conditions],
        "motion": [round(m, 4) for m in motion(reference).tolist()],
        "rows": [asdict(r) for r in rows],
    }
    (out / "rows.json").write_text(json.dumps(details, indent=1))
    console.print(as_table(rows))
    console.print(f"[dim]Written: {out / 'videos.gif'}, {out / 'timeline.png'}, {out / 'rows.json'}[/dim]")
    return rows


def quality(video: Tensor, reference: Tensor) -> tuple[float, float]:
    """PSNR (dB) and SSIM of videos in [−1, 1] against a reference, over all frames; PSNR is infinite for equal videos."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = (v.float().clamp(-1, 1).transpose(1, 2).flatten(0, 1).cpu() for v in (video, reference))
    psnr = peak_signal_noise_ratio(a, b, data_range=2.0)
    ssim = structural_similarity_index_measure(a, b, data_range=2.0)
    assert isinstance(ssim, Tensor)
    return float(psnr), float(ssim)


def as_table(rows: Sequence[Row]) -> Table:
    table = Table(
        title="vdcache demo: the shipped video DiT",
        title_justify="left",
        caption="× is the speed over plain torch.compile; PSNR in dB and SSIM against it; rival: plain, with as many steps as fit in the same time",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("recipe", no_wrap=True)
    for name in ("steps", "×", "PSNR", "SSIM", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("rival", no_wrap=True)
    for r in rows:
        rival = ""
        if r.rival_steps is not None:
            who = "[red]wins[/red]" if r.rival_wins else "[green]loses[/green]"
            rival = f"{r.rival_steps} steps {r.rival_psnr:.1f} {who}"
        table.add_row(
            r.recipe,
            f"{r.computed:g}/{r.steps}",
            f"{r.speedup:.2f}",
            "–" if r.psnr is None else f"{r.psnr:.1f}",
            "–" if r.ssim is None else f"{r.ssim:.3f}",
            f"{r.cache_mib:.2f}",
            rival,
        )
    return table


def write_gif(videos: dict[str, Tensor], rows: Sequence[Row], path: Path, zoom: int = 5) -> None:
    """The videos side by side: a line a way of generating, a column a condition."""
    import imageio.v3 as iio
    import numpy as np
    from PIL import Image, ImageDraw

    by_name = {r.recipe: r for r in rows}
    margin, gap = 190, 6
    count, _, frames, height, width = next(iter(videos.values())).shape
    cell_h, cell_w = height * zoom + gap, width * zoom + gap
    pictures = []
    for f in range(frames):
        sheet = Image.new("RGB", (margin + count * cell_w, len(videos) * cell_h + gap), "white")
        pen = ImageDraw.Draw(sheet)
        for i, (name, video) in enumerate(videos.items()):
            row = by_name[name]
            label = f"{name}\n{row.computed:g} of {row.steps} steps\n{row.speedup:.2f}x" + (
                f", {row.psnr:.1f} dB" if row.psnr else ""
            )
            pen.multiline_text((8, i * cell_h + 12), label, fill="black", font_size=15, spacing=5)
            for j in range(count):
                pixels = ((video[j, :, f].permute(1, 2, 0).float().cpu().clamp(-1, 1) + 1) * 127.5).byte().numpy()
                tile = Image.fromarray(np.ascontiguousarray(pixels)).resize(
                    (width * zoom, height * zoom), Image.Resampling.NEAREST
                )
                sheet.paste(tile, (margin + j * cell_w, gap + i * cell_h))
        pictures.append(np.asarray(sheet))
    iio.imwrite(path, np.stack(pictures), duration=150, loop=0)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import platform

    return {
        "vdcache": vdcache.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
    }
