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

from vdcache.ir.errors import ConfigError
from vdcache.runtime import registry
from vdcache.runtime.history import Record, unheard
from vdcache.runtime.policies import Always, Policy
from vdcache.runtime.session import Session
from vdcache.scheduling.schedule import Schedule

__all__ = ["Recording", "Rerun", "Reruns"]

BACK = 3  # steps that an update may look back over: UniPC of third order
EXACT = 1e-4  # of the change from one latent to the next, which an update may leave unexplained in float32


@dataclass
class _Call:
    latent: Tensor
    inputs: dict[int, Any]  # without parameters and the latent
    results: tuple[Any, ...]


@dataclass
class Recording:
    """What one graph was given and what it returned in one uncached generation.

    Values are kept in main memory; those that come again unchanged, as text embeddings do, once.
    """

    program: Any
    steps: list[list[_Call]] = field(default_factory=list)
    devices: dict[int, torch.device] = field(default_factory=dict)  # of inputs, by position
    unfit: str = ""  # why it cannot be run again

    def add(self, program: Any, inputs: Sequence[Any], results: Sequence[Any], record: Record) -> None:
        """Take one call, in order."""
        if program is not self.program or program.latent is None:
            self.unfit = "the model runs as several graphs" if program is not self.program else "no latent is known in it"
        if self.unfit:
            self.steps = []
            return
        while len(self.steps) <= record.step:
            self.steps.append([])
        call = len(self.steps[record.step])
        before = self.steps[record.step - 1] if record.step else self.steps[record.step][:-1]
        like = before[min(call, len(before) - 1)].inputs if before else {}
        given_at = [i for i in range(len(inputs)) if i not in program.static]
        self.devices |= {i: inputs[i].device for i in given_at if isinstance(inputs[i], Tensor)}
        kept = {i: _kept(inputs[i], like.get(i)) for i in given_at if i != program.latent}
        given = tuple(_kept(r) for r in results)
        self.steps[record.step].append(_Call(_kept(inputs[program.latent]), kept, given))

    def not_finite(self) -> int | None:
        """The first step whose latent or output holds NaN or infinity; None where all are numbers."""
        for step, calls in enumerate(self.steps):
            tensors = (t for c in calls for t in (c.latent, *c.results) if isinstance(t, Tensor))
            if not all(bool(t.isfinite().all()) for t in tensors):
                return step
        return None

    @property
    def bytes(self) -> int:
        """Held, each tensor once."""
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


def _unlike(calls: Sequence[_Call]) -> list[_Call]:
    """The calls of a step without those that repeat another one, as a run that is cut short and begun again has them in its first step."""
    found: list[_Call] = []
    for call in calls:
        if not any(_equal([call.latent, *call.inputs.values()], [c.latent, *c.inputs.values()]) for c in found):
            found.append(call)
    return found


