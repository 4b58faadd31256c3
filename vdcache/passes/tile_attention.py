"""tile-attention: leave out the tiles of attention that a static mask does not keep.

    o = scaled_dot_product_attention(q, k, v)   -->   o = tile_attention(q, k, v, mask, grid, before, after)

The mask knows no sizes; frames, height, width and where the text lies come from the analysis. How the operation is computed is
chosen when the graph is compiled. Not exact: the weights that the mask leaves out are gone (Efficient-vDiT, arXiv 2502.06155).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from vdcache.attention.masks import AttentionMask, Dense, masks_text, parse_masks
from vdcache.attention.tiles import TILE_ATTENTION, TileMask, tiled
from vdcache.errors import ConfigError
from vdcache.ir.edit import call, laid_out
from vdcache.ir.facts import Fact
from vdcache.ir.ops import ATTENTION, tensor_of
from vdcache.passes.base import Pass, PassResult, Refusal
from vdcache.patterns import Attention, GraphAnalysis, Grid, analyze
from vdcache.patterns.attention import video_span
from vdcache.util.fields import VideoGrid, VideoText

__all__ = ["AttentionOperands", "TileAttention", "places"]

aten = torch.ops.aten


@dataclass(frozen=True)
class TileAttention(Pass):
    """Put masks on the self- and joint-attentions of the denoising blocks.

    Args:
        masks: one for all of them, or one for each in order; a mask is a value or its text. One a head is written
            "frames:2*6|dense*2" or given as a sequence of masks.
        sites: names of the attentions that are meant, in order of the graph; empty for all.
        grid: frames, height and width of the video tokens, where the graph does not show them.
        text: tokens of text before and after those of video, where the graph does not show them.

    Raises:
        ConfigError: a mask that does not exist or does not fit; as many masks as there are neither heads nor attentions; a site
            that was asked for by name or by a mask of its own and cannot have one, with the reason.
    """

    name: ClassVar[str] = "tile-attention"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.CANONICAL})
    fixed_sizes: ClassVar[bool] = True

    masks: tuple[str, ...] = ("dense",)
    sites: tuple[str, ...] = ()
    grid: VideoGrid = ()
    text: VideoText = ()

    def __post_init__(self) -> None:
        given: Any = self.masks
        given = (given,) if isinstance(given, (str, AttentionMask)) else tuple(given)
        object.__setattr__(self, "masks", tuple(masks_text(parse_masks(m)) for m in given))
        if not self.masks:
            raise ConfigError(f"{self.name}: give one mask for all attentions, or one for each")
        super().__post_init__()

    def run(self, graph: fx.GraphModule) -> PassResult:
        found = analyze(graph)
        nodes = {n.name: n for n in graph.graph.nodes}
        chosen = self._chosen(found)
        asked = bool(self.sites) or len(self.masks) > 1
        rewrites, refusals, failed = 0, [], False
        for attention, text in chosen:
            masks = parse_masks(text)
            if all(isinstance(m, Dense) for m in masks):
                continue
            place = place_of(nodes[attention.node], attention, found, self.grid, self.text)
            if isinstance(place, Refusal):
                if asked:
                    raise ConfigError(f"{self.name}: no mask can be put on '{attention.node}': {place.reason}")
                refusals.append(Refusal(attention.node, place.reason))
                failed |= attention.layout not in ("spatial", "temporal")
                continue
            self._rewrite(graph.graph, nodes[attention.node], place, masks)
            rewrites += 1
        if not chosen:
            refusals.append(Refusal("output", "the graph has no attention among video tokens"))
        if failed and not rewrites:
            raise ConfigError(
                f"{self.name}: no attention of this model can have the mask {', '.join(self.masks)}:\n"
                + "\n".join(map(str, refusals))
            )
        return PassResult(graph, rewrites, tuple(refusals))

    def _chosen(self, found: GraphAnalysis) -> list[tuple[Attention, str]]:
        """The attentions that are meant, each with the text of its masks."""
        there = [a for _, a in found.denoising_attentions()]
        if self.sites:
            known = {a.node: a for a in found.attentions}
            if missing := [s for s in self.sites if s not in known]:
                raise ConfigError(f"{self.name}: no attention is called {missing[0]!r}; there are {', '.join(known) or 'none'}")
            there = [known[s] for s in self.sites]
        if len(self.masks) not in (1, len(there)):
            raise ConfigError(
                f"{self.name}: {len(self.masks)} masks for {len(there)} attentions; give one for all, or one for each. For one a head "
                "write 'frames:2*6|dense*2'"
            )
        each = self.masks if len(self.masks) > 1 else self.masks * len(there)
        return list(zip(there, each, strict=True))

    def _rewrite(self, graph: fx.Graph, node: fx.Node, place: AttentionOperands, masks: Sequence[AttentionMask]) -> None:
        heads = place.query.meta["val"].shape[1]
        if len(masks) not in (1, heads):
            raise ConfigError(f"{self.name}: '{node.name}' has {heads} heads, and {len(masks)} masks are given for them")

        def op(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return call(graph, target, *args, provenance=str(self), **kwargs)

        with graph.inserting_before(node):
            if len(set(masks)) == 1:
                out = op(*self._attend(node, place, place.query, place.key, place.value, place.bias, masks[0]))
            else:
                if place.key.meta["val"].shape[1] != heads:
                    raise ConfigError(f"{self.name}: '{node.name}' shares keys among heads, so all its heads have one mask")
                out = self._by_head(op, node, place, masks)
            out = laid_out(graph, out, node.meta["val"], provenance=str(self))
        out.meta = {**node.meta, "val": out.meta["val"], "vdcache": str(self)}
        node.replace_all_uses_with(out)
        graph.erase_node(node)

    def _attend(
        self,
        node: fx.Node,
        place: AttentionOperands,
        q: fx.Node,
        k: fx.Node,
        v: fx.Node,
        bias: fx.Node | None,
        mask: AttentionMask,
    ) -> tuple[Any, ...]:
        try:
            place.on(mask)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: '{node.name}': {error}") from None
        return TILE_ATTENTION, q, k, v, bias, str(mask), list(place.grid), place.before, place.after, place.scale, "gather"

    def _by_head(self, op: Any, node: fx.Node, place: AttentionOperands, masks: Sequence[AttentionMask]) -> fx.Node:
        """Heads of one mask in one call."""
        parts: list[fx.Node] = []
        order: list[int] = []
        for mask in dict.fromkeys(masks):
            own = [h for h, m in enumerate(masks) if m == mask]
            q, k, v = (_heads(op, x, own) for x in (place.query, place.key, place.value))
            bias = place.bias if place.bias is None or place.bias.meta["val"].shape[1] == 1 else _heads(op, place.bias, own)
            parts.append(op(*self._attend(node, place, q, k, v, bias, mask)))
            order += own
        out = op(aten.cat.default, parts, 1)
        return _heads(op, out, [order.index(h) for h in range(len(masks))])


@dataclass(frozen=True)
class AttentionOperands:
    """The operands of one attention that can have a mask, while the graph does not change.

    Args:
        query, key, value: [B, H, N, D].
        bias: of keys alone, [B or 1, H or 1, 1, N], or None.
        scale: None for 1/√D.
        grid: frames, height, width of the video tokens.
        before, after: tokens of text around them.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    bias: fx.Node | None
    scale: float | None
    grid: tuple[int, int, int]
    before: int
    after: int

    def on(self, mask: AttentionMask) -> TileMask:
        """The tables of a mask here."""
        return tiled(str(mask), self.grid, self.before, self.after)


