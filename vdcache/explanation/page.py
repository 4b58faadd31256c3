"""The report as a page: one file, no network."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

import vdcache
from vdcache.explanation import picture
from vdcache.explanation.data import GraphFacts, ReportData
from vdcache.explanation.tree import amount, reasons, shares, size, where
from vdcache.patterns import Block, Branch

__all__ = ["fragment", "page"]


def page(report: ReportData) -> str:
    """A whole HTML document."""
    return _render("page.html.j2", report)


def fragment(report: ReportData) -> str:
    """What a notebook shows: the same without the document around it."""
    return _render("report.html.j2", report)


def _render(template: str, report: ReportData) -> str:
    files = resources.files("vdcache.explanation")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=_Files(files)
    )
    return environment.get_template(template).render(
        report=report,
        version=vdcache.__version__,
        graphs=[_graph(report, g) for g in report.graphs],
        legend=picture.legend(report),
        shares=shares(report),
        amount=amount,
        size=size,
        where=where,
        breaks=() if any(g.ends for g in report.graphs) else [b.splitlines()[0] for b in report.breaks],
        recipe_reasons=reasons(report.recipe_refusals),
        computed=sum(not plan for plan in report.schedule),
        **_texts(files),
    )


def _texts(files: Any) -> dict[str, Any]:
    from markupsafe import Markup

    return {"style": Markup((files / "page.css").read_text()), "script": Markup((files / "page.js").read_text())}


def _Files(files: Any) -> Any:
    from jinja2 import FunctionLoader

    return FunctionLoader(lambda name: (files / name).read_text())


def _graph(report: ReportData, graph: GraphFacts) -> dict[str, Any]:
    """What the template needs of one graph."""
    from markupsafe import Markup

    facts = graph.analysis
    if facts is None:
        return {"facts": graph, "analysis": None}
    slots = [s for s in report.slots if s.graph == graph.index]
    shapes: dict[int, list[Block]] = {}
    for block in facts.blocks:
        shapes.setdefault(block.shape, []).append(block)
    largest = max((b.flops for b in facts.branches), default=1)
    return {
        "facts": graph,
        "analysis": facts,
        "house": Markup(picture.house(facts, slots)),
        "shapes": [_shape(blocks, facts.branches, largest) for blocks in shapes.values()],
        "refusals": reasons(facts.refusals),
        "loose": [a for a in facts.attentions if not any(a in b.attentions for b in facts.branches)],
    }


def _shape(blocks: list[Block], branches: tuple[Branch, ...], largest: int) -> dict[str, Any]:
    """One card: the blocks of one shape, and the branches of the first of them."""
    from markupsafe import Markup

    own = [b for b in branches if b.block == blocks[0].index]
    return {
        "blocks": _ranges([b.index for b in blocks]),
        "times": len(blocks),
        "rows": [
            {
                "branch": b,
                "square": Markup(picture.square(b, largest)),
                "tiles": [Markup(picture.attention_tile(a)) for a in b.attentions],
                "attentions": b.attentions,
            }
            for b in own
        ],
    }


def _ranges(numbers: list[int]) -> str:
    """0–3, 5, 7–9"""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in parts)
