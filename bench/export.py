"""What do exported packages weigh, how near are they to PyTorch, and what does a reused step cost in onnxruntime?

The shipped model under its searched schedule (11 of 30 steps, one video, guidance in one batch), a larger Wan with random weights, and small random models of six
published architectures. Differences are the largest of a step, relative to the largest value of PyTorch's result under the same schedule, given the
same inputs. Times are onnxruntime's on the CPU, medians of one run; a computed or reused step is a call of the runner.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import vdcache
from bench.common import Bench, arguments, wan, wan_call
from tests.zoo import ZOO, build
from vdcache.demo.fixed import generation, schedule
from vdcache.exporting.manifest import Manifest
from vdcache.runtime_onnx import OnnxRunner

FORMS = ("onnx", "onnx-single", "onnx-unrolled")
MODELS = ("wan", "cogvideox", "hunyuan_video", "latte", "flux", "sd3")
STEPS = 30
MIB = 2**20


def main() -> None:
    args = arguments(
        __doc__,
        lambda p: p.add_argument("--rounds", type=int, default=9),
        lambda p: p.add_argument("--aoti", action=argparse.BooleanOptionalAction, default=True),
    )
    bench = Bench("export", "canonicalise,mark-branches,merge-slots")
    with tempfile.TemporaryDirectory() as folder:
        shipped(bench, Path(folder), args.rounds, args.aoti)
        larger(bench, Path(folder), args.rounds)
        for name in MODELS:
            published(bench, Path(folder), name)
    bench.write(args.json)


def shipped(bench: Bench, folder: Path, rounds: int, ahead: bool) -> None:
    model, args, kwargs, loop, inputs = generation(steps=STEPS)
    found = schedule(STEPS)
    for form in FORMS:
        path = folder / form
        began = time.perf_counter()
        manifest = vdcache.export(model, args, kwargs, schedule=found, path=path, format=form, loop=loop, inputs=inputs)
        seconds = time.perf_counter() - began
        compare(bench, f"shipped, {form}", vdcache.verify(path, model, args, kwargs, loop=loop, inputs=inputs))
        sizes(bench, f"shipped, {form}", model, manifest, seconds)
    timed(bench, "shipped", folder / "onnx", inputs, rounds)
    for form in FORMS[1:]:
        whole(bench, f"shipped, {form}", folder / form, folder / "onnx", inputs, rounds)
    for kind in ("pt2", "aoti") if ahead else ("pt2",):
        path = folder / kind
        began = time.perf_counter()
        manifest = vdcache.export(model, args, kwargs, schedule=found, path=path, format=kind)
        seconds = time.perf_counter() - began
        compare(bench, f"shipped, {kind}", vdcache.verify(path, model, args, kwargs))
        sizes(bench, f"shipped, {kind}", model, manifest, seconds, a_plan=3.0)


def larger(bench: Bench, folder: Path, rounds: int) -> None:
    model, found = wan(), vdcache.Schedule(10, (0, 1, 4, 7))
    given = wan_call(0)
    noise = given.pop("hidden_states")

    def loop(denoise: Callable[..., Any], noise: torch.Tensor) -> torch.Tensor:
        for step in range(found.steps):
            call = {**given, "timestep": torch.full((1,), 1000 - 100 * step)}
            noise = noise - denoise(hidden_states=noise, **call)[0] / found.steps
        return noise

    path, inputs = folder / "wan-8", {"noise": noise}
    kwargs = {"hidden_states": noise, **given}
    began = time.perf_counter()
    manifest = vdcache.export(model, (), kwargs, schedule=found, path=path, loop=loop, inputs=inputs)
    seconds = time.perf_counter() - began
    compare(bench, "Wan, 8 blocks of 384", vdcache.verify(path, model, (), kwargs, loop=loop, inputs=inputs))
    sizes(bench, "Wan, 8 blocks of 384", model, manifest, seconds)
    timed(bench, "Wan, 8 blocks of 384", path, inputs, max(3, rounds // 3))


def published(bench: Bench, folder: Path, name: str) -> None:
    model, given = build(name), ZOO[name].call(0, 6)
    when, start = given["timestep"], given["hidden_states"]
    found = vdcache.Schedule(6, (0, 1, 3))

    def loop(denoise: Callable[..., Any], noise: torch.Tensor) -> torch.Tensor:
        total: Any = 0
        for step in range(found.steps):
            call = {**given, "hidden_states": start + 0.1 * step * noise, "timestep": (when * (1 - step / 10)).to(when.dtype)}
            total = total + torch.utils._pytree.tree_leaves(denoise(**call))[0]
        return total

    inputs = {"noise": torch.randn(start.shape, generator=torch.Generator().manual_seed(9))}
    for form in FORMS:
        path = folder / f"{name}-{form}"
        manifest = vdcache.export(model, (), given, schedule=found, path=path, format=form, loop=loop, inputs=inputs)
        compare(bench, f"{name}, {form}", vdcache.verify(path, model, (), given, loop=loop, inputs=inputs), psnr=False)
        custom = {o for g in manifest.graphs for o in g.operators if "::" in o and not o.startswith("vdcache.variants::")}
        bench.row(f"{name}, {form}: custom operators", len(custom), "", "== 0")


def compare(bench: Bench, case: str, found: Any, psnr: bool = True) -> None:
    bench.row(f"{case}: largest difference of a step", found.largest, "relative", "<= 1e-4", calls=len(found.calls))
    if psnr and found.psnr is not None:
        bench.row(f"{case}: the whole generation", found.psnr, "dB", ">= 60")


def sizes(bench: Bench, case: str, model: torch.nn.Module, manifest: Manifest, seconds: float, a_plan: float = 5.0) -> None:
    """A package's bytes beside the weights', with what is not weights."""
    own = sum(t.numel() * t.element_size() for t in {*model.parameters()})
    total = sum(f.bytes for f in manifest.files.values())
    plans = len({s.plan for s in manifest.steps})
    weights = manifest.files[manifest.weights].bytes
    bench.row(f"{case}: weights file / weights", weights / own, "ratio", "<= 1.05", bytes=weights)
    bench.row(
        f"{case}: all but the weights, a plan", (total - weights) / plans / MIB, "MiB", f"<= {a_plan}", export_seconds=seconds
    )


def timed(bench: Bench, case: str, path: Path, inputs: dict[str, torch.Tensor], rounds: int) -> None:
    """Step times and the whole generation, round by round."""
    runner = OnnxRunner(path, threads=torch.get_num_threads())
    arrays = {n: v.numpy() for n, v in inputs.items()}
    runner.generate(arrays)
    wholes, computed, reused = [], [], []
    for _ in range(rounds):
        began = time.perf_counter()
        runner.generate(arrays)
        wholes.append(time.perf_counter() - began)
        records = runner.history.generation()
        computed.append(median(r.seconds for r in records if r.computed))
        reused.append(median(r.seconds for r in records if not r.computed))
    c, r = median(computed), median(reused)
    steps = runner.manifest.steps
    n = sum(not s.plan for s in steps)
    bound = [w / (n * a + (len(steps) - n) * b) for w, a, b in zip(wholes, computed, reused, strict=True)]
    bench.row(f"{case}: reused step / computed step", r / c, "ratio", "<= 0.04", computed_ms=1e3 * c, reused_ms=1e3 * r)
    bench.row(
        f"{case}: generation / sum of its steps", median(bound), "ratio", "<= 1.05", seconds=median(wholes), computed_steps=n
    )
    full = len(steps) * c
    bench.row(f"{case}: every step computed / generation", full / median(wholes), "times", steps=len(steps), computed_steps=n)


def whole(bench: Bench, case: str, path: Path, plans: Path, inputs: dict[str, torch.Tensor], rounds: int) -> None:
    """A form's generation beside that of a graph for every plan, in turn."""
    arrays = {n: v.numpy() for n, v in inputs.items()}
    runners = [OnnxRunner(p, threads=torch.get_num_threads()) for p in (path, plans)]
    times: list[list[float]] = [[], []]
    for runner in runners:
        runner.generate(arrays)
    for _ in range(rounds):
        for own, runner in zip(times, runners, strict=True):
            began = time.perf_counter()
            runner.generate(arrays)
            own.append(time.perf_counter() - began)
    ratio = median(a / b for a, b in zip(*times, strict=True))
    bench.row(f"{case}: generation / that of a graph a plan", ratio, "ratio", seconds=median(times[0]))


if __name__ == "__main__":
    main()
