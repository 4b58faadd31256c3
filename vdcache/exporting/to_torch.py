"""Packages for torch's own runtimes: exported programs (`pt2`), and AOTInductor's libraries for this machine (`aoti`).

Weights are inputs of every graph, so that no file holds any: they lie once in weights.safetensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vdcache.backends.inductor import package_ahead
from vdcache.errors import CaptureError, ConfigError
from vdcache.exporting.fixed import ExportedFiles, Fixed, FixedVariant
from vdcache.exporting.loops import TracedLoop
from vdcache.exporting.manifest import Graph, ScheduledStep
from vdcache.exporting.running import PackageRunner

__all__ = ["TorchRunner", "write_aoti", "write_pt2"]

WEIGHTS = "weights.safetensors"

Progress = Callable[[str], None]


def write_pt2(what: Fixed, around: TracedLoop | None, folder: Path, on_progress: Progress) -> ExportedFiles:
    """An exported program for every distinct plan."""

    def write(program: Any, path: Path) -> None:
        program.example_inputs = None  # else the weights would be saved with it
        torch.export.save(program, path)

    return _write(what, folder, on_progress, write, "exporting")


def write_aoti(what: Fixed, around: TracedLoop | None, folder: Path, on_progress: Progress) -> ExportedFiles:
    """A compiled library for every distinct plan."""
    return _write(what, folder, on_progress, package_ahead, "compiling")


def _write(
    what: Fixed,
    folder: Path,
    on_progress: Progress,
    write: Callable[[Any, Path], None],
    doing: str,
) -> ExportedFiles:
    if elsewhere := {v.device for v in (*what.examples, *what.whole.state.values()) if v.device.type != "cpu"}:
        raise ConfigError(f"pt2 and aoti packages are for the CPU, and the model is on {elsewhere.pop()}: export model.cpu()")
    graphs = []
    for variant in what.variants:
        on_progress(f"{doing} {variant.plan}")
        file = f"{variant.name}.pt2"
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                write(torch.export.export(variant.graph, what.example(variant), strict=False), folder / file)
        except Exception as error:
            raise CaptureError(f"the graph of {variant.plan} is refused: {type(error).__name__}: {error}") from error
        graphs.append(_graph(what, variant, file))
    on_progress("writing the weights")
    used = {name for graph in graphs for name in graph.weights.values()}
    state = {_weight(what, p): v.detach().contiguous() for p, v in what.whole.state.items() if _weight(what, p) in used}
    save_file(_apart(state), folder / WEIGHTS)
    return ExportedFiles(tuple(graphs), what.steps, WEIGHTS)


def _weight(what: Fixed, position: int) -> str:
    """The name of a weight in the shared file: that of the first with the same storage, so that tied weights lie there once."""
    state = what.whole.state
    own = state[position]
    same = (
        p for p, v in state.items() if v.data_ptr() == own.data_ptr() and v.shape == own.shape and v.stride() == own.stride()
    )
    return what.whole.captured.signature.names[min(same, default=position)]


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no storage, as safetensors needs them."""
    seen: set[int] = set()
    found = {}
    for name, value in state.items():
        found[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value
        seen.add(value.untyped_storage().data_ptr())
    return found


def _graph(what: Fixed, variant: FixedVariant, file: str) -> Graph:
    inputs = tuple(f"weight_{name}" if kind == "weight" else str(name) for kind, name in variant.roles)
    kinds = dict(zip(inputs, (kind for kind, _ in variant.roles), strict=True))
    results = tuple(v.name for v in what.outputs)
    return Graph(
        name=variant.name,
        file=file,
        plan=tuple(sorted(variant.plan.reuse)),
        inputs=inputs,
        outputs=(*results, *(f"new_{name}" for name in variant.writes)),
        reads={n: n for n in inputs if kinds[n] == "cache"},
        writes={f"new_{name}": name for name in variant.writes},
        results=results,
        numbers={n: "float32" for n in inputs if kinds[n] == "number"},
        weights={f"weight_{p}": _weight(what, p) for kind, p in variant.roles if kind == "weight"},
    )


class TorchRunner(PackageRunner):
    """A package of exported programs or AOTInductor libraries. The model's inputs may be tensors; results are arrays.

    Args:
        path: the package's folder.
        hashes: compare every file with its hash first. An AOTInductor library is machine code: run none that you do not trust.

    Raises:
        ConfigError: no package, one that was changed, or weights that are not those of its graphs.
    """

    kinds = ("pt2", "aoti")

    def __init__(self, path: str | Path, *, hashes: bool = True) -> None:
        super().__init__(path, hashes=hashes)
        # Copied, because a kernel may add up in another order where a tensor does not begin at a round address.
        state = {name: value.clone() for name, value in load_file(self.path / self.manifest.weights).items()}
        if lost := {n for g in self.manifest.graphs for n in g.weights.values()} - set(state):
            raise ConfigError(f"{self.path / self.manifest.weights} holds no {min(lost)!r}, which a graph reads")
        self._graphs: dict[str, Callable[..., Any]] = {}
        self._weights: dict[str, dict[str, Tensor]] = {}
        for graph in self.manifest.graphs:
            self._graphs[graph.name] = self._loaded(graph)
            self._weights[graph.name] = {n: state[w] for n, w in graph.weights.items()}

    def _loaded(self, graph: Graph) -> Callable[..., Any]:
        path = str(self.path / graph.file)
        if self.manifest.kind == "pt2":
            return torch.export.load(path).module()
        return torch._inductor.aoti_load_package(path)  # type: ignore[no-any-return]

    def _new_lane(self) -> dict[str, Tensor]:
        return {c.name: torch.zeros(c.shape, dtype=getattr(torch, c.dtype)) for c in self.manifest.caches}

    def _run(
        self, graph: Graph, step: ScheduledStep, given: Mapping[str, np.ndarray], lane: dict[str, Tensor]
    ) -> list[np.ndarray]:
        values: dict[str, Tensor] = {
            **self._weights[graph.name],
            **{n: torch.tensor(step.numbers[n], dtype=getattr(torch, kind)) for n, kind in graph.numbers.items()},
            **{n: lane[cache] for n, cache in graph.reads.items()},
        }
        with torch.no_grad():
            found = self._graphs[graph.name](*(values[n] if n in values else torch.from_numpy(given[n]) for n in graph.inputs))
        named = dict(zip(graph.outputs, found, strict=True))
        for name, cache in graph.writes.items():
            lane[cache] = named[name]
        return [named[name].numpy() for name in graph.results]

    def _stage(self, file: str, given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        raise ConfigError(f"{self.path} holds no loop")
