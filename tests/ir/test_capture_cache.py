"""Captured graphs on the disk: what is read is what would be traced, and nothing else is ever taken for it."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
from torch import nn

import vdcache
from vdcache.ir.capture_cache import CaptureCache
from vdcache.ir.dump import dump
from vdcache.testing import small_models
from vdcache.testing.models import value

capture_module = sys.modules["vdcache.ir.capture"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(capture_module, "captures_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def traced(monkeypatch):
    """How often a graph was traced."""
    found = []
    real = capture_module.whole_composites

    def counting():
        found.append(1)
        return real()

    monkeypatch.setattr(capture_module, "whole_composites", counting)
    return found


def captured(fn, *args, **kwargs):
    """What capturing makes of a function's only graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(capture_module.capture(graph, inputs))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend, dynamic=False)(*args, **kwargs)
    assert len(graphs) == 1
    return graphs[0]


def told(one):
    """All that the code after capturing reads of a graph."""
    nodes = [
        (
            n.name,
            n.meta.get("stack_trace"),
            str(n.meta.get("original_aten")),
            [
                (str(p), k if isinstance(k, str) else f"{k.__module__}.{k.__qualname__}")
                for p, k in (n.meta.get("nn_module_stack") or {}).values()
            ],
            [
                (type(x), x.shape, x.stride(), x.storage_offset(), x.dtype, x.device, x.requires_grad)
                if isinstance(x, torch.Tensor)
                else x
                for x in torch.utils._pytree.tree_leaves(n.meta.get("val"))
            ],
        )
        for n in one.graph.graph.nodes
    ]
    return dump(one.graph), nodes, one.signature, one.graph.code


@pytest.mark.parametrize("name", ["wan", "flux", "hunyuan_video", "dit", "cogvideox"])
def test_what_is_read_is_what_was_traced(folder, traced, name):
    case = small_models()[name]
    model = case.build()
    first = told(captured(model, **case.call(0, 6)))
    again = told(captured(model, **case.call(1, 6)))
    assert len(traced) == 1
    assert again == first


def test_a_model_runs_the_same_from_the_disk(folder, traced, monkeypatch):
    """Bit for bit, weights of another model of the same form among them."""
    case = small_models()["wan"]
    results = []
    for kept in (True, True, False):
        if not kept:
            monkeypatch.setattr(capture_module, "captures_folder", lambda: None)
        torch._dynamo.reset()
        torch.manual_seed(len(results) % 2)
        model = case.build()
        fast = vdcache.compile(model, "every-2", num_steps=4, inner="eager")
        with torch.no_grad():
            results.append([value(fast(**case.call(step, 4))) for step in range(4)])
        assert fast.vdcache.history.computed_steps() == [0, 2, 3]
    assert len(traced) == 2
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


class Net(nn.Module):
    def __init__(self, factor=2.0, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.register_buffer("shift", torch.ones(width))
        self.factor = factor

    def forward(self, x):
        return self.layer(x) * self.factor + self.shift


def keys(folder):
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_whatever_changes_a_graph_changes_its_key(folder, traced):
    x = torch.randn(3, 4)
    seen = []
    for change in (
        lambda: captured(Net(), x),
        lambda: captured(Net(3.0), x),
        lambda: captured(Net(), torch.randn(5, 4)),
        lambda: captured(Net(), x.double().float().t().contiguous().t()),
        lambda: captured(Net().double(), x.double()),
        lambda: captured(lambda x: torch.sin(x), x),
        lambda: captured(lambda x: torch.cos(x), x),
        lambda: captured(lambda x: x[1:], x),
        lambda: captured(lambda x: x[:1], x),
        lambda: captured(lambda x: x.sum(0), x),
        lambda: captured(lambda x: x.sum(1), x),
        lambda: captured(lambda x: x.to(torch.float64), x),
        lambda: captured(lambda x: x.to(torch.bfloat16), x),
    ):
        change()
        seen.append(keys(folder))
    assert len(traced) == len(seen) and all(len(found) == i + 1 for i, found in enumerate(seen))
    with torch.autocast("cpu"):
        captured(Net(), x)
    assert len(keys(folder)) == len(seen) + 1
    captured(Net(), x)
    assert len(traced) == len(seen) + 1


def test_what_a_model_writes_into_is_written_back(folder, traced):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(2))

        def forward(self, x):
            self.count.add_(1)
            return x * self.count

    first, second = (captured(Counts(), torch.ones(2)) for _ in range(2))
    assert len(traced) == 1 and first.signature.mutations and first.signature == second.signature


@torch.library.custom_op("vdcache_test::other", mutates_args=())
def other(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@other.register_fake
def _(x):
    return torch.empty_like(x)


def test_what_cannot_be_told_apart_is_traced_every_time(folder, traced):
    def branches(x):
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    base = torch.randn(8)
    for fn, args in (
        (lambda x: other(x) + 1, (torch.randn(3),)),
        (branches, (torch.randn(3),)),
        (
            lambda x: torch.nn.functional.max_pool1d(x, 2),
            (torch.randn(1, 1, 4),),
        ),  # a function that others share their name with
        (lambda x, y: x + y, (base[:4], base[2:6])),
    ):
        for _ in range(2):
            captured(fn, *args)
    assert len(traced) == 8 and not keys(folder)


def test_a_file_that_was_cut_is_as_good_as_none(folder, traced):
    first = told(captured(Net(), torch.randn(3, 4)))
    (path,) = (p for p in folder.rglob("*") if p.is_file())
    for damage in (b"", path.read_bytes()[:-20], b"nonsense"):
        path.write_bytes(damage)
        assert told(captured(Net(), torch.randn(3, 4))) == first
    assert len(traced) == 4
    captured(Net(), torch.randn(3, 4))
    assert len(traced) == 4


def test_a_file_runs_nothing(tmp_path):
    key = "a" * 40
    cache = CaptureCache(tmp_path)
    cache.put_bytes(key, pickle.dumps(print))
    assert cache.get(key) is None
    cache.put_bytes(key, pickle.dumps((torch.float32, torch.device("cpu"), slice(1, 2), torch.strided, torch.channels_last)))
    assert cache.get(key) == (torch.float32, torch.device("cpu"), slice(1, 2), torch.strided, torch.channels_last)
    with pytest.raises(ValueError, match="is not a key"):
        cache.put_bytes("../../elsewhere", b"")


def test_a_folder_that_cannot_be_written_to_keeps_nothing(tmp_path, monkeypatch, traced):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(capture_module, "captures_folder", lambda: tmp_path / "file")
    for _ in range(2):
        captured(Net(), torch.randn(3, 4))
    assert len(traced) == 2


@pytest.mark.parametrize("what", ["bit", "other", "number", "empty"])
def test_a_file_that_was_changed_is_as_good_as_none(folder, traced, what):
    """Also one that still reads: the graph of another model, under this model's key."""
    x = torch.randn(3, 4)
    captured(Net(3.0), x)
    (foreign,) = (path for path in folder.rglob("*") if path.is_file())
    want = told(captured(Net(), x))
    (path,) = (path for path in folder.rglob("*") if path.is_file() and path != foreign)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"bit": bytes(data), "other": foreign.read_bytes(), "number": pickle.dumps(5), "empty": b""}[what])
    assert told(captured(Net(), x)) == want
    assert len(traced) == 3
