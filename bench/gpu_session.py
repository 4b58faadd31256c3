"""What does vdcache do on a GPU? One run of a few minutes, the most decisive rows first, written as JSON lines at once.

On a GPU:    python -m bench.gpu_session --out rows            (340 s; every section's decisive rows)
             python -m bench.gpu_session --out rows --only attention
Without one: python -m bench.gpu_session --out rows --tiny     (finds bugs of this script; its numbers mean nothing)

Each section has seconds of its own and is fenced: a crash in one costs no row of another. It needs torch 2.11 or later, Triton
and what vdcache itself requires; no diffusers, no network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T0 = time.perf_counter()
CUDA = torch.cuda.is_available()
DEV = torch.device("cuda" if CUDA else "cpu")
ARGS: argparse.Namespace
ROWS: list[dict] = []


UNTIL = 0.0  # seconds since the start at which the running section must end


def left() -> float:
    """Seconds left to the running section."""
    return UNTIL - (time.perf_counter() - T0)


def row(section: str, case: str, **values) -> None:
    found = {"section": section, "case": case, **values, "at_s": round(time.perf_counter() - T0, 1)}
    ROWS.append(found)
    with open(Path(ARGS.out) / "rows.jsonl", "a") as file:
        file.write(json.dumps(found, default=str) + "\n")
    print(
        f"{found['at_s']:6.1f} {section:<10} {case:<58}",
        {k: (round(v, 4) if isinstance(v, float) else v) for k, v in values.items()},
    )


def sync() -> None:
    torch.cuda.synchronize() if CUDA else None


def ms(run, seconds: float = 0.5, least: int = 5) -> tuple[float, float]:
    """Median and spread (of the middle half) of device milliseconds."""
    run()
    sync()
    began = time.perf_counter()
    run()
    sync()
    n = max(least, min(200, int(seconds / max(time.perf_counter() - began, 1e-5))))
    if not CUDA:
        times = []
        for _ in range(least):
            b = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - b))
    else:
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
        for a, b in marks:
            a.record()
            run()
            b.record()
        sync()
        times = [a.elapsed_time(b) for a, b in marks]
    times.sort()
    return statistics.median(times), times[3 * len(times) // 4] - times[len(times) // 4]


# ---- A. the machine ------------------------------------------------------------------------------------------------


def machine() -> None:
    import triton

    if CUDA:
        p = torch.cuda.get_device_properties(0)
        row(
            "machine",
            p.name,
            torch=torch.__version__,
            triton=triton.__version__,
            cudnn=torch.backends.cudnn.version(),
            gib=p.total_memory / 2**30,
        )
        x = torch.empty(2 << 30, dtype=torch.uint8, device=DEV)
        y = torch.empty_like(x)
        t, _ = ms(lambda: y.copy_(x))
        row("machine", "copy", tb_s=2 * x.numel() / t / 1e9)
        del x, y
        a, b = (torch.randn(8192, 8192, device=DEV, dtype=torch.bfloat16) for _ in range(2))
        t, _ = ms(lambda: a @ b)
        row("machine", "bf16 matmul 8192", tflops=2 * 8192**3 / t / 1e9)
        q = torch.randn(1, 8, 4096, 128, device=DEV, dtype=torch.bfloat16)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            F.scaled_dot_product_attention(q, q, q)
            sync()
        row("machine", "default SDPA kernel", kernel=max(prof.key_averages(), key=lambda e: e.device_time_total).key[:90])


# ---- B. is the kernel right ----------------------------------------------------------------------------------------


def made(on, heads: int, d: int, dtype=torch.bfloat16, kv: int | None = None) -> list[Tensor]:
    return [torch.randn(1, on.tokens, h, d, device=DEV).to(dtype).transpose(1, 2) for h in (heads, kv or heads, kv or heads)]


def few_configs() -> None:
    """Two configurations instead of all: the rest never win, and each costs seconds."""
    from vdcache.attention import block_sparse as bs

    if not bs.interpreted:
        bs.kernel.configs = [bs._config(128, 64, 8, 3), bs._config(64, 64, 8, 2)]


def kernel_is_right() -> None:
    from vdcache.attention.merged import dense_kernel, merged, why_not_merged
    from vdcache.attention.tiles import gather, tiled
    from vdcache.attention.triton import available, triton_attention

    for d in (64,) if ARGS.tiny else (64, 72, 96, 128):
        for dtype in (torch.float32,) if ARGS.tiny else (torch.bfloat16, torch.float32):
            on = tiled("frames:2", (4, 6, 8) if ARGS.tiny else (8, 30, 45), 0, 5)
            q, k, v = made(on, 4, d, dtype)
            assert not why_not_merged(on)
            exact = gather(q.double(), k.double(), v.double(), on, None, None)
            own, plain = (
                (x.double() - exact).norm() / exact.norm()
                for x in (merged(q, k, v, on, None, None), gather(q, k, v, on, None, None))
            )
            row(
                "correct", f"merged D={d} {dtype}", error=float(own), gather_error=float(plain),
                ok=bool(own <= 1.5 * plain + 1e-5), kernel=str(dense_kernel(DEV, dtype, d).args),
            )  # fmt: skip
    if not available(DEV):
        return row("correct", "triton", skipped="no CUDA")
    for mask, grid, text, heads, kv, d in (
        ("frames:2", (8, 30, 45), 0, 4, 4, 128),
        ("frames:2", (13, 30, 45), 226, 4, 4, 64),
        ("window:3x3x3:1x10x15", (8, 30, 45), 0, 4, 4, 96),
        ("radial:5:1", (8, 30, 45), 3, 4, 2, 72),
    ):
        on = tiled(mask, grid, 0, text)
        q, k, v = made(on, heads, d, kv=kv)
        exact = gather(q.float(), k.float(), v.float(), on, None, None)
        own, plain = (
            (x.float() - exact).norm() / exact.norm()
            for x in (triton_attention(q, k, v, on, None, None), gather(q, k, v, on, None, None))
        )
        row(
            "correct",
            f"{mask} D={d} kv={kv} text={text}",
            error=float(own),
            gather_error=float(plain),
            ok=bool(own <= 1.5 * plain + 1e-4),
        )


# ---- C. attention: every lowering on the shapes of the papers --------------------------------------------------------


# name, frames, rows, columns, text, heads timed, head dimension, reference frames, the paper's speed-ups
SHAPES = [
    ("OSP 29f 720p", 8, 45, 80, 0, 24, 96, (2, 1, 3, 4), {4: 1.25, 3: 1.46, 2: 1.86, 1: 2.83}),
    ("CogVideoX-5B", 13, 30, 45, 226, 48, 64, (2, 1, 4), {7: 1.08, 5: 1.10, 4: 1.27, 3: 1.47, 2: 1.85, 1: 2.60}),
    ("OSP 93f 720p", 24, 45, 80, 0, 6, 96, (4, 3, 12), {12: 1.32, 8: 1.72, 6: 2.14, 4: 2.91, 3: 3.67}),
    ("Wan 14B 720p", 21, 45, 80, 0, 8, 128, (3, 1), {}),
    ("HunyuanVideo 720p", 33, 45, 80, 256, 4, 128, (4,), {}),
]
TINY = [("tiny", 4, 6, 8, 3, 2, 64, (1,), {})]


def attention() -> None:
    """Every lowering on the papers' shapes; first one mask of every shape, then the others."""
    shapes = TINY if ARGS.tiny else SHAPES
    rounds = [(shape, i) for i in range(4) for shape in shapes if i < len(shape[7])]
    for shape, i in rounds:
        name, k = shape[0], shape[7][i]
        if left() < 12 and not ARGS.tiny:
            row("attention", f"{name} k={k}", skipped="no time left")
            continue
        attention_of(shape, k, first=i == 0)


