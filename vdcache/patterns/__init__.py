"""What a graph is made of, read off its structure: no name of a model, module or argument decides anything."""

from vdcache.patterns.anatomy import anatomy
from vdcache.patterns.facts import ATTENDS, KINDS, GraphAnalysis, Attention, Block, Branch, Conditioning, Grid, NoMatch, Span, Stream
from vdcache.patterns.index import Index
from vdcache.patterns.match import Match, Pattern

__all__ = [
    "ATTENDS",
    "KINDS",
    "GraphAnalysis",
    "Attention",
    "Block",
    "Branch",
    "Conditioning",
    "Grid",
    "Index",
    "Match",
    "NoMatch",
    "Pattern",
    "Span",
    "Stream",
    "anatomy",
]
