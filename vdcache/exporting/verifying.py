"""`vdcache.verify`: a package beside PyTorch under the same schedule, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from vdcache.api import compile
from vdcache.backends.runner import original
from vdcache.errors import ConfigError
from vdcache.exporting.arguments import check_call, check_loop
from vdcache.exporting.manifest import Manifest
from vdcache.exporting.running import PackageRunner
from vdcache.methods.recipe import Recipe
from vdcache.util.psnr import psnr

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["TOLERANCE", "CallComparison", "Verification", "runner_of", "verify"]

TOLERANCE = 1e-4  # in float32; of a narrower type, so many of its own steps:
ROUNDINGS = 5
LEAST_PSNR = 60.0


@dataclass(frozen=True)
class CallComparison:
    """One call.

    Args:
        difference: largest |package − PyTorch|, relative to the largest |PyTorch|.
    """

    step: int
    lane: int
    plan: tuple[str, ...]
    difference: float


@dataclass(frozen=True)
class Verification:
    """The result of `vdcache.verify`.

    Args:
        package: the path of the package.
        calls: the comparison of every call; PyTorch was given the same inputs.
        psnr: PSNR of the whole generation against PyTorch's, in dB of its range; None without a loop.
        tolerance: the largest difference that passes.
        least_psnr: the least PSNR that passes, in dB.
    """

    package: str
    calls: tuple[CallComparison, ...]
    psnr: float | None
    tolerance: float = TOLERANCE
    least_psnr: float = LEAST_PSNR

    @property
    def largest(self) -> float:
        """The largest difference of all calls; NaN counts as infinite."""
        return max(c.difference if math.isfinite(c.difference) else math.inf for c in self.calls)

    @property
    def ok(self) -> bool:
        """Whether every call is within the tolerance, and the PSNR of the whole generation is high enough."""
        return self.largest <= self.tolerance and (self.psnr is None or self.psnr >= self.least_psnr)

    def __str__(self) -> str:
        whole = "" if self.psnr is None else f", the whole generation {self.psnr:.1f} dB from PyTorch's"
        return f"{self.package}: largest difference {self.largest:.2g} in {len(self.calls)} calls{whole}: {'the same' if self.ok else 'DIFFERENT'}"

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name, side in (("step", "right"), ("lane", "right"), ("plan", "left"), ("difference", "right")):
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        for c in self.calls:
            mark = "" if c.difference <= self.tolerance else "  [red]too large[/red]"
            plan = f"reuse {', '.join(c.plan)}" if c.plan else "[bold]recompute[/bold]"
            table.add_row(str(c.step), str(c.lane), plan, f"{c.difference:.2g}{mark}")
        return Group(table, str(self))


def runner_of(path: str | Path, **options: Any) -> PackageRunner:
    """What runs a package, by its kind.

    Raises:
        ConfigError: no package, or onnxruntime is not installed.
    """
    if Manifest.read(path, hashes=False).kind != "onnx":
        from vdcache.exporting.to_torch import TorchRunner

        return TorchRunner(path, **options)
    try:
        from vdcache.runtime_onnx import OnnxRunner
    except ImportError as error:
        raise ConfigError("running an ONNX package needs onnxruntime: pip install onnxruntime") from error
    return OnnxRunner(path, **options)


def verify(
    path: str | Path,
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: Recipe | None = None,
    loop: Callable[..., Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Verification:
    """Compare a package with PyTorch, call by call.

    PyTorch runs the model with the same recipe and the eager inner compiler, and gets the same inputs at every call.

    Args:
        path: the package.
        model, args, kwargs: the arguments that `vdcache.export` was given.
        recipe: the recipe, if the package could not save it (it has your own policy or predictor).
        loop, inputs: the arguments that `vdcache.export` was given. For a package without a loop, the inputs of every step are
            `args` and `kwargs`, slightly changed.
        tolerance: the largest relative difference that passes. Default: 1e-4, or 5 roundings of the narrowest floating type among the model's
            weights and inputs (5e-3 for float16); of the whole generation, 60 dB then become 36.
        on_step: a function that is called with the number of each finished step.

    Raises:
        ConfigError: there is no package at `path`, it was changed, it is of another model, or only one of package and call has a loop.
    """
    runner = runner_of(path)
    manifest = runner.manifest
    if (manifest.loop is None) != (loop is None):
        raise ConfigError(
            f"{path} was exported {'without' if manifest.loop is None else 'with'} a loop: verify it {'without' if manifest.loop is None else 'with'} one"
        )
    if recipe is None:
        if not manifest.recipe.startswith("{"):
            raise ConfigError(f"{path} could not keep its recipe ({manifest.recipe}): give recipe=…")
        recipe = Recipe.from_json(manifest.recipe)
    kwargs = {} if kwargs is None else kwargs
    check_call(model, args, kwargs)
    if loop is not None:
        check_loop(loop, inputs)
    torch_side = _Beside(model, tuple(args), dict(kwargs), recipe, manifest)
    rows: list[CallComparison] = []

    def compare(step: int, lane: int, given: Mapping[str, np.ndarray], results: Sequence[np.ndarray]) -> None:
        wanted = torch_side.call(step, given)
        rows.append(CallComparison(step, lane, manifest.steps[step].plan, _difference(results, wanted)))
        on_step(step)

    with torch.no_grad():
        torch_side.begin()
        psnr = None
        if manifest.loop is None:
            _step_by_step(runner, torch_side.examples, compare)
        else:
            assert loop is not None and inputs is not None
            # copies: a loop may write into what it is given, and these are the caller's
            arrays = {n: v.detach().cpu().numpy().copy() for n, v in inputs.items()}
            results = _watched(runner, arrays, compare)
            wanted = torch_side.generation(loop, {n: v.clone() for n, v in inputs.items()})
            if len(wanted) != len(manifest.loop.outputs):
                raise ConfigError(
                    f"the loop returns {len(wanted)} tensors, and the package {len(manifest.loop.outputs)}: another loop, or a package of an earlier "
                    "version whose loop writes into its inputs; export it again"
                )
            psnr = min(_psnr(results[v.name], w) for v, w in zip(manifest.loop.outputs, wanted, strict=True))
    usual = max(TOLERANCE, ROUNDINGS * _rounding(model, [*args, *kwargs.values(), *(inputs or {}).values()]))
    least = LEAST_PSNR if usual == TOLERANCE else -20 * math.log10(usual) - 10
    return Verification(str(path), tuple(rows), psnr, usual if tolerance is None else tolerance, least)


def _rounding(model: Any, given: Any) -> float:
    """The largest step from 1 to the next number of the floating types of a model and what it is given."""
    model = original(model)
    values = [*pytree.tree_leaves(given), *(model.parameters() if isinstance(model, torch.nn.Module) else ())]
    types = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
    return max((torch.finfo(t).eps for t in types), default=0.0)


class _Beside:
    """PyTorch under the package's recipe, told where each call stands."""

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], recipe: Recipe, manifest: Manifest
    ) -> None:
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self.examples = {}
        tensors = [v for v in self._leaves if isinstance(v, Tensor)]
        if len(tensors) != len(manifest.inputs):
            raise ConfigError(
                f"the model is given {len(tensors)} tensors, and the package takes {len(manifest.inputs)}: another model?"
            )
        for value, tensor in zip(manifest.inputs, tensors, strict=True):
            if tuple(tensor.shape) != value.shape:
                raise ConfigError(
                    f"{value.name!r} has shape {list(tensor.shape)}, and the package was made for {list(value.shape)}"
                )
            self.examples[value.name] = tensor.detach().cpu().numpy()
        self._names = [v.name for v in manifest.inputs]
        self._lanes = len(manifest.loop.calls) // len(manifest.steps) if manifest.loop is not None else 1
        self._steps = len(manifest.steps)
        self._compiled = compile(model, recipe, num_steps=self._steps, inner="eager", dynamic=False)
        self._calls = 0

    def begin(self) -> None:
        self._compiled.vdcache.begin(self._steps)
        self._calls = 0

    def _place(self) -> None:
        if self._calls % self._lanes == 0:
            self._compiled.vdcache.step()
        self._calls += 1

    def call(self, step: int, given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        rest = iter(torch.from_numpy(np.array(given[n])) for n in self._names)
        leaves = [next(rest).to(v.device) if isinstance(v, Tensor) else v for v in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        lane = self._calls % self._lanes
        self._place()
        for number, leaf in enumerate(leaves):  # what drifts here stays the same in a real run: it is no new conditioning
            if isinstance(leaf, Tensor):
                self._compiled.vdcache.moves(leaf, (lane, number))
        return _arrays(self._compiled(*args, **kwargs))

    def generation(self, loop: Callable[..., Any], inputs: Mapping[str, Any]) -> list[np.ndarray]:
        self.begin()

        def model(*args: Any, **kwargs: Any) -> Any:
            self._place()
            return self._compiled(*args, **kwargs)

        return _arrays(loop(model, **inputs))


Compare = Callable[[int, int, Mapping[str, np.ndarray], Sequence[np.ndarray]], None]


def _step_by_step(runner: PackageRunner, examples: Mapping[str, np.ndarray], compare: Compare) -> None:
    """Inputs that drift from step to step, as a loop's do."""
    draw = np.random.default_rng(0)
    runner.begin()
    for step in range(runner.num_steps):
        share = step / runner.num_steps
        given = {
            n: (x * (1 - 0.5 * share) + 0.1 * share * draw.standard_normal(x.shape)).astype(x.dtype)
            if x.dtype.kind == "f"
            else x
            for n, x in examples.items()
        }
        runner.step()
        compare(step, 0, given, runner(given))


def _watched(runner: PackageRunner, arrays: Mapping[str, np.ndarray], compare: Compare) -> dict[str, np.ndarray]:
    if runner.manifest.form != "unrolled":
        return runner.generate(arrays, watch=compare)
    from vdcache.exporting.inside import calls_of

    for step, lane, given, found in calls_of(runner.path, runner.manifest, arrays):
        compare(step, lane, given, found)
    return runner.generate(arrays)


def _arrays(results: Any) -> list[np.ndarray]:
    return [v.detach().cpu().numpy() for v in pytree.tree_leaves(results) if isinstance(v, Tensor)]


def _difference(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(float(np.abs(a.astype(np.float64) - b).max() / max(float(np.abs(b).max()), 1e-30)) for a, b in pairs)


def _psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    error = float(np.square(found.astype(np.float64) - wanted).mean())
    spread = float(wanted.max() - wanted.min()) or float(np.abs(wanted).max()) or 1.0  # a constant has no range
    return psnr(error, spread)
