"""Runs an ONNX package with numpy and onnxruntime alone; torch need not be installed.

    from vdcache.runtime_onnx import OnnxRunner

    runner = OnnxRunner("package")
    video = runner.generate({"noise": noise, "text": text})["output_0"]

It is also the reference for runners in other languages: docs/package.md says what a package is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from vdcache.errors import ConfigError
from vdcache.exporting.manifest import Graph, ScheduledStep
from vdcache.exporting.running import PackageRunner

__all__ = ["OnnxRunner"]

DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}  # where cached tensors stay; else on the CPU


class OnnxRunner(PackageRunner):
    """A package of ONNX graphs. Cached tensors stay on the device: what a graph writes is bound to what the next one reads.

    Args:
        path: the package's folder.
        providers: execution providers of onnxruntime; the first one owns the cached tensors. Default: the CPU.
        threads: threads of onnxruntime within an operator. Default: onnxruntime decides.
        hashes: whether to compare every file with its hash first.

    Raises:
        ConfigError: there is no package at `path`, it was changed, or onnxruntime does not accept one of its graphs.
    """

    kinds = ("onnx",)

    def __init__(
        self,
        path: str | Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
        hashes: bool = True,
    ) -> None:
        super().__init__(path, hashes=hashes)
        self._providers, self._threads = list(providers), threads
        self._device = DEVICES.get(self._providers[0], "cpu")
        self._sessions: dict[str, ort.InferenceSession] = {}
        for graph in self.manifest.graphs:
            self._session(graph.file)

    def _session(self, file: str) -> ort.InferenceSession:
        if file not in self._sessions:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            if self._threads is not None:
                options.intra_op_num_threads = self._threads
            if self.manifest.form == "unrolled":  # else every step would hold its own packed copy of the weights
                options.add_session_config_entry("session.disable_prepacking", "1")
            try:
                session = ort.InferenceSession(str(self.path / file), options, providers=self._providers)
            except Exception as error:
                raise ConfigError(f"onnxruntime {ort.__version__} does not take {self.path / file}: {error}") from error
            self._agrees(file, session)
            self._sessions[file] = session
        return self._sessions[file]

    def _agrees(self, file: str, session: ort.InferenceSession) -> None:
        """The graph has the inputs that the manifest says, in these shapes."""
        graph = next((g for g in self.manifest.graphs if g.file == file), None)
        if graph is None or self.manifest.form == "unrolled":
            return
        shapes = {v.name: v.shape for v in self.manifest.inputs}
        of_caches = {c.name: c.shape for c in self.manifest.caches}
        shapes |= {name: of_caches[cache] for name, cache in graph.reads.items()} | dict.fromkeys(graph.numbers, ())
        found = {i.name: tuple(i.shape) for i in session.get_inputs()}
        if set(found) != set(graph.inputs):
            raise ConfigError(f"{self.path / file} takes {', '.join(found)}, and the manifest says {', '.join(graph.inputs)}")
        for name, shape in found.items():
            if shape != shapes[name]:
                raise ConfigError(
                    f"{self.path / file}: {name!r} has shape {list(shape)}, and the manifest says {list(shapes[name])}"
                )

    def _empty(self, shape: tuple[int, ...], dtype: str) -> ort.OrtValue:
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(dtype), self._device, 0)
        value.update_inplace(np.zeros(shape, dtype))
        return value

    def _new_lane(self) -> dict[str, ort.OrtValue]:
        return {c.name: self._empty(c.shape, c.dtype) for c in self.manifest.caches}

    def _run(
        self, graph: Graph, step: ScheduledStep, given: Mapping[str, np.ndarray], lane: dict[str, ort.OrtValue]
    ) -> list[np.ndarray]:
        session = self._session(graph.file)
        io = session.io_binding()
        for name in graph.inputs:
            if name in graph.reads:
                io.bind_ortvalue_input(name, lane[graph.reads[name]])
            elif name in graph.numbers:
                io.bind_cpu_input(name, np.asarray(step.numbers[name], graph.numbers[name]))
            else:
                io.bind_cpu_input(name, given[name])
        for name in graph.outputs:
            io.bind_output(name, self._device if name in graph.writes else "cpu")
        session.run_with_iobinding(io)
        found = dict(zip(graph.outputs, io.get_outputs(), strict=True))
        for name, cache in graph.writes.items():
            lane[cache] = found[name]
        return [found[name].numpy() for name in graph.results]

    def _stage(self, file: str, given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        found: list[Any] = self._session(file).run(None, dict(given))
        return found
