"""What does understanding a model cost, and does it grow linearly with its blocks?

diffusers' Wan transformer at the size of the 14B model on the meta device with 8 to 128 blocks: canonicalising and every pattern
(streams, branches, attentions, blocks, conditioning, FLOPs), capture apart. Seconds a node, not a block, are what must not
grow. `explain` is the whole, capture and report included.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

import vdcache
from bench.common import Bench, arguments, median
from vdcache.ir.capture import parts
from vdcache.passes import Canonicalise, Pipeline
from vdcache.patterns import analyze

DEPTHS = (8, 16, 32, 60, 64, 128)


def meta_wan(blocks: int) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=blocks).eval()
        return model, (torch.empty(1, 16, 21, 60, 104), torch.empty(1, dtype=torch.long), torch.empty(1, 512, 4096))


def main() -> None:
    args = arguments(__doc__)
    pipeline = Pipeline((Canonicalise(),))
    bench = Bench("analysis", str(pipeline))
    per_node: dict[int, float] = {}
    for blocks in DEPTHS:
        model, inputs = meta_wan(blocks)
        torch._dynamo.reset()
        began = time.perf_counter()
        (part,) = parts(model, inputs, {}).found
        capture = time.perf_counter() - began
        assert part.captured is not None
        nodes = len(part.captured.graph.graph.nodes)
        seconds, alone = [], []
        for _ in range(5):
            gc.collect()
            gc.disable()
            began = time.perf_counter()
            graph, _ = pipeline.run(part.captured.graph)
            middle = time.perf_counter()
            found = analyze(graph)
            alone.append(time.perf_counter() - middle)
            seconds.append(time.perf_counter() - began)
            gc.enable()
        assert found.count() == {"self-attention": blocks, "cross-attention": blocks, "mlp": blocks}
        per_node[blocks] = median(alone) / nodes
        bench.row(
            f"canonicalise and analysis, {blocks} blocks",
            median(seconds),
            "s",
            "<= 2" if blocks == 60 else None,
            nodes=nodes,
            analysis=median(alone),
            capture=capture,
        )
    bench.row("analysis a node, 128 blocks / 8 blocks", per_node[128] / per_node[8], "ratio", "<= 1.3")
    model, inputs = meta_wan(60)
    torch._dynamo.reset()
    began = time.perf_counter()
    vdcache.explain(model, *inputs, recipe="adacache-fast").to_html()
    bench.row("explain with a recipe and the page, 60 blocks of 14B size", time.perf_counter() - began, "s", "<= 60")
    bench.write(args.json)


if __name__ == "__main__":
    main()
