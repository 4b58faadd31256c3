"""Composite operations stay whole inside the block alone, whoever enters and leaves, and in whatever order."""

import pytest
import torch
from torch._export.utils import _collect_all_valid_cia_ops
from torch._subclasses.fake_impls import op_implementations_dict

import vdcache
from vdcache.ir import trace
from vdcache.ir.composites import whole_composites

aten = torch.ops.aten
LINEAR = aten.linear.default
CIA = torch._C.DispatchKey.CompositeImplicitAutograd


def tables():
    return {op: dict(op.py_kernels) for op in _collect_all_valid_cia_ops()}, dict(op_implementations_dict)


def targets(fn, *args):
    return {n.target for n in trace(fn, *args).graph.graph.nodes}


def test_everything_is_put_back():
    before = tables()
    for _ in range(3):
        with whole_composites():
            assert CIA in LINEAR.py_kernels
        assert tables() == before
    with pytest.raises(ZeroDivisionError), whole_composites():
        raise ZeroDivisionError
    assert tables() == before


def test_every_capture_is_the_same():
    """Torch's own export drops rules for fake tensors that it found (that of `item` among them); capturing drops none."""
    x, w = torch.randn(3, 4), torch.randn(4, 4)
    rules = set(op_implementations_dict)
    for _ in range(3):
        assert LINEAR in targets(torch.nn.functional.linear, x, w)
        assert rules <= set(op_implementations_dict)


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.strength = torch.nn.Linear(4, 4), 1.0

    def forward(self, x):
        return self.layer(x) * self.strength


@torch.no_grad()
def test_numbers_that_change_are_captured_after_an_export():
    """Dynamo makes an input of a float when it has changed once, and reads it with `item`, whose rule torch's own export drops for good."""
    model, x = Scaled(), torch.randn(2, 4)
    torch.export.export(model, (x,)).run_decompositions({})
    assert aten.item.default not in op_implementations_dict
    torch._dynamo.reset()
    compiled = vdcache.compile(model, "always", num_steps=3, inner="eager", strict=True)
    for strength in (1.0, 0.5, 0.25):
        model.strength = strength
        assert torch.equal(compiled(x), model(x))
    assert len(compiled.vdcache.graphs) == 2


def test_the_last_to_leave_puts_everything_back():
    """As captures in two threads may: the first is through while the second still traces."""
    before, x, w = tables(), torch.randn(3, 4), torch.randn(4, 4)
    first, second = whole_composites(), whole_composites()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert CIA in LINEAR.py_kernels and LINEAR in targets(torch.nn.functional.linear, x, w)
    second.__exit__(None, None, None)
    assert tables() == before


def test_a_kernel_that_is_registered_later_is_kept():
    with whole_composites():
        pass
    LINEAR.py_impl(torch._C.DispatchKey.MTIA)(own := lambda *args, **kwargs: None)
    try:
        with whole_composites():
            assert LINEAR.py_kernels[torch._C.DispatchKey.MTIA] is own and CIA in LINEAR.py_kernels
        assert LINEAR.py_kernels[torch._C.DispatchKey.MTIA] is own
    finally:
        del LINEAR.py_kernels[torch._C.DispatchKey.MTIA]
        LINEAR._dispatch_cache.clear()
