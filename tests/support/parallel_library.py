"""Parallelism of others: a diffusers class under its own context parallelism, FSDP2, and weights that are DTensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import vdcache
from vdcache.ir.ops import communicates

STEPS = 6


def wan() -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def loop(model: Any) -> torch.Tensor:
    x = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))
    for step in range(STEPS):
        x = x - model(x, torch.tensor([1000.0 - 150 * step]), text, return_dict=False)[0] / STEPS
    return x


def context_parallel(rank: int) -> dict[str, Any]:
    """diffusers' own Ulysses."""
    from diffusers import ContextParallelConfig

    alone = vdcache.compile(wan(), "every-3", num_steps=STEPS, inner="eager")
    wanted = loop(alone)
    model = wan()
    torch.accelerator.device_count = lambda: 1  # diffusers counts devices also where it uses the CPU
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    return compared(model, wanted)


def fsdp(rank: int) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    alone = vdcache.compile(wan(), "every-3", num_steps=STEPS, inner="eager")
    wanted = loop(alone)
    model = wan()
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return compared(model, wanted)


def tensor_parallel(rank: int) -> dict[str, Any]:
    """The shipped network with its feed-forward layers spread as DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from vdcache.demo.model import DemoConfig, DemoDiT, with_positions

    torch.manual_seed(0)
    model = DemoDiT(DemoConfig(num_layers=2)).eval().requires_grad_(False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        parallelize_module(block.ffn, mesh, {"net.0.proj": ColwiseParallel(), "net.2": RowwiseParallel()})
    fast = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager", strict=True)
    exact = []
    for step in range(STEPS):
        noise = torch.Generator().manual_seed(step)
        x = with_positions(torch.randn(1, 3, 3, 16, 16, generator=noise))
        call = x, torch.tensor([1000.0 - 100 * step]), torch.ones(1, 5, 32)
        exact.append(torch.equal(fast(*call), model(*call)))
    (graph,) = fast.vdcache.graphs
    flops = [graph.variants.flops(plan) for plan in graph.variants.plans]
    return {
        "exact": exact,
        "computed": fast.vdcache.history.computed_steps(),
        "flops": min(flops) / max(flops),
        "exchanged": [len(graph.variants[plan].collectives) for plan in graph.variants.plans],
    }


def compared(model: Any, wanted: torch.Tensor) -> dict[str, Any]:
    fast = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager")
    found = loop(fast)
    graphs = fast.vdcache.graphs
    collectives = [{str(p): sum(map(communicates, g.variants[p].graph.graph.nodes)) for p in g.variants.plans} for g in graphs]
    return {
        "error": float((wanted - found).abs().max() / wanted.abs().max()),
        "computed": fast.vdcache.history.computed_steps() if len(fast.vdcache.history) else [],
        "slots": [len(g.slots) for g in graphs],
        "collectives": collectives,
        "apart": fast.vdcache.ranks.apart,
    }
