"""Weights that wrap other tensors, as torchao's quantised ones do, are cached and masked like any."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vdcache
from vdcache.demo.model import DemoConfig, DemoDiT, with_positions

STEPS = 6
torchao = pytest.importorskip("torchao.quantization")


def quantised(config) -> DemoDiT:
    torch.manual_seed(0)
    model = DemoDiT(DemoConfig(num_layers=2)).eval().requires_grad_(False)
    torchao.quantize_(model, config)
    return model


def call(step: int):
    noise = torch.Generator().manual_seed(step)
    x = with_positions(torch.randn(1, 3, 3, 16, 16, generator=noise))
    return x, torch.tensor([1000.0 - 100 * step]), torch.ones(1, 5, 32)


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_a_computed_step_of_a_quantised_model_is_that_model_bit_for_bit(bits):
    torch._dynamo.reset()
    config = torchao.Int8WeightOnlyConfig() if bits == 8 else torchao.IntxWeightOnlyConfig(torch.int4)
    model = quantised(config)
    assert type(model.blocks[0].ffn.net[2].weight).__module__.startswith("torchao"), "its weights wrap others"
    fast = vdcache.compile(model, "every-3", num_steps=STEPS, inner="eager", strict=True)
    for step in range(STEPS):
        out, want = fast(*call(step)), model(*call(step))
        assert torch.equal(out, want) == (step in (0, 3, 5))
    assert fast.vdcache.history.computed_steps() == [0, 3, 5]


@torch.no_grad()
def test_masks_cache_and_quantised_weights_together():
    torch._dynamo.reset()
    model = quantised(torchao.Int8WeightOnlyConfig())
    masked = vdcache.compile(model, "tiles-1", inner="eager", strict=True)
    both = vdcache.compile(model, "tiles-1+every-3", num_steps=STEPS, inner="eager", strict=True)
    for step in range(STEPS):
        out, want = both(*call(step)), masked(*call(step))
        assert torch.equal(out, want) == (step in (0, 3, 5))
    assert both.vdcache.graphs[0].masks.startswith("2 attentions under masks (frames:1)")
    assert not torch.equal(masked(*call(0)), model(*call(0)))


@torch.no_grad()
def test_two_quantised_models_of_one_class_do_not_mix():
    torch._dynamo.reset()
    model = quantised(torchao.Int8WeightOnlyConfig())
    other = copy.deepcopy(model)
    nn.init.constant_(other.proj_out.bias, 3.0)
    options = {"recipe": "every-3", "num_steps": STEPS, "inner": "eager"}
    a, b = (torch.compile(m, backend="vdcache", options=options) for m in (model, other))
    for step in range(STEPS):
        first, second = a(*call(step)), b(*call(step))
        if step in (0, 3, 5):
            assert torch.equal(first, model(*call(step))) and torch.equal(second, other(*call(step)))
        else:
            assert (second - first).mean() > 1.0
