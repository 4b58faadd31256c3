"""From a pure graph to ONNX: weights by reference into one shared file, standard operators, static shapes.

The exporter sees weights as inputs, so it folds none of them into new ones. Transposed weights are then stored as they are used, which
leaves nothing for a runtime to copy, and all constants of some size go into the shared file.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx

from vdcache.errors import CaptureError, ConfigError
from vdcache.exporting.fixed import Fixed, FixedVariant
from vdcache.exporting.manifest import Graph
from vdcache.exporting.weights import Weights
from vdcache.ir.capture import last_line

__all__ = [
    "OPSET",
    "WEIGHTS",
    "content",
    "convert",
    "converted",
    "keep_outside",
    "named",
    "operators",
    "own",
    "save",
    "variant_graph",
]

OPSET = 20
WEIGHTS = "weights.bin"
SMALL = 1024  # bytes: shapes, axes and the like stay in the graph


def convert(graph: fx.GraphModule, examples: Sequence[Any], inputs: Sequence[str], results: Sequence[str]) -> ir.Model:
    """A graph of ATen operations as ONNX, its inputs and outputs named.

    Raises:
        CaptureError: an operation that has no ONNX form, or does not follow from a static graph.
    """
    if given := next((n for n in graph.graph.find_nodes(op="placeholder") if _is_complex(n)), None):
        raise _no_complex(inputs[list(graph.graph.find_nodes(op="placeholder")).index(given)], given)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(graph, tuple(examples), strict=False)
            found: Any = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    except Exception as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        if used := next((n for n in graph.graph.nodes if _is_complex(n)), None):
            raise _no_complex(used.name, used) from error
        raise CaptureError(f"the graph has no ONNX form: {type(error).__name__}: {reason}") from error
    model: ir.Model = found.model
    if len(model.graph.inputs) != len(inputs) or len(model.graph.outputs) != len(results):
        raise CaptureError(
            f"ONNX has {len(model.graph.inputs)} inputs and {len(model.graph.outputs)} outputs, the graph {len(inputs)} and {len(results)}"
        )
    _strip(model.graph)
    model.metadata_props.clear()
    _choose_truths(model.graph)
    taken = {v.name for n in model.graph for v in n.outputs} | set(model.graph.initializers)
    for value in (*model.graph.inputs, *model.graph.outputs):
        taken.discard(value.name)
    if clash := taken & {*inputs, *results}:
        _rename(model.graph, clash)
    for value, name in (*zip(model.graph.inputs, inputs, strict=True), *zip(model.graph.outputs, results, strict=True)):
        value.name = name
    return model


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _no_complex(name: str, node: fx.Node) -> CaptureError:
    line = last_line(str(node.meta.get("stack_trace", "")))
    return CaptureError(
        f"the model computes with complex numbers ('{name}'{f', at {line}' if line else ''}), which ONNX does not have: give rotary tables as "
        "cosines and sines, or export as format='pt2' or 'aoti'"
    )


def converted(fixed: Fixed, variant: FixedVariant, weights: Weights) -> ir.Model:
    """A variant as ONNX: weights are initializers that lie in the shared file."""
    for (kind, name), node in zip(variant.roles, variant.graph.graph.find_nodes(op="placeholder"), strict=True):
        if kind == "weight" and _is_complex(node):
            raise _no_complex(fixed.whole.captured.signature.names[name], node)
    names = [str(name) if kind != "weight" else f"weight_{name}" for kind, name in variant.roles]
    outs = [*(v.name for v in fixed.outputs), *(f"new_{name}" for name in variant.writes)]
    model = convert(variant.graph, fixed.example(variant), names, outs)
    owned = {f"weight_{position}": fixed.whole.state[position] for kind, position in variant.roles if kind == "weight"}
    for value in [v for v in model.graph.inputs if v.name in owned]:
        own(model.graph, value, owned[str(value.name)], weights)
    keep_outside(model.graph, weights)
    return model


def own(graph: ir.Graph, value: ir.Value, tensor: Tensor, weights: Weights) -> None:
    """Turn an input into an initializer in the shared file, and transpose it for those that read it transposed."""
    array = _array(str(value.name), tensor)
    graph.inputs.remove(value)
    orders: dict[tuple[int, ...], ir.Value] = {}
    for node in [n for n, _ in value.uses() if n.op_type == "Transpose" and n.domain == ""]:
        order = tuple(node.attributes["perm"].as_ints())
        if order not in orders:
            turned = array.transpose(order)
            name = f"{value.name}_{''.join(map(str, order))}"
            orders[order] = ir.Value(name=name, shape=ir.Shape(turned.shape), type=value.type)
            _outside(graph, orders[order], turned, weights)
        node.outputs[0].replace_all_uses_with(orders[order])
        graph.remove(node, safe=True)
    if value.uses():
        _outside(graph, value, array, weights)


def _outside(graph: ir.Graph, value: ir.Value, array: np.ndarray, weights: Weights) -> None:
    offset, length = weights.add(array)
    kind = value.dtype if value.dtype is not None else ir.DataType.from_numpy(array.dtype)
    value.const_value = ir.ExternalTensor(
        weights.path.name,
        offset,
        length,
        kind,
        shape=ir.Shape(array.shape),
        name=str(value.name),
        base_dir=str(weights.path.parent),
    )
    graph.register_initializer(value)


def keep_outside(graph: ir.Graph, weights: Weights) -> None:
    """Constants of some size go into the shared file as well: masks, tables of positions."""
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes > SMALL:
            _outside(graph, value, tensor.numpy(), weights)


def _array(name: str, tensor: Tensor) -> np.ndarray:
    try:
        return tensor.detach().cpu().numpy()
    except TypeError as error:
        raise ConfigError(
            f"{name} is {tensor.dtype}, which numpy does not have: export the model in float32 or float16 (model.float())"
        ) from error


def variant_graph(fixed: Fixed, variant: FixedVariant, model: ir.Model, file: str) -> Graph:
    """What the manifest says of a variant's graph."""
    roles = {str(name): kind for kind, name in variant.roles if kind != "weight"}
    inputs = tuple(str(v.name) for v in model.graph.inputs)
    return Graph(
        name=variant.name,
        file=file,
        plan=tuple(sorted(variant.plan.reuse)),
        inputs=inputs,
        outputs=tuple(str(v.name) for v in model.graph.outputs),
        reads={n: n for n in inputs if roles[n] == "cache"},
        writes={f"new_{name}": name for name in variant.writes},
        results=tuple(v.name for v in fixed.outputs),
        numbers={n: "float32" for n in inputs if roles[n] == "number"},
        operators=operators(model),
    )


