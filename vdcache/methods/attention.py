"""Methods that reuse attention alone: Pyramid Attention Broadcast, T-GATE, FasterCache."""

from __future__ import annotations

from vdcache.errors import ConfigError
from vdcache.methods.constants import PAB
from vdcache.methods.recipe import Recipe
from vdcache.passes import MarkBranches, MarkLanes, Pass
from vdcache.passes.mark_branches import TYPES
from vdcache.passes.predictors import ByGroup, Frequencies
from vdcache.policies.base import Policy
from vdcache.policies.scheduled import CombinedPolicy, SchedulePolicy
from vdcache.policies.steps import EveryNth, StepList, TGateSteps
from vdcache.policies.weights import Extrapolated
from vdcache.policies.windows import BroadcastWindow, TimestepWindow
from vdcache.util.checks import numbers, whole

__all__ = ["fastercache", "pab", "tgate"]

_SELF = TYPES["attn"]


def pab(
    spatial: int = 2,
    temporal: int = 0,
    cross: int = 0,
    *,
    window: tuple[float, float] = (100, 850),
    mlp: tuple[tuple[float, ...], int, int] | None = None,
    name: str = "pab",
) -> Recipe:
    """Pyramid Attention Broadcast (arXiv 2408.12588): each kind of attention is computed every so many steps within a window of
    timesteps.

    Args:
        spatial, temporal, cross: distance of computed steps; 0 or 1 to compute always. Attention over all tokens counts as
            spatial.
        window: (low, high) in timesteps from 1000 to 0.
        mlp: (timesteps, first blocks, steps that reuse after each of them), or None.

    Raises:
        ConfigError: nothing that is reused.
    """
    passes: list[MarkBranches] = []
    policies: list[Policy] = []
    for group, n, kinds, layouts in (
        ("spatial", spatial, _SELF, ("spatial", "full", "unknown")),
        ("temporal", temporal, _SELF, ("temporal",)),
        ("cross", cross, ("cross-attention",), ()),
    ):
        if n and n != 1:
            passes.append(MarkBranches(kinds=kinds, group=group, layouts=layouts))
            policies.append(TimestepWindow(n, window, group))
    if mlp is not None:
        if not isinstance(mlp, tuple) or len(mlp) != 3:
            raise ConfigError(f"mlp is (timesteps, first blocks, steps that reuse); got {mlp!r}")
        keys, blocks, skip = numbers(mlp[0], "the timesteps of mlp"), whole(mlp[1], "the number of blocks of mlp", 1), mlp[2]
        passes.append(MarkBranches(kinds=("mlp",), group="mlp", stop=blocks))
        policies.append(BroadcastWindow(tuple(keys), skip, "mlp"))
    if not policies:
        raise ConfigError("PAB reuses at least one kind of attention: give spatial, temporal or cross a distance of at least 2")
    return Recipe(name, CombinedPolicy(tuple(policies)), tuple(passes), "arXiv 2408.12588")


def pab_of(model: str) -> Recipe:
    """PAB with the constants that were published for a model."""
    (spatial, temporal, cross), window, mlp = PAB[model]
    return pab(spatial, temporal, cross, window=window, mlp=mlp, name=f"pab-{model}")


def tgate(gate: int = 10, *, interval: int = 5, warm_up: int = 2, after: int = 1, of_steps: int = 25, name: str = "") -> Recipe:
    """T-GATE (arXiv 2404.02747): cross-attention is frozen from the gate on, self-attention is computed now and then before it.

    Both lanes of guidance stay in use after the gate, where the reference code goes on with one unguided lane: that is the
        caller's to choose.

    Args:
        gate: computed steps of cross-attention.
        interval, warm_up: self-attention before the gate: the first `warm_up` + 1 steps, then every `interval`-th.
        after: the same after the gate.
        of_steps: what the numbers were chosen for; scaled to other numbers of steps.
    """
    whole(gate, "gate, the number of steps before cross-attention is frozen,", 1)
    whole(of_steps, "of_steps, the number of steps that the constants are for,")
    passes = (
        MarkBranches(kinds=("cross-attention",), group="cross", gate="pre"),
        MarkBranches(kinds=_SELF, group="self", gate="pre"),
    )
    policy = CombinedPolicy(
        (
            SchedulePolicy(StepList((gate - 1,), of_steps=of_steps), ("cross",)),
            SchedulePolicy(TGateSteps(gate, interval, warm_up, after, of_steps=of_steps), ("self",)),
        )
    )
    return Recipe(name or f"t-gate-{gate}", policy, passes, "arXiv 2404.02747")


# The scripts of Vchitect/FasterCache, by steps counted from 0 in runs of so many: the grid of attention and (weight, start,
# ramp) of its extrapolation; the grid of the lane, the weights of its low and high frequencies, and which half of the batch is
# the unconditional one.
FASTERCACHE = {
    "open-sora": (
        (EveryNth(2, first=7, of_steps=30), Extrapolated(0.9, 6, 20)),
        (EveryNth(5, first=11, offset=4, of_steps=30), Frequencies((1.15, 0, 24), (1.15, 19, 29)), "second"),
    ),
    "latte": (
        (EveryNth(2, first=15, of_steps=50), Extrapolated(0.5)),
        (EveryNth(5, first=17, offset=4, of_steps=50), Frequencies((1.1, 0, 43), (1.1, 44, 49)), "first"),
    ),
    "cogvideox": (
        (EveryNth(3, first=17, offset=2, of_steps=50), Extrapolated(0.3)),
        (EveryNth(5, first=17, offset=4, of_steps=50), Frequencies((1.1, 0, 39), (1.1, 29, 49)), "second"),
    ),
}


def fastercache(model: str = "open-sora", *, predicted: str = "", lanes: str = "auto", name: str = "") -> Recipe:
    """FasterCache (arXiv 2410.19355): self-attention is extrapolated from its last two computed values, and its current gate
    applied; the unconditional lane of guidance is predicted from the conditional one.

    Args:
        model: whose constants: open-sora, latte, cogvideox.
        predicted: which half of a batch is unconditional, "first" or "second"; empty for what the model's script does.
        lanes: `MarkLanes`' mode; "none" to leave the lanes alone.

    Raises:
        ConfigError: another model.
    """
    if model not in FASTERCACHE:
        raise ConfigError(f"FasterCache published constants for {', '.join(FASTERCACHE)}; got {model!r}")
    (when, predictor), (lane_when, frequencies, half) = FASTERCACHE[model]
    passes: list[Pass] = [MarkBranches(kinds=_SELF, group="attention", gate="pre")]
    policies: list[Policy] = [SchedulePolicy(when, ("attention",))]
    if lanes != "none":
        passes.append(MarkLanes(lanes, predicted or half))
        policies.append(SchedulePolicy(lane_when, ("lane",)))
    predictors = ByGroup((("attention", predictor), ("lane", frequencies)))
    name = name or f"fastercache-{model}"
    return Recipe(name, CombinedPolicy(tuple(policies)), tuple(passes), "arXiv 2410.19355", predictor=predictors)
