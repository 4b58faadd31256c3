"""Adding nodes to a graph, typed as they are made."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "add_input",
    "backward_slice",
    "call",
    "copy_graph",
    "empty_graph_module",
    "evaluate",
    "inline",
    "inputs",
    "laid_out",
    "outputs",
    "set_outputs",
]


def call(graph: fx.Graph, target: Any, *args: Any, provenance: str, **kwargs: Any) -> fx.Node:
    """Add `target(*args, **kwargs)` at the graph's insertion point, with its fake value."""

    result = evaluate(target, args, kwargs)
    node = graph.call_function(target, args, kwargs)
    node.meta = {"val": result, "vdcache": provenance}
    return node


def laid_out(graph: fx.Graph, x: fx.Node, like: torch.Tensor, *, provenance: str) -> fx.Node:
    """The same value at the graph's insertion point, in memory as `like` lies: views that follow were made for that."""
    strides = like.stride()
    if x.meta["val"].stride() == strides:
        return x
    order = sorted(range(like.ndim), key=lambda d: (-strides[d], d))
    x = call(graph, torch.ops.aten.permute.default, x, order, provenance=provenance)
    x = call(graph, torch.ops.aten.clone.default, x, memory_format=torch.contiguous_format, provenance=provenance)
    return call(graph, torch.ops.aten.permute.default, x, [order.index(d) for d in range(like.ndim)], provenance=provenance)


def evaluate(target: Any, args: Any, kwargs: Any) -> Any:
    """What `target` gives for the fake values of the nodes among its arguments."""
    given, named = pytree.tree_map(lambda x: x.meta["val"] if isinstance(x, fx.Node) else x, (args, kwargs))
    tensors = [x for x in pytree.tree_leaves((given, named)) if isinstance(x, torch.Tensor)]
    # constants that an operation makes on its way must be fake as well
    mode = next((x.fake_mode for x in tensors if hasattr(x, "fake_mode")), contextlib.nullcontext())
    with torch.no_grad(), mode:
        return target(*given, **named)


