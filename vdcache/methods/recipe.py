"""Recipes: a method as one value. The published ones are made in `vdcache.methods`.

A recipe is scope (which slots) × policy (when to recompute) × predictor (what is substituted).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from vdcache.errors import ConfigError
from vdcache.passes import (
    Canonicalise,
    HoistInvariants,
    MarkBranches,
    MergeSlots,
    Observe,
    Pass,
    Pipeline,
    Probe,
    TileAttention,
)
from vdcache.passes.base import passes_of
from vdcache.passes.catalogue import known_passes
from vdcache.passes.predictors import LAST, PREDICTORS, AnyPredictor, ByGroup
from vdcache.policies.adacache import AdaCache, Codebook, MoReg, scaled
from vdcache.policies.base import Always, Deciding, EveryN, Policy
from vdcache.policies.goal import Goal
from vdcache.policies.plan import Plan
from vdcache.policies.scheduled import CombinedPolicy, MagCache, PlanTable, SchedulePolicy, scaled_to
from vdcache.policies.steps import EveryNth, GrowingIntervals, LeadingSteps, LinearIntervals, StepList, TGateSteps
from vdcache.policies.thresholds import Bounds, EasyCache, Threshold
from vdcache.policies.windows import BroadcastWindow, TimestepWindow
from vdcache.runtime.history import Record, by_generation
from vdcache.util.plugins import Plugin, plugins
from vdcache.util.renamed import CLASSES, current, moved, with_current_fields

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """One caching method.

    Args:
        name: what it is called.
        policy: when to recompute.
        passes: the scope: they run after `canonicalise`, and choose which values are cached and observed.
        source: where it was published.
        books: codebooks by number of steps, from which `for_steps` takes the nearest.
        predictor: computes the substitute of a skipped value.
        derived: numbers of steps whose codebook in `books` is derived, not published; `for_steps` says so.
        goal: the speed-up or quality that the search for a schedule on the model itself is to reach; `policy` applies until one is found.
    """

    name: str
    policy: Policy
    passes: tuple[Pass, ...] = (MarkBranches(), MergeSlots())
    source: str = ""
    books: tuple[tuple[int, Codebook], ...] = ()
    predictor: AnyPredictor | ByGroup = LAST
    derived: tuple[int, ...] = ()
    goal: Goal | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", passes_of(self.passes, f"the recipe '{self.name}'"))
        if isinstance(self.policy, type) or not isinstance(self.policy, Policy):
            missing = [n for n in ("plans", "start", "plan", "observe") if not hasattr(self.policy, n)]
            why = "a class" if isinstance(self.policy, type) else f"which has no {', '.join(missing)}"
            raise ConfigError(
                f"the recipe '{self.name}' has {self.policy!r} for a policy, {why}; give a value, as vdcache.policies.Always() is one"
            )
        if isinstance(self.policy, Deciding) and not any(isinstance(p, Probe) for p in self.passes):
            raise ConfigError(
                f"the recipe '{self.name}' never decides: {type(self.policy).__name__} asks for a probe, and none of its passes is one; add "
                "vdcache.passes.Probe(…)"
            )

    @property
    def pipeline(self) -> Pipeline:
        """The passes from a captured graph to the guarded graph; prints as text and parses back."""
        return Pipeline((Canonicalise(), *self.passes))

    def plans(self) -> tuple[Plan, ...]:
        """Every plan that a step may have."""
        searched = () if self.goal is None else self.goal.plans()
        return tuple(dict.fromkeys((*self.policy.plans(), *searched)))

    @property
    def masks(self) -> tuple[str, ...]:
        """The masks on its attentions: one for all, or one for each."""
        return next((p.masks for p in self.passes if isinstance(p, TileAttention)), ())

    @property
    def fixed_sizes(self) -> bool:
        """Whether some pass writes what is cut for the sizes of one graph."""
        return any(p.fixed_sizes for p in self.passes)

    def with_passes(self, passes: str | Pass | Pipeline | Iterable[Pass]) -> Recipe:
        """This recipe with another scope: a pipeline, its text, or passes; `canonicalise` runs before them in any case.

        Raises:
            ConfigError: an unknown pass or option.
            ContractError: a pass requires what nothing before it ensures.
        """
        if isinstance(passes, str):
            passes = Pipeline.parse(passes, given=Pipeline(()).given | Canonicalise.ensures)
        given = passes_of(passes, "a pipeline")
        made = replace(self, passes=tuple(p for p in given if not isinstance(p, Canonicalise)))
        made.pipeline  # noqa: B018 — its order is checked when it is made
        return made

    def with_masks(self, masks: Any, **where: Any) -> Recipe:
        """This recipe with masks on the attentions of the denoising blocks, in place of those that it had.

        Args:
            masks: a mask or its text ("frames:4"), one for each attention in order, or a `MaskPlan`.
            where: `sites`, `grid`, `text` of the pass `tile-attention`.

        Raises:
            ConfigError: a mask that does not exist.
        """
        given = getattr(masks, "masks", masks)
        tiles = TileAttention(given, **where)
        return replace(self, passes=(tiles, *(p for p in self.passes if not isinstance(p, TileAttention))))

    def hoisting(self, hoist: bool = True) -> Recipe:
        """This recipe with `hoist-invariants` as its last pass, or without it.

        Args:
            hoist: whether what depends on no latent is held instead of computed in every step.
        """
        own = next((p for p in self.passes if isinstance(p, HoistInvariants)), HoistInvariants())
        rest = tuple(p for p in self.passes if not isinstance(p, HoistInvariants))
        return replace(self, passes=(*rest, own) if hoist else rest)

    def following(self, history: Iterable[Record]) -> Recipe:
        """What this recipe did, as a fixed table: each group is reused in a step if it was in more than half of the generations.

        The recipe that comes back measures nothing and waits for nothing. It is for the same number of steps.

        Args:
            history: of a session that ran this recipe, over one generation or more.

        Raises:
            ConfigError: no generation, or generations of unequal length.
        """
        generations = by_generation(history, f"a table for '{self.name}'")
        rows = []
        for step in range(len(generations[0])):
            plans = [g[step][0].plan.reuse for g in generations]
            groups = sorted(frozenset().union(*plans))
            rows.append(tuple(x for x in groups if 2 * sum(x in p for p in plans) > len(plans)) if step else ())
        passes = tuple(p for p in self.passes if not isinstance(p, (Observe, Probe)))
        return replace(self, name=f"{self.name}-fixed", policy=PlanTable(tuple(rows)), passes=passes, books=(), goal=None)

    def for_steps(self, num_steps: int, said: Callable[[str], None] = lambda message: None) -> Recipe:
        """This recipe for a generation of `num_steps`.

        A schedule that was made for another number of steps is scaled in proportion. A codebook of the nearest published number
        of steps has its rates scaled in proportion (at least 1) and its thresholds kept; `said` gets a warning then, because
        the thresholds were chosen for other steps.
        """
        if isinstance(self.policy, CombinedPolicy) and self.books:  # layers with schedules of their own
            each = [
                replace(self, policy=p).for_steps(num_steps, said if not i else lambda message: None)
                for i, p in enumerate(self.policy.policies)
            ]
            return replace(self, policy=CombinedPolicy(tuple(r.policy for r in each)))
        if not isinstance(self.policy, AdaCache) or not self.books:
            policy, changed = scaled_to(self.policy, num_steps)
            if changed:
                said(f"vdcache: '{self.name}': {changed}")
            return replace(self, policy=policy)
        steps, book = min(self.books, key=lambda b: abs(b[0] - num_steps))
        if steps != num_steps or steps in self.derived:
            book = scaled(book, num_steps / steps)
            which = f"the one for {steps}"
            if steps in self.derived:
                which = f"one for {steps} that nobody published, but that follows from the published ones,"
            scale = " with its rates scaled" if steps != num_steps else ""
            said(
                f"vdcache: '{self.name}' has no codebook for {num_steps} steps; {which} is used{scale}: "
                f"{book}. Thresholds tuned for other steps may be far off: calibrate, or give a codebook."
            )
        return replace(self, policy=replace(self.policy, codebook=book))

    def __str__(self) -> str:
        return f"{self.name}: {self.pipeline} | {self.goal or self.policy} | {self.predictor}"

    def to_json(self, path: str | Path | None = None) -> str:
        """The recipe as JSON text, also written to `path`.

        Raises:
            ConfigError: a pass, policy or predictor that no text names: one of no installed package, or made of a function.
        """
        known = known_passes()
        if own := next((p for p in self.pipeline if known.get(p.name) is not type(p)), None):
            raise ConfigError(
                f"the pass '{own}' ({type(own).__qualname__}) is of no installed package, so a file could not be read back: keep the code "
                "that makes the recipe, or name the class as an entry point in vdcache.passes"
            )
        text = json.dumps(
            {
                "name": self.name,
                "pipeline": str(self.pipeline),
                "policy": _plain(self.policy),
                "source": self.source,
                "books": _plain(self.books),
                "predictor": _plain(self.predictor),
                "derived": _plain(self.derived),
                "goal": _plain(self.goal),
            },
            indent=1,
        )
        if path is not None:
            Path(path).write_text(text)
        return text

    @staticmethod
    def from_config(config: Any) -> Recipe:
        """Is `vdcache.methods.from_config` now; this name goes with the next release."""
        found = moved("vdcache.Recipe.from_config", "vdcache.methods.from_config")
        return found(config)  # type: ignore[no-any-return]

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
        derived = _value(data.get("derived", []))
        policy, goal = _value(data["policy"]), _value(data.get("goal"))
        if isinstance(policy, Goal):  # files of the release before held it there
            policy, goal = Always(), policy
        return Recipe(data["name"], policy, passes, data["source"], _value(data["books"]), predictor, derived, goal)


KINDS: dict[str, Any] = {
    k.__name__: k
    for k in (
        *(
            Always,
            EveryN,
            AdaCache,
            Codebook,
            MoReg,
            SchedulePolicy,
            CombinedPolicy,
            PlanTable,
            MagCache,
            TimestepWindow,
            BroadcastWindow,
        ),
        *(Goal, Threshold, EasyCache, Bounds, StepList, LinearIntervals, EveryNth, GrowingIntervals, LeadingSteps, TGateSteps),
        *cast("tuple[type, ...]", tuple(PREDICTORS.values())),
    )
}


def _kinds() -> dict[str, Any]:
    """What a file may hold, by name: vdcache's own, and what installed packages say that they bring, by module and class."""
    others = (p.value for group in ("vdcache.policies", "vdcache.predictors") for p in plugins(group, _why_no_kind))
    return KINDS | {f"{k.__module__}:{k.__qualname__}": k for k in others}


