"""The command line: `vdcache demo`, `explain`, `recipes`, `try`, `passes`, `opt`, `export`, `run`, `verify`, `compare`, `info`."""

from __future__ import annotations

import itertools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from vdcache.cli import packages
from vdcache.cli.output import FAILED, NO, console, needs, options_for_arguments, print_json, spinner, told

AS_JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

app = typer.Typer(help="Diffusion transformers several times faster, by compiling.", no_args_is_help=True, add_completion=False)


def _version(wanted: bool) -> None:
    if wanted:
        import vdcache

        console().print(f"vdcache {vdcache.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Diffusion transformers several times faster, by compiling."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # so that module:Name finds a file in the current folder, as under `python -m`


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the rows.")] = Path("out/demo"),
    steps: Annotated[int, typer.Option(help="Number of denoising steps.", min=1)] = 30,
    rounds: Annotated[int, typer.Option(help="Number of timed rounds; the table shows medians.", min=1)] = 3,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="Recipe to run; repeat for several. Default: vdcache-auto and all AdaCache recipes."),
    ] = None,
    inner: Annotated[str, typer.Option(help="Inner compiler: inductor or eager.")] = "inductor",
) -> None:
    """Generate videos with the shipped model, plain and with each recipe, and compare time and quality."""
    needs("'vdcache[demo]'", "matplotlib", "imageio", "torchmetrics")
    from vdcache.demo.run import run_demo

    with told():
        run_demo(out, steps=steps, rounds=rounds, recipes=recipe or None, inner=inner)


@app.command()
def explain(
    target: Annotated[str, typer.Argument(help="Function, as package.module:function, that returns (model, args, kwargs).")],
    recipe: Annotated[str | None, typer.Option(help="Recipe of which the report also says what it would do.")] = None,
    steps: Annotated[int, typer.Option(help="Number of denoising steps of a generation.", min=1)] = 30,
    html: Annotated[Path | None, typer.Option(help="File that the report is written to as one page.")] = None,
) -> None:
    """Show what vdcache finds in a model: branches, attention, streams, cost, and what it leaves alone, with reasons."""
    if html is not None:
        needs("jinja2", "jinja2")
    from vdcache.explanation import explain as explained
    from vdcache.explanation.target import load

    with told():
        new = html is not None and not html.exists()
        try:
            if html is not None:  # that it can be written is known before the model is loaded
                html.parent.mkdir(parents=True, exist_ok=True)
                html.touch()
            model, args, kwargs = load(target)
            report = explained(model, *args, recipe=recipe, num_steps=steps, **kwargs)
        except BaseException:
            if html is not None and new:
                html.unlink(missing_ok=True)
            raise
    console().print(report)
    if html is not None:
        report.to_html(html)
        console().print(f"written: {html}")


@app.command()
def recipes(
    name: Annotated[str, typer.Argument(help="Recipe to explain: scope, policy, predictor, constants, source.")] = "",
    json: AS_JSON = False,
) -> None:
    """List the named recipes, or explain one."""
    from vdcache.methods import describe
    from vdcache.methods.registry import families

    table = Table(box=None, pad_edge=False, show_header=not name)
    table.add_column("recipe", style="bold", no_wrap=True)
    table.add_column("what it does")
    if not name and json:
        print_json({"name": f.name, "summary": f.summary, "from": f.origin} for f in families())
        return
    if not name:
        for family in families():
            origin = "" if family.origin == "vdcache" else f" [{family.origin}]"
            table.add_row(Text(family.name), Text(family.summary + origin))
        console().print(table)
        console().print(
            "N and D stand for numbers, MODEL for a model's constants: vdcache recipes NAME explains one.", style="dim"
        )
        return
    with told():
        found = describe(name)
    if json:
        print_json(asdict(found))
        return
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
    console().print(table)


@app.command("try")
def try_(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, vdcache's own or an installed package's.")],
    model: Annotated[
        list[str] | None, typer.Option(help="Small model to try it on; repeat for several. Default: all of them.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of denoising steps of a generation.", min=1)] = 12,
    json: AS_JSON = False,
) -> None:
    """Try a recipe on small random models: whether it works, how many FLOPs it skips, and the error of its reused steps."""
    from vdcache.methods import describe
    from vdcache.testing import try_recipe

    with told():
        describe(recipe)
        with spinner() as on_progress:
            trials = try_recipe(recipe, model or None, steps=steps, on_progress=on_progress)
    if json:
        print_json(t.row() for t in trials)
    else:
        typer.echo(options_for_arguments(str(trials)))
    if any(not t.identical for t in trials):
        raise typer.Exit(NO)


