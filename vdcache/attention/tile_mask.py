"""What every mask is, and its tables on a sequence: tiles of queries, the tiles that they attend to, groups that share a call."""

from __future__ import annotations

import abc
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcache.errors import ConfigError
from vdcache.util.fields import Bound, Checked, at_least

__all__ = ["MASKS", "AttentionMask", "Group", "PositiveSizes", "Sizes", "TileMask", "volume"]

Sizes = tuple[int, int, int]  # frames, height, width
PositiveSizes = Annotated[
    Sizes, Bound(lambda sizes: min(sizes) >= 1, noun="(frames, height, width), three whole numbers of at least 1")
]


MASKS: dict[str, type[AttentionMask]] = {}


@dataclass(frozen=True)
class AttentionMask(abc.ABC):
    """A family of masks as a value; `str` gives its text, `parse_mask` reads it back, `on` prints as a picture.

    A subclass that has a `name`, in small letters, is known by it from its definition on: texts are what graphs hold.
    """

    name: ClassVar[str]
    is_empty: ClassVar[bool] = False  # nothing attends to anything, and the result is zero

    def __init_subclass__(cls) -> None:
        name = cls.__dict__.get("name")
        if name is None:
            return
        known = MASKS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"a mask is called {name!r} already: {known.__module__}.{known.__qualname__}")
        MASKS[name] = cls

    @abc.abstractmethod
    def tile(self, grid: Sizes) -> Sizes:
        """Frames, height and width of a tile.

        Raises:
            ConfigError: the grid cannot be cut so.
        """

    @abc.abstractmethod
    def allowed(self, grid: Sizes) -> Tensor:
        """Which tile attends to which: bool [tiles, tiles], queries first; tiles are counted frames first, then rows, then columns.

        Raises:
            ConfigError: the mask does not fit the grid.
        """

    def density(self, frames: int, height: int = 1, width: int = 1, text: int = 0) -> float:
        """The share of all weights that is computed, 0 to 1.

        Args:
            text: tokens that attend to everything and that everything attends to.
        """
        tokens = frames * height * width
        kept = float(self.allowed((frames, height, width)).float().mean())
        return (kept * tokens**2 + 2 * text * tokens + text**2) / (tokens + text) ** 2

    def on(self, frames: int, height: int = 1, width: int = 1, *, text: tuple[int, int] = (0, 0)) -> TileMask:
        """The mask on a video of that many latent frames, rows and columns, with tokens of text before and after: prints as a
        picture and states its density.

        Raises:
            ConfigError: it does not fit.
        """
        return TileMask(self, (frames, height, width), *text)

    def __str__(self) -> str:
        return ":".join([self.name, *(_text(getattr(self, f.name)) for f in fields(self))])


@dataclass(frozen=True)
class Group:
    """Classes of tiles, equally many each, that attend to equally many tiles: one call of attention.

    Args:
        queries: of each class, the tiles whose keys are the same.
        keys: of each class, the tiles that it attends to.
    """

    queries: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[int, ...], ...]

    @property
    def shared(self) -> tuple[int, ...]:
        """The tiles that all classes attend to."""
        common = set(self.keys[0]).intersection(*self.keys[1:])
        return tuple(t for t in self.keys[0] if t in common)


