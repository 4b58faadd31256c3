"""A policy: the pauses between computed steps double."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vdcache import Plan
from vdcache.errors import ConfigError


@dataclass(frozen=True)
class Doubling:
    """Compute steps 0, 1, 2, 4, 8 … and the last; after a pause of `longest` steps begin again with pauses of 1.

    Args:
        longest: steps from one computed step to the next, at most.
        group: the group of slots that is reused.

    Raises:
        ConfigError: a pause below 1.
    """

    longest: int = 4
    group: str = "all"

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ConfigError(f"a pause is at least 1 step, got {self.longest}")

    def plans(self) -> tuple[Plan, ...]:
        return (Plan(), Plan.of([self.group]))

    def start(self, num_steps: int, before: Any = None) -> tuple[int, ...]:
        """The state: the computed steps of a generation."""
        steps, pause = [0], 1
        while steps[-1] + pause < num_steps - 1:
            steps.append(steps[-1] + pause)
            pause = 1 if pause * 2 > self.longest else pause * 2
        return (*steps, num_steps - 1)

    def plan(self, state: tuple[int, ...], step: int, times: Sequence[float] = ()) -> Plan:
        return Plan() if step in state or step > state[-1] else Plan.of([self.group])

    def observe(self, state: tuple[int, ...], step: int, plan: Plan, measures: Any) -> tuple[int, ...]:
        return state
