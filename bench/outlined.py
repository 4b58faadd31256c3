"""What does it cost to call a block that is compiled once, in place of blocks that are compiled one by one?

Every small model of `vdcache.testing`, and diffusers' Wan at the size of the other benches, compiled by Inductor both ways from the same
weights. Are their outputs equal within rounding? How long does a computed step take, in pairs that alternate? And how much memory does it
ask for at one time: allocations and releases of a computed step, as torch's profiler counts them.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import torch

import vdcache
from bench.common import Bench, arguments, timed, wan, wan_call
from vdcache.ir.edit import copy_graph
from vdcache.passes.outline import CALL, Outline
from vdcache.testing import small_models

SHORTEST = 0.05  # seconds that are timed at one time

Call = Callable[[int], dict[str, Any]]


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that a call has allocated at one time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)


def upper(ratios: list[float]) -> float:
    """The upper end of the 95 % interval of the mean ratio, by its logarithms."""
    logs = [math.log(r) for r in ratios]
    half = 1.96 * stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else 0.0
    return math.exp(mean(logs) + half)


def compiled(build: Callable[[], torch.nn.Module], outline: bool) -> Any:
    torch._dynamo.reset()
    return vdcache.compile(build(), "always", num_steps=1000, dynamic=False, outline=outline)


def main() -> None:
    args = arguments(__doc__, _more)
    torch.set_num_threads(1)
    bench = Bench("outlined")
    cases: dict[str, tuple[Callable[[], torch.nn.Module], Call]] = {
        name: (case.build, lambda step, case=case: case.call(step, 6)) for name, case in small_models().items()
    }
    cases[f"wan, {args.blocks} blocks, 1,280 tokens"] = (lambda: wan(args.blocks), lambda step: wan_call(step, 1000))
    for name, (build, call) in cases.items():
        if args.models and not any(m in name for m in args.models):
            continue
        both = {outline: compiled(build, outline) for outline in (True, False)}
        with torch.no_grad():
            results = {o: [vdcache.testing.models.value(way(**call(s))) for s in range(2)] for o, way in both.items()}
            apart = max(
                float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(results[True], results[False], strict=True)
            )
            bench.row(f"{name}: outputs apart", apart, "of norm", "<= 1e-5")
            given = call(1)
            for way in (*both.values(), *both.values()):
                way(**given)
            many = max(1, round(SHORTEST / timed(lambda: both[True](**given))))  # calls that are timed together
            ratios = []
            for pair in range(args.pairs):
                order = (True, False) if pair % 2 else (False, True)
                took = {o: timed(lambda o=o: [both[o](**given) for _ in range(many)]) for o in order}
                ratios.append(took[True] / took[False])
            bench.row(
                f"{name}: a computed step, upper end of 95 %",
                upper(ratios),
                "ratio",
                "<= 1.03",
                mean=mean(ratios),
                ratios=ratios,
            )
            graph = copy_graph(both[True].vdcache.graphs[0].variants.recompute.graph)
            bench.rows[-1]["by_default"] = bool(Outline(CALL).run(graph).rewrites)
            peaks = {o: peak_bytes(lambda o=o: both[o](**given)) for o in both}
            bench.row(
                f"{name}: peak memory",
                peaks[True] / max(1, peaks[False]),
                "ratio",
                "<= 1.02",
                bytes=peaks[True],
                flat=peaks[False],
            )
        bench.write(args.json)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="*", default=[], help="parts of the names of models")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--blocks", type=int, default=16, help="of the larger Wan")


if __name__ == "__main__":
    main()
