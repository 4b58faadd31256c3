"""The three ONNX forms: a graph for every plan, one graph with the plan as an input, the whole loop as one graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vdcache.exporting.fixed import PLAN, Fixed, Variant, Written
from vdcache.exporting.loops import TracedLoop
from vdcache.exporting.manifest import Graph, Loop, Stage, Step
from vdcache.exporting.to_onnx import OPSET, convert, converted, keep_outside, operators, own, save, variant_graph
from vdcache.exporting.weights import Weights

__all__ = ["write_plans", "write_single", "write_unrolled"]

WEIGHTS = "weights.bin"
FUNCTIONS = "vdcache.variants"

Progress = Callable[[str], None]


def write_plans(what: Fixed, around: TracedLoop | None, folder: Path, on_progress: Progress) -> Written:
    """A graph for every distinct plan."""
    weights = Weights(folder / WEIGHTS)
    graphs = []
    for variant in what.variants:
        on_progress(f"exporting {variant.plan}")
        model = converted(what, variant, weights)
        weights.flush()
        save(model, folder / f"{variant.name}.onnx")
        graphs.append(variant_graph(what, variant, model, f"{variant.name}.onnx"))
    loop = _stages(around, weights, folder, on_progress)
    weights.close()
    return Written(tuple(graphs), what.steps, WEIGHTS, loop, OPSET)


def write_single(what: Fixed, around: TracedLoop | None, folder: Path, on_progress: Progress) -> Written:
    """One graph that takes the number of a plan and computes that alone: every branch returns the results and every cache."""
    weights = Weights(folder / WEIGHTS)
    models = []
    for variant in what.variants:
        on_progress(f"exporting {variant.plan}")
        models.append(converted(what, variant, weights))
    on_progress("joining the plans")
    weights.flush()
    model, graph = _joined(what, models)
    save(model, folder / graph.file)
    loop = _stages(around, weights, folder, on_progress)
    weights.close()
    numbers = [n for n in graph.numbers if n != PLAN]
    order = {v.name: float(i) for i, v in enumerate(what.variants)}
    steps = tuple(
        replace(s, graph=graph.name, numbers={PLAN: order[s.graph], **{n: s.numbers.get(n, 0.0) for n in numbers}})
        for s in what.steps
    )
    return Written((graph,), steps, WEIGHTS, loop, OPSET)


def write_unrolled(what: Fixed, around: TracedLoop | None, folder: Path, on_progress: Progress) -> Written:
    """The whole loop as one graph without control flow, which calls each variant as a function."""
    assert around is not None
    weights = Weights(folder / WEIGHTS)
    models = {}
    for variant in what.variants:
        on_progress(f"exporting {variant.plan}")
        models[variant.name] = converted(what, variant, weights)
    on_progress("unrolling the loop")
    main = _converted_loop(around, weights)
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
    return Written((graph,), steps, WEIGHTS, around.about, OPSET)


# ---- one graph with the plan as an input ---------------------------------------------------------------------------------


def _joined(what: Fixed, models: Sequence[ir.Model]) -> tuple[ir.Model, Graph]:
    """Plan 0 or, else, plan 1 or, else, …: nested `If`. Branches read the inputs and weights of the graph around them."""
    first = _values((v.name, v.shape, v.dtype) for v in what.inputs)
    caches = _values((c.name, c.shape, c.dtype) for c in what.caches)
    names = sorted({str(n) for v in what.variants for kind, n in v.roles if kind == "number"})
    numbers = _values((n, (), "float32") for n in names)
    plan = _values([(PLAN, (), "int64")])
    given = first | caches | numbers | plan
    initializers: dict[str, ir.Value] = {}
    branches = [
        _branch(what, v, m, f"p{i}_", given, initializers) for i, (v, m) in enumerate(zip(what.variants, models, strict=True))
    ]
    results = [(v.name, v.shape, v.dtype) for v in what.outputs] + [(f"new_{c.name}", c.shape, c.dtype) for c in what.caches]
    body = branches[-1]
    for i in reversed(range(len(branches) - 1)):
        number = ir.Value(name=f"vdcache_number_{i}", shape=ir.Shape(()), type=ir.TensorType(ir.DataType.INT64))
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.asarray(i, np.int64)))], outputs=[number])
        same = ir.Node("", "Equal", [plan[PLAN], number], outputs=[_named(f"vdcache_is_{i}", (), "bool")])
        outs = [_named(n if not i else f"vdcache_else_{i}_{n}", shape, dtype) for n, shape, dtype in results]
        attributes = [ir.AttrGraph("then_branch", branches[i]), ir.AttrGraph("else_branch", body)]
        choice = ir.Node("", "If", [same.outputs[0]], attributes, outputs=outs)
        body = ir.Graph([], outs, nodes=[constant, same, choice], opset_imports={"": OPSET}, name=f"plans_from_{i}")
    graph = body
    graph.inputs.extend(v for v in given.values() if v.uses())
    for value in initializers.values():
        graph.register_initializer(value)
    held = [str(v.name) for v in graph.inputs]
    for value, (name, _, _) in zip(graph.outputs, results, strict=True):
        value.name = name
    graph.name = "single"
    model = ir.Model(graph, ir_version=models[0].ir_version)
    about = Graph(
        name="single",
        file="single.onnx",
        plan=None,
        inputs=tuple(held),
        outputs=tuple(n for n, _, _ in results),
        reads={n: n for n in held if n in caches},
        writes={f"new_{c.name}": c.name for c in what.caches},
        results=tuple(v.name for v in what.outputs),
        numbers={n: "int64" if n == PLAN else "float32" for n in held if n in numbers or n == PLAN},
        operators=operators(model),
    )
    return model, about


def _branch(
    what: Fixed, variant: Variant, model: ir.Model, prefix: str, given: dict[str, ir.Value], initializers: dict[str, ir.Value]
) -> ir.Graph:
    """A variant as a branch: no inputs of its own, and every cache returned, a copy of the old one where it writes none."""
    graph = model.graph
    for value in list(graph.inputs):
        value.replace_all_uses_with(given[str(value.name)])
    graph.inputs.clear()
    for value in list(graph.initializers.values()):
        graph.initializers.pop(str(value.name))
        known = initializers.setdefault(_content(value), value)
        if known is value:
            value.name = f"constant_{len(initializers)}"
        else:
            value.replace_all_uses_with(known)
    for node in graph.all_nodes():
        node.name = f"{prefix}{node.name}"
        for value in node.outputs:
            value.name = f"{prefix}{value.name}"
    written = dict(zip(variant.writes, graph.outputs[variant.results :], strict=True))
    results = list(graph.outputs[: variant.results])
    for cache in what.caches:
        if cache.name not in written:
            same = _named(f"{prefix}old_{cache.name}", cache.shape, cache.dtype)
            graph.append(ir.Node("", "Identity", [given[cache.name]], outputs=[same]))
            written[cache.name] = same
        results.append(written[cache.name])
    graph.outputs.clear()
    graph.outputs.extend(results)
    graph.name = f"{prefix}{variant.name}"
    return graph


def _content(value: ir.Value) -> str:
    """What tells initializers apart: the place in the shared file, or the numbers."""
    tensor = value.const_value
    assert tensor is not None
    place = f"{tensor.offset}" if isinstance(tensor, ir.ExternalTensor) else tensor.tobytes().hex()
    return f"{place} {tensor.dtype} {tensor.shape}"


# ---- the loop around the model --------------------------------------------------------------------------------------------


def _converted_loop(around: TracedLoop, weights: Weights) -> ir.Model:
    constants = [f"constant_{i}" for i in range(len(around.constants))]
    model = convert(around.graph, (*around.constants, *around.examples), (*constants, *around.inputs), around.outputs)
    owned = dict(zip(constants, around.constants, strict=True))
    for value in [v for v in model.graph.inputs if v.name in owned]:
        own(model.graph, value, owned[str(value.name)], weights)
    keep_outside(model.graph, weights)
    return model


def _stages(around: TracedLoop | None, weights: Weights, folder: Path, on_progress: Progress) -> Loop | None:
    """The loop in pieces, each what can be computed before the next call of the model."""
    if around is None:
        return None
    on_progress("exporting the loop")
    model = _converted_loop(around, weights)
    weights.flush()
    graph = model.graph
    loop = around.about
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
    last: Counter[ir.Value] = Counter()  # the latest stage that reads a value
    for at, nodes in enumerate(pieces):
        for node in nodes:
            for value in _read(node):
                last[value] = max(last[value], at)
    leave = set(graph.outputs)
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
        stages.append((Stage(file, *names), begins, constants, ends, nodes))
    for stage, begins, constants, ends, nodes in stages:
        if stage.file is not None:
            save(_piece(model, begins, constants, ends, nodes), folder / stage.file)
    return replace(loop, stages=tuple(s[0] for s in stages))


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
        self.keys = [_content(v) for v in self.weights]
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


def _unroll(main: ir.Graph, what: Fixed, loop: Loop, functions: dict[str, _Function]) -> None:
    """Put calls of functions where the loop calls the model, each lane with caches of its own."""
    values = {str(v.name): v for v in (*main.inputs, *main.outputs)}
    shared: dict[str, ir.Value] = {}
    for value in main.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            shared[_content(value)] = value
    numbers: dict[float, ir.Value] = {}
    caches: dict[tuple[int, str], ir.Value] = {}
    forms = {c.name: (c.shape, c.dtype) for c in what.caches}
    made: list[ir.Node] = []
    for number, call in enumerate(loop.calls):
        step: Step = what.steps[call.step]
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
                fresh = _named(f"call_{number}_{name}", *forms[cache])
                caches[call.lane, cache] = fresh
                outs.append(fresh)
            else:
                at = [v.name for v in what.outputs].index(name)
                old = values[call.outputs[at]]
                form = what.outputs[at]
                fresh = _named(str(old.name), form.shape, form.dtype)
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
        zeros = _named(f"zeros_{key[1]}_{key[0]}", *form)
        zero = ir.AttrTensor("value", ir.tensor(np.zeros(1, form[1])))
        made.append(ir.Node("", "ConstantOfShape", [shape], [zero], outputs=[zeros]))
        caches[key] = zeros
    return caches[key]


def _number(numbers: dict[float, ir.Value], value: float, main: ir.Graph) -> ir.Value:
    if value not in numbers:
        found = _named(f"number_{len(numbers)}", (), "float32")
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


def _named(name: str, shape: Sequence[int], dtype: str) -> ir.Value:
    kind = ir.DataType.BOOL if dtype == "bool" else ir.DataType.from_numpy(np.dtype(dtype))
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))


def _values(forms: Iterable[tuple[str, Sequence[int], str]]) -> dict[str, ir.Value]:
    return {name: _named(name, shape, dtype) for name, shape, dtype in forms}
