"""What a package says of itself: manifest.json. docs/package.md specifies it. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from vdcache.errors import ConfigError
from vdcache.util.json import from_plain

__all__ = [
    "FILE",
    "VERSION",
    "Cache",
    "FileFacts",
    "Graph",
    "LoopCall",
    "LoopSpec",
    "LoopStage",
    "Manifest",
    "ScheduledStep",
    "Value",
    "facts_of",
]

FILE = "manifest.json"
FORMAT, VERSION = "vdcache-package", 1
KINDS, FORMS = ("onnx", "pt2", "aoti"), ("plans", "single", "unrolled")


@dataclass(frozen=True)
class Value:
    """A tensor that goes in or comes out. `dtype` is numpy's name of it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Cache:
    """A tensor that is kept from one step to a later one, zeros at the beginning of a generation.

    Args:
        slot: the slot whose value it keeps; "#1", "#2" … where a predictor keeps several tensors.
    """

    name: str
    slot: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Graph:
    """One graph of fixed shapes without state.

    Args:
        file: its path in the package, with "/".
        plan: the groups of slots that it reuses; of a graph that serves several plans, None.
        inputs: all its inputs in order, weights that are inputs among them.
        outputs: all its outputs in order.
        reads: inputs that are given a cache.
        writes: outputs that become the new value of a cache once the graph has run.
        results: outputs that are the model's, in the model's order.
        numbers: 0-d inputs that every step gives, with their dtype.
        weights: inputs that are given a tensor of the weights file, by its name there; empty where the graph's file refers to it.
        operators: how often each operator occurs, functions included.
    """

    name: str
    file: str
    plan: tuple[str, ...] | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reads: Mapping[str, str]
    writes: Mapping[str, str]
    results: tuple[str, ...]
    numbers: Mapping[str, str]
    weights: Mapping[str, str] = field(default_factory=dict)
    operators: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduledStep:
    """What a denoising step runs.

    Args:
        graph: the name of a graph.
        plan: the groups of slots that it reuses.
        reused: the slots that it reuses.
        numbers: the values of the graph's 0-d inputs.
    """

    graph: str
    plan: tuple[str, ...]
    reused: tuple[str, ...]
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class LoopStage:
    """What the loop computes between two calls of the model; `file` is None where that is nothing."""

    file: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class LoopCall:
    """A call of the model in the loop.

    Args:
        inputs: from the model's inputs to values of the loop.
        outputs: what the model's results are called in the loop, in order.
    """

    step: int
    lane: int
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class LoopSpec:
    """The denoising loop around the model: stage 0, call 0, stage 1, call 1, …, the last stage. In the form `unrolled` one graph
    does all of that, and there are no stages."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    stages: tuple[LoopStage, ...]
    calls: tuple[LoopCall, ...]


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, repr=False)
class Manifest:
    """A package of version `version`.

    Args:
        kind: what its graphs are: "onnx", "pt2" or "aoti".
        form: "plans", a graph for every distinct plan; "single", one with the plan as an input; "unrolled", the whole loop.
        versions: of what made it.
        model: the class of the model.
        recipe: as `Recipe.to_json` writes it, or its text where it cannot be written.
        opset: of the ONNX operators; 0 where there are none.
        inputs, outputs: the model's.
        weights: the file that all graphs share.
        files: every file but the manifest.
    """

    kind: str
    form: str
    versions: Mapping[str, str]
    model: str
    recipe: str
    opset: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    caches: tuple[Cache, ...]
    graphs: tuple[Graph, ...]
    steps: tuple[ScheduledStep, ...]
    weights: str
    files: Mapping[str, FileFacts]
    loop: LoopSpec | None = None
    format: str = FORMAT
    version: int = VERSION

    def __repr__(self) -> str:
        computed = sum(not s.reused for s in self.steps)
        size = sum(f.bytes for f in self.files.values()) / 2**20
        steps = f"{len(self.steps)} steps ({computed} computed)"
        return f"<package of {self.model}: {self.kind} {self.form}, {len(self.graphs)} graphs for {steps}, {size:.1f} MiB>"

    def graph(self, name: str) -> Graph:
        return next(g for g in self.graphs if g.name == name)

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(folder: str | Path, *, hashes: bool = True) -> Manifest:
        """The manifest of a package, every file of which is there and is what the manifest says.

        Args:
            hashes: compare the files' contents with it, not only their sizes.

        Raises:
            ConfigError: no package, one of a later version, or one that was changed; the message names the file.
        """
        folder = Path(folder)
        path = folder / FILE
        if not path.is_file():
            raise ConfigError(f"{folder} is no package: it has no {FILE}; vdcache.export writes one")
        try:
            data = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ConfigError(f"{path} is no manifest of a package: its 'format' is not {FORMAT!r}")
        if (version := data.get("version")) != VERSION:
            raise ConfigError(
                f"{path} has version {version!r}, and this vdcache reads version {VERSION}: "
                "install the vdcache that wrote it (see 'versions' there), or export the model again"
            )
        try:
            found: Manifest = from_plain(Manifest, data, "manifest", complete=True)
        except ConfigError as error:
            raise ConfigError(f"{path} is not what version {VERSION} says: {error}") from error
        found._check(path)
        for name, facts in found.files.items():
            _check_file(folder, name, facts, path, hashes)
        return found

    def _check(self, path: Path) -> None:
        """References that lead nowhere."""
        if self.kind not in KINDS or self.form not in FORMS:
            raise ConfigError(
                f"{path}: kind {self.kind!r} in form {self.form!r}; there are {', '.join(KINDS)} and {', '.join(FORMS)}"
            )
        graphs, caches = {g.name: g for g in self.graphs}, {c.name for c in self.caches}
        for graph in self.graphs:
            if wrong := {*graph.reads.values(), *graph.writes.values()} - caches:
                raise ConfigError(f"{path}: the graph {graph.name!r} uses the cache {min(wrong)!r}, which is not listed")
            ends = (
                (graph.inputs, (*graph.reads, *graph.numbers, *graph.weights)),
                (graph.outputs, (*graph.writes, *graph.results)),
            )
            for known, used in ends:
                if lost := set(used) - set(known):
                    raise ConfigError(f"{path}: the graph {graph.name!r} has no input or output {min(lost)!r}")
        for number, step in enumerate(self.steps):
            if step.graph not in graphs:
                raise ConfigError(f"{path}: step {number} runs the graph {step.graph!r}, which is not listed")
            if set(graphs[step.graph].numbers) - set(step.numbers):
                raise ConfigError(f"{path}: step {number} does not give every number that the graph {step.graph!r} takes")
        named = {
            self.weights,
            *(g.file for g in self.graphs),
            *(s.file for s in (self.loop.stages if self.loop else ()) if s.file),
        }
        for name in sorted({*named, *self.files}):
            _inside(path, name)
        if unlisted := named - set(self.files):
            raise ConfigError(f"{path}: 'files' does not list {min(unlisted)!r}")


def _inside(manifest: Path, name: str) -> None:
    parts = PurePosixPath(name).parts
    if not name or "\\" in name or ":" in name or name.startswith("/") or ".." in parts:
        raise ConfigError(f"{manifest}: the file name {name!r} leaves the package's folder; this package is not to be trusted")


def _check_file(folder: Path, name: str, facts: FileFacts, manifest: Path, hashes: bool) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{path} is a link out of the package's folder; this package is not to be trusted")
    if not path.is_file():
        raise ConfigError(f"{path} is missing; {manifest} lists it: copy the package again, or export it again")
    if (size := path.stat().st_size) != facts.bytes:
        what = "truncated" if size < facts.bytes else "longer than it was"
        raise ConfigError(f"{path} is {what}: it has {size} bytes, {manifest} says {facts.bytes}; copy the package again")
    if hashes and (now := facts_of(path).sha256) != facts.sha256:
        raise ConfigError(f"{path} was changed: its SHA-256 is {now[:12]}…, {manifest} says {facts.sha256[:12]}…")


def facts_of(path: Path) -> FileFacts:
    """Size and hash of a file."""
    with path.open("rb") as file:
        return FileFacts(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
