"""A look into an unrolled loop: what each call of the model was given and returned. For verifying; needs onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from vdcache.exporting.manifest import Manifest

__all__ = ["calls_of"]

PassRun = tuple[int, int, dict[str, np.ndarray], list[np.ndarray]]


def calls_of(path: Path, manifest: Manifest, inputs: Mapping[str, np.ndarray]) -> list[PassRun]:
    """Run the loop with the values around each call as further outputs: step, lane, inputs and results of every call."""
    assert manifest.loop is not None
    graph = manifest.graphs[0]
    model = onnx.load(path / graph.file, load_external_data=False)
    constants = {i.name: i for i in model.graph.initializer}
    given = {v.name for v in model.graph.input}
    named = [n for call in manifest.loop.calls for n in (*call.inputs.values(), *call.outputs)]
    asked = [n for n in named if n not in given and n not in constants]
    values = {**inputs, **_computed(model, asked, path, {n: inputs[n] for n in given})}
    for name in named:
        if name not in values:
            values[name] = onnx.numpy_helper.to_array(constants[name], str(path))
    return [
        (c.step, c.lane, {n: values[at] for n, at in c.inputs.items()}, [values[n] for n in c.outputs])
        for c in manifest.loop.calls
    ]


def _computed(model: onnx.ModelProto, asked: Sequence[str], path: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a model whose weights lie at `path`: its outputs by name, and the values inside it that are asked for."""
    there = {v.name for v in model.graph.output}
    computed = {n for node in model.graph.node for n in node.output}
    for name in dict.fromkeys(n for n in asked if n in computed and n not in there):
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.resolve()))
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, given), strict=True))
