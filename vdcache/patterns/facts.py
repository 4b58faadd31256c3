"""What the patterns say: frozen values that name nodes and never hold them, so that they outlive copies of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["KINDS", "Anatomy", "Attention", "Branch", "Grid", "NoMatch"]

KINDS = ("self-attention", "cross-attention", "joint-attention", "mlp", "fused", "other")


@dataclass(frozen=True)
class NoMatch:
    """Why a node is not what a pattern looks for. Falsy."""

    node: str
    reason: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


@dataclass(frozen=True)
class Grid:
    """Latent positions that the video tokens stand for, after the patch embedding: frames × height × width."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Attention:
    """One attention operation.

    `kind` is "self" (queries and keys from one stream), "cross" (keys from elsewhere) or "joint" (tokens of several
    streams attend to each other). `layout` says what a sequence runs over: "spatial", "temporal", "full" or "unknown".
    Lengths are None where the graph does not fix them.
    """

    node: str
    kind: str
    layout: str
    heads: int | None
    q_len: int | None
    kv_len: int | None
    head_dim: int | None


@dataclass(frozen=True)
class Branch:
    """One residual contribution: `join = base + contribution`.

    Args:
        kind: one of `KINDS`.
        stream: which residual stream, counted from 0 in the order of their first joins.
        block: which block of its stream, counted from 0.
        layout: layout of its self- or joint-attention, "" without one.
        join: the node that adds.
        base: the operand of `join` that carries the stream.
        source: the value of the stream that the branch reads; `base` is this, seen through casts, views and joins.
        contribution: the other operand (post-gate); None where the join computes gate and sum at once (addcmul).
        pre_gate: the value before its gate, where a gate that does not depend on the stream is the last step.
        nodes: everything between `source` and `contribution`.
        leaks: nodes inside that something outside reads (they stay computed when the branch is reused).
        module: where it stands in the user's model; for messages only.
    """

    kind: str
    stream: int
    block: int
    layout: str
    join: str
    base: str
    source: str
    contribution: str | None
    pre_gate: str | None
    nodes: tuple[str, ...] = field(repr=False)
    attentions: tuple[Attention, ...] = ()
    leaks: tuple[str, ...] = ()
    module: str = ""

    @property
    def name(self) -> str:
        """A name that is stable over retracing: stream, block and kind."""
        layout = f"{self.layout}-" if self.layout in ("spatial", "temporal") else ""
        return f"s{self.stream}.b{self.block}.{layout}{self.kind}"


@dataclass(frozen=True)
class Anatomy:
    """Everything found in one graph.

    Args:
        clocks: inputs with a path into a sinusoidal embedding that feeds a layer: the timestep is one of them.
        latent: the input that the denoising loop updates, "" where none was found.
        grid: latent frames, height and width, where the graph shows them.
        refusals: every candidate that is not a branch, with the reason.
    """

    branches: tuple[Branch, ...]
    clocks: tuple[str, ...]
    latent: str
    grid: Grid | None
    refusals: tuple[NoMatch, ...]

    def __iter__(self) -> Iterator[Branch]:
        return iter(self.branches)

    def count(self) -> dict[str, int]:
        """How many branches of each kind there are."""
        kinds = [b.kind for b in self.branches]
        return {k: kinds.count(k) for k in KINDS if k in kinds}
