"""Held values: every step is the untouched model, bit for bit, whatever happens; and what is held is not computed again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vdcache
from tests.support.exact_histories import Conditioned, ExactMachine, exact_handles, exact_histories
from tests.support.thorough import examples
from vdcache.errors import ConfigError
from vdcache.runtime import invariants
from vdcache.runtime.invariants import weight_sums
from vdcache.testing import TinyDiT, latent, time_of

STEPS = 4


@pytest.fixture(autouse=True)
def fresh_dynamo(request):
    if "both" not in request.fixturenames:
        torch._dynamo.reset()


def made(model: nn.Module, recipe: str = "exact", **more):
    return vdcache.compile(model, recipe, num_steps=STEPS, inner="eager", **more)


def prompt(number: int) -> Tensor:
    return latent(number, 1, 3, 4)


def generate(compiled, model, prompts: tuple[int, ...] = (1,), shift: float = 0.0) -> None:
    """One generation with new objects at every call, each step against the untouched model."""
    for step in range(STEPS):
        for number in prompts:
            call = latent(step), time_of(step) - shift, prompt(number)
            assert torch.equal(compiled(*call), model(*call))


# ---- random histories -----------------------------------------------------------------------------------------------


def test_nothing_is_stale_whatever_happens():
    """Thousands of them run under `make thorough`."""
    for machine in exact_histories(examples(2000, 6)):
        assert not machine.stale, "\n".join(machine.stale)


OWN = sorted(name.removeprefix("move_") for name in vars(ExactMachine) if name.startswith("move_"))


@pytest.fixture(scope="module")
def both():
    return exact_handles()


@pytest.mark.parametrize("move", OWN)
@torch.no_grad()
def test_every_move_by_itself(move, both):
    machine = ExactMachine(11, both)
    for truth in both:
        machine.moves()[move](truth)
    assert machine.calls and not machine.stale, "\n".join(machine.stale)


@torch.no_grad()
def test_what_was_computed_from_other_weights_in_between_is_not_held():
    """Written through `.data` in the middle of a generation, and put back before it ends: a value is held for its own weights."""
    model = Conditioned()
    compiled = made(model)
    before = model.time.weight.detach().clone()
    for step in range(STEPS):
        if step in (2, 3):
            model.time.weight.data.copy_(2.0 * before)
        args = latent(step), time_of(step), prompt(1)
        assert torch.equal(compiled(*args), model(*args)), "nobody held a value for this timestep"
        model.time.weight.data.copy_(before)
    generate(compiled, model)


@torch.no_grad()
def test_a_timestep_of_negative_zero_is_another_one():
    class Signed(TinyDiT):
        def sinusoids(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
            sign = torch.copysign(torch.ones_like(timestep), timestep)[:, None]
            return torch.cat([sign, super().sinusoids(timestep, dtype)[:, 1:]], -1)

    model = Signed()
    compiled = made(model)
    results = []
    for last in (0.0, -0.0, 0.0):
        compiled.vdcache.begin(2)
        for t in (900.0, last):
            args = latent(0), torch.tensor([t]), prompt(1)
            compiled.vdcache.step()
            results.append(compiled(*args))
            assert torch.equal(results[-1], model(*args))
    assert not torch.equal(results[1], results[3])


# ---- what is held ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_repeated_prompt_and_schedule_compute_nothing_anew():
    model = Conditioned()
    compiled = made(model)
    tables = compiled.vdcache.invariants
    generate(compiled, model, (1, 2))
    assert tables.misses == 2 + STEPS, "each prompt once, each timestep once for both lanes"
    held = tables.bytes()
    generate(compiled, model, (2, 1))
    assert tables.misses == 2 + STEPS and tables.bytes() == held > 0
    generate(compiled, model, (1,), shift=3.0)
    assert tables.misses == 2 + 2 * STEPS, "another schedule has other timesteps"
    compiled.vdcache.reset()
    assert tables.bytes() == 0


@torch.no_grad()
def test_held_weights_are_not_read():
    """They are gone from the step's graph, so they need not be there while it runs."""
    model = Conditioned()
    compiled = made(model)
    compiled(*call(0))
    program = compiled.vdcache.graphs[0]
    read = {n.name for n in program.variants.recompute.graph.graph.find_nodes(op="placeholder") if n.users}
    names = [n.name for n in program.guarded.captured.graph.graph.find_nodes(op="placeholder")]
    behind = {names[i] for group in program.side.groups for i in group.static}
    assert behind and not behind & read


def call(step: int) -> tuple[Tensor, Tensor, Tensor]:
    return latent(step), time_of(step), prompt(1)


