"""How many graphs Dynamo makes of one forward before it gives up: each compilation of vdcache counts its own."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import vdcache
from vdcache.testing import Reference, TinyDiT, latent, time_of
from vdcache.util.isolated import compile_isolated

STEPS = 4
RECIPES = 10  # Dynamo's own limit is 8
TEXT = latent(9, 1, 3, 4)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs():
    """A backend that counts what it is asked for."""

    class Graphs:  # equal to nothing but itself, or Dynamo takes one for another
        def __init__(self) -> None:
            self.count = 0

        def __call__(self, graph, inputs):
            self.count += 1
            return graph.forward

    return Graphs


@torch.no_grad()
def test_every_recipe_on_one_function_works():
    model = TinyDiT(1)

    def function(x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        return model(x, t, words)

    for every in range(2, 2 + RECIPES):
        fast = vdcache.compile(function, f"every-{every}", num_steps=STEPS, inner="eager", strict=True)
        reference = Reference(model, every, STEPS)
        for step in range(STEPS):
            x, t = latent(step), time_of(step)
            torch.testing.assert_close(fast(x, t, TEXT), reference.call(step, 0, x, t, TEXT))
        assert fast.vdcache.history.computed_steps() == sorted({*range(0, STEPS, every), STEPS - 1})


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("limit", [None, 3, 11])
def test_each_has_the_limit_to_itself(graphs, limit):
    def double(x: Tensor) -> Tensor:
        return x * 2

    most = limit or torch._dynamo.config.recompile_limit
    for _ in range(3):
        made = graphs()
        compiled = compile_isolated(double, limit=limit, backend=made, dynamic=False)
        for size in range(1, most + 3):
            assert torch.equal(compiled(torch.ones(size)), torch.full((size,), 2.0))
        assert made.count == most
        for size in (1, most, most + 1):  # what there is runs, and giving up is final
            assert torch.equal(compiled(torch.ones(size)), torch.full((size,), 2.0))
        assert made.count == most
    torch._dynamo.reset()
    assert torch.equal(compiled(torch.ones(most + 1)), torch.full((most + 1,), 2.0))
    assert made.count == most + 1


def test_a_compilation_of_the_users_own_does_not_count(graphs):
    model = TinyDiT(1)
    for _ in range(torch._dynamo.config.recompile_limit):
        torch.compile(model, backend=graphs())(latent(0), time_of(0), TEXT)
    fast = vdcache.compile(model, "every-2", num_steps=2, inner="eager", strict=True)
    with torch.no_grad():
        fast(latent(0), time_of(0), TEXT)
    assert len(fast.vdcache.graphs) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_settings_of_dynamo_are_the_users(fails):
    before = torch._dynamo.config.recompile_limit

    def compiler(graph, inputs):
        if fails:
            raise RuntimeError("no compiler")
        return graph.forward

    compiled = compile_isolated(lambda x: x + 1, limit=before + 3, backend=compiler)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) if fails else contextlib.nullcontext():
        compiled(torch.ones(2))
    assert torch._dynamo.config.recompile_limit == before


def test_threads_leave_the_settings_alone(graphs):
    def double(x: Tensor) -> Tensor:
        return x * 2

    before = torch._dynamo.config.recompile_limit
    limits = [2, 5, before + 4]
    compiled = [compile_isolated(double, limit=n, backend=graphs(), dynamic=False) for n in limits]

    def work(run) -> None:
        for size in range(1, max(limits) + 3):
            assert torch.equal(run(torch.ones(size)), torch.full((size,), 2.0))

    with ThreadPoolExecutor(len(limits)) as pool:
        list(pool.map(work, compiled))
    assert torch._dynamo.config.recompile_limit == before
