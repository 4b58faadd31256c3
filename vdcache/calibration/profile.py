"""A profile: what was measured, the lists that follow from it, a table, the paper's figures, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vdcache.errors import ConfigError
from vdcache.util.checks import number
from vdcache.util.renamed import with_current_fields

if TYPE_CHECKING:
    from rich.table import Table
from vdcache.calibration import profile_figure

__all__ = ["BACKGROUND_SHARE", "Profile", "ProfiledAttention", "check_threshold"]

Array = NDArray[Any]
BACKGROUND_SHARE = 0.6  # 24 of the 40 single blocks of HunyuanVideo are in the published background list
_VERSION = 1


@dataclass(frozen=True)
class ProfiledAttention:
    """One self- or joint-attention over video tokens.

    Args:
        block: counted from 0 among the blocks that attend over video tokens, over all graphs of the model.
        block_kind: "single" or "double": the kind of block (`GraphAnalysis.denoising_blocks`).
        kind, layout, form: as in `patterns.Attention`.
        module: where it stands in the user's model; for messages only.
        graph: in which graph of the forward, counted from 0: Dynamo makes several where the model breaks.
    """

    block: int
    block_kind: str
    kind: str
    layout: str
    form: str
    module: str = ""
    graph: int = 0


@dataclass(frozen=True, eq=False)
class Profile:
    """Which blocks of a model look at the foreground (ProfilingDiT, arXiv 2504.03140, section 3.2).

    A series is one sample of one lane of one generation; N series, S steps, A attention sites, and video tokens on a grid of T × H × W.

    Args:
        scores: float [N, S, A], R_attn: the share of the foreground's tokens that have high attention (equation 6). NaN where a
            step showed no foreground, or where a series had ended already.
        shares: float [N, S, A], the share of all tokens that have high attention: R of a block without any preference.
        covered: float [N, S], the share of the tokens that are foreground.
        distances: float [N, S − 1], ‖v_s − v_{s−1}‖₁ / ‖v_{s−1}‖₁ between consecutive predictions (figure 4).
        received: float [A, T, H, W], attention that each token of the first series receives, mean over steps; 1 is the mean of a
            sequence.
        mask: bool [T, H, W], foreground of the first series after two thirds of its steps.
        picture: float [T', H', W', 3], the principal components of its prediction there.
        token_threshold, block_threshold: as `vdcache.profile` was given them.
        block_kind: which blocks it speaks of: "single", "double" or all ("").
    """

    model: str
    grid: tuple[int, int, int]
    sites: tuple[ProfiledAttention, ...]
    series: tuple[str, ...]
    scores: Array
    shares: Array
    covered: Array
    distances: Array
    received: Array
    mask: Array
    picture: Array
    token_threshold: float
    block_threshold: float | None = None
    block_kind: str = ""

    # ---- the lists -------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks, in order."""
        return tuple(dict.fromkeys(s.block for s in self.sites))

    @property
    def graphs(self) -> int:
        """How many graphs of the forward hold these blocks."""
        return len({s.graph for s in self.sites})

    def by_block(self, values: Array) -> Array:
        """Values [..., A] of sites as values [..., blocks]: the mean over the sites of a block."""
        owner = np.array([s.block for s in self.sites])
        return np.stack([_mean(values[..., owner == b], -1) for b in self.blocks], -1)

    @property
    def block_scores(self) -> dict[int, float]:
        """R of each block, mean over series, steps and its sites."""
        means = _mean(self.by_block(self.scores), (0, 1))
        return {b: float(r) for b, r in zip(self.blocks, means, strict=True)}

    @property
    def threshold(self) -> float:
        """R from which on a block looks at the foreground (τ)."""
        if self.block_threshold is not None:
            return self.block_threshold
        scores = sorted(self.block_scores.values())
        below = min(len(scores) - 1, round(BACKGROUND_SHARE * len(scores)))  # so many blocks are background
        return (scores[below - 1] + scores[below]) / 2 if below else scores[0]

    @property
    def foreground(self) -> tuple[int, ...]:
        """Blocks with R ≥ τ (equation 7)."""
        return tuple(b for b, r in self.block_scores.items() if r >= self.threshold)

    @property
    def background(self) -> tuple[int, ...]:
        """All other blocks."""
        return tuple(b for b in self.blocks if b not in self.foreground)

    def with_threshold(self, block_threshold: float | None) -> Profile:
        """The same measurements with another τ; None for the one of its own.

        Raises:
            ConfigError: no share, 0 to 1.
        """
        check_threshold(block_threshold)
        return replace(self, block_threshold=block_threshold)

    def only(self, block_kind: str) -> Profile:
        """The profile of the "single" or the "double" blocks alone, counted from 0 among these.

        Raises:
            ConfigError: the model has no such block.
        """
        chosen = [i for i, s in enumerate(self.sites) if s.block_kind == block_kind]
        if not chosen:
            kinds = " and ".join(sorted({s.block_kind for s in self.sites}))
            raise ConfigError(f"the profile has no block of kind {block_kind!r}; it has {kinds}")
        number = {b: i for i, b in enumerate(dict.fromkeys(self.sites[i].block for i in chosen))}
        return replace(
            self,
            sites=tuple(replace(self.sites[i], block=number[self.sites[i].block]) for i in chosen),
            scores=self.scores[..., chosen],
            shares=self.shares[..., chosen],
            received=self.received[chosen],
            block_kind=block_kind,
        )

    # ---- how sure they are -----------------------------------------------------------------------------------------

    @property
    def over_steps(self) -> dict[int, float]:
        """Standard deviation of each block's R over the steps, of its mean over series."""
        return dict(zip(self.blocks, map(float, np.nanstd(_mean(self.by_block(self.scores), 0), 0)), strict=True))

    @property
    def over_series(self) -> dict[int, float]:
        """Standard deviation of each block's R over series (prompts), of its mean over steps; 0 for one series."""
        return dict(zip(self.blocks, map(float, np.nanstd(_mean(self.by_block(self.scores), 1), 0)), strict=True))

    @property
    def agreement(self) -> dict[int, float]:
        """Share of all steps of all series in which a block is on the side of τ where its mean puts it."""
        values = self.by_block(self.scores)
        same = (values >= self.threshold) == np.isin(self.blocks, self.foreground)
        known = ~np.isnan(values)
        return {b: float((same & known)[..., i].sum() / max(1, known[..., i].sum())) for i, b in enumerate(self.blocks)}

    @property
    def preference(self) -> dict[int, float]:
        """R over the share of all tokens that are high: 1 for a block that does not tell foreground from background."""
        r, share = _mean(self.by_block(self.scores), (0, 1)), _mean(self.by_block(self.shares), (0, 1))
        return {b: float(x / y) if y else float("nan") for b, x, y in zip(self.blocks, r, share, strict=True)}

    # ---- for people ------------------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"<Profile of {self.model}: {len(self.blocks)} {self.block_kind} blocks, {self.scores.shape[1]} steps, {len(self.series)} series; "
            f"foreground {_ranges(self.foreground)}, background {_ranges(self.background)}>"
        ).replace("  ", " ")

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    def __rich__(self) -> Table:
        from rich.table import Table

        frames, height, width = self.grid
        table = Table(
            title=f"{self.model}: {len(self.blocks)} {self.block_kind + ' ' if self.block_kind else ''}blocks, "
            f"{frames} × {height} × {width} tokens, {self.scores.shape[1]} steps, {len(self.series)} series",
            title_justify="left",
            caption=f"foreground {_ranges(self.foreground)}\nbackground {_ranges(self.background)}\n"
            f"R: share of the foreground with high attention; τ = {self.threshold:.3f}; ±: over steps, over prompts; agrees: steps in which R is on the "
            f"block's side of τ; preference: R over the share of all tokens that are high; foreground: {100 * float(_mean(self.covered, (0, 1))):.0f} % of the tokens",
            caption_justify="left",
            box=None,
            pad_edge=False,
        )
        for name, side in (
            ("block", "right"),
            ("attention", "left"),
            ("R", "right"),
            ("± steps", "right"),
            ("± prompts", "right"),
            ("agrees", "right"),
            ("preference", "right"),
            ("", "left"),
            ("looks at", "left"),
        ):
            table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
        steps, series, agreement, preference = self.over_steps, self.over_series, self.agreement, self.preference
        for block, r in self.block_scores.items():
            own = [s for s in self.sites if s.block == block]
            front = block in self.foreground
            table.add_row(
                str(block),
                ", ".join(dict.fromkeys(f"{s.layout} {s.kind}" for s in own)),
                f"{r:.3f}",
                f"{steps[block]:.3f}",
                f"{series[block]:.3f}" if len(self.series) > 1 else "–",
                f"{100 * agreement[block]:.0f} %",
                f"{preference[block]:.2f}",
                ("█" if front else "░") * round(10 * min(1.0, r)) if r == r else "",
                "[bold]foreground[/bold]" if front else "[dim]background[/dim]",
            )
        return table

    def plot(self, path: str | Path | None = None) -> Any:
        """The paper's figures 2 to 4 for this model: where the block that looks most at the foreground and the one that looks least
        at it look, R of every block at every step, and how much the prediction changes from step to step.

        Args:
            path: where the picture goes; its ending names the format.

        Returns the matplotlib figure.
        """
        return profile_figure.draw(self, path)

    # ---- as a file -------------------------------------------------------------------------------------------------

    def to_json(self, path: str | Path | None = None) -> str:
        """The profile as JSON text, also written to `path`. Numbers keep five digits."""
        data: dict[str, Any] = {"vdcache profile": _VERSION}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray):
                value = _plain(value)
            elif f.name == "sites":
                value = [asdict(s) for s in value]
            data[f.name] = value
        data |= {"foreground": self.foreground, "background": self.background}  # for readers; worked out anew when read back
        text = json.dumps(data)
        if path is not None:
            Path(path).write_text(text)
        return text

    @staticmethod
    def from_json(text: str | Path) -> Profile:
        """The profile that `to_json` wrote: JSON text, or the path of a file of it.

        Raises:
            ConfigError: the text is no profile, or one of a later version.
        """
        try:
            data = json.loads(text.read_text() if isinstance(text, Path) else text)
        except ValueError as error:
            raise ConfigError(f"this is no profile: {error}; a file is given as pathlib.Path") from error
        version = data.pop("vdcache profile", None) if isinstance(data, dict) else None
        if version != _VERSION:
            raise ConfigError(
                f"this is no profile of version {_VERSION} (found version {version}); measure it again with vdcache.profile"
            )
        data = with_current_fields("Profile", data)
        kinds = {f.name: f.type for f in fields(Profile)}
        values: dict[str, Any] = {}
        for name, kind in kinds.items():
            value = data[name]
            if kind == "Array":
                value = np.array(value, dtype=bool if name == "mask" else float)
            elif name == "sites":
                value = tuple(ProfiledAttention(**with_current_fields("ProfiledAttention", s)) for s in value)
            values[name] = tuple(value) if isinstance(value, list) else value
        return Profile(**values)


def check_threshold(block_threshold: Any) -> None:
    """Raises ConfigError for a τ that no R can be compared with."""
    if block_threshold is not None and not 0 <= number(block_threshold, "block_threshold is a share of the foreground") <= 1:
        raise ConfigError(f"block_threshold is a share of the foreground, 0 to 1; got {block_threshold}")


def _mean(values: Array, axis: Any) -> Array:
    """Mean of what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _plain(values: Array) -> Any:
    """Nested lists, NaN as null."""
    if values.dtype == bool:
        return values.tolist()
    rounded = np.round(values.astype(float), 5).astype(object)
    rounded[np.isnan(values)] = None
    return rounded.tolist()


def _ranges(blocks: Sequence[int]) -> str:
    """{0, 2–7, 10}."""
    parts: list[list[int]] = []
    for block in blocks:
        if parts and block == parts[-1][-1] + 1:
            parts[-1].append(block)
        else:
            parts.append([block])
    return "{" + ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts) + "}"
