"""Inductor as the inner compiler, at once and later. Every private torch name of the backend is in this file.

Seen to work on torch 2.11.0, 2.12.1 and 2.13.0.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from vdcache.ir.capture import first_line
from vdcache.ir.edit import inputs as graph_inputs

__all__ = [
    "CUDA_GRAPHS",
    "Context",
    "asks_for_cuda_graphs",
    "compile_now",
    "compile_own",
    "frame_of_backend_call",
    "no_autocast",
    "on_one_device",
    "out_of_pool",
    "package_ahead",
]

CUDA_GRAPHS = "triton.cudagraphs"  # Inductor's option

Compiled = Callable[..., Sequence[Any]]

_AS_IT_IS = contextlib.nullcontext()


def compile_now(graph: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> Compiled:
    """Compile with Inductor; `inputs` are real or fake tensors, numbers, symbols.

    Args:
        options: Inductor's own settings, in force for this graph alone.
    """
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, list(inputs), config_patches=dict(options) or None)  # type: ignore[no-any-return,return-value,arg-type]


def compile_own(graph: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any], static: Collection[int]) -> Compiled:
    """Compile a graph that vdcache has made; the graph is used up.

    What it does not read is neither compiled nor handed over: where the blocks are reused, that is nearly every weight.

    Args:
        inputs, options: as for `compile_now`.
        static: positions of inputs that stay where they are from call to call, as weights do. Nobody else tells Inductor: Dynamo marks
            weights in its own graphs alone. Else every call would look at the address of each, and a CUDA graph would copy it.
    """
    read = [i for i, node in enumerate(graph_inputs(graph.graph)) if node.users or _tells_sizes(node)]
    for i, node in enumerate(graph_inputs(graph.graph)):
        if i not in read:
            graph.graph.erase_node(node)
    graph.recompile()
    _mark_static(graph, [i in static for i in read])
    run = compile_now(graph, [inputs[i] for i in read], options)
    if len(read) == len(inputs):
        return run
    return lambda *values: run(*[values[i] for i in read])


def _mark_static(graph: fx.GraphModule, fixed: Sequence[bool]) -> None:
    """Mark inputs as Dynamo does in its own graphs, which is where AOTAutograd looks, and what its cache asks for too."""
    if any(True for _ in graph.parameters()) or any(True for _ in graph.buffers()):
        return  # those would need a source in the user's program
    graph.meta.setdefault("dynamo_compile_id", None)
    graph._param_name_to_source = {}  # type: ignore[assignment]
    for node, is_fixed in zip(graph_inputs(graph.graph), fixed, strict=True):
        node._dynamo_source = None  # type: ignore[attr-defined]
        if is_fixed:
            node.meta["tensor_dict"] = {**node.meta.get("tensor_dict", {}), "_dynamo_static_input_type": "unguarded"}


def _tells_sizes(node: fx.Node) -> bool:
    """Whether an input is a size, or one is read off it."""
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or any(isinstance(d, torch.SymInt) for d in value.shape)


def on_one_device(inputs: Sequence[Any]) -> list[Any]:
    """Inputs of a graph with the numbers that the host tells it on the device of the others: CUDA graphs take none of the host's."""
    device = next((x.device for x in inputs if isinstance(x, torch.Tensor) and x.device.type != "cpu"), None)
    if device is None:
        return list(inputs)
    return [
        x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) and x.ndim == 0 and x.device.type == "cpu" else x
        for x in inputs
    ]


def out_of_pool(run: Compiled) -> Compiled:
    """A graph that CUDA graphs replay, whose results stay what they are: every replay of any graph writes over what it returned before.

    What a call returns outlives it here: cached values until they are computed again, a lane's result until guidance has combined it
    with the other's, and results that solvers of several steps keep. So all of them are copied, and every call may reuse the pool.
    """

    def replay(*inputs: Any) -> Sequence[Any]:
        torch.compiler.cudagraph_mark_step_begin()
        return [x.clone() if isinstance(x, torch.Tensor) else x for x in run(*on_one_device(inputs))]

    return replay


def asks_for_cuda_graphs(options: Mapping[str, Any]) -> bool:
    """Whether Inductor would record CUDA graphs: by these options, or by its settings for the process."""
    return bool(options.get(CUDA_GRAPHS, torch._inductor.config.triton.cudagraphs))


