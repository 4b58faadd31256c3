"""What depends on what: the five classes of values, by structure alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vdcache
from vdcache.ir.ops import is_work
from vdcache.passes import Canonicalise, Pipeline
from vdcache.patterns.invariance import CLASSES, Shares, dependence, shares
from vdcache.testing import TinyDiT, latent, time_of


class Mixed(TinyDiT):
    """Beside TinyDiT's layers, one of timestep and prompt, one of parameters, one behind a random draw, one of the latent's size."""

    def __init__(self) -> None:
        super().__init__()
        self.joint, self.table, self.noisy = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)
        self.requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        x, timestep, text = third, first, second  # no name and no place tells them
        both = self.joint(self.sinusoids(timestep, x.dtype) + self.text(text).mean(1))
        fixed = (self.table @ self.table).sum()
        drawn = self.noisy(torch.randn(1, 8) + self.text(text).mean(1))
        return super().forward(x + both[:, None, :4] + fixed + 0.0 * drawn[:, None, :4], timestep, text)


def graph_of(model: nn.Module, *call: Tensor) -> torch.fx.GraphModule:
    torch._dynamo.reset()
    compiled = vdcache.compile(model, "always", num_steps=4, inner="eager")
    with torch.no_grad():
        compiled(*call)
    return Pipeline((Canonicalise(),)).run(compiled.vdcache.graphs[0].guarded.captured.graph)[0]


@pytest.fixture(scope="module")
def mixed():
    return graph_of(Mixed(), time_of(0), latent(1, 1, 3, 4), latent(0))


def test_every_value_has_its_class(mixed):
    found = dependence(mixed)
    layers = [found.kind(n) for n in mixed.graph.nodes if is_work(n)]
    # joint's text, joint, table, noisy's text, noisy, time, text, … the latent's layers
    assert {kind: layers.count(kind) for kind in CLASSES[:4]} == {"parameters": 1, "prompt": 3, "timestep": 1, "both": 1}
    drawn = next(n for n in mixed.graph.nodes if "randn" in str(n.target))
    assert found.kind(drawn) == "latent", "a random draw is made anew in every step"
    assert all(found.kind(n) == "latent" for n in mixed.graph.nodes if is_work(n) and drawn in n.all_input_nodes)


def test_shares_add_up_to_the_graph(mixed):
    found = shares(mixed)
    for what in ("flops", "weights", "values"):
        assert sum(share for _, share in found.of(what)) == pytest.approx(1)
    model = Mixed()
    size = {name: p.numel() * 4 for name, p in model.named_parameters()}
    assert found.weights["timestep"] == size["time.weight"] + size["time.bias"]
    assert found.weights["parameters"] == 0 and found.weights["both"] == size["joint.weight"] + size["joint.bias"]
    assert found.flops["timestep"] == 2 * 8 * 16


def test_a_weight_that_several_classes_read_belongs_to_the_last(mixed):
    model = Mixed()
    text = sum(p.numel() * 4 for p in model.text.parameters())
    noisy = sum(p.numel() * 4 for p in model.noisy.parameters())
    table = model.table.numel() * 4
    assert shares(mixed).weights["prompt"] == text
    assert shares(mixed).weights["latent"] > noisy + table, "the table ends in the latent's values"


def test_shares_of_several_graphs_add_up():
    one = Shares({"latent": 3}, {"prompt": 1}, {})
    assert (one + one).flops["latent"] == 6 and dict((one + Shares()).of("weights"))["prompt"] == 1
    assert not Shares() and dict(Shares().of("flops")) == dict.fromkeys(CLASSES, 0.0)


def test_a_report_tells_the_shares(tmp_path):
    report = vdcache.explain(TinyDiT(dim=64), latent(0), time_of(0), latent(1, 1, 3, 4), recipe="exact")
    share = dict(report.shares.of("weights"))
    assert f"the timestep alone {dict(report.shares.of('flops'))['timestep']:.1%} of FLOPs, {share['timestep']:.1%}" in str(
        report
    )
    assert {h.kind for h in report.held} == {"prompt", "timestep"} and not report.nothing
    assert "values of the timestep alone" in str(report)
    assert "the timestep alone" in report.to_html()
