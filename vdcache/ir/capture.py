"""Into vdcache's one graph form: functional ATen that keeps composite operations.

Three doors lead to the same form, `Captured`:

- `capture`: what Dynamo hands to a backend (a graph of torch calls and its inputs);
- `trace`: any Python function or module, by make_fx;
- `exported`: a whole model, by torch.export.

Composite operations (`linear`, `scaled_dot_product_attention`, `layer_norm` …) stay whole, because patterns read them and
the eager inner compiler is then bit-identical to the model. Dispatch runs below autograd and autocast, so the casts
of an autocast region are in the graph as casts; tracing before dispatch was seen to lose them.

This is the only file that touches private torch names for capturing. Seen to work on torch 2.13.0.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from vdcache.ir.edit import outputs
from vdcache.ir.errors import CaptureError

__all__ = ["Captured", "Signature", "capture", "exported", "signature", "trace"]


@dataclass(frozen=True)
class Signature:
    """How a captured graph talks to its caller.

    Args:
        mutations: (output position, input position) pairs: the first outputs of the graph are new values of inputs that
            the model writes into; whoever runs the graph copies them back.
        results: how many outputs follow them: what the model returns.
        static: positions of the inputs that are parameters or buffers.
    """

    mutations: tuple[tuple[int, int], ...] = ()
    results: int = 1
    static: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Captured:
    """A functional ATen graph and its signature (also in `graph.meta["vdcache"]`)."""

    graph: fx.GraphModule
    signature: Signature


def signature(graph: fx.GraphModule) -> Signature:
    """The signature that capturing left on a graph; a plain graph returns what it returns and mutates nothing."""
    found = graph.meta.get("vdcache")
    if isinstance(found, Signature):
        return found
    outputs = graph.graph.output_node().args[0]
    return Signature(results=len(outputs) if isinstance(outputs, (tuple, list)) else 1)


@functools.cache
def _composites() -> dict[Any, Callable[..., Any]]:
    """Operations that dispatch would decompose, each with the answer "leave me whole"."""
    from torch._export.utils import _collect_all_valid_cia_ops

    return {op: lambda *args, **kwargs: NotImplemented for op in _collect_all_valid_cia_ops()}


@contextlib.contextmanager
def _whole_composites() -> Iterator[None]:
    from torch.export.exported_program import _override_composite_implicit_decomp

    with _override_composite_implicit_decomp(_composites()):
        yield


def capture(graph: nn.Module, example_inputs: Sequence[Any]) -> Captured:
    """Bring a Dynamo graph into functional ATen.

    Args:
        graph: what Dynamo traced; parameters and buffers are among its inputs.
        example_inputs: tensors, SymInts and the like, as Dynamo hands them to a backend.

    Raises:
        CaptureError: the graph holds something that AOTAutograd's functionalisation does not take.
    """
    from torch._functorch.aot_autograd import aot_export_module

    owned = dict(graph.named_parameters(remove_duplicate=False)) | dict(graph.named_buffers(remove_duplicate=False))
    try:
        with torch.no_grad(), _whole_composites():
            traced, sig = aot_export_module(graph, example_inputs, trace_joint=False, pre_dispatch=False, decompositions={})
    except Exception as error:
        if "Restart" in type(error).__name__ or "SkipFrame" in type(error).__name__:
            raise  # Dynamo's control flow
        raise CaptureError(
            f"the graph cannot be made functional: {type(error).__name__}: {_first_line(error)}. "
            "vdcache reads graphs through AOTAutograd; check that torch.compile(backend='aot_eager') takes this model."
        ) from error

    assert isinstance(traced, fx.GraphModule)  # what aot_export_module makes of a module
    flat = traced
    _own_again(flat, list(owned.items()))
    inputs = flat.graph.find_nodes(op="placeholder")
    position = {node.name: i for i, node in enumerate(inputs)}
    if sig.buffers_to_mutate or sig.parameters_to_mutate:
        raise CaptureError("the graph writes into a tensor that it owns; only inputs can be written back")
    mutations = tuple((i, position[name]) for i, name in enumerate(sig.user_inputs_to_mutate.values()))
    static = frozenset(i for i, value in enumerate(example_inputs) if _is_static(value))
    results = len(outputs(flat.graph)) - len(mutations)
    return _captured(flat, Signature(mutations, results, static))


def trace(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> Captured:
    """Bring a function of tensors, or a module, into functional ATen without Dynamo.

    Args:
        fn: called once with fake tensors; nothing is computed. A module's parameters and buffers become the first inputs.
        args: positional arguments, tensors in any nesting.
        dynamic: sizes of the tensors become symbols.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    flat_args, spec = pytree.tree_flatten(args)
    state: Mapping[str, torch.Tensor] = {}
    if isinstance(fn, nn.Module):
        state = {**dict(fn.named_parameters()), **dict(fn.named_buffers())}
    names = list(state)

    class Flat(nn.Module):
        def forward(self, *inputs: Any) -> list[Any]:
            own, given = inputs[: len(names)], pytree.tree_unflatten(list(inputs[len(names) :]), spec)
            if isinstance(fn, nn.Module):
                result = torch.func.functional_call(fn, dict(zip(names, own, strict=True)), given)
            else:
                result = fn(*given)
            return pytree.tree_leaves(result)

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes: dict[str, Any] = {} if dynamic else {"static_shapes": True}
    values = [*state.values(), *flat_args]
    fakes = [mode.from_tensor(v, **sizes) if isinstance(v, torch.Tensor) else v for v in values]
    captured = capture(Flat(), fakes)
    sig = captured.signature
    return _captured(captured.graph, Signature(sig.mutations, sig.results, frozenset(range(len(names)))))


