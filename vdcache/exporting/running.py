"""Running a package through its steps: what every runtime shares. Needs no torch."""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vdcache.errors import CacheStateError, ConfigError
from vdcache.exporting.manifest import Graph, Manifest, ScheduledStep, Value
from vdcache.policies.plan import Plan
from vdcache.runtime.history import History, Record

__all__ = ["PackageRunner"]


class PackageRunner(abc.ABC):
    """One package, ready to generate. Subclasses bring the runtime.

        runner.begin()
        for step in range(runner.num_steps):
            runner.step()
            (velocity,) = runner({"hidden_states": x, "timestep": t})

    Cached tensors stay where the runtime computes; only the model's inputs and results are numpy arrays. Each lane (a further
    call in the same step, as for guidance) has its own cached tensors.

    Args:
        path: the package's folder.
        hashes: whether to compare every file with its hash first.

    Raises:
        ConfigError: no package, one that was changed, or one of another kind.
    """

    kinds: tuple[str, ...] = ()

    def __init__(self, path: str | Path, *, hashes: bool = True) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path, hashes=hashes)
        if self.manifest.kind not in self.kinds:
            raise ConfigError(
                f"{self.path} is a package of kind {self.manifest.kind!r}, and {type(self).__name__} runs {' and '.join(self.kinds)}"
            )
        self.history = History()
        self._generation, self._step = -1, -1
        self._lanes: dict[int | str, Any] = {}
        self._done: dict[int | str, int] = {}  # the last step of each lane

    def __repr__(self) -> str:
        m = self.manifest
        computed = sum(not s.plan for s in m.steps)
        return f"<{type(self).__name__} {m.model}, {m.kind} {m.form}, {computed} of {len(m.steps)} steps computed>"

    @property
    def num_steps(self) -> int:
        """Denoising steps of a generation."""
        return len(self.manifest.steps)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cached tensors of one lane."""
        return sum(math.prod(c.shape) * np.dtype(c.dtype).itemsize for c in self.manifest.caches)

    # ---- what the runtime does ---------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _new_lane(self) -> Any:
        """The cached tensors of a lane, all zeros."""

    @abc.abstractmethod
    def _run(self, graph: Graph, step: ScheduledStep, given: Mapping[str, np.ndarray], lane: Any) -> list[np.ndarray]:
        """Run a graph: the model's results; what it writes is kept in the lane."""

    @abc.abstractmethod
    def _stage(self, file: str, given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run a stage of the loop, or the whole loop: all its outputs."""

    # ---- step by step ------------------------------------------------------------------------------------------------

    def begin(self, num_steps: int | None = None) -> None:
        """Start a new generation, and clear every cached tensor.

        Raises:
            ConfigError: the package is for another number of steps, or it only generates as a whole.
        """
        if self.manifest.form == "unrolled":
            raise ConfigError(f"{self.path} holds the whole loop as one graph: runner.generate(…) runs it")
        if num_steps not in (None, self.num_steps):
            raise ConfigError(
                f"{self.path} is a schedule of {self.num_steps} steps, and {num_steps} are asked for: export it for {num_steps}"
            )
        self._generation += 1
        self._step = -1
        self._lanes.clear()
        self._done.clear()

    def step(self) -> None:
        """Start the next denoising step; the following calls belong to it.

        Raises:
            CacheStateError: no generation has begun, or it has no further step.
        """
        if self._generation < 0:
            raise CacheStateError("runner.step() says that a step of a generation starts; call runner.begin() first")
        if self._step + 1 >= self.num_steps:
            raise CacheStateError(
                f"{self.path} is a schedule of {self.num_steps} steps, and a further one is asked for: begin() starts the next generation"
            )
        self._step += 1

    def __call__(self, inputs: Mapping[str, Any], lane: int | str = 0) -> list[np.ndarray]:
        """Call the model, and return its results.

        Args:
            inputs: the model's inputs, by name, as the manifest lists them.
            lane: the lane of this call, if a step has several.

        Raises:
            CacheStateError: the call is outside a step, or its lane was called before in this step or left out in an earlier one.
            ConfigError: an input has another name, shape or type.
        """
        if self._step < 0:
            raise CacheStateError("a call belongs to a step: call runner.begin() and runner.step() first")
        if self._done.get(lane) == self._step:
            raise CacheStateError(
                f"lane {lane!r} was called in step {self._step} already; name a second call of a step: lane=1"
            )
        if (done := self._done.get(lane, -1)) != self._step - 1:
            raise CacheStateError(
                f"lane {lane!r} was left out in step {done + 1}, so its cached tensors are not those of the schedule: call every lane in every step"
            )
        given = checked(inputs, self.manifest.inputs, f"the model of {self.path}")
        step = self.manifest.steps[self._step]
        if lane not in self._lanes:
            self._lanes[lane] = self._new_lane()
        began = time.perf_counter()
        results = self._run(self.manifest.graph(step.graph), step, given, self._lanes[lane])
        self._done[lane] = self._step
        self._record(self._step, lane, step, time.perf_counter() - began)
        return results

    def _record(self, number: int, lane: int | str, step: ScheduledStep, seconds: float) -> None:
        self.history.add(Record(self._generation, number, lane, None, Plan.of(step.plan), step.reused, seconds=seconds))

    # ---- the whole loop ----------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: Mapping[str, Any],
        on_step: Callable[[int], None] = lambda step: None,
        watch: Callable[..., None] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run one generation with the loop that was exported with the model, and return its results by name.

        Args:
            inputs: the loop's inputs, by name, as the manifest lists them.
            on_step: a function that is called with the number of each finished step.
            watch: a function that is called with the step, lane, inputs and results of each call; not for `onnx-unrolled`.

        Raises:
            ConfigError: the package has no loop, or an input has another name, shape or type.
        """
        loop = self.manifest.loop
        if loop is None:
            raise ConfigError(
                f"{self.path} holds no loop, only the model: export it with loop=…, or call the model step by step (begin, step, runner(…))"
            )
        values: dict[str, np.ndarray] = checked(inputs, loop.inputs, f"the loop of {self.path}")
        if self.manifest.form == "unrolled":
            return self._unrolled(values, on_step)
        self.begin()
        for number, stage in enumerate(loop.stages):
            if stage.file is not None:
                found = self._stage(stage.file, {n: values[n] for n in stage.inputs})
                values |= dict(zip(stage.outputs, found, strict=True))
            if number == len(loop.calls):
                break
            call = loop.calls[number]
            if call.step != self._step:
                self.step()
            arguments = {name: values[at] for name, at in call.inputs.items()}
            results = self(arguments, call.lane)
            if watch is not None:
                watch(call.step, call.lane, arguments, results)
            values |= dict(zip(call.outputs, results, strict=True))
            if number + 1 == len(loop.calls) or loop.calls[number + 1].step != call.step:
                on_step(call.step)
        return {v.name: values[v.name] for v in loop.outputs}

    def _unrolled(self, values: Mapping[str, np.ndarray], on_step: Callable[[int], None]) -> dict[str, np.ndarray]:
        """One run of one graph; its steps share the time, since nothing is seen of them."""
        loop = self.manifest.loop
        assert loop is not None
        graph = self.manifest.graphs[0]
        self._generation += 1
        began = time.perf_counter()
        results = self._stage(graph.file, {n: values[n] for n in graph.inputs})
        share = (time.perf_counter() - began) / len(loop.calls)
        for call in loop.calls:
            self._record(call.step, call.lane, self.manifest.steps[call.step], share)
            on_step(call.step)
        return dict(zip(graph.outputs, results, strict=True))


def checked(inputs: Mapping[str, Any], wanted: tuple[Value, ...], what: str) -> dict[str, np.ndarray]:
    """Inputs as arrays of the shapes and types that are wanted.

    Raises:
        ConfigError: a name, a shape or a type that is not; nothing is cast but what numpy calls safe.
    """
    names = [v.name for v in wanted]
    if wrong := set(inputs) - set(names):
        raise ConfigError(f"{what} has no input {min(wrong)!r}; it takes {', '.join(names)}")
    if missing := [n for n in names if n not in inputs]:
        raise ConfigError(f"{what} takes {missing[0]!r} as well; its inputs are {', '.join(names)}")
    found = {}
    for value in wanted:
        array = np.asarray(inputs[value.name])
        if array.shape != value.shape:
            raise ConfigError(
                f"{what}: {value.name!r} has shape {list(array.shape)}, and the package was made for {list(value.shape)}"
            )
        if array.dtype != value.dtype:
            if not np.can_cast(array.dtype, value.dtype, "safe"):
                raise ConfigError(f"{what}: {value.name!r} is {array.dtype}, and the package was made for {value.dtype}")
            array = array.astype(value.dtype)
        found[value.name] = np.ascontiguousarray(array).reshape(value.shape)
    return found