def attention_of(shape: tuple, k: int, first: bool) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from vdcache.attention import block_sparse
    from vdcache.attention.autotune import LOWERINGS, _can
    from vdcache.attention.tiles import tiled

    name, f, r, c, text, heads, d, _, paper = shape
    on = tiled(f"frames:{k}", (f, r, c), 0, text)
    q, kk, v = made(on, heads, d)
    flops = 4 * on.tokens**2 * d * heads
    ways = {"dense": lambda: F.scaled_dot_product_attention(q, kk, v)}
    if CUDA:
        for b in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

            def with_backend(b=b):
                with sdpa_kernel(b):
                    return F.scaled_dot_product_attention(q, kk, v)

            ways[f"dense {b.name.split('_')[0].lower()}"] = with_backend
    for low in LOWERINGS:
        if _can(low, on, DEV) and low != "masked" and (first or low != "flex" or left() > 60):
            ways[low] = lambda low=low: LOWERINGS[low](q, kk, v, on, None, None)
    got, out = {}, {}
    for way, run in ways.items():
        began = time.perf_counter()
        try:
            with torch.no_grad():
                out[way] = run()
                sync()
                compiled = time.perf_counter() - began
                got[way] = ms(run, 0.25)[0]
        except Exception as error:  # noqa: BLE001
            row("attention", f"{name} k={k} {way}", error=f"{type(error).__name__}: {str(error)[:200]}")
            continue
        if way.startswith("dense"):
            row("attention", f"{name} {way}", ms=got[way], tflops=flops / got[way] / 1e9)
        elif compiled > 2:
            row("attention", f"{name} k={k} {way}: first call", seconds=compiled)
    best_dense = min(t for way, t in got.items() if way.startswith("dense"))
    base = out.get("gather")
    for way in got:
        if not way.startswith("dense"):
            row(
                "attention", f"{name} k={k} {way}", ms=got[way], speedup=best_dense / got[way], of_ideal=best_dense / got[way] * on.density,
                ideal=1 / on.density, paper=paper.get(k), dense_ms=best_dense, dense_tflops=flops / best_dense / 1e9,
                differs=float((out[way].float() - base.float()).norm() / base.float().norm()) if base is not None else None,
                config=str(getattr(block_sparse.kernel, "best_config", "")) if way == "triton" else None,
            )  # fmt: skip
    out.clear()
    if CUDA:
        torch.cuda.empty_cache()


