"""What a pass is, and what it says of its work."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import fx

from vdcache.errors import ConfigError
from vdcache.ir import dialect
from vdcache.ir.facts import Fact
from vdcache.passes.contract import check_options
from vdcache.patterns.facts import Refusal

__all__ = [
    "Pass",
    "PassRecord",
    "PassResult",
    "Refusal",
    "copy_meta",
    "drop_dead_code",
    "option_text",
    "passes_of",
    "put_cache_guard",
]


@dataclass(frozen=True)
class PassResult:
    """What a pass did: the graph (edited in place), the number of rewrites, the refusals. No rewrite means no change."""

    graph: fx.GraphModule
    rewrites: int = 0
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Pass(abc.ABC):
    """One rewrite of a graph, as a value: its fields are its options.

    A pass edits the graph that it is given (the pipeline copies once, at the start). Its text, `str(a_pass)`, is
    `name{option=value,…}` with the options that differ from their defaults.

    Class attributes say what a pipeline must know: `name`, in small letters and dashes; `requires` and `ensures`, the facts that
    hold before and after; `fixed_sizes`, whether its output is specialised to the input sizes of one graph (`vdcache.compile` then compiles
    each size on its own).

    Options are numbers, words, true or false, none, and lists of them. For any other type, the field's metadata names a function that parses the
    option from its text (`str`): `field(default=LAST, metadata={"read": read_predictor})`.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.TYPED})
    ensures: ClassVar[frozenset[Fact]] = frozenset()
    fixed_sizes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse an option of another type than its field says; a subclass with its own `__post_init__` calls this one.

        Raises:
            ConfigError: naming the option, what it is and what it was given.
        """
        check_options(self)

    @abc.abstractmethod
    def run(self, graph: fx.GraphModule) -> PassResult:
        """Rewrite `graph` in place."""

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        options = ",".join(f"{f.name.replace('_', '-')}={option_text(getattr(self, f.name))}" for f in changed)
        return f"{self.name}{{{options}}}" if options else self.name


def passes_of(given: Any, where: str) -> tuple[Pass, ...]:
    """One pass or several, as a tuple.

    Args:
        where: what they are for, for messages.

    Raises:
        ConfigError: a class, a value whose class does not subclass `Pass`, or anything else.
    """
    if isinstance(given, (Pass, str, bytes, type)) or not isinstance(given, Iterable):
        given = (given,)
    for value in (found := tuple(given)):
        if isinstance(value, Pass):
            continue
        kind = value if isinstance(value, type) else type(value)
        if not issubclass(kind, Pass) and callable(getattr(kind, "run", None)):
            why = f"the class {kind.__name__} does not subclass vdcache.Pass: write class {kind.__name__}(vdcache.Pass)"
        elif isinstance(value, type):
            why = f"{kind.__name__} is a class: give a value of it, {kind.__name__}()"
        else:
            why = f"got {value!r}; a pass is a value of a class that subclasses vdcache.Pass, as MarkBranches() is one"
        raise ConfigError(f"{where} is made of passes, and {why}")
    return found


def option_text(value: Any) -> str:
    """The value of an option as the text of a pass holds it."""
    if isinstance(value, (tuple, list, frozenset, set)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return "[" + ",".join(option_text(v) for v in items) + "]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value)


@dataclass(frozen=True)
class PassRecord:
    """What the pipeline remembers of one pass: its text, what it did, and how long it took (seconds)."""

    text: str
    rewrites: int
    refusals: tuple[Refusal, ...]
    seconds: float


def drop_dead_code(graph: fx.Graph, keep: Callable[[fx.Node], bool] | None = None) -> int:
    """Remove nodes that nothing uses; those that `keep` names, inputs and outputs stay. Returns how many went."""
    gone = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not (keep and keep(node)):
            graph.erase_node(node)
            gone += 1
    return gone


def copy_meta(node: fx.Node, a_pass: str, like: fx.Node, value: torch.Tensor | None = None) -> fx.Node:
    """Give a new node the meta of the node that it stands for, and say who made it."""
    node.meta = {**like.meta, "vdcache": a_pass}
    if value is not None:
        node.meta["val"] = value
    return node


def put_cache_guard(
    value: fx.Node, slot: str, a_pass: Pass, base: fx.Node | None = None, users: Collection[fx.Node] | None = None
) -> fx.Node:
    """Insert a cache guard after `value` and redirect its users to it.

    Steps that reuse the slot's group skip every operation that only `value` needed.

    Args:
        slot: "group/name", unlike every other slot of the graph.
        base: what is subtracted before the value is kept, and added to what was kept; of the value's type.
        users: the only ones that are redirected. Default: all.
    """
    with value.graph.inserting_after(value if base is None else max(value, base)):
        cache_guard = value.graph.call_function(dialect.cache_guard, (value, slot) if base is None else (value, slot, base))
    copy_meta(cache_guard, str(a_pass), value)
    moved = [user for user in (value.users if users is None else users) if user is not cache_guard]
    for user in moved:
        user.replace_input_with(value, cache_guard)
    return cache_guard