def _why_no_kind(plugin: Plugin) -> str:
    kind = plugin.value
    return "" if isinstance(kind, type) and is_dataclass(kind) else f"{kind!r} is no dataclass of policies or predictors"


def _plain(value: Any) -> Any:
    """A value of policies as JSON takes it."""
    if is_dataclass(value):
        name = next((n for n, kind in _kinds().items() if kind is type(value)), None)
        if name is not None:
            return {"kind": name, **{f.name: _plain(getattr(value, f.name)) for f in fields(value)}}
    if not isinstance(value, (tuple, str, int, float, type(None))):
        raise ConfigError(
            f"{type(value).__name__} is none of vdcache's own policies and predictors ({', '.join(KINDS)}), so a file could not be read "
            "back: keep the code that makes the recipe, or name the class as an entry point in vdcache.policies or vdcache.predictors"
        )
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _value(data: Any) -> Any:
    """What `_plain` was given."""
    if isinstance(data, list):
        return tuple(_value(v) for v in data)
    if not isinstance(data, dict):
        return data
    called = current(CLASSES, data["kind"], "the class")
    if (kind := _kinds().get(called)) is None:
        package, colon, _ = str(data["kind"]).partition(":")
        hint = (
            f"; it is of the package {package.partition('.')[0]!r}, which is not installed or does not name it" if colon else ""
        )
        raise ConfigError(f"unknown policy {data['kind']!r}{hint}; there are {', '.join(_kinds())}")
    try:
        values = {name: _value(v) for name, v in data.items() if name != "kind"}
        return kind(**with_current_fields(called, values))
    except TypeError as error:
        raise ConfigError(f"{data['kind']} cannot be made of {data}: {error}") from error
