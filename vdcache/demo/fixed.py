"""The shipped model as fixed graphs: what `vdcache export vdcache.demo.fixed:generation` takes, and the demo's row of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdcache.calibration.schedule import Schedule
from vdcache.demo.conditions import Condition, encode, unconditional
from vdcache.demo.data import FRAMES, SIZE
from vdcache.demo.model import DemoDiT, with_positions
from vdcache.demo.sampler import denoiser
from vdcache.demo.weights import load_model
from vdcache.exporting.exporter import export
from vdcache.exporting.running import PackageRunner
from vdcache.policies.steps import StepList

__all__ = ["Velocity", "generation", "packaged", "schedule"]

Target = tuple[DemoDiT, tuple[Tensor, ...], dict[str, Any], Callable[..., Tensor], dict[str, Tensor]]


def schedule(steps: int = 30) -> Schedule:
    """The computed steps that `vdcache.search_schedule` found for the shipped model under Euler, scaled to a number of steps."""
    found = Schedule.from_json((resources.files("vdcache.demo") / "schedule.json").read_text())
    if steps == found.steps:
        return found
    computed = StepList(found.computed, of_steps=found.steps).scaled(steps).computed(steps)
    return Schedule.of(steps, computed, found.prediction)


def generation(
    conditions: Sequence[Condition] = (Condition(),), steps: int = 30, seed: int = 0, model: DemoDiT | None = None
) -> Target:
    """The model, the arguments of one call, the denoising loop and its inputs."""
    count = len(conditions)
    noise = torch.randn(count, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    text = torch.cat([encode(conditions), unconditional(count)])
    args = (with_positions(torch.cat([noise, noise])), torch.full((2 * count,), 1000.0), text)
    return model or load_model(), args, {}, denoiser(steps), {"noise": noise, "text": text}


def packaged(path: Path, conditions: Sequence[Condition], steps: int, model: DemoDiT) -> Velocity:
    """Export the model under the shipped schedule, and open the package as a model for `sample`."""
    from vdcache.runtime_onnx import OnnxRunner

    _, args, kwargs, _, _ = generation(conditions, steps, model=model)
    export(model, args, kwargs, schedule=schedule(steps), path=path, overwrite=True)
    return Velocity(OnnxRunner(path, threads=torch.get_num_threads()))


class Velocity:
    """A package as the model that a sampling loop calls: every call is the next step, and after the last one the first."""

    def __init__(self, runner: PackageRunner) -> None:
        self.runner = runner
        self._calls = 0

    def __call__(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        if self._calls % self.runner.num_steps == 0:
            self.runner.begin()
        self._calls += 1
        self.runner.step()
        names = (v.name for v in self.runner.manifest.inputs)
        given = (hidden_states, timestep, text)
        (result,) = self.runner({n: v.cpu().numpy() for n, v in zip(names, given, strict=True)})
        return torch.from_numpy(result).to(hidden_states.device)

    def begin(self) -> None:
        """The next call is a generation's first."""
        self._calls = 0
