"""Generations that ran, run again without the sampler that made them.

A sampler makes each latent from the latents and the outputs of the model before it, and all samplers that draw no random numbers
do so linearly: Euler, DPM-Solver++, UniPC, classifier-free guidance and all. So the update of every step is told from one
uncached generation by least squares, exactly up to rounding, and then any schedule can be tried on the model itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vdcache.calibration.schedule import Schedule
from vdcache.errors import ConfigError
from vdcache.policies.base import Always, Policy
from vdcache.runtime import registry
from vdcache.runtime.history import Record, unused
from vdcache.runtime.session import Session

__all__ = ["RecordedRun", "TrajectoryReplay", "TrajectoryReplays"]

BACK = 3  # steps that an update may look back over: UniPC of third order
EXACT = 1e-4  # of the change from one latent to the next, which an update may leave unexplained in float32


@dataclass
class _Call:
    program: Any
    lane: int | str
    latent: Tensor
    inputs: dict[int, Any]  # without parameters and the latent
    results: tuple[Any, ...]  # None in the place of what has not the form of a latent


@dataclass
class RecordedRun:
    """What the graphs of a model were given and what they returned in one uncached generation.

    Values are kept in main memory; those that come again unchanged, as text embeddings do, once.
    """

    steps: list[list[_Call]] = field(default_factory=list)
    static: dict[Any, dict[int, Any]] = field(default_factory=dict)  # parameters, by program and position
    devices: dict[tuple[Any, int], torch.device] = field(default_factory=dict)  # of inputs, by program and position
    unfit: str = ""  # why it cannot be run again

    def add(self, program: Any, inputs: Sequence[Any], results: Sequence[Any], record: Record) -> None:
        """Take one call, in order."""
        while len(self.steps) <= record.step:
            self.steps.append([])
        calls = self.steps[record.step]
        if any(c.lane == record.lane for c in calls):  # what the second of them is given was made by the first
            self.unfit = "the model runs as several graphs"
        if program.inputs.latent is None:
            self.unfit = "no latent is known in it"
        if self.unfit:
            self.steps, self.static = [], {}
            return
        before = self.steps[record.step - 1] if record.step else calls
        like = before[min(len(calls), len(before) - 1)].inputs if before else {}
        given_at = [i for i in range(len(inputs)) if i not in program.inputs.static]
        self.static[program] = {i: inputs[i] for i in program.inputs.static}
        self.devices |= {(program, i): inputs[i].device for i in given_at if isinstance(inputs[i], Tensor)}
        kept = {i: _kept(inputs[i], like.get(i)) for i in given_at if i != program.inputs.latent}
        latent = _kept(inputs[program.inputs.latent])
        given = tuple(_kept(r) if _alike(r, latent) else None for r in results)
        calls.append(_Call(program, record.lane, latent, kept, given))

    def not_finite(self) -> int | None:
        """The first step whose latent or output holds NaN or infinity; None where all are numbers."""
        for step, calls in enumerate(self.steps):
            tensors = (t for c in calls for t in (c.latent, *c.results) if isinstance(t, Tensor))
            if not all(bool(t.isfinite().all()) for t in tensors):
                return step
        return None

    @property
    def bytes(self) -> int:
        """Bytes held, each tensor once."""
        tensors = [t for calls in self.steps for c in calls for t in (c.latent, *c.inputs.values(), *c.results)]
        once = {id(t): t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)}
        return sum(once.values())


def _kept(value: Any, before: Any = None) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = _copied(value.detach(), "cpu")
    same = isinstance(before, Tensor) and before.shape == value.shape and before.dtype == value.dtype
    return before if same and torch.equal(before, value) else value


def _copied(value: Tensor, device: torch.device | str) -> Tensor:
    """A copy that lies in memory as the value does, expanded dimensions and all: compiled graphs are made for their inputs' strides."""
    if not value.numel():
        return value.to(device, copy=True)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    flat = value.as_strided((extent,), (1,), value.storage_offset()).to(device, copy=True)
    return flat.as_strided(value.shape, value.stride())


