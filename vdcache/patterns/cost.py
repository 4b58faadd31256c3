"""FLOPs and bytes of nodes, from shapes alone.

One multiplication and one addition are two FLOPs; only matrix products, convolutions and attention are counted, as
`torch.utils.flop_counter` does. Sizes that are symbols count as their hints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from vdcache.attention.tiles import TILE_ATTENTION, tables_of
from vdcache.ir.ops import ATTENTION, tensor_of
from vdcache.util.sizes import shape_hint, size_hint

__all__ = ["bytes_of", "flops", "least_seconds", "owners"]

aten = torch.ops.aten
_CONVS = {
    getattr(packet, overload)
    for packet in (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution)
    for overload in packet.overloads()
}
_TRANSPOSED = {
    getattr(packet, overload)
    for packet in (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
    for overload in packet.overloads()
}
_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.matmul.default)


def _numel(value: Tensor | None) -> int:
    return math.prod(shape_hint(value)) if value is not None else 0


def bytes_of(node: fx.Node) -> int:
    """Bytes of the node's value, 0 where it is no tensor."""
    value = tensor_of(node)
    return _numel(value) * value.element_size() if value is not None else 0


def flops(node: fx.Node) -> int:
    """FLOPs of one node; 0 for everything that is not counted, operations of other libraries among them."""
    if node.op != "call_function":
        return 0
    out = tensor_of(node)
    shapes = [tensor_of(a) for a in node.args]
    if node.target is aten.linear.default:
        return 2 * _numel(out) * size_hint(shapes[1].shape[-1])  # type: ignore[union-attr]
    if node.target in _PRODUCTS and shapes[0] is not None:
        return 2 * _numel(out) * size_hint(shapes[0].shape[-1])
    if node.target in (aten.addmm.default, aten.baddbmm.default) and shapes[1] is not None:
        return 2 * _numel(out) * size_hint(shapes[1].shape[-1])
    if node.target in _CONVS and shapes[1] is not None:
        transposed = node.target is aten.convolution.default and bool(node.args[6])
        return _convolution(shapes[0], shapes[1], out, transposed)
    if node.target in _TRANSPOSED and shapes[1] is not None:
        return _convolution(shapes[0], shapes[1], out, True)
    if node.target in ATTENTION:
        return _attention(shapes[0], shapes[1], shapes[2])
    if isinstance(node.target, torch._ops.HigherOrderOperator) and "flex_attention" in node.target.name():
        return _attention(shapes[0], shapes[1], shapes[2])
    if node.target is TILE_ATTENTION:
        return round(_attention(shapes[0], shapes[1], shapes[2]) * tables_of(node).density)
    if node.target is aten.einsum.default:
        return _einsum(str(node.args[0]), node.args[1])
    return 0


# FLOP/s and bytes/s that no device of a kind exceeds by much: a thread of a CPU, a data-centre GPU.
_RATES = {"cpu": (1e11, 2e10), "cuda": (1e15, 4e12)}


def least_seconds(inside: Iterable[fx.Node], moved: Iterable[fx.Node]) -> tuple[float, str]:
    """Seconds that nodes take at least on a fast device of their kind.

    Args:
        inside: the nodes.
        moved: whose values are read from memory or written to it.

    Returns also the type of the device.
    """
    nodes = list(inside)
    device = next((v.device.type for n in nodes if (v := tensor_of(n)) is not None), "cpu")
    work, moves = _RATES.get(device, _RATES["cuda"])
    threads = torch.get_num_threads() if device == "cpu" else 1
    return max(sum(map(flops, nodes)) / (work * threads), sum(map(bytes_of, moved)) / (moves * threads)), device


def _convolution(x: Tensor | None, weight: Tensor, out: Tensor | None, transposed: bool) -> int:
    taps = math.prod(size_hint(s) for s in weight.shape[1:])  # in channels of a group × kernel
    return 2 * _numel(x if transposed else out) * taps


def _attention(q: Tensor | None, k: Tensor | None, v: Tensor | None) -> int:
    if q is None or k is None or v is None:
        return 0
    rows = math.prod(size_hint(s) for s in q.shape[:-1])
    return 2 * rows * size_hint(k.shape[-2]) * (size_hint(q.shape[-1]) + size_hint(v.shape[-1]))


def _einsum(equation: str, operands: Any) -> int:
    if not isinstance(operands, (list, tuple)) or len(operands) < 2 or "..." in equation:
        return 0
    sizes: dict[str, int] = {}
    for letters, operand in zip(equation.replace(" ", "").split("->")[0].split(","), operands, strict=False):
        value = tensor_of(operand)
        if value is not None:
            sizes.update({letter: size_hint(s) for letter, s in zip(letters, value.shape, strict=False)})
    return 2 * math.prod(sizes.values())


def owners(
    graph: fx.Graph, regions: Iterable[Iterable[fx.Node]], needed: Iterable[fx.Node] = ()
) -> dict[fx.Node, tuple[int, ...]]:
    """Which regions a node works for: those it lies in, and those that alone read what it computes.

    What the output or a node outside all regions reads, and what is `needed` all the same, is left out.
    """
    kept = set(needed)
    own: dict[fx.Node, set[int]] = {}
    for number, region in enumerate(regions):
        for node in region:
            own.setdefault(node, set()).add(number)
    found: dict[fx.Node, tuple[int, ...]] = {}
    for node in reversed(graph.nodes):
        if node in own:
            found[node] = tuple(sorted(own[node]))
        elif node.op == "call_function" and node not in kept and node.users and all(u in found for u in node.users):
            found[node] = tuple(sorted(set().union(*(found[u] for u in node.users))))
    return found
