"""Cache configurations of other libraries as recipes, read by their fields; neither library is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from vdcache.errors import ConfigError, warn
from vdcache.methods.attention import pab
from vdcache.methods.recipe import Recipe
from vdcache.methods.schedules import magcache
from vdcache.methods.thresholds import dbcache, fbcache, seacache
from vdcache.passes import MarkBranches, MarkLanes, MergeSlots, Pass
from vdcache.passes.mark_branches import TYPES
from vdcache.passes.predictors import ByGroup, Frequencies
from vdcache.policies.base import Policy
from vdcache.policies.scheduled import CombinedPolicy, SchedulePolicy
from vdcache.policies.steps import EveryNth, StepList
from vdcache.policies.weights import Extrapolated, Taylor
from vdcache.policies.windows import TimestepWindow

__all__ = ["from_config"]


def from_config(config: Any) -> Recipe:
    """The recipe of a cache configuration of diffusers (FirstBlockCache, PyramidAttentionBroadcast, FasterCache, TaylorSeerCache,
    MagCache, SeaCache) or cache-dit (DBCache, with a mask of steps or without).

    Where they differ from the library's own: names of modules play no part, the number of steps is the run's, and all lanes of
    guidance follow one plan. A `VdcacheWarning` names what was set and is not carried over.

    Args:
        config: the library's object.

    Raises:
        ConfigError: no such configuration, or one that cannot be followed at all.
    """
    if isinstance(config, type):
        raise ConfigError(f"pass a configuration that is made, {config.__name__}(…), not the class")
    if not is_dataclass(config):
        raise ConfigError(f"from_config takes a cache configuration of diffusers or cache-dit; got {type(config).__name__}")
    names = {f.name for f in fields(config)}
    for wanted, read in _READERS:
        if wanted <= names:
            given = _Given(config)
            made = read(given)
            given.tell(made)
            return made
    raise ConfigError(
        f"{type(config).__name__} is no cache configuration that vdcache knows: it has {', '.join(sorted(names))}. "
        "vdcache.recipes() lists the methods that there are"
    )


class _Given:
    """A configuration that remembers what was not carried over."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._usual = {f.name: f.default for f in fields(config)}
        self.lost: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def get(self, name: str, default: Any = None) -> Any:
        """A field; `default` where it is missing or None."""
        value = getattr(self._config, name, None)
        return default if value is None else value

    def lose(self, why: str, *names: str) -> None:
        """Fields that have no counterpart: said where they differ from what they usually are."""
        changed = [n for n in names if getattr(self._config, n, None) != self._usual.get(n)]
        if changed:
            self.lost.append(f"{', '.join(changed)} ({why})")

    def tell(self, made: Recipe) -> None:
        if self.lost:
            warn(f"vdcache: {type(self._config).__name__} as '{made.name}': not carried over: {'; '.join(self.lost)}")


BLOCKS = "branches are found by structure, not by the names of modules"


def _first_block(given: _Given) -> Recipe:
    return fbcache(float(given.threshold))


def _magcache(given: _Given) -> Recipe:
    if given.calibrate:
        raise ConfigError(
            "calibrate=True measures and caches nothing; vdcache.calibration.magnitudes(model, run) measures the ratios"
        )
    if given.mag_ratios is None:
        raise ConfigError(
            "this MagCacheConfig has no mag_ratios; vdcache.methods.magcache(vdcache.calibration.magnitudes(model, run)) measures them"
        )
    ratios = [float(r) for r in given.mag_ratios]
    return magcache(
        ratios, threshold=float(given.threshold), max_consecutive=given.max_skip_steps, retention=float(given.retention_ratio)
    )


def _taylor(given: _Given) -> Recipe:
    n, first = given.cache_interval, given.disable_cache_before_step
    given.lose(
        "the number of steps is not known before the run; vdcache.policies.EveryNth(n, last=…) counts from the end",
        "disable_cache_after_step",
    )
    given.lose("differences are kept in float32", "taylor_factors_dtype")
    given.lose(BLOCKS, "skip_predict_identifiers", "cache_identifiers")
    attention = MarkBranches(kinds=(*TYPES["attn"], *TYPES["cross"]), gate="pre")
    passes: tuple[Pass, ...] = (MarkBranches(), MergeSlots()) if given.use_lite_mode else (attention,)
    when = EveryNth(n, first=first, offset=(first + 1) % n)
    predictor = Taylor(given.max_order)
    return Recipe(f"taylorseer-{n}-{given.max_order}", SchedulePolicy(when), passes, "arXiv 2503.06923", predictor=predictor)


def _pab(given: _Given) -> Recipe:
    parts = []
    for kind in ("spatial", "temporal", "cross"):
        given.lose(BLOCKS, f"{kind}_attention_block_identifiers")
        n = given.get(f"{kind}_attention_block_skip_range", 0)
        if n > 1:
            window = tuple(map(float, getattr(given, f"{kind}_attention_timestep_skip_range")))
            distances = {"spatial": 0, "temporal": 0, "cross": 0, kind: n}
            parts.append(pab(**distances, window=window))  # type: ignore[arg-type]
    if not parts:
        raise ConfigError("this PyramidAttentionBroadcastConfig reuses nothing: every skip range is None or 1")
    policies = [p for part in parts for p in part.policy.policies]  # type: ignore[attr-defined]
    return Recipe("pab", CombinedPolicy(tuple(policies)), tuple(p for part in parts for p in part.passes), "arXiv 2408.12588")


