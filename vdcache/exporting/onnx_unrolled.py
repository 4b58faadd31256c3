"""The ONNX form `unrolled`: the whole loop as one graph without control flow, which calls each variant as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vdcache.exporting.fixed import ExportedFiles, Fixed
from vdcache.exporting.loops import TracedLoop
from vdcache.exporting.manifest import Graph, LoopSpec, ScheduledStep
from vdcache.exporting.onnx_loop import converted_loop
from vdcache.exporting.to_onnx import OPSET, WEIGHTS, content, converted, named, operators, save
from vdcache.exporting.weights import Weights

__all__ = ["write_unrolled"]

FUNCTIONS = "vdcache.variants"


def write_unrolled(what: Fixed, around: TracedLoop | None, folder: Path, on_progress: Callable[[str], None]) -> ExportedFiles:
    """The whole loop as one graph without control flow, which calls each variant as a function."""
    assert around is not None
    weights = Weights(folder / WEIGHTS)
    models = {}
    for variant in what.variants:
        on_progress(f"exporting {variant.plan}")
        models[variant.name] = converted(what, variant, weights)
    on_progress("unrolling the loop")
    main = converted_loop(around, weights)
    weights.flush()
    functions = {name: _Function(name, model) for name, model in models.items()}
    _unroll(main.graph, what, around.about, functions)
    used = {s.graph for s in what.steps}
    model = ir.Model(main.graph, ir_version=main.ir_version, functions=[f.function for n, f in functions.items() if n in used])
    model.graph.opset_imports.update({"": OPSET, FUNCTIONS: 1})
    save(model, folder / "loop.onnx")
    weights.close()
    inputs, results = (tuple(v.name for v in vs) for vs in (around.about.inputs, around.about.outputs))
    held = tuple(str(v.name) for v in model.graph.inputs)
    graph = Graph("loop", "loop.onnx", None, held, results, {}, {}, results, {}, {}, operators(model))
    assert set(held) <= set(inputs)
    steps = tuple(replace(s, graph="loop", numbers={}) for s in what.steps)
    return ExportedFiles((graph,), steps, WEIGHTS, around.about, OPSET)


class _Function:
    """A variant as an ONNX function: what it reads of the shared weights is given to it, since a function owns none.

    Args:
        model: becomes the function.
    """

    def __init__(self, name: str, model: ir.Model) -> None:
        graph = model.graph
        self.name = name
        self.weights = [v for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
        small = [v for v in graph.initializers.values() if v not in set(self.weights)]
        self.inputs = [str(v.name) for v in graph.inputs]
        self.outputs = [str(v.name) for v in graph.outputs]
        self.keys = [content(v) for v in self.weights]
        self.constants = [v.const_value for v in self.weights]
        for value in (*self.weights, *small):
            graph.initializers.pop(str(value.name))
        for value in self.weights:
            value.const_value = None
            graph.inputs.append(value)
        for value in small:
            tensor, value.const_value = value.const_value, None
            fresh = ir.Value(name=value.name, shape=value.shape, type=value.type)
            value.replace_all_uses_with(fresh)
            assert tensor is not None
            constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[fresh])
            nodes = list(graph)
            graph.insert_before(nodes[0], constant)
        graph.opset_imports.update({"": OPSET})
        self.function = ir.Function(FUNCTIONS, name, "", graph=graph, attributes=[])


def _unroll(main: ir.Graph, what: Fixed, loop: LoopSpec, functions: dict[str, _Function]) -> None:
    """Put calls of functions where the loop calls the model, each lane with caches of its own."""
    values = {str(v.name): v for v in (*main.inputs, *main.outputs)}
    shared: dict[str, ir.Value] = {}
    for value in main.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            shared[content(value)] = value
    numbers: dict[float, ir.Value] = {}
    caches: dict[tuple[int, str], ir.Value] = {}
    forms = {c.name: (c.shape, c.dtype) for c in what.caches}
    made: list[ir.Node] = []
    for number, call in enumerate(loop.calls):
        step: ScheduledStep = what.steps[call.step]
        function = functions[step.graph]
        given: list[ir.Value] = []
        for name in function.inputs:
            if name in call.inputs:
                given.append(values[call.inputs[name]])
            elif name in forms:
                given.append(_cache_of(caches, (call.lane, name), forms[name], made, main))
            else:
                given.append(_number(numbers, step.numbers[name], main))
        for key, tensor in zip(function.keys, function.constants, strict=True):
            given.append(_shared(shared, key, tensor, main))
        outs = []
        for name in function.outputs:
            cache = name.removeprefix("new_")
            if name.startswith("new_") and cache in forms:
                fresh = named(f"call_{number}_{name}", *forms[cache])
                caches[call.lane, cache] = fresh
                outs.append(fresh)
            else:
                at = [v.name for v in what.outputs].index(name)
                old = values[call.outputs[at]]
                form = what.outputs[at]
                fresh = named(str(old.name), form.shape, form.dtype)
                old.replace_all_uses_with(fresh)
                main.inputs.remove(old)
                outs.append(fresh)
        made.append(ir.Node(FUNCTIONS, function.name, given, outputs=outs, name=f"call_{number}"))
    main.extend(made)
    main.sort()
    results = {v.name for v in loop.outputs}
    kept = [v for v in main.outputs if v.name in results]
    main.outputs.clear()
    main.outputs.extend(kept)
    for value in [v for v in main.inputs if not v.uses()]:
        main.inputs.remove(value)


def _cache_of(
    caches: dict[tuple[int, str], ir.Value],
    key: tuple[int, str],
    form: tuple[tuple[int, ...], str],
    made: list[ir.Node],
    main: ir.Graph,
) -> ir.Value:
    """What a lane's cache holds now: zeros before anything was kept."""
    if key not in caches:
        shape = ir.Value(name=f"shape_{key[1]}_{key[0]}", const_value=ir.tensor(np.asarray(form[0], np.int64)))
        shape.shape, shape.type = ir.Shape([len(form[0])]), ir.TensorType(ir.DataType.INT64)
        main.register_initializer(shape)
        zeros = named(f"zeros_{key[1]}_{key[0]}", *form)
        zero = ir.AttrTensor("value", ir.tensor(np.zeros(1, form[1])))
        made.append(ir.Node("", "ConstantOfShape", [shape], [zero], outputs=[zeros]))
        caches[key] = zeros
    return caches[key]


def _number(numbers: dict[float, ir.Value], value: float, main: ir.Graph) -> ir.Value:
    if value not in numbers:
        found = named(f"number_{len(numbers)}", (), "float32")
        found.const_value = ir.tensor(np.asarray(value, np.float32))
        main.register_initializer(found)
        numbers[value] = found
    return numbers[value]


def _shared(shared: dict[str, ir.Value], key: str, tensor: ir.TensorProtocol | None, main: ir.Graph) -> ir.Value:
    if key not in shared:
        assert tensor is not None
        found = ir.Value(
            name=f"weight_{len(shared)}", shape=ir.Shape(tuple(tensor.shape.numpy())), type=ir.TensorType(tensor.dtype)
        )
        found.const_value = tensor
        main.register_initializer(found)
        shared[key] = found
    return shared[key]
