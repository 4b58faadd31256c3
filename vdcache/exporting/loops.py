"""The denoising loop as a graph that is cut at the model's calls: what an exported loop and the unrolled form are made of."""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from vdcache.backends.runner import original
from vdcache.errors import ConfigError
from vdcache.exporting.fixed import Fixed, unused, value_of
from vdcache.exporting.manifest import LoopCall, LoopSpec
from vdcache.ir.edit import add_input, outputs, set_outputs
from vdcache.ir.edit import inputs as graph_inputs
from vdcache.ir.exported import ExportedModel, whole
from vdcache.passes.base import drop_dead_code

__all__ = ["TracedLoop", "traced_loop"]


@dataclass(frozen=True)
class TracedLoop:
    """A loop without the model: what the model returned is among the inputs, what it was given among the outputs.

    Args:
        graph: its inputs are constants of the loop, then the loop's inputs, then the results of every call.
        constants: the values of the first inputs.
        inputs: the names of the others, in order.
        examples: a value for each of `inputs`.
        outputs: the names of the outputs, in order: the loop's results, and what calls are given.
        about: inputs, outputs and calls, without stages.
    """

    graph: fx.GraphModule
    constants: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    examples: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    about: LoopSpec


@dataclass
class _Door:
    """Where the loop's calls of the model go while it is traced."""

    results: list[Tensor]
    calls: int = 0


_door: ContextVar[_Door | None] = ContextVar("vdcache_loop", default=None)


@torch.library.custom_op("vdcache::loop_call", mutates_args=())
def _loop_call(inputs: Sequence[Tensor], number: int) -> list[Tensor]:
    raise RuntimeError("a call of the model that is traced computes nothing")


@_loop_call.register_fake
def _(inputs: Sequence[Tensor], number: int) -> list[Tensor]:
    door = _door.get()
    assert door is not None
    return [torch.empty(v.shape, dtype=v.dtype, device=inputs[0].device) for v in door.results]


def traced_loop(what: Fixed, model: Callable[..., Any], loop: Callable[..., Any], inputs: Mapping[str, Any]) -> TracedLoop:
    """Trace `loop(model, **inputs)`, the model left out.

    Raises:
        ConfigError: a loop that calls the model otherwise than it was exported, another number of times
            than its schedule has steps (or a multiple of it), or that draws at random.
        CaptureError: torch.export does not take the loop.
    """
    found, cut = _captured(what, model, loop, inputs)
    graph = found.captured.graph
    g = graph.graph
    given = [graph_inputs(g)[p] for p in found.given]
    # What it writes into its inputs comes first. A package leaves its inputs as they are, and the results follow from new values.
    written = len(found.captured.signature.mutations)
    results = [_copied(g, v) for v in outputs(g)[written:] if isinstance(v, fx.Node)]
    names: dict[fx.Node, str] = dict(zip(given, inputs, strict=True))
    for i, node in enumerate(results):
        names[node] = unused(f"output_{i}", set(names.values()))
    answers = [_answered(what, g, node, number) for number, node in enumerate(cut)]
    names |= {node: node.name for nodes in answers for node in nodes}
    before = set(names)
    about = _calls(what, cut, answers, names)
    kept = [*results, *(n for n in names if n not in before)]
    set_outputs(g, kept)
    drop_dead_code(g)
    graph.recompile()
    added = [node for nodes in answers for node in nodes]
    ends = tuple(value_of(names[r], r.meta["val"]) for r in results)
    return TracedLoop(
        graph=graph,
        constants=tuple(found.state[p].detach() for p in sorted(found.state)),
        inputs=(*inputs, *(n.name for n in added)),
        examples=(*inputs.values(), *(torch.zeros_like(n.meta["val"]) for n in added)),
        outputs=tuple(names[k] for k in kept),
        about=LoopSpec(tuple(value_of(n, v) for n, v in inputs.items()), ends, (), about),
    )


def _captured(
    what: Fixed, model: Callable[..., Any], loop: Callable[..., Any], inputs: Mapping[str, Any]
) -> tuple[ExportedModel, list[fx.Node]]:
    """The loop as one graph, and its calls of the model."""
    with _open(what) as door:
        found = whole(_Loop(loop, _stand_in(what, model, door)), (), dict(inputs), name="the loop")
    calls, steps = door.calls, len(what.steps)
    if not calls or calls % steps:
        raise ConfigError(
            f"the loop calls the model {calls} times, and the schedule has {steps} steps: they must agree (or each step have as many calls)"
        )
    graph = found.captured.graph.graph
    _draws_nothing(graph)
    _keeps_nothing(found)
    cut = [n for n in graph.nodes if n.target is torch.ops.vdcache.loop_call.default]
    if len(cut) != calls:
        raise ConfigError(f"the loop uses what {len(cut)} of its {calls} calls of the model return: leave out the others")
    return found, cut


