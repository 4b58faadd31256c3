"""Which mask for which layer: Efficient-vDiT's search (arXiv 2502.06155, algorithm 1 and appendix A) on any model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, fx

from vdcache.attention.autotune import autotune
from vdcache.attention.masks import AttentionMask, Dense, parse_mask
from vdcache.attention.tiles import gather
from vdcache.calibration.allocate import Allocation, dynamic, lagrangian
from vdcache.calibration.graph_replay import GraphReplay, ReplayRun, record
from vdcache.errors import ConfigError
from vdcache.ir.ops import tensor_of
from vdcache.passes.tile_attention import AttentionOperands
from vdcache.util.checks import number, whole
from vdcache.util.files import write_aside
from vdcache.util.json import read_json, write_json

__all__ = ["MaskPlan", "search_masks"]

DENSE = str(Dense())


@dataclass(frozen=True)
class MaskPlan:
    """A mask for every attention, and what it was chosen from. Give it to `Recipe.with_masks`.

    Args:
        masks: of each attention in the order of the graph, as text.
        sites: their names in the graph.
        modules: where they stand in the user's model.
        options: the masks that were tried, densest first; "dense" is the first.
        losses: of each attention and option, the largest mean squared error of the final hidden states over the calls; None where
            it was not needed.
        seconds: of each attention and option on this device, as measured; empty where times played no part.
        densities: of each attention and option, the share of the weights that is computed.
        rule: how it was chosen, in words.
        bound: no plan within the budget has a smaller loss; None under a threshold.
        work: how many times more FLOPs it would have taken to run the whole model once per attention, mask and call.
    """

    masks: tuple[str, ...]
    sites: tuple[str, ...]
    modules: tuple[str, ...]
    options: tuple[str, ...]
    losses: tuple[tuple[float | None, ...], ...] = field(repr=False)
    seconds: tuple[tuple[float, ...], ...] = field(repr=False)
    densities: tuple[tuple[float, ...], ...] = field(repr=False)
    rule: str
    bound: float | None = None
    work: float = 1.0

    def _of(self, table: Sequence[Sequence[Any]]) -> list[Any]:
        return [row[self.options.index(m)] for row, m in zip(table, self.masks, strict=True)]

    @property
    def density(self) -> float:
        """The share of the weights of all these attentions that is computed."""
        return sum(self._of(self.densities)) / len(self.masks)

    @property
    def speedup(self) -> float | None:
        """Of these attentions together, from the times measured on this device; None where none were."""
        if not self.seconds:
            return None
        return float(sum(row[0] for row in self.seconds) / sum(self._of(self.seconds)))

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan as JSON text, also written to `path`."""
        return write_json(self, path, indent=1)

    @staticmethod
    def from_json(text: str | Path) -> MaskPlan:
        """What `to_json` wrote: text, or the path of a file.

        Raises:
            ConfigError: something else.
        """
        return read_json(MaskPlan, text, "plan of masks")

    def __str__(self) -> str:
        lines = [f"{self.rule}: {self.density:.0%} of the weights"]
        if self.speedup is not None:
            lines[0] += f", attention {self.speedup:.2f}× as fast here"
        wide = max(len(m) for m in self.masks)
        losses, densities = self._of(self.losses), self._of(self.densities)
        for i, (mask, loss, share) in enumerate(zip(self.masks, losses, densities, strict=True)):
            bar = "█" * round(24 * share)
            lines.append(
                f"  {i:3d} {mask:<{wide}} {bar:<24} {share:4.0%}  loss {0.0 if loss is None else loss:.3g}  {self.modules[i]}"
            )
        return "\n".join(lines)

    def figure(self, path: str | Path) -> Path:
        """A picture of the weights that each attention keeps (the paper's figure 4)."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        fig, ax = plt.subplots(figsize=(max(4, 0.32 * len(self.masks) + 2), 3.2), layout="constrained")
        densities = self._of(self.densities)
        shades = {m: plt.get_cmap("viridis")(i / max(1, len(self.options) - 1)) for i, m in enumerate(self.options)}
        for mask in self.options:
            own = [i for i, m in enumerate(self.masks) if m == mask]
            if own:
                ax.bar(own, [100 * (1 - densities[i]) for i in own], color=shades[mask], label=mask)
                ax.plot(own, [0] * len(own), "o", color=shades[mask], markersize=4, clip_on=False)
        ax.set(xlabel="attention", ylabel="left out, % of weights", ylim=(0, 100), title=self.rule)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8, ncols=3)
        fig.savefig(path, dpi=150)
        plt.close(fig)
        return Path(path)


def search_masks(
    model: Callable[..., Any],
    run: Callable[..., Any],
    masks: Iterable[AttentionMask | str],
    *,
    prompts: Iterable[Any] | None = None,
    threshold: float | None = None,
    budget: float | None = None,
    timesteps: int = 4,
    cumulative: bool = False,
    cost: str = "time",
    objective: str = "sum",
    solver: str = "dynamic",
    table: str | Path | None = None,
    grid: Sequence[int] = (),
    text: Sequence[int] = (),
    seed: int = 0,
    console: Console | None = None,
) -> MaskPlan:
    """Choose a mask for each attention of a model (Efficient-vDiT, arXiv 2502.06155).

        plan = vdcache.search_masks(model, lambda m: sample(m, "a cat"), ["frames:4", "frames:2", "frames:1"], threshold=0.01)
        fast = vdcache.compile(model, vdcache.Recipe("masked", vdcache.policies.Always()).with_masks(plan))

    With a threshold it is the paper's algorithm 1: layer by layer, from dense to sparse, the sparsest mask before the first one
    whose loss is not strictly below r; full attention where even the densest fails. With a budget it is appendix A: the least loss
    whose time fits. The loss is the mean squared error of the final hidden states when one attention alone has the mask, and
    the largest of it over random calls counts. What comes before an attention is computed once for all its masks.

    Args:
        model, run, prompts: as `vdcache.profile` takes them.
        masks: to choose from, in any order.
        threshold: r, in the square of the units of the final hidden states.
        budget: what all these attentions may cost together, as a share of what they cost without masks, 0 to 1.
        timesteps: calls that are kept of every prompt, at random (the paper's m).
        cumulative: later attentions see the masks of earlier ones, as line 17 of the listing has it; only with a threshold.
        cost: "time" as measured on this device, or "weights", the share that is computed.
        objective: "sum" or "max" of the losses, with a budget.
        solver: "dynamic" (the optimum, by integer programming; needs scipy) or "lagrangian" (the relaxation), with a budget.
        table: a file of losses that grows as they are measured, and is gone on with.
        grid, text: of the pass `tile-attention`, where the graph does not show them.
        seed: of the choice of calls.
        console: where the progress is shown.

    Raises:
        ConfigError: neither or both of threshold and budget, a mask that does not fit, a budget that cannot be met (with the
            least that can), a table of another search.
        CacheStateError: `run` did not call the model.
    """
    options = _options(masks)
    _check_rule(threshold, budget, cumulative)
    _check_solver(solver, objective, cost)
    whole(timesteps, "timesteps, the calls kept of a prompt,", 1)
    replay = record(model, run, prompts, "search_masks", keep=timesteps, seed=seed, grid=grid, text=text)
    options = _by_density(options, replay)
    sites = replay.sites
    densities = [[replay.places[s].on(parse_mask(o)).density for o in options] for s in sites]
    search = _Search(replay, options, _Table(table, replay, options, cumulative))
    shown = console or Console(stderr=True)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=shown, transient=True) as progress:
        chosen = search.losses(progress, threshold, cumulative)
        seconds: list[list[float]] = []
        if threshold is not None:
            masks_, bound = chosen, None
            rule = f"loss below {threshold:g}" + (", cumulative" if cumulative else "")
        else:
            seconds = search.seconds(progress) if cost == "time" else []
            assert budget is not None
            found = _within(search.table.rows(), seconds or densities, budget, cost, objective, solver)
            masks_, bound = [options[i] for i in found.choice], found.bound
            rule = f"{budget:.0%} of the {cost} of dense attention, least {objective} of losses, {solver}"
    return MaskPlan(
        tuple(masks_),
        tuple(s.name for s in sites),
        tuple(replay.modules[s] for s in sites),
        options,
        search.table.rows(),
        tuple(map(tuple, seconds)),
        tuple(map(tuple, densities)),
        rule,
        bound,
        search.work,
    )


def _check_rule(threshold: float | None, budget: float | None, cumulative: bool) -> None:
    if (threshold is None) == (budget is None):
        raise ConfigError("search_masks takes a threshold of the loss, or a budget of time: one of the two")
    if threshold is not None and not number(threshold, "threshold is the largest loss") > 0:
        raise ConfigError(f"threshold is a loss above 0; got {threshold}")
    if budget is not None and not 0 < number(budget, "budget is a share of the cost without masks") <= 1:
        raise ConfigError(f"budget is a share of the cost without masks, above 0 and at most 1; got {budget}")
    if cumulative and threshold is None:
        raise ConfigError("cumulative goes with a threshold: under a budget the losses of layers are taken to be independent")


def _check_solver(solver: str, objective: str, cost: str) -> None:
    if solver not in ("dynamic", "lagrangian") or objective not in ("sum", "max") or cost not in ("time", "weights"):
        raise ConfigError(
            f"solver is dynamic or lagrangian, objective sum or max, cost time or weights; got {solver!r}, {objective!r}, {cost!r}"
        )
    if solver == "lagrangian" and objective == "max":
        raise ConfigError("the Lagrangian adds losses: objective='max' goes with solver='dynamic'")


def _options(masks: Iterable[AttentionMask | str]) -> tuple[str, ...]:
    if isinstance(masks, (str, AttentionMask)):
        masks = [masks]
    found = tuple(dict.fromkeys(str(parse_mask(m)) for m in masks))
    if not [m for m in found if m != DENSE]:
        raise ConfigError("search_masks needs at least one mask besides dense attention")
    return found


def _by_density(options: Sequence[str], replay: GraphReplay) -> tuple[str, ...]:
    """Dense attention, then the masks from dense to sparse on the first site.

    Raises:
        ConfigError: a mask does not fit one of the attentions; it is named.
    """
    for site in replay.sites:
        for text in options:
            try:
                replay.places[site].on(parse_mask(text))
            except ConfigError as error:
                raise ConfigError(f"search_masks: '{site.name}' ({replay.modules[site]}): {error}") from None
    first = replay.places[replay.sites[0]]
    rest = sorted((o for o in options if o != DENSE), key=lambda o: -first.on(parse_mask(o)).density)
    return (DENSE, *rest)


def _within(
    losses: Sequence[Sequence[float | None]],
    costs: Sequence[Sequence[float]],
    budget: float,
    cost: str,
    objective: str,
    solver: str,
) -> Allocation:
    rows = [[0.0 if v is None else v for v in row] for row in losses]
    dense = sum(row[0] for row in costs)
    allowed = budget * dense
    least = sum(min(row) for row in costs)
    if least > allowed:
        raise ConfigError(
            f"no plan of these masks takes {budget:.1%} of the {cost} of dense attention; the least is {least / dense:.1%}: allow more, or "
            "give sparser masks"
            + (" (short sequences gain no time by them; cost='weights' counts weights)" if cost == "time" else "")
        )
    if solver == "lagrangian":
        return lagrangian(rows, costs, allowed)
    return dynamic(rows, costs, allowed, objective=objective)


class _Search:
    """Losses and times of one search."""

    def __init__(self, replay: GraphReplay, options: tuple[str, ...], table: _Table) -> None:
        self.replay, self.options, self.table = replay, options, table
        self._spent = 0
        self._asked = 0  # losses measured

    @property
    def work(self) -> float:
        """How many times more running the whole model for each loss would have cost."""
        return self._asked * self.replay.flops_after(None) / self._spent if self._spent and self._asked else 1.0

    def losses(self, progress: Progress, threshold: float | None, cumulative: bool) -> list[str]:
        """Fill the table; under a threshold, the masks that algorithm 1 chooses."""
        replay, sites = self.replay, self.replay.sites
        bar = progress.add_task("losses", total=len(sites) * (len(self.options) - 1))
        if not cumulative and (done := self._chosen(threshold)) is not None:
            return done
        wanted = [replay.start(call).finish() for call in replay.calls]
        runs = [replay.start(call) for call in replay.calls]
        self._spent += 2 * len(runs) * replay.flops_after(None)
        chosen: list[str] = []
        for i, site in enumerate(sites):
            for one in runs:
                one.until(site)
            after = replay.flops_after(site)

            def loss_of(j: int, i: int = i, site: fx.Node = site, after: int = after) -> float:
                if (loss := self.table.get(i, j)) is None:
                    loss = max(self._loss(site, one, want, self.options[j]) for one, want in zip(runs, wanted, strict=True))
                    self.table.put(i, j, loss)
                    self._asked += len(runs)
                    self._spent += len(runs) * after
                progress.update(bar, advance=1)
                return loss

            best = self._best(threshold, loss_of)
            assert best is not None  # every loss was measured
            progress.update(bar, completed=(i + 1) * (len(self.options) - 1))
            chosen.append(best)
            for one in runs:
                value = self._attend(site, one, best) if cumulative and best != DENSE else one.compute(site)
                one.put(site, value)
        return chosen

    def _chosen(self, threshold: float | None) -> list[str] | None:
        """The answer, where the table holds all that is needed."""
        chosen = []
        for i in range(len(self.replay.sites)):
            best = self._best(threshold, lambda j, i=i: self.table.get(i, j))  # type: ignore[misc]
            if best is None:
                return None
            chosen.append(best)
        return chosen

    def _best(self, threshold: float | None, loss_of: Callable[[int], float | None]) -> str | None:
        """Algorithm 1 for one attention: the last mask before the first whose loss is not below the threshold. Without one all losses
        are asked for. None where a loss is not known."""
        best = DENSE
        for j, option in enumerate(self.options[1:], start=1):
            if (loss := loss_of(j)) is None:
                return None
            if threshold is not None:
                if not loss < threshold:
                    break
                best = option
        return best

    def _attend(self, site: fx.Node, one: ReplayRun, option: str) -> Tensor:
        place = self.replay.places[site]
        q, k, v = (one.values[n] for n in (place.query, place.key, place.value))
        bias = None if place.bias is None else one.values[place.bias]
        with torch.no_grad():
            out = gather(q, k, v, place.on(parse_mask(option)), place.scale, bias)
        like = site.meta["val"]
        if out.stride() == like.stride():
            return out
        return torch.empty_strided(like.shape, like.stride(), dtype=out.dtype, device=out.device).copy_(out)

    def _loss(self, site: fx.Node, one: ReplayRun, want: Tensor, option: str) -> float:
        got = one.end_with(site, self._attend(site, one, option))
        return float((got.float() - want.float()).square().mean())

    def seconds(self, progress: Progress) -> list[list[float]]:
        """Times of every attention under every mask, on this device."""
        bar = progress.add_task("times", total=len(self.replay.sites) * (len(self.options) - 1))
        rows = []
        for site in self.replay.sites:
            place = self.replay.places[site]
            row: list[float] = []
            for option in self.options[1:]:
                found = _measured(place, option)
                if not row:
                    row.append(found["dense"])
                # ratios are measured side by side, so it is the ratio that counts
                row.append(row[0] * found["chosen"] / found["dense"])
                progress.update(bar, advance=1)
            rows.append(row)
        return rows


def _measured(place: AttentionOperands, option: str) -> dict[str, float]:
    query, key, value = tensor_of(place.query), tensor_of(place.key), tensor_of(place.value)
    bias = None if place.bias is None else tensor_of(place.bias)
    assert query is not None and key is not None and value is not None
    on = place.on(parse_mask(option))
    found = autotune(query, key, value, bias, on, place.scale)
    if not found.seconds:  # too long to measure: by the weights that are left
        return {"dense": 1.0, "chosen": on.density}
    return {"dense": found.seconds["dense"], "chosen": found.seconds[found.lowering]}


class _Table:
    """Losses by attention and option, in a file that grows."""

    def __init__(self, path: str | Path | None, replay: GraphReplay, options: Sequence[str], cumulative: bool) -> None:
        self._path = None if path is None else Path(path)
        self._size = (len(replay.sites), len(options))
        self._head = {
            "options": list(options),
            "sites": [s.name for s in replay.sites],
            "cumulative": cumulative,
            "inputs": replay.fingerprint() if path is not None else "",
        }
        self._found: dict[str, float] = {}
        if self._path is not None and self._path.exists():
            try:
                data = json.loads(self._path.read_text())
                found = {str(k): float(v) for k, v in data.pop("losses").items()}
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{self._path} is no table of losses of search_masks; give another file, or move it away"
                ) from error
            if other := [k for k in self._head if data.get(k) != self._head[k]]:
                raise ConfigError(
                    f"{self._path} is the table of another search ({', '.join(other)} differ): give another file, or move it away"
                )
            self._found = found

    def get(self, site: int, option: int) -> float | None:
        return self._found.get(f"{site},{option}")

    def put(self, site: int, option: int, loss: float) -> None:
        self._found[f"{site},{option}"] = loss
        if self._path is not None:
            write_aside(self._path, json.dumps({**self._head, "losses": self._found}, indent=1))

    def rows(self) -> tuple[tuple[float | None, ...], ...]:
        sites, options = self._size
        return tuple((0.0, *(self.get(i, j) for j in range(1, options))) for i in range(sites))
