"""Run the user's sampling with a model that is computed in full and watched: what every measurement begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vdcache.backends import Settings
from vdcache.backends.runner import compile_with, original
from vdcache.errors import CacheStateError, ConfigError
from vdcache.methods.recipe import Recipe
from vdcache.passes.base import Pass
from vdcache.policies import Always
from vdcache.runtime.session import Session
from vdcache.util.checks import check_model

__all__ = ["UncachedRun", "checked_prompts", "until_forgotten", "watch"]


@dataclass(frozen=True)
class UncachedRun:
    """What is left after a run.

    Args:
        session: with its history and the graphs that ran.
        name: of the model, for messages.
        reasons: what vdcache would have warned of, and what its passes refused.
    """

    session: Session
    name: str
    reasons: tuple[str, ...]


def watch(
    model: Callable[..., Any],
    run: Callable[..., Any],
    prompts: Iterable[Any] | None,
    caller: str,
    *,
    passes: Sequence[Pass] = (),
    inner: str = "eager",
    listen: Callable[..., None] | None = None,
    on_inputs: Callable[[Any, Sequence[Any]], None] | None = None,
    prompt_is: Callable[[int], None] = lambda number: None,
    dynamic: bool | None = None,
    recipe: Recipe | None = None,
    recorder: Callable[..., None] | None = None,
) -> UncachedRun:
    """Run a model uncached.

    Args:
        model, run, prompts: as `vdcache.profile` takes them.
        caller: the public function that asks, for messages.
        passes: put into the graph.
        listen: a listener of the session (record, emitted values, result).
        takes: is given every graph that is called, and its inputs.
        prompt_is: is told the number of the prompt that comes next.
        dynamic: as torch.compile takes it.
        recipe: whose scope, observations and probes are in the graph, in place of `passes`; nothing is skipped.
        recorder: of the session.

    Raises:
        ConfigError: no model, or prompts is no list or is empty.
        CacheStateError: `run` did not call the model.
    """
    check_model(model, caller)
    prompts = checked_prompts(prompts, caller)
    heard: list[str] = []
    model = original(model)
    made = recipe or Recipe(caller, Always(), tuple(passes))
    session = Session(Always(), name=made.name) if recipe is not None else None
    settings = Settings(made, inner=inner, on_warning=heard.append, on_inputs=on_inputs, session=session)
    watched = compile_with(model, settings, dynamic=dynamic)
    session = watched.vdcache
    session.recorder = recorder
    if listen is not None:
        session.listeners.append(listen)
    given, forget = until_forgotten(watched, model)
    try:
        with torch.no_grad():
            for number, prompt in enumerate([None] if prompts is None else prompts):
                prompt_is(number)
                if prompts is None:
                    run(given)
                else:
                    session.begin()
                    run(given, prompt)
    finally:
        forget()  # a pipeline may hold what it was given: from here on it is the plain model
        if listen is not None:
            session.listeners.remove(listen)
    if not len(session.history) and not heard:
        raise CacheStateError(
            f"{caller}: run(model) did not call the model that it was given: use its argument, as in `lambda model: sample(model)`"
        )
    refused = {why for graph in session.graphs for r in graph.guarded.refusals for why in r.reasons}  # type: ignore[attr-defined]
    name = type(model).__name__ if isinstance(model, torch.nn.Module) else getattr(model, "__name__", "model")
    return UncachedRun(session, name, tuple(sorted(refused) or dict.fromkeys(heard)))


def checked_prompts(prompts: Any, caller: str) -> list[Any] | None:
    """Prompts as a list.

    Raises:
        ConfigError: no list, or an empty one.
    """
    if isinstance(prompts, (str, bytes)) or (prompts is not None and not isinstance(prompts, Iterable)):
        raise ConfigError(f"prompts is a list of prompts; got {prompts!r}: give [{prompts!r}]")
    if prompts is not None and not (prompts := list(prompts)):
        raise ConfigError(f"{caller}: prompts is empty, so there is nothing to measure")
    return prompts


def until_forgotten(watched: Any, model: Any) -> tuple[Any, Callable[[], None]]:
    """What `run` is given, and what turns it into the plain model."""
    if isinstance(watched, torch.nn.Module):
        return watched, lambda: watched.__dict__.__setitem__("forward", model)
    now = [watched]

    def measured(*args: Any, **kwargs: Any) -> Any:
        return now[0](*args, **kwargs)

    measured.vdcache = watched.vdcache  # type: ignore[attr-defined]
    return measured, lambda: now.__setitem__(0, model)
