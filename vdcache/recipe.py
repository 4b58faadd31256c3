"""Recipes: a published method as one value, and the named presets.

A recipe is scope (which slots) × policy (when to recompute) × predictor (what is substituted).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vdcache.ir.checks import whole_numbers
from vdcache.ir.errors import ConfigError
from vdcache.passes import Canonicalise, MarkBranches, MergeSlots, Observe, Pass, Pipeline
from vdcache.passes.predictors import LAST, LastValue, Predictor, Scaled, Taylor
from vdcache.runtime.policies import AdaCache, Always, Codebook, EveryN, MoReg, Policy, scaled
from vdcache.runtime.schedules import Scheduled, Together, scaled_to
from vdcache.runtime.steps import Intervals, Listed

__all__ = ["ADACACHE_CODEBOOKS", "PROFILINGDIT_LISTS", "Recipe", "adacache", "profilingdit", "recipe", "recipes"]

# The published codebooks: {steps of the generation: {threshold: rate}} (the configs of the reference code).
# No slow one was published for 100 steps.
ADACACHE_CODEBOOKS: Mapping[str, Mapping[int, Mapping[float, int]]] = {
    "fast": {
        30: {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2, 1.00: 1},
        100: {0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.00: 3},
    },
    "slow": {30: {0.08: 3, 0.16: 2, 0.24: 1, 0.32: 1, 0.40: 1, 1.00: 1}},
}
MOREG_WINDOWS: Mapping[int, tuple[int, int]] = {30: (4, 26), 100: (10, 90)}


@dataclass(frozen=True)
class Recipe:
    """One caching method.

    Args:
        name: what it is called.
        policy: when to recompute.
        passes: the scope: what is guarded and observed, after `canonicalise`.
        source: where it was published.
        books: codebooks by number of steps, from which `for_steps` takes the nearest.
        predictor: what is substituted for what is not computed.
    """

    name: str
    policy: Policy
    passes: tuple[Pass, ...] = (MarkBranches(), MergeSlots())
    source: str = ""
    books: tuple[tuple[int, Codebook], ...] = ()
    predictor: Predictor = LAST

    @property
    def pipeline(self) -> Pipeline:
        """The passes from a captured graph to the guarded graph; prints as text and parses back."""
        return Pipeline((Canonicalise(), *self.passes))

    def for_steps(self, num_steps: int, said: Callable[[str], None] = lambda message: None) -> Recipe:
        """This recipe for a generation of `num_steps`.

        A schedule that was made for another number of steps is scaled in proportion. A codebook of the nearest published number of steps has its rates scaled in proportion (at least 1) and its thresholds
        kept; `said` gets a warning then, because the thresholds were chosen for other steps.
        """
        if not isinstance(self.policy, AdaCache) or not self.books:
            policy, changed = scaled_to(self.policy, num_steps)
            if changed:
                said(f"vdcache: '{self.name}': {changed}")
            return replace(self, policy=policy)
        steps, book = min(self.books, key=lambda b: abs(b[0] - num_steps))
        if steps != num_steps:
            book = scaled(book, num_steps / steps)
            said(
                f"vdcache: '{self.name}' has no codebook for {num_steps} steps; the one for {steps} is used with its rates scaled: "
                f"{book}. Thresholds tuned for other steps may be far off: calibrate, or give a codebook."
            )
        moreg = self.policy.moreg
        if moreg is not None:
            of = min(MOREG_WINDOWS, key=lambda n: abs(n - num_steps))
            moreg = replace(moreg, window=MOREG_WINDOWS[of], of_steps=of)
        return replace(self, policy=replace(self.policy, codebook=book, moreg=moreg))

    def __str__(self) -> str:
        return f"{self.name}: {self.pipeline} | {self.policy} | {self.predictor}"

    def to_json(self, path: str | Path | None = None) -> str:
        """The recipe as JSON text, also written to `path`."""
        text = json.dumps(
            {
                "name": self.name,
                "pipeline": str(self.pipeline),
                "policy": _plain(self.policy),
                "source": self.source,
                "books": _plain(self.books),
                "predictor": _plain(self.predictor),
            },
            indent=1,
        )
        if path is not None:
            Path(path).write_text(text)
        return text

    @staticmethod
    def from_json(text: str | Path) -> Recipe:
        """The recipe that `to_json` wrote: JSON text, or the path of a file of it.

        Raises:
            ConfigError: no recipe, or a policy that this version does not know.
        """
        try:
            data = json.loads(text.read_text() if isinstance(text, Path) else text)
        except ValueError as error:
            raise ConfigError(f"this is no recipe: {error}; a file is given as pathlib.Path") from error
        if not isinstance(data, dict) or not {"name", "pipeline", "policy", "source", "books"} <= data.keys():
            raise ConfigError("this JSON is no recipe: it was not written by Recipe.to_json")
        passes = tuple(Pipeline.parse(data["pipeline"]).passes[1:])
        predictor = _value(data.get("predictor", {"kind": "LastValue"}))
        return Recipe(data["name"], _value(data["policy"]), passes, data["source"], _value(data["books"]), predictor)


_KINDS: dict[str, Any] = {
    k.__name__: k for k in (Always, EveryN, AdaCache, Codebook, MoReg, Listed, Intervals, Scheduled, Together)
}
_KINDS |= {k.__name__: k for k in (LastValue, Taylor, Scaled)}


def _plain(value: Any) -> Any:
    """A value of policies as JSON takes it."""
    if is_dataclass(value) and type(value).__name__ in _KINDS:
        return {"kind": type(value).__name__, **{f.name: _plain(getattr(value, f.name)) for f in fields(value)}}
    if not isinstance(value, (tuple, str, int, float, type(None))):
        raise ConfigError(
            f"{type(value).__name__} is none of vdcache's own policies and predictors ({', '.join(_KINDS)}), so a file could not be read "
            "back: keep the code that makes the recipe"
        )
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _value(data: Any) -> Any:
    """What `_plain` was given."""
    if isinstance(data, list):
        return tuple(_value(v) for v in data)
    if not isinstance(data, dict):
        return data
    if (kind := _KINDS.get(data["kind"])) is None:
        raise ConfigError(f"unknown policy {data['kind']!r}; there are {', '.join(_KINDS)}")
    return kind(**{name: _value(v) for name, v in data.items() if name != "kind"})


def adacache(
    codebook: str | Codebook | Mapping[float, int] | Sequence[tuple[float, int]] = "slow",
    *,
    moreg: bool | MoReg = False,
    rule: str = "vdcache",
    distance: str = "l1",
    observe: str = "",
    blocks: Sequence[int] = (),
    first: int = 1,
    last: int = 2,
    frames: int = 0,
    name: str = "",
) -> Recipe:
    """AdaCache (arXiv 2411.02397) with any of its choices.

    Args:
        codebook: "fast" or "slow" (published, scaled to other numbers of steps), or (threshold, rate) entries of any number,
            used as they are.
        moreg: motion regularisation: True for the published constants.
        rule: "vdcache", "paper" or "code"; `AdaCache` says how they differ.
        distance: "l1", "l2" or "cosine".
        observe: kind of the observed branch; empty for temporal attention, else self-attention, else joint attention.
        blocks: blocks in which it is observed, counted from 0; empty for the middle one. Several are averaged.
        first, last: steps that are always computed at either end.
        frames: latent frames for the motion score; 0 reads them off the graph.

    Raises:
        ConfigError: an unknown name, a codebook that does not ascend or has rates below 1.
    """
    books: tuple[tuple[int, Codebook], ...] = ()
    if isinstance(codebook, str):
        if codebook not in ADACACHE_CODEBOOKS:
            raise ConfigError(f"AdaCache published the codebooks {', '.join(ADACACHE_CODEBOOKS)}; got {codebook!r}")
        books = tuple((n, Codebook.of(book)) for n, book in ADACACHE_CODEBOOKS[codebook].items())
        name, book = name or f"adacache-{codebook}", books[0][1]
    else:
        name, book = name or "adacache-custom", Codebook.of(codebook)
    motion = MoReg() if moreg is True else moreg or None
    if motion is not None and "+moreg" not in name:
        name += "+moreg"
    policy = AdaCache(book, moreg=motion, first=first, last=last, rule=rule)
    watch = Observe(
        kind=observe, blocks=tuple(blocks), distance=distance, strides=motion.strides if motion else (), frames=frames
    )
    return Recipe(name, policy, (MarkBranches(), MergeSlots(), watch), "arXiv 2411.02397", books)


# The published lists (the code of arXiv 2504.03140: hyvideo/ditcache.py, wan/cache.py), as literal constants there. Steps count from 0
# in runs of 50. The list of HunyuanVideo's computed steps is no instance of the paper's equation 15: of its 8 steps at most 5 are met by constants that
# give as many.
PROFILINGDIT_LISTS: Mapping[str, tuple[int, ...]] = {
    "hunyuanvideo single": (0, 2, *range(4, 8), *range(10, 22), 23, 25, 26, 27, 31, 33),
    "hunyuanvideo double": tuple(range(6, 20)),
    "hunyuanvideo steps": (6, 18, 26, 32, 38, 42, 46, 48),
    "wan2.1": (0, *range(2, 8), *range(10, 21), *range(25, 33), 37, 38),
}
_PROFILINGDIT = "arXiv 2504.03140"
REUSES = ("background", "foreground", "split", "alternate")


def profilingdit(
    background: Sequence[int] | SupportsBlocks,
    foreground: Sequence[int] = (),
    *,
    when: Intervals | Listed | Sequence[int] | None = None,
    reuse: str = "background",
    span: str = "run",
    of: str = "",
    name: str = "profilingdit",
) -> Recipe:
    """ProfilingDiT (arXiv 2504.03140): reuse the blocks that look at the background, compute the others at every step.

    Args:
        background: blocks that look at the background, or a `Profile`, which knows both lists. Blocks count from 0 among those
            that attend over video tokens.
        foreground: the other blocks; needed where they are reused.
        when: the computed steps: `Intervals` (equation 15), `Listed` or a list of steps. Without, intervals from 12 down to 2
            after a warm-up of 6, for 50 steps, scaled to other numbers of steps: the paper gives no constants, these are the first and
            the last gap of its published list.
        reuse: which blocks are reused between computed steps: "background", "foreground", or both in turn, "split" (foreground
            in the first half, background in the second) or "alternate" (ablations of the paper's table 3).
        span: "run" keeps one delta for a run of consecutive blocks, "block" one for each block.
        of: the "single" or "double" blocks of an MMDiT alone, counted from 0 among these; empty for both.

    Raises:
        ConfigError: an empty list, a block that is in both, an unknown word. A block that the model does not have is refused when
            the model is compiled.
    """
    if isinstance(background, SupportsBlocks):
        if len(foreground):
            raise ConfigError("profilingdit: a profile knows both lists; give either a profile or lists")
        if background.graphs > 1:
            raise ConfigError(
                f"profilingdit: the profiled model breaks into graphs, and its blocks lie in {background.graphs} of them; lists of blocks are for "
                "models of one graph (vdcache.explain says where this one breaks)"
            )
        if of and background.of not in ("", of):
            raise ConfigError(f"profilingdit: the profile speaks of {background.of} blocks, and of={of!r} was asked for")
        chosen = background.only(of) if of and not background.of else background
        lists, of = {"background": chosen.background, "foreground": chosen.foreground}, chosen.of
    else:
        lists = {
            "background": whole_numbers(background, "profilingdit: background"),
            "foreground": whole_numbers(foreground, "profilingdit: foreground"),
        }
    if reuse not in REUSES:
        raise ConfigError(f"profilingdit: reuse is {', '.join(REUSES)}; got {reuse!r}")
    if both := sorted(set(lists["background"]) & set(lists["foreground"])):
        raise ConfigError(f"profilingdit: block {both[0]} is in the foreground and in the background list")
    groups = {"split": ("foreground", "background"), "alternate": ("background", "foreground")}.get(reuse, (reuse,))
    if empty := [g for g in groups if not lists[g]]:
        raise ConfigError(f"profilingdit: reuse={reuse!r} needs a list of {empty[0]} blocks, and it is empty")
    if when is None:
        when = Intervals(warm_up=6, t_max=12, t_min=2, of_steps=50)
    elif not isinstance(when, (Intervals, Listed)):
        when = Listed(when)  # type: ignore[arg-type]
    marks = tuple(MarkBranches(group=g, blocks=lists[g], of=of) for g in groups)
    merges = tuple(MergeSlots(group=g, span=span) for g in groups)
    policy = Scheduled(when, groups, "split" if reuse == "split" else "alternate")
    return Recipe(name, policy, (*marks, *merges), _PROFILINGDIT)


@runtime_checkable
class SupportsBlocks(Protocol):
    """What a `Profile` knows: foreground and background blocks, and of which blocks."""

    @property
    def background(self) -> tuple[int, ...]: ...
    @property
    def foreground(self) -> tuple[int, ...]: ...
    @property
    def of(self) -> str: ...
    @property
    def graphs(self) -> int: ...
    def only(self, of: str) -> SupportsBlocks: ...


def _profilingdit_hunyuanvideo() -> Recipe:
    """Two slot sets on two clocks, so four variants: single blocks by the list of steps, double blocks every 6."""
    lists = PROFILINGDIT_LISTS
    return Recipe(
        "profilingdit-hunyuanvideo",
        Together(
            (
                Scheduled(Listed(lists["hunyuanvideo steps"], of_steps=50), ("single",)),
                Scheduled(Intervals(warm_up=6, t_max=6, t_min=6, of_steps=50), ("double",)),
            )
        ),
        (
            MarkBranches(group="single", blocks=lists["hunyuanvideo single"], of="single", out_of=40),
            MarkBranches(group="double", blocks=lists["hunyuanvideo double"], of="double", out_of=20),
            MergeSlots(group="single"),
            MergeSlots(group="double"),
        ),
        _PROFILINGDIT,
    )


def _profilingdit_wan() -> Recipe:
    return Recipe(
        "profilingdit-wan2.1",
        Scheduled(Intervals(warm_up=6, t_max=6, t_min=6, of_steps=50), ("background",)),
        (MarkBranches(group="background", blocks=PROFILINGDIT_LISTS["wan2.1"], out_of=40), MergeSlots(group="background")),
        _PROFILINGDIT,
    )


_FIRST_ENHANCE = 3  # steps that TaylorSeer's code computes before it skips any


def recipes() -> dict[str, str]:
    """The named presets, each with one line on what it does."""
    return {
        "always": "recompute every step (the untouched model, with the same clock and history)",
        "every-N": "recompute at steps 0, N, 2N … and the last, for any N: every-2, every-3 …",
        "adacache-slow": "AdaCache with the published slow codebook (arXiv 2411.02397); the default",
        "adacache-fast": "AdaCache with the published fast codebook",
        "adacache-fast+moreg": "the fast codebook with motion regularisation",
        "adacache-slow+moreg": "the slow codebook with motion regularisation",
        "fora-N": "FORA (arXiv 2407.01425): recompute every N-th step and the last; the kept values meet the gates of each step",
        "taylorseer-N-O": "TaylorSeer (arXiv 2503.06923): compute three steps and then every N-th; in between a Taylor expansion of order O",
        "profilingdit-hunyuanvideo": "ProfilingDiT with the published lists for HunyuanVideo (arXiv 2504.03140): 20 double and 40 single blocks",
        "profilingdit-wan2.1": "ProfilingDiT with the published list for Wan 2.1 14B: 40 blocks",
    }


def recipe(name: str | Recipe | None = None) -> Recipe:
    """The recipe of a name (None: `adacache-slow`); a recipe is returned as it is.

    Raises:
        ConfigError: there is no such recipe; the message names the nearest.
    """
    if isinstance(name, Recipe):
        return name
    name = "adacache-slow" if name is None else name
    if not isinstance(name, str):
        raise ConfigError(f"recipe is a name or a vdcache.Recipe, got {type(name).__name__}")
    if name == "always":
        return Recipe("always", Always(), ())
    if match := re.fullmatch(r"every-(-?\d+)", name):
        return Recipe(name, EveryN(int(match[1])))
    if match := re.fullmatch(r"fora-(-?\d+)", name):
        return Recipe(name, EveryN(int(match[1])), (MarkBranches(gate="pre"),), "arXiv 2407.01425")
    if match := re.fullmatch(r"taylorseer-(-?\d+)-(-?\d+)", name):
        every, order = int(match[1]), int(match[2])
        when = Intervals(warm_up=_FIRST_ENHANCE - 1, t_max=every, t_min=every)
        return Recipe(name, Scheduled(when), (MarkBranches(gate="pre"),), "arXiv 2503.06923", predictor=Taylor(order))
    if match := re.fullmatch(r"adacache-(fast|slow)(\+moreg)?", name):
        return adacache(match[1], moreg=bool(match[2]))
    if name in (
        published := {"profilingdit-hunyuanvideo": _profilingdit_hunyuanvideo, "profilingdit-wan2.1": _profilingdit_wan}
    ):
        return published[name]()
    if name == "profilingdit":
        raise ConfigError(
            "'profilingdit' needs the lists of one model's blocks: recipe = vdcache.profilingdit(vdcache.profile(model, run)). "
            f"Published lists go by {' and '.join(published)}."
        )
    known = list(recipes())
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ConfigError(
        f"no recipe is called {name!r}"
        + (f"; did you mean {' or '.join(near)}?" if near else ".")
        + f" There are {', '.join(known)}."
    )
