"""halve-batch: compute one half of a batch where the other half is not needed.

    y = f(x: [2B, …]); z = slice(y, 0, B, 2B)   -->   z = f(slice(x, 0, B, 2B))

For variants in which one lane of guidance is predicted from the other. Every operation is repeated on half of the batch, sizes
in its arguments changed where they hold the batch; an operation whose result then has any other size than half, in one
dimension, refuses. Exact up to the kernels that a smaller batch takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from vdcache.errors import CaptureError
from vdcache.ir.edit import backward_slice, call, evaluate
from vdcache.ir.ops import communicates, is_effectful, tensor_of

__all__ = ["halve"]

aten = torch.ops.aten
_SIZED = {  # operations that are told the size of their result: where that argument stands
    aten.view.default: 1,
    aten._unsafe_view.default: 1,
    aten.reshape.default: 1,
    aten.expand.default: 1,
}
_UNFLATTEN = aten.unflatten.int
_REPEATS = {getattr(aten.repeat_interleave, overload) for overload in aten.repeat_interleave.overloads()}


def halve(
    graph: fx.GraphModule,
    full: fx.Node,
    kept: fx.Node,
    batch: int,
    low: int,
    carrying: Sequence[fx.Node],
    also: Sequence[Any] = (),
) -> dict[fx.Node, fx.Node]:
    """Rewrite `graph` so that `kept`, rows `low` to `low + batch / 2` of `full`, is computed from as many rows of the inputs.

    Args:
        carrying: the inputs that hold the batch in their first dimension.
        also: further values that are wanted on half of the batch.

    Returns, for every node that holds the whole batch, the one that holds half of it. The graph is left with dead code.

    Raises:
        CaptureError: an operation mixes the samples of a batch, or hides where they lie.
    """
    g = graph.graph
    high = low + batch // 2
    new: dict[fx.Node, fx.Node] = {}  # what holds half of the batch
    given = [n for n in g.nodes if n.op == "placeholder"]
    for node in carrying:
        with g.inserting_after(given[-1]):
            new[node] = call(g, aten.slice.Tensor, node, 0, low, high, provenance="halve-batch")
    wanted = backward_slice([full, *also])
    for node in list(g.nodes):
        if (
            node not in wanted
            or node.op != "call_function"
            or node in new.values()
            or node is kept
            or not any(p in new for p in node.all_input_nodes)
        ):
            continue
        if is_effectful(node) or communicates(node):
            raise CaptureError(
                f"'{node.name}' ({node.target}) does more than compute a value, and cannot run on half of a batch"
            )
        with g.inserting_before(node):
            new[node] = _half(g, node, new, batch, low, high)
    if full not in new:
        raise CaptureError(f"'{full.name}' does not depend on the batch")
    kept.replace_all_uses_with(new[full])
    return new


def _half(g: fx.Graph, node: fx.Node, new: dict[fx.Node, fx.Node], batch: int, low: int, high: int) -> fx.Node:
    """`node` on half of the batch."""
    args = list(pytree.tree_map(lambda a: new.get(a, a) if isinstance(a, fx.Node) else a, tuple(node.args)))
    kwargs = pytree.tree_map(lambda a: new.get(a, a) if isinstance(a, fx.Node) else a, dict(node.kwargs))
    if node.target in _SIZED and node.args[0] in new:
        place = _SIZED[node.target]
        args[place] = _half_sizes(node, node.args[0], new[node.args[0]])  # type: ignore[arg-type, index]
    elif node.target in _REPEATS and isinstance(kwargs.get("output_size"), int):
        kwargs["output_size"] //= 2
    elif node.target is _UNFLATTEN and node.args[0] in new:
        raise CaptureError(f"'{node.name}' ({node.target}) hides where the batch lies")

    def cut(a: Any) -> Any:
        """What holds the whole batch beside halves: a table that was repeated for every sample."""
        value = tensor_of(a)
        if not isinstance(a, fx.Node) or a in new.values() or value is None or value.ndim == 0 or value.shape[0] != batch:
            return a
        return call(g, aten.slice.Tensor, a, 0, low, high, provenance="halve-batch")

    whole = node.meta.get("val")
    if _halved_everywhere(node.target, args, kwargs, whole) is None:
        args, kwargs = pytree.tree_map(cut, tuple(args)), pytree.tree_map(cut, kwargs)
        if _halved_everywhere(node.target, args, kwargs, whole) is None:
            raise CaptureError(f"'{node.name}' ({node.target}) mixes the samples of a batch, or hides where they lie")
    return call(g, node.target, *args, provenance="halve-batch", **kwargs)


def _halved_everywhere(target: Any, args: Any, kwargs: Any, whole: Any) -> Any:
    """The result on half of the batch; None where that fails, or where a tensor of it is not half of what it was in one
    dimension.
    """

    try:
        result = evaluate(target, tuple(args), kwargs)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
    mine = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    theirs = [t for t in pytree.tree_leaves(whole) if isinstance(t, torch.Tensor)]
    if len(mine) != len(theirs) or not mine:
        return None
    for a, b in zip(mine, theirs, strict=True):
        changed = [(x, y) for x, y in zip(a.shape, b.shape, strict=False) if x != y]
        if a.ndim != b.ndim or len(changed) != 1 or changed[0][0] * 2 != changed[0][1]:
            return None
    return result


def _half_sizes(node: fx.Node, source: fx.Node, half: fx.Node) -> list[Any]:
    """The sizes that `node` is told, for half of the batch."""
    before, after, out = source.meta["val"].shape, half.meta["val"].shape, node.meta["val"].shape
    dim = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
    sizes: list[Any] = list(node.args[_SIZED[node.target]])  # type: ignore[arg-type, index]
    if node.target is aten.expand.default:
        at = dim + len(out) - len(before)
    else:
        outer = math.prod(before[:dim])
        found = (j for j in range(len(out)) if math.prod(out[:j]) == outer and out[j] > 1)
        at = next(found, -1)
        if at < 0 or out[at] % 2:
            raise CaptureError(f"'{node.name}' ({node.target}) hides where the batch lies")
    if sizes[at] != -1:
        sizes[at] = out[at] // 2
    return sizes
