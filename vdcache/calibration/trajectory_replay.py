"""Generations that ran, run again without the sampler that made them.

A sampler makes each latent from the latents and the outputs of the model before it, and all samplers that draw no random numbers
do so linearly: Euler, DPM-Solver++, UniPC, classifier-free guidance and all. So the update of every step is told from one
uncached generation by least squares, exactly up to rounding, and then any schedule can be tried on the model itself.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vdcache.errors import ConfigError
from vdcache.policies.base import Always, Policy
from vdcache.policies.weights import WeightRule
from vdcache.runtime import registry
from vdcache.runtime.history import Record, unused
from vdcache.runtime.session import Session
from vdcache.runtime.weights_token import WeightsToken

__all__ = ["RecordedRun", "Rerun", "TrajectoryReplay"]

BACK = 3  # steps that an update may look back over: UniPC of third order
EXACT = 1e-4  # of the change from one latent to the next, which an update may leave unexplained in float32


@dataclass
class _Call:
    program: int  # number of the graph in `_Programs`
    lane: int | str
    latent: Tensor
    inputs: dict[int, Any]  # without parameters and the latent
    results: tuple[Any, ...]  # None in the place of what has not the form of a latent


class _Programs:
    """Graphs by number, and their weights, where they were when the graphs last ran. Holds neither."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._refs: list[weakref.ref[Any]] = []
        self._weights: dict[int, dict[int, Any]] = {}
        self._token, self._values = WeightsToken(), dict[int, int]()  # of each graph the number of its weights' values
        self.changed = False  # a graph has other weights than when it ran first

    def saw(self, program: Any, inputs: Sequence[Any]) -> int:
        """A graph runs with these inputs. Returns its number."""
        number = self._numbers.setdefault(program, len(self._refs))
        if number == len(self._refs):
            self._refs.append(weakref.ref(program))
        values, _ = self._token.check(number, number, program.weights(inputs))
        self.changed = self.changed or self._values.setdefault(number, values) != values
        given = {i: inputs[i] for i in program.inputs.static}
        self._weights[number] = {i: weakref.ref(v) if isinstance(v, Tensor) else v for i, v in given.items()}
        return number

    @property
    def are_alive(self) -> bool:
        """Whether all graphs are still there."""
        return all(ref() is not None for ref in self._refs)

    def __getitem__(self, number: int) -> tuple[Any, dict[int, Any]]:
        """A graph, and its weights by position.

        Raises:
            ReferenceError: it or one of them is gone.
        """
        program = self._refs[number]()
        found = {i: v() if isinstance(v, weakref.ref) else v for i, v in self._weights[number].items()}
        if program is None or any(v is None for v in found.values()):
            raise ReferenceError("a graph is gone, or a weight is no longer where it was when its graph last ran")
        return program, found


@dataclass
class RecordedRun:
    """What the graphs of a model were given and what they returned in one generation.

    Values are kept in main memory; those that come again unchanged, as text embeddings do, once.

    Args:
        uncached: every step of it was computed.
    """

    uncached: bool = True
    steps: list[list[_Call]] = field(default_factory=list)
    programs: _Programs = field(default_factory=_Programs)
    devices: dict[tuple[int, int], torch.device] = field(default_factory=dict)  # of inputs, by program and position
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
        if program.writes_into_itself:
            self.unfit = "the model writes into its own buffers, and would do so when it is run again"
        if self.unfit:
            self.steps = []
            return
        before = self.steps[record.step - 1] if record.step else calls
        like = before[min(len(calls), len(before) - 1)].inputs if before else {}
        given_at = [i for i in range(len(inputs)) if i not in program.inputs.static]
        number = self.programs.saw(program, inputs)
        self.devices |= {(number, i): inputs[i].device for i in given_at if isinstance(inputs[i], Tensor)}
        kept = {i: _kept(inputs[i], like.get(i)) for i in given_at if i != program.inputs.latent}
        latent = _kept(inputs[program.inputs.latent])
        given = tuple(_kept(r) if _alike(r, latent) else None for r in results)
        calls.append(_Call(number, record.lane, latent, kept, given))

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

    cuts: dict[tuple[int, torch.Size], _Cut]
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