def _alike(result: Any, latent: Tensor) -> bool:
    """Whether a result may be what a sampler takes for this latent: of as many dimensions, and the same batch."""
    return isinstance(result, Tensor) and result.dim() == latent.dim() and result.shape[0] == latent.shape[0]


def _unlike(calls: Sequence[_Call]) -> list[_Call]:
    """The calls of a step without those that repeat another one, as a run that is cut short and begun again has them in its first step."""
    found: list[_Call] = []
    for call in calls:
        if not any(
            c.program is call.program and _equal([call.latent, *call.inputs.values()], [c.latent, *c.inputs.values()])
            for c in found
        ):
            found.append(call)
    return found


def _equal(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(
        a is b or (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b)
        for a, b in zip(some, others, strict=True)
    )


@dataclass(frozen=True)
class _Cut:
    """How the latent and the outputs of calls of one graph and one size are cut into parts of one form.

    Args:
        lanes: equal parts of the batch.
        result: which result of the model it is.
        dim, width: of the dimension along which the latent holds more than what is moved (positions, a mask, a first frame), or
            the output more than one such part.
    """

    lanes: int
    result: int
    dim: int
    width: int

    def latents(self, latent: Tensor) -> list[Tensor]:
        """Views of the equal parts of a latent."""
        return [lane.narrow(self.dim, 0, self.width) for lane in latent.chunk(self.lanes)]

    def results(self, results: Sequence[Any]) -> list[Tensor]:
        """Views of the parts of a model's output."""
        return [c for lane in results[self.result].chunk(self.lanes) for c in lane.split(self.width, self.dim)]


@dataclass(frozen=True)
class _Parts:
    """Which part of the latent the sampler moves, in calls that may differ in batch and size.

    Args:
        cuts: by graph and shape of the latent.
        moving: bool, of the form that all parts have in common: what changes from step to step. Larger parts begin with it.
    """

    cuts: dict[tuple[Any, torch.Size], _Cut]
    moving: Tensor

    def of_latent(self, call: _Call) -> Tensor:
        """What is moved, as one float32 vector."""
        return self._corner(self._cut(call).latents(call.latent)[0])[self.moving].float()

    def of_results(self, call: _Call, results: Sequence[Any]) -> list[Tensor]:
        """The parts of a model's output, as vectors."""
        return [self._corner(p)[self.moving].float() for p in self._cut(call).results(results)]

    def placed(self, moved: Tensor, call: _Call) -> Tensor:
        """The latent of a call with what was moved in its place."""
        latent = _copied(call.latent, call.latent.device)
        for part in self._cut(call).latents(latent):
            self._corner(part)[self.moving] = moved.to(latent.dtype)
        return latent

    def _cut(self, call: _Call) -> _Cut:
        return self.cuts[call.program, call.latent.shape]

    def _corner(self, part: Tensor) -> Tensor:
        return _corner(part, self.moving.shape)


def _corner(part: Tensor, sizes: Sequence[int]) -> Tensor:
    return part[tuple(slice(n) for n in sizes)]


def _parts(recording: RecordedRun) -> _Parts | str:
    """How latents and outputs fit together, or why they do not."""
    alike: dict[tuple[Any, torch.Size], list[_Call]] = {}
    for call in itertools.chain(*recording.steps):
        alike.setdefault((call.program, call.latent.shape), []).append(call)
    cuts: dict[tuple[Any, torch.Size], _Cut] = {}
    for key, calls in alike.items():
        if (found := _cut(calls)) is None:
            return "the model's outputs do not have the form of its latent"
        cuts[key] = found
    forms = [cuts[key].latents(calls[0].latent)[0].shape for key, calls in alike.items()]
    if len({len(form) for form in forms}) > 1 or len({form[0] for form in forms}) > 1:
        return "the latents of a generation differ in size"
    sizes = [min(n) for n in zip(*forms, strict=True)]
    steps = [[_corner(cuts[c.program, c.latent.shape].latents(c.latent)[0], sizes) for c in calls] for calls in recording.steps]
    if any(not torch.equal(calls[0], other) for calls in steps for other in calls[1:]):
        return "the lanes of a step are given different latents"
    moving = torch.zeros(sizes, dtype=torch.bool)
    for (a, *_), (b, *_) in itertools.pairwise(steps):
        moving |= a != b
    for key, calls in alike.items():  # what is beyond the form that all have stays as it is
        changes = _changes([cuts[key].latents(c.latent)[0] for c in calls])
        _corner(changes, sizes).zero_()
        if changes.any():
            return "the latents of a generation differ in size"
    return _Parts(cuts, moving) if moving.any() else "the model's outputs do not have the form of its latent"


def _changes(latents: Sequence[Tensor]) -> Tensor:
    """Where any of them differs from the one before."""
    changes = torch.zeros_like(latents[0], dtype=torch.bool)
    for a, b in itertools.pairwise(latents):
        changes |= a != b
    return changes


def _cut(calls: Sequence[_Call]) -> _Cut | None:
    """How calls of one graph and one size are cut; None where no result has the form of the latent."""
    latents = [c.latent for c in calls]
    first = latents[0]
    lanes = next(
        n
        for n in range(min(4, first.shape[0]), 0, -1)
        if first.shape[0] % n == 0 and all(torch.equal(x.chunk(n)[0], p) for x in latents for p in x.chunk(n)[1:])
    )
    changes = _changes([x.chunk(lanes)[0] for x in latents])
    for at, result in enumerate(calls[0].results):
        if result is None:
            continue
        other = [d for d in range(1, first.dim()) if result.shape[d] != first.shape[d]]
        if len(other) > 1:
            continue
        dim = other[0] if other else 1
        have, made = first.shape[dim], result.shape[dim]
        width = made if made <= have else have  # more channels come out than go in where a variance is predicted too
        if made % width or (width < have and changes.narrow(dim, width, have - width).any()):
            continue
        if len(calls) == 1 or changes.narrow(dim, 0, width).any():
            return _Cut(lanes, at, dim, width)
    return None


class TrajectoryReplay:
    """One generation that can be run again under any policy.

    Raises:
        ConfigError: it was not made by a sampler that is linear in what the model returns, or the model cannot be run apart.
    """

    def __init__(self, recording: RecordedRun) -> None:
        if recording.unfit:
            raise ConfigError(recording.unfit)
        if len({len(calls) for calls in recording.steps}) > 1:
            recording = replace(recording, steps=[_unlike(calls) for calls in recording.steps])
        if len(recording.steps) < 2:
            raise ConfigError("a generation of one step shows no update")
        if not all(recording.steps):
            raise ConfigError("a step of the generation does not call the model")
        found = _parts(recording)
        if isinstance(found, str):
            raise ConfigError(found)
        self._recording, self._cut = recording, found
        self._latents = latents = [found.of_latent(calls[0]) for calls in recording.steps]
        self._outputs = outputs = [[p for c in calls for p in found.of_results(c, c.results)] for calls in recording.steps]
        rounding = torch.finfo(recording.steps[0][0].latent.dtype).eps
        self._coarse = rounding if rounding > 1e-6 else 0.0
        self._updates = [_fitted(latents, outputs, s, self._coarse) for s in range(len(latents) - 1)]
        self._updates.append(self._last_update())
        self._wanted: Tensor | None = None

    def _last_update(self) -> _Update:
        """Not seen, since the model is not called after it: taken to be as the last one that was made of as many outputs."""

        def made_of(step: int, back: int) -> list[int]:
            return [len(outputs) for outputs in self._outputs[max(0, step - back) : step + 1]]

        last = len(self._outputs) - 1
        for step in reversed(range(last)):
            if made_of(step, self._updates[step].back) == made_of(last, self._updates[step].back):
                return self._updates[step]
        raise ConfigError("the last step of the generation calls the model another number of times than any step before it")

    @property
    def solver(self) -> tuple[tuple[float, ...], ...]:
        """The weights of every update that was seen: of the latents and outputs of a step, the newest step first."""
        return tuple(tuple(u.weights) for u in self._updates[:-1])

    def wanted(self) -> Tensor:
        """What it ends with when every step is computed: as recorded, or run again where 16-bit latents hid some of it."""
        if self._wanted is None:
            self._wanted = self._run(Always())[-1] if self._coarse else self._updates[-1].of(self._latents, self._outputs)
        return self._wanted

    def of(self, policy: Policy) -> Tensor:
        """What the generation ends with under a policy: float32, what the sampler moves, as a vector."""
        return self._run(policy)[-1]

    def _run(self, policy: Policy) -> list[Tensor]:
        recording = self._recording
        session = Session(policy, len(recording.steps), name="rerun")
        latents = [self._latents[0]]
        outputs: list[list[Tensor]] = []
        with registry.using(session), unused(), torch.no_grad():
            session.begin(len(recording.steps))
            for step, calls in enumerate(recording.steps):
                session.step()
                outputs.append([])
                for call in calls:
                    session.lane(call.lane)
                    program = call.program
                    inputs = dict(recording.static[program])
                    for i, value in (call.inputs | {program.inputs.latent: self._cut.placed(latents[-1], call)}).items():
                        inputs[i] = _copied(value, recording.devices[program, i]) if isinstance(value, Tensor) else value
                    results = program(*(inputs[i] for i in range(len(inputs))))
                    outputs[-1] += self._cut.of_results(call, [r.cpu() if isinstance(r, Tensor) else r for r in results])
                latents.append(self._updates[step].of(latents, outputs))
                if len(outputs) > BACK + 1:
                    outputs[-BACK - 2] = []  # nothing looks back so far
        return latents


def _regressors(latents: Sequence[Tensor], outputs: Sequence[Sequence[Tensor]], step: int, back: int) -> list[Tensor]:
    """What an update may be made of: latents and outputs of this step and `back` before it."""
    return [v for s in range(step, max(-1, step - back - 1), -1) for v in (latents[s], *outputs[s])]


@dataclass(frozen=True)
class _Update:
    """How the next latent is made: how many steps it looks back, and the weights of what it is made of."""

    back: int
    weights: tuple[float, ...]

    def of(self, latents: Sequence[Tensor], outputs: Sequence[Sequence[Tensor]]) -> Tensor:
        total = torch.zeros_like(latents[-1], dtype=torch.float64)
        for weight, term in zip(self.weights, _regressors(latents, outputs, len(outputs) - 1, self.back), strict=True):
            total += weight * term.double()
        return total.float()


def _fitted(latents: Sequence[Tensor], outputs: Sequence[Sequence[Tensor]], step: int, coarse: float) -> _Update:
    """How the next latent follows, looking back no further than needed.

    Raises:
        ConfigError: it does not follow.
    """
    wanted = latents[step + 1].double()
    change = float((wanted - latents[step].double()).norm())
    allowed = EXACT * change + coarse * float(wanted.norm())
    for back in range(min(BACK, step) + 1):
        terms = torch.stack([t.double() for t in _regressors(latents, outputs, step, back)])
        gram, right = (terms @ terms.T).cpu(), (terms @ wanted).cpu()
        scale = gram.diagonal().clamp_min(1e-300).sqrt()
        solved = torch.linalg.lstsq(
            gram / scale[:, None] / scale, (right / scale)[:, None], driver="gelsd", rcond=1e-13
        ).solution[:, 0]
        weights = solved / scale
        missed = float((terms.T @ weights.to(terms.device) - wanted).norm())
        if missed <= allowed:
            return _Update(back, tuple(weights.tolist()))
    raise ConfigError(
        f"the sampler's update after step {step} does not follow from latents and outputs (it leaves {missed / max(change, 1e-30):.1%} of "
        "the change): it draws random numbers, or changes values in other ways"
    )


class TrajectoryReplays:
    """Recorded generations, as `choose` takes them."""

    def __init__(self, runs: Sequence[TrajectoryReplay]) -> None:
        self._runs = runs

    @property
    def prompts(self) -> int:
        return len(self._runs)

    def of(self, schedule: Schedule, prompt: int) -> Tensor:
        return self._runs[prompt].of(schedule.policy())

    def wanted(self, prompt: int) -> Tensor:
        return self._runs[prompt].wanted()
