"""mark-branches: put a cache guard on every residual branch.

    y = add(x, f(x, c))   -->   y = add(x, cache_guard(f(x, c), slot))

A cache guard is an identity: this pass only names the values that a later plan may take from an earlier step. Bit-exact.
A residual add that computes gate and sum at once (addcmul, add with a factor) has no contribution of its own; its cache guard holds the
difference of the stream instead: y = cache_guard(addcmul(x, g, h), slot, x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import fx

from vdcache.errors import ConfigError
from vdcache.ir import dialect
from vdcache.ir.facts import Fact
from vdcache.ir.ops import same_type
from vdcache.passes.base import Pass, PassResult, Refusal, put_cache_guard
from vdcache.patterns import ATTENDS, KINDS, Branch, GraphAnalysis, analyze
from vdcache.util.fields import Group, at_least, between, one_of

# Branches by what they do, whatever their block is made of.
TYPES = {"attn": ATTENDS, "cross": ("cross-attention",), "mlp": ("mlp",)}
LAYOUTS = ("spatial", "temporal", "full", "unknown")
Share = Annotated[float, between(-1, 1, "a share of the blocks")]


@dataclass(frozen=True)
class MarkBranches(Pass):
    """Guard the residual branches of some kinds.

    Args:
        kinds: which branches, empty for all (`patterns.KINDS`).
        group: the group that their slots belong to; a plan reuses whole groups.
        gate: "post" keeps the contribution as it is added; "pre" keeps the value before the gate, so that every step
            applies its own gate (FORA, TaylorSeer), where the branch has one.
        blocks: in which blocks, counted from 0 among those that attend over video tokens; None for everywhere.
        start, stop: the same as a slice of these blocks, as Python's: start=1 leaves the first one out, stop=-2 the last two. A
            fraction is a share of the blocks: stop=0.5 is the first half.
        layouts: only branches whose attention runs over these ("spatial", "temporal", "full"); empty for all branches.
        per_block: every block and kind is a group of its own, "b3.mlp" or "b3.attention" (self, joint or fused), instead of
        `group`: for tables of layers and steps.
        block_kind: count only the "single" or the "double" blocks of an MMDiT (`GraphAnalysis.denoising_blocks`); empty for both.
        expected_blocks: how many blocks there must be, where the list belongs to one model; 0 for any number.

    Raises:
        ConfigError: an unknown kind, layout or gate; a list of blocks that is empty, names one twice, or names one that the
            graph does not have; a list and a slice.
    """

    name: ClassVar[str] = "mark-branches"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.CANONICAL})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.GUARDED})

    kinds: tuple[Annotated[str, one_of(*KINDS)], ...] = ()
    group: Group = "all"
    gate: Annotated[str, one_of("post", "pre")] = "post"
    blocks: tuple[int, ...] | None = None
    block_kind: Annotated[str, one_of("single", "double", empty="all blocks")] = ""
    expected_blocks: Annotated[int, at_least(0)] = 0
    start: int | Share = 0
    stop: int | Share | None = None
    layouts: tuple[Annotated[str, one_of(*LAYOUTS)], ...] = ()
    per_block: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is None:
            return
        if self.start or self.stop is not None:
            raise ConfigError(f"{self.name}: blocks are given as a list or as a slice (start, stop), not both")
        if not self.blocks:
            raise ConfigError(f"{self.name}: the list of blocks is empty, so there is nothing to reuse")
        if twice := [b for b in self.blocks if self.blocks.count(b) > 1]:
            raise ConfigError(f"{self.name}: the list of blocks names {twice[0]} twice")

    def run(self, graph: fx.GraphModule) -> PassResult:
        found = analyze(graph)
        chosen = self._chosen(found)
        number = {b.index: i for i, b in enumerate(found.denoising_blocks(self.block_kind))}
        nodes = {n.name: n for n in graph.graph.nodes}
        used = {str(n.args[1]) for n in dialect.cache_guards(graph.graph)}
        rewrites, refusals = 0, [*found.refusals]
        for branch in found:
            if chosen is not None and branch.block not in chosen:
                refusals.append(Refusal(branch.residual_add, f"block {branch.block} is not among those that were asked for"))
                continue
            if self.kinds and branch.kind not in self.kinds:
                refusals.append(Refusal(branch.residual_add, f"it is {branch.kind}, which was not asked for"))
                continue
            if self.layouts and branch.layout not in self.layouts:
                refusals.append(
                    Refusal(branch.residual_add, f"its attention is {branch.layout or 'none'}, not {' or '.join(self.layouts)}")
                )
                continue
            if self.per_block and branch.block not in number:
                refusals.append(Refusal(branch.residual_add, "it is in no block that attends over video tokens"))
                continue
            kind = "attention" if branch.kind in ATTENDS else branch.kind
            group = f"b{number[branch.block]}.{kind}" if self.per_block else self.group
            slot = _free(f"{group}/{branch.name}", used)
            if reason := self._guard(branch, nodes, slot):
                refusals.append(Refusal(branch.residual_add, reason))
                continue
            used.add(slot)
            rewrites += 1
        return PassResult(graph, rewrites, tuple(refusals))

    def _chosen(self, found: GraphAnalysis) -> set[int] | None:
        """The numbers that the blocks of the list have in the graph; None where every branch is meant."""
        if self.blocks is None and not self.block_kind and not self.start and self.stop is None:
            return None
        there = found.denoising_blocks(self.block_kind)
        if self.expected_blocks not in (0, len(there)):
            raise ConfigError(
                f"{self.name}: the list of blocks was made for a model with {self.expected_blocks} {self._called}, and this one has "
                f"{len(there)}: profile the model (vdcache.profile) for a list of its own"
            )
        if self.blocks is None:
            start, stop = (round(at * len(there)) if isinstance(at, float) else at for at in (self.start, self.stop))
            return {b.index for b in there[start:stop]}
        if wrong := [b for b in self.blocks if not 0 <= b < len(there)]:
            having = f"{len(there)} (0 to {len(there) - 1})" if there else "none"
            raise ConfigError(f"{self.name}: there is no block {wrong[0]}: of {self._called} this graph has {having}")
        return {there[b].index for b in self.blocks}

    @property
    def _called(self) -> str:
        return f"{self.block_kind} blocks that attend over video tokens".strip()

    def _guard(self, branch: Branch, nodes: dict[str, fx.Node], slot: str) -> str | None:
        """Guard one branch in place; the reason where that cannot be done."""
        residual_add = nodes[branch.residual_add]
        if branch.contribution is None:
            base = dialect.with_cache_guard(nodes[branch.base])
            if not same_type(base, residual_add):
                return f"the sum is {residual_add.meta['val'].dtype}, its stream {base.meta['val'].dtype}"
            put_cache_guard(residual_add, slot, self, base)
            return None
        value = nodes[branch.contribution]
        at_gate = self.gate == "pre" and branch.pre_gate is not None
        fresh = nodes[branch.pre_gate] if at_gate and branch.pre_gate else value
        if any(dialect.is_dialect(u) for u in fresh.users):
            return f"'{fresh.name}' is guarded already"
        put_cache_guard(fresh, slot, self, users=None if at_gate else (residual_add,))
        return None


def _free(name: str, used: set[str]) -> str:
    """`name`, with a number where it is taken (a block may hold two branches of one kind)."""
    if name not in used:
        return name
    return next(f"{name}.{i}" for i in range(2, len(used) + 3) if f"{name}.{i}" not in used)