@app.command()
def passes(json: AS_JSON = False) -> None:
    """List the passes with their options, the policies, the predictors and the masks, and the package of each."""
    from vdcache.methods.parts import parts
    from vdcache.passes.catalogue import catalogue

    if json:
        print_json(
            [
                *(
                    {
                        "group": "pass",
                        "name": e.name,
                        "summary": e.sentence,
                        "options": [o.text for o in e.options],
                        "from": e.origin,
                    }
                    for e in catalogue()
                ),
                *({"group": p.group, "name": p.name, "summary": p.sentence, "from": p.origin} for p in parts()),
            ]
        )
        return
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
    console().print(table)


@app.command()
def opt(
    graph: Annotated[
        Path,
        typer.Argument(
            help="Text of a graph, as vdcache.dump prints it, or - for standard input. A reproducer names its own passes."
        ),
    ],
    pipeline: Annotated[str, typer.Option(help='Passes to run: "canonicalise,mark-branches{kinds=[mlp]},merge-slots".')] = "",
    verify: Annotated[bool, typer.Option("--verify", help="Check every fact after every pass.")] = False,
    print_changed: Annotated[bool, typer.Option("--print-changed", help="Print what each pass changes.")] = False,
    timing: Annotated[bool, typer.Option("--time", help="Print how long each pass takes.")] = False,
    bisect: Annotated[
        str, typer.Option(help="Find the first pass that breaks this: a fact, runs, same, skips, or package.module:function.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="File for the graph after the last pass; with --bisect, for the graph that the culprit is given."),
    ] = None,
    reproducer: Annotated[Path, typer.Option(help="File for the graph and the passes where one fails.")] = Path(
        "reproducer.txt"
    ),
) -> None:
    """Run passes on the text of a graph: see what each changes, check its facts, and find the pass that breaks something."""
    from vdcache.cli import opt as tool
    from vdcache.errors import ConfigError, ContractError, VdcacheError
    from vdcache.ir.facts import holding
    from vdcache.ir.graph_files import load_graph, read_graph, save_graph
    from vdcache.passes import Pipeline
    from vdcache.passes.catalogue import known_facts, readable

    try:
        saved = read_graph(sys.stdin.read()) if str(graph) == "-" else load_graph(graph)
        if not (text := pipeline or saved.pipeline):
            raise ConfigError('name the passes: --pipeline "canonicalise,mark-branches"; vdcache passes lists them')
        parsed = Pipeline.parse(text, given=holding(saved.graph.graph, known_facts()))
        if bisect:
            found = tool.bisect(saved.graph, parsed, tool.checker(bisect))
            typer.echo(str(found) if found else f"no pass breaks '{bisect}'")
            if out is not None:
                at = found.index if found else len(parsed.passes)
                before, _ = Pipeline(parsed.passes[:at], given=parsed.given).run(saved.graph)
                save_graph(out, before, comment=str(found or ""), pipeline=",".join(map(readable, parsed.passes[at:])))
            raise typer.Exit(NO if found else 0)
        result = tool.run(saved.graph, parsed, verify=verify, reproducer=reproducer)
    except VdcacheError as error:
        typer.echo("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]), err=True)
        # a pass that fails or breaks its contract is an answer; a graph or a pass that does not exist is none
        raise typer.Exit(NO if isinstance(error, ContractError) else FAILED) from error
    typer.echo(result.report(changed=print_changed, timing=timing))
    if out is not None:
        save_graph(out, result.graph)


@app.command()
def compare(
    reference: Annotated[
        Path, typer.Argument(help="Video, picture, folder of pictures, or tensor (.pt, .npy, .safetensors) to compare with.")
    ],
    candidate: Annotated[Path, typer.Argument(help="Video, picture, folder or tensor that is judged.")],
    json: Annotated[Path | None, typer.Option(help="File for the numbers of every frame.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="File for a picture of the worst frame: reference, candidate, difference.")
    ] = None,
    curve: Annotated[Path | None, typer.Option(help="File for a picture of PSNR and SSIM over frames.")] = None,
    layout: Annotated[
        str, typer.Option(help="Layout of tensors: TCHW, CTHW, THWC, CHW or HWC. Default: read off the shape.")
    ] = "",
) -> None:
    """Compare two videos: PSNR and SSIM of every frame and overall, and LPIPS if its weights are on this machine."""
    needs("'vdcache[video]'", "torchmetrics", "imageio", *(["matplotlib"] if curve else []))
    from vdcache.quality import compare as compared

    with told():
        found = compared(reference, candidate, layout=layout)
        for path, write in ((json, found.to_json), (picture, found.picture), (curve, found.curve)):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
    console().print(found)


@app.command()
def info(json: AS_JSON = False) -> None:
    """Show versions, devices, which features are usable, and why others are not."""
    from vdcache.cli.info import facts

    if json:
        print_json(dict(facts()))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in facts():
        table.add_row(name, text)
    console().print(table)


packages.add_to(app)
