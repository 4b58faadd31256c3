"""Weights that are DTensors, on two processes."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

STEPS = 6


def run(rank: int, folder: str) -> None:
    """What one process computes, in a file."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    import vdcache
    from vdcache.demo.model import DemoConfig, DemoDiT, with_positions

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DemoDiT(DemoConfig(num_layers=2)).eval().requires_grad_(False)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        parallelize_module(block.ffn, mesh, {"net.0.proj": ColwiseParallel(), "net.2": RowwiseParallel()})
    fast = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager", strict=True)
    exact = []
    with torch.no_grad():
        for step in range(STEPS):
            noise = torch.Generator().manual_seed(step)
            x = with_positions(torch.randn(1, 3, 3, 16, 16, generator=noise))
            call = x, torch.tensor([1000.0 - 100 * step]), torch.ones(1, 5, 32)
            exact.append(torch.equal(fast(*call), model(*call)))
    graphs = fast.vdcache.graphs
    variants = graphs[0].variants
    flops = [variants.flops(plan) for plan in variants.plans]
    exchanged = [len(variants[plan].collectives) for plan in variants.plans]
    found = [exact, fast.vdcache.history.computed_steps(), len(graphs), min(flops) / max(flops), exchanged]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


def test_computed_steps_are_exact_and_a_reused_step_communicates_nothing(tmp_path):
    """The ranks of the weights' mesh agree, so they skip their collectives together."""
    mp.spawn(run, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        exact, computed, graphs, flops, exchanged = json.loads((tmp_path / f"{rank}.json").read_text())
        assert exact == [step in computed for step in range(STEPS)]
        assert computed == [0, 3, 5] and graphs == 1 and flops < 0.2
        assert exchanged[0] > 0 and exchanged[1] == 0
