"""Does reusing the blocks that look at the background, at decreasing intervals, beat other ways of reusing at equal speed?

Tables 3 and 4 of ProfilingDiT (arXiv 2504.03140) for the trained model, beside AdaCache, TeaCache's steps with all blocks, and plain
sampling with fewer steps, all as fast as background reuse. Then why: what each block alone costs, against its score; what random lists
give. The mask against the truth, the profiler's cost, and the memory of one delta a run against one a block.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vdcache
from bench.common import Bench, arguments, timed
from vdcache.calibration.segment import Otsu, principal_picture
from vdcache.demo.conditions import Condition, encode
from vdcache.demo.data import draw, random_conditions
from vdcache.demo.model import with_positions
from vdcache.demo.run import calibrated_recipe, quality
from vdcache.demo.sampler import sample
from vdcache.demo.weights import load_model
from vdcache.ir import library

STEPS = 30
WHEN = {
    "stepwise": vdcache.policies.LinearIntervals(6, 12, 2, "decreasing", of_steps=50),
    "inverse": vdcache.policies.LinearIntervals(6, 12, 2, "increasing", of_steps=50),
    "average": vdcache.policies.LinearIntervals(6, 12, 2, "even", of_steps=50),
}


def generate(model: Callable[..., Tensor], conditions: Sequence[Condition], seed: int = 0, steps: int = STEPS) -> Tensor:
    """Four videos a call, as many calls as it takes."""
    parts = [list(conditions[i : i + 4]) for i in range(0, len(conditions), 4)]
    return torch.cat([sample(model, part, steps=steps, seed=seed + i) for i, part in enumerate(parts)])


class Way:
    """One way of generating, compiled."""

    def __init__(
        self, model: torch.nn.Module, recipe: vdcache.Recipe | None, inner: str = "inductor", steps: int = STEPS
    ) -> None:
        self.steps = steps
        if recipe is None:
            self.run: Any = torch.compile(model) if inner == "inductor" else model
        else:
            self.run = vdcache.compile(model, recipe, num_steps=steps, inner=inner)

    @property
    def computed(self) -> float:
        session = getattr(self.run, "__dict__", {}).get("vdcache")
        return len(session.history.computed_steps()) if session else self.steps

    @property
    def cache_mib(self) -> float:
        session = getattr(self.run, "__dict__", {}).get("vdcache")
        return session.store.peak_bytes / 2**20 if session else 0.0


def psnr_of(videos: Tensor, reference: Tensor) -> tuple[list[float], list[float]]:
    each = [quality(a[None], b[None]) for a, b in zip(videos, reference, strict=True)]
    return [min(99.0, p) for p, _ in each], [s for _, s in each]


def main() -> None:
    args = arguments(
        __doc__,
        lambda p: p.add_argument("--videos", type=int, default=32),
        lambda p: p.add_argument("--rounds", type=int, default=5),
        lambda p: p.add_argument("--picture", type=Path, default=Path("docs/pictures/profile.png")),
    )
    torch._dynamo.config.recompile_limit = 200  # all ways compile one forward
    torch._dynamo.config.accumulated_recompile_limit = 1000
    warnings.simplefilter(
        "ignore", vdcache.VdcacheWarning
    )  # schedules for 50 steps are scaled to 30, which is what is asked for
    model = load_model()
    conditions = random_conditions(args.videos, torch.Generator().manual_seed(2025))
    bench = Bench("profilingdit")

    profile = vdcache.profile(
        model,
        lambda model, c: sample(model, [c], steps=STEPS, seed=900),
        prompts=random_conditions(8, torch.Generator().manual_seed(11)),
    )
    print(profile)
    profile.plot(args.picture)
    bench.pipeline = str(vdcache.methods.profilingdit(profile).pipeline)
    masks(bench, model, profile)
    cost(bench, model)
    memory(bench)
    reference = tables(bench, model, profile, conditions, args.rounds)
    why(bench, model, profile, conditions[:8], reference[:8])
    bench.write(args.json)
    Console().print(as_table(bench.rows))
    draw_tables(bench.rows, args.picture.with_name("profilingdit.png"))


# ---- the tables ----------------------------------------------------------------------------------------------------


def tables(
    bench: Bench, model: torch.nn.Module, profile: vdcache.calibration.Profile, conditions: Sequence[Condition], rounds: int
) -> Tensor:
    recipes: dict[str, vdcache.Recipe] = {}
    for reuse, (name, when) in itertools.product(("foreground", "background"), WHEN.items()):
        recipes[f"{reuse} reuse, {name}"] = vdcache.methods.profilingdit(profile, when=when, reuse=reuse)
    for reuse in ("split", "alternate"):
        recipes[f"background + foreground ({reuse})"] = vdcache.methods.profilingdit(
            profile, when=WHEN["stepwise"], reuse=reuse
        )
    for name in ("stepwise", "average"):  # is it of use to compute the foreground's blocks in between?
        recipes[f"every block reused, {name}"] = vdcache.methods.profilingdit(profile.blocks, when=WHEN[name])
    recipes["background reuse, stepwise, one delta a block"] = vdcache.methods.profilingdit(
        profile, when=WHEN["stepwise"], span="block"
    )

    plain = Way(model, None)
    reference = generate(plain.run, conditions)
    ways = {name: Way(model, recipe) for name, recipe in recipes.items()}
    main_way = ways["background reuse, stepwise"]
    generate(main_way.run, conditions[:4])
    ratio = median(_pair(plain, main_way, conditions[:4]) for _ in range(3))
    whole = Way(model, all_blocks(range(0, STEPS, 3)))
    generate(whole.run, conditions[:4])
    reused = median(r.seconds for r in whole.run.vdcache.history if not r.computed)
    full = median(r.seconds for r in whole.run.vdcache.history if r.computed)
    # as many computed steps as take the time of background reuse
    budget = max(2, round((STEPS / ratio - STEPS * reused / full) / (1 - reused / full)))
    ways |= {
        f"all blocks at TeaCache's steps ({budget} of {STEPS})": Way(
            model, all_blocks(tea_steps(model, conditions[:4], budget))
        ),
        f"all blocks, evenly spread ({budget} of {STEPS})": Way(
            model, all_blocks(sorted({0, *(i * STEPS // budget for i in range(budget))}))
        ),
        "AdaCache, calibrated, thresholds scaled to equal time": Way(model, adacache_of(model, conditions[:4], budget)),
        f"plain with {max(1, round(STEPS / ratio))} steps": Way(model, None, steps=max(1, round(STEPS / ratio))),
    }
    videos = {name: generate(way.run, conditions, steps=way.steps) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ("plain", *ways)}
    for _ in range(rounds):
        for name, way in {"plain": plain, **ways}.items():
            times[name].append(timed(lambda: generate(way.run, conditions[:4], steps=way.steps)))
    best = psnr_of(videos["background reuse, stepwise"], reference)[0]
    for name, way in ways.items():
        psnr, ssim = psnr_of(videos[name], reference)
        against = [a - b for a, b in zip(psnr, best, strict=True)]
        bench.row(
            name,
            mean(psnr),
            "dB",
            None,
            ssim=mean(ssim),
            speedup=median(times["plain"]) / median(times[name]),
            computed=way.computed,
            steps=way.steps,
            cache_mib=way.cache_mib,
            lpips=None,  # its weights are not at hand
            difference=mean(against),
            difference_95=1.96 * stdev(against) / len(against) ** 0.5,
            videos=len(conditions),
        )
        print(
            f"{'':<58} {bench.rows[-1]['speedup']:.2f}x, SSIM {mean(ssim):.3f}, {way.computed:g}/{way.steps} steps, {way.cache_mib:.2f} MiB, "
            f"{mean(against):+.2f} ± {bench.rows[-1]['difference_95']:.2f} dB against background reuse, stepwise"
        )
    run, block = (videos[f"background reuse, stepwise{x}"] for x in ("", ", one delta a block"))
    bench.row("largest difference of a video, one delta a run against one a block", (run - block).abs().max().item(), "", None)
    return reference


def as_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The paper's tables 3 and 4 for this model, and the rivals."""
    table = Table(box=None, pad_edge=False, title="ProfilingDiT on the shipped model", title_justify="left")
    table.add_column("what is reused, at which intervals")
    for name in ("PSNR", "SSIM", "LPIPS", "×", "computed", "MiB"):
        table.add_column(name, justify="right")
    for r in rows:
        if "speedup" in r:
            shown = (f"{r['value']:.1f}", f"{r['ssim']:.3f}", "–", f"{r['speedup']:.2f}", f"{r['computed']:g}/{r['steps']}")
            table.add_row(r["case"], *shown, f"{r['cache_mib']:.2f}")
    return table


