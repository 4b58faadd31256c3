"""The full counts are committed: `make thorough` writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.support.histories import Machine

ROWS = json.loads((Path(__file__).parents[2] / "bench" / "results" / "thorough.json").read_text())


def test_thousands_of_histories_left_nothing_stale():
    """`make thorough` plays them."""
    (row,) = (r for r in ROWS if r["case"].startswith("stale values"))
    assert row["histories"] >= 3000 and row["value"] == 0
    assert re.fullmatch("[0-9a-f]{40}", row["commit"]), "made at a commit, with nothing changed beside it"


def test_reuse_happened_where_it_may_for_every_kind_of_move():
    shares = {r["case"].partition(": ")[2]: r["value"] for r in ROWS if r["case"].startswith("reuse")}
    assert {kind: share for kind, share in shares.items() if share < 0.95} == {}
    # windows that nothing tells apart are the one move in which nothing may be reused
    assert len(shares) >= len(Machine(0, []).moves()) - 1
