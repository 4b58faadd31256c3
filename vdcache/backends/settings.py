"""What the user asked for, checked before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vdcache.backends.kernels.autotune import check_lowering
from vdcache.ir.checks import step_count
from vdcache.ir.errors import ConfigError, inform_once, warn_once
from vdcache.methods import for_goal
from vdcache.recipe import Recipe
from vdcache.runtime.policies import Always, Auto
from vdcache.runtime.session import Session
from vdcache.scheduling.auto_calibrator import AutoCalibrator
from vdcache.scheduling.choose import Goal

__all__ = ["Settings"]

INNER = ("inductor", "eager")


@dataclass(frozen=True)
class Settings:
    """The options of the backend.

    Args:
        recipe: a recipe or the name of one; `vdcache-auto` without.
        speedup, quality_db: what `vdcache-auto` is to reach, one of the two; twice as fast without.
        num_steps: denoising steps of a generation; None to learn them from the first one.
        inner: "inductor", or "eager" (bit-exact, for tests).
        strict: what vdcache does not understand is an error instead of a warning.
        inductor: Inductor's own settings, as torch.compile's `options` takes them.
        tiles: how attention under masks is computed: "auto" measures on this device (gathers under the eager inner compiler),
            or "gather", "flex", "triton", "masked".

    Raises:
        ConfigError: anything that does not exist or cannot be.
    """

    recipe: Recipe
    num_steps: int | None = None
    inner: str = "inductor"
    strict: bool = False
    inductor: tuple[tuple[str, Any], ...] = ()
    tiles: str = "auto"
    session: Session | None = field(default=None, compare=False)
    on_warning: Callable[[str], None] | None = field(default=None, compare=False)  # is told what would be a warning
    on_inputs: Callable[[Any, Sequence[Any]], None] | None = field(
        default=None, compare=False
    )  # is given each program's inputs
    programs: list[Any] = field(default_factory=list, compare=False, repr=False)
    _said: set[str] = field(default_factory=set, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_steps is not None:
            object.__setattr__(self, "num_steps", step_count(self.num_steps))
        if self.inner not in INNER:
            raise ConfigError(f"inner is {' or '.join(INNER)}; got {self.inner!r}")
        check_lowering(self.tiles)
        auto = self.recipe.policy
        if isinstance(auto, Auto) and self.num_steps is not None and auto.speedup is not None and not auto.floor_db:
            Goal.of(auto).count(self.num_steps)  # what no schedule of so few steps reaches is an error now

    @staticmethod
    def of(options: Mapping[str, Any] | None) -> Settings:
        """Settings from the `options` of torch.compile; `pipeline` among them gives the recipe another scope."""
        options = dict(options or {})
        known = [*(f.name for f in fields(Settings) if f.compare), "speedup", "quality_db", "pipeline"]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise ConfigError(
                    f"unknown option {name!r}{hint} There are {', '.join(known)}; Inductor's own go under 'inductor'."
                )
        inductor = options.pop("inductor", {}) or {}
        chosen = for_goal(options.pop("recipe", None), options.pop("speedup", None), options.pop("quality_db", None))
        if (passes := options.pop("pipeline", None)) is not None:
            chosen = chosen.with_passes(passes)
        return Settings(recipe=chosen, inductor=tuple(sorted(inductor.items())), **options)

    def anew(self) -> Settings:
        """The same options for another model: no session, no listener, nothing compiled, nothing said."""
        return replace(self, session=None, on_warning=None, on_inputs=None, programs=[], _said=set())

    def new_session(self) -> Session:
        """A session for one model."""
        if self.session is not None:
            return self.session
        if isinstance(auto := self.recipe.policy, Auto):
            session = Session(Always(), self.num_steps, name=self.recipe.name)
            session.recorder = AutoCalibrator(
                session, Goal.of(auto), strict=self.strict, warn=self.warn_once, log=self.log_once
            )
            return session
        return Session(self.recipe.policy, self.num_steps, name=self.recipe.name, prepare=self.policy_for)

    def policy_for(self, num_steps: int) -> Any:
        """The recipe's policy for a number of steps; says once where its codebook is not the published one."""
        return self.recipe.for_steps(num_steps, lambda message: self.warn_once(f"steps {num_steps}", message)).policy

    def warn_once(self, key: str, message: str) -> None:
        if self.on_warning is not None:
            self.on_warning(message)
        else:
            warn_once(self._said, message, key=key)

    def log_once(self, key: str, message: str) -> None:
        """What is no warning."""
        if self.on_warning is None:
            inform_once(self._said, message, key=key)
