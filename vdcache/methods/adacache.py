"""AdaCache (arXiv 2411.02397): recompute when the codebook says that one observed branch has changed enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vdcache.errors import ConfigError
from vdcache.methods.recipe import Recipe
from vdcache.passes import MarkBranches, MergeSlots, Observe, Pass
from vdcache.policies.adacache import AdaCache, Codebook, MoReg
from vdcache.policies.scheduled import CombinedPolicy
from vdcache.util.checks import whole, whole_numbers

__all__ = ["ADACACHE_CODEBOOKS", "adacache"]

# The published codebooks: {steps of the generation: {threshold: rate}} (the configs of the reference code).
ADACACHE_CODEBOOKS: Mapping[str, Mapping[int, Mapping[float, int]]] = {
    "fast": {
        30: {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2, 1.00: 1},
        100: {0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.00: 3},
    },
    "slow": {30: {0.08: 3, 0.16: 2, 0.24: 1, 0.32: 1, 0.40: 1, 1.00: 1}},
}
# No slow one was published for 100 steps. Scaling the rates of the one for 30 would reuse longer than "fast", whose thresholds
# for 100 steps are far smaller; so here are fast's thresholds, and its rates times slow / fast at 30 steps, not rising.
DERIVED: Mapping[str, Mapping[int, Mapping[float, int]]] = {
    "slow": {100: {0.03: 6, 0.05: 4, 0.07: 2, 0.09: 2, 0.11: 2, 1.00: 2}}
}


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
    layers: int = 1,
    name: str = "",
) -> Recipe:
    """AdaCache (arXiv 2411.02397) with any of its choices.

    Args:
        codebook: "fast" or "slow" (published for 30 steps, fast for 100 as well; scaled to other numbers of steps), or
            (threshold, rate) entries of any number, used as they are. For the same change slow never waits longer than fast.
        moreg: motion regularisation: True for the published constants, or a `MoReg`, used as it is.
        rule: "vdcache", "paper" or "code"; `AdaCache` says how they differ.
        distance: "l1", "l2" or "cosine".
        observe: kind of the observed branch; empty for temporal attention, else self-attention, else joint attention.
        blocks: blocks in which it is observed, counted from 0; empty for the middle one. Several are averaged.
        first, last: steps that are always computed at either end.
        frames: latent frames for the motion score; 0 reads them off the graph.
        layers: schedules of their own for so many groups of layers (1 to 4), each observed in its middle; the paper's ablation
            found them unstable. Every group doubles the variants.

    Raises:
        ConfigError: an unknown name, a codebook that does not ascend or has rates below 1.
    """
    for what, value, least in (("first", first, 1), ("last", last, 0), ("frames", frames, 0), ("layers", layers, 1)):
        whole(value, f"'{what}' of AdaCache", least)
    blocks = whole_numbers(blocks, "the observed blocks")
    if not isinstance(moreg, (bool, MoReg)):
        raise ConfigError(f"moreg is True, False or a vdcache.policies.MoReg; got {moreg!r}")
    if not isinstance(codebook, (str, Codebook, Mapping, Sequence)):
        raise ConfigError(f"codebook is 'fast', 'slow' or (threshold, rate) entries; got {codebook!r}")
    books: tuple[tuple[int, Codebook], ...] = ()
    derived: tuple[int, ...] = ()
    if isinstance(codebook, str):
        if codebook not in ADACACHE_CODEBOOKS:
            raise ConfigError(f"AdaCache published the codebooks {', '.join(ADACACHE_CODEBOOKS)}; got {codebook!r}")
        derived = tuple(DERIVED.get(codebook, {}))
        books = tuple((n, Codebook.of(b)) for n, b in {**ADACACHE_CODEBOOKS[codebook], **DERIVED.get(codebook, {})}.items())
        name, book = name or f"adacache-{codebook}", books[0][1]
    else:
        name, book = name or "adacache-custom", Codebook.of(codebook)
    motion = MoReg() if moreg is True else moreg or None
    if motion is not None and "+moreg" not in name:
        name += "+moreg"
    policy = AdaCache(book, moreg=motion, first=first, last=last, rule=rule)
    strides = motion.strides if motion else ()
    if layers == 1:
        watch = Observe(kind=observe, blocks=tuple(blocks), distance=distance, strides=strides, frames=frames)
        return Recipe(name, policy, (MarkBranches(), MergeSlots(), watch), "arXiv 2411.02397", books, derived=derived)
    if layers > 4:
        raise ConfigError(f"layers have 1 to 4 schedules of their own; got {layers!r}")
    if blocks:
        raise ConfigError("with layers=… every group is observed in its middle; leave out blocks")
    passes: list[Pass] = []
    policies = []
    for i in range(layers):
        group, share = f"layers{i}", (i / layers, (i + 1) / layers)
        passes += [MarkBranches(group=group, start=share[0], stop=share[1]), MergeSlots(group=group)]
        passes.append(Observe(kind=observe, distance=distance, strides=strides, frames=frames, group=group, block_range=share))
        policies.append(replace(policy, group=group))
    together = CombinedPolicy(tuple(policies))
    return Recipe(f"{name}-{layers}-layers", together, tuple(passes), "arXiv 2411.02397", books, derived=derived)
