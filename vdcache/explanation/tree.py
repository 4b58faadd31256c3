"""The report as text for a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from vdcache.explanation.data import ReportData
from vdcache.patterns import Attention, Block, Branch, GraphAnalysis, Refusal, Stream
from vdcache.util.sizes import bytes_text

__all__ = ["amount", "plain", "reasons", "shares", "size", "tree", "where"]


def amount(flops: float) -> str:
    """FLOPs for people: 1.2 TFLOP."""
    for factor, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if flops >= factor:
            return f"{flops / factor:.3g} {unit}"
    return f"{flops / 1e3:.3g} kFLOP"


def size(n: float | None) -> str:
    """Bytes for people: 1.2 MiB."""
    if n is None:
        return "unknown (sizes are symbols)"
    return bytes_text(n)


def plain(report: ReportData) -> str:
    """The tree without colours."""
    console = Console(file=io.StringIO(), width=118, color_system=None)
    console.print(tree(report))
    return console.file.getvalue()  # type: ignore[attr-defined]


def tree(report: ReportData) -> Tree:
    counts = ", ".join(f"{n} {kind}" for kind, n in report.count().items()) or "no residual branch"
    many = f" in {len(report.graphs)} graphs" if len(report.graphs) > 1 else ""
    root = Tree(
        _line(
            f"[{report.model}]", "bold", f"{counts}{many}; {amount(report.flops)} a forward, {report.coverage:.1%} in branches"
        )
    )
    if invariant := shares(report):
        root.add(_line("depends on", "bold", invariant))
    for graph in report.graphs:
        at = root
        if len(report.graphs) > 1:
            again = f", runs {1 + graph.again} times" if graph.again else ""
            at = root.add(_line(f"graph {graph.index}", "bold", f"{graph.nodes} operations, from {where(graph.line)}{again}"))
        if graph.analysis is None:
            at.add(_line("not read", "red", graph.problem))
        else:
            _inside(at, graph.analysis)
        if graph.ends:
            at.add(_line("breaks", "yellow", f"at {where(graph.ends_at)}: {graph.ends}"))
    if report.breaks and not any(g.ends for g in report.graphs):
        for reason in report.breaks:
            root.add(_line("break", "yellow", reason.splitlines()[0]))
    if report.recipe:
        _recipe(root.add(_line(f"with {report.recipe}", "bold", "")), report)
    root.add(_line("verdict", "bold green", report.verdict))
    return root


_KINDS = {
    "parameters": "parameters alone",
    "prompt": "the prompt alone",
    "timestep": "the timestep alone",
    "both": "prompt and timestep",
}


def shares(report: ReportData) -> str:
    """What does not depend on the latent."""
    by = {what: dict(report.shares.of(what)) for what in ("flops", "weights", "values")}
    found = []
    for kind, words in _KINDS.items():
        spent, weights, values = (by[what][kind] for what in ("flops", "weights", "values"))
        if max(spent, weights, values) >= 0.0005:
            found.append(f"{words} {spent:.1%} of FLOPs, {weights:.1%} of weights, {values:.1%} of values")
    return "; ".join(found)


def _inside(at: Tree, found: GraphAnalysis) -> None:
    if found.timestep_inputs:
        at.add(
            _line(
                "timestep",
                "bold",
                f"{_or(found.timestep_inputs)}: {len(found.conditioning.timestep)} operations depend on it alone",
            )
        )
    elif found.branches:
        at.add(_line("timestep", "bold", "no input reaches a sinusoidal embedding: only explicit steps can drive this graph"))
    if found.latents:
        grid = f", {found.grid.frames} × {found.grid.height} × {found.grid.width} video tokens" if found.grid else ""
        at.add(_line("latent", "bold", f"{', '.join(found.latents)}{grid}"))
    if found.conditioning.text:
        at.add(_line("per generation", "bold", f"{len(found.conditioning.text)} operations depend on the other inputs alone"))
    for stream in found.streams:
        at.add(_line(f"stream {stream.index}", "bold", _stream(stream)))
    for blocks in _repeats(found.blocks):
        _block(at, blocks, found)
    for attention in found.attentions:
        if not any(attention in b.attentions for b in found.branches):
            at.add(_line("attention outside branches", "yellow", f"{attention.node}: {_attention(attention)}"))
    if found.refusals:
        node = at.add(_line("not taken", "bold", f"{len(found.refusals)} additions"))
        for reason, members in reasons(found.refusals):
            node.add(
                _line(f"{len(members)} ×", "dim", f"{reason} ({', '.join(members[:3])}{', …' if len(members) > 3 else ''})")
            )


def _repeats(blocks: Sequence[Block]) -> list[list[Block]]:
    """Neighbouring blocks of one shape together; also where two or three shapes alternate."""
    found: list[list[Block]] = []
    for _, run in groupby(blocks, key=lambda b: b.shape):
        found.append(list(run))
    return found


def _block(at: Tree, blocks: list[Block], found: GraphAnalysis) -> None:
    first = blocks[0]
    name = f"block {first.index}" if len(blocks) == 1 else f"blocks {first.index}–{blocks[-1].index}"
    by_name: dict[str, list[Branch]] = {}
    for branch in found.branches:
        by_name.setdefault(branch.name, []).append(branch)
    own = [b for b in found.branches if b.block == first.index]
    modules = {b.module.rsplit(".", 1)[0] for b in own if b.module}
    places = f"{_shared(modules)}" if modules else ""
    times = f"{len(blocks)} × " if len(blocks) > 1 else ""
    node = at.add(_line(name, "bold", f"{times}{len(own)} branches{f', {places}' if places else ''}"))
    for branch in own:
        attention = "; ".join(_attention(a) for a in branch.attentions)
        gate = "gated" if branch.pre_gate else ""
        facts = [f"stream {branch.stream}", attention, amount(branch.flops), size(branch.bytes), gate, where(branch.line)]
        node.add(
            _line(
                branch.kind if branch.layout in ("", "unknown") else f"{branch.layout} {branch.kind}",
                "cyan",
                ", ".join(f for f in facts if f),
            )
        )


def _shared(paths: Iterable[str]) -> str:
    """What dotted paths have in common at their left."""
    split = [p.split(".") for p in paths]
    shared = split[0]
    for other in split[1:]:
        shared = [a for a, b in zip(shared, other, strict=False) if a == b]
    return ".".join(shared)


def _stream(stream: Stream) -> str:
    shape = " × ".join("?" if s is None else str(s) for s in stream.shape)
    spans = "; ".join(f"{s.role} {s.start}–{s.stop}" for s in stream.spans)
    return f"{stream.role}, {shape} {stream.dtype}, {len(stream.residual_adds)} branches{f' ({spans})' if spans else ''}"


def _attention(a: Attention) -> str:
    heads = f"{a.heads} heads × " if a.heads else ""
    lengths = f"{heads}{a.q_len}→{a.kv_len} tokens" if a.q_len else "lengths unknown"
    return f"{lengths} × {a.head_dim}, {a.form}" if a.head_dim else f"{lengths}, {a.form}"


def _recipe(at: Tree, report: ReportData) -> None:
    if report.nothing:
        at.add(_line("nothing to cache", "red", report.nothing))
        return
    for text in report.masks:
        at.add(_line("masks", "bold", text))
    for held in report.held:
        each = {"prompt": " a prompt", "timestep": " a timestep", "both": " a prompt and timestep"}.get(held.kind, "")
        what = _KINDS[held.kind]
        at.add(_line("held", "bold", f"{held.values} values of {what}, {size(held.bytes)}{each}"))
    if report.slots or not (report.masks or report.held):
        at.add(
            _line(
                "slots",
                "bold",
                f"{len(report.slots_before)} before merging, {len(report.slots)} after; {size(report.cache_bytes)} a lane",
            )
        )
    for slot in report.slots[:8]:
        kept = (
            f"the stream's difference over {len(slot.branches)} branches"
            if slot.merged
            else f"the contribution of {', '.join(slot.branches)}"
            if slot.branches
            else "a value that is no branch's whole contribution"
        )
        at.add(_line(slot.name, "cyan", f"{kept}, {size(slot.bytes)}"))
    if len(report.slots) > 8:
        at.add(_line("…", "dim", f"{len(report.slots) - 8} more"))
    if report.slots and report.memory:
        memory = at.add(_line("memory of one lane", "bold", "cache_budget takes the first that fits"))
        for cost in report.memory:
            memory.add(_line(size(cost.bytes), "cyan", cost.name))
    for variant in report.variants:
        share = f", {variant.flops / report.flops:.1%} of a plain step" if report.flops else ""
        at.add(_line(variant.name, "cyan", f"{amount(variant.flops)}{share}, {variant.nodes} operations"))
    if report.bound is not None:
        computed = sum(not plan for plan in report.schedule)
        text = f"{report.bound:.2f}× over {report.steps} steps at best ({computed} computed), at the changes that let it reuse most"
        if report.goal:
            text = f"{report.goal}: {computed} of {report.steps} steps computed, {report.bound:.2f}× at most; the first generation tells which"
        at.add(_line("goal" if report.goal else "bound", "bold", text))


def reasons(refusals: Iterable[Refusal]) -> list[tuple[str, list[str]]]:
    """Refusals by reason, with the node names in a reason left out; the most frequent first."""
    groups: dict[str, list[str]] = {}
    for refusal in refusals:
        words = [w if not (w.startswith("'") and w.rstrip(",.").endswith("'")) else "…" for w in refusal.reason.split(" ")]
        groups.setdefault(" ".join(words), []).append(refusal.node)
    return sorted(groups.items(), key=lambda g: -len(g[1]))


def _or(names: Sequence[str]) -> str:
    return " or ".join(names)


def where(line: str) -> str:
    """A source line for people: from the package on for installed code, from the working directory on for their own."""
    _, found, inside = line.rpartition("site-packages/")
    if found:
        return inside
    path, _, number = line.rpartition(":")
    try:
        return f"{Path(path).relative_to(Path.cwd())}:{number}"
    except ValueError:
        return line


def _line(name: str, style: str, text: str) -> Text:
    return Text.assemble((name, style), "  " if text else "", text)
