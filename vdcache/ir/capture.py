"""Into vdcache's one graph form: functional ATen that keeps composite operations.

Three doors lead to the same form, `Captured`:

- `capture`: what Dynamo hands to a backend (a graph of torch calls and its inputs);
- `trace`: any Python function or module, by make_fx;
- `vdcache.ir.exported.whole`: a whole model and its weights, by torch.export.

Composite operations (`linear`, `scaled_dot_product_attention`, `layer_norm` …) stay whole, because patterns read them and
the eager inner compiler is then bit-identical to the model. Dispatch runs below autograd and autocast, so the casts
of an autocast region are in the graph as casts; tracing before dispatch was seen to lose them.

With `vdcache.ir.composites` this is the only file that touches private torch names for capturing. Seen to work on torch 2.11.0, 2.12.1
and 2.13.0.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from vdcache.errors import CaptureError
from vdcache.ir.capture_cache import CaptureCache, NotKept, key_of, made, written
from vdcache.ir.composites import whole_composites
from vdcache.ir.edit import backward_slice, copy_graph, outputs, set_outputs
from vdcache.ir.ops import CASTS, is_work, tensor_of, unviewed
from vdcache.ir.regions import call_regions, inline_regions, repeated_modules
from vdcache.ir.stand_ins import stored
from vdcache.ir.subclasses import TensorSubclasses

__all__ = [
    "Captured",
    "CapturedForward",
    "CapturedPart",
    "Signature",
    "capture",
    "captures_folder",
    "faked",
    "first_line",
    "is_control_flow",
    "parts",
    "readable",
    "signature",
    "trace",
]


@dataclass(frozen=True)
class Signature:
    """How a captured graph talks to its caller.

    Args:
        mutations: (output position, input position) pairs: the first outputs of the graph are new values of inputs that
            the model writes into; whoever runs the graph copies them back.
        results: how many outputs follow them: what the model returns.
        static: positions of the inputs that are parameters or buffers.
        names: what the user calls the inputs, where the door knows it; for messages only.
    """

    mutations: tuple[tuple[int, int], ...] = ()
    results: int = 1
    static: frozenset[int] = frozenset()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Captured:
    """A functional ATen graph and its signature (also in `graph.meta["vdcache"]`).

    Args:
        wrapped: how the user's inputs become the graph's.
    """

    graph: fx.GraphModule
    signature: Signature
    wrapped: TensorSubclasses = field(default_factory=lambda: TensorSubclasses(()))


def signature(graph: fx.GraphModule) -> Signature:
    """The signature that capturing left on a graph; a plain graph returns what it returns and mutates nothing."""
    found = graph.meta.get("vdcache")
    if isinstance(found, Signature):
        return found
    outputs = graph.graph.output_node().args[0]
    return Signature(results=len(outputs) if isinstance(outputs, (tuple, list)) else 1)


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
    wrapped = TensorSubclasses(example_inputs)
    kept = None if wrapped else _Kept.of(graph, example_inputs)
    if kept is not None and (known := kept.read(list(owned.values()))) is not None:
        flat, mutations = known
        return _described(flat, mutations, graph, wrapped, example_inputs)
    around, flat_inputs = wrapped.around(graph, example_inputs), wrapped.flat(faked(example_inputs))
    if isinstance(around, fx.GraphModule):
        around = _with_repeated_once(around)
    try:
        with torch.no_grad(), whole_composites():
            traced, sig = aot_export_module(around, flat_inputs, trace_joint=False, pre_dispatch=False, decompositions={})
    except Exception as error:
        if is_control_flow(error):
            raise
        raise CaptureError(
            f"the graph cannot be made functional: {type(error).__name__}: {first_line(error)}. "
            "vdcache reads graphs through AOTAutograd; check that torch.compile(backend='aot_eager') takes this model."
        ) from error

    assert isinstance(traced, fx.GraphModule)  # what aot_export_module makes of a module
    flat = traced
    inline_regions(flat)
    if wrapped:
        _bring_late(flat)
    _own_again(flat, list(owned.items()))
    inputs = flat.graph.find_nodes(op="placeholder")
    position = {node.name: i for i, node in enumerate(inputs)}
    if sig.buffers_to_mutate or sig.parameters_to_mutate:
        raise CaptureError("the graph writes into a tensor that it owns; only inputs can be written back")
    mutations = tuple((i, position[name]) for i, name in enumerate(sig.user_inputs_to_mutate.values()))
    if kept is not None:
        kept.write(flat, mutations)
    return _described(flat, mutations, graph, wrapped, example_inputs)


def _described(
    flat: fx.GraphModule,
    mutations: tuple[tuple[int, int], ...],
    graph: nn.Module,
    wrapped: TensorSubclasses,
    example_inputs: Sequence[Any],
) -> Captured:
    """A functional graph with its signature, which says more than the graph does."""
    static = frozenset(
        i for i, fixed in enumerate(wrapped.spread([_is_static(v) for v in example_inputs], example_inputs)) if fixed
    )
    results = len(outputs(flat.graph)) - len(mutations)
    names = _input_names(graph)
    sig_ = Signature(mutations, results, static, tuple(wrapped.spread(names, example_inputs)) if wrapped else names)
    return replace(_captured(flat, sig_), wrapped=wrapped)


@dataclass(frozen=True)
class _Kept:
    """A place on the disk for what capturing makes of one graph of Dynamo's."""

    cache: CaptureCache
    key: str
    mode: Any  # of the fake values

    @classmethod
    def of(cls, graph: nn.Module, inputs: Sequence[Any]) -> _Kept | None:
        """None for a graph that has none: outside a backend call, where torch keeps nothing either, or where no key tells it apart."""
        from torch._guards import TracingContext

        mode = getattr(TracingContext.try_get(), "fake_mode", None)
        if mode is None or not isinstance(graph, fx.GraphModule) or not (folder := captures_folder()):
            return None
        try:
            return cls(CaptureCache(folder), key_of(graph, inputs, _settings(inputs)), mode)
        except NotKept:
            return None

    def read(self, owned: Sequence[torch.Tensor]) -> tuple[fx.GraphModule, tuple[tuple[int, int], ...]] | None:
        if (found := self.cache.get(self.key)) is None:
            return None
        content, mutations = found
        return made(content, self.mode, owned), mutations

    def write(self, graph: fx.GraphModule, mutations: tuple[tuple[int, int], ...]) -> None:
        with contextlib.suppress(NotKept):
            self.cache.put(self.key, (written(graph), mutations))


