"""What a graph is made of, read off its structure: no name of a model, module or argument decides anything."""

from vdcache.patterns.anatomy import anatomy
from vdcache.patterns.facts import KINDS, Anatomy, Attention, Branch, Grid, NoMatch
from vdcache.patterns.index import Index

__all__ = ["KINDS", "Anatomy", "Attention", "Branch", "Grid", "Index", "NoMatch", "anatomy"]
