"""ProfilingDiT (arXiv 2504.03140): reuse the blocks that look at the background, compute the others at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from vdcache.errors import ConfigError
from vdcache.methods.recipe import Recipe
from vdcache.passes import MarkBranches, MergeSlots
from vdcache.policies.scheduled import CombinedPolicy, SchedulePolicy
from vdcache.policies.steps import LinearIntervals, StepList
from vdcache.util.checks import whole_numbers

__all__ = ["PROFILINGDIT_LISTS", "profilingdit", "profilingdit_hunyuanvideo", "profilingdit_wan"]

# The published lists (the code of arXiv 2504.03140: hyvideo/ditcache.py, wan/cache.py), as literal constants there. Steps count
# from 0 in runs of 50. The list of HunyuanVideo's computed steps is no instance of the paper's equation 15: of its 8 steps at
# most 5 are met by constants that give as many.
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
    when: LinearIntervals | StepList | Sequence[int] | None = None,
    reuse: str = "background",
    span: str = "run",
    block_kind: str = "",
    name: str = "profilingdit",
) -> Recipe:
    """ProfilingDiT (arXiv 2504.03140): reuse the blocks that look at the background, compute the others at every step.

    Args:
        background: blocks that look at the background, or a `Profile`, which knows both lists. Blocks count from 0 among those
            that attend over video tokens.
        foreground: the other blocks; needed where they are reused.
        when: the computed steps: `LinearIntervals` (equation 15), `StepList` or a list of steps. Without, intervals from 12 down to 2
            after a warm-up of 6, for 50 steps, scaled to other numbers of steps: the paper gives no constants, these are the
            first and the last gap of its published list.
        reuse: which blocks are reused between computed steps: "background", "foreground", or both in turn, "split" (foreground
            in the first half, background in the second) or "alternate" (ablations of the paper's table 3).
        span: "run" keeps one delta for a run of consecutive blocks, "block" one for each block.
        block_kind: the "single" or "double" blocks of an MMDiT alone, counted from 0 among these; empty for both.

    Raises:
        ConfigError: an empty list, a block that is in both, an unknown word. A block that the model does not have is refused
            when the model is compiled.
    """
    if isinstance(background, SupportsBlocks):
        if len(foreground):
            raise ConfigError("profilingdit: a profile knows both lists; give either a profile or lists")
        if background.graphs > 1:
            raise ConfigError(
                f"profilingdit: the profiled model breaks into graphs, and its blocks lie in {background.graphs} of them; lists of blocks are for "
                "models of one graph (vdcache.explain says where this one breaks)"
            )
        if block_kind and background.block_kind not in ("", block_kind):
            raise ConfigError(
                f"profilingdit: the profile speaks of {background.block_kind} blocks, and block_kind={block_kind!r} was asked for"
            )
        chosen = background.only(block_kind) if block_kind and not background.block_kind else background
        lists, block_kind = {"background": chosen.background, "foreground": chosen.foreground}, chosen.block_kind
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
        when = LinearIntervals(warm_up=6, t_max=12, t_min=2, of_steps=50)
    elif not isinstance(when, (LinearIntervals, StepList)):
        when = StepList(when)  # type: ignore[arg-type]
    marks = tuple(MarkBranches(group=g, blocks=lists[g], block_kind=block_kind) for g in groups)
    merges = tuple(MergeSlots(group=g, span=span) for g in groups)
    policy = SchedulePolicy(when, groups, "split" if reuse == "split" else "alternate")
    return Recipe(name, policy, (*marks, *merges), _PROFILINGDIT)


@runtime_checkable
class SupportsBlocks(Protocol):
    """What a `Profile` knows: foreground and background blocks, and of which blocks."""

    @property
    def background(self) -> tuple[int, ...]: ...
    @property
    def foreground(self) -> tuple[int, ...]: ...
    @property
    def block_kind(self) -> str: ...
    @property
    def graphs(self) -> int: ...
    def only(self, block_kind: str) -> SupportsBlocks: ...


def profilingdit_hunyuanvideo() -> Recipe:
    """Two slot sets with two schedules, so four variants: single blocks by the list of steps, double blocks every 6."""
    lists = PROFILINGDIT_LISTS
    return Recipe(
        "profilingdit-hunyuanvideo",
        CombinedPolicy(
            (
                SchedulePolicy(StepList(lists["hunyuanvideo steps"], of_steps=50), ("single",)),
                SchedulePolicy(LinearIntervals(warm_up=6, t_max=6, t_min=6, of_steps=50), ("double",)),
            )
        ),
        (
            MarkBranches(group="single", blocks=lists["hunyuanvideo single"], block_kind="single", expected_blocks=40),
            MarkBranches(group="double", blocks=lists["hunyuanvideo double"], block_kind="double", expected_blocks=20),
            MergeSlots(group="single"),
            MergeSlots(group="double"),
        ),
        _PROFILINGDIT,
    )


def profilingdit_wan() -> Recipe:
    return Recipe(
        "profilingdit-wan2.1",
        SchedulePolicy(LinearIntervals(warm_up=6, t_max=6, t_min=6, of_steps=50), ("background",)),
        (
            MarkBranches(group="background", blocks=PROFILINGDIT_LISTS["wan2.1"], expected_blocks=40),
            MergeSlots(group="background"),
        ),
        _PROFILINGDIT,
    )
