"""Which inputs drive the model: the timestep (by its sinusoidal embedding), the latents, the latent grid; and what depends on
which of them alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from vdcache.ir.capture import Signature
from vdcache.ir.edit import inputs
from vdcache.ir.ops import is_work, tensor_inputs, tensor_of
from vdcache.patterns.facts import Conditioning, Grid
from vdcache.patterns.index import Index
from vdcache.util.sizes import shape_hint, updated_by

__all__ = ["activations", "dependence", "grid", "latents", "timestep_inputs"]

aten = torch.ops.aten
_SINUSOIDS = (aten.sin.default, aten.cos.default)
_LAYERS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
_CONV2D = (aten.conv2d.default, aten.conv2d.padding)
_CONV3D = (aten.conv3d.default, aten.conv3d.padding)


def activations(graph: fx.Graph, sig: Signature) -> list[fx.Node]:
    """The inputs that are not parameters or buffers."""
    return [n for i, n in enumerate(inputs(graph)) if i not in sig.static]


def timestep_inputs(candidates: Sequence[fx.Node]) -> tuple[str, ...]:
    """Inputs that reach a sine or cosine by elementwise work alone, whose waves then feed a layer as its activation.

    Rotary tables fail the second half: their waves are multiplied into queries and keys. Guidance scales look the same
    as the timestep; only the running generation tells them apart, because they do not change (DESIGN section 5).
    """
    found = []
    sizes = {str(s) for n in candidates if (v := tensor_of(n)) is not None for s in v.shape if isinstance(s, torch.SymInt)}
    for node in candidates:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.ndim > 2:
            continue  # a timestep is one value, one a sample, or one a token
        if isinstance(value, torch.SymInt) and str(value) in sizes:
            continue  # tables of positions are made from it
        sinusoids = _sinusoids_of(node)
        if any(_feeds_a_layer(sinusoid) for sinusoid in sinusoids):
            found.append(node.name)
    return tuple(found)


def _sinusoids_of(source: fx.Node) -> list[fx.Node]:
    """Sines and cosines reached from `source` without passing real work, but for a product with learned frequencies."""
    found, todo, seen = [], [source], {source}
    while todo:
        node = todo.pop()
        for user in node.users:
            if user in seen or user.op == "output" or (is_work(user) and not _is_table_product(user, node)):
                continue
            seen.add(user)
            if _is_sinusoid(user):
                found.append(user)
            else:
                todo.append(user)
    return found


def _is_sinusoid(node: fx.Node) -> bool:
    """A sine or cosine, or both as one complex number."""
    if node.target in _SINUSOIDS or node.target is aten.polar.default:
        return True
    value = tensor_of(node)
    return node.target is aten.exp.default and value is not None and value.is_complex()


def _is_table_product(node: fx.Node, factor: fx.Node) -> bool:
    """Whether `node` multiplies the scalar `factor` by one row of a table: frequencies, not a layer that reads a vector."""
    value = tensor_of(factor)
    if node.target not in _LAYERS or value is None or value.ndim == 0 or str(value.shape[-1]) != "1":
        return False
    return all(p is factor or _is_leaf(p) for p in tensor_inputs(node))


def _is_leaf(node: fx.Node) -> bool:
    """Whether `node` is an input or a constant, or one operation after another makes it of one."""
    while node.op == "call_function" and len(parents := tensor_inputs(node)) == 1:
        node = parents[0]
    return node.op != "call_function"


def _feeds_a_layer(sinusoid: fx.Node) -> bool:
    """Whether `sinusoid`, through concatenation, views and casts, is the activation of a layer."""
    todo, seen = [sinusoid], {sinusoid}
    while todo:
        node = todo.pop()
        for user in node.users:
            if user.target in _LAYERS and node in user.args[:2] and tensor_of(user) is not None:
                return True
            # what takes one tensor, or puts several side by side, passes waves on; a product with another tensor rotates
            alone = user.op == "call_function" and not is_work(user) and len(tensor_inputs(user)) == 1
            if (alone or user.target in (aten.cat.default, aten.stack.default)) and user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def latents(index: Index, sig: Signature, sources: Sequence[fx.Node], clock_names: Sequence[str]) -> tuple[str, ...]:
    """The inputs that the denoising loop updates, the likeliest first.

    One feeds a residual stream (`sources`: where streams begin) and looks like an output, because a solver adds the two. Of
    several inputs for one output, the one whose shape agrees best; where none agrees wholly, one is taken all the same.
    """
    results = [tensor_of(n) for n in index.outputs()[len(sig.mutations) :]]
    outputs = [v for v in results if v is not None and v.is_floating_point()]
    fed = 0
    for source in sources:
        fed |= index.inputs_of(source)
    shapes: dict[str, list[int]] = {}
    for i, node in enumerate(index.activations):
        value = tensor_of(node)
        if value is None or node.name in clock_names or not value.is_floating_point() or value.ndim < 2 or not fed >> i & 1:
            continue
        shapes[node.name] = shape_hint(value)
    forms = [shape_hint(v) for v in outputs] or sorted(shapes.values(), key=math.prod)[-1:]
    return tuple(updated_by(shapes, forms, nearest=True))


def grid(index: Index, latent_name: str, tokens: int | None) -> Grid | None:
    """Frames × height × width of the video tokens.

    Read off the patch embedding: a 3D convolution of the latent, or a 2D one into which the frames were folded as a batch.
    Where patches are cut by reshaping instead, the one patch size (square in space) is looked for that makes `tokens` tokens of
    the latent; None where there is none, or more than one.
    """
    at = next((i for i, n in enumerate(index.activations) if n.name == latent_name), None)
    if at is None or (value := tensor_of(index.activations[at])) is None:
        return None
    for node in index.nodes:
        if (node.target not in _CONV3D and node.target not in _CONV2D) or not index.inputs_of(node) >> at & 1:
            continue
        out = tensor_of(node)
        if out is None or not all(isinstance(s, int) for s in out.shape):
            continue
        sizes = [int(s) for s in out.shape]
        batch = int(value.shape[0]) if isinstance(value.shape[0], int) else 0
        if node.target in _CONV3D:
            found = Grid(*sizes[-3:])
        elif batch and sizes[0] % batch == 0:
            found = Grid(sizes[0] // batch, *sizes[-2:])
        else:
            break
        if tokens is None or found.tokens in (tokens, tokens * found.frames, tokens * found.height * found.width):
            return found
        break  # a convolution before the patches
    return _grid_by_size(value, tokens)


def _grid_by_size(value: torch.Tensor, tokens: int | None) -> Grid | None:
    sizes = [s for s in value.shape if isinstance(s, int)]
    if tokens is None or len(sizes) != value.ndim or value.ndim not in (4, 5):
        return None
    frames = sizes[2] if value.ndim == 5 else 1
    height, width = sizes[-2:]
    found = {
        Grid(frames // pt, height // p, width // p)
        for pt in range(1, frames + 1)
        if frames % pt == 0
        for p in range(1, min(height, width) + 1)
        if height % p == 0 and width % p == 0 and (frames // pt) * (height // p) * (width // p) == tokens
    }
    if len(found) > 1:  # patches seldom span frames
        found = {g for g in found if g.frames == frames}
    return found.pop() if len(found) == 1 else None


def dependence(index: Index, latent_names: Sequence[str], clock_names: Sequence[str], streams: set[fx.Node]) -> Conditioning:
    """What the nodes that no stream enters depend on."""
    clocks_mask, latents_mask = index.mask_of(clock_names), index.mask_of(latent_names)
    timestep, text, constant = [], [], []
    for node in index.nodes:
        if node.op != "call_function" or node in streams:
            continue
        inputs = index.inputs_of(node)
        if not inputs:
            constant.append(node.name)
        elif not inputs & ~clocks_mask:
            timestep.append(node.name)
        elif not inputs & (clocks_mask | latents_mask):
            text.append(node.name)
    return Conditioning(tuple(clock_names), tuple(timestep), tuple(text), tuple(constant))
