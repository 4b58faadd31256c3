"""Methods that forecast from several values at steps known before the run: Spectrum, HiCache, FoCa, ZEUS, MeanCache; and the gate of
guidance.
"""

from __future__ import annotations

from vdcache.errors import ConfigError
from vdcache.methods.constants import MEANCACHE
from vdcache.methods.recipe import Recipe
from vdcache.methods.schedules import first_then_every
from vdcache.passes import MarkBranches, MarkLanes, MarkOutput
from vdcache.policies.scheduled import SchedulePolicy
from vdcache.policies.steps import EveryNth, GrowingIntervals, LeadingSteps, StepList
from vdcache.policies.weights import Chebyshev, Fixed, FoCa, Hermite, MeanVelocity
from vdcache.util.checks import number, whole

__all__ = ["cfg_gate", "foca", "hicache", "meancache", "spectrum", "zeus"]

_HIDDEN = (MarkOutput(location="hidden"),)
_OUTPUT = (MarkOutput(base="zero"),)


def spectrum(
    growth: float = 0.75, *, degree: int = 4, ridge: float = 0.1, share: float = 1.0, tensors: int = 16, name: str = ""
) -> Recipe:
    """Spectrum (arXiv 2603.01623): the hidden states behind the last block, forecast by ridge regression on Chebyshev polynomials of the step.
    Five steps are computed, then intervals grow from 2.

    Args:
        growth: of the interval with each computed step; the published ones are 0.75 and 3.
        degree, ridge, share: as `predictors.Chebyshev` takes them; the paper's are 4, 0.1 and 1.
        tensors: how many computed steps are kept. The reference keeps all of a run, which with 50 steps are 14 or 10.

    Raises:
        ConfigError: numbers outside of their ranges.
    """
    predictor = Chebyshev(degree, ridge, tensors, share=share)
    policy = SchedulePolicy(GrowingIntervals(growth=growth))
    return Recipe(name or f"spectrum-{growth:g}", policy, _HIDDEN, "arXiv 2603.01623", predictor=predictor)


def hicache(n: int = 4, order: int = 1, *, sigma: float = 0.5, first: int = 2, name: str = "") -> Recipe:
    """HiCache (arXiv 2508.16984): TaylorSeer's differences of each branch under scaled Hermite polynomials; compute `first` steps and
    then every n-th. The defaults are the reference code's.

    Raises:
        ConfigError: n or `first` below 1, an order below 0 or above 4, or no scale.
    """
    policy = first_then_every(n, first)
    predictor = Hermite(whole(order, "order"), number(sigma, "sigma is a number"))
    name = name or f"hicache-{n}-{order}"
    return Recipe(name, policy, (MarkBranches(gate="pre"),), "arXiv 2508.16984", predictor=predictor)


def foca(n: int, *, first: int = 3, name: str = "") -> Recipe:
    """FoCa (arXiv 2508.16211) on each branch: compute `first` steps and then every n-th, forecast as cache-dit has it.

    Its differences are not divided by the distance of their steps, so that it goes too far where computed steps are more than one
    apart, which is as published.

    Raises:
        ConfigError: n or `first` below 1.
    """
    policy = first_then_every(n, first)
    return Recipe(name or f"foca-{n}", policy, (MarkBranches(gate="pre"),), "arXiv 2508.16211", predictor=FoCa())


def zeus(n: int = 2, *, first: int | None = None, last: int | None = None, name: str = "") -> Recipe:
    """ZEUS (arXiv 2604.01552): the model's output extrapolated by its last two computed values, one extrapolation for a run of skipped
    steps. The Lagrange phase of its reference code, which is for single solvers, is not part of it.

    Args:
        n: one of n steps is computed: 2 is the default, 3 the FLUX demo's.
        first, last: steps at either end that are all computed, of 50, scaled to other numbers; by default 10, and 3 for n = 2 or 5.

    Raises:
        ConfigError: n below 2, or a negative number of steps.
    """
    whole(n, "n, of which one step is computed,", 2)
    first = 10 if first is None else whole(first, "first")
    last = (3 if n == 2 else 5) if last is None else whole(last, "last")
    steps = EveryNth(n, first=first, last=last, offset=0 if n == 2 else n - 1, of_steps=50)
    return Recipe(name or f"zeus-{n}", SchedulePolicy(steps), _OUTPUT, "arXiv 2604.01552", predictor=Fixed((2.0, -1.0)))


def meancache(model: str, computed: int, *, name: str = "") -> Recipe:
    """MeanCache (arXiv 2601.19961) with a published table: the velocity moved along the trend of its mean over so many steps as the table says
    for each gap. For 50 steps, as published.

    The reference works on the guided velocity; here each lane is predicted by the same weights, which gives the same sum where guidance
    is a weighted one.

    Args:
        model: that the table was made for.
        computed: the table's number of computed steps.

    Raises:
        ConfigError: there is no such table.
    """
    tables = MEANCACHE.get(model, {})
    if computed not in tables:
        known = "; ".join(f"{m} at {', '.join(map(str, t))} steps" for m, t in MEANCACHE.items())
        raise ConfigError(f"MeanCache has no table of {computed} steps for {model!r}; there are {known}")
    steps, spans = tables[computed]
    by_step = [1] * 50
    for span, start, stop in zip(spans, steps[-len(spans) - 1 :], steps[-len(spans) :], strict=False):
        by_step[start + 1 : stop] = [span] * (stop - start - 1)
    policy = SchedulePolicy(StepList(steps, of_steps=50))
    name = name or f"meancache-{model}-{computed}"
    return Recipe(name, policy, _OUTPUT, "arXiv 2601.19961", predictor=MeanVelocity(tuple(by_step)))


def cfg_gate(share: float = 0.5, *, predicted: str = "second", lanes: str = "auto", name: str = "") -> Recipe:
    """The gate of guidance (SGLang's --cfg-gate-step): from a step on the unconditional lane is not computed, and is what the conditional one
    gives less their last computed difference. With constant guidance that is all it takes.

    Args:
        share: of the run that computes both lanes; SGLang's default, 1, never closes the gate.
        predicted: which half of a batch is unconditional, "first" or "second".
        lanes: as `MarkLanes` takes it: both lanes in one batch, in two calls, or whichever it is.

    Raises:
        ConfigError: no share, or another half.
    """
    policy = SchedulePolicy(LeadingSteps(number(share, "share is a number")), ("lane",))
    return Recipe(name or f"cfg-gate-{share:g}", policy, (MarkLanes(lanes, predicted),), "SGLang, cfg-gate-step")