def _equal(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(
        a is b or (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b)
        for a, b in zip(some, others, strict=True)
    )


@dataclass(frozen=True)
class _Parts:
    """Which part of the latent the sampler moves, and how outputs are cut into parts of that form.

    Args:
        lanes: equal parts of the batch.
        dim, width: of the dimension along which the latent holds more than what is moved (positions, a mask, a first frame).
        moving: bool, of the form of one part: what changes from step to step.
        result: which result of the model it is.
    """

    lanes: int
    dim: int
    width: int
    moving: Tensor
    result: int

    def of_latent(self, latent: Tensor) -> Tensor:
        """What is moved, as one float32 vector."""
        return latent.chunk(self.lanes)[0].narrow(self.dim, 0, self.width)[self.moving].float()

    def of_results(self, results: Sequence[Any]) -> list[Tensor]:
        """The parts of a model's output, as vectors."""
        parts = [c for lane in results[self.result].chunk(self.lanes) for c in lane.split(self.width, self.dim)]
        return [p[self.moving].float() for p in parts]

    def placed(self, moved: Tensor, like: Tensor) -> Tensor:
        """A latent with what was moved in its place."""
        latent = _copied(like, like.device)
        for lane in latent.chunk(self.lanes):
            part = lane.narrow(self.dim, 0, self.width)
            part[self.moving] = moved.to(latent.dtype)
        return latent


def _parts(recording: Recording) -> _Parts | str:
    """How latents and outputs fit together, or why they do not."""
    latents = [c.latent for calls in recording.steps for c in calls]
    if any(not torch.equal(calls[0].latent, c.latent) for calls in recording.steps for c in calls[1:]):
        return "the lanes of a step are given different latents"
    first = latents[0]
    if any(x.shape != first.shape for x in latents):
        return "the latents of a generation differ in size"
    lanes = next(
        n
        for n in range(min(4, first.shape[0]), 0, -1)
        if first.shape[0] % n == 0 and all(torch.equal(x.chunk(n)[0], p) for x in latents for p in x.chunk(n)[1:])
    )
    changes = torch.zeros_like(first.chunk(lanes)[0], dtype=torch.bool)
    for a, b in itertools.pairwise(latents):
        changes |= (a != b).chunk(lanes)[0]
    for at, result in enumerate(recording.steps[0][0].results):
        if not isinstance(result, Tensor) or result.dim() != first.dim() or result.shape[0] != first.shape[0]:
            continue
        other = [d for d in range(1, first.dim()) if result.shape[d] != first.shape[d]]
        if len(other) > 1:
            continue
        dim = other[0] if other else 1
        have, made = first.shape[dim], result.shape[dim]
        width = made if made <= have else have  # more channels come out than go in where a variance is predicted too
        if made % width:
            continue
        moving = changes.narrow(dim, 0, width)
        if width < have and changes.narrow(dim, width, have - width).any():
            continue
        if moving.any():
            return _Parts(lanes, dim, width, moving, at)
    return "the model's outputs do not have the form of its latent"


class Rerun:
    """One generation that can be run again under any policy.

    Raises:
        ConfigError: it was not made by a sampler that is linear in what the model returns, or the model cannot be run apart.
    """

    def __init__(self, recording: Recording, static: Sequence[Any]) -> None:
        if recording.unfit:
            raise ConfigError(recording.unfit)
        if len({len(calls) for calls in recording.steps}) > 1:
            recording = replace(recording, steps=[_unlike(calls) for calls in recording.steps])
        if len(recording.steps) < 2:
            raise ConfigError("a generation of one step shows no update")
        if len({len(calls) for calls in recording.steps}) > 1:
            raise ConfigError("the steps of the generation differ in how often the model is called")
        found = _parts(recording)
        if isinstance(found, str):
            raise ConfigError(found)
        self._recording, self._static, self._cut = recording, static, found
        self._latents = latents = [found.of_latent(calls[0].latent) for calls in recording.steps]
        self._outputs = outputs = [[p for c in calls for p in found.of_results(c.results)] for calls in recording.steps]
        rounding = torch.finfo(recording.steps[0][0].latent.dtype).eps
        self._coarse = rounding if rounding > 1e-6 else 0.0
        self._updates = [_fitted(latents, outputs, s, self._coarse) for s in range(len(latents) - 1)]
        self._wanted: Tensor | None = None

    @property
    def solver(self) -> tuple[tuple[float, ...], ...]:
        """The weights of every update: of the latents and outputs of a step, the newest step first."""
        return tuple(tuple(u.weights) for u in self._updates)

    def wanted(self) -> Tensor:
        """What it ends with when every step is computed: as recorded, or run again where 16-bit latents hid some of it."""
        if self._wanted is None:
            self._wanted = self._run(Always())[-1] if self._coarse else self._updates[-1].of(self._latents, self._outputs)
        return self._wanted

    def of(self, policy: Policy) -> Tensor:
        """What the generation ends with under a policy: float32, what the sampler moves, as a vector.

        The last update is not seen, since the model is not called after it; it is taken to be as the one before it.
        """
        return self._run(policy)[-1]

    def _run(self, policy: Policy) -> list[Tensor]:
        recording, program = self._recording, self._recording.program
        session = Session(policy, len(recording.steps), name="rerun")
        latents = [self._cut.of_latent(recording.steps[0][0].latent)]
        outputs: list[list[Tensor]] = []
        with registry.using(session), unheard(), torch.no_grad():
            session.begin(len(recording.steps))
            for step, calls in enumerate(recording.steps):
                session.step()
                outputs.append([])
                for call in calls:
                    inputs = list(self._static)
                    latent = self._cut.placed(latents[-1], call.latent)
                    for i, value in (call.inputs | {program.latent: latent}).items():
                        inputs[i] = _copied(value, recording.devices[i]) if isinstance(value, Tensor) else value
                    results = program(*inputs)
                    outputs[-1] += self._cut.of_results([r.cpu() if isinstance(r, Tensor) else r for r in results])
                latents.append(self._updates[min(step, len(self._updates) - 1)].of(latents, outputs))
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


class Reruns:
    """Recorded generations, as `choose` takes them."""

    def __init__(self, runs: Sequence[Rerun]) -> None:
        self._runs = runs

    @property
    def prompts(self) -> int:
        return len(self._runs)

    def of(self, schedule: Schedule, prompt: int) -> Tensor:
        return self._runs[prompt].of(schedule.policy())

    def wanted(self, prompt: int) -> Tensor:
        return self._runs[prompt].wanted()
