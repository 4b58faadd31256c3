"""Recipes: a published method as one value, and the named presets.

A recipe is scope (which slots) × policy (when to recompute) × predictor (what is substituted; here the last value).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vdcache.ir.errors import ConfigError
from vdcache.passes import Canonicalise, MarkBranches, MergeSlots, Observe, Pass, Pipeline
from vdcache.runtime.policies import AdaCache, Always, Codebook, EveryN, MoReg, Policy, scaled

__all__ = ["ADACACHE_CODEBOOKS", "Recipe", "adacache", "recipe", "recipes"]

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
    """

    name: str
    policy: Policy
    passes: tuple[Pass, ...] = (MarkBranches(), MergeSlots())
    source: str = ""
    books: tuple[tuple[int, Codebook], ...] = ()

    @property
    def pipeline(self) -> Pipeline:
        """The passes from a captured graph to the guarded graph; prints as text and parses back."""
        return Pipeline((Canonicalise(), *self.passes))

    def for_steps(self, num_steps: int, said: Callable[[str], None] = lambda message: None) -> Recipe:
        """This recipe for a generation of `num_steps`.

        A codebook of the nearest published number of steps has its rates scaled in proportion (at least 1) and its thresholds
        kept; `said` gets a warning then, because the thresholds were chosen for other steps.
        """
        if not isinstance(self.policy, AdaCache) or not self.books:
            return self
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
        return f"{self.name}: {self.pipeline} | {self.policy}"

    def to_json(self, path: str | Path | None = None) -> str:
        """The recipe as JSON text, also written to `path`."""
        text = json.dumps(
            {
                "name": self.name,
                "pipeline": str(self.pipeline),
                "policy": {"kind": type(self.policy).__name__, **asdict(self.policy)},  # type: ignore[call-overload]
                "source": self.source,
                "books": [[n, asdict(b)["entries"]] for n, b in self.books],
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
            ConfigError: a policy that this version does not know.
        """
        data = json.loads(text.read_text() if isinstance(text, Path) else text)
        kinds = {kind.__name__: kind for kind in (Always, EveryN, AdaCache)}
        options = dict(data["policy"])
        if (kind := kinds.get(options.pop("kind"))) is None:
            raise ConfigError(f"unknown policy {data['policy']['kind']!r}; there are {', '.join(kinds)}")
        if kind is AdaCache:
            options["codebook"] = Codebook.of(options["codebook"]["entries"])
            if options["moreg"] is not None:
                motion: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options["moreg"].items()}
                options["moreg"] = MoReg(**motion)
        passes = tuple(Pipeline.parse(data["pipeline"]).passes[1:])
        books = tuple((n, Codebook.of(entries)) for n, entries in data["books"])
        return Recipe(data["name"], kind(**options), passes, data["source"], books)


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


def recipes() -> dict[str, str]:
    """The named presets, each with one line on what it does."""
    return {
        "always": "recompute every step (the untouched model, with the same clock and history)",
        "every-N": "recompute at steps 0, N, 2N … and the last, for any N: every-2, every-3 …",
        "adacache-slow": "AdaCache with the published slow codebook (arXiv 2411.02397); the default",
        "adacache-fast": "AdaCache with the published fast codebook",
        "adacache-fast+moreg": "the fast codebook with motion regularisation",
        "adacache-slow+moreg": "the slow codebook with motion regularisation",
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
    if match := re.fullmatch(r"adacache-(fast|slow)(\+moreg)?", name):
        return adacache(match[1], moreg=bool(match[2]))
    known = list(recipes())
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ConfigError(
        f"no recipe is called {name!r}"
        + (f"; did you mean {' or '.join(near)}?" if near else ".")
        + f" There are {', '.join(known)}."
    )
