"""Is attention under static masks of tiles as fast as the weights that it leaves out, and which mask should which layer have?

First the kernel: masks of k reference frames in F, the lowering that vdcache chooses on this device against dense
scaled_dot_product_attention and against the ideal, 1 / density. Beside it every other lowering that runs here, and the whole model: a
Wan class compiled dense and under masks. The paper's speed-ups (Efficient-vDiT, arXiv 2502.06155, tables 1 and 12) are
quoted with each row; they are against its own dense kernel.

Then the trained model: one mask for all layers against masks that the search chose for each at the same share of weights (tables 2
and 7), thresholds, and both with a cache. Quality is against the dense 30 steps, paired over videos.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vdcache
from bench.common import Bench, arguments, timed, wan
from bench.profilingdit import generate, psnr_of
from vdcache.attention.autotune import measure
from vdcache.attention.merged import why_not_merged
from vdcache.attention.timing import seconds_of
from vdcache.demo.data import random_conditions
from vdcache.demo.sampler import sample
from vdcache.demo.weights import load_model

PAPER = {  # frames: {k: speed-up of the paper's kernel}
    8: {4: 1.25, 3: 1.46, 2: 1.86, 1: 2.83},
    24: {12: 1.32, 8: 1.72, 6: 2.14, 4: 2.91, 3: 3.67},
    13: {7: 1.08, 5: 1.10, 4: 1.27, 3: 1.47, 2: 1.85, 1: 2.60},
}
STEPS = 30


def main() -> None:
    args = arguments(
        __doc__,
        lambda p: p.add_argument("--videos", type=int, default=16),
        lambda p: p.add_argument(
            "--only",
            nargs="*",
            default=["kernel", "merged", "model", "search"],
            choices=["kernel", "merged", "model", "search"],
        ),
        lambda p: p.add_argument("--picture", type=Path, default=Path("docs/pictures/tiles.png")),
    )
    warnings.simplefilter("ignore")
    bench = Bench("tiles", "tile-attention{masks=[frames:k]}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "kernel" in args.only:
        kernels(bench, device)
        bench.write(args.json)
    if "merged" in args.only:
        kernels(bench, device, merged_beside_gather)
        bench.write(args.json)
    if "model" in args.only:
        whole_model(bench, device)
        bench.write(args.json)
    if "search" in args.only:
        layers(bench, args.videos)
        bench.write(args.json)
    draw(bench.rows, args.picture)


# ---- the kernel ----------------------------------------------------------------------------------------------------


def kernels(bench: Bench, device: str, row: Callable[..., None] | None = None) -> None:
    row = row or one
    for frames, must in ((8, ">= 0.9"), (24, ">= 0.9")):
        compare(row, bench, device, frames, tuple(PAPER[frames]), 384, 6, 64, must=must)
    compare(row, bench, device, 13, tuple(PAPER[13]), 384, 6, 64, text=226, must=">= 0.9")
    for tokens in (390, 1350):
        for dtype in (torch.float32, torch.bfloat16):
            compare(
                row,
                bench,
                device,
                21,
                (1, 3, 7),
                tokens,
                2 if device == "cpu" else 12,
                64,
                batch=2,
                dtype=dtype,
                must=">= 0.85",
            )
    if device == "cuda":  # 29 × 720p
        for head_dim, heads in ((72, 24), (128, 24)):
            compare(row, bench, device, 8, (4, 3, 2, 1), 3600, heads, head_dim, dtype=torch.bfloat16, every=True)
    # The other masks, where each tile is some rows of a frame.
    for mask, grid in (
        ("window:3x3x3:2x6x6", (8, 24, 24)),
        ("radial:8:1", (24, 24, 16)),
        ("multi-diagonal:8:2", (24, 24, 16)),
        ("stripes:8:8:2", (24, 24, 16)),
        ("diagonal:8:8", (24, 24, 16)),
    ):
        row(bench, device, mask, grid, 6, 64, f"{mask} on {' × '.join(map(str, grid))}")


def compare(
    row: Callable[..., None], bench: Bench, device: str, frames: int, ks: Sequence[int], tokens: int, heads: int, dim: int, *, text: int = 0, batch: int = 1,
    dtype: torch.dtype = torch.float32, must: str | None = None, every: bool = False,
) -> None:  # fmt: skip
    for k in ks:
        name = str(dtype).removeprefix("torch.")
        case = f"F={frames} k={k}, {tokens} tokens a frame{f', {text} of text' if text else ''}, batch {batch}, {name}"
        paper = PAPER.get(frames, {}).get(k)
        row(bench, device, f"frames:{k}", (frames, tokens, 1), heads, dim, case, text=text, batch=batch, dtype=dtype, must=must,
            paper=paper, every=every)  # fmt: skip


def one(
    bench: Bench, device: str, mask: str, grid: tuple[int, int, int], heads: int, dim: int, case: str, *, text: int = 0, batch: int = 1,
    dtype: torch.dtype = torch.float32, must: str | None = None, paper: float | None = None, every: bool = False,
) -> None:  # fmt: skip
    on = vdcache.attention.tiles.tiled(mask, grid, text, 0)
    q, k, v = (
        torch.randn(batch, on.tokens, heads, dim, device=device, dtype=torch.float32).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    found = measure(q, k, v, None, on, None, every=every)
    if not found.seconds:
        raise SystemExit(f"{case}: too long to measure on this device")
    error = None
    if on.tokens <= 12_000:
        got, want = (run(q, k, v) for run in (lowered(on, found.lowering), lowered(on, "masked")))
        error = float((got.float() - want.float()).abs().max())
    bench.row(
        case, found.of_ideal, "of ideal", must, speedup=found.speedup, ideal=1 / on.density, density=on.density, lowering=found.lowering,
        ms={name: 1e3 * s for name, s in found.seconds.items()}, paper=paper, mask=mask, frames=grid[0], tokens=on.tokens, heads=heads, head_dim=dim,
        batch=batch, dtype=str(dtype), largest_error=error,
    )  # fmt: skip


def merged_beside_gather(
    bench: Bench, device: str, mask: str, grid: tuple[int, int, int], heads: int, dim: int, case: str, *, text: int = 0, batch: int = 1,
    dtype: torch.dtype = torch.float32, **_: Any,
) -> None:  # fmt: skip
    """Shares of the ideal by gather and merged, in one round: above, merged is only timed where gather leaves something to win."""
    on = vdcache.attention.tiles.tiled(mask, grid, text, 0)
    if why_not_merged(on):
        return
    q, k, v = (
        torch.randn(batch, on.tokens, heads, dim, device=device, dtype=torch.float32).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    names = ("gather", "merged")
    dense, *own = seconds_of([functools.partial(lowered(on, n), q, k, v) for n in ("dense", *names)], q.device)
    shares = {n: dense / s * on.density for n, s in zip(names, own, strict=True)}
    got, want = (lowered(on, n)(q, k, v) for n in ("merged", "gather"))
    bench.row(
        f"{case}: merged", shares["merged"], "of ideal by merged", None, gather=shares["gather"], density=on.density, mask=mask,
        differs=float((got.float() - want.float()).abs().max()), dtype=str(dtype), tokens=on.tokens,
    )  # fmt: skip


def lowered(on: Any, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from vdcache.attention.tiles import LOWERINGS

    if name == "dense":
        return F.scaled_dot_product_attention
    return lambda q, k, v: LOWERINGS[name](q, k, v, on, None, None)


# ---- a whole model -------------------------------------------------------------------------------------------------


def whole_model(bench: Bench, device: str) -> None:
    """diffusers' Wan with 21 latent frames of 390 tokens, two blocks of six heads, compiled with Inductor: dense and under masks."""
    model = wan(2).to(device)
    call: dict[str, Any] = {
        "hidden_states": torch.randn(1, 16, 21, 30, 52, device=device),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": torch.randn(1, 64, 256, device=device),
        "return_dict": False,
    }
    ways = {"dense": torch.compile(model, dynamic=False)}
    ways |= {f"frames:{k}": vdcache.compile(model, f"tiles-{k}", dynamic=False) for k in (7, 3, 1)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(6):
            for name, way in ways.items():
                times[name].append(timed(lambda way=way: way(**call)))  # type: ignore[misc]
    seconds = {name: median(t[1:]) for name, t in times.items()}
    for name in list(ways)[1:]:
        graph = ways[name].vdcache.graphs[0]  # type: ignore[attr-defined]
        share = graph.variants.flops(vdcache.Plan()) / dense_flops(model, call)
        bench.row(
            f"Wan, 2 blocks, 21 × 390 tokens: {name}", seconds["dense"] / seconds[name], "x", None, ms=1e3 * seconds[name],
            dense_ms=1e3 * seconds["dense"], flops=share, ideal=1 / share, how=graph.masks,
        )  # fmt: skip


def dense_flops(model: torch.nn.Module, call: dict[str, Any]) -> int:
    return vdcache.explain(model, **call).flops


# ---- which mask for which layer ------------------------------------------------------------------------------------


def layers(bench: Bench, videos: int) -> None:
    """Uniform masks against searched ones on the shipped model: held-out conditions, the same share of weights."""
    model = load_model()
    held_out = random_conditions(videos, torch.Generator().manual_seed(2025))
    for_search = random_conditions(4, torch.Generator().manual_seed(7))
    options = [f"frames:{k}" for k in range(8)]

    def run(denoiser: Callable[..., Tensor], condition: Any) -> Tensor:
        return sample(denoiser, [condition], steps=STEPS, seed=11)

    table = Path(".tiles-losses.json")
    table.unlink(missing_ok=True)
    common: dict[str, Any] = {"prompts": for_search, "timesteps": 4, "table": table}
    first: list[vdcache.calibration.MaskPlan] = []
    began = timed(lambda: first.append(vdcache.search_masks(model, run, options, budget=1.0, cost="weights", **common)))
    plan = first[0]
    bench.row("search: time for the table of 8 layers × 8 masks × 16 calls", began, "s", None, work=plan.work)
    reference = generate(model, held_out)

    def quality_row(case: str, recipe: vdcache.Recipe, **more: Any) -> None:
        way = vdcache.compile(model, recipe, num_steps=STEPS, inner="eager")
        made = generate(way, held_out)
        psnr, ssim = psnr_of(made, reference)
        half = 1.96 * stdev(psnr) / len(psnr) ** 0.5
        computed = len(way.vdcache.history.computed_steps())
        flops = way.vdcache.graphs[0].variants.flops(vdcache.Plan()) / full
        bench.row(case, mean(psnr), "dB", None, half=half, ssim=mean(ssim), psnr=psnr, computed=computed, flops=flops, **more)

    full = vdcache.explain(model, *example()).flops
    always = vdcache.methods.recipe("always")
    for k in range(7, -1, -1):
        mask = vdcache.masks.Frames(k)
        share = mask.density(8, 6, 6)
        quality_row(f"uniform frames:{k}", always.with_masks(mask), density=share, plan=[str(mask)] * 8)
        for objective in ("sum", "max"):
            found = vdcache.search_masks(model, run, options, budget=share, cost="weights", objective=objective, **common)
            quality_row(
                f"searched, {objective}, as many weights as frames:{k}", always.with_masks(found), density=found.density, plan=list(found.masks),
            )  # fmt: skip
    for r in (0.01, 0.025, 0.05, 0.1, 0.2, 0.4):
        for cumulative in (False, True):
            given = {**common, "table": None} if cumulative else common
            found = vdcache.search_masks(model, run, options, threshold=r, cumulative=cumulative, **given)
            word = ", cumulative" if cumulative else ""
            quality_row(
                f"searched, loss < {r:g}{word}", always.with_masks(found), density=found.density, plan=list(found.masks), r=r
            )
    for cached in ("adacache-fast", "adacache-slow"):
        quality_row(f"{cached} alone", vdcache.methods.recipe(cached), density=1.0)
        quality_row(
            f"{cached} + frames:4",
            vdcache.methods.recipe(cached).with_masks("frames:4"),
            density=vdcache.masks.Frames(4).density(8, 6, 6),
        )
    table.unlink(missing_ok=True)


def example() -> tuple[Tensor, ...]:
    from vdcache.demo.model import with_positions

    return with_positions(torch.randn(8, 3, 8, 24, 24)), torch.ones(8), torch.randn(8, 5, 32)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: the share of the ideal speed that is reached. Right: quality of searched and uniform masks at equal weights."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kernel = [r for r in rows if r["unit"] == "of ideal"]
    quality_rows = [r for r in rows if r["unit"] == "dB" and r["value"] < 90]  # what is dense needs no point
    if not kernel or not quality_rows:
        return
    fig, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.2), layout="constrained")
    top = max(r["ideal"] for r in kernel if r["mask"].startswith("frames"))
    left.plot([1, top], [1, top], color="#a0aec0", linewidth=1, label="ideal: 1 / share of weights kept")
    for frames, color in ((8, "#2b6cb0"), (13, "#38a169"), (24, "#dd6b20"), (21, "#805ad5")):
        own = [r for r in kernel if r["frames"] == frames and r["mask"].startswith("frames")]
        left.plot(
            [r["ideal"] for r in own], [r["speedup"] for r in own], "o", color=color, markersize=5, label=f"{frames} frames"
        )
        paper = [(r["ideal"], r["paper"]) for r in own if r["paper"]]
        if paper:
            left.plot(*zip(*paper, strict=True), "x", color=color, markersize=6)
    left.plot([], [], "x", color="#4a5568", label="the paper's kernel (GPU, against its own dense one)")
    left.set(
        xlabel="what the mask can save at most, ×", ylabel="faster than dense attention, ×", title="Attention under frame masks"
    )
    left.set_xscale("log", base=2), left.set_yscale("log", base=2)
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(plt.FuncFormatter(lambda v, _: f"{v:g}"))
    left.legend(frameon=False, fontsize=8)
    for prefix, color, mark, name in (
        ("uniform", "#718096", "o", "one mask for all layers"),
        ("searched, sum", "#2b6cb0", "s", "searched: least sum of losses"),
        ("searched, max", "#38a169", "^", "searched: least largest loss"),
    ):
        own = sorted((r["density"], r["value"]) for r in quality_rows if r["case"].startswith(prefix))
        right.plot([100 * d for d, _ in own], [v for _, v in own], marker=mark, color=color, markersize=5, label=name)
    own = sorted(
        (r["density"], r["value"]) for r in quality_rows if r["case"].startswith("searched, loss") and "cumul" not in r["case"]
    )
    right.plot(
        [100 * d for d, _ in own],
        [v for _, v in own],
        marker="d",
        color="#dd6b20",
        markersize=5,
        label="searched: loss below r",
    )
    right.set(
        xlabel="weights computed, %",
        ylabel="PSNR to dense attention, dB",
        title="The shipped model, 30 steps, held-out videos",
        xlim=(100, 0),
    )
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=140)
    plt.close(fig)


if __name__ == "__main__":
    with torch.no_grad():
        main()
