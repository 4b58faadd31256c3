"""Residual streams: chains of residual adds, what each began as, and which tokens of a sequence come from which."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from vdcache.ir.ops import tensor_of
from vdcache.patterns.facts import Span, Stream
from vdcache.patterns.index import Index
from vdcache.patterns.residual import ResidualAdd, residual_adds_behind, value_preserving_inputs

__all__ = ["Streams"]

aten = torch.ops.aten


class Streams:
    """The streams of one graph.

    A residual add belongs to the stream of the residual add that it adds to. One that adds to a concatenation of several begins a stream of
    its own, whose tokens are known by the pieces.

    Args:
        latents: mask of the activations that come back as outputs.
        conditioning: mask of the timestep candidates.
    """

    def __init__(self, index: Index, residual_adds: Sequence[ResidualAdd], latents: int, conditioning: int) -> None:
        self._index, self._latents, self._conditioning = index, latents, conditioning
        self.of: dict[fx.Node, int] = {}  # residual add -> stream
        self.starts: list[ResidualAdd] = []
        self.residual_adds: list[list[ResidualAdd]] = []
        self._parents: list[tuple[int, ...]] = []
        known: dict[fx.Node, ResidualAdd] = {}
        for residual_add in residual_adds:
            before = {self.of[j] for j in residual_adds_behind(residual_add.base, known)}
            if len(before) == 1:
                stream = before.pop()
            else:
                stream = len(self.starts)
                self.starts.append(residual_add)
                self.residual_adds.append([])
                self._parents.append(tuple(sorted(before)))
            self.of[residual_add.node] = stream
            self.residual_adds[stream].append(residual_add)
            known[residual_add.node] = residual_add
        self._values: dict[fx.Node, int] = {}  # any value of a stream -> the stream
        for residual_add in residual_adds:
            self._values[residual_add.node] = self.of[residual_add.node]
        for stream, start in enumerate(self.starts):
            self._values.setdefault(start.base, stream)
            self._values.setdefault(start.source, stream)
        self._roles: list[str] = []
        for stream in range(len(self.starts)):
            self._roles.append(self._role_of_start(stream))

    def _role_of_start(self, stream: int) -> str:
        start = self.starts[stream]
        if before := self._parents[stream]:
            roles = {self._roles[s] for s in before}
            return roles.pop() if len(roles) == 1 else "joint"
        return self._role(self._index.inputs_of(self._piece(start.base) or start.base))

    def _piece(self, base: fx.Node) -> fx.Node | None:
        """Where `base` is a slice of a concatenation along the sequence: the piece that it was cut out of."""
        value = tensor_of(base)
        if value is None or value.ndim != 3 or not isinstance(length := value.shape[1], int):
            return None
        at, start = base, 0
        for _ in range(32):
            if at.target is aten.slice.Tensor and len(at.args) > 2 and at.args[1] == 1 and isinstance(at.args[2], int):
                start += at.args[2]
                at = at.args[0]  # type: ignore[assignment]
            elif at.target is aten.cat.default:
                offset = 0
                for piece in at.args[0]:  # type: ignore[union-attr]
                    x = tensor_of(piece)
                    if x is None or x.ndim != 3 or not isinstance(size := x.shape[1], int):
                        return None
                    if offset <= start and start + length <= offset + size:
                        return piece  # type: ignore[return-value]
                    offset += size
                return None
            else:
                above = [p for p in value_preserving_inputs(at) if self._index.inputs_of(p)]
                if len(above) != 1:
                    return None
                at = above[0]
        return None

    def _role(self, inputs: int) -> str:
        inputs &= ~self._conditioning
        if inputs & self._latents:
            return "joint" if inputs & ~self._latents and not self._one_sequence(inputs) else "latent"
        return "text" if inputs else "constant"

    def _one_sequence(self, inputs: int) -> bool:
        """Whether what else enters the start is no sequence of tokens of its own (a pooled vector, positions, a class)."""
        return not any(
            inputs >> i & 1 and not self._latents >> i & 1 and (v := tensor_of(a)) is not None and v.ndim >= 3
            for i, a in enumerate(self._index.activations)
        )

    def facts(self) -> tuple[Stream, ...]:
        found = []
        for number, (start, residual_adds) in enumerate(zip(self.starts, self.residual_adds, strict=True)):
            value = tensor_of(start.node)
            shape = tuple(s if isinstance(s, int) else None for s in value.shape) if value is not None else ()
            role = self._roles[number]
            if role == "joint" and not any(s.role != "latent" for s in self.spans(start.base)):
                role = "latent"
            found.append(
                Stream(
                    index=number,
                    role=role,
                    shape=shape,
                    dtype=str(value.dtype).removeprefix("torch.") if value is not None else "",
                    inputs=self._names(self._index.inputs_of(start.base)),
                    start=start.base.name,
                    residual_adds=tuple(j.node.name for j in residual_adds),
                    spans=() if self._piece(start.base) else self.spans(start.base),
                    parents=self._parents[number],
                )
            )
        return tuple(found)

    def _names(self, inputs: int) -> tuple[str, ...]:
        return tuple(a.name for i, a in enumerate(self._index.activations) if inputs >> i & 1)

    def near(self, node: fx.Node) -> set[int]:
        """The streams whose values `node` is computed from, the last ones before it on each path."""
        found: set[int] = set()
        todo, seen = [node], {node}
        while todo:
            at = todo.pop()
            if at in self._values:
                found.add(self._values[at])
                continue
            for parent in at.all_input_nodes:
                if parent not in seen and self._index.inputs_of(parent) & ~self._conditioning:
                    seen.add(parent)
                    todo.append(parent)
        return found

    def role_of(self, node: fx.Node) -> str:
        """The role of the tokens in `node`: "latent", "text", "joint", or "constant" for positions and registers."""
        streams = self.near(node)
        roles = {self._roles[s] for s in streams if s < len(self._roles)}
        if not roles:
            return self._role(self._index.inputs_of(node))
        return roles.pop() if len(roles) == 1 else "joint"

    def spans(self, node: fx.Node) -> tuple[Span, ...]:
        """Where the tokens of each role lie in the sequence of `node`; empty where no concatenation shows it."""
        todo, seen = [node], {node}
        while todo:
            at = todo.pop(0)
            if at.target is aten.cat.default and len(pieces := self._pieces(at)) > 1:
                return pieces
            if at in self._values and at is not node and (own := self._values[at]) < len(self.starts):
                start = self.starts[own].base
                if start not in seen:
                    seen.add(start)
                    todo.append(start)
                continue
            for parent in at.all_input_nodes:
                if parent not in seen and self._index.inputs_of(parent) & ~self._conditioning:
                    seen.add(parent)
                    todo.append(parent)
            if len(seen) > 400:
                break
        return ()

    def _pieces(self, cat: fx.Node) -> tuple[Span, ...]:
        """Tokens of a concatenation along a sequence; empty where it is none (halves of rotated channels, say)."""
        axis = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
        value = tensor_of(cat)
        if value is None or not isinstance(axis, int) or value.ndim < 3 or axis % value.ndim in (0, value.ndim - 1):
            return ()
        found: list[Span] = []
        at = 0
        for piece in cat.args[0]:  # type: ignore[union-attr]
            x = tensor_of(piece)
            if x is None or not isinstance(length := x.shape[axis], int):
                return ()
            role = self.role_of(piece)  # type: ignore[arg-type]
            if found and found[-1].role == role:
                found[-1] = Span(role, found[-1].start, at + length)
            else:
                found.append(Span(role, at, at + length))
            at += length
        return tuple(found)
