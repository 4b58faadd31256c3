"""What one denoising step reuses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["RECOMPUTE", "Plan"]


@dataclass(frozen=True)
class Plan:
    """The groups of slots that one step reuses; everything else is computed.

    Slots that are always reused together form a group, and plans name groups, so one plan serves every graph of a
    model. Hashable; prints as `recompute` or `reuse{all}`.
    """

    reuse: frozenset[str] = frozenset()

    @staticmethod
    def of(groups: Iterable[str]) -> Plan:
        return Plan(frozenset(groups))

    def __hash__(self) -> int:
        return hash(self.reuse)  # which a frozenset knows; plans are looked up several times a call

    def __bool__(self) -> bool:
        """Whether anything is reused."""
        return bool(self.reuse)

    def __str__(self) -> str:
        return f"reuse{{{','.join(sorted(self.reuse))}}}" if self.reuse else "recompute"


RECOMPUTE = Plan()
