"""What the patterns say: frozen values that name nodes and never hold them, so that they outlive copies of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = [
    "ATTENDS",
    "KINDS",
    "Attention",
    "Block",
    "Branch",
    "Conditioning",
    "GraphAnalysis",
    "Grid",
    "Refusal",
    "Span",
    "Stream",
]

ATTENDS = ("self-attention", "joint-attention", "fused")  # kinds of branches that attend over the stream's own tokens
KINDS = ("self-attention", "cross-attention", "joint-attention", "mlp", "fused", "other")


@dataclass(frozen=True, init=False)
class Refusal:
    """Why a node is not what a pattern looks for, or not rewritten by a pass: no error, the graph stays as it is. Falsy.

    Args:
        node: its name.
        reasons: each the rest of a sentence about the node.
        graph: which graph of the forward, counted from 0.
        depth: how many lines of a `Pattern` had been found.
    """

    node: str
    reasons: tuple[str, ...]
    graph: int = 0
    depth: int = 0

    def __init__(self, node: str, *reasons: str, graph: int = 0, depth: int = 0) -> None:
        for name, value in (("node", node), ("reasons", reasons), ("graph", graph), ("depth", depth)):
            object.__setattr__(self, name, value)

    @property
    def reason(self) -> str:
        """All reasons in one line."""
        return "; ".join(self.reasons)

    def of_graph(self, number: int) -> Refusal:
        """The same in this graph of the forward."""
        return Refusal(self.node, *self.reasons, graph=number, depth=self.depth)

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return (
            f"{self.node}: {self.reason}"
            if len(self.reasons) < 2
            else f"{self.node}:" + "".join(f"\n  {r}" for r in self.reasons)
        )


@dataclass(frozen=True)
class Grid:
    """Latent positions that the video tokens stand for, after the patch embedding.

    Args:
        frames, height, width: in latent pixels over the patch size.
    """

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Span:
    """Some tokens of a sequence.

    Args:
        role: as in `Stream`.
        start, stop: the first token, and the one behind the last.
    """

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Stream:
    """A tensor that blocks keep adding to.

    Args:
        index: counted from 0 in the order of first residual adds.
        role: "latent" (its tokens come back as an output), "text" (any other condition: text, an image, a reference), "joint"
            (both in one sequence), or "constant".
        shape: of the first sum; None where a size is a symbol.
        dtype: of the first sum.
        inputs: the inputs that its start is computed from.
        start: the value that the first branch is added to.
        residual_adds: the sums, in order.
        spans: which tokens are which, where the stream starts as a concatenation.
        parents: streams whose tokens it goes on with: a concatenation of several, or parts of one.
        graph: which graph of the forward, counted from 0.
    """

    index: int
    role: str
    shape: tuple[int | None, ...]
    dtype: str
    inputs: tuple[str, ...]
    start: str
    residual_adds: tuple[str, ...] = field(repr=False)
    spans: tuple[Span, ...] = ()
    parents: tuple[int, ...] = ()
    graph: int = 0


@dataclass(frozen=True)
class Block:
    """A block: branches that belong together.

    Args:
        index: counted from 0 over the graph.
        shape: blocks of one shape are the same graph with other weights; shapes are counted from 0.
        branches: names of its branches, in order.
        graph: which graph of the forward, counted from 0.
    """

    index: int
    shape: int
    branches: tuple[str, ...]
    graph: int = 0


@dataclass(frozen=True)
class Conditioning:
    """What the nodes outside the streams depend on.

    Args:
        timestep_inputs: inputs with a path into a sinusoidal embedding that feeds a layer: the timestep is one of them.
        timestep: nodes that depend on timestep inputs and parameters alone: they are the same for every lane of a step.
        text: nodes that depend on other inputs than timestep inputs and latents: they never change during a generation.
        constant: nodes that depend on parameters alone: they never change.
    """

    timestep_inputs: tuple[str, ...]
    timestep: tuple[str, ...] = field(repr=False)
    text: tuple[str, ...] = field(repr=False)
    constant: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Attention:
    """One attention operation.

    Args:
        node: the one that computes it.
        kind: "self" (queries and keys from one stream), "cross" (keys from elsewhere) or "joint" (tokens of several
            streams attend to each other).
        layout: what a sequence runs over: "spatial", "temporal", "full" or "unknown".
        heads, q_len, kv_len, head_dim: None where the graph does not fix them.
        form: how it is written: "sdpa", "flex", "matmul-softmax", "matmul" (scores with another normaliser), "linear"
            (keys and values are multiplied first), "tiles" (vdcache's own, under a mask) or "custom" (another library's kernel).
        spans: where tokens of which role lie in the sequence of keys; empty where all are of one role.
        grid: what the video tokens stand for, where the graph shows it.
    """

    node: str
    kind: str
    layout: str
    heads: int | None
    q_len: int | None
    kv_len: int | None
    head_dim: int | None
    form: str = "sdpa"
    spans: tuple[Span, ...] = ()
    grid: Grid | None = None


@dataclass(frozen=True)
class Branch:
    """One residual contribution: `residual_add = base + contribution`.

    Args:
        kind: "self-attention", "cross-attention", "joint-attention" (tokens of several streams), "mlp", "fused" (attention and MLP in
            one contribution) or "other".
        stream: which residual stream, counted from 0 in the order of their first residual adds.
        block: which block of the graph, counted from 0 (`GraphAnalysis.blocks`).
        layout: layout of its self- or joint-attention, "" without one.
        residual_add: the node that adds.
        base: the operand of `residual_add` that carries the stream.
        source: the value of the stream that the branch reads; `base` is this, seen through casts, views and residual adds.
        contribution: the other operand (post-gate); None where the residual add computes gate and sum at once (addcmul).
        pre_gate: the value before its gate, where a gate that does not depend on the stream is the last step.
        nodes: everything between `source` and `contribution`, the contribution with it.
        attentions: those inside.
        leaks: nodes inside that something outside reads (they stay computed when the branch is reused).
        flops: of everything that only this branch needs, text projections of a cross-attention included; what several branches
            share (one joint attention) is divided among them.
        bytes: of the value that a slot on it keeps.
        module: where it stands in the user's model; for messages only.
        line: the user's source line of its last real work; for messages only.
        graph: which graph of the forward, counted from 0.
    """

    kind: str
    stream: int
    block: int
    layout: str
    residual_add: str
    base: str
    source: str
    contribution: str | None
    pre_gate: str | None
    nodes: tuple[str, ...] = field(repr=False)
    attentions: tuple[Attention, ...] = ()
    leaks: tuple[str, ...] = ()
    flops: int = 0
    bytes: int = 0
    module: str = ""
    line: str = ""
    graph: int = 0

    @property
    def gate(self) -> tuple[str | None, str | None]:
        """The nodes before and after the gate; the first is None where no gate is the last step."""
        return self.pre_gate, self.contribution

    @property
    def name(self) -> str:
        """A name that is stable over retracing: stream, block and kind."""
        layout = f"{self.layout}-" if self.layout in ("spatial", "temporal") else ""
        return f"s{self.stream}.b{self.block}.{layout}{self.kind}"


@dataclass(frozen=True)
class GraphAnalysis:
    """Everything found in one graph.

    Args:
        branches: residual contributions, in order.
        streams, blocks: in order.
        attentions: in order, each once, in however many branches it lies.
        conditioning: what the nodes outside the streams depend on.
        timestep_inputs: inputs with a path into a sinusoidal embedding that feeds a layer: the timestep is one of them.
        latent: the input that the denoising loop updates, "" where none was found.
        latents: every input that comes back as an output of the same shape (two for video with sound).
        grid: latent frames, height and width, where the graph shows them.
        refusals: every candidate that is not a branch, with the reason.
        flops: of the whole graph.
        covered: of them, those that a step which reuses every branch leaves out.
    """

    branches: tuple[Branch, ...]
    timestep_inputs: tuple[str, ...]
    latent: str
    grid: Grid | None
    refusals: tuple[Refusal, ...]
    streams: tuple[Stream, ...] = ()
    blocks: tuple[Block, ...] = ()
    attentions: tuple[Attention, ...] = ()
    conditioning: Conditioning = field(default_factory=lambda: Conditioning((), (), (), ()))
    latents: tuple[str, ...] = ()
    flops: int = 0
    covered: int = 0

    def __iter__(self) -> Iterator[Branch]:
        return iter(self.branches)

    @property
    def coverage(self) -> float:
        """Share of the FLOPs that a step which reuses every branch leaves out, 0 to 1."""
        return self.covered / self.flops if self.flops else 0.0

    def denoising_blocks(self, of: str = "") -> tuple[Block, ...]:
        """The blocks that attend over video tokens, in order: what the papers count as the blocks of a model. Those of a text
        refiner, and residual layers without attention, are not among them.

        Args:
            of: "single" for those that keep one stream, "double" for those in which several streams attend to each other (MMDiT),
                empty for both.
        """
        found = []
        for block in self.blocks:
            own = [b for b in self.branches if b.block == block.index and b.graph == block.graph]
            attends = [a for b in own for a in b.attentions if a.kind != "cross"]
            roles = {self.streams[b.stream].role for b in own}
            double = any(a.kind == "joint" for a in attends)
            if attends and roles & {"latent", "joint"} and of in ("", "double" if double else "single"):
                found.append(block)
        return tuple(found)

    def denoising_attentions(self) -> tuple[tuple[Branch, Attention], ...]:
        """Self- and joint-attentions of the denoising blocks, each with its first branch, in order."""
        blocks = {(b.index, b.graph) for b in self.denoising_blocks()}
        seen: dict[tuple[str, int], tuple[Branch, Attention]] = {}
        for branch in self.branches:
            if (branch.block, branch.graph) in blocks:
                for attention in branch.attentions:
                    if attention.kind != "cross":
                        seen.setdefault((attention.node, branch.graph), (branch, attention))
        return tuple(seen.values())

    def count(self) -> dict[str, int]:
        """How many branches of each kind there are."""
        kinds = [b.kind for b in self.branches]
        return {k: kinds.count(k) for k in KINDS if k in kinds}