def places(graph: fx.GraphModule, grid: Sequence[int] = (), text: Sequence[int] = ()) -> dict[str, AttentionOperands | Refusal]:
    """Every self- and joint-attention of the denoising blocks, by the name of its node: its operands, or why it can have no mask."""
    found = analyze(graph)
    nodes = {n.name: n for n in graph.graph.nodes}
    return {a.node: place_of(nodes[a.node], a, found, grid, text) for _, a in found.denoising_attentions()}


def place_of(
    node: fx.Node, attention: Attention, found: GraphAnalysis, grid: Sequence[int] = (), text: Sequence[int] = ()
) -> AttentionOperands | Refusal:
    """The operands of an attention, and where its tokens lie.

    Args:
        grid, text: override what the graph shows.
    """

    if reason := _why_no_mask(node, attention, bool(grid)):
        return Refusal(node.name, reason)
    assert attention.kv_len is not None
    where = _where(attention, attention.kv_len, found, grid, text)
    if isinstance(where, Refusal):
        return where
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | dict(node.kwargs)
    if given.get("is_causal"):
        return Refusal(node.name, "it is causal")
    if given.get("dropout_p"):
        return Refusal(node.name, "it drops weights at random")
    bias = given.get("attn_mask")
    if isinstance(bias, fx.Node):
        if bias.target is aten.expand.default and isinstance(bias.args[0], fx.Node):
            bias = bias.args[0]
        shape = tuple(bias.meta["val"].shape)
        if len(shape) != 4 or shape[2] != 1 or shape[3] != attention.kv_len:
            return Refusal(
                node.name,
                f"its own mask {shape} differs between queries; one of keys alone, [B, 1, 1, {attention.kv_len}], can be carried over",
            )
    query, key, value = node.args[:3]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    frames, height, width, before, after = where
    return AttentionOperands(query, key, value, bias, given.get("scale"), (frames, height, width), before, after)  # type: ignore[arg-type]


