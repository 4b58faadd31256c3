"""How much values change over the steps of an uncached run: what MagCache and SmoothCache are calibrated with."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vdcache.calibration.uncached_run import watch
from vdcache.errors import ConfigError
from vdcache.passes import Emit
from vdcache.passes.base import Pass
from vdcache.passes.mark_branches import TYPES
from vdcache.runtime.call import Emitted
from vdcache.runtime.history import Record
from vdcache.util.checks import number, whole
from vdcache.util.json import read_json, write_json

__all__ = ["StepErrors", "magnitudes", "step_errors"]

_TYPE = {kind: name for name, kinds in TYPES.items() for kind in kinds}
Heard = Callable[[tuple[int, int, int | str], str, Tensor], None]  # (generation, step, lane), name, value


@dataclass(frozen=True)
class StepErrors:
    """Relative changes of what branches add, between steps of an uncached run (SmoothCache, arXiv 2411.10510, equation 4).

    Args:
        steps: of a generation.
        errors: for each type of branch, `errors[k - 1][i]` = ‖O_i − O_{i+k}‖₁ / ‖O_{i+k}‖₁, averaged over branches, lanes and
            prompts.
        generations: how many were averaged.
    """

    steps: int
    errors: Mapping[str, tuple[tuple[float, ...], ...]]
    generations: int

    def schedule(self, alpha: float) -> dict[str, list[int]]:
        """The steps that each type computes (1) and reuses (0): from a computed step as many are skipped as the error at the
        far end stays within `alpha`.

        Raises:
            ConfigError: alpha is no number of at least 0.
        """
        if not number(alpha, "alpha is the largest error") >= 0:
            raise ConfigError(f"alpha is the largest error, at least 0; got {alpha}")
        found = {}
        for kind, table in self.errors.items():
            row, step = [1] * self.steps, 0
            while step < self.steps:
                fits = (k for k in range(len(table), 0, -1) if step < len(table[k - 1]) and table[k - 1][step] <= alpha)
                skip = next(fits, 0)
                for s in range(step + 1, min(step + skip, self.steps - 2) + 1):
                    row[s] = 0
                step += skip + 1
            found[kind] = row
        return found

    def to_json(self, path: str | Path | None = None) -> str:
        """The table as JSON text, also written to `path`."""
        return write_json(self, path, indent=1)

    @staticmethod
    def from_json(text: str | Path) -> StepErrors:
        """What `to_json` wrote: text, or the path of a file.

        Raises:
            ConfigError: something else.
        """
        return read_json(StepErrors, text, "table of step errors")

    def __str__(self) -> str:
        lines = [f"changes over {self.steps} steps, {self.generations} generations averaged"]
        for kind, table in self.errors.items():
            lines.append(
                f"  {kind:<6}" + ", ".join(f"{k + 1} apart: {min(r):.3g} to {max(r):.3g}" for k, r in enumerate(table) if r)
            )
        return "\n".join(lines)


def step_errors(
    model: Callable[..., Any],
    run: Callable[..., Any],
    *,
    prompts: Iterable[Any] | None = None,
    lookahead: int = 3,
    inner: str = "eager",
) -> StepErrors:
    """Measure how much each type of branch changes from step to step, for `vdcache.methods.smoothcache`.

    Keeps the values of `lookahead` steps of every branch.

    Args:
        model, run, prompts: as `vdcache.profile` takes them.
        lookahead: the largest distance of steps that is measured.

    Raises:
        ConfigError: a lookahead below 1, no branch, generations of unequal length.
        CacheStateError: `run` did not call the model.
    """
    whole(lookahead, "lookahead, the largest distance of steps,", 1)
    kept: dict[Hashable, deque[Tensor]] = defaultdict(lambda: deque(maxlen=lookahead))
    sums: dict[tuple[str, int, int], list[float]] = defaultdict(list)

    def hear(place: tuple[int, int, int | str], name: str, value: Tensor) -> None:
        generation, step, lane = place
        kind = _TYPE.get(name.partition("/")[0])
        if kind is None:
            return
        earlier = kept[generation, lane, name]
        now = value.float()
        size = now.abs().sum()
        for k, before in enumerate(reversed(earlier), start=1):
            sums[kind, k, step - k].append(float((before - now).abs().sum() / size))
        earlier.append(now.clone())
        for key in [key for key in kept if key[0] < generation]:  # type: ignore[index]
            del kept[key]

    steps, generations = _listen(model, run, prompts, (Emit(),), inner, hear, "step_errors")
    kinds = dict.fromkeys(kind for kind, _, _ in sums)
    if not kinds:
        raise ConfigError("step_errors: the model has no attention or MLP branch on a residual stream that vdcache finds")

    def mean(kind: str, k: int) -> tuple[float, ...]:
        return tuple(sum(sums[kind, k, i]) / len(sums[kind, k, i]) for i in range(steps - k))

    return StepErrors(
        steps, {kind: tuple(mean(kind, k) for k in range(1, min(lookahead, steps - 1) + 1)) for kind in kinds}, generations
    )


def magnitudes(
    model: Callable[..., Any], run: Callable[..., Any], *, prompts: Iterable[Any] | None = None, inner: str = "eager"
) -> tuple[float, ...]:
    """The ratios γ that `vdcache.methods.magcache` goes by: of each step, the mean over tokens of ‖r_t‖ / ‖r_{t−1}‖, where r is what
    all blocks add.

    The first one is 1. Averaged over lanes and prompts (MagCache, arXiv 2506.09045, equation 3).

    Args:
        model, run, prompts: as `vdcache.profile` takes them.

    Raises:
        ConfigError: the residual cannot be read, or generations of unequal length.
        CacheStateError: `run` did not call the model.
    """
    before: dict[Hashable, Tensor] = {}
    found: dict[int, list[float]] = defaultdict(list)

    def hear(place: tuple[int, int, int | str], name: str, value: Tensor) -> None:
        generation, step, lane = place
        now = value.float().norm(dim=-1)
        earlier = before.get((generation, lane))
        if earlier is not None:
            found[step].append(float((now / (earlier + 1e-8)).mean()))
        before[generation, lane] = now

    steps, _ = _listen(model, run, prompts, (Emit(location="residual"),), inner, hear, "magnitudes")
    return (1.0, *(sum(found[s]) / len(found[s]) for s in range(1, steps)))


def _listen(
    model: Callable[..., Any],
    run: Callable[..., Any],
    prompts: Iterable[Any] | None,
    passes: Sequence[Pass],
    inner: str,
    hear: Heard,
    caller: str,
) -> tuple[int, int]:
    """Run the model uncached, and hand every emitted value to `hear`: the steps of a generation, and the generations."""
    count = 0
    ends: dict[int, int] = {}

    def take(record: Record, emitted: Sequence[Emitted], result: Any) -> None:
        nonlocal count
        ends[record.generation] = max(ends.get(record.generation, 0), record.step + 1)
        for number_of, (_, values) in enumerate(emitted):
            for name, value in values.items():
                count += 1
                hear((record.generation, record.step, record.lane), f"{name}@{number_of}", value.detach())

    watched = watch(model, run, prompts, caller, passes=passes, inner=inner, listen=take)
    if not count:
        raise ConfigError(
            f"{caller}: nothing can be measured in this model: {'; '.join(watched.reasons) or 'no branch was found'}"
        )
    if len(set(ends.values())) > 1:
        raise ConfigError(
            f"{caller}: the generations have {sorted(set(ends.values()))} steps; measure one number of steps at a time"
        )
    return next(iter(ends.values())), len(ends)
