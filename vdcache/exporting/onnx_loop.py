"""The denoising loop around the model as ONNX: one graph that is cut at the model's calls, or a stage for each of its pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from vdcache.exporting.loops import TracedLoop
from vdcache.exporting.manifest import LoopSpec, LoopStage
from vdcache.exporting.to_onnx import OPSET, convert, keep_outside, own, save
from vdcache.exporting.weights import Weights

__all__ = ["converted_loop", "write_stages"]


def converted_loop(around: TracedLoop, weights: Weights) -> ir.Model:
    """The loop as ONNX, the model left out."""
    constants = [f"constant_{i}" for i in range(len(around.constants))]
    model = convert(around.graph, (*around.constants, *around.examples), (*constants, *around.inputs), around.outputs)
    owned = dict(zip(constants, around.constants, strict=True))
    for value in [v for v in model.graph.inputs if v.name in owned]:
        own(model.graph, value, owned[str(value.name)], weights)
    keep_outside(model.graph, weights)
    return model


def write_stages(
    around: TracedLoop | None, weights: Weights, folder: Path, on_progress: Callable[[str], None]
) -> LoopSpec | None:
    """The loop in pieces, each what can be computed before the next call of the model."""
    if around is None:
        return None
    on_progress("exporting the loop")
    model = converted_loop(around, weights)
    weights.flush()
    pieces = _pieces(model.graph, around.about)
    last = _last_readers(pieces)
    leave = set(model.graph.outputs)
    stages = []
    for at, nodes in enumerate(pieces):
        made = [v for n in nodes for v in n.outputs]
        ends = [v for v in made if v in leave or last[v] > at]
        own_values = set(made)
        read = dict.fromkeys(v for n in nodes for v in _read(n) if v not in own_values)
        begins = [v for v in read if not v.is_initializer()]
        constants = [v for v in read if v.is_initializer()]
        names = [tuple(str(v.name) for v in vs) for vs in (begins, ends)]
        file = f"loop_{at:03d}.onnx" if nodes else None
        stages.append(LoopStage(file, *names))
        if file is not None:
            save(_piece(model, begins, constants, ends, nodes), folder / file)
    return replace(around.about, stages=tuple(stages))


def _pieces(graph: ir.Graph, loop: LoopSpec) -> list[list[ir.Node]]:
    """The nodes of every stage: each is computed as early as can be, a constant before the first call that is given it."""
    stage_of: dict[ir.Value, int] = {}
    came = {name: number + 1 for number, call in enumerate(loop.calls) for name in call.outputs}
    for value in graph.inputs:
        stage_of[value] = came.get(str(value.name), 0)
    pieces: list[list[ir.Node]] = [[] for _ in range(len(loop.calls) + 1)]
    wanted = {name: at for at, call in reversed(list(enumerate(loop.calls))) for name in call.inputs.values()}
    fixed_at = {_computed(graph, v): wanted.get(str(v.name), 0) for v in list(graph.outputs) if v.is_initializer()}
    for node in graph:
        at = fixed_at[node] if node in fixed_at else max((stage_of.get(v, 0) for v in _read(node)), default=0)
        pieces[at].append(node)
        stage_of.update(dict.fromkeys(node.outputs, at))
    return pieces


def _last_readers(pieces: Sequence[Sequence[ir.Node]]) -> Counter[ir.Value]:
    """The latest stage that reads a value."""
    last: Counter[ir.Value] = Counter()
    for at, nodes in enumerate(pieces):
        for node in nodes:
            for value in _read(node):
                last[value] = max(last[value], at)
    return last


def _computed(graph: ir.Graph, value: ir.Value) -> ir.Node:
    """A constant that is returned, as the output of a node: every stage returns what it has computed."""
    constant = ir.Value(name=f"{value.name}_constant", shape=value.shape, type=value.type, const_value=value.const_value)
    result = ir.Value(name=value.name, shape=value.shape, type=value.type)
    graph.initializers.pop(str(value.name))
    for at, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[at] = result
    value.replace_all_uses_with(constant)
    graph.register_initializer(constant)
    node = ir.Node("", "Identity", [constant], outputs=[result])
    graph.append(node)
    return node


def _read(node: ir.Node) -> list[ir.Value]:
    """What a node reads, inside its branches as well."""
    found = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = list(attribute.as_graph().all_nodes())
            own_values = {v for n in inner for v in n.outputs}
            found += [v for n in inner for v in n.inputs if v is not None and v not in own_values]
    return found


def _piece(
    model: ir.Model,
    begins: Sequence[ir.Value],
    constants: Sequence[ir.Value],
    ends: Sequence[ir.Value],
    nodes: Sequence[ir.Node],
) -> ir.Model:
    """Some nodes as a model of their own; the whole is left as it is."""
    copies: dict[ir.Value, ir.Value] = {v: ir.Value(name=v.name, shape=v.shape, type=v.type) for v in (*begins, *constants)}
    for value in constants:
        copies[value].const_value = value.const_value
    made = []
    for node in nodes:
        outs = [ir.Value(name=v.name, shape=v.shape, type=v.type) for v in node.outputs]
        copies.update(zip(node.outputs, outs, strict=True))
        given = [None if v is None else copies[v] for v in node.inputs]
        made.append(ir.Node(node.domain, node.op_type, given, list(node.attributes.values()), outputs=outs, name=node.name))
    graph = ir.Graph(
        [copies[v] for v in begins],
        [copies[v] for v in ends],
        nodes=made,
        initializers=[copies[v] for v in constants],
        opset_imports={"": OPSET},
        name="stage",
    )
    return ir.Model(graph, ir_version=model.ir_version)
