"""What recipes are made of besides passes: policies, predictors and masks, vdcache's own and those of other packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

from vdcache.attention.masks import MASKS
from vdcache.methods.recipe import KINDS
from vdcache.passes.catalogue import first_sentence
from vdcache.passes.predictors import PREDICTORS
from vdcache.util.plugins import plugins

__all__ = ["Component", "parts"]


@dataclass(frozen=True)
class Component:
    """One of them.

    Args:
        group: "policy", "predictor" or "mask".
        name: as code and texts name it.
        sentence: the first of its docstring.
        origin: "vdcache", or the package that brings it.
    """

    group: str
    name: str
    sentence: str
    origin: str


def parts() -> tuple[Component, ...]:
    """All policies, predictors and masks, vdcache's own first in each group."""
    policies = {name: kind for name, kind in KINDS.items() if hasattr(kind, "plans")}
    return (
        *_group("policy", policies, "vdcache.policies", lambda kind: kind.__name__),
        *_group("predictor", PREDICTORS, "vdcache.predictors", lambda kind: kind.__name__),
        *_group("mask", MASKS, "vdcache.masks", lambda kind: kind.name),
    )


def _group(group: str, own: dict[str, Any], entry_points: str, name_of: Callable[[Any], str]) -> list[Component]:
    foreign = [p for p in plugins(entry_points) if isinstance(p.value, type) and is_dataclass(p.value)]
    theirs = {p.value for p in foreign}
    found = [Component(group, name, first_sentence(kind), "vdcache") for name, kind in own.items() if kind not in theirs]
    return found + [Component(group, name_of(p.value), first_sentence(p.value), p.origin) for p in foreign]
