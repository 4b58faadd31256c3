"""From a model and a way of sampling to a profile: which blocks look at the foreground (ProfilingDiT, arXiv 2504.03140, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from vdcache.calibration.profile import Profile, ProfiledAttention, check_threshold
from vdcache.calibration.segment import Otsu, Segmenter, principal_picture
from vdcache.calibration.uncached_run import watch
from vdcache.errors import ConfigError, warn
from vdcache.passes import EmitAttention
from vdcache.patterns import Attention, Grid
from vdcache.patterns.attention import layout_of
from vdcache.runtime.call import Emitted
from vdcache.runtime.history import Record
from vdcache.util.checks import number

__all__ = ["profile"]


def profile(
    model: Callable[..., Any],
    run: Callable[..., Any],
    *,
    prompts: Iterable[Any] | None = None,
    foreground: Segmenter | Tensor | Sequence[Tensor] | None = None,
    token_threshold: float = 1.0,
    block_threshold: float | None = None,
    grid: tuple[int, int, int] | None = None,
    inner: str = "eager",
) -> Profile:
    """Find out which blocks of a model look at the foreground.

    The model is compiled with one addition: every self- and joint-attention also gives the attention that each video token
    receives (the column sums of its weights, equation 5). What it computes otherwise, and what `run` generates, is unchanged.

        lists = vdcache.profile(model, lambda model: sample(model, "a cat walking on grass"))
        fast = vdcache.compile(model, vdcache.methods.profilingdit(lists), num_steps=50)

    Args:
        model: the denoiser.
        run: generates with the model that it is given: `run(model)`, or `run(model, prompt)` for each of `prompts`. A diffusers
            pipeline: `def run(model): pipe.transformer = model; pipe("a cat")`.
        prompts: what to generate, one at a time; without, `run` is called once, and may generate several times.
        foreground: where the foreground is. A segmenter (`Otsu`, `Sam2` or a function: picture [F, H, W, 3] to mask [F, H, W]) looks at
            the principal components of each step's prediction; `Otsu()` without. A known mask, bool [F, H, W], or [B, F, H, W] for the samples of a
            batch, holds for every step; a list of masks has one for each generation.
        token_threshold: a token has high attention if it receives more than this many times the mean of its sequence. The paper
            gives no value.
        block_threshold: R from which on a block looks at the foreground (equation 7, τ; not given in the paper either). Without, the
            value below which 60 % of the blocks lie, the share of the list published for HunyuanVideo.
        grid: frames, height and width of the video tokens, where the model's graph does not show them (cut into tokens outside).
        inner: "eager", or "inductor" where compiling pays.

    Raises:
        ConfigError: no attention of the model can be read (the message says why: gradients, no grid, another form), a mask of the wrong shape, or no foreground anywhere.
        CacheStateError: `run` did not call the model.
    """
    if not number(token_threshold, "token_threshold is a multiple of the mean attention") > 0:
        raise ConfigError(f"token_threshold is a multiple of the mean attention, above 0; got {token_threshold}")
    check_threshold(block_threshold)
    foreground = _checked(Otsu() if foreground is None else foreground)
    passes = (EmitAttention(grid=tuple(grid or ())),)
    collector = _Collector(foreground, token_threshold, grid)
    # dynamic=False: symbols would hide which tokens are the video's
    watched = watch(model, run, prompts, "profile", passes=passes, inner=inner, listen=collector.take, dynamic=False)
    collector.finish()
    name, session, reasons = watched.name, watched.session, watched.reasons
    left_out = [r for graph in session.graphs for r in graph.guarded.refusals]  # type: ignore[attr-defined]
    if not collector.sites:
        raise ConfigError(
            f"profile: no attention over video tokens can be read in {name}: "
            + ("; ".join(reasons) or "the model has no self- or joint-attention on a residual stream that vdcache finds")
        )
    if left_out:
        warn(f"profile: {len(left_out)} attentions of {name} are left out: {'; '.join(reasons)}")
    return collector.profile(name, block_threshold)


def _checked(foreground: Any) -> Any:
    """A segmenter, a mask, or a list of masks; arrays become tensors."""
    if isinstance(foreground, (list, tuple)):
        return [_checked(f) for f in foreground]
    if isinstance(foreground, np.ndarray):
        return torch.from_numpy(foreground)
    if isinstance(foreground, Tensor) or (callable(foreground) and not isinstance(foreground, type)):
        return foreground
    raise ConfigError(
        f"foreground is a segmenter (vdcache.calibration.Otsu(), vdcache.calibration.Sam2(model), a function), a bool mask or a list of masks; got {foreground!r}"
    )


@dataclass
class _Series:
    """One sample of one lane of one generation, step after step."""

    scores: list[list[float]] = field(default_factory=list)
    shares: list[list[float]] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    covered: list[float] = field(default_factory=list)


class _Collector:
    """Takes in what every call of the model emitted."""

    def __init__(self, foreground: Any, token_threshold: float, grid: tuple[int, int, int] | None) -> None:
        self.foreground, self.token_threshold = foreground, token_threshold
        self.grid = Grid(*grid) if grid else None
        self.sites: tuple[ProfiledAttention, ...] = ()
        self.series: dict[str, _Series] = {}
        self._before: dict[tuple[Any, ...], Tensor] = {}
        self._generations = 0
        self._received: Tensor | None = None  # summed over the steps of the first series
        self._seen: list[tuple[Tensor, Tensor]] = []  # mask and picture of the first series, step by step

    @torch.no_grad()
    def take(self, record: Record, emitted: Sequence[Emitted], result: Any) -> None:
        """One call: score every site and sample, and go on."""
        values = {(i, name): value for i, (_, own) in enumerate(emitted) for name, value in own.items()}
        if record.step < 0:
            raise ConfigError(
                "profile: no timestep is seen in the model, so its steps cannot be told. A timestep is a tensor that reaches a sine or cosine "
                "and then a layer (a Python float reaches none: pass a tensor); else say model.vdcache.begin() and .step() in run"
            )
        if not values:
            return
        sites = self._sites_of(emitted)
        sizes = {v.shape[-1] for v in values.values()}
        if (self.sites and sites != self.sites) or sizes != {self.grid.tokens if self.grid else 0}:
            raise ConfigError(
                "profile: the model's graph has changed between two calls; profile one size and one mode at a time"
            )
        self.sites = sites
        assert self.grid is not None  # what emits knows its grid
        received = torch.stack([v.float() for v in values.values()], 1).unflatten(
            -1, (self.grid.frames, -1)
        )  # [B, sites, F, S]
        prediction = _prediction(result, self.grid)
        high = received > self.token_threshold
        for sample in range(received.shape[0]):
            mask = self._mask_of(record.generation, sample, prediction)
            inside = mask.flatten(1).to(high.device)
            name = f"generation {record.generation}, lane {record.lane}, sample {sample}"
            series = self.series.setdefault(name, _Series())
            scores, shares = _shares(high[sample], inside)
            series.scores.append(scores.tolist())
            series.shares.append(shares.tolist())
            series.covered.append(inside.float().mean().item())
            before = self._before.get(key := (record.generation, record.lane, sample))
            if before is not None and before.shape == prediction[sample].shape:
                now = prediction[sample]
                series.distances.append(((now - before).abs().mean() / before.abs().mean().clamp(min=1e-12)).item())
            self._before[key] = prediction[sample].clone()
            if name == next(iter(self.series)):
                total = received[sample].cpu()
                self._received = total if self._received is None else self._received + total
                self._seen.append((mask.cpu(), principal_picture(prediction[sample]).cpu().half()))

    def _sites_of(self, emitted: Sequence[Emitted]) -> tuple[ProfiledAttention, ...]:
        """Which attention each emitted value belongs to; blocks are numbered over all graphs of the forward."""
        found: list[ProfiledAttention] = []
        first = 0
        for at, (graph, values) in enumerate(emitted):
            analysis = graph.guarded.analysis  # type: ignore[attr-defined]
            if self.grid is None:
                self.grid = analysis.grid
            number = {b.index: first + i for i, b in enumerate(analysis.denoising_blocks())}
            single = {b.index for b in analysis.denoising_blocks("single")}
            for branch, attention in analysis.denoising_attentions():
                if attention.node in values:
                    of = "single" if branch.block in single else "double"
                    kind = "joint" if len(attention.spans) > 1 else attention.kind
                    layout = attention.layout if attention.layout != "unknown" else self._layout(attention)
                    found.append(ProfiledAttention(number[branch.block], of, kind, layout, attention.form, branch.module, at))
            first += len(number)
        return tuple(found)

    def _layout(self, attention: Attention) -> str:
        assert self.grid is not None  # something was emitted
        own = [s.stop - s.start for s in attention.spans if s.role == "latent"]
        return layout_of(own[0] if own else attention.kv_len or 0, self.grid)

    def finish(self) -> None:
        """Say what was given and not used."""
        if isinstance(self.foreground, list) and self.series and len(self.foreground) > self._generations:
            raise ConfigError(
                f"profile: {len(self.foreground)} masks were given for {self._generations} generations; give one for each"
            )

    def _mask_of(self, generation: int, sample: int, predictions: Tensor) -> Tensor:
        """The foreground of one sample, bool [frames, height, width] of the video tokens."""
        assert self.grid is not None
        known = self.foreground
        self._generations = max(self._generations, generation + 1)
        if isinstance(known, list):
            if generation >= len(known):
                raise ConfigError(f"profile: {len(known)} masks were given, and generation {generation} (counted from 0) began")
            known = known[generation]
        if isinstance(known, Tensor):
            if known.ndim == 4:
                if predictions.shape[0] % known.shape[0]:
                    raise ConfigError(
                        f"profile: the mask has {known.shape[0]} samples, and the model's batch {predictions.shape[0]}"
                    )
                known = known[sample % known.shape[0]]  # with guidance in one batch, both halves show the same
            return to_tokens(known, self.grid)
        found = known(principal_picture(predictions[sample]))
        if isinstance(found, np.ndarray):
            found = torch.from_numpy(found)
        if not isinstance(found, Tensor):
            raise ConfigError(f"a segmenter returns a bool mask [F, H, W]; {known!r} returned {found!r}")
        return to_tokens(found, self.grid)

    def profile(self, name: str, block_threshold: float | None) -> Profile:
        assert self.grid is not None and self._received is not None  # something was taken in
        every = list(self.series.values())
        if not any(any(s.covered) for s in every):
            raise ConfigError(
                "profile: no step of any generation shows a foreground, so no block can be said to look at it; look at the mask"
            )
        if not any(any(map(any, s.shares)) for s in every):
            raise ConfigError(
                f"profile: no token ever receives {self.token_threshold:g} times the mean attention, so no block looks anywhere; lower token_threshold"
            )
        steps = max(len(s.scores) for s in every)  # a lane that ends early is known up to there
        nowhere = [math.nan] * len(self.sites)
        mask, picture = self._seen[2 * len(self._seen) // 3]  # early steps show noise, the last ones little else again
        shape = (len(self.sites), self.grid.frames, self.grid.height, self.grid.width)
        return Profile(
            model=name,
            grid=(self.grid.frames, self.grid.height, self.grid.width),
            sites=self.sites,
            series=tuple(self.series),
            scores=_rounded([_to_length(s.scores, steps, nowhere) for s in every]),
            shares=_rounded([_to_length(s.shares, steps, nowhere) for s in every]),
            covered=_rounded([_to_length(s.covered, steps, math.nan) for s in every]),
            distances=_rounded([_to_length(s.distances, steps - 1, math.nan) for s in every]).reshape(len(every), -1),
            received=_rounded((self._received / len(self._seen)).reshape(shape).numpy()),
            mask=mask.numpy(),
            picture=_rounded(picture.float().numpy()),
            token_threshold=self.token_threshold,
            block_threshold=block_threshold,
        )


def _to_length(values: list[Any], steps: int, nothing: Any) -> list[Any]:
    return values + [nothing] * (steps - len(values))


def _rounded(values: Any) -> Any:
    """Five digits, as a file keeps them: what is read back gives the same lists."""
    return np.round(np.array(values, dtype=float), 5)


def _shares(high: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """R of every site, |high ∩ foreground| / |foreground| per frame, mean over the frames that have a foreground (equation 6), NaN
    without any; and the share of all tokens that are high, which is R where a block has no preference.

    Args:
        high: bool [sites, F, S].
        inside: bool [F, S].
    """
    counts = inside.sum(-1)
    there = counts > 0
    hits = (high & inside).sum(-1)[:, there] / counts[there]
    return hits.mean(-1), high.float().mean((-2, -1))


def to_tokens(mask: Tensor, grid: Grid) -> Tensor:
    """A mask of pixels or latents as one of tokens: those at least half inside. bool [F, H, W] to bool [frames, height, width].

    Raises ConfigError where the mask's sizes are no multiples of the grid's.
    """
    sizes = (grid.frames, grid.height, grid.width)
    if mask.ndim != 3 or any(n < g or n % g for n, g in zip(mask.shape, sizes, strict=False)):
        raise ConfigError(
            f"a foreground mask is [frames, height, width] with sizes that are multiples of the {sizes} video tokens; got {tuple(mask.shape)}"
        )
    if not mask.dtype == torch.bool:
        raise ConfigError(f"a foreground mask is bool, True in the foreground; got {mask.dtype}")
    return F.adaptive_avg_pool3d(mask[None].float(), sizes)[0] >= 0.5


def _prediction(result: Any, grid: Grid) -> Tensor:
    """What the model predicts, as float32 [B, C, F, H, W].

    Videos come as [B, C, F, H, W] or [B, F, C, H, W], images as [B, C, H, W], tokens that are cut outside as [B, N, C].
    """
    leaves = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 3]
    if not leaves:
        raise ConfigError(
            "profile: the model returns no floating-point tensor of three dimensions or more to read a prediction from"
        )
    value = leaves[0].detach().float()
    if value.ndim == 5:
        frames_last = value.shape[2] == grid.frames or (value.shape[1] != grid.frames and value.shape[2] % grid.frames == 0)
        return value if frames_last else value.transpose(1, 2)
    if value.ndim == 4:
        if value.shape[0] % grid.frames == 0 and grid.frames > 1:  # frames folded into the batch
            return value.unflatten(0, (-1, grid.frames)).transpose(1, 2)
        return value[:, :, None]
    if value.ndim == 3 and value.shape[1] == grid.tokens:
        return value.unflatten(1, (grid.frames, grid.height, grid.width)).movedim(-1, 1)
    raise ConfigError(
        f"profile: the model returns {tuple(value.shape)}, in which frames, height and width {grid} are not found"
    )
