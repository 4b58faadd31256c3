"""Names of slots: "group/name", where a plan names groups."""

from __future__ import annotations

__all__ = ["group_of"]


def group_of(slot: str) -> str:
    """The group of a slot: what a plan names."""
    return slot.partition("/")[0]
