"""dead-code: drop what nothing reads.

    h = f(x); return (y)   -->   return (y)

Bit-exact. Nodes with an effect besides their value (random numbers, communication, writes) and dialect nodes stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from vdcache.ir import dialect
from vdcache.ir.ops import is_effectful
from vdcache.passes.base import Pass, PassResult, drop_dead_code


@dataclass(frozen=True)
class DeadCode(Pass):
    """Drop what nothing reads."""

    name: ClassVar[str] = "dead-code"

    def run(self, graph: fx.GraphModule) -> PassResult:
        gone = drop_dead_code(graph.graph, keep=lambda n: is_effectful(n) or dialect.is_dialect(n))
        return PassResult(graph, gone)