def _parts(recorded: Sequence[Sequence[_Call]]) -> _Parts | str:
    """How latents and outputs fit together, or why they do not.

    Args:
        recorded: the calls of each step.
    """
    alike: dict[tuple[int, torch.Size], list[_Call]] = {}
    for call in itertools.chain(*recorded):
        alike.setdefault((call.program, call.latent.shape), []).append(call)
    cuts: dict[tuple[int, torch.Size], _Cut] = {}
    for key, calls in alike.items():
        if (found := _cut(calls)) is None:
            return "the model's outputs do not have the form of its latent"
        cuts[key] = found
    forms = [cuts[key].latents(calls[0].latent)[0].shape for key, calls in alike.items()]
    if len({len(form) for form in forms}) > 1 or len({form[0] for form in forms}) > 1:
        return "the latents of a generation differ in size"
    sizes = [min(n) for n in zip(*forms, strict=True)]
    steps = [[_corner(cuts[c.program, c.latent.shape].latents(c.latent)[0], sizes) for c in calls] for calls in recorded]
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

    Of what was recorded only that stays which the model must be given again.

    Raises:
        ConfigError: it was not made by a sampler that is linear in what the model returns, or the model cannot be run apart.
    """

    def __init__(self, recording: RecordedRun) -> None:
        if recording.unfit:
            raise ConfigError(recording.unfit)
        if recording.programs.changed:
            raise ConfigError("its weights changed within the generation")
        steps = recording.steps
        if len({len(calls) for calls in steps}) > 1:
            steps = [_unlike(calls) for calls in steps]
        if len(steps) < 2:
            raise ConfigError("a generation of one step shows no update")
        if not all(steps):
            raise ConfigError("a step of the generation does not call the model")
        found = _parts(steps)
        if isinstance(found, str):
            raise ConfigError(found)
        latents = [found.of_latent(calls[0]) for calls in steps]
        outputs = [[p for c in calls for p in found.of_results(c, c.results)] for calls in steps]
        rounding = torch.finfo(steps[0][0].latent.dtype).eps
        coarse = rounding if rounding > 1e-6 else 0.0
        updates = [_fitted(latents, outputs, s, coarse) for s in range(len(latents) - 1)]
        updates.append(_last_update(updates, outputs))
        self.programs, self._devices = recording.programs, recording.devices
        self._cut, self._updates = found, updates
        self.start = latents[0]  # what the sampler began with
        # What 16-bit latents hide is seen by running it again.
        self._wanted = updates[-1].of(latents, outputs) if recording.uncached and not coarse else None
        like: dict[tuple[int, torch.Size], Tensor] = {}  # but for what the sampler moves, all latents of one form are the same
        self.steps = [
            [replace(c, latent=like.setdefault((c.program, c.latent.shape), c.latent), results=()) for c in calls]
            for calls in steps
        ]

    @property
    def solver(self) -> tuple[tuple[float, ...], ...]:
        """The weights of every update that was seen: of the latents and outputs of a step, the newest step first."""
        return tuple(tuple(u.weights) for u in self._updates[:-1])

    @property
    def cuda(self) -> list[torch.device]:
        """The CUDA devices of its inputs."""
        return [d for d in {*self._devices.values()} if d.type == "cuda"]

    @property
    def knows_its_end(self) -> bool:
        """Whether what it ends with when every step is computed is known."""
        return self._wanted is not None

    def wanted(self) -> Tensor:
        """What it ends with when every step is computed: as recorded, or run again where that does not tell it."""
        if self._wanted is None:
            self._wanted = self.of(Always())
        return self._wanted

    def ended(self, result: Tensor) -> None:
        """With every step computed it ends with this."""
        self._wanted = result

    def of(self, policy: Policy, rule: WeightRule | None = None) -> Tensor:
        """What the generation ends with under a policy: float32, what the sampler moves, as a vector."""
        rerun = Rerun(self, policy, rule)
        while not rerun.is_over:
            rerun.step()
        return rerun.result

    def run_step(self, session: Session, latents: list[Tensor], outputs: list[list[Tensor]]) -> None:
        """Call the model as in the next step, under a session, and append what it returns and the latent after it.

        Raises:
            ReferenceError: a graph or a weight is gone; nothing has run.
        """
        step = len(outputs)
        ready = [self.programs[call.program] for call in self.steps[step]]
        session.step()
        made: list[Tensor] = []
        for call, (program, inputs) in zip(self.steps[step], ready, strict=True):
            session.lane(call.lane)
            for i, value in (call.inputs | {program.inputs.latent: self._cut.placed(latents[-1], call)}).items():
                inputs[i] = _copied(value, self._devices[call.program, i]) if isinstance(value, Tensor) else value
            results = session.watch(program, [inputs[i] for i in range(len(inputs))], {})
            made += self._cut.of_results(call, [r.cpu() if isinstance(r, Tensor) else r for r in results])
        outputs.append(made)
        latents.append(self._updates[step].of(latents, outputs))
        for old in (latents, outputs):
            if len(old) > BACK + 2:
                old[-BACK - 3] = []  # type: ignore[call-overload]  # nothing looks back so far


class Rerun:
    """A recorded generation that is run again under a policy, and a rule of what is predicted, a step at a time.

    `latents` has what the sampler made after each step, as vectors; old ones are empty.
    """

    def __init__(self, replay: TrajectoryReplay, policy: Policy, rule: WeightRule | None = None) -> None:
        self._replay = replay
        self._session = Session(policy, len(replay.steps), name="rerun")
        self._session.rule = rule
        self._session.ranks.is_replay = True
        self.latents: list[Tensor] = [replay.start]
        self._outputs: list[list[Tensor]] = []
        with unused():
            self._session.begin(len(replay.steps))

    @property
    def at(self) -> int:
        """The next step."""
        return len(self._outputs)

    @property
    def is_over(self) -> bool:
        """Whether every step has run."""
        return self.at == len(self._replay.steps)

    @property
    def result(self) -> Tensor:
        """What it ended with: float32, what the sampler moves, as a vector."""
        return self.latents[-1]

    def step(self) -> None:
        """Run the next step."""
        session = self._session
        # A model may draw random numbers: those of the user's generation stay what they are.
        with registry.using(session), unused(), torch.no_grad(), torch.random.fork_rng(self._replay.cuda):
            session.store.bring_back()
            self._replay.run_step(session, self.latents, self._outputs)

    def rest(self) -> None:
        """Nothing of it stays on a device until the next step."""
        self._session.store.put_aside()


def _last_update(updates: Sequence[_Update], outputs: Sequence[Sequence[Tensor]]) -> _Update:
    """Not seen, since the model is not called after it: taken to be as the last one that was made of as many outputs."""

    def made_of(step: int, back: int) -> list[int]:
        return [len(own) for own in outputs[max(0, step - back) : step + 1]]

    last = len(outputs) - 1
    for step in reversed(range(last)):
        if made_of(step, updates[step].back) == made_of(last, updates[step].back):
            return updates[step]
    raise ConfigError("the last step of the generation calls the model another number of times than any step before it")


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
