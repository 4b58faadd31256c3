"""The graphs beside a step's: they compute what the step is given because it depends on no latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from vdcache.backends.inductor import no_autocast
from vdcache.backends.variants import LazyVariant, VariantCompiler
from vdcache.ir.dialect import invariants
from vdcache.passes.hoist_invariants import InvariantGroup, groups_of, side_graph
from vdcache.runtime.invariants import InvariantTables

__all__ = ["SideGraphs"]


class SideGraphs:
    """The side graphs of one guarded graph, each made when its values are first asked for.

    Args:
        module: the marked graph; not to be changed.
        compiler: of the program's graphs.
    """

    def __init__(self, module: fx.GraphModule, compiler: VariantCompiler) -> None:
        self._module, self._compiler = module, compiler
        self.groups = groups_of(module)
        self._fakes = {str(m.args[1]): m.meta["val"] for m in invariants(module.graph)}
        self._group = {name: group for group in self.groups for name in group.values}
        self._made: dict[tuple[str, ...], tuple[LazyVariant, tuple[str, ...]]] = {}
        self._by_group: dict[tuple[str, ...], tuple[tuple[InvariantGroup, tuple[str, ...]], ...]] = {}

    def values(self, names: tuple[str, ...], inputs: Sequence[Any], tables: InvariantTables | None) -> list[Tensor]:
        """The values of these names for the inputs of a call.

        Args:
            inputs: the model's.
            tables: of the session that the call belongs to; None where nothing is held.
        """
        if not names:
            return []
        found: dict[str, Tensor] = {}
        for group, own in self._needed(names):
            self._of_group(group, own, inputs, tables, found)
        return [found[name] for name in names]

    def _of_group(
        self,
        group: InvariantGroup,
        names: tuple[str, ...],
        inputs: Sequence[Any],
        tables: InvariantTables | None,
        found: dict[str, Tensor],
    ) -> None:
        held = tables.find(group, inputs) if tables is not None else None
        if held is not None and all(map(held.values.__contains__, names)):
            found.update(held.values)
            return
        made = self._computed(names, inputs, tables, found)
        if tables is not None and held is not None:
            tables.keep(held, inputs, made)
            made = held.values
        found.update(made)

    def _computed(
        self, names: tuple[str, ...], inputs: Sequence[Any], tables: InvariantTables | None, found: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        graph, needed = self._graph(names)
        for group, own in self._needed(needed):
            if any(name not in found for name in own):
                self._of_group(group, own, inputs, tables, found)
        given = [*inputs, *self._compiler.zeros(self._compiler.pair, inputs)]
        run = graph.ready(given)
        with no_autocast():
            results = run(*given, *(found[name] for name in needed))
        return dict(zip(names, results, strict=True))

    def _needed(self, names: tuple[str, ...]) -> tuple[tuple[InvariantGroup, tuple[str, ...]], ...]:
        """The names by their groups."""
        if (known := self._by_group.get(names)) is None:
            wanted = set(names)
            own = ((group, tuple(n for n in group.values if n in wanted)) for group in self.groups)
            known = self._by_group[names] = tuple((group, names) for group, names in own if names)
        return known

    def _graph(self, names: tuple[str, ...]) -> tuple[LazyVariant, tuple[str, ...]]:
        if (known := self._made.get(names)) is None:
            with self._compiler.lock:
                if (known := self._made.get(names)) is None:
                    graph, needed = side_graph(self._module, names)
                    made = LazyVariant(graph, [self._fakes[n] for n in needed], self._compiler)
                    known = self._made[names] = made, needed
        return known

    def forget(self) -> None:
        """Compile them anew when they are needed."""
        for graph, _ in self._made.values():
            graph.forget()

    def each(self, names: tuple[str, ...], do: Callable[[LazyVariant], None]) -> None:
        """Do something with every graph that the values of these names take."""
        for _, own in self._needed(names):
            graph, needed = self._graph(own)
            do(graph)
            self.each(needed, do)
