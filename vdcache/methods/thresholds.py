"""Methods that look at a probe within the step: first-block caches, TeaCache, SeaCache, EasyCache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vdcache.errors import ConfigError
from vdcache.methods.constants import TEACACHE_COEFFICIENTS
from vdcache.methods.recipe import Recipe
from vdcache.passes import MarkBranches, MarkOutput, MergeSlots, Observe, Probe
from vdcache.passes.predictors import LAST, AnyPredictor
from vdcache.policies.thresholds import Bounds, EasyCache, Threshold
from vdcache.util.checks import numbers, whole, whole_numbers

__all__ = ["dbcache", "easycache", "fbcache", "seacache", "teacache"]


def fbcache(threshold: float = 0.08, *, name: str = "") -> Recipe:
    """First-block cache (diffusers' FirstBlockCache; ParaAttention): the first block runs, and the others only where what it
    adds has changed.

    Args:
        threshold: ‖R now − R at the last computed step‖₁ / ‖R then‖₁ below which they are reused.
    """
    passes = (MarkBranches(start=1), MergeSlots(), Probe(location="residual", blocks=1))
    policy = Threshold(threshold, bounds=Bounds(last=0))
    return Recipe(name or f"fbcache-{threshold:g}", policy, passes, "diffusers, FirstBlockCache")


def dbcache(
    front: int = 8,
    back: int = 0,
    threshold: float = 0.08,
    *,
    warm_up: int = 8,
    max_consecutive: int = 0,
    max_total: int = 0,
    limit: float = 0.0,
    mask: Sequence[int] = (),
    predictor: AnyPredictor = LAST,
    name: str = "",
) -> Recipe:
    """DBCache (cache-dit): the first `front` and the last `back` blocks run at every step, those between where the probe says
    so.

    Args:
        threshold: of the change of what the front blocks add since the last computed step.
        warm_up: computed steps at the beginning.
        max_consecutive, max_total: most reused steps in a row and in all; 0 for no limit.
        limit: changes that were looked at, added up over the whole generation, after which every step is computed; 0 for none.
        mask: 1 for steps that are computed, 0 for those that go by the probe ("steps computation mask"); steps past its end go
            by the probe. It cuts the warm-up to its leading ones.
        predictor: what the middle blocks are given: `Taylor(1)` for what cache-dit calls a TaylorSeer calibrator.

    Raises:
        ConfigError: no front block, a negative number.
    """
    whole(front, "front, the number of blocks that DBCache looks at,", 1)
    whole(back, "back, the number of blocks at the end that always run,")
    whole(warm_up, "warm_up, the number of steps that are computed first,")
    if not isinstance(predictor, AnyPredictor):
        raise ConfigError(f"predictor is a vdcache.Predictor such as vdcache.predictors.Taylor(1); got {predictor!r}")
    passes = (
        MarkBranches(start=front, stop=-back if back else None),
        MergeSlots(),
        Probe(location="residual", blocks=front),
    )
    mask = whole_numbers([int(m) if isinstance(m, bool) else m for m in mask] if isinstance(mask, Iterable) else mask, "mask")
    if mask:  # the leading ones of a mask are all the warm-up there is
        warm_up = min(warm_up, next((i for i, m in enumerate(mask) if m != 1), len(mask)))
    bounds = Bounds(first=max(1, warm_up), last=0, max_consecutive=max_consecutive, max_total=max_total, mask=mask)
    policy = Threshold(threshold, bounds=bounds, limit=limit)
    name = name or f"dbcache-{front}-{back}-{threshold:g}"
    return Recipe(name, policy, passes, "cache-dit, DBCache", predictor=predictor)


def teacache(
    threshold: float = 0.1,
    coefficients: str | Sequence[float] = (),
    *,
    location: str = "",
    first: int = 1,
    last: int = 1,
    name: str = "",
) -> Recipe:
    """TeaCache (arXiv 2411.19108): add up what a polynomial makes of the change of the first block's modulated input; skip the
    all blocks while the sum is small.

    Args:
        threshold: reused below it.
        coefficients: of the polynomial, the highest power first, or the name of a model in `TEACACHE_COEFFICIENTS`; empty to
            add up the changes as they are. A polynomial means something for its own model alone.
        location: "modulated", or "timestep" (the embedding) or "modulation" (what it is projected to), which the published scripts
            look at for Wan; empty for what belongs to the coefficients.
        first, last: steps that are always computed.

    Raises:
        ConfigError: a name that is not there.
    """
    model = coefficients if isinstance(coefficients, str) else ""
    if isinstance(coefficients, str):
        if coefficients not in TEACACHE_COEFFICIENTS:
            raise ConfigError(f"TeaCache published coefficients for {', '.join(TEACACHE_COEFFICIENTS)}; got {coefficients!r}")
        coefficients = TEACACHE_COEFFICIENTS[coefficients]
    coefficients = numbers(coefficients, "the coefficients of the polynomial")
    if model.endswith("-ret"):
        first, last = max(first, 5), 0
    if not location:
        location = "modulation" if model.endswith("-ret") else "timestep" if model.startswith("wan") else "modulated"
    passes = (MarkBranches(), MergeSlots(), Probe(location=location, reference_step="step"))
    policy = Threshold(threshold, True, tuple(coefficients), Bounds(first, last))
    return Recipe(name or "-".join(filter(None, ("teacache", model, f"{threshold:g}"))), policy, passes, "arXiv 2411.19108")


def seacache(threshold: float = 0.2, *, location: str = "modulated", first: int = 1, last: int = 1, name: str = "") -> Recipe:
    """SeaCache (arXiv 2602.18993): as TeaCache without a polynomial, on a signal that a Wiener filter of the step's noise level
    has gone over.

    The noise level is read off the timestep as timestep / 1000 (or the timestep itself where it counts from 1), which is exact
    for flow matching.

    Args:
        threshold: reused below it.
        location: "modulated" tokens of the first block, as the authors; "input" for the latent itself, as diffusers.
    """
    passes = (MarkBranches(), MergeSlots(), Probe(location=location, reference_step="step", filter="wiener"))
    policy = Threshold(threshold, True, bounds=Bounds(first, last))
    return Recipe(name or f"seacache-{threshold:g}", policy, passes, "arXiv 2602.18993")


def easycache(threshold: float = 0.05, *, first: int = 5, last: int = 1, name: str = "") -> Recipe:
    """EasyCache (arXiv 2507.02860): skip the whole model while input change times the measured rate of change of the output is
    small.

    Args:
        threshold: τ: .025 for HunyuanVideo, .05 to .06 for Wan 2.2 with 7 first steps.
        first: computed steps at the beginning.
    """
    passes = (MarkOutput(), Observe(kind="input"), Observe(kind="output"), Probe(location="input", reference_step="step"))
    policy = EasyCache(threshold, Bounds(first, last))
    return Recipe(name or f"easycache-{threshold:g}", policy, passes, "arXiv 2507.02860")
