"""The ONNX form `single`: one graph that takes the number of a plan, and computes that alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vdcache.exporting.fixed import PLAN, ExportedFiles, Fixed, FixedVariant
from vdcache.exporting.loops import TracedLoop
from vdcache.exporting.manifest import Graph
from vdcache.exporting.onnx_loop import write_stages
from vdcache.exporting.to_onnx import OPSET, WEIGHTS, content, converted, named, operators, save
from vdcache.exporting.weights import Weights

__all__ = ["write_single"]


def write_single(what: Fixed, around: TracedLoop | None, folder: Path, on_progress: Callable[[str], None]) -> ExportedFiles:
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
    loop = write_stages(around, weights, folder, on_progress)
    weights.close()
    numbers = [n for n in graph.numbers if n != PLAN]
    order = {v.name: float(i) for i, v in enumerate(what.variants)}
    steps = tuple(
        replace(s, graph=graph.name, numbers={PLAN: order[s.graph], **{n: s.numbers.get(n, 0.0) for n in numbers}})
        for s in what.steps
    )
    return ExportedFiles((graph,), steps, WEIGHTS, loop, OPSET)


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
    graph = _nested(branches, plan[PLAN], results)
    graph.inputs.extend(v for v in given.values() if v.uses())
    for value in initializers.values():
        graph.register_initializer(value)
    held = [str(v.name) for v in graph.inputs]
    for value, (name, _, _) in zip(graph.outputs, results, strict=True):
        value.name = name
    graph.name = "single"
    model = ir.Model(graph, ir_version=models[0].ir_version)
    return model, _about(what, model, held, caches, numbers)


def _about(
    what: Fixed, model: ir.Model, held: list[str], caches: Mapping[str, ir.Value], numbers: Mapping[str, ir.Value]
) -> Graph:
    """What the manifest says of the graph, whose inputs are `held`."""
    return Graph(
        name="single",
        file="single.onnx",
        plan=None,
        inputs=tuple(held),
        outputs=(*(v.name for v in what.outputs), *(f"new_{c.name}" for c in what.caches)),
        reads={n: n for n in held if n in caches},
        writes={f"new_{c.name}": c.name for c in what.caches},
        results=tuple(v.name for v in what.outputs),
        numbers={n: "int64" if n == PLAN else "float32" for n in held if n in numbers or n == PLAN},
        operators=operators(model),
    )


def _nested(branches: Sequence[ir.Graph], plan: ir.Value, results: Sequence[tuple[str, tuple[int, ...], str]]) -> ir.Graph:
    """The branch of the plan's number, by one `If` inside the other."""
    body = branches[-1]
    for i in reversed(range(len(branches) - 1)):
        number = ir.Value(name=f"vdcache_number_{i}", shape=ir.Shape(()), type=ir.TensorType(ir.DataType.INT64))
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.asarray(i, np.int64)))], outputs=[number])
        same = ir.Node("", "Equal", [plan, number], outputs=[named(f"vdcache_is_{i}", (), "bool")])
        outs = [named(n if not i else f"vdcache_else_{i}_{n}", shape, dtype) for n, shape, dtype in results]
        attributes = [ir.AttrGraph("then_branch", branches[i]), ir.AttrGraph("else_branch", body)]
        choice = ir.Node("", "If", [same.outputs[0]], attributes, outputs=outs)
        body = ir.Graph([], outs, nodes=[constant, same, choice], opset_imports={"": OPSET}, name=f"plans_from_{i}")
    return body


def _branch(
    what: Fixed,
    variant: FixedVariant,
    model: ir.Model,
    prefix: str,
    given: dict[str, ir.Value],
    initializers: dict[str, ir.Value],
) -> ir.Graph:
    """A variant as a branch: no inputs of its own, and every cache returned, a copy of the old one where it writes none."""
    graph = model.graph
    for value in list(graph.inputs):
        value.replace_all_uses_with(given[str(value.name)])
    graph.inputs.clear()
    for value in list(graph.initializers.values()):
        graph.initializers.pop(str(value.name))
        known = initializers.setdefault(content(value), value)
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
            same = named(f"{prefix}old_{cache.name}", cache.shape, cache.dtype)
            graph.append(ir.Node("", "Identity", [given[cache.name]], outputs=[same]))
            written[cache.name] = same
        results.append(written[cache.name])
    graph.outputs.clear()
    graph.outputs.extend(results)
    graph.name = f"{prefix}{variant.name}"
    return graph


def _values(forms: Iterable[tuple[str, Sequence[int], str]]) -> dict[str, ir.Value]:
    return {name: named(name, shape, dtype) for name, shape, dtype in forms}
