"""Repeated blocks: the same shape of graph with other weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import fx

from vdcache.ir.ops import tensor_of
from vdcache.patterns.residual import ResidualAdd

__all__ = ["segment", "shape_of"]

_LONGEST = 64  # branches in one block; the search grows linearly for any fixed length


def shape_of(residual_add: ResidualAdd) -> str:
    """A digest of a branch: its operations, how they are wired, and the shapes of their values. Weights do not enter."""
    number = {node: i for i, node in enumerate(residual_add.inside)}
    lines = []
    for node in residual_add.inside:
        value = tensor_of(node)
        wires = [str(number[p]) if p in number else _kind_of_input(p) for p in node.all_input_nodes]
        lines.append(f"{node.target}({','.join(wires)})->{tuple(map(str, value.shape)) if value is not None else ''}")
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _kind_of_input(node: fx.Node) -> str:
    value = tensor_of(node)
    return f"{tuple(map(str, value.shape))}{value.dtype}" if value is not None else "?"


def segment(
    shapes: Sequence[str], kinds: Sequence[str], streams: Sequence[int], attention_matches: Sequence[frozenset[str]]
) -> list[int]:
    """The block of each branch, counted from 0 over the whole graph.

    Runs of branches that repeat are cut into their periods; what does not repeat is cut where a block ends by its kinds.

    Args:
        shapes: digest of each branch, in order.
        kinds: its kind. A block ends with its MLP (or fused branch), or where the same kind of attention comes again.
        streams: its stream.
        sites: names of its attentions; branches of one attention belong to one block.
    """
    tokens = [f"{shape}/{stream}" for shape, stream in zip(shapes, streams, strict=True)]
    blocks: list[int] = []
    at = 0
    pending: list[int] = []  # branches not yet in a block

    def flush() -> None:
        for group in _by_kind(pending, kinds, streams, attention_matches):
            number = blocks[-1] + 1 if blocks else 0
            blocks.extend([number] * len(group))
        pending.clear()

    while at < len(tokens):
        begins = not pending or _ends(kinds[at - 1]) or streams[at] != streams[at - 1]
        period, times = _repeat(tokens, at) if begins else (0, 0)
        if times > 1 and _closed(at, period, attention_matches):
            flush()
            for _ in range(times):
                pending.extend(range(at, at + period))
                flush()
                at += period
        else:
            pending.append(at)
            at += 1
    flush()
    return blocks


def _ends(kind: str) -> bool:
    return kind in ("mlp", "fused")


def _repeat(tokens: Sequence[str], start: int) -> tuple[int, int]:
    """The period whose repetitions from `start` on reach farthest (the shortest of several), and how often it repeats."""
    best = (0, 0)
    for period in range(1, min(_LONGEST, (len(tokens) - start) // 2) + 1):
        if tokens[start] != tokens[start + period]:
            continue
        end = start + period
        while end < len(tokens) and tokens[end] == tokens[end - period]:
            end += 1
        times = (end - start) // period
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def _closed(start: int, period: int, attention_matches: Sequence[frozenset[str]]) -> bool:
    """Whether no attention is shared between one period and the next."""
    first = frozenset().union(*attention_matches[start : start + period])
    second = frozenset().union(*attention_matches[start + period : start + 2 * period])
    return not first & second


def _by_kind(
    members: Sequence[int], kinds: Sequence[str], streams: Sequence[int], attention_matches: Sequence[frozenset[str]]
) -> list[list[int]]:
    groups: list[list[int]] = []
    for i in members:
        if groups and _belongs(i, groups[-1], kinds, streams, attention_matches):
            groups[-1].append(i)
        else:
            groups.append([i])
    merged: list[list[int]] = []
    for group in groups:  # an MLP before the attention belongs to its block
        if merged and not _attends(merged[-1], kinds) and _attends(group, kinds):
            merged[-1] += group
        else:
            merged.append(group)
    return merged


def _attends(group: Sequence[int], kinds: Sequence[str]) -> bool:
    return any("attention" in kinds[i] or kinds[i] == "fused" for i in group)


def _belongs(
    i: int, group: Sequence[int], kinds: Sequence[str], streams: Sequence[int], attention_matches: Sequence[frozenset[str]]
) -> bool:
    """Whether branch `i` goes on with the block of `group`."""
    if any(attention_matches[i] & attention_matches[j] for j in group):
        return True
    own = [kinds[j] for j in group if streams[j] == streams[i]]
    if own:
        return not _ends(own[-1]) and not (kinds[i] not in ("cross-attention", "mlp", "fused") and kinds[i] in own)
    return not all(_ends(kinds[j]) for j in group)
