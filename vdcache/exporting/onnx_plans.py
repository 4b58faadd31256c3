"""The ONNX form `plans`: a graph for every distinct plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vdcache.exporting.fixed import ExportedFiles, Fixed
from vdcache.exporting.loops import TracedLoop
from vdcache.exporting.onnx_loop import write_stages
from vdcache.exporting.to_onnx import OPSET, WEIGHTS, converted, save, variant_graph
from vdcache.exporting.weights import Weights

__all__ = ["write_plans"]


def write_plans(what: Fixed, around: TracedLoop | None, folder: Path, on_progress: Callable[[str], None]) -> ExportedFiles:
    """A graph for every distinct plan."""
    weights = Weights(folder / WEIGHTS)
    graphs = []
    for variant in what.variants:
        on_progress(f"exporting {variant.plan}")
        model = converted(what, variant, weights)
        weights.flush()
        save(model, folder / f"{variant.name}.onnx")
        graphs.append(variant_graph(what, variant, model, f"{variant.name}.onnx"))
    loop = write_stages(around, weights, folder, on_progress)
    weights.close()
    return ExportedFiles(tuple(graphs), what.steps, WEIGHTS, loop, OPSET)