def draw_tables(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Quality against speed of every way, and what reusing each block alone costs against its R."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    kinds = {  # beginning of a row's name -> (label, colour, marker)
        "background reuse": ("background blocks reused", "#2b6cb0", "o"),
        "foreground reuse": ("foreground blocks reused", "#c05621", "o"),
        "background + foreground": ("both in turn", "#805ad5", "o"),
        "every block": ("every block, same steps", "#718096", "D"),
        "all blocks": ("every block, more steps", "#2f855a", "D"),
        "AdaCache": ("AdaCache", "#b83280", "s"),
        "plain": ("plain, fewer steps", "black", "x"),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1.7, 1), layout="constrained")
    named = set()
    for r in rows:
        kind = next((k for k in kinds if r["case"].startswith(k)), None)
        if kind is None or "speedup" not in r or "a block" in r["case"]:
            continue
        label, colour, marker = kinds[kind]
        left.scatter(r["speedup"], r["value"], color=colour, marker=marker, s=45, label=label if kind not in named else None)
        named.add(kind)
        detail = {
            "stepwise": "decreasing",
            "inverse": "increasing",
            "average": "even",
            "split": "split",
            "alternate": "alternate",
        }
        word = next(
            (v for k, v in detail.items() if k in r["case"]),
            "TeaCache's steps" if "Tea" in r["case"] else "even" if "evenly" in r["case"] else "",
        )
        left.annotate(word, (r["speedup"], r["value"]), xytext=(6, -3), textcoords="offset points", fontsize=7.5)
    left.set(xlabel="speed over plain torch.compile", ylabel="PSNR (dB)", title="quality against speed, 32 videos")
    left.legend(fontsize=8, frameon=False)
    alone = [r for r in rows if r["case"].endswith("alone") and "r" in r]
    right.scatter([r["r"] for r in alone], [r["value"] for r in alone], color="#4a5568")
    for r in alone:
        right.annotate(r["case"].split()[2], (r["r"], r["value"]), xytext=(5, 3), textcoords="offset points", fontsize=8)
    right.set(xlabel="R of the block", ylabel="PSNR (dB)", title="reusing one block alone")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _pair(plain: Way, way: Way, conditions: Sequence[Condition]) -> float:
    return timed(lambda: generate(plain.run, conditions)) / timed(lambda: generate(way.run, conditions))


