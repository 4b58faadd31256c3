"""What the attention of a model looks like in tiles of frames (Efficient-vDiT, arXiv 2502.06155, section 3.1 and figure 1)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from vdcache.calibration.graph_replay import record
from vdcache.errors import ConfigError
from vdcache.ir.library import CHUNK
from vdcache.passes.tile_attention import AttentionOperands
from vdcache.util.checks import whole
from vdcache.util.json import read_json, write_json

__all__ = ["TileReport", "tiles"]

BLOCKS = 64  # positions are compared on a map of at most so many by so many


@dataclass(frozen=True)
class TileReport:
    """Attention by tiles of frames.

    Args:
        frames: latent frames.
        modules: where each attention stands in the user's model.
        mass: of each attention, the share of a query's weights that goes to each frame, averaged over the queries of a frame, heads,
            samples and calls: [attentions, frames of the query, frames of the key]. Rows add up to 1 less what goes to text.
        text: of each attention, the share that goes to text.
        top: the share of positions that counts as important.
        overlap: of each attention, how many of the important positions of one prompt are important for another too, 0 to 1; by
            chance it would be `top`. None with one prompt.
        calls: how many were looked at.
    """

    frames: int
    modules: tuple[str, ...]
    mass: tuple[tuple[tuple[float, ...], ...], ...] = field(repr=False)
    text: tuple[float, ...] = field(repr=False)
    top: float
    overlap: tuple[float, ...] | None
    calls: int

    @property
    def diagonal(self) -> tuple[float, ...]:
        """Of each attention, how many times more a frame attends to itself than to another frame, on average."""
        found = []
        for table in self.mass:
            own = sum(table[i][i] for i in range(self.frames)) / self.frames
            rest = sum(map(sum, table)) - own * self.frames
            other = rest / (self.frames * (self.frames - 1)) if self.frames > 1 else 0.0
            found.append(own / other if other else float("inf"))
        return tuple(found)

    @property
    def decay(self) -> tuple[tuple[float, ...], ...]:
        """Of each attention, the mean share that goes to a frame at distance 0, 1, 2 …"""
        found = []
        for table in self.mass:
            at = [
                [table[i][j] for i in range(self.frames) for j in range(self.frames) if abs(i - j) == d]
                for d in range(self.frames)
            ]
            found.append(tuple(sum(v) / len(v) for v in at))
        return tuple(found)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to `path`."""
        return write_json(self, path, indent=1, also={"diagonal": self.diagonal, "decay": self.decay})

    @staticmethod
    def from_json(text: str | Path) -> TileReport:
        """What `to_json` wrote: text, or the path of a file.

        Raises:
            ConfigError: something else.
        """
        return read_json(TileReport, text, "report on tiles", without=("diagonal", "decay"))

    def __str__(self) -> str:
        lines = [f"attention among {self.frames} latent frames, {self.calls} calls"]
        for i, (module, own, decay) in enumerate(zip(self.modules, self.diagonal, self.decay, strict=True)):
            bar = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * v / max(decay)))] for v in decay)
            seen = f"  {self.overlap[i]:.0%} of important positions shared" if self.overlap is not None else ""
            text = f"  {self.text[i]:.0%} to text" if any(self.text) else ""
            lines.append(f"  {i:3d} own frame {own:5.1f}× another  by distance {bar}{text}{seen}  {module}")
        if self.overlap is not None:
            lines.append(f"positions: the {self.top:.0%} with the most weight; {self.top:.0%} would be shared by chance")
        return "\n".join(lines)

    def figure(self, path: str | Path) -> Path:
        """A picture: tiles of the first, middle and last attention, and the decay of all."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        n = len(self.mass)
        shown = sorted({0, n // 2, n - 1})
        fig, axes = plt.subplots(1, len(shown) + 1, figsize=(3.1 * (len(shown) + 1) + 0.6, 3.1), layout="constrained")
        for ax, i in zip(axes, shown, strict=False):
            picture = ax.imshow(torch.tensor(self.mass[i]), cmap="magma", vmin=0)
            ax.set(
                title=f"{self.modules[i] or f'attention {i}'}\nown frame {self.diagonal[i]:.1f}× another",
                xlabel="frame of the key",
            )
            ax.title.set_fontsize(9)
            fig.colorbar(picture, ax=ax, shrink=0.75)
        axes[0].set_ylabel("frame of the query")
        shades = plt.get_cmap("viridis")
        for i, row in enumerate(self.decay):
            axes[-1].plot(range(self.frames), row, color=shades(i / max(1, n - 1)), linewidth=1.3)
        axes[-1].set(title="all attentions, first dark, last light", xlabel="distance in frames", ylabel="share of the weights")
        axes[-1].title.set_fontsize(9)
        axes[-1].spines[["top", "right"]].set_visible(False)
        fig.savefig(path, dpi=150)
        plt.close(fig)
        return Path(path)


def tiles(
    model: Callable[..., Any],
    run: Callable[..., Any],
    *,
    prompts: Iterable[Any] | None = None,
    timesteps: int = 2,
    top: float = 0.1,
    grid: Sequence[int] = (),
    text: Sequence[int] = (),
    seed: int = 0,
) -> TileReport:
    """How a model's attention is spread over tiles of frames: on the diagonal and beside it, by distance, and whether it depends on
    the prompt. What a static mask may leave out.

    Args:
        model, run, prompts: as `vdcache.profile` takes them.
        timesteps: calls that are looked at of every prompt, at random.
        top: the share of positions that counts as important.
        grid, text: of the pass `tile-attention`, where the graph does not show them.
        seed: of the choice of calls.

    Raises:
        ConfigError: a share that is none, or a model without attention over frames.
        CacheStateError: `run` did not call the model.
    """
    whole(timesteps, "timesteps, the calls kept of a prompt,", 1)
    if not isinstance(top, float) or not 0 < top < 1:
        raise ConfigError(f"top is a share of the positions, between 0 and 1; got {top!r}")
    replay = record(model, run, prompts, "tiles", keep=timesteps, seed=seed, grid=grid, text=text)
    sites = replay.sites
    frames = {replay.places[s].grid[0] for s in sites}
    if len(frames) > 1:
        raise ConfigError(f"tiles: the attentions run over different numbers of frames, {sorted(frames)}; give grid=…")
    mass: dict[fx.Node, Tensor] = {}
    maps: dict[fx.Node, dict[int, Tensor]] = {s: {} for s in sites}
    for call in replay.calls:
        one = replay.start(call)
        for site in sites:
            one.until(site)
            by_frame, by_block = _spread(replay.places[site], one.values)
            mass[site] = mass.get(site, torch.zeros_like(by_frame)) + by_frame / len(replay.calls)
            known = maps[site].get(call.prompt)
            maps[site][call.prompt] = by_block if known is None else known + by_block
            one.put(site, one.compute(site))
    return TileReport(
        next(iter(frames)),
        tuple(replay.modules[s] for s in sites),
        tuple(tuple(tuple(row[:-1]) for row in mass[s].tolist()) for s in sites),
        tuple(float(mass[s][:, -1].mean()) for s in sites),
        top,
        tuple(_overlap(list(maps[s].values()), top) for s in sites) if len(maps[sites[0]]) > 1 else None,
        len(replay.calls),
    )


def _spread(place: AttentionOperands, values: Mapping[fx.Node, Any]) -> tuple[Tensor, Tensor]:
    """Mean weights from each frame to each frame and, last, to text, [F, F + 1]; and a map of at most `BLOCKS` by `BLOCKS`
    positions of the video. Float32, mean over samples and heads; a chunk of queries at a time."""
    query, key = values[place.query], values[place.key]
    bias = None if place.bias is None else values[place.bias]
    heads, tokens = query.shape[1], query.shape[2]
    if key.shape[1] != heads:
        key = key.repeat_interleave(heads // key.shape[1], 1)
    scale = query.shape[-1] ** -0.5 if place.scale is None else place.scale
    frames, height, width = place.grid
    space, video = height * width, frames * height * width
    first, last = place.before, place.before + video
    device = query.device
    frame_of = torch.full((tokens,), frames, device=device)
    frame_of[first:last] = torch.arange(video, device=device) // space
    blocks = min(BLOCKS, video)
    block_of = torch.full((tokens,), blocks, device=device)
    block_of[first:last] = torch.arange(video, device=device) * blocks // video
    to_frame = torch.nn.functional.one_hot(frame_of, frames + 1).float()
    to_block = torch.nn.functional.one_hot(block_of, blocks + 1).float()
    by_frame = torch.zeros(frames + 1, frames + 1, device=device)
    by_block = torch.zeros(blocks + 1, blocks + 1, device=device)
    step = max(1, CHUNK // (query.shape[0] * heads * tokens))
    with torch.no_grad():
        for start in range(first, last, step):
            rows = slice(start, min(start + step, last))
            scores = (query[:, :, rows] @ key.transpose(-1, -2)).float() * scale
            if bias is not None:
                scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.float()
            weights = torch.softmax(scores, -1).mean((0, 1))
            by_frame += to_frame[rows].T @ weights @ to_frame
            by_block += to_block[rows].T @ weights @ to_block
    return (by_frame / space)[:-1].cpu(), by_block[:-1, :-1].cpu()


def _overlap(maps: Sequence[Tensor], top: float) -> float:
    """The share of the largest positions of one map that are among the largest of another, over all pairs."""
    count = max(1, round(top * maps[0].numel()))
    chosen = [set(m.flatten().topk(count).indices.tolist()) for m in maps]
    shares = [len(a & b) / count for a, b in itertools.combinations(chosen, 2)]
    return sum(shares) / len(shares)
