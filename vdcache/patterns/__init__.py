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
    NoMatch,
    Span,
    Stream,
)
from vdcache.patterns.index import Index
from vdcache.patterns.match import Match, Pattern

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
    "NoMatch",
    "Pattern",
    "Span",
    "Stream",
    "analyze",
]