def inline(graph: fx.Graph, fn: Callable[..., Any], args: Any, provenance: str) -> Any:
    """Add what a function of tensors computes, as ATen operations, at the graph's insertion point.

    Args:
        fn: called once with the fake values of the nodes in `args`, which may be nested.

    Returns what `fn` returned, with nodes for the tensors.
    """
    of: dict[int, fx.Node] = {}
    alive: list[Any] = []  # an id means something only as long as its tensor lives

    def value(x: Any) -> Any:
        if not isinstance(x, fx.Node):
            return x
        # a view of its own, so that one fake value that several nodes share is told apart
        fake = x.meta["val"].detach()
        of[id(fake)] = x
        alive.append(fake)
        return fake

    def symbol(x: Any) -> Any:
        """A size that is a symbol, as a node that computes it: a graph cannot hold symbols."""
        return _size_node(graph, x.node.expr, alive, of, provenance) if isinstance(x, torch.SymInt) else x

    def record(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        given, named = pytree.tree_map(lambda x: of.get(id(x), x) if isinstance(x, torch.Tensor) else symbol(x), (args, kwargs))
        made = graph.call_function(func, given, named)
        made.meta = {"val": result, "vdcache": provenance}
        if isinstance(result, torch.Tensor):
            of[id(result)] = made
            alive.append(result)
        for i, part in enumerate(result if isinstance(result, (tuple, list)) else ()):
            if isinstance(part, torch.Tensor):
                own = graph.call_function(operator.getitem, (made, i))
                own.meta = {"val": part, "vdcache": provenance}
                of[id(part)] = own
                alive.append(part)
        return result

    whole = False  # inside an operation that is kept as it is

    class OpRecorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            asked = func.namespace == "prim"  # of a tensor's device and the like: nothing that a graph computes
            return result if whole or asked else record(func, args, kwargs or {}, result)

    class Composite(TorchFunctionMode):
        """Attention stays one operation, as everywhere in a graph: which kernel runs is decided when it runs."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal whole
            if func is not F.scaled_dot_product_attention:
                return func(*args, **(kwargs or {}))
            whole = True
            try:
                result = func(*args, **(kwargs or {}))
            finally:
                whole = False
            return record(torch.ops.aten.scaled_dot_product_attention.default, args, kwargs or {}, result)

    values = pytree.tree_map(value, args, is_leaf=lambda x: isinstance(x, fx.Node))
    with torch.no_grad(), OpRecorder(), Composite():
        results = fn(*values)
    return pytree.tree_map(lambda x: of[id(x)] if isinstance(x, torch.Tensor) else x, results)


def _size_node(graph: fx.Graph, expr: Any, tensors: list[Any], of: dict[int, fx.Node], provenance: str) -> Any:
    """A node for a symbolic size: read off a tensor that has it, or a sum or product of such."""
    if expr.is_Integer:
        return int(expr)
    at_hand = [(t, of[id(t)]) for t in tensors if id(t) in of]
    for value, node in (*at_hand, *((n.meta.get("val"), n) for n in inputs(graph))):
        if isinstance(value, torch.SymInt) and value.node.expr == expr:
            return node
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr == expr:
                made = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                made.meta = {"val": size, "vdcache": provenance}
                return made
    join = operator.mul if expr.is_Mul else operator.add if expr.is_Add else _SYMBOLIC.get(type(expr).__name__)
    if join is None:
        raise NotImplementedError(f"no tensor at hand has the size {expr}")
    total, *rest = (_size_node(graph, part, tensors, of, provenance) for part in expr.args)
    for part in rest:
        value = join(*(p.meta["val"] if isinstance(p, fx.Node) else p for p in (total, part)))
        total = graph.call_function(join, (total, part))
        total.meta = {"val": value, "vdcache": provenance}
    return total


_SYMBOLIC: dict[str, Callable[..., Any]] = {
    "Pow": operator.pow,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
}


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy to edit: its own nodes, with their names and shallow copies of their meta; tensors and modules are shared.

    Its Python code is written when it is first run or asked for: most copies never are, and writing it takes longer than copying. The
    private class that does so was seen to work on torch 2.13.0.
    """
    nodes = fx.Graph()
    result = nodes.graph_copy(graph.graph, {}, return_output_node=True)
    if isinstance(result, tuple):
        value, old = result
        nodes.output(value).meta = dict(old.meta)
    copied = _LazyGraphModule(graph, nodes)
    copied.meta = dict(graph.meta)
    return copied


def empty_graph_module(graph: fx.Graph) -> fx.GraphModule:
    """A module around a graph that is still to be filled; its Python code is written late, as a copy's."""
    return _LazyGraphModule(torch.nn.Module(), graph)


def inputs(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="placeholder")


def add_input(graph: fx.Graph, name: str, like: torch.Tensor, provenance: str) -> fx.Node:
    """Add an input after all others: a dense tensor of the shape, dtype and device of `like`."""
    existing = inputs(graph)
    place = graph.inserting_after(existing[-1]) if existing else graph.inserting_before(next(iter(graph.nodes)))
    with place:
        node = graph.placeholder(name)
    node.meta = {"val": torch.empty_like(like, memory_format=torch.contiguous_format), "vdcache": provenance}
    return node


def outputs(graph: fx.Graph) -> list[Any]:
    """What the graph returns, as a flat list."""
    results = graph.output_node().args[0]
    return list(results) if isinstance(results, (tuple, list)) else [results]


def set_outputs(graph: fx.Graph, values: list[Any]) -> None:
    graph.output_node().args = (tuple(values),)


def set_output(graph: fx.Graph, position: int, value: Any) -> None:
    """Return `value` in that place of the graph's results."""
    values = outputs(graph)
    values[position] = value
    set_outputs(graph, values)


def backward_slice(start: list[Any]) -> set[fx.Node]:
    """Every node that `start` is computed from, `start` included."""
    todo = [n for n in start if isinstance(n, fx.Node)]
    live = set(todo)
    while todo:
        for parent in todo.pop().all_input_nodes:
            if parent not in live:
                live.add(parent)
                todo.append(parent)
    return live
