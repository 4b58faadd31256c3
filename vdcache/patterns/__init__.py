"""What a graph is made of, read off its structure: no name of a model, module or argument decides anything."""

from vdcache.patterns.analysis import analyze
from vdcache.patterns.facts import (
    ATTENDS,
    KINDS,
    Attention,
    Block,
    Branch,
    Conditioning,
    GraphAnalysis,
    Grid,
    Refusal,
    Span,
    Stream,
)
from vdcache.patterns.index import Index
from vdcache.patterns.match import Match, Pattern
from vdcache.util import renamed

__all__ = [
    "ATTENDS",
    "KINDS",
    "Attention",
    "Block",
    "Branch",
    "Conditioning",
    "GraphAnalysis",
    "Grid",
    "Index",
    "Match",
    "Pattern",
    "Refusal",
    "Span",
    "Stream",
    "analyze",
]


def __getattr__(name: str) -> object:
    if name == "NoMatch":
        return renamed.moved_name(name, __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
