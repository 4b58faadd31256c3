"""Words that this project no longer uses, and what stands in their place: `make lint` runs this file.

Only words that are wrong wherever they stand are listed; docs/glossary.md says which terms are right.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = {
    r"\b[Aa]natomy\b": "analysis",
    r"\btrunk\b": "all blocks",
    r"\bclock candidates?\b": "timestep input",
    r"\bmade_by\b": "provenance",
    r"\blive_nodes\b": "backward_slice",
    r"\bin_a_row\b": "max_consecutive",
    r"\bin_all\b": "max_total",
    r"\bunheard\b": "unused",
    r"\bput_guard\b": "put_cache_guard",
    r"\b(Listed|Planned|Together|Windowed|Bursts|Gated)\(": "the name in vdcache/util/renamed.py",
    r"\bdialect\.guards?\b": "dialect.cache_guard(s)",
    r"\ba residual joins?\b": "residual add",
    r"\bsaid once\b": "vdcache warns once",
}
LEFT_ALONE = {"vdcache/util/renamed.py", "tests/support/words.py", "CHANGELOG.md", "tests/test_renamed.py"}


def findings() -> list[str]:
    """file:line: word, and what to write instead."""
    files = [
        p
        for d in ("vdcache", "tests", "docs", "bench", "examples")
        for p in (ROOT / d).rglob("*")
        if p.suffix in (".py", ".md", ".j2")
    ]
    found = []
    for path in sorted([*files, *ROOT.glob("*.md")]):
        name = str(path.relative_to(ROOT))
        if name in LEFT_ALONE or "results" in path.parts:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found += [
                f"{name}:{number}: {m.group()!r}; write {new!r}" for old, new in WORDS.items() for m in re.finditer(old, line)
            ]
    return found


if __name__ == "__main__":
    lines = findings()
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.exit(bool(lines))
