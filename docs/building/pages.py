"""What mkdocs does beside building docs/*.md: pages made from files outside docs/, and fences that only tests read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]

# From a file of the repository to the page that shows it.
MADE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "repository/contributing.md",
    "CHANGELOG.md": "repository/changes.md",
    "examples/plugin/README.md": "repository/plugin.md",
    "docs/from_scratch.py": "repository/from_scratch.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
FENCE = re.compile(r"^(```\w+) no-run$", re.MULTILINE)
SECTION = re.compile(r"^# -+ (.+?) -+$", re.MULTILINE)
SHIM = re.compile(r'<script src="https://unpkg\.com/iframe-worker/shim"></script>')
FROM_NETWORK = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
WORKER = "assets/javascripts/search_worker.js"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of MADE, with links that lead to pages of the site."""
    for source, page in MADE.items():
        text = (ROOT / source).read_text()
        content = program(text) if source.endswith(".py") else with_site_links(text, source, page)
        files.append(File.generated(config, page, content=content))
    return files


def with_site_links(text: str, source: str, page: str) -> str:
    return LINK.sub(lambda m: site_link(m[1], source, page), text)


def site_link(link: str, source: str, page: str) -> str:
    """A link of a file in the repository, as a link of the page that shows the file."""
    target = normpath(join(dirname(source), link))
    if target not in MADE and not target.startswith("docs/"):
        raise PluginError(f"{source} links to {link}, which is not on the site: name its page in {Path(__file__).name}")
    return relpath(MADE.get(target, target.removeprefix("docs/")), dirname(page) or ".")


def program(text: str) -> str:
    """A Python file as a page: its docstring, then its sections, each with the comment that introduces it above its code."""
    docstring, rest = text.removeprefix('"""').split('"""\n', 1)
    title, _, introduction = docstring.partition(":")
    introduction = introduction.strip()
    start, *sections = SECTION.split(rest)
    page = [f"# {title}", introduction[:1].upper() + introduction[1:], fenced(start)]
    for heading, section in zip(sections[::2], sections[1::2]):
        lines = section.lstrip("\n").splitlines()
        comments = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
        page += [
            f"## {heading}",
            "\n".join(line.lstrip("# ") for line in lines[:comments]),
            fenced("\n".join(lines[comments:])),
        ]
    return "\n\n".join(page)


def fenced(code: str) -> str:
    return f"```python\n{code.strip()}\n```" if code.strip() else ""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Take the mark off examples that the tests leave out."""
    return FENCE.sub(r"\1", markdown)


# The theme searches in a worker. A browser starts none from a file, and the theme would load a replacement from the network:
# the site brings its own, a worker from the text of the theme's script.


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Load the site's own replacement, and nothing from the network."""
    output = SHIM.sub(f'<script src="{relpath(WORKER, dirname(page.url) or ".")}"></script>', output)
    return checked(output, page.url)


def on_post_template(output: str, *, template_name: str, **_: Any) -> str:
    """The page for links that lead nowhere searches nothing."""
    return checked(SHIM.sub("", output), template_name)


def checked(output: str, name: str) -> str:
    if found := FROM_NETWORK.search(output):
        raise PluginError(f"{name} would load {found[0]} from the network")
    return output


def on_post_build(config: Any) -> None:
    site = Path(config.site_dir)
    (script,) = (site / "assets/javascripts/workers").glob("search.*.js")
    source = script.read_text().partition("\n//# sourceMappingURL")[0]
    (site / WORKER).write_text(
        f"""const SEARCH = {json.dumps(source)};
if (location.protocol === "file:") {{
  const Started = window.Worker;
  window.Worker = function () {{
    return new Started(URL.createObjectURL(new Blob([SEARCH], {{type: "text/javascript"}})));
  }};
}}
"""
    )
