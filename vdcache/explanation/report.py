"""The report of `vdcache.explain`, as it prints and shows itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdcache.explanation.data import CacheCost, GraphFacts, HeldValues, ReportData, Slot, VariantCost
from vdcache.explanation.page import fragment, page
from vdcache.explanation.tree import plain, tree

__all__ = ["CacheCost", "GraphFacts", "HeldValues", "Report", "Slot", "VariantCost"]


@dataclass(frozen=True, repr=False)
class Report(ReportData):
    """The result of `vdcache.explain`. It prints as a tree, shows itself in notebooks, and writes itself as a page."""

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one HTML page that needs no other file and no network.

        Args:
            path: a file to write the page to. Default: none; the page is only returned.

        Raises:
            ImportError: jinja2 is not installed.
        """
        text = page(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        return fragment(self)

    def __rich__(self) -> Any:
        return tree(self)

    def __str__(self) -> str:
        return plain(self)
