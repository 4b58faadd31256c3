"""The names of recipes: what each stands for, and where its constants come from."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from vdcache.errors import ConfigError
from vdcache.methods.adacache import adacache
from vdcache.methods.attention import FASTERCACHE, fastercache, pab_of, tgate
from vdcache.methods.auto import auto
from vdcache.methods.constants import MAGCACHE_LIMITS, MAGCACHE_RATIOS, MEANCACHE, PAB, TEACACHE_COEFFICIENTS
from vdcache.methods.forecasts import cfg_gate, foca, hicache, meancache, spectrum, zeus
from vdcache.methods.profilingdit import profilingdit_hunyuanvideo, profilingdit_wan
from vdcache.methods.recipe import Recipe
from vdcache.methods.schedules import delta_dit, fora, magcache, taylorseer
from vdcache.methods.thresholds import dbcache, easycache, fbcache, seacache, teacache
from vdcache.passes import HoistInvariants, TileAttention
from vdcache.passes.base import Pass
from vdcache.policies.base import Always, EveryN
from vdcache.util.plugins import Plugin, plugins

__all__ = ["RecipeFamily", "describe", "families", "for_goal", "recipe", "recipes"]


@dataclass(frozen=True)
class RecipeFamily:
    """A family of names.

    Args:
        name: with a letter where a number stands (N, D), and MODEL where a model's constants do.
        make: the recipe, from what stands there.
        summary: one line on what it does.
        constants: where its numbers come from.
        models: what MODEL may be.
        example: values for the letters.
        origin: the package that brings it.
    """

    name: str
    make: Callable[..., Recipe]
    summary: str
    constants: str = ""
    models: tuple[str, ...] = ()
    example: tuple[str, ...] = ()
    origin: str = "vdcache"

    @property
    def pattern(self) -> str:
        text = re.escape(self.name)
        text = re.sub(r"(?<=\\-)N", r"(-?\\d+)", text)
        text = re.sub(r"(?<=\\-)D", r"(-?\\d*\\.?\\d+(?:[eE]-?\\d+)?)", text)
        return text.replace("MODEL", "(" + "|".join(map(re.escape, self.models)) + ")")

    def match(self, name: str) -> Recipe | None:
        found = re.fullmatch(self.pattern, name)
        return self.make(*found.groups()) if found else None


def _magcache(model: str) -> Recipe:
    threshold, max_consecutive, retention = MAGCACHE_LIMITS.get(model, (0.12, 4, 0.2))
    return magcache(
        MAGCACHE_RATIOS[model],
        threshold=threshold,
        max_consecutive=max_consecutive,
        retention=retention,
        name=f"magcache-{model}",
    )


def _dbcache(front: str, back: str, threshold: str) -> Recipe:
    return dbcache(int(front), int(back), float(threshold))


def _tiles(references: str) -> Recipe:
    """Frame masks on every attention, nothing cached."""
    source = "arXiv 2502.06155"
    return Recipe(f"tiles-{references}", Always(), (TileAttention((f"frames:{references}",)),), source)


_TILES = RecipeFamily(
    "tiles-N",
    _tiles,
    "attention within frames, and to and from N reference frames (Efficient-vDiT); with a cache: tiles-4+adacache-fast",
    "N is yours to choose; vdcache.search_masks chooses one for each attention",
    example=("4",),
)
NAMES = (
    RecipeFamily(
        "vdcache-auto",
        auto,
        "twice as fast, or as asked: the steps to compute are found on the model itself, in its first generation; the default",
        "none: they are measured on the model, and kept",
    ),
    RecipeFamily(
        "always",
        lambda: Recipe("always", Always(), ()),
        "recompute every step (the untouched model, with the same step tracking and history)",
    ),
    RecipeFamily(
        "exact",
        lambda: Recipe("exact", Always(), (HoistInvariants(),), "loop-invariant code motion over the denoising loop"),
        "what depends on the prompt or the timestep alone is computed once and held; every step is exact: for models of few steps",
    ),
    RecipeFamily(
        "every-N",
        lambda n: Recipe(f"every-{n}", EveryN(int(n))),
        "recompute at steps 0, N, 2N … and the last, for any N: every-2, every-3 …",
        "N is yours to choose",
        example=("3",),
    ),
    *(
        RecipeFamily(
            f"adacache-{book}{plus}",
            lambda book=book, plus=plus: adacache(book, moreg=bool(plus)),
            f"AdaCache with the published {book} codebook{' and motion regularisation' if plus else ''}"
            + (" (arXiv 2411.02397)" if (book, plus) == ("slow", "") else ""),
            "the codebook of the reference code, for Open-Sora 1.2 at "
            + (
                "30 and 100 steps"
                if book == "fast"
                else "30 steps; for 100 none was published, and ours follows from the fast one's"
            ),
        )
        for book in ("slow", "fast")
        for plus in ("", "+moreg")
    ),
    RecipeFamily(
        "fbcache-D",
        lambda d: fbcache(float(d)),
        "first-block cache: run the first block, and the others only where what it adds changed by D since they last ran",
        "D: .05 is diffusers' default, .08 and .12 are others' for FLUX",
        example=("0.08",),
    ),
    RecipeFamily(
        "dbcache-N-N-D",
        _dbcache,
        "DBCache (cache-dit): the first N and the last N blocks always run, those between where the first changed by D",
        "cache-dit's defaults: 8 and 0 blocks, D .08, 8 warm-up steps",
        example=("8", "0", "0.08"),
    ),
    RecipeFamily(
        "teacache-D",
        lambda d: teacache(float(d)),
        "TeaCache (arXiv 2411.19108) without a polynomial: skip all blocks until the changes of its modulated input add up to D",
        "D is yours to choose; polynomials are fitted to single models",
        example=("0.1",),
    ),
    RecipeFamily(
        "teacache-MODEL-D",
        lambda model, d: teacache(float(d), model),
        "TeaCache with the polynomial that was published for a model",
        "the coefficients of the reference code; D for each model is in its README, .05 to .8",
        tuple(TEACACHE_COEFFICIENTS),
        ("flux", "0.4"),
    ),
    RecipeFamily(
        "seacache-D",
        lambda d: seacache(float(d)),
        "SeaCache (arXiv 2602.18993): as teacache, on a signal filtered by the step's noise level",
        "D: .2 to .4 in its README",
        example=("0.3",),
    ),
    RecipeFamily(
        "easycache-D",
        lambda d: easycache(float(d)),
        "EasyCache (arXiv 2507.02860): skip the whole model until the predicted changes of its output add up to D",
        "D: .025 for HunyuanVideo, .05 to .06 for Wan 2.2",
        example=("0.05",),
    ),
    RecipeFamily(
        "magcache-MODEL",
        _magcache,
        "MagCache (arXiv 2506.09045): skip all blocks while the magnitudes that were measured on a model say that it changes little",
        "the ratios and limits of the reference code (.12, 4 in a row, a fifth retained where it names none); FLUX's step 11 is not singled out",
        tuple(MAGCACHE_RATIOS),
        ("wan2.1-t2v-1.3b",),
    ),
    RecipeFamily(
        "fora-N",
        lambda n: fora(int(n)),
        "FORA (arXiv 2407.01425): the first step and every N-th, counted from the last; kept values meet the gates of each step",
        "N is yours to choose; 2 to 5 in the paper",
        example=("3",),
    ),
    RecipeFamily(
        "taylorseer-N-N",
        lambda n, order: taylorseer(int(n), int(order)),
        "TaylorSeer (arXiv 2503.06923): compute three steps and then every N-th; in between a Taylor expansion of the order that is the second number",
        "the reference code: N 4 to 6 and order 1 to 2 for FLUX",
        example=("4", "1"),
    ),
    RecipeFamily(
        "hicache-N-N",
        lambda n, order: hicache(int(n), int(order)),
        "HiCache (arXiv 2508.16984): as taylorseer, after two steps, under Hermite polynomials, which move less than half as far",
        "the reference code: N 4, order 1, sigma 0.5",
        example=("4", "1"),
    ),
    RecipeFamily(
        "foca-N",
        lambda n: foca(int(n)),
        "FoCa (arXiv 2508.16211): compute three steps and then every N-th; in between each branch goes on as it moved, corrected by its own forecasts",
        "N is yours to choose; the formula is cache-dit's",
        example=("3",),
    ),
    RecipeFamily(
        "spectrum-D",
        lambda d: spectrum(float(d)),
        "Spectrum (arXiv 2603.01623): the last block's output by regression on Chebyshev polynomials; intervals grow from 2 by D a computed step",
        "the reference code: D .75 or 3, degree 4, ridge .1",
        example=("0.75",),
    ),
    RecipeFamily(
        "zeus-N",
        lambda n: zeus(int(n)),
        "ZEUS (arXiv 2604.01552): one of N steps is computed; in between the model's output is extrapolated once from its last two values",
        "the reference code: N 2, or 3 for FLUX; ten steps first and three or five last, of 50",
        example=("2",),
    ),
    RecipeFamily(
        "meancache-MODEL-N",
        lambda model, n: meancache(model, int(n)),
        "MeanCache (arXiv 2601.19961) with a published table of N of 50 steps: the output moved along the trend of its mean",
        "the tables of the reference code that name all of their gaps",
        tuple(MEANCACHE),
        ("qwen-image-2512", "10"),
    ),
    RecipeFamily(
        "cfg-gate-D",
        lambda d: cfg_gate(float(d)),
        "the gate of guidance: after the share D of the run, the unconditional lane keeps its last difference to the conditional one",
        "D is yours to choose (SGLang has the switch, off by default)",
        example=("0.5",),
    ),
    RecipeFamily(
        "delta-dit-N",
        lambda n: delta_dit(int(n)),
        "Δ-DiT (arXiv 2406.01125): every N-th step; in between leave out the rear blocks early in the run, the front blocks late",
        "half of the blocks, half of the run: the paper's constants could not be read",
        example=("3",),
    ),
    RecipeFamily(
        "t-gate-N",
        lambda n: tgate(int(n)),
        "T-GATE (arXiv 2404.02747): cross-attention is frozen after N of 25 steps, self-attention before that computed every fifth step",
        "N 10 and the interval are the reference code's, for SDXL and PixArt",
        example=("10",),
    ),
    RecipeFamily(
        "pab-MODEL",
        pab_of,
        "Pyramid Attention Broadcast (arXiv 2408.12588): spatial, temporal and cross-attention each at a distance of its own",
        "the constants of VideoSys",
        tuple(PAB),
        ("open-sora",),
    ),
    RecipeFamily(
        "fastercache-MODEL",
        fastercache,
        "FasterCache (arXiv 2410.19355): self-attention extrapolated from its last two computed values; the unconditional lane predicted from the conditional one",
        "the scripts of the reference code",
        tuple(FASTERCACHE),
        ("open-sora",),
    ),
    RecipeFamily(
        "profilingdit-hunyuanvideo",
        profilingdit_hunyuanvideo,
        "ProfilingDiT with the published lists for HunyuanVideo (arXiv 2504.03140): 20 double and 40 single blocks",
        "the lists of the reference code, for 50 steps",
    ),
    RecipeFamily(
        "profilingdit-wan2.1",
        profilingdit_wan,
        "ProfilingDiT with the published list for Wan 2.1 14B: 40 blocks",
        "the list of the reference code, for 50 steps",
    ),
    _TILES,
)
_NEEDS = {
    "profilingdit": "the lists of one model's blocks: recipe = vdcache.methods.profilingdit(vdcache.profile(model, run))",
    "magcache": "the magnitudes of one model: recipe = vdcache.methods.magcache(vdcache.calibration.magnitudes(model, run))",
    "smoothcache": "a schedule from a calibration: recipe = vdcache.methods.smoothcache(vdcache.calibration.step_errors(model, run).schedule(alpha))",
    "l2c": "a trained table of layers: recipe = vdcache.methods.l2c(path_or_scores)",
}


def families() -> tuple[RecipeFamily, ...]:
    """vdcache's own families of names, and those that other packages bring as entry points in `vdcache.recipes`."""
    return (*NAMES, *(_of_plugin(p) for p in plugins("vdcache.recipes", _why_not)))


