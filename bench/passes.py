"""What do patterns and passes cost, beside Inductor, and do they grow linearly with the number of blocks?

diffusers' Wan transformer with 8, 16, 32 and 64 blocks; capture apart. Inductor compiles the 8-block graph with cold caches in
the same run.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from typing import Any

import torch

import vdcache
from bench.common import Bench, arguments, median, wan, wan_call
from vdcache.backends.inductor import compile_now
from vdcache.ir.capture import capture
from vdcache.ir.edit import copy_graph
from vdcache.passes import DeadCode, Pipeline, Specialise, variant_io

RECIPE = vdcache.methods.adacache("fast")
DEPTHS = (8, 16, 32, 64)


def captured(depth: int, then: Any = None) -> Any:
    """The captured graph; `then(graph, inputs)` runs inside the backend call."""
    torch._dynamo.reset()
    found = []

    def door(graph: Any, inputs: Any) -> Any:
        found.append(capture(graph, inputs).graph)
        if then is not None:
            found.append(then(found[0], inputs))
        return graph.forward

    with torch.no_grad():
        torch.compile(wan(depth), backend=door)(**wan_call(0))
    return found


def all_passes(graph: Any) -> tuple[float, Any]:
    """Seconds from the captured graph to both variants, and the recomputing one."""
    graph.meta.pop("vdcache.analysis", None)
    gc.collect()  # what earlier depths left behind is not this one's cost
    began = time.perf_counter()
    guarded, _ = RECIPE.pipeline.run(graph)
    given = frozenset(Specialise.requires)
    reuse, _ = Pipeline((Specialise(reuse=frozenset({"all"})), DeadCode()), given=given).run(guarded)
    needed = Specialise(save="needed", slots=variant_io(reuse).reads)
    full, _ = Pipeline((needed, DeadCode()), given=given).run(guarded)
    return time.perf_counter() - began, full


def main() -> None:
    args = arguments(__doc__)
    bench = Bench("passes", str(RECIPE.pipeline))

    def inductor(graph: Any, inputs: Any) -> float:
        _, full = all_passes(graph)
        io = variant_io(full)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            began = time.perf_counter()
            with torch._inductor.config.patch(force_disable_caches=True):
                compile_now(copy_graph(full), [*inputs, *io.read_values, *io.previous_values], {})
            seconds = time.perf_counter() - began
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        return seconds

    seconds: dict[int, float] = {}
    for depth in DEPTHS:
        graph, *rest = captured(depth, inductor if depth == DEPTHS[0] else None)
        seconds[depth] = median([all_passes(graph)[0] for _ in range(5)])
        bench.row(f"patterns and passes, {depth} blocks", seconds[depth], "s", None, nodes=len(graph.graph.nodes))
        if rest:
            bench.row("Inductor, cold caches, 8 blocks", rest[0], "s")
            bench.row("patterns and passes / Inductor, 8 blocks", seconds[depth] / rest[0], "ratio", "<= 0.02")
    growth = (seconds[64] / 64) / (seconds[8] / 8)
    bench.row("time a block at 64 blocks / at 8 blocks", growth, "ratio", "<= 1.5")
    bench.write(args.json)


if __name__ == "__main__":
    main()
