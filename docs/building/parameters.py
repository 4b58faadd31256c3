"""Docstrings of vdcache may describe several parameters in one line (`height, width: of a frame`). The site lists each of them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

SEVERAL = re.compile(r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): (?P<rest>.*)$")


class Parameters(Extension):
    """Repeats a description for every parameter that it is given for."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = one_each(obj.docstring.value)


def one_each(text: str) -> str:
    lines: list[str] = []
    source = text.splitlines()
    for at, line in enumerate(source):
        found = SEVERAL.match(line)
        if found is None:
            lines.append(line)
            continue
        indent = found["indent"]
        more = []  # the lines that continue the description
        for further in source[at + 1 :]:
            if not further.startswith(indent + " "):
                break
            more.append(further)
        *first, last = found["names"].split(", ")
        for name in first:
            lines += [f"{indent}{name}: {found['rest']}", *more]
        lines.append(f"{indent}{last}: {found['rest']}")
    return "\n".join(lines)