def _why_not(plugin: Plugin) -> str:
    if plugin.name in {n.name for n in NAMES}:
        return f"vdcache has a recipe '{plugin.name}' of its own"
    value = plugin.value
    if not isinstance(value, Recipe | RecipeFamily) and (isinstance(value, type) or not callable(value)):
        return f"{value!r} is no recipe, and no function that makes one"
    return ""


def _of_plugin(plugin: Plugin) -> RecipeFamily:
    """A recipe, or a function of the numbers that stand for N and D in its name; its docstring's first line says what it does."""
    value = plugin.value
    if isinstance(value, RecipeFamily):
        return replace(value, name=plugin.name, origin=plugin.origin)
    if isinstance(value, Recipe):
        return RecipeFamily(plugin.name, lambda: value, value.source or str(value), origin=plugin.origin)
    letters = re.findall(r"(?<=-)[ND](?=-|$)", plugin.name)

    def make(*texts: str) -> Recipe:
        given = [int(t) if letter == "N" else float(t) for letter, t in zip(letters, texts, strict=True)]
        try:
            made = value(*given)
        except ConfigError:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise ConfigError(f"'{plugin.name}' of {plugin.origin} could not be made of {given}: {said}") from error
        if not isinstance(made, Recipe):
            raise ConfigError(f"'{plugin.name}' of {plugin.origin} makes {type(made).__name__}, which is no vdcache.Recipe")
        return made

    summary = (inspect.getdoc(value) or str(value)).partition("\n")[0]
    return RecipeFamily(
        plugin.name, make, summary, example=tuple("3" if c == "N" else "0.1" for c in letters), origin=plugin.origin
    )