def captures_folder() -> Path | None:
    """Where captured graphs are kept: beside what Inductor keeps. None where torch is told to keep nothing."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if config.force_disable_caches or not config.fx_graph_cache:
        return None
    return Path(cache_dir()) / "vdcache" / "captures"


def _settings(inputs: Sequence[Any]) -> list[Any]:
    """What of torch's state capturing depends on, beside the graph."""
    devices = {x.device.type for x in inputs if isinstance(x, torch.Tensor)}
    modes = [
        (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d))
        for d in sorted(devices)
        if torch.amp.is_autocast_available(d)
    ]
    return [
        torch._functorch.config.get_hash(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
        torch.cuda.get_device_name() if "cuda" in devices else "",
        modes,
    ]


_numbers = itertools.count()


def is_control_flow(error: BaseException) -> bool:
    """Whether an exception is how Dynamo starts over, and no failure."""
    return "Restart" in type(error).__name__ or "SkipFrame" in type(error).__name__


def _with_repeated_once(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with modules that repeat as calls of one graph, so that they are traced once; a copy, where there are such."""
    outlined = copy_graph(graph)
    if not (regions := repeated_modules(outlined)):
        return graph
    call_regions(outlined, regions, f"traced_{next(_numbers)}")
    return outlined


def faked(inputs: Sequence[Any]) -> list[Any]:
    """Inputs inside a backend call, with fakes in the place of stored weights: a compiler would take the sizes of a tensor that Dynamo has
    not seen for symbols, and no guard can read those."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is None or (mode := context.fake_mode) is None:
        return list(inputs)
    weights = map(stored, inputs)
    return [x if w is None else mode.from_tensor(w, static_shapes=True) for x, w in zip(inputs, weights, strict=True)]


def _bring_late(graph: fx.GraphModule) -> None:
    """Cast and move inputs right before their first use, in place, so that no more of them than needed is there at a time."""
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    for node in reversed(list(order)):
        if node.target in CASTS and node.users and unviewed(node).op == "placeholder":
            first = min(node.users, key=order.__getitem__)
            first.prepend(node)
            order[node] = order[first]
    graph.recompile()


def _input_names(graph: nn.Module) -> tuple[str, ...]:
    """What the user calls the inputs of a Dynamo graph: `hidden_states`, `blocks.0.attn.to_q.weight`."""
    if not isinstance(graph, fx.GraphModule):
        return ()
    names = []
    for node in graph.graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        name = getattr(source, "name", None)
        text = name() if callable(name) else name
        names.append(readable(text) if isinstance(text, str) else node.name)
    return tuple(names)


def readable(path: str) -> str:
    """A path as Dynamo writes it, as the user would: `L['self']._modules['blocks']._modules['0']` is `blocks.0`."""
    path = path.replace(".forward.__self__", "")  # of an instance whose own `forward` was put in its place
    path = re.sub(r"\.?__dict__\[['\"]_modules['\"]\]|\._(modules|parameters|buffers)", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path).lstrip(".")
    path = re.sub(r"^[LG]\.(self\.|kwargs\.|args\.kwargs\.)*", "", path)
    return re.sub(r"^args\.(\d+)", r"args[\1]", path) or path


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


@dataclass(frozen=True)
class CapturedPart:
    """One graph of a forward that Dynamo may have broken into several.

    Args:
        captured: None where the graph could not be brought into vdcache's form; `problem` then says why.
        line: the user's source line that it begins with.
        ends: why it ends where it does, "" at the end of the function.
        ends_at: the source line of that.
    """

    captured: Captured | None
    problem: str = ""
    line: str = ""
    ends: str = ""
    ends_at: str = ""


@dataclass
class CapturedForward:
    """Every graph of one forward, in the order in which they ran, and the reasons of all breaks that Dynamo counted."""

    found: list[CapturedPart] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)


# Of the thread that asks: another may ask for another model's at the same time.
_collecting: ContextVar[CapturedForward | None] = ContextVar("vdcache_collecting", default=None)
_counting = threading.RLock()  # Dynamo counts graph breaks for the process, and its limits are the process's


def parts(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> CapturedForward:
    """Every graph that Dynamo makes of `fn(*args, **kwargs)`. No graph is computed: its outputs are zeros.

    Tensors may be on the meta device. Code between two graphs runs as Python, and may look at whole numbers and masks: those are
    right where the tensors are real and no layer stands before them.

    Raises:
        CaptureError: the function raised, or Dynamo cannot trace it; the message names the user's source line.
    """
    fn = getattr(fn, "_orig_mod", fn)  # of a compiled module
    with _counting:
        return _parts_of(fn, args, kwargs)


def _parts_of(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> CapturedForward:
    from torch._dynamo.utils import counters

    parts = CapturedForward()
    before = dict(counters["graph_break"])
    token = _collecting.set(parts)
    try:
        # One backend for all calls, so that what was traced once is known. The limits are of no use here: past them the model
        # would run.
        limits = {k: 10_000 for k in ("recompile_limit", "accumulated_recompile_limit") if hasattr(torch._dynamo.config, k)}
        with torch.no_grad(), torch._dynamo.config.patch(limits):
            torch.compile(fn, backend=_collect, dynamic=False)(*args, **kwargs)
    except Exception as error:
        name = type(fn).__name__ if isinstance(fn, nn.Module) else getattr(fn, "__name__", str(fn))
        place = _users_line(error)
        raise CaptureError(
            f"{name} cannot be traced{f', at {place}' if place else ''}: {type(error).__name__}: {first_line(error)}. "
            "Check that the same call works without vdcache."
            + (
                " A model that looks into its tensors cannot run on the meta device: give it real ones."
                if _on_meta(args, kwargs)
                else ""
            )
        ) from error
    finally:
        _collecting.reset(token)
    parts.breaks = [reason for reason, n in counters["graph_break"].items() if n > before.get(reason, 0)]
    return parts


def _on_meta(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.is_meta for x in pytree.tree_leaves((tuple(args), dict(kwargs))))


def _collect(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """The backend of `parts`: what it returns says that it was called, and gives zeros."""
    reason = getattr(graph, "compile_subgraph_reason", None)
    broken = bool(getattr(reason, "graph_break", False))
    stacks = [n.meta["stack_trace"] for n in graph.graph.nodes if isinstance(n.meta.get("stack_trace"), str)]
    stack = list(getattr(reason, "user_stack", None) or ())
    values = [n.meta.get("example_value") if isinstance(n, fx.Node) else n for n in outputs(graph.graph)]
    try:
        captured, problem = capture(graph, example_inputs), ""
    except CaptureError as error:
        captured, problem = None, str(error)
    part = CapturedPart(
        captured=captured,
        problem=problem,
        line=last_line(stacks[0]) if stacks else "",
        ends=first_line(reason.reason) if broken and reason is not None else "",
        ends_at=f"{stack[-1].filename}:{stack[-1].lineno}" if broken and stack else "",
    )

    exact = _exact_results(captured) if captured is not None else None

    def stand_in(*inputs: Any) -> list[Any]:
        if (parts := _collecting.get()) is not None:
            parts.found.append(part)
        known = exact(inputs) if exact is not None else {}
        return [known[i] if i in known else _zeros(v) for i, v in enumerate(values)]

    return stand_in


def _exact_results(captured: Captured) -> Callable[[Sequence[Any]], dict[int, torch.Tensor]] | None:
    """Computes the results that Python may look at between two graphs: whole numbers and masks that no layer is needed for."""
    sig = captured.signature
    results = outputs(captured.graph.graph)[len(sig.mutations) :]
    wanted = {
        i: node
        for i, node in enumerate(results)
        if (x := tensor_of(node)) is not None and not x.is_floating_point() and not any(map(is_work, backward_slice([node])))
    }
    if not wanted:
        return None
    reduced = copy_graph(captured.graph)
    names = {n.name: n for n in reduced.graph.nodes}
    set_outputs(reduced.graph, [names[node.name] for node in wanted.values()])
    reduced.graph.eliminate_dead_code()

    def run(inputs: Sequence[Any]) -> dict[int, torch.Tensor]:
        if any(isinstance(x, torch.Tensor) and x.is_meta for x in inputs):
            return {}
        with torch.no_grad():
            return dict(zip(wanted, fx.Interpreter(reduced).run(*inputs), strict=True))

    return run


def _zeros(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros([int(s) for s in value.shape], dtype=value.dtype, device=value.device)


def last_line(stack: str) -> str:
    """`file:line` of the innermost frame of a printed stack, "" of none."""
    places = re.findall(r'File "([^"]+)", line (\d+)', stack)
    return f"{places[-1][0]}:{places[-1][1]}" if places else ""


def _users_line(error: BaseException) -> str:
    """`file:line` of the innermost frame of an error that is neither torch's nor vdcache's."""
    real: BaseException = error
    while real.__cause__ is not None:
        real = real.__cause__
    own = (torch.__path__[0], __file__.rpartition("/ir/")[0])
    for frames in (getattr(real, "real_stack", None) or (), traceback.extract_tb(real.__traceback__)):
        for frame in reversed(list(frames)):
            if not frame.filename.startswith(own) and not frame.filename.startswith("<"):
                return f"{frame.filename}:{frame.lineno}"
    return ""


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


def first_line(error: BaseException | str) -> str:
    """What an error says first, and the explanation that Dynamo gives further down."""
    lines = str(error).strip().splitlines()
    explained = next((line.strip() for line in lines if line.strip().startswith("Explanation:")), "")
    return ": ".join(part for part in (lines[0] if lines else "", explained.removeprefix("Explanation:").strip()) if part)
