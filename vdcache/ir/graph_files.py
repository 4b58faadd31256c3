"""Graphs in files: the text, with its pipeline as a comment, and large constants beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from vdcache.errors import ConfigError
from vdcache.ir.dump import SHOWN, attribute, dump
from vdcache.ir.parse import parse

__all__ = ["Saved", "load_graph", "read_graph", "save_graph"]


@dataclass(frozen=True)
class Saved:
    """A graph from a file, and the pipeline that the file names ("" for none)."""

    graph: fx.GraphModule
    pipeline: str = ""


def save_graph(path: Path, graph: fx.GraphModule, *, comment: str = "", pipeline: str = "") -> None:
    """Write the text of a graph. Constants that the text does not hold go to a `.safetensors` file of the same name."""
    head = [f"# {line}" for line in comment.splitlines()]
    if pipeline:
        head.append(f"# pipeline: {pipeline}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*head, dump(graph), ""]))
    if large := _large_constants(graph):
        from safetensors.torch import save_file

        save_file(large, path.with_suffix(".safetensors"))


def load_graph(path: Path) -> Saved:
    """Read what `save_graph` wrote, or a text written by hand.

    Raises:
        ConfigError: the file is not there, or holds no graph.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"there is no text of a graph at {path}: {error}") from error
    constants: dict[str, torch.Tensor] = {}
    if (beside := path.with_suffix(".safetensors")).exists():
        from safetensors.torch import load_file

        constants = load_file(beside)
    return read_graph(text, constants)


def read_graph(text: str, constants: Mapping[str, torch.Tensor] | None = None) -> Saved:
    """The graph and the pipeline of a text.

    Args:
        constants: the large ones, which a text does not hold, by name.

    Raises:
        ConfigError: it holds no graph.
    """
    found = re.search(r"^# pipeline: (.+)$", text, re.MULTILINE)
    return Saved(parse(text, dict(constants or {})), found[1].strip() if found else "")


def _large_constants(graph: fx.GraphModule) -> dict[str, torch.Tensor]:
    found = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        held = attribute(graph, str(node.target))
        if (
            isinstance(held, torch.Tensor)
            and type(held) in (torch.Tensor, torch.nn.Parameter)
            and held.numel() > SHOWN
            and held.device.type != "meta"
        ):
            found[str(node.target)] = held.detach().contiguous().clone()
    return found
