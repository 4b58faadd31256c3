"""merge-slots: one cached tensor for a run of branches that are always reused together.

    a = add(x, cache_guard(f(x), s)); b = add(a, cache_guard(g(a), t))   -->   b = cache_guard(add(add(x, f(x)), g(a)), s, x)

The saved value is then the stream's difference over the run (a delta list): one tensor a stream instead of
one a branch, and one subtraction. Recomputing stays bit-exact. Between two branches of a run may lie casts, views
(repeated on the base) and additions of parameters and constants, which are the same at every step. Anything else starts a new
run, and so does a value of the stream that is still needed when the run is skipped; the refusal names the node.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import fx

from vdcache.ir import dialect
from vdcache.ir.capture import signature
from vdcache.ir.edit import call, inputs, outputs
from vdcache.ir.facts import Fact
from vdcache.ir.ops import CASTS, VIEWS, same_type
from vdcache.passes.base import Pass, PassResult, Refusal, put_cache_guard
from vdcache.patterns import analyze
from vdcache.util.fields import Group, one_of
from vdcache.util.slots import group_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Link:
    """One guarded residual add: `residual_add = add(base, cache_guard)`, or the cache guard itself where it has a base.

    `path` leads from the residual add before it in its run (left out) to `base`; empty for the first of a run.
    """

    cache_guard: fx.Node
    residual_add: fx.Node
    base: fx.Node
    path: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class MergeSlots(Pass):
    """Merge the slots of a group along each stream.

    Args:
        group: the group whose slots are merged.
        span: "run" keeps one value for a run of any length (ProfilingDiT equation 9); "block" one for each block (equation 8, with the
            accumulated state of equation 10 read as the last difference of every block). The sum over a run telescopes to the first.

    Raises:
        ConfigError: an unknown span.
    """

    name: ClassVar[str] = "merge-slots"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED, Fact.GUARDED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.GUARDED})

    group: Group = "all"
    span: Annotated[str, one_of("run", "block")] = "run"

    def run(self, graph: fx.GraphModule) -> PassResult:
        static = _step_invariant(graph)
        links = [link for g in dialect.cache_guards(graph.graph) if (link := self._link(g)) is not None]
        runs, refusals = _runs(links, static)
        if self.span == "block":
            runs = [part for run in runs for part in _by_block(graph, run)]
        runs = _split_where_live(graph.graph, runs, self.group, refusals)
        rewrites = 0
        for number, run in enumerate(r for r in runs if len(r) > 1):
            self._merge(graph.graph, run, f"{self.group}/run.{number}")
            rewrites += 1
        return PassResult(graph, rewrites, tuple(refusals))

    def _link(self, cache_guard: fx.Node) -> Link | None:
        if group_of(str(cache_guard.args[1])) != self.group:
            return None
        if len(cache_guard.args) > 2 and isinstance(cache_guard.args[2], fx.Node):
            return Link(cache_guard, cache_guard, cache_guard.args[2])
        users = list(cache_guard.users)
        if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs.get("alpha", 1) != 1:
            return None
        operands = [a for a in users[0].args if isinstance(a, fx.Node) and a is not cache_guard]
        return Link(cache_guard, users[0], operands[0]) if len(operands) == 1 and same_shape(operands[0], users[0]) else None

    def _merge(self, graph: fx.Graph, run: Sequence[Link], slot: str) -> None:
        start, end = dialect.with_cache_guard(_before_casts(run[0].base)), run[-1].residual_add
        if end is run[-1].cache_guard:  # it goes; what it guards is the end
            end = end.args[0]  # type: ignore[assignment]
        views = [node for link in run[1:] for node in link.path if node.target in VIEWS]
        for link in run:
            link.cache_guard.replace_all_uses_with(link.cache_guard.args[0])  # type: ignore[arg-type]
            graph.erase_node(link.cache_guard)
        end = _after_casts(end)
        with graph.inserting_before(end.next):
            base = start
            for view in views:
                # the start may lie otherwise in memory than the value that was viewed
                target = aten.reshape.default if view.target in (aten.view.default, aten._unsafe_view.default) else view.target
                base = call(graph, target, base, *view.args[1:], provenance=str(self), **view.kwargs)
            if not same_type(base, end):
                base = call(graph, aten._to_copy.default, base, dtype=end.meta["val"].dtype, provenance=str(self))
        put_cache_guard(end, slot, self, base)


def _by_block(graph: fx.GraphModule, run: Sequence[Link]) -> list[list[Link]]:
    """A run, cut where one block ends and the next begins."""
    blocks = {b.residual_add: b.block for b in analyze(graph)}
    number = [blocks.get(_sum_of(link).name) for link in run]
    cuts = [0, *(i for i in range(1, len(run)) if number[i] != number[i - 1]), len(run)]
    return [list(run[a:b]) for a, b in itertools.pairwise(cuts)]


def _sum_of(link: Link) -> fx.Node:
    """The addition itself, also where its cache guard stands for it."""
    return link.cache_guard.args[0] if link.residual_add is link.cache_guard else link.residual_add  # type: ignore[return-value]


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"].shape, b.meta["val"].shape
    return len(x) == len(y) and all(str(s) == str(t) for s, t in zip(x, y, strict=True))


def _step_invariant(graph: fx.GraphModule) -> Callable[[fx.Node], bool]:
    """Whether a node depends on parameters, buffers and constants alone."""
    fixed = signature(graph).static
    varying = {n for i, n in enumerate(inputs(graph.graph)) if i not in fixed}
    for node in graph.graph.nodes:
        if any(p in varying for p in node.all_input_nodes):
            varying.add(node)
    return lambda node: node not in varying


def _step_back(node: fx.Node, static: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The value that `node` repeats but for its type, its order, or a term that never changes; None where it does more."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.target in CASTS or node.target in VIEWS:
        return node.args[0]
    if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        a, b = node.args[0], node.args[1]
        if not isinstance(b, fx.Node):
            return a if same_shape(a, node) else None
        if static(b) and same_shape(a, node):
            return a
        return b if static(a) and same_shape(b, node) else None
    return None


def _runs(links: list[Link], static: Callable[[fx.Node], bool]) -> tuple[list[list[Link]], list[Refusal]]:
    """Links in order, gathered into maximal runs along their streams."""
    ends: dict[fx.Node, list[Link]] = {}  # last residual add of a run so far -> the run
    runs: list[list[Link]] = []
    refusals: list[Refusal] = []
    for link in links:
        at: fx.Node | None = link.base
        path: list[fx.Node] = []
        while at is not None and at not in ends:
            path.append(at)
            at = _step_back(at, static)
        if at is None:
            if runs and path[-1].op == "call_function":
                reason = f"a run starts here: '{path[-1].name}' ({path[-1].target}) is no cast, view or constant term"
                refusals.append(Refusal(link.residual_add.name, reason))
            run = [link]
            runs.append(run)
        else:
            run = ends.pop(at)
            run.append(replace(link, path=tuple(reversed(path))))
        ends[link.residual_add] = run
    return runs, refusals


def _split_where_live(graph: fx.Graph, runs: list[list[Link]], group: str, refusals: list[Refusal]) -> list[list[Link]]:
    """Cut runs at values of the stream that something still reads when the whole group is reused."""
    while True:
        skip_to = {run[-1].residual_add: run[0].base for run in runs}
        inner = {link.residual_add: (r, i) for r, run in enumerate(runs) for i, link in enumerate(run[:-1])}
        todo: list[fx.Node] = [n for n in outputs(graph) if isinstance(n, fx.Node)]
        reader: dict[fx.Node, fx.Node | None] = dict.fromkeys(todo)
        cut = None
        while todo and cut is None:
            node = todo.pop()
            if node in inner:
                cut = node
            elif node in skip_to:
                parents = [skip_to[node]]
            elif node.target is dialect.cache_guard and group_of(str(node.args[1])) == group:
                parents = [node.args[2]] if len(node.args) > 2 else []  # type: ignore[list-item]
            else:
                parents = list(node.all_input_nodes)
            for parent in parents if cut is None else ():
                if parent not in reader:
                    reader[parent] = node
                    todo.append(parent)
        if cut is None:
            return runs
        r, i = inner[cut]
        by = reader[cut]
        who = f"'{by.name}' ({by.target})" if by is not None else "the output"
        refusals.append(Refusal(cut.name, f"the run ends here: {who} reads the stream at this place in a reused step"))
        runs[r : r + 1] = [runs[r][: i + 1], runs[r][i + 1 :]]


def _before_casts(node: fx.Node) -> fx.Node:
    while node.target in CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _after_casts(node: fx.Node) -> fx.Node:
    """The cast that brings the sum back to the stream's type, where it is all that reads the sum."""
    while len(node.users) == 1 and (user := next(iter(node.users))).target in CASTS and user.args[0] is node:
        node = user
    return node
