"""The picture of a model as its house: streams are rails, branches hang on them, slots lie along them. All in SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from vdcache.explanation.data import ReportData, Slot
from vdcache.explanation.tree import amount, size, where
from vdcache.patterns import Attention, Branch, GraphAnalysis, Stream

__all__ = ["KIND_COLOURS", "ROLE_COLOURS", "attention_tile", "house", "square"]

KIND_COLOURS = {
    "self-attention": "#2b6cb0",
    "joint-attention": "#6b46c1",
    "cross-attention": "#b7791f",
    "mlp": "#2f855a",
    "fused": "#b83280",
    "other": "#718096",
}
ROLE_COLOURS = {"latent": "#2b6cb0", "text": "#b7791f", "joint": "#6b46c1", "constant": "#a0aec0"}

_WIDTH = 1080  # of the rails
_LEFT = 110  # for the streams' names
_WIDEST, _NARROWEST = 46, 15  # of a block's column
_GAP = 4


@dataclass
class _Band:
    """One stream: its rail and what hangs above and below."""

    stream: Stream
    first: int
    last: int
    above: dict[int, list[Branch]] = field(default_factory=dict)
    below: dict[int, list[Branch]] = field(default_factory=dict)
    y: float = 0.0


def house(found: GraphAnalysis, slots: Sequence[Slot] = ()) -> str:
    """One graph: rails from left to right, a column a block, squares whose area is their FLOPs."""
    if not found.branches:
        return ""
    columns = max(b.block for b in found.branches) + 1
    width = max(_NARROWEST, min(_WIDEST, _WIDTH / columns))
    largest = max(b.flops for b in found.branches) or 1
    side = {id(b): max(3.0, (width - 2) * math.sqrt(b.flops / largest)) for b in found.branches}
    bands = [_band(s, found) for s in found.streams]
    y = 8.0
    for band in bands:
        up = max((sum(side[id(b)] + _GAP for b in own) for own in band.above.values()), default=0) + 12
        down = max((sum(side[id(b)] + _GAP for b in own) for own in band.below.values()), default=0) + 12
        band.y = y + up
        y = band.y + down + 14
    height, total = y + 22, _LEFT + columns * width + 40
    parts = [
        f'<svg class="house" viewBox="0 0 {total:.0f} {height:.0f}" width="{total:.0f}" role="img" aria-label="streams and branches">'
    ]
    parts += _axis(columns, width, y)
    parts += [_merge(bands, band, width) for band in bands]
    for band in bands:
        parts += _rail(band, width)
    parts += [_slot(slot, bands, found, width) for slot in slots]
    for band in bands:
        parts += _hanging(band, width, side, slots)
    return "\n".join([*(p for p in parts if p), "</svg>"])


def _band(stream: Stream, found: GraphAnalysis) -> _Band:
    own = [b for b in found.branches if b.stream == stream.index]
    band = _Band(stream, min(b.block for b in own), max(b.block for b in own))
    for branch in own:
        where = band.below if branch.kind in ("mlp", "other") else band.above
        where.setdefault(branch.block, []).append(branch)
    return band


def _x(column: float, width: float) -> float:
    return _LEFT + (column + 0.5) * width


def _axis(columns: int, width: float, y: float) -> list[str]:
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * width >= 28)
    marks = [
        f'<text class="tick" x="{_x(i, width):.1f}" y="{y + 8:.1f}" text-anchor="middle">{i}</text>'
        for i in range(0, columns, every)
    ]
    return [*marks, f'<text class="tick" x="{_LEFT - 12}" y="{y + 8:.1f}" text-anchor="end">block</text>']


def _rail(band: _Band, width: float) -> list[str]:
    left, right = _x(band.first - 0.5, width), _x(band.last + 0.5, width) + 10
    colour = ROLE_COLOURS.get(band.stream.role, "#718096")
    shape = " × ".join("?" if s is None else str(s) for s in band.stream.shape)
    tip = (
        f"stream {band.stream.index}: {band.stream.role}\n{shape} {band.stream.dtype}\nfrom {', '.join(band.stream.inputs[:4])}"
    )
    tip += "".join(f"\n{s.role}: tokens {s.start} to {s.stop}" for s in band.stream.spans)
    name = f"{band.stream.role} {band.stream.index}"
    return [
        f'<line class="rail" x1="{left - 8:.1f}" y1="{band.y:.1f}" x2="{right:.1f}" y2="{band.y:.1f}" stroke="{colour}" data-tip="{escape(tip)}"/>',
        f'<path d="M{right:.1f} {band.y - 4:.1f} l7 4 l-7 4 z" fill="{colour}"/>',
        f'<text class="stream" x="{_LEFT - 14}" y="{band.y + 4:.1f}" text-anchor="end" fill="{colour}">{escape(name)}</text>',
    ]


def _merge(bands: Sequence[_Band], band: _Band, width: float) -> str:
    """Curves from the ends of the parents to the start of a stream that goes on with their tokens."""
    lines = []
    for parent in bands:
        if parent.stream.index in band.stream.parents:
            x1, x2 = _x(parent.last + 0.5, width), _x(band.first - 0.5, width) - 8
            middle = (x1 + x2) / 2
            lines.append(
                f'<path class="merge" d="M{x1:.1f} {parent.y:.1f} C{middle:.1f} {parent.y:.1f} {middle:.1f} {band.y:.1f} {x2:.1f} {band.y:.1f}"/>'
            )
    return "".join(lines)


def _slot(slot: Slot, bands: Sequence[_Band], found: GraphAnalysis, width: float) -> str:
    """A merged slot, drawn along its rail."""
    if not slot.merged or not slot.branches:
        return ""
    named = {b.name: b for b in found.branches}
    own = [named[n] for n in slot.branches if n in named]
    band = next((b for b in bands if b.stream.index == slot.stream), None)
    if band is None or not own:
        return ""
    left, right = _x(min(b.block for b in own) - 0.5, width), _x(max(b.block for b in own) + 0.5, width)
    tip = (
        f"slot {slot.name}\nthe stream's difference over {len(slot.branches)} branches\n{size(slot.bytes)} a lane, {slot.dtype}"
    )
    return f'<rect class="slot" x="{left - 2:.1f}" y="{band.y - 6:.1f}" width="{right - left + 4:.1f}" height="12" rx="6" data-tip="{escape(tip)}"/>'


def _hanging(band: _Band, width: float, side: dict[int, float], slots: Sequence[Slot]) -> list[str]:
    single = {name for s in slots if not s.merged for name in s.branches}
    parts = []
    for own, sign in ((band.above, -1), (band.below, 1)):
        for block, branches in own.items():
            at = band.y + sign * 10
            centre = _x(block, width)
            parts.append(f'<line class="hang" x1="{centre:.1f}" y1="{band.y:.1f}" x2="{centre:.1f}" y2="{at:.1f}"/>')
            for branch in branches:
                length = side[id(branch)]
                top = at - length if sign < 0 else at
                ring = ' class="guarded"' if branch.name in single else ""
                parts.append(
                    f'<rect{ring} x="{centre - length / 2:.1f}" y="{top:.1f}" width="{length:.1f}" height="{length:.1f}" rx="{min(3, length / 4):.1f}" '
                    f'fill="{KIND_COLOURS[branch.kind]}" data-tip="{escape(_tip(branch))}"/>'
                )
                at += sign * (length + _GAP)
    return parts


def _tip(branch: Branch) -> str:
    lines = [f"{branch.name}", f"{amount(branch.flops)}, slot of {size(branch.bytes)}"]
    for a in branch.attentions:
        lines.append(
            f"{a.kind} attention ({a.layout}), {a.q_len} → {a.kv_len} tokens, {a.heads} heads × {a.head_dim}, {a.form}"
        )
    lines.append("gated" if branch.pre_gate else "no gate")
    lines += [line for line in (branch.module, where(branch.line)) if line]
    return "\n".join(lines)


def square(branch: Branch, largest: int) -> str:
    """A branch beside its numbers: its colour, its area by FLOPs."""
    length = max(4.0, 28 * math.sqrt(branch.flops / (largest or 1)))
    at = (30 - length) / 2
    return (
        f'<svg width="30" height="30" aria-hidden="true"><rect x="{at:.1f}" y="{at:.1f}" width="{length:.1f}" height="{length:.1f}" rx="3" '
        f'fill="{KIND_COLOURS[branch.kind]}"/></svg>'
    )


def attention_tile(a: Attention) -> str:
    """Which tokens attend to which: queries downwards, keys to the right, in frames where they are known."""
    box = 64.0
    q, k = a.q_len or 1, a.kv_len or 1
    wide, tall = (box, box) if k >= q else (max(10.0, box * math.sqrt(k / q)), box)
    if q < k:
        tall = max(10.0, box * math.sqrt(q / k))
    tip = f"{a.kind}, {a.layout}: {a.q_len} queries × {a.kv_len} keys"
    parts = [
        f'<svg class="tile" width="{box + 2:.0f}" height="{tall + 2:.0f}" data-tip="{escape(tip)}" role="img" aria-label="{escape(tip)}">'
    ]
    frames = a.grid.frames if a.grid is not None else 0
    if a.layout in ("spatial", "temporal") and frames > 1:
        parts += _within_frames(a.layout, frames, box, tall)
    else:
        parts.append(
            f'<rect class="{"cross" if a.kind == "cross" else "on"}" x="1" y="1" width="{wide:.1f}" height="{tall:.1f}"/>'
        )
        parts += _text_and_frames(a, wide, tall)
    return "".join([*parts, "</svg>"])


def _within_frames(layout: str, frames: int, box: float, tall: float) -> list[str]:
    """Attention inside of each frame, or over the frames of each place."""
    step = box / frames
    parts = [f'<rect class="off" x="1" y="1" width="{box}" height="{tall}"/>']
    if layout == "spatial":
        return parts + [
            f'<rect class="on" x="{1 + i * step:.2f}" y="{1 + i * step:.2f}" width="{step:.2f}" height="{step:.2f}"/>'
            for i in range(frames)
        ]
    return parts + [
        f'<line class="on-line" x1="{1 + i * step:.2f}" y1="{1 + j * step:.2f}" x2="{1 + (i + 1) * step:.2f}" y2="{1 + (j + 1) * step:.2f}"/>'
        for i in range(frames)
        for j in range(frames)
    ]


def _text_and_frames(a: Attention, wide: float, tall: float) -> list[str]:
    """Tokens of text, and where frames begin and end, among keys and among queries."""
    parts: list[str] = []
    if not a.kv_len:
        return parts
    square = a.q_len == a.kv_len
    for span in a.spans:
        if span.role == "latent":
            continue
        x, w = 1 + wide * span.start / a.kv_len, max(1.5, wide * (span.stop - span.start) / a.kv_len)
        parts.append(f'<rect class="text" x="{x:.1f}" y="1" width="{w:.1f}" height="{tall:.1f}"/>')
        if square:
            y, h = 1 + tall * span.start / a.kv_len, max(1.5, tall * (span.stop - span.start) / a.kv_len)
            parts.append(f'<rect class="text" x="1" y="{y:.1f}" width="{wide:.1f}" height="{h:.1f}"/>')
    if a.grid is None or not 1 < a.grid.frames <= 32:
        return parts
    start = next((s.start for s in a.spans if s.role == "latent"), 0)
    for i in range(a.grid.frames + 1):
        at = (start + i * a.grid.tokens / a.grid.frames) / a.kv_len
        x, y = 1 + wide * at, 1 + tall * at
        parts.append(f'<line class="frame" x1="{x:.1f}" y1="1" x2="{x:.1f}" y2="{1 + tall:.1f}"/>')
        if square:
            parts.append(f'<line class="frame" x1="1" y1="{y:.1f}" x2="{1 + wide:.1f}" y2="{y:.1f}"/>')
    return parts


def legend(report: ReportData) -> list[tuple[str, str]]:
    """The kinds that occur, with their colours."""
    return [(kind, colour) for kind, colour in KIND_COLOURS.items() if kind in report.count()]
