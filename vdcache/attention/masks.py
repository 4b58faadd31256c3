"""Static attention masks over the tokens of a video: which tile of queries attends to which tile of keys.

A mask knows no sizes. On a grid of latent frames × height × width it cuts the tokens into equal tiles and says, for every pair
of tiles, whether the first attends to the second. Tokens of a text in the same sequence are no part of it: they attend to
everything, and everything attends to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from vdcache.attention.tile_mask import MASKS, AttentionMask, PositiveSizes, Sizes
from vdcache.errors import ConfigError
from vdcache.util.fields import Checked, at_least
from vdcache.util.plugins import plugins

__all__ = [
    "MASKS",
    "AttentionMask",
    "Dense",
    "Diagonal",
    "Frames",
    "MultiDiagonal",
    "Radial",
    "Skip",
    "Stripes",
    "Window",
    "parse_mask",
    "parse_masks",
]

Count = Annotated[int, at_least(1)]


@dataclass(frozen=True)
class Dense(AttentionMask):
    """Everything attends to everything."""

    name: ClassVar[str] = "dense"

    def tile(self, grid: Sizes) -> Sizes:
        return grid

    def allowed(self, grid: Sizes) -> Tensor:
        return torch.ones(1, 1, dtype=torch.bool)


@dataclass(frozen=True)
class Skip(AttentionMask):
    """Nothing is computed and the result is zero: for heads that do not matter (Sparse-vDiT)."""

    name: ClassVar[str] = "skip"
    is_empty: ClassVar[bool] = True

    def tile(self, grid: Sizes) -> Sizes:
        return grid

    def allowed(self, grid: Sizes) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.bool)

    def density(self, frames: int, height: int = 1, width: int = 1, text: int = 0) -> float:
        return 0.0


@dataclass(frozen=True)
class Frames(Checked, AttentionMask):
    """Attention tiles (Efficient-vDiT, arXiv 2502.06155, section 3.1): a query attends to a key if both lie in one frame, or
    either lies in one of k uniformly spaced reference frames. Of F frames, (2Fk − k² + F − k) / F² of the weights are kept.

    Args:
        references: k. Frame ⌊i · F / k⌋ for every i below k, so the first frame is one of them.
    """

    name: ClassVar[str] = "frames"
    references: Annotated[int, at_least(0)] = 1

    def tile(self, grid: Sizes) -> Sizes:
        return (1, *grid[1:])

    def reference_frames(self, frames: int) -> tuple[int, ...]:
        """Which frames are references, of so many."""
        if self.references > frames:
            raise ConfigError(f"{self} has {self.references} reference frames, and the video has {frames} latent frames")
        return tuple(i * frames // self.references for i in range(self.references))

    def allowed(self, grid: Sizes) -> Tensor:
        kept = torch.eye(grid[0], dtype=torch.bool)
        references = list(self.reference_frames(grid[0]))
        kept[references], kept[:, references] = True, True
        return kept


@dataclass(frozen=True)
class Window(Checked, AttentionMask):
    """A sliding window of tiles in three dimensions (sliding tile attention, arXiv 2502.04507): a tile of queries attends to the
    tiles around it. At the border the window is moved inwards, so that every query attends to equally many keys.

    Args:
        window: tiles of the window along frames, height and width; more than there are count as all.
        size: tokens of a tile along frames, height and width.
    """

    name: ClassVar[str] = "window"
    window: PositiveSizes = (3, 3, 3)
    size: PositiveSizes = (1, 4, 4)

    def tile(self, grid: Sizes) -> Sizes:
        for axis, whole_, part in zip(("frames", "rows", "columns"), grid, self.size, strict=True):
            if whole_ % part:
                raise ConfigError(f"{self}: tiles of {part} {axis} do not cut {whole_}; {_divisors(whole_)} do")
        return self.size

    def allowed(self, grid: Sizes) -> Tensor:
        counts = [n // s for n, s in zip(grid, self.tile(grid), strict=True)]
        kept = torch.ones(1, 1, dtype=torch.bool)
        for n, span in zip(counts, self.window, strict=True):
            span = min(span, n)
            at = torch.arange(n)
            first = (at - span // 2).clamp(0, n - span)[:, None]
            kept = torch.kron(kept, (at[None] >= first) & (at[None] < first + span))
        return kept


@dataclass(frozen=True)
class _Chunked(Checked, AttentionMask):
    """Masks whose tiles are some rows of a frame.

    Args:
        chunks: tiles of a frame; its height is a multiple of it.
    """

    chunks: Count = 8

    def tile(self, grid: Sizes) -> Sizes:
        if grid[1] % self.chunks:
            raise ConfigError(
                f"{self}: a frame of {grid[1]} rows is not cut into {self.chunks} tiles; {_divisors(grid[1])} can be"
            )
        return 1, grid[1] // self.chunks, grid[2]

    def _places(self, grid: Sizes) -> tuple[Tensor, Tensor]:
        """Frame and place in the frame of every tile."""
        self.tile(grid)
        at = torch.arange(grid[0] * self.chunks)
        return at // self.chunks, at % self.chunks


@dataclass(frozen=True)
class Radial(_Chunked):
    """Radial attention (arXiv 2506.19852): within a frame and its neighbours everything; the band of places that a query attends
    to halves each time the distance of frames doubles, and once it is below one tile fewer and fewer frames are looked at.
    O(n log n) weights for n tokens.

    Args:
        chunks: tiles of a frame.
        sinks: first frames that everything attends to.
    """

    name: ClassVar[str] = "radial"
    sinks: Annotated[int, at_least(0)] = 1

    def allowed(self, grid: Sizes) -> Tensor:
        frame, place = self._places(grid)
        apart = (frame[:, None] - frame).abs()
        shift = (place[:, None] - place).abs()
        decay = 2 ** apart.clamp(min=1).float().log2().floor().long()
        band = (decay <= self.chunks) & ((shift + 1) * decay <= self.chunks)
        every = (decay + self.chunks - 1) // self.chunks
        return band | ((apart % every == 0) & (shift == 0)) | (frame < self.sinks)[None]


@dataclass(frozen=True)
class Diagonal(_Chunked):
    """A band along the diagonal of the sequence (Sparse-vDiT, arXiv 2506.03065).

    Args:
        chunks: tiles of a frame.
        width: tiles on either side that a tile attends to, itself among them.
    """

    name: ClassVar[str] = "diagonal"
    width: Count = 4

    def allowed(self, grid: Sizes) -> Tensor:
        frame, place = self._places(grid)
        at = frame * self.chunks + place
        return (at[:, None] - at).abs() < self.width


@dataclass(frozen=True)
class MultiDiagonal(_Chunked):
    """Bands at every distance of whole frames: a query attends to its own place, and those around it, in all frames
    (Sparse-vDiT, arXiv 2506.03065).

    Args:
        chunks: tiles of a frame.
        width: places on either side, its own among them.
    """

    name: ClassVar[str] = "multi-diagonal"
    width: Count = 1

    def allowed(self, grid: Sizes) -> Tensor:
        _, place = self._places(grid)
        return (place[:, None] - place).abs() < self.width


@dataclass(frozen=True)
class Stripes(_Chunked):
    """Vertical stripes: some keys are attended to by all queries, which otherwise see what is near (Sparse-vDiT, arXiv
    2506.03065).

    Args:
        chunks: tiles of a frame.
        every: one tile of so many is a stripe, the first among them.
        width: tiles on either side of the diagonal, the query's own among them.
    """

    name: ClassVar[str] = "stripes"
    every: Count = 8
    width: Count = 1

    def allowed(self, grid: Sizes) -> Tensor:
        frame, place = self._places(grid)
        at = frame * self.chunks + place
        return (at % self.every == 0)[None] | ((at[:, None] - at).abs() < self.width)


def parse_mask(text: AttentionMask | str) -> AttentionMask:
    """The mask that prints as `text`: "frames:4", "window:3x3x3:1x4x4", "radial:8:1".

    Raises:
        ConfigError: no such mask, or wrong numbers for it.
    """
    if isinstance(text, AttentionMask):
        return text
    if not isinstance(text, str):
        raise ConfigError(f"a mask is a value or its text, such as 'frames:4'; got {text!r}")
    name, *given = text.strip().split(":")
    if name not in MASKS:
        plugins("vdcache.masks")  # being imported makes them known
    kind = MASKS.get(name)
    if kind is None:
        raise ConfigError(f"no mask is called {name!r}; there are {', '.join(MASKS)}")
    allowed = fields(kind)
    if len(given) > len(allowed):
        raise ConfigError(f"mask '{name}' takes {', '.join(f.name for f in allowed) or 'no numbers'}; got {text!r}")
    try:
        numbers = [tuple(map(int, g.split("x"))) if "x" in g else int(g) for g in given]
    except ValueError as error:
        raise ConfigError(f"the numbers of a mask are whole, as in 'frames:4' or 'window:3x3x3:1x4x4'; got {text!r}") from error
    return kind(*numbers)


def parse_masks(text: Any) -> tuple[AttentionMask, ...]:
    """One mask for all heads of an attention (a tuple of one), or one a head: "frames:2*6|dense*2" or a sequence of masks.

    Raises:
        ConfigError: as `parse_mask`.
    """
    if isinstance(text, AttentionMask):
        return (text,)
    if isinstance(text, Sequence) and not isinstance(text, str):
        return tuple(m for part in text for m in parse_masks(part))
    found: list[AttentionMask] = []
    for part in str(text).split("|"):
        name, star, times = part.partition("*")
        if star and not (times.strip().isdecimal() and int(times) > 0):
            raise ConfigError(f"heads of a mask are counted as in 'frames:2*6|dense*2'; got {text!r}")
        found += [parse_mask(name)] * (int(times) if star else 1)
    return tuple(found)


def masks_text(masks: Sequence[AttentionMask]) -> str:
    """What `parse_masks` reads back."""
    runs: list[list[Any]] = []
    for mask in masks:
        if runs and runs[-1][0] == mask:
            runs[-1][1] += 1
        else:
            runs.append([mask, 1])
    return "|".join(f"{m}*{n}" if n > 1 else str(m) for m, n in runs)


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
