"""What a session and a graph tell each other about one call of the graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from vdcache.policies.metrics import MetricSpec
from vdcache.policies.plan import RECOMPUTE, Plan
from vdcache.policies.weights import Numbers
from vdcache.runtime.device_time import DeviceTime
from vdcache.runtime.history import Record

__all__ = [
    "CallContext",
    "CallKey",
    "CompiledGraph",
    "Emitted",
    "GraphInputs",
    "LaneScope",
    "Listener",
    "ProbeResult",
    "ProbeSpec",
    "Recorder",
    "VariantInputs",
]


@dataclass(frozen=True)
class VariantInputs:
    """What a variant takes besides the model's inputs.

    Args:
        reads: names of kept values.
        before: names of values that the computed step before kept; zeros where there was none.
        layouts: what it measures, in order; each measure needs its previous value.
        numbers: groups, and what their predictors are told of the step.
        computes: groups that it computes.
        slots: slots that it reuses.
    """

    reads: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    layouts: tuple[MetricSpec, ...] = ()
    numbers: tuple[tuple[str, Numbers], ...] = ()
    computes: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProbeSpec:
    """A value that is measured before a step's plan is chosen.

    Args:
        layout: its name and distance.
        reference_step: compared with its value at the "step" before, or at the last "computed" one.
    """

    layout: MetricSpec
    reference_step: str


@dataclass(frozen=True)
class LaneScope:
    """How a graph predicts one lane of guidance from the other.

    Args:
        mode: "batch", both lanes are halves of one batch, or "calls", the second call of a step is predicted from the first.
        group: what a plan calls it.
        rows: first row and number of rows of the lane that is always computed, in a batch of twice as many.
        output: which of the model's results it is about.
    """

    mode: str
    group: str
    rows: tuple[int, int]
    output: int


@dataclass(frozen=True)
class ProbeResult:
    """What the head of a graph found out: the values of its probes, the sums of their changes, and what the rest of the graph
    takes.
    """

    values: tuple[Tensor, ...] = ()
    sums: Tensor | None = None
    carried: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class GraphInputs:
    """Which inputs of a graph are what, by position.

    Args:
        static: parameters and buffers.
        weights: those of them that the graph does not write into, in slices: a slice costs a tenth of as many look-ups, and a model has a
            thousand weights.
        timesteps: any of them may be the timestep.
        activations: all but parameters, buffers and timesteps.
        told: activations but for sizes of tensors and what the graph writes into: latents and conditioning.
        latent: the likeliest latent; None if there is none.
        latents: what the denoising loop updates, the likeliest first.
        whole: every likely latent looks like one of the graph's results, as in a model that is one graph.
        on_device: some that are where the graph is computed.
    """

    static: tuple[int, ...]
    weights: tuple[slice, ...]
    timesteps: tuple[int, ...]
    activations: tuple[int, ...]
    told: tuple[int, ...]
    latent: int | None
    latents: tuple[int, ...]
    whole: bool

    @cached_property
    def on_device(self) -> tuple[int, ...]:
        return (*self.latents[:1], *self.activations[:1])


class CompiledGraph(Protocol):
    """What a session must know of a graph that runs under it."""

    @property
    def family(self) -> Hashable: ...  # the user's frame: recompilations of one frame are one family
    @property
    def kind(self) -> Hashable: ...  # graphs of one kind compute the same for other sizes: one goes on where another left off
    @property
    def content(
        self,
    ) -> Hashable: ...  # tells it from graphs of its kind for the same sizes, in which other operations or numbers stand
    @property
    def inputs(self) -> GraphInputs: ...
    @property
    def probes(self) -> tuple[ProbeSpec, ...]: ...  # what a policy may ask for before it chooses
    @property
    def lanes(self) -> LaneScope | None: ...
    @property
    def holds(self) -> bool: ...  # values that depend on no latent, in the session's tables
    @property
    def unobserved(self) -> tuple[str, ...]: ...  # why what the recipe observes is not seen in it

    def weights(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """The parameters and buffers among its inputs that it does not write into itself."""

    def goes_by_steps(self, groups: Sequence[str]) -> bool:
        """Whether what is predicted for any of these groups depends on the step in which it was computed last."""

    def narrow(self, plan: Plan) -> Plan:
        """What of a plan concerns this graph."""

    def needs(self, plan: Plan) -> VariantInputs:
        """What the plan's variant takes besides the model's inputs."""

    def collectives(self, plan: Plan) -> tuple[str, ...]:
        """What the plan's variant exchanges with other ranks, in order."""

    def warm_up(self) -> None:
        """Compile every variant."""


@dataclass(frozen=True, slots=True, eq=False)
class CallKey:
    """What the cached values of a call belong to, within one generation. A session makes one object for equal calls, because a call
    looks its values up many times.

    Args:
        graph: the kind of graph, and which weights where one graph serves several blocks.
        call: how often the graph ran before in this lane of the step.
        lane: the caller's name for the lane, the conditioning of the step's call, and that of the graph's own inputs.
        weights: the number of its weights (`WeightsToken`).
        forms: shape, dtype and device of every activation, and the operations and numbers of the graph.
    """

    graph: Hashable
    call: int
    lane: tuple[int | str | None, int, int]
    weights: int
    forms: Hashable


Emitted = tuple[CompiledGraph, dict[str, Tensor]]  # a graph, and its emitted values by name
Listener = Callable[[Record, Sequence[Emitted], Any], None]
Recorder = Callable[[CompiledGraph, Sequence[Any], Sequence[Any], dict[str, Tensor], Record], None]


class CallContext:
    """One call on its way through: which call it is, what to run, with which cached values; given back to `Session.leave`.

    What most calls do not have stays with the class, because every call makes one of these.

    Args:
        key: what its cached values belong to.
        follows: the step is known when it runs.
        is_new: no call before had its conditioning.
        is_repeated: the step had such a call already, with another latent.
        weights_changed: those that its graph had before are gone.
    """

    needs: VariantInputs
    record: Record
    began: float
    plan: Plan = RECOMPUTE  # what it reuses
    why: str = ""  # it does not reuse more
    reads: Sequence[Tensor] = ()
    before: list[Tensor] | None = None
    previous: list[Tensor] | None = None
    numbers: Sequence[Tensor] = ()
    look: ProbeResult = ProbeResult()
    pair: Tensor | None = None  # what the step's first lane returned
    rows: tuple[int, int] | None = None  # first row and number of rows of the batch that is computed; None for all
    keep: bool = True
    device_time: DeviceTime | None = None
    again: bool = False  # the very same call came in this step before, and its values are kept
    is_first: bool = False  # call of its graph in this generation
    to_come: tuple[Plan, ...] = ()  # then: what later calls may reuse

    def __init__(
        self, graph: CompiledGraph, key: CallKey, follows: bool, is_new: bool, is_repeated: bool, weights_changed: bool
    ) -> None:
        self.graph, self.key, self.follows = graph, key, follows
        self.is_new, self.is_repeated, self.weights_changed = is_new, is_repeated, weights_changed