def recipes() -> dict[str, str]:
    """The named presets, each with one line on what it does."""
    return {n.name: n.summary for n in families()}


def recipe(name: str | Recipe | None = None) -> Recipe:
    """The recipe of a name (None: `vdcache-auto`); a recipe is returned as it is.

    Raises:
        ConfigError: there is no such recipe; the message names the nearest.
    """
    if isinstance(name, Recipe):
        return name
    name = "vdcache-auto" if name is None else name
    if not isinstance(name, str):
        raise ConfigError(f"recipe is a name or a vdcache.Recipe, got {type(name).__name__}")
    for named in families():
        if (found := named.match(name)) is not None:
            return found
    masks, plus, rest = name.partition("+")
    if plus and (tiles := _TILES.match(masks)) is not None:
        return replace(recipe(rest).with_masks(tiles.masks), name=name)
    if name in _NEEDS:
        family = [n.name for n in families() if n.name.startswith(f"{name}-")]
        published = f" Published ones go by {' and '.join(family)}." if family else ""
        raise ConfigError(f"'{name}' needs {_NEEDS[name]}.{published}")
    for named in families():
        if named.models and re.fullmatch(named.pattern.replace("|".join(map(re.escape, named.models)), r"[\w.\-]+"), name):
            raise ConfigError(f"{name!r}: there are no constants for that model; {named.name} is for {', '.join(named.models)}")
    for named in families():
        unfinished = {named.name.rpartition("-")[0].replace("MODEL", m) for m in named.models}
        if named.name.endswith("-D") and name in unfinished:
            raise ConfigError(f"no recipe is called {name!r}; did you mean {named.name}, as in {name}-{named.example[-1]}?")
    known = list(recipes())
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ConfigError(
        f"no recipe is called {name!r}"
        + (f"; did you mean {' or '.join(near)}?" if near else ".")
        + f" There are {', '.join(known)}."
    )


