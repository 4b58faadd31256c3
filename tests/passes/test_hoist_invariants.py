"""hoist-invariants: what is marked, what is not, and that the graphs that come of it are the graph together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vdcache
from vdcache.errors import ConfigError
from vdcache.ir import dialect
from vdcache.ir.edit import inputs
from vdcache.ir.ops import CASTS, is_work
from vdcache.passes import Canonicalise, HoistInvariants, MarkLanes, Pipeline
from vdcache.passes.hoist_invariants import groups_of, held_inputs, side_graph, step_graph
from vdcache.patterns.invariance import is_view
from vdcache.testing import TinyDiT, latent, time_of

CALL = latent(0), time_of(0), latent(1, 1, 3, 4)


class Both(TinyDiT):
    """Its modulation adds timestep and prompt, as Flux.1's does; it returns its timestep's embedding too."""

    def __init__(self) -> None:
        super().__init__(dim=64)
        self.joint = nn.Linear(128, 64).requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        time = self.time(self.sinusoids(timestep, x.dtype))
        both = self.joint(time + self.text(text).mean(1).repeat(1, 2))
        return super().forward(x + both[:, None, :4], timestep, text), time[:, :8], self.text(text)


def captured(model: nn.Module, *call: Tensor) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """The canonical graph of a model, and its inputs for a call."""
    torch._dynamo.reset()
    given: list[list[Tensor]] = []
    compiled = vdcache.compile(model, "always", num_steps=4, inner="eager")
    with torch.no_grad():
        compiled(*call)
        compiled.vdcache.recorder = lambda graph, values, *rest: given.append(list(values))
        compiled(*call)
    program = compiled.vdcache.graphs[0]
    return Pipeline((Canonicalise(),)).run(program.guarded.captured.graph)[0], given[0]


@pytest.fixture(scope="module")
def both():
    return captured(Both(), *CALL)


def hoisted(graph: torch.fx.GraphModule, **options) -> torch.fx.GraphModule:
    given = Canonicalise.ensures | HoistInvariants.requires
    return Pipeline((HoistInvariants(**options),), verify=True, given=given).run(graph)[0]


@pytest.mark.parametrize("classes", [(), ("timestep",), ("prompt",), ("parameters", "prompt", "timestep", "both")], ids=str)
@torch.no_grad()
def test_the_graphs_together_are_the_graph(both, classes):
    graph, given = both
    marked = hoisted(graph, classes=classes)
    want = graph(*given)
    assert all(torch.equal(a, b) for a, b in zip(marked(*given), want, strict=True)), "a mark is an identity"
    groups = groups_of(marked)
    assert {group.kind for group in groups} == set(classes) - {"parameters"}
    held: dict[str, Tensor] = {}
    for group in groups:  # what others are computed from comes before them
        side, needed = side_graph(marked, group.values)
        values = side(*given, *(held[name] for name in needed))
        assert not any(is_work(n) for n in side.graph.nodes if n.name not in {m.name for m in marked.graph.nodes})
        held |= dict(zip(group.values, values, strict=True))
    step = step_graph(marked)
    names, fakes = held_inputs(step)
    assert [tuple(held[n].shape) for n in names] == [tuple(f.shape) for f in fakes]
    got = step(*given, *(held[name] for name in names))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    kept = {v.untyped_storage().data_ptr() for v in held.values()}
    assert not kept & {r.untyped_storage().data_ptr() for r in got}, "what the caller may write into is no held value"


def test_a_step_neither_computes_nor_reads_what_is_held(both):
    graph, _ = both
    marked = hoisted(graph, classes=("prompt", "timestep", "both"))
    step = step_graph(marked)
    layers = {kind: sum(is_work(n) for n in g.graph.nodes) for kind, g in (("graph", graph), ("step", step))}
    assert layers["graph"] - layers["step"] == 6, "time twice, text three times, joint once"
    unread = [n for n in inputs(step.graph) if not n.users]
    assert sum(n.meta["val"].numel() for n in unread) >= sum(
        p.numel() for m in (Both().time, Both().text, Both().joint) for p in m.parameters()
    )


def test_views_and_casts_are_not_held(both):
    marked = hoisted(both[0], classes=("prompt", "timestep", "both"))
    values = [m.args[0] for m in dialect.invariants(marked.graph)]
    assert values and not any(is_view(v) or v.target in CASTS for v in values)


def test_a_small_budget_holds_less(both):
    sizes = []
    for budget in (2**20, 600, 0):
        marks = dialect.invariants(hoisted(both[0], classes=("timestep",), budget=budget).graph)
        sizes.append(sum(m.meta["val"].numel() * 4 for m in marks))
        assert sizes[-1] <= budget
    assert sizes[0] == 1024 and sizes[2] == 0


def test_values_of_a_group_depend_on_the_same_inputs(both):
    graph, _ = both
    names = [n.name for n in inputs(graph.graph)]
    by_kind = {g.kind: g for g in groups_of(hoisted(graph, classes=("prompt", "timestep", "both")))}
    assert len(by_kind["timestep"].timesteps) == 1 and not by_kind["timestep"].prompts
    assert len(by_kind["prompt"].prompts) == 1 and not by_kind["prompt"].timesteps
    assert by_kind["both"].timesteps == by_kind["timestep"].timesteps and by_kind["both"].prompts == by_kind["prompt"].prompts
    assert len(by_kind["both"].static) == 6, f"weights and biases of time, text and joint: {names}"


def test_a_batch_of_which_one_lane_is_predicted_refuses():
    graph, _ = captured(TinyDiT(dim=64), latent(0, 2, 6, 4), time_of(0).repeat(2), latent(1, 2, 3, 4))
    given = Canonicalise.ensures | HoistInvariants.requires
    _, steps = Pipeline((MarkLanes("batch"), HoistInvariants()), given=given).run(graph)
    assert steps[1].rewrites == 0 and "predicted from the other" in str(steps[1].refusals[0])


def test_it_prints_and_parses_and_refuses_other_classes():
    text = "canonicalise,hoist-invariants{classes=[timestep],budget=1024}"
    assert str(Pipeline.parse(text)) == text
    with pytest.raises(ConfigError, match="'parameters', 'prompt', 'timestep' or 'both'"):
        HoistInvariants(classes=("latent",))
