"""The documentation runs: every python block of docs/ and README is executed, and prints what the text after it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
BLOCK = re.compile(r"```(python|text)( no-run)?\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore::vdcache.VdcacheWarning")
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    scope: dict = {"__name__": "__docs__"}
    printed, ran = "", 0
    for kind, skipped, code in BLOCK.findall(page.read_text()):
        if skipped:
            continue
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, page.name, "exec"), scope)  # the page itself is what is tested
            printed, ran = out.getvalue(), ran + 1
        elif ran:
            assert printed.strip() == code.strip()
    assert ran, f"{page.name} has no example"
