"""What the user asked for, checked before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vdcache.attention.autotune import check_lowering
from vdcache.errors import ConfigError, inform_once, warn_once
from vdcache.methods.recipe import Recipe
from vdcache.runtime.agreement import AgreementFinder
from vdcache.runtime.session import Session
from vdcache.util.checks import number, step_count, whole
from vdcache.util.sizes import byte_count

__all__ = ["Settings"]

INNER = ("inductor", "eager", "auto")


@dataclass(frozen=True)
class Settings:
    """The options of the backend.

    Args:
        recipe: what is cached, and when.
        num_steps: denoising steps of a generation; None to learn them from the first one.
        inner: "inductor", or "eager" (bit-exact, for tests), or "auto".
        generations: how many generations a model will run, for inner="auto". The first one then runs eagerly, and those that follow are
            compiled if that can pay; everything is compiled if not given.
        strict: what vdcache does not understand is an error instead of a warning.
        inductor: Inductor's own settings, as torch.compile's `options` takes them.
        tiles: how attention under masks is computed: "auto" measures on this device (gathers under the eager inner compiler),
            or "gather", "merged", "flex", "triton", "masked".
        outline: whether blocks that are equal up to weights are compiled once: True, False, or "auto" where a call of such a block takes
            little of its time.
        search_share: how much `vdcache-auto` may add to one generation while it searches, as a share of an uncached one.
        cache_budget: bytes that cached values may take, or a text such as "4GiB"; None for what is free on a GPU, and no bound elsewhere.
        cuda_graphs: whether Inductor records the compiled graphs as CUDA graphs, whose results are copied.
        session: the session of the model, where somebody else has made it.
        make_session: makes one; a plain session that follows the recipe's policy without.
        ranks: finds who runs a model together with this process; nobody without.

    Raises:
        ConfigError: anything that does not exist or cannot be.
    """

    recipe: Recipe
    num_steps: int | None = None
    inner: str = "inductor"
    strict: bool = False
    inductor: tuple[tuple[str, Any], ...] = ()
    tiles: str = "auto"
    outline: bool | str = "auto"
    search_share: float = 0.1
    generations: int | None = None
    cache_budget: int | str | None = None
    cuda_graphs: bool = False
    session: Session | None = field(default=None, compare=False)
    make_session: Callable[[Settings], Session] | None = field(default=None, compare=False)
    ranks: AgreementFinder | None = None
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
            raise ConfigError(f"inner is {', '.join(INNER[:-1])} or {INNER[-1]}; got {self.inner!r}")
        if self.generations is not None:
            whole(self.generations, "generations, the number of runs of the denoising loop,", 1)
            if self.inner != "auto":
                raise ConfigError(f"generations tells inner='auto' whether compiling pays; got inner={self.inner!r}")
        check_lowering(self.tiles)
        _check_inductor(dict(self.inductor))
        if not isinstance(self.outline, bool) and self.outline != "auto":
            raise ConfigError(f"outline is True, False or 'auto'; got {self.outline!r}")
        if not isinstance(self.cuda_graphs, bool):
            raise ConfigError(f"cuda_graphs is True or False; got {self.cuda_graphs!r}")
        if not number(self.search_share, "search_share is a number") > 0:
            raise ConfigError(f"search_share is a share of a generation above 0; got {self.search_share!r}")
        if self.cache_budget is not None:
            object.__setattr__(self, "cache_budget", byte_count(self.cache_budget, "cache_budget"))
        goal = self.recipe.goal
        if goal is not None and self.num_steps is not None and goal.speedup is not None and not goal.floor_db:
            goal.count(self.num_steps)  # what no schedule of so few steps reaches is an error now

    @property
    def starts_eagerly(self) -> bool:
        """Whether variants run eagerly, at first at least."""
        return self.inner == "eager" or (self.inner == "auto" and self.generations is not None)

    def anew(self) -> Settings:
        """The same options for another model: no session, no listener, nothing compiled, nothing said."""
        ranks = None if self.ranks is None else self.ranks.anew()
        return replace(self, ranks=ranks, session=None, on_warning=None, on_inputs=None, programs=[], _said=set())

    def new_session(self) -> Session:
        """A session for one model."""
        if self.session is not None:
            return self.session
        if self.make_session is not None:
            session = self.make_session(self)
        else:
            session = Session(self.recipe.policy, self.num_steps, name=self.recipe.name, prepare=self.policy_for)
        session.store.budget = self.budget
        return session

    @property
    def budget(self) -> int | None:
        """Bytes that cached values may take; None where nobody said."""
        return self.cache_budget if isinstance(self.cache_budget, int) else None

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


def _check_inductor(options: dict[str, Any]) -> None:
    """Raise ConfigError where Inductor has no such setting; those of torch.compile's `options` are accepted."""
    if not options:
        return
    known = set(torch._inductor.list_options())
    if unknown := [name for name in options if name.replace("-", "_") not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; torch._inductor.list_options() shows them"
        raise ConfigError(f"Inductor has no setting {unknown[0]!r}{hint}")