# ---- D. a model: the same, skipped, memory, time ---------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, w: int, heads: int) -> None:
        super().__init__()
        self.heads, self.mod = heads, nn.Linear(w, 6 * w)
        self.n1, self.n2 = (nn.LayerNorm(w, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(w, 3 * w), nn.Linear(w, w)
        self.cross_q, self.cross_kv, self.cross_out, self.n3 = (
            nn.Linear(w, w),
            nn.Linear(w, 2 * w),
            nn.Linear(w, w),
            nn.LayerNorm(w),
        )
        self.up, self.down = nn.Linear(w, 4 * w), nn.Linear(4 * w, w)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        a, b, g, c, d, e = self.mod(F.silu(t))[:, None].chunk(6, -1)

        def cut(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = map(cut, self.qkv(self.n1(x) * (1 + a) + b).chunk(3, -1))
        x = x + g * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        k, v = map(cut, self.cross_kv(text).chunk(2, -1))
        x = x + self.cross_out(F.scaled_dot_product_attention(cut(self.cross_q(self.n3(x))), k, v).transpose(1, 2).flatten(2))
        return x + e * self.down(F.gelu(self.up(self.n2(x) * (1 + c) + d), approximate="tanh"))


class WanLike(nn.Module):
    def __init__(self, blocks: int, w: int, heads: int) -> None:
        super().__init__()
        self.w, self.patch = w, nn.Conv3d(16, w, (1, 2, 2), (1, 2, 2))
        self.time = nn.Sequential(nn.Linear(256, w), nn.SiLU(), nn.Linear(w, w))
        self.blocks = nn.ModuleList(Block(w, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(w), nn.Linear(w, 64)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        f, h, w = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        freq = torch.exp(-math.log(1e4) * torch.arange(128, device=x.device) / 128)
        at = t[:, None].float() * freq
        e = self.time(torch.cat([at.cos(), at.sin()], -1).to(x.dtype))
        y = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            y = block(y, e, text)
        y = self.head(self.norm(y)).unflatten(1, (f, h, w)).unflatten(-1, (16, 2, 2))
        return y.permute(0, 4, 1, 2, 5, 3, 6).reshape(x.shape)


def model() -> None:
    """Six blocks of Wan 14B's width at 480p × 81 frames: identity, what a step costs, what is skipped, memory, waits."""
    import vdcache
    from vdcache.passes import MarkBranches, MergeSlots
    from vdcache.policies import EveryN

    blocks, w, heads, grid = (2, 64, 2, (2, 8, 8)) if ARGS.tiny else (6, 5120, 40, (21, 60, 104))
    dtype = torch.float32 if ARGS.tiny else torch.bfloat16
    torch.manual_seed(0)
    with torch.no_grad(), torch.device(DEV):
        net = WanLike(blocks, w, heads).to(dtype).eval().requires_grad_(False)
        for p in net.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.02)
        text = torch.randn(1, 4 if ARGS.tiny else 512, w, dtype=dtype)

    def call(s: int) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.Generator(DEV).manual_seed(s)
        return (
            torch.randn(1, 16, *grid, device=DEV, dtype=dtype, generator=noise),
            torch.tensor([1000 - 20 * s], device=DEV),
            text,
        )

    last = vdcache.Recipe("last", EveryN(2), vdcache.methods.adacache("fast").passes)
    taylor = vdcache.Recipe("taylor1", EveryN(2), (MarkBranches(), MergeSlots()), predictor=vdcache.predictors.Taylor(1))
    with torch.no_grad():
        same = vdcache.compile(net, last, num_steps=100, inner="eager")
        row("model", "computed step, eager: equal bit for bit", equal=bool(torch.equal(same(*call(0)), net(*call(0)))))
        del same
        torch._dynamo.reset()
        began = time.perf_counter()
        plain = torch.compile(net)
        want = plain(*call(0))
        sync()
        row("model", "plain torch.compile: first call", seconds=time.perf_counter() - began)
        for name, recipe in (("last", last), ("taylor1", taylor)):
            if left() < 25 and name != "last":
                row("model", name, skipped="no time left")
                continue
            if CUDA:
                torch.cuda.empty_cache()
            began = time.perf_counter()
            cached = vdcache.compile(net, recipe, num_steps=100_000)
            got = cached(*call(0))
            sync()
            cached.vdcache.warm_up()
            row("model", f"{name}: first call and all variants", seconds=time.perf_counter() - began)
            row(
                "model",
                f"{name}: computed step against plain",
                largest=float((got - want).abs().max()),
                scale=float(want.abs().max()),
            )
            del got
            steps(name, plain, cached, call)
            poisoned(name, cached, net, call)
            if CUDA and left() > 10:
                graphs(name, cached, call)
            del cached


def steps(name: str, plain, cached, call) -> None:
    """Plain, computed and reused steps in turn: device and host milliseconds, peak memory, waits for the device inside a call."""
    s = cached.vdcache
    s.begin(100_000)
    device: dict[str, list[float]] = {"plain": [], "computed": [], "reused": []}
    host: dict[str, list[float]] = {w: [] for w in device}
    peak: dict[str, float] = {}
    waits: set[str] = set()

    def once(run, args) -> tuple[float, float, float, bool]:
        sync()
        if not CUDA:
            began = time.perf_counter()
            run(*args)
            took = 1e3 * (time.perf_counter() - began)
            return took, took, 0.0, False
        torch.cuda.reset_peak_memory_stats()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            a.record()
            began = time.perf_counter()
            run(*args)
            took = 1e3 * (time.perf_counter() - began)
            b.record()
            torch.cuda.set_sync_debug_mode("default")
        sync()
        return (
            a.elapsed_time(b),
            took,
            torch.cuda.max_memory_allocated() / 2**30,
            any("synchron" in str(x.message) for x in said),
        )

    for i in range(10):
        args = call(i)
        s.step()
        for way, run in (("plain", plain), ("vdcache", cached)):
            t, h, gib, waited = once(run, args)
            which = way if way == "plain" else "computed" if s.history[-1].computed else "reused"
            device[which].append(t)
            host[which].append(h)
            peak[which] = gib
            waits |= {which} if waited else set()
    median = {w: statistics.median(t[1:]) for w, t in device.items()}
    for which in ("plain", "computed", "reused"):
        row(
            "model", f"{name}: {which} step", ms=median[which], of_plain=median[which] / median["plain"],
            of_computed=median[which] / median["computed"], host_ms=statistics.median(host[which]), peak_gib=peak[which],
            waits=which in waits, store_gib=s.store.peak_bytes / 2**30,
        )  # fmt: skip
    said = [x.seconds * 1e3 for x in s.history if not x.computed]
    row("model", f"{name}: what the history says a reused step takes", ms=statistics.median(said), device_ms=median["reused"])


def poisoned(name: str, cached, net, call) -> None:
    """What is skipped is not read: NaN in the weights of a block does not reach the output of a reused step."""
    s = cached.vdcache
    s.begin(100_000)
    s.step()
    cached(*call(0))
    s.step()
    weight = net.blocks[1].up.weight.data  # written through .data, which vdcache notices at the next generation only
    keep = weight.clone()
    weight.fill_(float("nan"))
    out = cached(*call(1))
    weight.copy_(keep)
    row("model", f"{name}: skipped block poisoned", finite=bool(out.isfinite().all()), reused=bool(s.history[-1].reused))


def graphs(name: str, cached, call) -> None:
    """What a CUDA graph would save: the reusing variant captured by hand, beside its ordinary call."""
    program = cached.vdcache.graphs[0]
    seen = {}
    plan = next(p for p in program.variants.plans if p)
    part = program.variants[plan]
    real = part.ready

    def spy(inputs):
        run = real(inputs)

        def inner(*a):
            seen["run"], seen["args"] = run, a
            return run(*a)

        return inner

    part.ready = spy
    s = cached.vdcache
    s.begin(100_000)
    s.step()
    cached(*call(0))
    s.step()
    cached(*call(1))
    part.ready = real
    if "run" not in seen:
        return
    args = list(seen["args"])  # the elapsed steps are numbers of the host: a replay holds those of the capture
    plain, _ = ms(lambda: seen["run"](*args), 0.2)
    try:
        g = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            seen["run"](*args)
        sync()
        with torch.cuda.graph(g):
            seen["run"](*args)
        t, _ = ms(g.replay, 0.2)
        row("graphs", f"{name}: reusing variant", ms=plain, replayed_ms=t, inputs=len(args))
    except Exception as error:  # noqa: BLE001
        row("graphs", f"{name}: reusing variant", ms=plain, error=f"{type(error).__name__}: {str(error)[:200]}")


# ---- D2. CUDA graphs by Inductor, and a cache that does not fit ------------------------------------------------------


def small_model() -> tuple:
    """A model that a call launches faster than the host can, its recipe, and its calls by step and lane."""
    import vdcache
    from vdcache.passes import MarkBranches, MergeSlots
    from vdcache.policies import EveryN

    blocks, w, heads, grid = (2, 64, 2, (2, 8, 8)) if ARGS.tiny else (6, 1536, 12, (5, 60, 104))
    dtype = torch.float32 if ARGS.tiny else torch.bfloat16
    torch.manual_seed(0)
    with torch.no_grad(), torch.device(DEV):
        net = WanLike(blocks, w, heads).to(dtype).eval().requires_grad_(False)
    words = [torch.randn(1, 4 if ARGS.tiny else 256, w, device=DEV, dtype=dtype) for _ in range(2)]

    def call(s: int, lane: int) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.Generator(DEV).manual_seed(s)
        return (
            torch.randn(1, 16, *grid, device=DEV, dtype=dtype, generator=noise),
            torch.tensor([1000 - 20 * s], device=DEV),
            words[lane],
        )

    recipe = vdcache.Recipe("taylor1", EveryN(2), (MarkBranches(), MergeSlots()), predictor=vdcache.predictors.Taylor(1))
    return net, recipe, call


def generation(model, call, steps: int = 8) -> tuple[list[Tensor], float]:
    """Results of two lanes in each step, all of them kept; milliseconds of a step."""
    model.vdcache.begin(steps)
    sync()
    began, found = time.perf_counter(), []
    with torch.no_grad():
        for step in range(steps):
            model.vdcache.step()
            found += [model(*call(step, lane)) for lane in range(2)]
    sync()
    return found, 1e3 * (time.perf_counter() - began) / steps


def replays() -> None:
    """Variants as CUDA graphs: the same results, and what a step takes."""
    import vdcache

    net, recipe, call = small_model()
    ways, inner = {"called": {}, "CUDA graphs": {"cuda_graphs": True}}, "eager" if ARGS.tiny else "inductor"
    want = None
    for name, options in ways.items():
        torch._dynamo.reset()
        model = vdcache.compile(net, recipe, num_steps=8, inner=inner, **options)
        times = []
        for _ in range(4):
            found, each = generation(model, call)
            times.append(each)
        want = found if want is None else want
        row(
            "replays", name, ms=min(times), computed=len(model.vdcache.history.computed_steps()),
            largest=max(float((a - b).abs().max()) for a, b in zip(found, want)), finite=all(bool(t.isfinite().all()) for t in found),
        )  # fmt: skip


def budget() -> None:
    """What is kept where a cache does not fit: main memory gives the same results; peak memory and time of each choice."""
    import vdcache
    from vdcache.backends import memory
    from vdcache.backends.memory import cache_plans

    net, recipe, call = small_model()
    plain = vdcache.compile(net, recipe, num_steps=8, inner="eager")
    want, _ = generation(plain, call)
    one = plain.vdcache.graphs[0].variants.cache_bytes()
    for plan in cache_plans(recipe.predictor, cuda=CUDA):
        torch._dynamo.reset()
        limit = 2 * one if plan.predictor == recipe.predictor and not plan.on_host else one if plan.caches else 0
        kept = memory._free_main_memory
        if not plan.on_host:
            memory._free_main_memory = lambda: 0
        try:
            model = vdcache.compile(net, recipe, num_steps=8, inner="eager", cache_budget=one if plan.on_host else limit)
            generation(model, call)  # in which the lanes are counted
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            found, each = generation(model, call)
        finally:
            memory._free_main_memory = kept
        row(
            "budget", plan.name, ms=each, limit_mib=limit / 2**20, store_mib=model.vdcache.store.peak_bytes / 2**20,
            peak_gib=torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
            computed=len(model.vdcache.history.computed_steps()),
            largest=max(float((a - b).abs().max()) for a, b in zip(found, want)),
        )  # fmt: skip


# ---- E. what the host does -------------------------------------------------------------------------------------------


def host() -> None:
    """Host time of a call of a deep model whose kernels are tiny: Dynamo's guards, vdcache, and the launches."""
    import vdcache

    blocks = 4 if ARGS.tiny else 40
    with torch.device(DEV):
        net = WanLike(blocks, 64, 2).eval().requires_grad_(False)
    text = torch.randn(1, 4, 64, device=DEV)

    def call(s: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(1, 16, 2, 8, 8, device=DEV), torch.tensor([1000 - s], device=DEV), text

    with torch.no_grad():
        cached = vdcache.compile(net, "every-100", num_steps=100_000, inner="eager")
        s = cached.vdcache
        s.begin(100_000)
        times = []
        for i in range(60):
            args = call(i)
            s.step()
            sync()
            began = time.perf_counter()
            cached(*args)
            times.append(1e3 * (time.perf_counter() - began))
            sync()
        row(
            "host",
            f"a reuse call, {blocks} blocks, {sum(1 for _ in net.parameters())} parameters",
            ms=statistics.median(times[20:]),
        )


# ---- F. what the repository's own tests say --------------------------------------------------------------------------


def tests() -> None:
    if left() < 40 or ARGS.tiny:
        return row("tests", "tests/gpu", skipped="no time left")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--durations=8", "--tb=short"]
    if importlib.util.find_spec("pytest_timeout"):
        command.append("--timeout=60")
    if importlib.util.find_spec("xdist"):
        command += ["-n", "4"]  # compiling takes longer than what runs
    try:
        done = subprocess.run(
            [*command, "tests/gpu", "-k", "not demo_runs"], capture_output=True, text=True, timeout=max(30, left() - 5)
        )
        out, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as late:
        out, code = (late.stdout or b"").decode(), None
    (Path(ARGS.out) / "tests.txt").write_text(out)
    row("tests", "tests/gpu", rc=code, tail=out[-700:])


# name: seconds that a section may take, in the order in which they run
SECTIONS = {machine: 15, kernel_is_right: 45, model: 95, attention: 80, replays: 25, budget: 15, host: 25, tests: 110}


def main() -> None:
    global ARGS, UNTIL
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.environ.get("OUT", "."), help="folder that rows.jsonl is added to")
    parser.add_argument("--budget", type=float, default=340, help="seconds in all")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for bugs of this script")
    parser.add_argument(
        "--only", nargs="*", choices=[s.__name__ for s in SECTIONS], help="sections; they share the whole budget"
    )
    ARGS = parser.parse_args()
    Path(ARGS.out).mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    if CUDA:
        few_configs()
    chosen = {s: t for s, t in SECTIONS.items() if not ARGS.only or s.__name__ in ARGS.only}
    for section, seconds in chosen.items():
        spent = time.perf_counter() - T0
        rest = sum(t for s, t in chosen.items() if list(chosen).index(s) >= list(chosen).index(section))
        # What earlier sections left over is shared out in proportion.
        UNTIL = spent + max(seconds, seconds / rest * (ARGS.budget - spent)) if not ARGS.tiny else spent + 1000
        UNTIL = min(UNTIL, ARGS.budget) if not ARGS.tiny else UNTIL
        if left() < 10:
            row(section.__name__, "all of it", skipped="no time left")
            continue
        try:
            section()
        except Exception as error:  # noqa: BLE001 — one section's bug must not cost the rest
            row(
                section.__name__,
                "failed",
                error=f"{type(error).__name__}: {str(error)[:300]}",
                where=traceback.format_exc()[-700:],
            )
    print(json.dumps({"rows": len(ROWS), "seconds": round(time.perf_counter() - T0)}))


if __name__ == "__main__":
    main()
