"""`vdcache.export`: a model under a static schedule as a package."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vdcache
from vdcache.errors import ConfigError
from vdcache.exporting.arguments import check_call, check_loop
from vdcache.exporting.fixed import ExportedFiles, fixed
from vdcache.exporting.loops import traced_loop
from vdcache.exporting.manifest import FILE, FORMS, KINDS, Manifest, facts_of
from vdcache.methods.recipe import Recipe

__all__ = ["INPUTS", "export"]

INPUTS = "inputs.npz"  # one set of the loop's inputs, so that a package can generate as it is


def export(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    schedule: Any,
    path: str | Path,
    num_steps: int | None = None,
    format: str = "onnx",
    loop: Callable[..., Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> Manifest:
    """Write a model under a static schedule as a package of fixed graphs.

        vdcache.export(model, (x, timestep, text), schedule=vdcache.Schedule(30, (0, 1, 5, 12, 20)), path="package")

    Args:
        model: a module or function that is called once for each denoising step (or once for each lane of a step).
        args, kwargs: the arguments of one call. The package is fixed to their shapes.
        schedule: a `Schedule` or a `Calibration`; the path of one of these, or of a recipe, as JSON; a list of computed steps; or a
            recipe that depends on the step number alone.
        path: the package's folder, which must not exist yet. It appears when it is complete.
        num_steps: number of denoising steps of a generation. Needed if the schedule does not contain it.
        format: "onnx", a graph for every distinct plan; "onnx-single", one graph with the plan as an input; "onnx-unrolled", the
            whole loop as one graph; "pt2", exported programs of torch; "aoti", AOTInductor packages for this machine.
        loop: the denoising loop, `loop(model, **inputs)`. It calls the model equally often in every step, draws no random numbers,
            and has no data-dependent control flow. With a loop the package generates on its own; "onnx-unrolled" needs one.
        inputs: one set of the loop's tensors, by name.
        overwrite: whether to replace a package that exists.
        on_progress: a function that is called with a description of each stage of the export.

    Returns the manifest of the package.

    Raises:
        ConfigError: the recipe decides while it runs, the number of steps differs from the schedule's, the format is unknown, the
            folder exists, or the model or the loop does not take the inputs.
        CaptureError: torch.export cannot capture the model as one graph, or the format cannot represent an operation.
    """
    kind, form = _kind_and_form(format, loop, inputs)
    kwargs = {} if kwargs is None else kwargs
    check_call(model, args, kwargs)
    if loop is not None:
        check_loop(loop, inputs)
    target = Path(path)
    if target.exists() and not (overwrite and (target / FILE).is_file()):
        hint = "overwrite=True replaces it" if (target / FILE).is_file() else "and it is no package"
        raise ConfigError(f"{target} is there already; {hint}")
    write = _writer(kind, form)
    on_progress("capturing the model")
    what = fixed(model, args, dict(kwargs), schedule, num_steps)
    around = None
    if loop is not None and inputs is not None:
        on_progress("capturing the loop")
        around = traced_loop(what, model, loop, inputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        written = write(what, around, aside, on_progress)
        if inputs is not None:
            np.savez(aside / INPUTS, **{name: value.detach().cpu().numpy() for name, value in inputs.items()})
        on_progress("hashing the files")
        manifest = Manifest(
            kind=kind,
            form=form,
            versions=_versions(kind),
            model=what.model,
            recipe=_recipe_text(what.recipe),
            opset=written.opset,
            inputs=what.inputs,
            outputs=what.outputs,
            caches=what.caches,
            graphs=written.graphs,
            steps=written.steps,
            weights=written.weights,
            files={str(f.relative_to(aside).as_posix()): facts_of(f) for f in sorted(aside.rglob("*")) if f.is_file()},
            loop=written.loop,
        )
        manifest.write(aside)
        aside.chmod(0o755)
        _put(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def _kind_and_form(format: str, loop: Any, inputs: Any) -> tuple[str, str]:
    """What a format writes, and how many graphs of it.

    Raises:
        ConfigError: there is no such format, or it does not go with the loop.
    """
    kind, _, form = format.partition("-")
    form = form or "plans"
    if kind not in KINDS or form not in FORMS or (kind != "onnx" and form != "plans"):
        raise ConfigError(f"there is no format {format!r}; there are onnx, onnx-single, onnx-unrolled, pt2, aoti")
    if (loop is None) != (inputs is None):
        raise ConfigError("loop and inputs belong together: loop(model, **inputs) is one generation")
    if form == "unrolled" and loop is None:
        raise ConfigError("onnx-unrolled is the whole denoising loop as one graph: give loop and inputs")
    if kind != "onnx" and loop is not None:
        raise ConfigError("a loop is exported to ONNX alone; where there is torch, the loop that you have calls the runner")
    return kind, form


def _put(folder: Path, target: Path) -> None:
    """Put a complete package in its place; one that is there goes when the new one stands."""
    if not target.exists():
        folder.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        target.rename(old / "old")
        folder.rename(target)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _writer(kind: str, form: str) -> Callable[..., ExportedFiles]:
    """What writes a format.

    Raises:
        ConfigError: a library that it needs is not installed.
    """
    if kind == "onnx":
        if missing := [m for m in ("onnx", "onnxscript", "onnxruntime") if find_spec(m) is None]:
            raise ConfigError(f"ONNX needs {', '.join(missing)}: pip install 'vdcache[onnx]'")
        from vdcache.exporting.onnx_plans import write_plans
        from vdcache.exporting.onnx_single import write_single
        from vdcache.exporting.onnx_unrolled import write_unrolled

        return {"plans": write_plans, "single": write_single, "unrolled": write_unrolled}[form]
    from vdcache.exporting import to_torch

    return {"pt2": to_torch.write_pt2, "aoti": to_torch.write_aoti}[kind]


def _versions(kind: str) -> dict[str, str]:
    modules = ("onnx", "onnxscript") if kind == "onnx" else ()
    return {"vdcache": vdcache.__version__, "torch": torch.__version__, **{m: version(m) for m in modules}}


def _recipe_text(recipe: Recipe) -> str:
    try:
        return recipe.to_json()
    except ConfigError:  # a policy or predictor of the user's own
        return str(recipe)