def all_blocks(steps: Sequence[int]) -> vdcache.Recipe:
    from vdcache.passes import MarkBranches, MergeSlots

    return vdcache.Recipe(
        "all-blocks", vdcache.policies.SchedulePolicy(vdcache.policies.StepList(tuple(steps))), (MarkBranches(), MergeSlots())
    )


def tea_steps(model: torch.nn.Module, conditions: Sequence[Condition], budget: int) -> list[int]:
    """TeaCache's rule on the signals of an uncached run: the relative L1 change of the first block's modulated input adds up until it
    passes δ, at which the step is computed; first and last always. δ is such that `budget` steps are computed."""
    signals: list[Tensor] = []
    hook = model.blocks[0].attn1.register_forward_pre_hook(lambda module, given: signals.append(given[0].clone()))  # type: ignore[union-attr,index]
    generate(model, conditions)
    hook.remove()
    changes = [((b - a).abs().mean() / a.abs().mean()).item() for a, b in itertools.pairwise(signals)]

    def chosen(delta: float) -> list[int]:
        steps, passed = [0], 0.0
        for step in range(1, STEPS):
            passed += changes[step - 1]
            if passed >= delta or step == STEPS - 1:
                steps.append(step)
                passed = 0.0
        return steps

    deltas = [sum(changes) * i / 4000 for i in range(1, 4000)]
    return min((chosen(d) for d in deltas), key=lambda steps: abs(len(steps) - budget))


