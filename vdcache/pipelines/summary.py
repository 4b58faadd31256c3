"""`vdcache.summary`: what a pipeline computed, reused and why."""

from __future__ import annotations

from typing import Any

from vdcache.pipelines.applied import applied_to
from vdcache.report import summary_table

__all__ = ["summary"]


def summary(pipe: Any, generation: int = -1, *, file: Any = None) -> None:
    """Print, for every denoiser of a pipeline, each step of a generation: computed or reused, what was measured, time and the
    reason; then memory, and time beside that of computed steps.

    Args:
        pipe: a pipeline that vdcache is applied to.
        generation: which one, counted from 0; negative numbers count from the last.
        file: where it is printed; standard output without.

    Raises:
        ConfigError: vdcache was not applied to the pipeline.
    """
    from rich.console import Console

    console = Console(file=file)
    applied = applied_to(pipe)
    ran = [d for d in applied.denoisers.values() if len(d.session.history) and not d.helper]
    if not ran:
        console.print(f"{type(pipe).__name__}: {applied.recipe_names} is applied, and no loop has run yet: call the pipeline.")
    for denoiser in ran:
        console.print(f"[bold]{denoiser.name}[/bold] ({type(denoiser.module).__name__})")
        console.print(summary_table(denoiser.session, generation))
    if helpers := [d.name for d in applied.denoisers.values() if d.helper]:
        console.print(f"left alone, because another denoiser takes what it returns: {', '.join(helpers)}")