def exported(model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Captured:
    """Bring a whole model into functional ATen through torch.export: one graph, or an error that says where it breaks.

    Parameters and buffers come first among the inputs, then the tensors among `args` and `kwargs`.
    """
    from torch.export.graph_signature import InputKind, OutputKind

    try:
        with torch.no_grad():
            program = torch.export.export(model, args, kwargs or {}, strict=False).run_decompositions({})
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be exported as one graph: {type(error).__name__}: {_first_line(error)}"
        ) from error
    graph, sig = program.graph_module, program.graph_signature
    index = {spec.arg.name: i for i, spec in enumerate(sig.input_specs)}
    by_target = {spec.target: i for i, spec in enumerate(sig.input_specs) if spec.target is not None}
    static = frozenset(i for i, spec in enumerate(sig.input_specs) if spec.kind is not InputKind.USER_INPUT)
    mutations = []
    for i, spec in enumerate(sig.output_specs):
        if spec.kind is OutputKind.BUFFER_MUTATION:
            mutations.append((i, by_target[spec.target]))
        elif spec.kind is OutputKind.USER_INPUT_MUTATION:
            mutations.append((i, index[spec.target]))  # type: ignore[index]
    return _captured(graph, Signature(tuple(mutations), len(sig.output_specs) - len(mutations), static))


def _captured(graph: fx.GraphModule, sig: Signature) -> Captured:
    graph.meta["vdcache"] = sig
    return Captured(graph, sig)


def _own_again(graph: fx.GraphModule, owned: list[tuple[str, torch.Tensor]]) -> None:
    """Turn the leading inputs, which AOTAutograd made of the module's own tensors, back into constants."""
    if not owned:
        return
    inputs = graph.graph.find_nodes(op="placeholder")
    for i, (node, (_, tensor)) in enumerate(zip(inputs, owned, strict=False)):
        name = f"_vdcache_constant_{i}"
        graph.register_buffer(name, tensor.detach(), persistent=False)
        with graph.graph.inserting_before(node):
            constant = graph.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        graph.graph.erase_node(node)
    graph.recompile()


def _is_static(value: Any) -> bool:
    """Whether Dynamo passes this input as a parameter or buffer of the module (it marks buffers with an attribute)."""
    return isinstance(value, nn.Parameter) or getattr(value, "_dynamo_static_input_type", None) is not None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else ""
