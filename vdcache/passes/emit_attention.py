"""emit-attention: hand out how much attention each video token receives.

    o = scaled_dot_product_attention(q, k, v)   -->   the same; emit(attention_received(q, k), name)

One value for every self- or joint-attention over video tokens: the column sums of its weights, mean over heads, float32
[B, frames · S] with frames outermost (ProfilingDiT, arXiv 2504.03140, equation 5). It is the sum over the queries of a sequence
divided by its mean over all keys that any query may attend to (masked ones are left out). Nothing of the model reads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from vdcache.ir import dialect, library
from vdcache.ir.edit import call
from vdcache.ir.facts import Fact
from vdcache.ir.ops import ATTENTION, tensor_of
from vdcache.passes.base import Pass, PassResult, Refusal, copy_meta
from vdcache.patterns import Attention, Branch, GraphAnalysis, Grid, analyze
from vdcache.patterns.attention import AttentionMatch, attention_matches, axes_of, layout_of, operands, video_span
from vdcache.util.fields import VideoGrid

aten = torch.ops.aten


@dataclass(frozen=True)
class EmitAttention(Pass):
    """Emit the attention that video tokens receive, under the name of each attention's node.

    Args:
        grid: frames, height and width of the video tokens, where the graph does not show them; empty to read them off the graph.

    Raises:
        ConfigError: a grid that is not three numbers of at least 1.
    """

    name: ClassVar[str] = "emit-attention"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.CANONICAL})

    grid: VideoGrid = ()

    def run(self, graph: fx.GraphModule) -> PassResult:
        found = analyze(graph)
        grid = Grid(*self.grid) if self.grid else found.grid
        nodes = {n.name: n for n in graph.graph.nodes}
        known = {s.node.name: s for s in attention_matches(graph.graph.nodes, _tokens(found, grid))}
        rewrites, refusals = 0, []
        done: set[str] = set()
        for branch, attention in found.denoising_attentions():
            if attention.node in done:
                continue
            done.add(attention.node)
            site = known.get(attention.node)
            kept = set(graph.graph.nodes)
            try:
                if grid is None:
                    raise _NotEmitted(
                        "the graph does not show frames, height and width of its tokens: give grid=(frames, height, width)"
                    )
                if site is None:
                    raise _NotEmitted("its operands are not found in the whole graph")
                self._emit(graph.graph, site, attention, grid, _batch(found, branch, nodes))
                rewrites += 1
            except _NotEmitted as why:
                for node in reversed([n for n in graph.graph.nodes if n not in kept]):
                    graph.graph.erase_node(node)
                refusals.append(Refusal(attention.node, str(why)))
        return PassResult(graph, rewrites, tuple(refusals))

    def _emit(self, graph: fx.Graph, site: AttentionMatch, attention: Attention, grid: Grid, batch: int) -> None:
        def op(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return call(graph, target, *args, provenance=str(self), **kwargs)

        with graph.inserting_before(site.node.next):
            received = _received(graph, site, op)
            sums = received.meta["val"]
            if not all(isinstance(s, int) for s in sums.shape):
                raise _NotEmitted("its sizes are symbols: profile with fixed sizes")
            keys, rows = sums.shape[-1], math.prod(sums.shape[:-1])
            video = video_span(attention, keys, grid)
            if isinstance(video, Refusal):
                raise _NotEmitted(video.reason)
            start, stop = video
            layout = layout_of(stop - start, grid)
            space = grid.height * grid.width
            sequences = {"full": 1, "spatial": grid.frames, "temporal": space}[layout] * batch
            if rows % sequences:
                raise _NotEmitted(f"{rows} rows of weights are not a multiple of {sequences} sequences")
            value = op(aten.reshape.default, received, [batch, sequences // batch, rows // sequences, keys])
            value = op(aten.mean.dim, value, [2])
            # Over the keys that any query may attend to: padding of a text would lower the mean of all others.
            there = op(aten.sum.dim_IntList, op(aten.gt.Scalar, value, 0), [-1], True)
            mean = op(aten.div.Tensor, op(aten.sum.dim_IntList, value, [-1], True), op(aten.clamp.default, there, 1))
            value = op(aten.div.Tensor, value, mean)
            if (start, stop) != (0, keys):
                value = op(aten.slice.Tensor, value, 2, start, stop)
            if layout == "temporal":
                value = op(aten.transpose.int, value, 1, 2)
            value = op(aten.reshape.default, value, [batch, grid.tokens])
            copy_meta(graph.call_function(dialect.emit, (value, attention.node)), str(self), value)


class _NotEmitted(Exception):
    """Why an attention is left out."""


def _tokens(found: GraphAnalysis, grid: Grid | None) -> int | None:
    """Tokens of the first stream of video tokens."""
    shapes = [s.shape for s in found.streams if s.role in ("latent", "joint") and len(s.shape) == 3]
    return shapes[0][1] if shapes else grid.tokens if grid is not None else None


def _batch(found: GraphAnalysis, branch: Branch, nodes: dict[str, fx.Node]) -> int:
    """Samples: of the latent that comes in, because a stream may fold frames into its batch."""
    value = tensor_of(nodes[found.latent]) if found.latent else tensor_of(nodes[branch.residual_add])
    size = value.shape[0] if value is not None else None
    if not isinstance(size, int):
        raise _NotEmitted("its sizes are symbols: profile with fixed sizes")
    return size


def _received(graph: fx.Graph, site: AttentionMatch, op: Any) -> fx.Node:
    """The column sums of one attention, [..., keys]."""
    if site.node.target in ATTENTION:
        given = dict(zip(("attn_mask", "dropout_p", "is_causal"), site.node.args[3:], strict=False)) | dict(site.node.kwargs)
        mask, causal, scale = given.get("attn_mask"), bool(given.get("is_causal", False)), given.get("scale")
        return op(torch.ops.vdcache.attention_received.default, site.query, site.key, mask, causal, scale)
    if site.form == "flex":
        return _of_flex(graph, site)
    if site.weights is not None:
        products = operands(site.node)
        axes = axes_of(site.node, products.index(site.weights))
        if axes is None:
            raise _NotEmitted(f"'{site.node.name}' ({site.node.target}) does not show which axis holds the keys")
        return op(library.weights_received, site.weights, axes[1], axes[0], site.form == "matmul-softmax")
    if site.form == "linear":
        return _of_linear(site, op)
    if site.form == "custom":
        return _of_kernel(site, op)
    raise _NotEmitted(f"attention written as {site.form!r} is not read")


def _of_flex(graph: fx.Graph, site: AttentionMatch) -> fx.Node:
    query, key, _, score_mod, block_mask, scale, _, *buffers = site.node.args
    node = graph.call_function(library.flex_received, (query, key, score_mod, block_mask, scale, *buffers))
    q, k = query.meta["val"], key.meta["val"]  # type: ignore[union-attr]
    node.meta = {"val": q.new_empty((*q.shape[:2], k.shape[-2]), dtype=torch.float32), "vdcache": "emit-attention"}
    return node


def _of_linear(site: AttentionMatch, op: Any) -> fx.Node:
    assert site.scores is not None  # what makes an attention linear
    inner, outer = operands(site.scores), operands(site.node)
    if site.query not in outer or site.key not in inner:
        raise _NotEmitted("its operands are not those of its products")
    of_query, of_key = axes_of(site.node, outer.index(site.query)), axes_of(site.scores, inner.index(site.key))
    if of_query is None or of_key is None:
        raise _NotEmitted("its products do not show which axes hold tokens and features")
    query = op(aten.movedim.int, site.query, of_query[1], -2)
    key = op(aten.movedim.int, site.key, of_key[0], -2)
    a, b = query.meta["val"], key.meta["val"]
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise _NotEmitted(f"queries {tuple(a.shape)} and keys {tuple(b.shape)} are no pair")
    return op(library.linear_received, query, key)


def _of_kernel(site: AttentionMatch, op: Any) -> fx.Node:
    """Another library's kernel, which takes [B, N, H, D] or [B, H, N, D]; the shorter of the two middle axes is the heads'."""
    q = site.query.meta["val"]
    if q.ndim != 4 or not all(isinstance(s, int) for s in q.shape) or q.shape[1] == q.shape[2]:
        raise _NotEmitted(f"the kernel '{site.node.target}' does not show where heads and tokens lie in {tuple(q.shape)}")
    query, key = site.query, site.key
    if q.shape[1] > q.shape[2]:
        query, key = op(aten.transpose.int, query, 1, 2), op(aten.transpose.int, key, 1, 2)
    return op(torch.ops.vdcache.attention_received.default, query, key, None, False, None)
