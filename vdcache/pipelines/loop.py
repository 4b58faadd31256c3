"""One denoising loop of a pipeline: where it begins and ends, its steps, and whose they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vdcache.errors import ConfigError
from vdcache.pipelines.denoiser import Denoiser, here
from vdcache.pipelines.experts import Experts
from vdcache.pipelines.override import Override
from vdcache.pipelines.third_party import boundary

__all__ = ["DenoisingLoop", "LoopOwner", "LoopProgressBar", "ProgressBarHook"]


class LoopOwner(Protocol):
    """Whose loop it is: the pipeline with its denoisers, and who speaks to the user."""

    @property
    def pipe(self) -> Any: ...

    denoisers: dict[str, Denoiser]
    experts: Experts

    def schedulers(self) -> list[Any]: ...
    def denoiser(self, module: nn.Module) -> Denoiser | None: ...
    def begin(self, total: int | None, iterable: Any) -> DenoisingLoop: ...
    def for_copy(self, pipe: Any) -> LoopOwner: ...
    def say(self, message: str, key: str | None = None) -> None: ...
    def say_how_little(self, denoiser: Denoiser, steps: int) -> None: ...
    def look_for_slots(self, denoiser: Denoiser) -> None: ...
    def foreign_cache(self, denoiser: Denoiser) -> str: ...


class DenoisingLoop:
    """One run of the denoising loop.

    It begins when the pipeline asks for its progress bar and ends with that bar, however it ends. Within it a step ends with
    the scheduler's `step`; where the pipeline steps copies of its scheduler, with the bar's next tick.

    Args:
        applied: the pipeline's.
        total: steps that the pipeline announces.
        times: what it loops over, where it says so.
    """

    def __init__(self, applied: LoopOwner, total: int | None, times: Any = None) -> None:
        self.applied = applied
        self.thread = threading.get_ident()
        self.lane_names: dict[int, str] = {}
        self._steppers = [SchedulerStepHook(s, self) for s in applied.schedulers()]
        given = _floats(times)
        self.times = given if given is not None else evaluations([s.owner for s in self._steppers], total)
        self._edge = boundary(applied.pipe, [s.owner for s in self._steppers])
        if total is not None and total > len(self.times):  # more steps than the scheduler has: it is not what the loop steps
            self.times = [float("nan")] * total
        self.index = -1
        self._heard = -1  # the last step in which a scheduler of the pipeline went on
        self._between = True  # the next call of a denoiser begins a step
        self._begun: list[Denoiser] = []
        self._looked_at: list[Denoiser] = []
        self._ran: list[tuple[float, str]] = []  # timestep and denoiser of every step
        self._made: dict[int, tuple[Tensor, Denoiser]] = {}  # what the modules of this step returned, where there are several
        self.over = False

    # ---- begin and end ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        here.loops.append(self)
        for stepper in self._steppers:
            stepper.install()

    def end(self) -> None:
        if self.over:
            return
        self.over = True
        if self in here.loops:
            here.loops.remove(self)
        for stepper in self._steppers:
            stepper.uninstall()
        if self.index == len(self.times) - 1:  # what ran in the last step alone
            self._look(strict=False)
        for denoiser in self._begun:
            denoiser.session.end()
        helpers = {d.name for d in self._begun if d.helper}
        if self.index == len(self.times) - 1:  # it was not cut short
            self.applied.experts.learn([(t, name) for t, name in self._ran if name not in helpers])
        self._made.clear()

    def ticked(self) -> None:
        """The progress bar went on. It says that a step is over where no scheduler of the pipeline has said so since."""
        if not self._between and self._heard != self.index:
            self._between = True
            self._made.clear()

    def stepped(self, stepper: SchedulerStepHook) -> None:
        """A scheduler went on."""
        self._heard = self.index
        if self._between and stepper is self._steppers[0]:  # a step of a denoiser that is none of ours
            self.index += 1
        self._between = True
        self._made.clear()

    # ---- one call of a denoiser --------------------------------------------------------------------------------------

    def holds(self, module: nn.Module) -> bool:
        return self.applied.denoiser(module) is not None

    def call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a forward: through the compiled one, at its place in the generation."""
        denoiser = self.applied.denoiser(module)
        if self.over or denoiser is None:
            return forward(*args, **kwargs)
        if denoiser.helper:
            return self._remember(denoiser, forward(*args, **kwargs))
        if self._between:
            self._between, self.index = False, self.index + 1
            self._look()
        taken = self._taken_from_helpers(denoiser, args, kwargs)
        if denoiser not in self._begun:
            self._begin(denoiser)
        if denoiser.aside:
            return forward(*args, **kwargs)
        if denoiser.step != self.index and self.index < len(self.times):
            self._ran.append((self.times[self.index], denoiser.name))
        denoiser.at_step(self.index, self.times[self.index] if self.index < len(self.times) else None)
        for number, tensor in taken.items():
            denoiser.session.moves(tensor, number)
        result = self._remember(denoiser, denoiser.run(forward, self.lane_names.get(id(module)), args, kwargs))
        return result

    def _look(self, strict: bool = True) -> None:
        """A step is over, so it is known which modules only help others: those are left alone, and nothing is said of them.

        Args:
            strict: also for denoisers where a missing slot is an error.
        """
        ready = [d for d in self._begun if d not in self._looked_at and not (d.aside or d.helper)]
        self._looked_at += ready
        for denoiser in ready:
            self.applied.say_how_little(denoiser, denoiser.session.num_steps or 0)
        waiting = [d for d in ready if not d.checked and (strict or not d.settings.strict)]
        for denoiser in waiting:
            denoiser.checked = True
        for denoiser in waiting:
            self.applied.look_for_slots(denoiser)

    def _begin(self, denoiser: Denoiser) -> None:
        self._begun.append(denoiser)
        denoiser.step = -1
        denoiser.aside = self.applied.foreign_cache(denoiser)
        if denoiser.aside:
            return
        rest = self.times[self.index :]
        steps = self.applied.experts.share(denoiser.name, rest, self._edge) if rest else max(1, len(self.times))
        try:
            denoiser.session.begin(steps)
        except ConfigError as error:
            if denoiser.settings.strict:
                raise
            denoiser.aside = str(error)
            self.applied.say(
                f"{denoiser.name}: '{denoiser.settings.recipe.name}' cannot be followed for {steps} {'steps' if steps > 1 else 'step'}, so all are computed: {error}"
            )

    def _remember(self, denoiser: Denoiser, result: Any) -> Any:
        """What a module returned in this step, where another one may take it."""
        for leaf in pytree.tree_leaves(result) if len(self.applied.denoisers) > 1 else ():
            if isinstance(leaf, Tensor):
                self._made[id(leaf)] = leaf, denoiser
        return result

    def _taken_from_helpers(self, denoiser: Denoiser, args: Any, kwargs: Any) -> dict[int, Tensor]:
        """What one module returns and another one takes within a step is no prediction: the former is left alone from now on.

        Returns what this call takes, by its place among the arguments.
        """
        taken: dict[int, Tensor] = {}
        if not self._made:
            return taken
        for number, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
            if isinstance(leaf, Tensor) and (found := self._made.get(id(leaf))) is not None and found[1] is not denoiser:
                found[1].helper = True
                found[1].session.end()
                taken[number] = leaf
        return taken