def _keeps_nothing(found: ExportedModel) -> None:
    """Refuse a loop that holds what is no tensor, or writes into a tensor that it was not given."""
    given = graph_inputs(found.captured.graph.graph)
    if wrong_nodes := [n.name for i, n in enumerate(given) if i not in found.given and i not in found.state]:
        raise ConfigError(f"the loop holds {wrong_nodes[0]}, which is no tensor")
    signature = found.captured.signature
    if wrong := [signature.names[at] for _, at in signature.mutations if at in found.state]:
        raise ConfigError(
            f"the loop writes into a tensor that it was not given ({wrong[0]}), and a package keeps nothing between generations: give it as an "
            "input and return its new value"
        )


def _calls(
    what: Fixed, cut: Sequence[fx.Node], answers: Sequence[Sequence[fx.Node]], names: dict[fx.Node, str]
) -> tuple[LoopCall, ...]:
    """What every call of the model is given and returns; what has no name yet is given one."""
    calls, lanes = [], len(cut) // len(what.steps)
    for number, node in enumerate(cut):
        given = zip((v.name for v in what.inputs), node.args[0], strict=True)  # type: ignore[arg-type]
        arguments = {name: names.setdefault(value, f"call_{number}_{name}") for name, value in given}
        calls.append(LoopCall(number // lanes, number % lanes, arguments, tuple(n.name for n in answers[number])))
    return tuple(calls)


def _answered(what: Fixed, g: fx.Graph, call: fx.Node, number: int) -> list[fx.Node]:
    """Inputs of the graph in the place of what a call of the model returns."""
    found = []
    for i, value in enumerate(what.outputs):
        like = torch.empty(value.shape, dtype=getattr(torch, value.dtype), device=what.examples[0].device)
        found.append(add_input(g, f"call_{number}_{value.name}", like, "loop"))
        for use in [u for u in call.users if u.target is operator.getitem and u.args[1] == i]:
            use.replace_all_uses_with(found[-1])
    return found


class _Loop(nn.Module):
    def __init__(self, loop: Callable[..., Any], model: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["loop"], self.__dict__["model"] = loop, model

    def forward(self, **inputs: Tensor) -> Any:
        return self.__dict__["loop"](self.__dict__["model"], **inputs)


@contextlib.contextmanager
def _open(what: Fixed) -> Iterator[_Door]:
    door = _Door([torch.empty(v.shape, dtype=getattr(torch, v.dtype), device="meta") for v in what.outputs])
    token = _door.set(door)
    try:
        yield door
    finally:
        _door.reset(token)


def _stand_in(what: Fixed, model: Callable[..., Any], door: _Door) -> Callable[..., Any]:
    """What the loop is given for the model: a call is one operation of the loop's graph.

    Arguments are matched by their names in the model's signature, so a loop may pass by keyword what was exported by position.
    """
    model = original(model)
    called = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    args, kwargs = pytree.tree_unflatten(list(range(what.arity)), what.call)
    exported = dict(called.bind(*args, **kwargs).arguments)
    wanted, wanted_spec = pytree.tree_flatten(exported)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = dict(called.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise ConfigError(f"the loop calls the model wrongly: {error}") from error
        values, spec = pytree.tree_flatten(given)
        if spec != wanted_spec:
            raise ConfigError(
                f"the loop calls the model with {', '.join(given)}, and it was exported with {', '.join(exported)}"
            )
        by_place = dict(zip(wanted, values, strict=True))
        tensors = [by_place[place] for place in what.arguments]
        for value, tensor in zip(what.inputs, tensors, strict=True):
            if (
                not isinstance(tensor, Tensor)
                or tuple(tensor.shape) != value.shape
                or tensor.dtype != getattr(torch, value.dtype)
            ):
                got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
                raise ConfigError(
                    f"the loop gives {value.name} as {got}, and the model was exported with {value.dtype} {list(value.shape)}"
                )
        door.calls += 1
        results = torch.ops.vdcache.loop_call(tensors, door.calls - 1)
        return pytree.tree_unflatten(what.filled(results), what.whole.returns)

    return call


def _copied(g: fx.Graph, value: fx.Node) -> fx.Node:
    """A result of its own: it may be what a call returned, or what the loop was given."""
    with g.inserting_before(g.output_node()):
        copy = g.call_function(torch.ops.aten.clone.default, (value,))
    copy.meta = dict(value.meta)
    return copy


def _draws_nothing(g: fx.Graph) -> None:
    for node in g.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ConfigError(f"the loop draws at random ({node.target}): draw before it, and give what was drawn as an input")
