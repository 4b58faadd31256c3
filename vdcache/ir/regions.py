"""Regions of a graph that become graphs of their own, called by `invoke_subgraph`, and back.

What repeats is then traced, or compiled, once. Dynamo makes such calls where a user has marked a function with
`torch.compiler.nested_compile_region`, and `repeated_modules` finds the rest. Patterns and passes read one flat graph, so capturing takes
all of them in again; the inner compiler is given the blocks that repeat as calls once more (`passes.outline`).
Seen to work on torch 2.13.0.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from vdcache.ir.edit import outputs

__all__ = ["LEAST", "Region", "call_regions", "inline_regions", "operation", "region_of", "repeated_modules"]

DEEPEST = 4  # modules within modules that are looked at for what repeats
LEAST = 8  # nodes of a region that is worth a call
INVOKE = torch.ops.higher_order.invoke_subgraph


def inline_regions(graph: fx.GraphModule) -> int:
    """Put what `invoke_subgraph` calls in the place of each call, in place. Returns how many calls there were."""
    calls = graph.graph.find_nodes(op="call_function", target=INVOKE)
    for call in calls:
        _inline(graph, call)
    if calls:
        graph.delete_all_unused_submodules()
        graph.recompile()
    return len(calls)


def _inline(graph: fx.GraphModule, call: fx.Node) -> None:
    held, _, *given = call.args
    assert isinstance(held, fx.Node)
    region = getattr(graph, str(held.target))
    inline_regions(region)  # one may call another
    of: dict[fx.Node, Any] = {}
    parameters = iter(given)
    outer = _paths(call)
    with graph.graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "placeholder":
                of[node] = next(parameters)
            elif node.op == "get_attr":
                name = f"{held.target}_{str(node.target).replace('.', '_')}"
                if not hasattr(graph, name):
                    setattr(graph, name, operator.attrgetter(str(node.target))(region))
                of[node] = graph.graph.get_attr(name)
                of[node].meta = dict(node.meta)
            elif node.op != "output":
                of[node] = graph.graph.node_copy(node, of.__getitem__)
                _name_modules(of[node], outer)
    results = [of[n] if isinstance(n, fx.Node) else n for n in outputs(region.graph)]
    for item in list(call.users):
        item.replace_all_uses_with(results[item.args[1]])  # type: ignore[arg-type,index]
        graph.graph.erase_node(item)
    graph.graph.erase_node(call)
    if not held.users:
        graph.graph.erase_node(held)


def _paths(node: fx.Node) -> list[tuple[str, Any]]:
    return [(str(path), kind) for path, kind in (node.meta.get("nn_module_stack") or {}).values()]


def _name_modules(node: fx.Node, outer: list[tuple[str, Any]]) -> None:
    """A region is traced once: a copy belongs to the modules of the call that it stands for, not to those of the first call."""
    own = _paths(node)
    if not outer or len(own) < len(outer):
        return
    first, here = own[len(outer) - 1][0], outer[-1][0]
    inner = [(here + path.removeprefix(first), kind) for path, kind in own[len(outer) :]]
    node.meta["nn_module_stack"] = {str(i): entry for i, entry in enumerate([*outer, *inner])}


@dataclass(frozen=True)
class Region:
    """Neighbouring nodes of a graph that could be a graph of their own.

    Args:
        inside: the nodes, in order.
        given: what they read from outside, in the order in which it is read first.
        results: those of them that are read outside.
        kind: equal for regions that compute the same of what they are given: operations, wiring, shapes, strides, dtypes and devices.
    """

    inside: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    kind: Hashable

    @property
    def takes_values(self) -> bool:
        """Whether all that it is given are values; an operation that calls a graph is given that graph."""
        return all(isinstance(_value_of(n), (torch.Tensor, int, torch.SymInt)) for n in self.given)


def region_of(inside: Sequence[fx.Node]) -> Region:
    """Nodes of a graph, in its order, as a region."""
    number = {n: i for i, n in enumerate(inside)}
    given: dict[fx.Node, int] = {}

    def place(node: fx.Node) -> str:
        return f"%{number[node]}" if node in number else f"${given.setdefault(node, len(given))}"

    lines = tuple((n.op, n.target, repr(fx.node.map_arg((n.args, n.kwargs), place)), operation(n)) for n in inside)
    results = tuple(n for n in inside if any(u not in number for u in n.users))
    kind = lines, tuple(map(_form, given)), tuple(number[n] for n in results)
    return Region(tuple(inside), tuple(given), results, kind)


def operation(node: fx.Node) -> str:
    """What a node does and what comes out, whatever it is given."""
    return f"{node.target} -> {_form(node)}"


def _form(node: fx.Node) -> str:
    return "|".join(map(_form_of, pytree.tree_leaves(_value_of(node))))


def _value_of(node: fx.Node) -> Any:
    """What is known of a node's value: in a graph of ours, or in one of Dynamo's."""
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def _form_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)}{tuple(value.stride())}{value.storage_offset()}{value.dtype}{value.device}"
    return str(value)


def call_regions(graph: fx.GraphModule, kinds: Sequence[Sequence[Region]], purpose: str) -> None:
    """Put calls of one subgraph in the place of the regions of each kind, in place. No two regions may overlap.

    Args:
        purpose: part of the calls' names. While Dynamo waits, torch takes calls of one name for calls of what it traced first under it,
            so the name also holds a digest of the kind; the same in every process, for caches go by it.
    """
    now: dict[fx.Node, fx.Node] = {}  # what stands for a region's result
    for members in kinds:
        name = f"{purpose}_{hashlib.blake2b(repr(members[0].kind).encode(), digest_size=8).hexdigest()}"
        setattr(graph, name, _graph_of(members[0], now))
        for region in members:
            _call(graph.graph, name, region, now)
    graph.recompile()


def _graph_of(region: Region, now: dict[fx.Node, fx.Node]) -> fx.GraphModule:
    graph, of = fx.Graph(), dict[fx.Node, fx.Node]()
    for i, node in enumerate(region.given):
        of[node] = of[now.get(node, node)] = graph.placeholder(f"x_{i}")
        of[node].meta = dict(node.meta)
    for node in region.inside:
        of[node] = graph.node_copy(node, of.__getitem__)
    graph.output(tuple(of[n] for n in region.results))
    return fx.GraphModule({}, graph)


def _call(graph: fx.Graph, name: str, region: Region, now: dict[fx.Node, fx.Node]) -> None:
    with graph.inserting_after(region.inside[-1]):
        held = graph.get_attr(name)
    with graph.inserting_after(held):
        at = call = graph.call_function(INVOKE, (held, name, *(now.get(n, n) for n in region.given)))
    call.meta = {"nn_module_stack": _shared_modules(region.inside)}
    if "stack_trace" in region.inside[0].meta:
        call.meta["stack_trace"] = region.inside[0].meta["stack_trace"]
    call.meta["val" if "val" in region.inside[0].meta else "example_value"] = tuple(map(_value_of, region.results))
    mine = set(region.inside)
    for i, node in enumerate(region.results):
        with graph.inserting_after(at):
            at = now[node] = graph.call_function(operator.getitem, (call, i))
        at.meta = dict(node.meta)
        node.replace_all_uses_with(at, delete_user_cb=lambda user: user not in mine)
    for node in reversed(region.inside):
        graph.erase_node(node)


def _shared_modules(nodes: Sequence[fx.Node]) -> dict[Any, Any]:
    """The modules in whose calls all of these nodes stand."""
    stacks = [list((n.meta.get("nn_module_stack") or {}).items()) for n in nodes]
    return dict(levels[0] for levels in itertools.takewhile(lambda same: len(set(same)) == 1, zip(*stacks, strict=False)))


def repeated_modules(graph: fx.GraphModule) -> list[list[Region]]:
    """Calls of modules in a graph of Dynamo's that do the same with other weights, as regions: the outermost ones that repeat.

    A region writes into nothing that it is given, and returns no view of it.
    """
    found: dict[Hashable, list[Region]] = {}
    groups = [[n for n in graph.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]]
    for depth in range(DEEPEST):
        kinds: dict[Hashable, list[Region]] = {}
        for inside in (calls for nodes in groups for calls in _module_calls(nodes, depth)):
            if len(inside) >= LEAST:
                region = region_of(inside)
                kinds.setdefault(region.kind, []).append(region)
        for kind, regions in kinds.items():
            if kind in found or (len(regions) > 1 and _is_pure(regions[0])):
                found.setdefault(kind, []).extend(regions)
        groups = [list(r.inside) for kind, regions in kinds.items() if kind not in found for r in regions]
    return list(found.values())


def _module_calls(nodes: Sequence[fx.Node], depth: int) -> list[list[fx.Node]]:
    """Neighbouring nodes that belong to one call of a module, that many modules deep."""
    calls: list[list[fx.Node]] = []
    before = None
    for node in nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).items())
        owner = stack[depth] if len(stack) > depth else None
        if owner is None or owner != before:
            calls.append([])
        if owner is not None:
            calls[-1].append(node)
        before = owner
    return calls


def _is_pure(region: Region) -> bool:
    """Whether a region is a function of what it is given: run once on fake values, it writes into none of them and returns no view."""
    if not region.takes_values or any(n.op == "call_module" or "autocast" in str(n.target) for n in region.inside):
        return False
    given = [_another(_value_of(n)) for n in region.given]
    tensors = [v for v in given if isinstance(v, torch.Tensor)]
    before = [v._version for v in tensors]
    # what the region makes itself, such as positions, must be fake as well
    mode = next((v.fake_mode for v in tensors if hasattr(v, "fake_mode")), contextlib.nullcontext())
    try:
        with torch.no_grad(), mode:
            results = _graph_of(region, {})(*given)
    except Exception:  # noqa: BLE001 - it cannot be run on its own, so it stays where it is
        return False
    if any(not isinstance(v, torch.Tensor) for v in results):
        return False
    held = [v.untyped_storage()._cdata for v in (*tensors, *results)]
    return [v._version for v in tensors] == before and len(set(held)) == len(held)


def _another(value: Any) -> Any:
    """Another fake tensor that is like this one, with memory of its own."""
    return value.new_empty_strided(value.shape, value.stride()) if isinstance(value, torch.Tensor) else value