def package_ahead(program: Any, path: Path) -> None:
    """Compile an exported program ahead of time into one file that `torch._inductor.aoti_load_package` takes.

    Sources and symbols are left out: they are most of the file, and nothing reads them. The sources' names stay, for torch 2.11 finds the
    library by them.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        torch._inductor.aoti_compile_and_package(program, package_path=str(made))
        with zipfile.ZipFile(made) as whole, zipfile.ZipFile(path, "w") as slim:
            for entry in whole.infolist():
                data = whole.read(entry)
                if entry.filename.endswith(".cpp"):
                    data = b""
                elif entry.filename.endswith(".so"):
                    data = _stripped(data, Path(folder))
                slim.writestr(entry.filename, data)


def _stripped(library: bytes, folder: Path) -> bytes:
    """A library without its symbols, where there is `strip`, which comes with a compiler."""
    if (strip := shutil.which("strip")) is None:
        return library
    file = folder / "library.so"
    file.write_bytes(library)
    done = subprocess.run([strip, str(file)], capture_output=True)
    return file.read_bytes() if done.returncode == 0 else library


def no_autocast() -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off for one run or compilation of a captured graph, whose casts are nodes of its own.

    Nothing where no autocast is on. A region that the model itself had excluded from autocast would else be cast after all.
    """
    if torch._C._is_any_autocast_enabled():
        return torch._C._DisableAutocast()  # type: ignore[no-any-return]
    return _AS_IT_IS


class Context:
    """What Dynamo knew when it called the backend, for compiling more of the same graph after it has returned.

    Symbols of dynamic shapes mean something only under the tracing context that made them.
    """

    def __init__(self) -> None:
        from torch._guards import TracingContext

        self._tracing = TracingContext.try_get()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Compile inside as if Dynamo were still calling."""
        from torch._guards import tracing

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            if self._tracing is not None:
                stack.enter_context(tracing(self._tracing))
            yield

    def guards(self) -> int:
        """How many shape guards there are: one more after compiling later is one that nobody checks."""
        env = getattr(getattr(self._tracing, "fake_mode", None), "shape_env", None)
        return len(env.guards) if env is not None else 0


def graph_breaks() -> dict[str, int]:
    """Why Dynamo has broken forwards in this process or left them uncompiled, and how often each."""
    from torch._dynamo.utils import counters

    return {**counters["graph_break"], **counters["unimplemented"]}


def modes_in_force() -> str:
    """Modes around a call under which Dynamo does not compile it as one graph, as a message names them; "" where there are none."""
    from torch.overrides import _get_current_function_mode
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    if (mode := _get_current_dispatch_mode()) is not None:
        return f"the dispatch mode {type(mode).__name__}"
    if (over := _get_current_function_mode()) is not None:
        hint = " (torch.set_default_device)" if type(over).__name__ == "DeviceContext" else ""
        return f"the mode {type(over).__name__}{hint}"
    return ""


def frame_of_backend_call() -> tuple[object, str, str | None]:
    """The user's frame that Dynamo compiles now: an identity shared by its recompilations, its code's name, and where Dynamo split
    it (so that this graph is one of several) why, with the line; "" where it is called by a function that Dynamo broke or skipped."""
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    family: object = getattr(compile_id, "frame_id", None)
    name: str = ""
    split: str | None = None
    root: Any = None
    frame: Any = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        root = getattr(owner, "root_tx", None)
        if root is not None and hasattr(root, "f_code"):
            name = root.f_code.co_name
            reason = getattr(owner, "compile_subgraph_reason", None)
            if reason is not None and getattr(reason, "graph_break", False):
                stack = list(getattr(reason, "user_stack", None) or ())
                split = first_line(str(reason.reason)) + (f" (at {stack[-1].filename}:{stack[-1].lineno})" if stack else "")
            break
        frame = frame.f_back
    if split is None and root is not None and _is_nested(frame, root.f_code):
        split = ""
    return (family if family is not None else object()), name, split


def _is_nested(frame: Any, code: Any) -> bool:
    """Whether a function that Dynamo compiles is called by another one below the compiled model, which Dynamo has broken or skipped."""
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if name == "compile_wrapper" and "_dynamo" in file:  # torch 2.11 to 2.13: what torch.compile puts around a model
            return False
        generated = any(n.startswith(("__compiled_fn", "__resume_at")) for n in frame.f_code.co_names)
        own = file.startswith((torch.__path__[0], "<")) or str(frame.f_globals.get("__name__")).partition(".")[0] == "vdcache"
        if frame.f_code is not code and (generated or not own):
            return True
        frame = frame.f_back
    return False