class SchedulerStepHook(Override):
    """Stands in front of a scheduler's `step` while a loop runs."""

    __slots__ = ("loop",)

    def __init__(self, scheduler: Any, loop: DenoisingLoop) -> None:
        super().__init__(scheduler, "step", scheduler.__dict__.get("step"))
        self.loop = loop

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.plain(*args, **kwargs)
        self.loop.stepped(self)
        return result


class ProgressBarHook(Override):
    """Stands in front of a pipeline's `progress_bar`: every loop of diffusers asks for one when it begins."""

    __slots__ = ("applied",)

    def __init__(self, pipe: Any, applied: LoopOwner) -> None:
        super().__init__(pipe, "progress_bar", pipe.__dict__.get("progress_bar"))
        self.applied = applied

    def __call__(self, iterable: Any = None, total: int | None = None) -> Any:
        bar = self.plain(iterable=iterable, total=total)
        return LoopProgressBar(bar, self.applied.begin(total, iterable))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the pipeline is cached as the pipeline is, with a state of its own."""
        copied = memo.get(id(self.owner))
        return self if copied is None else ProgressBarHook(copied, self.applied.for_copy(copied))


class LoopProgressBar:
    """The progress bar that the pipeline asked for, which also tells when the loop ends."""

    def __init__(self, bar: Any, loop: DenoisingLoop) -> None:
        self._bar, self._loop = bar, loop

    def __enter__(self) -> Any:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        self._loop.end()
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self._bar:
                yield item
                self._loop.ticked()
        finally:
            self._loop.end()

    def __len__(self) -> int:
        return len(self._bar)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._loop.ticked()
        return self._bar.update(*args, **kwargs)

    def close(self) -> None:
        self._loop.end()
        self._bar.close()

    def __getattr__(self, name: str) -> Any:
        if name in ("_bar", "_loop"):  # not there yet
            raise AttributeError(name)
        return getattr(self._bar, name)

    def __del__(self) -> None:
        self._loop.end()


def evaluations(schedulers: Sequence[Any], total: int | None) -> list[float]:
    """The timesteps that the loop will evaluate the model at.

    A loop that starts from a picture leaves out the first ones, and schedulers of second order have two for most steps.
    """
    for scheduler in schedulers:
        times = _floats(getattr(scheduler, "timesteps", None))
        if times:
            set_to = getattr(scheduler, "num_inference_steps", None) or total or len(times)
            left_out = max(0, set_to - (total or set_to)) * getattr(scheduler, "order", 1)
            return times[left_out:] or times
    return [float("nan")] * (total or 0)


def _floats(times: Any) -> list[float] | None:
    """Timesteps as numbers of the host; None for what is no sequence of numbers."""
    if times is None or not hasattr(times, "__len__"):
        return None
    try:
        return [float(t) for t in (times.tolist() if hasattr(times, "tolist") else times)]
    except (TypeError, ValueError):
        return None
