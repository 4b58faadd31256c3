"""The peers: every one runs on the shipped weights, leaves out what is said of it, and keeps nothing for the next generation."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from bench import peers
from bench.solvers import generate
from vdcache.demo.conditions import Condition

ONE = (Condition(),)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    pytest.importorskip("cache_dit")
    peers.quieten()


def test_the_class_of_diffusers_is_the_same_network():
    assert peers.difference() < 1e-5


def run(peer, steps=10):
    return peers.flops_of(peer.velocity(), ONE, steps)


def shares(peer, steps=10):
    plain = run(peers.PLAIN, 1)[0][0]
    return [count / plain for count in run(peer, steps)[0]]


CASES = {
    "FBCache": (lambda: peers.first_block(0.3), "some"),
    "FBCache that may not": (lambda: peers.first_block(0.0), "none"),
    "SeaCache": (lambda: peers.sea(0.4), "some"),
    "PAB": (lambda: peers.broadcast(2, 2, (0, 1000)), "some"),
    "FasterCache": (lambda: peers.faster(2, 3, 900), "some"),
    "TaylorSeer as it comes": (lambda: peers.taylor("default", 5, 3), "none"),
    "TaylorSeer, blocks": (lambda: peers.taylor("blocks", 3, 3), "some"),
    "TaylorSeer, branches": (lambda: peers.taylor("branches", 3, 3), "some"),
    "TaylorSeer, lite": (lambda: peers.taylor("lite", 3, 3), "some"),
    "DBCache": (lambda: peers.dbcache(0.3, warmup=2), "some"),
    "DBCache and TaylorSeer": (lambda: peers.dbcache(0.3, first=2, taylor_order=1, warmup=2), "some"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_left_out_is_counted(name):
    make, skips = CASES[name]
    each = shares(make())
    assert each[0] == 1 and max(each) <= 1.01
    assert (min(each) < 0.6) == (skips == "some"), each


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_nothing_of_a_generation_is_left_for_the_next(name):
    velocity = CASES[name][0]().velocity()
    first, again = (generate(velocity, ONE, steps=6, begin=velocity.begin) for _ in range(2))
    assert torch.equal(first, again)
    if CASES[name][1] == "none":
        plain = peers.PLAIN.velocity()
        assert torch.equal(first, generate(plain, ONE, steps=6))


@pytest.mark.slow
def test_a_generation_cut_short_leaves_nothing_either():
    velocity = peers.dbcache(0.3, warmup=2).velocity()
    whole = generate(velocity, ONE, steps=6, begin=velocity.begin)
    generate(velocity, ONE, steps=3, begin=velocity.begin)
    assert torch.equal(generate(velocity, ONE, steps=6, begin=velocity.begin), whole)


@pytest.mark.slow
def test_fastercache_gets_the_halves_in_its_order():
    """Where it skips, it guesses the unconditional half from the conditional one, which is exact as no attention is skipped here."""
    plain, cached = peers.PLAIN.velocity(), peers.faster(1, 3, 990).velocity()
    seen = {}
    for name, velocity in (("plain", plain), ("cached", cached)):
        outputs = seen[name] = []
        velocity.begin(3)
        for t in (1000.0, 980.0):
            x = torch.randn(1, 6, 8, 24, 24, generator=torch.Generator().manual_seed(int(t)))
            text = torch.cat([torch.ones(1, 5, 32), torch.zeros(1, 5, 32)])
            outputs.append(velocity(torch.cat([x, x]), torch.full((2,), t), text))
    (_, right), (_, guessed) = seen["plain"], seen["cached"]
    torch.testing.assert_close(guessed[0], right[0], rtol=1e-4, atol=1e-5)
    assert (guessed[1] - right[1]).abs().max() > 1e-2, "the unconditional half is a guess"