@torch.no_grad()
def test_another_recipe_holds_too_and_reuses_as_without():
    model = Conditioned()
    reused = []
    for hoist in (False, True):
        torch._dynamo.reset()
        compiled = made(model, "every-2", hoist=hoist)
        out = [compiled(*call(step)) for _ in range(2) for step in range(STEPS)]
        reused.append((out, [bool(r.reused) for r in compiled.vdcache.history], compiled.vdcache.invariants.hits))
    (plain, steps, none), (hoisted, same, hits) = reused
    assert all(torch.equal(a, b) for a, b in zip(plain, hoisted, strict=True)) and steps == same and any(steps)
    assert not none and hits


@pytest.mark.parametrize("recipe", ["teacache-0.2", "adacache-fast", "dbcache-1-0-0.1", "fora-2", "taylorseer-2-1"])
@torch.no_grad()
def test_probes_masks_and_lanes_go_on_as_without(recipe):
    """What a recipe measures, and what it makes of it, is the same."""
    model, found = Conditioned(), []
    for hoist in (False, True):
        torch._dynamo.reset()
        compiled = vdcache.compile(model, recipe, num_steps=8, inner="eager", hoist=hoist)
        with torch.no_grad():
            outs = [compiled(latent(s), time_of(s), prompt(p)) for _ in range(2) for s in range(8) for p in (1, 2)]
        found.append((outs, [r.plan for r in compiled.vdcache.history], bool(compiled.vdcache.invariants.hits)))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1] and [f[2] for f in found] == [False, True]


@torch.no_grad()
def test_a_call_outside_any_session_computes_everything():
    model = Conditioned()
    compiled = torch.compile(model, backend="vdcache", options={"recipe": "always", "hoist": True, "inner": "eager"})
    for step in (0, 0, 1):
        assert torch.equal(compiled(*call(step)), model(*call(step)))


# ---- bounds ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_held_is_bounded(monkeypatch):
    model = Conditioned()
    compiled = made(model)
    tables = compiled.vdcache.invariants
    monkeypatch.setattr(invariants, "MOST_BYTES", 300)
    for generation in range(6):
        generate(compiled, model, (generation,), shift=float(generation))
        assert tables.bytes() <= 300
    monkeypatch.setattr(invariants, "MOST_TIMESTEPS", 3)
    tables.clear()
    generate(compiled, model)
    before = tables.hits
    generate(compiled, model)
    assert tables.hits > before, "a schedule longer than the table finds those that came first"


@torch.no_grad()
def test_an_input_that_is_another_one_at_every_call_is_no_prompt():
    model = Conditioned()
    compiled = vdcache.compile(model, "exact", num_steps=40, inner="eager")
    tables = compiled.vdcache.invariants
    for step in range(40):
        args = latent(step), torch.tensor([1000.0 - step]), prompt(step)
        assert torch.equal(compiled(*args), model(*args))
    entries = [len(e) for scope in tables._scopes.values() for e in scope["prompt.0"].by_timestep.values()]
    assert not entries, "they are compared and held no longer"


@torch.no_grad()
def test_weights_that_come_anew_at_every_call_are_not_summed_at_every_call(monkeypatch):
    model = Conditioned()
    compiled = made(model)
    summed = []
    monkeypatch.setattr(invariants, "weight_sums", lambda w: summed.append(1) or weight_sums(w))
    for generation in range(2):
        for step in range(STEPS):
            for number in range(4):
                for module in model.modules():
                    for name, p in list(module._parameters.items()):
                        if p is not None:
                            module._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=False)
                args = latent(step), time_of(step), prompt(number)
                assert torch.equal(compiled(*args), model(*args))
        if not generation:
            first = len(summed)
    assert len(summed) - first <= first <= 2 * 8 * (invariants.CHECKS + STEPS)


def test_hoist_is_true_or_false():
    with pytest.raises(ConfigError, match="hoist is True or False; got 'yes'"):
        vdcache.compile(TinyDiT(), "exact", hoist="yes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.complex64])
def test_sums_show_any_single_element_and_any_exchange(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(13, 7) * 50).to(dtype)
    before = weight_sums(weight)
    assert torch.equal(before, weight_sums(weight.clone()))
    for i in range(weight.numel()):
        other = weight.clone()
        other.view(-1)[i] += 1
        assert not torch.equal(before, weight_sums(other))
    for i, j in ((0, 1), (0, 90), (3, 64), (10, 80)):
        other = weight.clone()
        a, b = other.view(-1)[i].clone(), other.view(-1)[j].clone()
        other.view(-1)[i], other.view(-1)[j] = b, a
        assert a == b or not torch.equal(before, weight_sums(other))