@dataclass(frozen=True)
class TileMask(Checked):
    """A mask on a sequence: what prints as a picture, states its density, and holds the tables of every lowering.

    Args:
        mask: which tile attends to which.
        grid: latent frames, height and width of the video tokens.
        before, after: tokens of text before and after them.

    Raises:
        ConfigError: the mask does not fit the grid, or leaves a query without a key.
    """

    mask: AttentionMask
    grid: PositiveSizes
    before: Annotated[int, at_least(0)] = 0
    after: Annotated[int, at_least(0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allowed.any(1).all() or self.text or self.mask.is_empty:
            return
        raise ConfigError(f"under the mask {self.mask} some tokens attend to nothing")

    @property
    def text(self) -> int:
        """Tokens of text."""
        return self.before + self.after

    @property
    def video(self) -> int:
        """Tokens of video."""
        return volume(self.grid)

    @property
    def tokens(self) -> int:
        """Tokens of the sequence."""
        return self.video + self.text

    @cached_property
    def tile(self) -> Sizes:
        """Frames, height and width of a tile."""
        return self.mask.tile(self.grid)

    @property
    def size(self) -> int:
        """Tokens of a tile."""
        return volume(self.tile)

    @cached_property
    def allowed(self) -> Tensor:
        """Which tile attends to which, bool [tiles, tiles]."""
        return self.mask.allowed(self.grid)

    @property
    def count(self) -> int:
        """Tiles."""
        return self.allowed.shape[0]

    @cached_property
    def density(self) -> float:
        """The share of all weights that is computed, text included."""
        return self.mask.density(*self.grid, text=self.text)

    @property
    def moved(self) -> bool:
        """Whether the tokens of a tile are not next to each other in the sequence."""
        frames, height, width = self.tile
        return not (width == self.grid[2] and (height == self.grid[1] or frames == 1)) and self.size > 1

    @property
    def cuts(self) -> tuple[int, ...]:
        """The grid as (tiles, tile) along every axis: frames, height, width."""
        return tuple(n for whole, part in zip(self.grid, self.tile, strict=True) for n in (whole // part, part))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All tiles that attend to something but not to everything, by the call that they share."""
        classes: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for query, row in enumerate(self.allowed.tolist()):
            keys = tuple(itertools.compress(range(self.count), row))
            if len(keys) < self.count:
                classes[keys].append(query)
        equal: dict[tuple[int, int], list[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(list)
        for keys, queries in classes.items():
            equal[len(queries), len(keys)].append((tuple(queries), keys))
        return tuple(Group(tuple(q for q, _ in found), tuple(k for _, k in found)) for found in equal.values())

    @property
    def pieces(self) -> int:
        """Slices of keys that a gather takes."""
        return sum(len(g.keys) * (len(g.keys[0]) - len(g.shared) + 1) for g in self.groups)

    @cached_property
    def everywhere(self) -> tuple[int, ...]:
        """The tiles that attend to everything."""
        return tuple(torch.nonzero(self.allowed.all(1)).flatten().tolist())

    @cached_property
    def shared(self) -> frozenset[int]:
        """The tiles that every tile attends to."""
        return frozenset(torch.nonzero(self.allowed.all(0)).flatten().tolist())

    @cached_property
    def tile_of(self) -> Tensor:
        """The tile of every token of the sequence, −1 for text: int64 [tokens]."""
        axes = [torch.arange(n) // part for n, part in zip(self.grid, self.tile, strict=True)]
        counts = self.cuts[::2]
        of = (axes[0][:, None, None] * counts[1] + axes[1][:, None]) * counts[2] + axes[2]
        return F.pad(of.flatten(), (self.before, self.after), value=-1)

    def keeps(self) -> Tensor:
        """Which token attends to which: bool [tokens, tokens]."""
        at = self.tile_of
        kept = self.allowed[at.clamp(min=0)][:, at.clamp(min=0)]
        if self.mask.is_empty:
            return torch.zeros_like(kept)
        return kept | (at < 0)[:, None] | (at < 0)

    def picture(self, width: int = 48) -> str:
        """Queries downwards, keys to the right; a half block for every tile, or for the mean of several; text is left out."""
        shades = " ░▒▓█"
        share = self.allowed.float()[None, None]
        side = min(self.count, width)
        rows = F.adaptive_avg_pool2d(share, (side, side))[0, 0] if self.count > side else share[0, 0]
        return "\n".join("".join(shades[math.ceil(v * 4)] * 2 for v in row) for row in rows.tolist())

    def __str__(self) -> str:
        frames, height, width = self.grid
        text = f" and {self.text} of text" if self.text else ""
        head = (
            f"{self.mask} on {frames} × {height} × {width} tokens{text}: {self.density:.1%} of the weights, {1 / self.density:.2f}× less"
            if self.density
            else f"{self.mask}: nothing is computed"
        )
        return f"{head}\n{self.picture()}"


def volume(sizes: Sizes) -> int:
    """Tokens of so many frames, rows and columns."""
    return math.prod(sizes)


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