def _why_no_mask(node: fx.Node, attention: Attention, has_grid: bool) -> str:
    """What keeps an attention from a mask, whatever the mask; "" for nothing."""
    q_len, kv_len = attention.q_len, attention.kv_len
    if attention.kind == "cross":
        return (
            f"it is a cross-attention of {q_len} queries to {kv_len} keys; a mask of tiles is for attention among video tokens"
        )
    if attention.layout == "spatial" and not has_grid:
        return "it runs inside one frame already"
    if attention.layout == "temporal" and not has_grid:
        return "it runs over the frames of one place, so there are no tiles in it"
    shape = result.shape if (result := tensor_of(node)) is not None else ()
    if any(not isinstance(s, int) for s in shape):
        return "its sizes are symbols, and a mask is cut for sizes: compile with dynamic=False"
    if node.target not in ATTENTION:
        return f"attention written as {attention.form!r} is not rewritten; scaled_dot_product_attention is"
    if attention.heads is None or q_len is None or kv_len is None:
        return "it has no axis of heads, as in [batch, heads, tokens, width]"
    return "" if q_len == kv_len else f"its {q_len} queries are not its {kv_len} keys"


def _where(
    attention: Attention, tokens: int, found: GraphAnalysis, grid: Sequence[int], text: Sequence[int]
) -> tuple[int, int, int, int, int] | Refusal:
    """Frames, height and width of the video tokens, and the tokens of text before and after them."""
    known = Grid(*grid) if grid else attention.grid or found.grid
    if known is None:
        return Refusal(
            attention.node, "the graph does not show frames, height and width of its tokens: give grid=(frames, height, width)"
        )
    size = (known.frames, known.height, known.width)
    if text:
        before, after = text
        if before + known.tokens + after != tokens:
            return Refusal(
                attention.node,
                f"its {tokens} tokens are not {before} of text, {' × '.join(map(str, size))} of video and {after} of text",
            )
        return *size, before, after
    span = video_span(attention, tokens, known)
    if isinstance(span, Refusal):
        extra = tokens - known.tokens
        hint = f"; give text=({extra}, 0) or (0, {extra}) if these are of a text" if extra > 0 and not attention.spans else ""
        return Refusal(attention.node, span.reason + hint)
    if span[1] - span[0] != known.tokens:
        return Refusal(attention.node, f"its {tokens} tokens are not the {known.tokens} of all frames")
    return *size, span[0], tokens - span[1]


def _heads(op: Any, x: fx.Node, own: Sequence[int]) -> fx.Node:
    """Some heads of [B, H, …], in that order."""
    if list(own) == list(range(x.meta["val"].shape[1])):
        return x
    runs: list[list[int]] = []
    for h in own:
        if runs and runs[-1][1] == h:
            runs[-1][1] += 1
        else:
            runs.append([h, h + 1])
    parts = [op(aten.slice.Tensor, x, 1, a, b) for a, b in runs]
    return parts[0] if len(parts) == 1 else op(aten.cat.default, parts, 1)
