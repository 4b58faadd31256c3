"""`vdcache export`, `vdcache run`, `vdcache verify`. `run` needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vdcache.cli.output import NO, console, spinner, told
from vdcache.errors import VdcacheError

if TYPE_CHECKING:
    import numpy as np

    from vdcache.runtime.history import Record

__all__ = ["add_to"]

TARGET = "Function, as package.module:function, that returns (model, args, kwargs) or (model, args, kwargs, loop, inputs)."


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (export, run, verify):
        app.command()(command)


def export(
    target: Annotated[str, typer.Argument(help=TARGET)],
    out: Annotated[Path, typer.Option(help="Folder that the package is written to.")],
    schedule: Annotated[
        str, typer.Option(help="Schedule or recipe: a .json file, computed steps as 0,3,7, or the name of a recipe.")
    ],
    steps: Annotated[
        int | None, typer.Option(help="Number of denoising steps, where the schedule does not say it.", min=1)
    ] = None,
    format: Annotated[str, typer.Option(help="Format of the package: onnx, onnx-single, onnx-unrolled, pt2 or aoti.")] = "onnx",
    overwrite: Annotated[bool, typer.Option(help="Replace a package that is already there.")] = False,
) -> None:
    """Write a model under a static schedule as a package of fixed graphs."""
    from vdcache.explanation.target import load_with_loop
    from vdcache.exporting.exporter import export as exported

    with told(), spinner() as on_progress:
        on_progress("loading the model")
        model, args, kwargs, loop, inputs = load_with_loop(target)
        if format in ("pt2", "aoti"):
            loop = inputs = None
        given = [int(s) for s in schedule.split(",")] if schedule.replace(",", "").isdigit() else schedule
        manifest = exported(
            model,
            args,
            kwargs,
            schedule=given,
            path=out,
            num_steps=steps,
            format=format,
            loop=loop,
            inputs=inputs,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    table = Table(
        title=f"{out}: {manifest.model}, {manifest.kind} {manifest.form}", title_justify="left", box=None, pad_edge=False
    )
    for name, side in (("graph", "left"), ("steps", "right"), ("operators", "right"), ("KiB", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for graph in manifest.graphs:
        ran = sum(s.graph == graph.name for s in manifest.steps)
        count = f"{sum(graph.operators.values())}" if graph.operators else "–"
        table.add_row(graph.name, str(ran), count, f"{manifest.files[graph.file].bytes / 1024:.0f}")
    table.add_row("weights", "", "", f"{manifest.files[manifest.weights].bytes / 1024:.0f}")
    console().print(table)


def run(
    package: Annotated[Path, typer.Argument(help="Folder of a package that was exported with a loop.")],
    out: Annotated[Path, typer.Option(help="File for the result: .npz, or .gif for a video in −1 to 1.")] = Path("result.npz"),
    inputs: Annotated[
        Path | None, typer.Option(help="Inputs of the loop by name, .npz. Default: those in the package.")
    ] = None,
    draw: Annotated[str, typer.Option(help="Name of an input that is drawn from a normal distribution instead.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the input that is drawn.")] = 0,
    threads: Annotated[
        int | None, typer.Option(help="Number of threads that onnxruntime uses within an operator.", min=1)
    ] = None,
) -> None:
    """Generate with an ONNX package, without PyTorch."""
    import numpy as np

    with told():
        if out.suffix not in (".npz", ".gif"):
            raise VdcacheError(f"a result is written as .npz or .gif; got {out.name!r}")
        try:
            from vdcache.runtime_onnx import OnnxRunner
        except ImportError as error:
            raise VdcacheError("running a package needs numpy and onnxruntime: pip install onnxruntime") from error
        runner = OnnxRunner(package, threads=threads)
        source = inputs or package / "inputs.npz"
        if not source.is_file():
            raise VdcacheError(f"{source} does not exist: give --inputs, a .npz with an array for every input of the loop")
        values = dict(np.load(source))
        if draw:
            if draw not in values:
                raise VdcacheError(f"{package} has no input {draw!r}; it takes {', '.join(values)}")
            values[draw] = np.random.default_rng(seed).standard_normal(values[draw].shape).astype(values[draw].dtype)
        with _bar("generating", runner.num_steps) as on_step:
            results = runner.generate(values, on_step)
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".gif":
            _gif(out, results)
        else:
            np.savez(out, **results)  # type: ignore[arg-type]
    console().print(f"{_times(runner.history.generation(), runner.manifest.form)}; written: {out}")


def _times(records: Sequence[Record], form: str) -> str:
    if form == "unrolled":  # one run, whose steps cannot be told apart
        return f"{len(records)} calls in one graph, {sum(r.seconds for r in records):.2f} s"
    kinds = [
        (what, [r.seconds for r in records if r.computed is kind]) for kind, what in ((True, "computed"), (False, "reused"))
    ]
    return "; ".join(f"{len(times)} calls {what}, {1e3 * median(times):.1f} ms each" for what, times in kinds if times)


def verify(
    package: Annotated[Path, typer.Argument(help="Folder of the package.")],
    target: Annotated[str, typer.Argument(help=f"Model that was exported. {TARGET}")],
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative difference that passes. Default: 1e-4, more for a model in 16 bits."),
    ] = None,
) -> None:
    """Compare a package with PyTorch, step by step; exits with 1 where they differ."""
    from vdcache.explanation.target import load_with_loop
    from vdcache.exporting.manifest import Manifest
    from vdcache.exporting.verifying import verify as verified

    with told():
        manifest = Manifest.read(package)
        model, args, kwargs, loop, inputs = load_with_loop(target)
        if manifest.loop is None:
            loop = inputs = None
        with _bar("comparing", len(manifest.steps)) as on_step:
            found = verified(package, model, args, kwargs, loop=loop, inputs=inputs, tolerance=tolerance, on_step=on_step)
    console().print(found)
    if not found.ok:
        raise typer.Exit(NO)


@contextmanager
def _bar(doing: str, total: int) -> Iterator[Callable[[int], None]]:
    columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=total)
        yield lambda step: progress.update(task, completed=step + 1)


def _gif(path: Path, results: dict[str, np.ndarray], zoom: int = 5) -> None:
    """The first result as moving pictures, side by side.

    Raises:
        VdcacheError: it is no video [B, 3, T, H, W], or imageio is not installed.
    """
    import numpy as np

    video = next(iter(results.values()))
    if video.ndim != 5 or video.shape[1] != 3:
        raise VdcacheError(f"a video is [B, 3, T, H, W], and the result is {list(video.shape)}: write it as .npz")
    try:
        import imageio.v3 as iio
    except ImportError as error:
        raise VdcacheError("a .gif needs imageio: pip install imageio; or write .npz") from error
    pixels = ((video.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(2, 3, 0, 4, 1)  # T, H, B, W, 3
    wide = pixels.reshape(*pixels.shape[:2], -1, 3)
    iio.imwrite(path, wide.repeat(zoom, 1).repeat(zoom, 2), duration=150, loop=0)
