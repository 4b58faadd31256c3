"""probe: each place is the value that a hook on the eager model sees, or is refused with the reason."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from tests.support.thorough import some
from tests.zoo import ZOO, build, graph_of
from vdcache.errors import ConfigError
from vdcache.ir import dialect, dump
from vdcache.ir.capture import trace
from vdcache.passes import Canonicalise, MarkBranches, MergeSlots, Pipeline, Probe
from vdcache.passes.values import PLACES
from vdcache.testing import TinyDiT, captured, guarded, latent, time_of, values_of

STEP, TOKENS = 3, 6
SCOPES = {
    "alone": (),
    "guarded": (MarkBranches(),),
    "merged": (MarkBranches(), MergeSlots()),
    "rear": (MarkBranches(start=1), MergeSlots()),
}


def probed(graph, probe, scope=()):
    """The graph with its probe, and what was refused."""
    found, steps = Pipeline((Canonicalise(), *scope, probe), verify=True).run(graph)
    return found, [str(r) for r in steps[-1].refusals]


def value_of(graph, given, probe, scope=()):
    found, refused = probed(graph, probe, scope)
    assert not refused
    (mark,) = dialect.probes(found.graph)
    assert mark.args[2:] == (probe.distance, probe.reference_step)
    return values_of(found, given)[mark.args[0].name]


# ---- TinyDiT ---------------------------------------------------------------------------------------------------------

ARGS = latent(1), time_of(2), latent(9, 1, 3, 4)


def tiny(place, blocks=3):
    """What TinyDiT computes there, by hand."""
    m = TinyDiT(blocks=blocks)
    x, t, text = ARGS
    sinusoids = m.sinusoids(t, x.dtype)
    start = m.inp(x) + m.text(text).mean(1, keepdim=True)
    if place == "input":
        return x
    if place == "modulated":
        return start
    if place in ("timestep", "modulation"):
        return m.time(sinusoids)
    n = int(place.removeprefix("residual") or blocks)
    m.qkv, m.mlp = m.qkv[:n], m.mlp[:n]
    return m.branches(x, t, text)


@functools.cache
def tiny_graph():
    return captured(TinyDiT(blocks=3), *ARGS)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("place", ["input", "residual1", "residual2", "residual3", "modulated", "timestep"])
@torch.no_grad()
def test_tiny(place, scope):
    graph, given = tiny_graph()
    at, blocks = ("residual", int(place[-1])) if place[-1].isdigit() else (place, 1)
    got = value_of(graph, given, Probe(location=at, blocks=blocks), SCOPES[scope])
    assert torch.equal(got, tiny(place))


def test_names_say_the_group_and_the_place():
    graph, _ = tiny_graph()
    for probe, name in (
        (Probe(), "all/probe.residual1"),
        (Probe(blocks=2, group="rear"), "rear/probe.residual2"),
        (Probe(location="timestep", blocks=2), "all/probe.timestep"),
    ):
        found, _ = probed(graph, probe)
        assert [m.args[1] for m in dialect.probes(found.graph)] == [name]


@pytest.mark.parametrize("place", [p for p in PLACES if p != "output"])
def test_a_probe_changes_nothing(place):
    graph, given = tiny_graph()
    found, _ = probed(graph, Probe(location=place), SCOPES["merged"])
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(found(*given), graph(*given), strict=True))
    assert all(not m.users for m in dialect.probes(found.graph))


def test_two_probes_stand_side_by_side():
    graph, given = tiny_graph()
    found, _ = Pipeline((Canonicalise(), Probe(location="input"), Probe(location="residual", blocks=2)), verify=True).run(graph)
    values = values_of(found, given)
    got = {m.args[1]: values[m.args[0].name] for m in dialect.probes(found.graph)}
    assert torch.equal(got["all/probe.input"], tiny("input"))
    assert torch.equal(got["all/probe.residual2"], tiny("residual2"))


# ---- published classes -----------------------------------------------------------------------------------------------


def seen_by_hooks(name):
    """What hooks see of the eager model: the latent tokens before and after each block, what the first attention is given, and the layers of the timestep."""
    model, call = build(name), ZOO[name].call(STEP, TOKENS)
    lists = [m for key in ("blocks", "transformer_blocks", "single_transformer_blocks") for m in getattr(model, key, ())]
    seen = {"before": [], "after": [], "attention": [], "time": []}
    text_first = name in ("flux", "sd3")  # their blocks return the text first

    def before(_, args, kwargs):
        seen["before"].append(kwargs.get("hidden_states", args[0] if args else None))

    def after(_, args, out):
        seen["after"].append(out[int(text_first)] if isinstance(out, tuple) else out)

    def attends(_, args, kwargs):
        seen["attention"].append((kwargs.get("hidden_states", args[0] if args else None), kwargs.get("encoder_hidden_states")))

    for block in lists:
        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after)
    first = lists[0]
    next(getattr(first, a) for a in ("attn1", "attn") if hasattr(first, a)).register_forward_pre_hook(attends, with_kwargs=True)
    for path, module in model.named_modules():
        if path.endswith(("time_embedder", "timestep_embedder", "time_embedding")):
            module.register_forward_hook(lambda _, args, out: seen["time"].append(out))
    with torch.no_grad():
        out = model(**call)
    seen["output"] = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
    return seen


@functools.cache
def known(name):
    torch.manual_seed(0)
    seen = seen_by_hooks(name)
    return seen, *graph_of(name)


# text that is attended to, joined with the latent, in double and single blocks, and attention over time
REAL = some(
    ("wan", "hunyuan_video", "cogvideox", "flux", "latte", "sd3", "pixart"), {"wan", "cogvideox", "flux", "latte"}.__contains__
)


@pytest.mark.parametrize("scope", ["alone", "rear"])
@pytest.mark.parametrize("name", REAL)
@torch.no_grad()
def test_the_latent(name, scope):
    _, graph, given = known(name)
    got = value_of(graph, given, Probe(location="input"), SCOPES[scope])
    assert torch.equal(got, ZOO[name].call(STEP, TOKENS)["hidden_states"])


@pytest.mark.parametrize("name", some(["demo", "wan_i2v"], "demo".__eq__))
@torch.no_grad()
def test_the_latent_without_the_conditions_that_were_joined_to_it(name):
    graph, given = graph_of(name)
    channels = {"demo": 3, "wan_i2v": 4}[name]
    got = value_of(graph, given, Probe(location="input"))
    assert torch.equal(got, ZOO[name].call(STEP, TOKENS)["hidden_states"][:, :channels])


@pytest.mark.parametrize("scope", ["alone", "rear"])
@pytest.mark.parametrize("name", REAL)
@torch.no_grad()
def test_the_residual_of_the_first_blocks(name, scope):
    """Of the latent tokens alone, across double and single blocks."""
    seen, graph, given = known(name)
    count = 1 if name == "latte" else len(seen["after"])
    for blocks in range(1, count + 1):
        got = value_of(graph, given, Probe(blocks=blocks), SCOPES[scope])
        want = seen["after"][blocks - 1] - seen["before"][0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["alone", "rear"])
@pytest.mark.parametrize("name", REAL)
@torch.no_grad()
def test_the_modulated_input_of_the_first_attention(name, scope):
    """In CogVideoX one layer reads text and latent tokens together; the probe is of the latent ones, as everywhere."""
    seen, graph, given = known(name)
    hidden, _ = seen["attention"][0]
    torch.testing.assert_close(value_of(graph, given, Probe(location="modulated"), SCOPES[scope]), hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REAL)
@torch.no_grad()
def test_the_embedding_of_the_timestep(name):
    seen, graph, given = known(name)
    assert torch.equal(value_of(graph, given, Probe(location="timestep")), seen["time"][0])


@torch.no_grad()
def test_the_modulation_of_wan():
    """What the published TeaCache looks at with retained steps: the projection of the embedding, [B, 6, dim] there."""
    model, call, out = build("wan"), ZOO["wan"].call(STEP, TOKENS), []
    model.condition_embedder.time_proj.register_forward_hook(lambda _, args, result: out.append(result))
    model(**call)
    _, graph, given = known("wan")
    assert torch.equal(value_of(graph, given, Probe(location="modulation")).flatten(), out[0].flatten())


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(graph, **options):
    found, why = probed(graph, Probe(**options))
    assert not dialect.probes(found.graph)
    (reason,) = why
    return reason


def test_more_blocks_than_there_are():
    assert "there are 3 denoising blocks, and 4 were asked for" in refused(tiny_graph()[0], blocks=4)
    assert "there are 4 denoising blocks, and 5 were asked for" in refused(known("flux")[1], blocks=5)


def test_tokens_that_change_their_order_between_blocks():
    """Latte's second block sees frames where the first sees places."""
    assert "the latent tokens are (16, 3, 16) here and were (3, 16, 16)" in refused(known("latte")[1], blocks=2)


class NoTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(x + torch.nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


def test_places_that_do_not_exist():
    graph = trace(NoTime(), latent(0)).graph
    assert "no layer depends on the timestep alone" in refused(graph, location="timestep")
    graph = trace(lambda x, w: x + torch.relu(x @ w), latent(0), latent(1, 4, 4)).graph
    for at in ("residual", "modulated"):
        assert "no block attends over video tokens" in refused(graph, location=at)
    graph = trace(lambda x, w: (x @ w).sum(), latent(0), latent(1, 4, 4)).graph
    assert "no input was found that the model returns an update of" in refused(graph, location="input")


def test_a_refused_probe_leaves_the_graph_as_it_was():
    graph, _ = tiny_graph()
    plain, _ = Pipeline((Canonicalise(),)).run(graph)
    assert dump(probed(graph, Probe(blocks=9))[0]) == dump(plain)
    latte, _ = Pipeline((Canonicalise(),)).run(known("latte")[1])
    found, _ = probed(known("latte")[1], Probe(blocks=2))
    assert {n.name for n in found.graph.nodes} >= {n.name for n in latte.graph.nodes}


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"location": "outputs"}, "location is 'input', 'residual', 'modulated', 'timestep' or 'modulation'; got 'outputs'"),
        ({"location": "output"}, "got 'output'"),
        ({"location": None}, "got None"),
        ({"location": 3}, "got 3"),
        ({"distance": "l3"}, "distance is 'l1', 'l2', 'cosine' or 'magnitude'; got 'l3'"),
        ({"distance": None}, "got None"),
        ({"reference_step": "ever"}, "reference-step is 'step' or 'computed'; got 'ever'"),
        ({"reference_step": 1}, "got 1"),
        ({"filter": "kalman"}, "filter is 'wiener', or empty for no filter; got 'kalman'"),
        ({"filter": None}, "got None"),
        ({"blocks": 0}, "blocks is a whole number of at least 1; got 0"),
        ({"blocks": -1}, "blocks is a whole number of at least 1; got -1"),
        ({"blocks": 1.5}, "blocks is a whole number of at least 1; got 1.5"),
        ({"blocks": math.nan}, "blocks is a whole number of at least 1; got nan"),
        ({"blocks": "2"}, "blocks is a whole number of at least 1; got '2'"),
        ({"blocks": None}, "blocks is a whole number of at least 1; got None"),
        ({"blocks": True}, "blocks is a whole number of at least 1; got True"),
        ({"group": ""}, "group"),
        ({"group": "a/b"}, "group"),
        ({"group": 3}, "group"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        Probe(**options)


def test_the_text_of_a_probe_reads_back():
    for probe in (Probe(), Probe("input", 1, "cosine", "step", "wiener", "rear"), Probe(blocks=8), Probe(location="timestep")):
        pipeline = Pipeline((Canonicalise(), probe))
        assert Pipeline.parse(str(pipeline)) == pipeline
    assert str(Probe(blocks=8, reference_step="step")) == "probe{blocks=8,reference-step=step}"


def test_a_graph_that_is_guarded_already():
    graph = guarded(TinyDiT(), *ARGS, more=(MergeSlots(), Probe(location="residual", blocks=2)))
    assert [m.args[1] for m in dialect.probes(graph.graph)] == ["all/probe.residual2"]