def operators(model: ir.Model) -> dict[str, int]:
    """How often each operator occurs: `Add`, or `domain::Name`. What a function holds counts once."""
    graphs = [model.graph, *(f.graph for f in model.functions.values())]
    found = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for g in graphs for n in g.all_nodes())
    return dict(sorted(found.items()))


def save(model: ir.Model, path: Path) -> None:
    """Write a model whose weights lie in the shared file, and check it with its shapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path)
    check_model(path)


def check_model(path: Path) -> None:
    """The checker and shape inference of ONNX.

    Raises:
        CaptureError: what they object to.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CaptureError(f"{path.name} is no valid ONNX: {error}") from error


def _strip(graph: ir.Graph) -> None:
    """Drop what says where a node came from: it is most of the file."""
    graph.metadata_props.clear()
    graph.doc_string = None
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _choose_truths(graph: ir.Graph) -> None:
    """`Where` between truth values as `And` and `Or`: onnxruntime has no kernel for it."""
    for node in [n for n in graph.all_nodes() if n.op_type == "Where" and n.outputs[0].dtype == ir.DataType.BOOL]:
        test, yes, no = node.inputs
        out = node.outputs[0]
        values = [ir.Value(name=f"{out.name}_{n}", type=out.type) for n in ("yes", "other", "no")]
        made = [
            ir.Node("", "And", [test, yes], outputs=[values[0]]),
            ir.Node("", "Not", [test], outputs=[values[1]]),
            ir.Node("", "And", [values[1], no], outputs=[values[2]]),
            ir.Node("", "Or", [values[0], values[2]], outputs=[ir.Value(name=out.name, shape=out.shape, type=out.type)]),
        ]
        ir.convenience.replace_nodes_and_values(graph, node, [node], made, [out], [made[-1].outputs[0]])


def _rename(graph: ir.Graph, names: set[Any]) -> None:
    for node in graph:
        for value in node.outputs:
            if value.name in names and not value.is_graph_output():
                value.name = f"{value.name}_inner"
    for value in [v for v in graph.initializers.values() if v.name in names]:
        graph.initializers.pop(str(value.name))
        value.name = f"{value.name}_inner"
        graph.register_initializer(value)


def named(name: str, shape: Sequence[int], dtype: str) -> ir.Value:
    """A typed value; `dtype` is numpy's name."""
    kind = ir.DataType.BOOL if dtype == "bool" else ir.DataType.from_numpy(np.dtype(dtype))
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))


def content(value: ir.Value) -> str:
    """What tells initializers apart: the place in the shared file, or the numbers."""
    tensor = value.const_value
    assert tensor is not None
    place = f"{tensor.offset}" if isinstance(tensor, ir.ExternalTensor) else tensor.tobytes().hex()
    return f"{place} {tensor.dtype} {tensor.shape}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of every library that it does not find."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
