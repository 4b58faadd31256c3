"""A recipe on many models at once: whether it works there, what it leaves out, and how far off what it reuses is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

import vdcache
from vdcache.errors import VdcacheWarning
from vdcache.methods.recipe import Recipe
from vdcache.policies.plan import RECOMPUTE
from vdcache.testing.models import Case, small_models, value
from vdcache.util.checks import step_count, whole

__all__ = ["Trial", "Trials", "try_recipe"]


@dataclass(frozen=True)
class Trial:
    """One recipe on one model.

    Args:
        steps: of the generation.
        computed: the steps that reused nothing.
        identical: whether these gave what the untouched model gives, bit for bit.
        flops: share of the uncached FLOPs that was computed, 0 to 1.
        error: relative distance ‖a − b‖ / ‖b‖ of the outputs of all other steps to the untouched model's, the mean; NaN for none.
        said: what vdcache said, and what failed: "" for nothing.
    """

    model: str
    steps: int
    computed: tuple[int, ...] = ()
    identical: bool = False
    flops: float = 1.0
    error: float = math.nan
    said: str = ""

    def row(self) -> dict[str, Any]:
        """The trial as JSON takes it: no error is None."""
        return {**asdict(self), "error": None if math.isnan(self.error) else self.error}


class Trials(tuple[Trial, ...]):
    """Trials that print as a table."""

    def __str__(self) -> str:
        wide = max([5, *(len(t.model) for t in self)])
        lines = [f"{'model':{wide}}  computed  FLOPs  error    bit-identical where computed"]
        for t in self:
            error = "–" if math.isnan(t.error) else f"{t.error:.2g}"
            computed = f"{len(t.computed)} of {t.steps}"
            same = "yes" if t.identical else "NO"
            lines.append(f"{t.model:{wide}}  {computed:8}  {t.flops:5.2f}  {error:7}  {same}{f'; {t.said}' if t.said else ''}")
        return "\n".join(lines)


def try_recipe(
    recipe: Recipe | str,
    models: Mapping[str, Case] | Iterable[str] | None = None,
    *,
    steps: int = 12,
    tokens: int = 6,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> Trials:
    """Run one generation of every model under a recipe, with the inner compiler "eager", beside the untouched model.

    Both are given the same latents at every step, which drift as in a generation but do not follow from each other, and the models are
    small and random: this says whether a method works on an architecture, not how good its pictures are.

    Args:
        models: cases by name, or names of `small_models()`. Default: all of them.
        steps: denoising steps of the generation, at least 1.
        tokens: tokens of text, at least 1.
        on_progress: is told which model is next.

    Returns the trials, which print as a table. A model on which the recipe fails is a row that says why.

    Raises:
        ConfigError: no such model or recipe, no step, no token.
    """
    steps = step_count(steps)
    whole(tokens, "tokens, the number of tokens of text,", 1)
    there = small_models()
    if models is None or isinstance(models, Mapping):
        cases = dict(there if models is None else models)
    else:
        names = list(models)
        if wrong := [n for n in names if n not in there]:
            raise vdcache.errors.ConfigError(f"there is no small model {wrong[0]!r}; there are {', '.join(there)}")
        cases = {name: there[name] for name in names}
    trials = []
    for i, (name, case) in enumerate(cases.items(), start=1):
        on_progress(f"trying {name} ({i} of {len(cases)})")
        trials.append(_trial(recipe, name, case, steps, tokens))
    return Trials(trials)


def _trial(recipe: Recipe | str, name: str, case: Case, steps: int, tokens: int) -> Trial:
    torch._dynamo.reset()
    identical, errors, flops, computed = True, [], [], []
    with warnings.catch_warnings(record=True) as heard, torch.no_grad():
        warnings.simplefilter("always")
        try:
            model = case.build()
            compiled: Any = vdcache.compile(model, recipe, num_steps=steps, inner="eager")
            session = compiled.vdcache
            for step in range(steps):
                before = len(session.history)
                got, want = (value(run(**case.call(step, tokens))) for run in (compiled, model))
                new = session.history.records[before:]
                plan = next((r.plan for r in new if r.reused), RECOMPUTE)
                if plan:
                    errors.append(float((got - want).double().norm() / want.double().norm()))
                else:
                    computed.append(step)
                    identical &= torch.equal(got, want)
                flops.append(sum(p.variants.flops(p.narrow(plan)) for p in session.graphs))
            whole = steps * sum(p.variants.flops(RECOMPUTE) for p in session.graphs)
        except Exception as error:  # noqa: BLE001 — one model's failure is a row, not the end
            return Trial(name, steps, tuple(computed), said=f"{type(error).__name__}: {error}")
    said = "; ".join(dict.fromkeys(str(w.message) for w in heard if issubclass(w.category, VdcacheWarning)))
    mean = sum(errors) / len(errors) if errors else math.nan
    return Trial(name, steps, tuple(computed), identical, sum(flops) / whole if whole else 1.0, mean, said)
