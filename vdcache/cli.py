"""The command line: `vdcache demo`, `explain`, `recipes`, `try`, `passes`, `opt`, `export`, `run`, `verify`, `compare`, `info`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vdcache import cli_packages

app = typer.Typer(help="Diffusion transformers several times faster, by compiling.", no_args_is_help=True, add_completion=False)


def _version(wanted: bool) -> None:
    if wanted:
        import vdcache

        Console().print(f"vdcache {vdcache.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Diffusion transformers several times faster, by compiling."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where pictures and rows go.")] = Path("out/demo"),
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 30,
    rounds: Annotated[int, typer.Option(help="Timed rounds; the table shows medians.", min=1)] = 3,
    recipe: Annotated[
        list[str] | None, typer.Option(help="A recipe to run (again for more); all of AdaCache's without.")
    ] = None,
    inner: Annotated[str, typer.Option(help="Inner compiler: inductor or eager.")] = "inductor",
) -> None:
    """Generate videos with the shipped model, plain and with each recipe, and compare time and quality."""
    missing = _missing("matplotlib", "imageio", "torchmetrics")
    if missing:
        Console(stderr=True).print(f"The demo needs {', '.join(missing)}: pip install 'vdcache\\[demo]'")
        raise typer.Exit(1)
    from vdcache.demo.run import run_demo
    from vdcache.ir.errors import VdcacheError

    try:
        run_demo(out, steps=steps, rounds=rounds, recipes=recipe or None, inner=inner)
    except VdcacheError as error:
        Console(stderr=True).print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error


@app.command()
def explain(
    target: Annotated[str, typer.Argument(help="package.module:function; the function returns (model, args, kwargs).")],
    recipe: Annotated[str | None, typer.Option(help="Also say what this recipe would do.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of a generation.", min=1)] = 30,
    html: Annotated[Path | None, typer.Option(help="Write the report as one page.")] = None,
) -> None:
    """Show what vdcache finds in a model: branches, attention, streams, cost, and what is left alone and why."""
    if html is not None and (missing := _missing("jinja2")):
        Console(stderr=True).print(f"--html needs {missing[0]}: pip install jinja2")
        raise typer.Exit(1)
    from vdcache.explanation import explain as explained
    from vdcache.explanation.target import load
    from vdcache.ir.errors import VdcacheError

    try:
        if html is not None:
            html.parent.mkdir(parents=True, exist_ok=True)
            html.touch()
        model, args, kwargs = load(target)
        report = explained(model, *args, recipe=recipe, num_steps=steps, **kwargs)
    except (VdcacheError, OSError) as error:
        Console(stderr=True).print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(1) from error
    Console().print(report)
    if html is not None:
        report.to_html(html)
        Console().print(f"written: {html}")


@app.command()
def recipes(
    name: Annotated[str, typer.Argument(help="Explain this one: scope, policy, predictor, constants, source.")] = "",
) -> None:
    """List the named recipes, or explain one."""
    from vdcache.ir.errors import ConfigError
    from vdcache.methods import describe
    from vdcache.methods.registry import families

    table = Table(box=None, pad_edge=False, show_header=not name)
    table.add_column("recipe", style="bold", no_wrap=True)
    table.add_column("what it does")
    if not name:
        for family in families():
            origin = "" if family.origin == "vdcache" else f" [{family.origin}]"
            table.add_row(Text(family.name), Text(family.summary + origin))
        Console().print(table)
        Console().print(
            "N and D stand for numbers, MODEL for a model's constants: vdcache recipes NAME explains one.", style="dim"
        )
        return
    try:
        found = describe(name)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    plans = ", ".join(found.plans) + (" (and the head, which runs first)" if found.probes else "")
    rows = (
        (found.name, found.summary),
        ("scope", "\n".join(found.scope)),
        ("policy", found.policy),
        ("predictor", found.predictor),
        ("plans", plans),
        ("constants", found.constants or "none"),
        ("models", ", ".join(found.models)),
        ("source", found.source or "–"),
        ("from", "" if found.origin == "vdcache" else found.origin),
    )
    for title, text in rows:
        if text:
            table.add_row(title, Text(text))
    Console().print(table)


@app.command("try")
def try_(
    recipe: Annotated[str, typer.Argument(help="The name of a recipe, vdcache's own or an installed package's.")],
    model: Annotated[list[str] | None, typer.Option(help="A small model; again for more. All of them without.")] = None,
    steps: Annotated[int, typer.Option(help="Of a generation.")] = 12,
) -> None:
    """Try a recipe on small random models: where it works, what it leaves out, how far off what it reuses is."""
    from vdcache.ir.errors import ConfigError
    from vdcache.methods import describe
    from vdcache.testing import try_recipe

    try:
        describe(recipe)
        trials = try_recipe(recipe, model or None, steps=steps)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(str(trials))
    if any(not t.identical for t in trials):
        raise typer.Exit(1)


@app.command()
def passes() -> None:
    """List the passes, with their options, and the policies, predictors and masks; and where they come from."""
    from vdcache.methods.parts import parts
    from vdcache.passes.catalogue import catalogue

    table = Table(box=None, pad_edge=False)
    table.add_column("pass", style="bold", no_wrap=True)
    table.add_column("what it does")
    table.add_column("from", style="dim", no_wrap=True)
    for entry in catalogue():
        options = f"\noptions: {', '.join(o.text for o in entry.options)}" if entry.options else ""
        table.add_row(Text(entry.name), Text(entry.sentence + options), Text(entry.origin))
    for group, found in itertools.groupby(parts(), key=lambda part: part.group):
        table.add_section()
        table.add_row(Text(group, style="not bold"), "")
        for part in found:
            table.add_row(Text(part.name), Text(part.sentence), Text(part.origin))
    Console().print(table)


@app.command()
def opt(
    graph: Annotated[
        Path, typer.Argument(help="The text of a graph, as vdcache.dump prints it; a reproducer names its own passes.")
    ],
    pipeline: Annotated[str, typer.Option(help='The passes: "canonicalise,mark-branches{kinds=[mlp]},merge-slots".')] = "",
    verify: Annotated[bool, typer.Option("--verify", help="Check every fact after every pass.")] = False,
    print_changed: Annotated[bool, typer.Option("--print-changed", help="Print what each pass changes.")] = False,
    timing: Annotated[bool, typer.Option("--time", help="Print how long each pass takes.")] = False,
    bisect: Annotated[
        str, typer.Option(help="Find the first pass that breaks this: a fact, runs, same, skips, or package.module:function.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Write the graph after the last pass.")] = None,
    reproducer: Annotated[Path, typer.Option(help="Where graph and passes go when one fails.")] = Path("reproducer.txt"),
) -> None:
    """Run passes on the text of a graph: what they do to it, whether they keep their promises, which one breaks something."""
    from vdcache import opt as tool
    from vdcache.ir.errors import ConfigError, VdcacheError
    from vdcache.ir.facts import holding
    from vdcache.ir.graph_files import load_graph, save_graph
    from vdcache.passes import Pipeline
    from vdcache.passes.catalogue import known_facts

    try:
        saved = load_graph(graph)
        if not (text := pipeline or saved.pipeline):
            raise ConfigError('name the passes: --pipeline "canonicalise,mark-branches"; vdcache passes lists them')
        parsed = Pipeline.parse(text, given=holding(saved.graph.graph, known_facts()))
        if bisect:
            found = tool.bisect(saved.graph, parsed, tool.checker(bisect))
            typer.echo(str(found) if found else f"no pass breaks '{bisect}'")
            raise typer.Exit(1 if found else 0)
        result = tool.run(saved.graph, parsed, verify=verify, reproducer=reproducer)
    except VdcacheError as error:
        typer.echo("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]), err=True)
        raise typer.Exit(1) from error
    typer.echo(result.report(changed=print_changed, timing=timing))
    if out is not None:
        save_graph(out, result.graph)


@app.command()
def compare(
    reference: Annotated[
        Path, typer.Argument(help="A video, a picture, a folder of pictures, or a tensor (.pt, .npy, .safetensors).")
    ],
    candidate: Annotated[Path, typer.Argument(help="The same, of what is judged.")],
    json: Annotated[Path | None, typer.Option(help="Write the numbers of every frame.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the worst frame: reference, candidate, difference.")] = None,
    curve: Annotated[Path | None, typer.Option(help="Write a picture of PSNR and SSIM over frames.")] = None,
    layout: Annotated[str, typer.Option(help="Of tensors: TCHW, CTHW, THWC, CHW or HWC; read off the shape without.")] = "",
) -> None:
    """Compare two videos: PSNR and SSIM of every frame and overall, LPIPS where its weights are at hand."""
    if missing := _missing("torchmetrics", "imageio", *(["matplotlib"] if curve else [])):
        Console(stderr=True).print(f"compare needs {', '.join(missing)}: pip install 'vdcache\\[video]'")
        raise typer.Exit(1)
    from vdcache.ir.errors import VdcacheError
    from vdcache.quality import compare as compared

    try:
        found = compared(reference, candidate, layout=layout)
        for path, write in ((json, found.to_json), (picture, found.picture), (curve, found.curve)):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
    except (VdcacheError, OSError) as error:
        Console(stderr=True).print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(1) from error
    Console().print(found)


@app.command()
def info() -> None:
    """Versions, devices, what is usable and why something is not."""
    from vdcache.info import facts

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in facts():
        table.add_row(name, text)
    Console().print(table)


cli_packages.add_to(app)


def _missing(*modules: str) -> list[str]:
    from importlib.util import find_spec

    return [m for m in modules if find_spec(m) is None]