def adacache_of(model: torch.nn.Module, conditions: Sequence[Condition], budget: int) -> vdcache.Recipe:
    """AdaCache with its calibrated thresholds scaled until it computes `budget` steps."""
    entries = calibrated_recipe().policy.codebook.entries  # type: ignore[attr-defined]
    low, high = 0.01, 100.0
    found: list[tuple[float, vdcache.Recipe]] = []
    for _ in range(9):
        middle = (low * high) ** 0.5
        recipe = vdcache.methods.adacache([(t * middle, r) for t, r in entries])
        way = Way(model, recipe, "eager")
        generate(way.run, conditions)
        found.append((abs(way.computed - budget), recipe))
        low, high = (low, middle) if way.computed < budget else (middle, high)
        if way.computed == budget:
            break
    return min(found, key=lambda f: f[0])[1]


# ---- why -----------------------------------------------------------------------------------------------------------


def why(
    bench: Bench,
    model: torch.nn.Module,
    profile: vdcache.calibration.Profile,
    conditions: Sequence[Condition],
    reference: Tensor,
) -> None:
    """What reusing each block alone costs, against its R; and random lists as long as the background list."""

    def psnr(blocks: Sequence[int]) -> float:
        way = Way(model, vdcache.methods.profilingdit(blocks, when=WHEN["stepwise"]), "eager")
        return mean(psnr_of(generate(way.run, conditions), reference)[0])

    alone = {b: psnr([b]) for b in profile.blocks}
    for block, value in alone.items():
        bench.row(
            f"reusing block {block} alone",
            value,
            "dB",
            None,
            r=profile.block_scores[block],
            preference=profile.preference[block],
        )
    scores = [profile.block_scores[b] for b in profile.blocks]
    bench.row(
        "rank correlation of R with the PSNR of reusing the block alone", spearman(scores, list(alone.values())), "", None
    )
    lists = list(itertools.combinations(profile.blocks, len(profile.background)))
    chosen = random.Random(0).sample([c for c in lists if c != profile.background], min(12, len(lists) - 1))
    own, others = psnr(profile.background), [psnr(c) for c in chosen]
    bench.row("background list", own, "dB", None, blocks=list(profile.background))
    bench.row(
        "random lists of its length, median",
        median(others),
        "dB",
        None,
        best=max(others),
        worst=min(others),
        better=sum(o > own for o in others),
        of=len(others),
    )
    cheapest = sorted(profile.blocks, key=lambda b: -alone[b])[: len(profile.background)]
    bench.row("the blocks that cost least alone", psnr(sorted(cheapest)), "dB", None, blocks=sorted(cheapest))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


