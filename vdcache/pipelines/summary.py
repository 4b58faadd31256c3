"""`vdcache.summary`: what a pipeline or a model computed, reused and why."""

from __future__ import annotations

from typing import Any

from vdcache.pipelines.pipeline_cache import applied_to
from vdcache.runtime.session import Session
from vdcache.runtime.summary import WIDTH, summary_table

__all__ = ["summary"]


def summary(pipe: Any, generation: int = -1, *, file: Any = None) -> None:
    """Print each step of a generation, for every denoiser: computed or reused, what was measured, time and the reason; then
    memory, and time beside that of computed steps. `session.summary()` is the same table as a value, which `print` prints.

    Args:
        pipe: a pipeline that vdcache is applied to, what `vdcache.compile` returned, or a session.
        generation: which one, counted from 0; negative numbers count from the last.
        file: where it is printed. Default: standard output.

    Raises:
        ConfigError: vdcache was not applied to the pipeline.
    """
    from rich.console import Console

    console = Console(file=file)
    if not console.is_terminal:
        console = Console(file=file, width=WIDTH)
    session = pipe if isinstance(pipe, Session) else getattr(pipe, "vdcache", None)
    if isinstance(session, Session):
        console.print(summary_table(session, generation))
        return
    applied = applied_to(pipe)
    ran = [d for d in applied.denoisers.values() if len(d.session.history) and not d.helper]
    if not ran:
        console.print(f"{type(pipe).__name__}: {applied.recipe_names} is applied, and no loop has run yet: call the pipeline.")
    for denoiser in ran:
        console.print(f"[bold]{denoiser.name}[/bold] ({type(denoiser.module).__name__})")
        console.print(summary_table(denoiser.session, generation))
    if helpers := [d.name for d in applied.denoisers.values() if d.helper]:
        console.print(f"left alone, because another denoiser takes what it returns: {', '.join(helpers)}")
