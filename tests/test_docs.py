"""The documentation runs: every python block of docs/ and README is executed, and prints what the text after it says."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
TABLES = {"architecture.md", "benchmarks.md", "glossary.md"}  # pages without an example
PAGES = [*(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in TABLES), ROOT / "README.md"]
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
                exec(compile(code, page.name, "exec", dont_inherit=True), scope)  # the page itself is what is tested
            printed, ran = out.getvalue(), ran + 1
        elif ran:
            assert printed.strip() == code.strip()
    assert ran, f"{page.name} has no example"


MARK = "<!-- made from the passes"


def test_the_page_of_passes_is_what_the_passes_say():
    from vdcache.passes.catalogue import page

    path = ROOT / "docs" / "passes.md"
    head, _, rest = path.read_text().partition(MARK)
    line, _, found = rest.partition("\n\n")
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(f"{head}{MARK}{line}\n\n{page()}")
    else:
        assert found == page(), "EXPECTTEST_ACCEPT=1 python -m pytest tests/test_docs.py writes it"


def test_every_option_of_a_pass_is_documented():
    from vdcache.passes.catalogue import catalogue, documented_options

    for entry in catalogue():
        assert entry.sentence and entry.more, entry.name
        assert {o.name.replace("-", "_") for o in entry.options} == set(documented_options(entry.kind)), entry.name


def test_the_page_of_the_graph_names_every_fact_and_every_dialect_node():
    from vdcache.ir.dialect import FUNCTIONS
    from vdcache.ir.dump import DTYPES
    from vdcache.ir.facts import FACTS

    text = (ROOT / "docs" / "ir.md").read_text()
    for fact in FACTS:
        assert f"| {fact.name} |" in text
    for name in (*FUNCTIONS, "tile_attention", "attention_received"):
        assert f"`{name}(" in text or f"vdcache.{name}(" in text, name
    for name in DTYPES:
        assert name in text


QUOTED = re.compile(r"^\| \"(.+?)\" \|", re.MULTILINE)


def literals() -> list[str]:
    """The texts in vdcache's sources, with … for what is filled in."""
    found = []
    for path in sorted((ROOT / "vdcache").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_in_the_table_of_symptoms_is_one():
    """What a person reads in a warning and looks for in the page: its words, with … or a number for what is filled in."""
    quotes = QUOTED.findall((ROOT / "docs" / "using.md").read_text())
    there = [re.sub(r"[\d.]+", "…", text) for text in literals()]
    assert len(quotes) >= 10
    assert not [q for q in quotes if not any(map(re.compile(_pattern(q)).search, there))]


def _pattern(quote: str) -> str:
    """A quoted message, with anything in the place of what is filled in."""
    parts = re.split(r"\s*(?:…|[\d.]+)\s*", quote)
    return ".*".join(map(re.escape, parts))


def test_from_scratch():
    """vdcache in some 300 lines: every section checks itself."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "from_scratch.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "8 residual branches" in done.stdout and "6 of 20 steps computed" in done.stdout


def test_the_fields_of_the_patterns():
    """`python -m tests.test_docs` writes them."""
    text = (ROOT / "docs" / "ir.md").read_text()
    assert fields_of_patterns() == text.partition("<!-- fields -->\n")[2].partition("<!-- end of fields -->")[0]


def fields_of_patterns() -> str:
    from vdcache import patterns as p
    from vdcache.passes.catalogue import fields_page

    return fields_page(
        p.GraphAnalysis, p.Branch, p.Attention, p.Block, p.Stream, p.Span, p.Grid, p.Conditioning, p.Match, p.Refusal
    )


def pages_of(entry) -> list[str]:
    """The pages that a part of the site's navigation names."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages_of(part)]


def test_the_navigation_of_the_site_names_every_page():
    """Pages that `docs/building/pages.py` makes from other files are named there; they are start and `repository/`."""
    named = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    made = [page for page in named if page == "index.md" or page.startswith("repository/")]
    building = (ROOT / "docs" / "building" / "pages.py").read_text()
    assert all(f'"{page}"' in building for page in made)
    there = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(named) == sorted(there + made)


REFERENCE = re.compile(r"^::: (\S+)\n(?:    options:\n((?:      .*\n)+))?", re.MULTILINE)


def test_the_api_reference_shows_every_public_name():
    import importlib

    shown: set[str] = set()
    for path in (ROOT / "docs" / "api").glob("*.md"):
        for name, text in REFERENCE.findall(path.read_text()):
            options = yaml.safe_load(text) or {}
            shown |= {name, options.get("heading", name), *(f"{name}.{member}" for member in options.get("members", ()))}
    for module in ("", ".masks", ".methods", ".policies", ".predictors", ".errors", ".testing", ".calibration"):
        names = [f"{module}.{name}" for name in importlib.import_module(f"vdcache{module}").__all__ if name != "__version__"]
        missing = [n for n in names if f"vdcache{n}" not in shown and f"vdcache.{n.rpartition('.')[2]}" not in shown]
        assert not missing


def test_the_page_of_the_command_line_names_every_command():
    from typer.main import get_command

    from vdcache.cli.main import app

    named = re.findall(r"^\| `vdcache (\w+)` \|", (ROOT / "docs" / "api" / "command_line.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(get_command(app).commands)


if __name__ == "__main__":
    page = ROOT / "docs" / "ir.md"
    before, _, rest = page.read_text().partition("<!-- fields -->\n")
    page.write_text(
        f"{before}<!-- fields -->\n{fields_of_patterns()}<!-- end of fields -->{rest.partition('<!-- end of fields -->')[2]}"
    )