def _faster(given: _Given) -> Recipe:
    given.lose(BLOCKS, "spatial_attention_block_identifiers", "temporal_attention_block_identifiers")
    given.lose("arguments are found by structure", "_unconditional_conditional_input_kwargs_identifiers")
    given.lose("the layout of the latent is found by structure", "tensor_format")
    given.lose(
        "weights apply in all steps; vdcache.methods.fastercache has them by step",
        "attention_weight_callback",
        "low_frequency_weight_callback",
        "high_frequency_weight_callback",
        "low_frequency_weight_update_timestep_range",
        "high_frequency_weight_update_timestep_range",
    )
    passes: list[Pass] = []
    policies: list[Policy] = []
    weights = []
    layouts = {"spatial": ("spatial", "full", "unknown"), "temporal": ("temporal",)}
    for kind, layout in layouts.items():
        n = given.get(f"{kind}_attention_block_skip_range", 0)
        if n > 1:
            window = tuple(map(float, getattr(given, f"{kind}_attention_timestep_skip_range")))
            passes.append(MarkBranches(kinds=TYPES["attn"], group=kind, gate="pre", layouts=layout))
            policies.append(TimestepWindow(n, window, kind))  # type: ignore[arg-type]
            weights.append((kind, Extrapolated(0.5)))
    if not given.is_guidance_distilled and given.unconditional_batch_skip_range > 1:
        low, high = map(float, given.unconditional_batch_timestep_skip_range)
        passes.append(MarkLanes("batch", "first"))
        policies.append(TimestepWindow(given.unconditional_batch_skip_range, (low, high), "lane"))
        frequencies = Frequencies((given.alpha_low_frequency, 0, 10**6), (given.alpha_high_frequency, 0, 10**6))
        weights.append(("lane", frequencies))  # type: ignore[arg-type]
    if not policies:
        raise ConfigError("this FasterCacheConfig reuses nothing: every skip range is None or 1")
    predictors = ByGroup(tuple(weights))  # type: ignore[arg-type]
    return Recipe("fastercache", CombinedPolicy(tuple(policies)), tuple(passes), "arXiv 2410.19355", predictor=predictors)


def _sea(given: _Given) -> Recipe:
    given.lose("the last value is reused", "residual_order")
    given.lose("there is no such limit here", "max_consecutive_cached")
    given.lose("the filter's exponent is that of the authors", "power_exp")
    given.lose("the latent is found by structure", "raw_vision_callback")
    return seacache(float(given.threshold), location="input", first=max(1, given.retention_steps), last=given.cache_end_steps)


def _dbcache(given: _Given) -> Recipe:
    kind = str(getattr(given.cache_type, "value", given.cache_type))
    if "prune" in kind.lower():
        raise ConfigError("cache-dit's DBPrune leaves blocks out of computed steps, which vdcache has no recipe for")
    given.lose("all steps of the warm-up are computed", "warmup_interval")
    given.lose("all lanes of a step follow one plan", "enable_separate_cfg", "cfg_compute_first", "cfg_diff_compute_separate")
    given.lose("a call of the pipeline is one generation", "force_refresh_step_hint", "force_refresh_step_policy")
    front, back = given.get("Fn_compute_blocks", 8), given.get("Bn_compute_blocks", 0)
    threshold = float(given.get("residual_diff_threshold", 0.08))
    mask = tuple(int(m) for m in given.get("steps_computation_mask", ()))
    if mask and given.get("steps_computation_policy", "dynamic") == "static":
        if mask[0] != 1:
            raise ConfigError(
                "the first step of a generation has nothing to reuse, and steps_computation_mask says that it reuses"
            )
        steps = tuple(s for s, m in enumerate(mask) if m)
        passes = (MarkBranches(start=front, stop=-back if back else None), MergeSlots())
        policy = SchedulePolicy(StepList(steps, of_steps=len(mask)))
        return Recipe(f"dbcache-{front}-{back}-static", policy, passes, "cache-dit, DBCache")
    return dbcache(
        front,
        back,
        threshold,
        warm_up=given.get("max_warmup_steps", 8),
        max_consecutive=max(0, given.get("max_continuous_cached_steps", -1)),
        max_total=max(0, given.get("max_cached_steps", -1)),
        limit=float(given.get("max_accumulated_residual_diff_threshold", 0.0)),
        mask=mask,
    )


# By the fields that a configuration has; the first that fits reads it.
_READERS: tuple[tuple[frozenset[str], Callable[[_Given], Recipe]], ...] = (
    (frozenset({"Fn_compute_blocks", "Bn_compute_blocks", "residual_diff_threshold"}), _dbcache),
    (frozenset({"unconditional_batch_skip_range", "spatial_attention_block_skip_range"}), _faster),
    (frozenset({"spatial_attention_block_skip_range", "cross_attention_block_skip_range"}), _pab),
    (frozenset({"mag_ratios", "max_skip_steps", "retention_ratio"}), _magcache),
    (frozenset({"cache_interval", "max_order", "disable_cache_before_step"}), _taylor),
    (frozenset({"threshold", "retention_steps", "cache_end_steps"}), _sea),
    (frozenset({"threshold"}), _first_block),
)
