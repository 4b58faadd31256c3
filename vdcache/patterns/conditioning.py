"""Which inputs drive the model: the timestep (by its sinusoidal embedding), the latent, the latent grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from vdcache.ir.capture import Signature
from vdcache.ir.ops import CASTS, VIEWS, is_work, tensor_of
from vdcache.patterns.facts import Grid
from vdcache.patterns.index import Index

__all__ = ["activations", "clocks", "grid", "latent"]

aten = torch.ops.aten
_WAVES = (aten.sin.default, aten.cos.default)
_LAYERS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
_CONV2D = (aten.conv2d.default, aten.conv2d.padding)
_CONV3D = (aten.conv3d.default, aten.conv3d.padding)


def activations(index: Index, sig: Signature) -> list[fx.Node]:
    """The inputs that are not parameters or buffers."""
    inputs = [n for n in index.nodes if n.op == "placeholder"]
    return [n for i, n in enumerate(inputs) if i not in sig.static]


def clocks(index: Index, sig: Signature) -> tuple[str, ...]:
    """Inputs that reach a sine or cosine by elementwise work alone, whose waves then feed a layer as its activation.

    Rotary tables fail the second half: their waves are multiplied into queries and keys. Guidance scales look the same
    as the timestep; only the running generation tells them apart, because they do not change (DESIGN section 5).
    """
    found = []
    for node in activations(index, sig):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.ndim > 2:
            continue  # a timestep is one value, one a sample, or one a token
        waves = _waves_of(node)
        if any(_feeds_a_layer(wave) for wave in waves):
            found.append(node.name)
    return tuple(found)


def _waves_of(source: fx.Node) -> list[fx.Node]:
    """Sines and cosines reached from `source` without passing real work."""
    found, todo, seen = [], [source], {source}
    while todo:
        for user in todo.pop().users:
            if user in seen or user.op == "output" or is_work(user):
                continue
            seen.add(user)
            if user.target in _WAVES:
                found.append(user)
            else:
                todo.append(user)
    return found


def _feeds_a_layer(wave: fx.Node) -> bool:
    """Whether `wave`, through concatenation, views and casts, is the activation of a layer."""
    todo, seen = [wave], {wave}
    while todo:
        node = todo.pop()
        for user in node.users:
            if user.target in _LAYERS and node in user.args[:2] and tensor_of(user) is not None:
                return True
            shuffles = user.target in VIEWS or user.target in CASTS
            shuffles = shuffles or user.target in (aten.cat.default, aten.slice.Tensor, aten.stack.default, aten.pad.default)
            # a constant factor or an embedding of several scalars side by side
            shuffles = shuffles or (user.target is aten.mul.Tensor and not isinstance(user.args[1], fx.Node))
            if shuffles and user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def latent(index: Index, sig: Signature, sources: Sequence[fx.Node], clock_names: Sequence[str]) -> str:
    """The input that the denoising loop updates.

    It feeds a residual stream (`sources`: where streams begin) and looks like the output, because a solver adds the two;
    of several that do, the one whose shape agrees best.
    """
    outputs = [v for n in index.outputs() if (v := tensor_of(n)) is not None][len(sig.mutations) :]
    best, best_score = "", (-1.0, 0.0)
    for node in activations(index, sig):
        value = tensor_of(node)
        if value is None or node.name in clock_names or not value.is_floating_point() or value.ndim < 2:
            continue
        if not any(index.depends(s, node) or s is node for s in sources):
            continue
        size = float(value.numel()) if all(isinstance(s, int) for s in value.shape) else 0.0
        score = max((_likeness(value, out) for out in outputs), default=0.0)
        if (score, size) > best_score:
            best, best_score = node.name, (score, size)
    return best


def _likeness(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of dimensions, one by one from the left, in which two shapes agree; 0 for another rank."""
    if a.ndim != b.ndim:
        return 0.0
    return sum(str(x) == str(y) for x, y in zip(a.shape, b.shape, strict=True)) / a.ndim


def grid(index: Index, sig: Signature, latent_name: str) -> Grid | None:
    """Frames × height × width of the video tokens, read off the patch embedding.

    Either a 3D convolution of the latent, or a 2D convolution into which the frames were folded as a batch, or (when
    the patches are cut by reshaping) nothing: then None.
    """
    start = next((n for n in index.nodes if n.name == latent_name), None)
    if start is None or (value := tensor_of(start)) is None:
        return None
    for node in index.nodes:
        out = tensor_of(node)
        if out is None or not index.depends(node, start) or not all(isinstance(s, int) for s in out.shape):
            continue
        if node.target in _CONV3D:
            return Grid(*(int(s) for s in out.shape[-3:]))
        if node.target in _CONV2D:
            batch = int(value.shape[0]) if isinstance(value.shape[0], int) else 0
            if batch and out.shape[0] % batch == 0:
                return Grid(int(out.shape[0]) // batch, int(out.shape[2]), int(out.shape[3]))
            return None
    return None