def for_goal(chosen: str | Recipe | None, speedup: float | None, quality_db: float | None) -> Recipe:
    """`recipe`, for what `vdcache-auto` is to reach.

    Raises:
        ConfigError: a goal for another recipe, or two goals.
    """
    found = recipe(chosen)
    if speedup is None and quality_db is None:
        return found
    if found.goal is None:
        raise ConfigError(
            f"speedup and quality_db are what vdcache-auto is to reach; '{found.name}' goes by its own numbers: leave out one or the other"
        )
    return replace(found, goal=auto(speedup=speedup, quality_db=quality_db).goal)


@dataclass(frozen=True)
class RecipeDescription:
    """What `vdcache recipes NAME` prints."""

    name: str
    summary: str
    scope: tuple[str, ...]
    policy: str
    predictor: str
    plans: tuple[str, ...]
    probes: bool
    constants: str
    source: str
    models: tuple[str, ...] = ()
    origin: str = "vdcache"


def describe(name: str) -> RecipeDescription:
    """The parts of a recipe, by a name, or by a family as `recipes()` lists it (then with example numbers).

    Raises:
        ConfigError: there is no such recipe.
    """
    named = next((n for n in families() if n.name == name), None)
    if named is not None:
        made = named.make(*named.example)
    else:
        made = recipe(name)
        cached = name.partition("+")[2] if _TILES.match(name.partition("+")[0]) is not None else ""
        named = next(n for n in families() if n.match(cached or name) is not None)
    plans = tuple(map(str, made.plans()))
    scope = tuple(_sentence(p) for p in made.passes) or ("nothing is guarded",)
    probes = any(p.name == "probe" for p in made.passes)
    return RecipeDescription(
        made.name,
        named.summary,
        scope,
        str(made.goal or made.policy),
        str(made.predictor),
        plans,
        probes,
        named.constants,
        made.source,
        named.models,
        named.origin,
    )


def _sentence(a_pass: Pass) -> str:
    """A pass as it prints, with the first line of its module, which says what it does."""
    import sys

    text = (sys.modules[type(a_pass).__module__].__doc__ or "").splitlines()[0]
    return f"{a_pass}: {text.partition(': ')[2] or text}"
