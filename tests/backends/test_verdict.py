"""One verdict for a model: graphs are judged together, and what keeps Dynamo from compiling them is named."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import vdcache
from vdcache.testing import TinyDiT, latent, time_of

STEPS = 4
DUE = [0, 2, 3]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def words():
    return latent(9, 1, 3, 4)


@torch.no_grad()
def generation(model):
    """One generation: what is warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(STEPS):
            model(latent(step), time_of(step), words())
    return [str(w.message) for w in said if issubclass(w.category, vdcache.VdcacheWarning)]


def compiled(model, door="handle", **options):
    options = {"num_steps": STEPS, "inner": "eager", **options}
    if door == "handle":
        return vdcache.compile(model, "every-2", **options)
    return torch.compile(model, backend="vdcache", options={"recipe": "every-2", **options})


class Bare(nn.Module):
    """A module that Dynamo compiles on its own: a small graph without a slot."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4).requires_grad_(False)

    @torch.compiler.disable(recursive=False)
    def forward(self, x):
        return self.inner(x)

    def inner(self, x):
        return torch.tanh(self.lin(x))


class Before(TinyDiT):
    """A graph of its own runs before the model's."""

    def __init__(self):
        super().__init__()
        self.bare = Bare()

    def forward(self, x, timestep, text):
        return super().forward(self.bare(x), timestep, text)


class After(Before):
    """A graph of its own runs after the model's."""

    def forward(self, x, timestep, text):
        return self.bare(TinyDiT.forward(self, x, timestep, text))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("door", ["handle", "string"])
@pytest.mark.parametrize("kind", [Before, After])
def test_a_small_graph_beside_a_cached_one_is_no_trouble(kind, door, strict):
    """strict refused it, and a warning said that vdcache steps aside, although the model was cached."""
    with vdcache.record() as history:
        said = generation(compiled(kind(), door, strict=strict))
    assert history.computed_steps() == DUE and said == []


@pytest.mark.parametrize("kind", [nn.Identity, Bare])
def test_a_model_without_a_slot_is_said_once(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.lin = kind(), nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x, timestep, text):
            return self.lin(self.inside(x)).relu()

    (said,) = generation(compiled(Model()))
    assert "vdcache steps aside, the model runs as plain torch.compile" in said and "finds no slot in this model" in said
    assert ("Dynamo breaks the forward into several graphs: Skip inlining" in said) == (kind is Bare)
    torch._dynamo.reset()
    with pytest.raises(vdcache.errors.CaptureError, match="finds no slot in this model"):
        generation(compiled(Model(), strict=True))


class Looping(TinyDiT):
    """A break among its blocks."""

    def block(self, i, h, gates):
        q, k, v = self.qkv[i](h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = h + gates[0] * nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return h + gates[1] * self.mlp[i](h)

    def forward(self, x, timestep, text):
        gates = self.time(self.sinusoids(timestep, x.dtype))[:, None].chunk(2, -1)
        h = self.inp(x)
        for i in range(2):
            h = self.block(i, h, gates)
            torch._dynamo.graph_break()
        return self.out(h)


def test_a_break_among_the_blocks_is_named():
    """The message talked of Python floats and sinusoids, and the computed steps were [-1]."""
    model = compiled(Looping())
    (said,) = generation(model)
    line = Looping.forward.__code__.co_firstlineno
    assert "Dynamo breaks the forward into several graphs: Call to `torch._dynamo.graph_break()`" in said
    assert f"in a loop of forward, {__file__}:{line}" in said and "session.step()" in said
    assert "sine" not in said
    session = model.vdcache
    assert session.history.computed_steps() == [] and "0 steps computed" in repr(session)
    for _ in range(2):
        session.begin(STEPS)
        with torch.no_grad():
            for step in range(STEPS):
                session.step()
                model(latent(step), time_of(step), words())
        assert session.history.computed_steps() == DUE


def test_the_string_backend_names_the_break_as_well():
    said = generation(compiled(Looping(), "string"))
    assert any("Call to `torch._dynamo.graph_break()`" in s and "compile_repeated_blocks" in s for s in said), said


def none_prompt(model):
    with torch.no_grad(), pytest.raises(TypeError):
        model(latent(0), time_of(0), None)


def float_timestep(model):
    with torch.no_grad(), pytest.raises(AttributeError):
        model(latent(0), 1000.0, words())


def counting(model):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False):
        model(latent(0), time_of(0), words())


def default_device(model):
    with torch.device("cpu"), torch.no_grad():
        model(latent(0), time_of(0), words())


class Chained(Looping):
    """Fails among its blocks, as real ones do: Dynamo then leaves the whole loop alone."""

    def forward(self, x, timestep, text):
        timestep.dtype  # noqa: B018
        gates = self.time(self.sinusoids(timestep, x.dtype))[:, None].chunk(2, -1)
        h = self.inp(x)
        for i in range(2):
            h = self.block(i, h, gates) + self.text(text).mean(1, keepdim=True)
        return self.out(h)


@pytest.mark.parametrize(
    ("first", "cause"),
    [
        (none_prompt, "a call of this model failed (TypeError: linear(): argument 'input'"),
        (float_timestep, "a call of this model failed (AttributeError: 'float' object has no attribute"),
        (counting, "a call of this model ran under the dispatch mode"),
        (default_device, "a call of this model ran under the mode DeviceContext (torch.set_default_device)"),
    ],
)
def test_a_first_call_that_goes_wrong_is_named(first, cause):
    """Dynamo then leaves the forward alone for the process, and the message blamed the timestep."""
    model = Chained()
    one = compiled(model)
    with warnings.catch_warnings(record=True) as before:
        warnings.simplefilter("always")
        first(one)
    heard = [str(w.message) for w in before if issubclass(w.category, vdcache.VdcacheWarning)] + generation(one)
    assert not one.vdcache.history.computed_steps()
    assert any(cause in s and "torch._dynamo.reset() makes it try again" in s for s in heard), heard
    assert not any("sine" in s for s in heard)
    torch._dynamo.reset()
    again = compiled(model)
    assert generation(again) == [] and again.vdcache.history.computed_steps() == DUE
