"""The report of `vdcache.explain`, as it prints and shows itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdcache.explanation.data import GraphFacts, ReportData, Slot, VariantCost
from vdcache.explanation.page import fragment, page
from vdcache.explanation.tree import plain, tree

__all__ = ["GraphFacts", "Report", "Slot", "VariantCost"]


@dataclass(frozen=True, repr=False)
class Report(ReportData):
    """What `vdcache.explain` found. Prints as a tree, shows itself in notebooks, writes itself as a page."""

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one page that needs nothing else; written to `path` where one is given.

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
