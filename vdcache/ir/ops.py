"""Which ATen operations are views, casts, real work or attention: the vocabulary of the patterns."""

from __future__ import annotations

import operator

import torch
from torch import fx

__all__ = [
    "ATTENTION",
    "CASTS",
    "NORMS",
    "SLICES",
    "VIEWS",
    "allow_skipping",
    "collective_order",
    "communicates",
    "groups_of",
    "is_effectful",
    "is_work",
    "same_type",
    "tensor_inputs",
    "tensor_of",
    "unviewed",
]

aten = torch.ops.aten


def _all(*names: str) -> frozenset[object]:
    """Every overload of the named operations (an operation that this torch lacks is left out)."""
    packets = (getattr(aten, name, None) for name in names)
    return frozenset(getattr(p, overload) for p in packets if p is not None for overload in p.overloads())


# One tensor in, the same elements out in another order or shape.
VIEWS = _all(
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "flatten", "unflatten", "movedim"
)
# One tensor in, the same elements out in another type or place.
CASTS = _all("_to_copy", "to", "type_as", "alias", "detach", "clone", "contiguous", "lift_fresh_copy")
# One tensor in, some of its elements out.
SLICES = _all(
    "slice", "select", "narrow", "index_select", "gather", "index", "unbind", "chunk", "split", "split_with_sizes"
) | {operator.getitem}
NORMS = _all("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm")
ATTENTION = _all("scaled_dot_product_attention")

_MATMULS = _all("linear", "addmm", "mm", "bmm", "baddbmm", "matmul", "einsum", "_scaled_mm", "_int_mm", "_weight_int8pack_mm")
_CONVS = _all("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_WORK = _MATMULS | _CONVS | ATTENTION

_RANDOM = _all(
    "bernoulli",
    "normal",
    "rand",
    "rand_like",
    "randn",
    "randn_like",
    "randint",
    "randint_like",
    "randperm",
    "uniform",
    "multinomial",
)

_COMMUNICATION = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem"})
_REDUCTIONS = frozenset({"sum", "avg", "product", "min", "max", "band", "bor", "bxor"})
_SKIPPABLE = "vdcache.skippable"  # in the meta of a node that communicates


def is_work(node: fx.Node) -> bool:
    """Whether the node does what a cache may save: matrix products, convolutions, attention, third-party kernels."""
    if node.op != "call_function":
        return False
    if node.target in _WORK:
        return True
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if communicates(node):  # the same values, elsewhere: it makes no attention a fused branch
        return False
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims", "prim")


def communicates(node: fx.Node) -> bool:
    """Whether a node exchanges values with other processes, or waits for such an exchange. In graphs of Dynamo too."""
    if node.op != "call_function":
        return False
    name = node.target._qualified_op_name if isinstance(node.target, torch._ops.OpOverloadPacket) else str(node.target)
    return name.partition(".")[0].partition("::")[0] in _COMMUNICATION


def groups_of(graph: fx.Graph) -> tuple[object, ...]:
    """The process groups that a graph communicates in, each once: names, or the groups themselves where the graph holds those."""
    found = (a for n in graph.nodes if communicates(n) for a in (*n.args, *n.kwargs.values()))
    return tuple(dict.fromkeys(a for a in found if (isinstance(a, str) and a not in _REDUCTIONS) or hasattr(a, "group_name")))


def collective_order(graph: fx.Graph) -> tuple[str, ...]:
    """Every exchange with other processes, in the order in which it begins: the operation and what it is given besides tensors and sizes."""

    def words(node: fx.Node) -> str:
        given = (a for a in (*node.args, *node.kwargs.values()) if isinstance(a, str) or hasattr(a, "group_name"))
        return " ".join([str(node.target), *(str(getattr(a, "group_name", a)) for a in given)])

    return tuple(words(n) for n in graph.nodes if communicates(n) and "wait_tensor" not in str(n.target))


def allow_skipping(graph: fx.Graph) -> int:
    """Say that all processes skip the same exchanges of this graph and of its copies: then these have no effect besides their value. How many."""
    found = [n for n in graph.nodes if communicates(n) and not n.target._schema.is_mutable]
    for node in found:
        node.meta[_SKIPPABLE] = True
    return len(found)


def is_effectful(node: fx.Node) -> bool:
    """Whether skipping the node changes more than its value: writes, random numbers, dropout in training, and communication, unless all
    processes skip it together (`allow_skipping`)."""
    if node.op != "call_function":
        return False
    if node.target in _RANDOM:
        return True
    if node.target in (aten.dropout.default, aten.native_dropout.default):
        return bool(node.args[2]) and bool(node.args[1] != 0)
    if node.target in ATTENTION:
        rate = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(rate)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable or (communicates(node) and not node.meta.get(_SKIPPABLE))
    return "autocast" in str(node.target)


def tensor_of(node: object) -> torch.Tensor | None:
    """The fake tensor that a node computes, if it computes one."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node takes; not the sizes, which are nodes too in a graph for many sizes."""
    return [p for p in node.all_input_nodes if tensor_of(p) is not None]


def unviewed(node: fx.Node) -> fx.Node:
    """The value that `node` repeats but for views and casts."""
    while (node.target in VIEWS or node.target in CASTS) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def same_type(a: object, b: object) -> bool:
    """Whether two nodes compute tensors of equal shape, dtype and device."""
    x, y = tensor_of(a), tensor_of(b)
    return x is not None and y is not None and x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