# ---- the mask ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def masks(bench: Bench, model: torch.nn.Module, profile: vdcache.calibration.Profile) -> None:
    """IoU of the segmenter's mask with the truth: of drawn videos, noised; and of the colourful pixels of generated ones."""
    conditions = random_conditions(32, torch.Generator().manual_seed(3))
    video, truth = draw(conditions, torch.Generator().manual_seed(4))
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(5))
    for sigma in (0.1, 0.3, 0.5, 0.7, 0.9):
        noised = torch.lerp(video, noise, sigma)
        predicted = model(with_positions(noised), torch.full((32,), 1000 * sigma), encode(conditions))
        overlaps = [iou(Otsu()(principal_picture(p)), t) for p, t in zip(predicted, truth, strict=True)]
        bench.row(f"IoU with the true mask, drawn videos at noise {sigma}", mean(overlaps), "", None, worst=min(overlaps))
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, given, out: seen.append(out[:8]))
    videos = sample(model, conditions[:8], steps=STEPS, seed=1)
    hook.remove()
    colourful = (videos.amax(1) - videos.amin(1)) / 2 > 0.3
    for step in (3, 9, 15, 21, 27):
        overlaps = [iou(Otsu()(principal_picture(p)), t) for p, t in zip(seen[step], colourful, strict=True)]
        bench.row(
            f"IoU with the coloured pixels of generated videos at step {step}", mean(overlaps), "", None, worst=min(overlaps)
        )
    prompts = random_conditions(8, torch.Generator().manual_seed(11))
    known = [(v[0].amax(0) - v[0].amin(0)) / 2 > 0.3 for v in (sample(model, [c], steps=STEPS, seed=900) for c in prompts)]
    exact = vdcache.profile(model, lambda m, c: sample(m, [c], steps=STEPS, seed=900), prompts=prompts, foreground=known)
    bench.row(
        "blocks on another side of τ with the coloured pixels as mask",
        len(set(exact.background) ^ set(profile.background)),
        "blocks",
        None,
        background=list(exact.background),
        by_segmenter=list(profile.background),
        r=list(exact.block_scores.values()),
        r_by_segmenter=list(profile.block_scores.values()),
    )


def iou(a: Tensor, b: Tensor) -> float:
    return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()


# ---- what profiling costs -----------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


def cost(bench: Bench, model: torch.nn.Module) -> None:
    prompts = random_conditions(4, torch.Generator().manual_seed(6))
    ratios, warm = [], []
    for _ in range(3):
        torch._dynamo.reset()
        times: list[float] = []
        run = lambda model, c: times.append(timed(lambda: sample(model, [c], steps=STEPS)))  # noqa: E731
        whole = timed(lambda: vdcache.profile(model, run, prompts=prompts))
        plain = [timed(lambda: sample(model, [c], steps=STEPS)) for c in prompts]
        ratios.append(whole / sum(plain))
        warm.append(median(times[1:]) / median(plain))
    bench.row("profiling four generations / generating them, eager", median(ratios), "x", "<= 3", note="with tracing the model")
    bench.row("a later profiled generation / a generation, eager", median(warm), "x", "<= 3")
    for tokens in (1024, 4096, 16384):
        q = torch.randn(1, 1, tokens, 64)
        with _Largest() as largest:
            library.received(q, q, None, False, None)
        bench.row(
            f"largest tensor of the column sums at {tokens} tokens",
            largest.bytes / 2**20,
            "MiB",
            "<= 16.1",
            square=4 * tokens**2 / 2**20,
        )


def memory(bench: Bench) -> None:
    """The published list on Wan 2.1 14B at 480p and 81 frames, bfloat16, on the meta device: one delta a run against one a block."""
    from dataclasses import replace

    from diffusers import WanTransformer3DModel

    from vdcache.methods import recipe
    from vdcache.passes import MergeSlots

    with torch.device("meta"):
        wan = (
            WanTransformer3DModel(num_layers=40, num_attention_heads=40, attention_head_dim=128, ffn_dim=13824)
            .to(torch.bfloat16)
            .eval()
        )
        call = {
            "hidden_states": torch.empty(1, 16, 21, 60, 104, dtype=torch.bfloat16),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, 512, 4096, dtype=torch.bfloat16),
            "return_dict": False,
        }
    by_run = recipe("profilingdit-wan2.1")
    by_block = replace(
        by_run, passes=tuple(MergeSlots(p.group, "block") if isinstance(p, MergeSlots) else p for p in by_run.passes)
    )
    for name, chosen in (("run", by_run), ("block", by_block)):
        report = vdcache.explain(wan, recipe=chosen, num_steps=50, **call)
        bench.row(
            f"cache of profilingdit-wan2.1 on Wan 2.1 14B 480p, one delta a {name}",
            (report.cache_bytes or 0) / 2**30,
            "GiB",
            None,
            tensors=len(report.slots),
            reuse_flops=report.variants[-1].flops / report.flops,
        )


if __name__ == "__main__":
    main()
