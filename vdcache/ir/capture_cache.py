"""Captured graphs on the disk: a process that starts again with the same model need not trace it again.

Dynamo's graph is the key, with everything else that decides what is captured: the forms of its values, torch's settings, and the code that
captures. What is kept is data, from which nodes and fake values are made anew: operations of torch by their names, and no code. Only what
can be told apart for certain is kept: graphs of static sizes, of torch's own operations, without graphs inside.
"""

from __future__ import annotations

import functools
import hashlib
import io
import operator
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from vdcache.ir.edit import empty_graph_module
from vdcache.ir.fakes import factory
from vdcache.util.files import write_aside

__all__ = ["CaptureCache", "NotKept", "key_of", "made", "written"]

OWN_CONSTANT = "_vdcache_constant_"  # what capturing calls the tensors that a Dynamo graph owns
_NAMESPACES = ("aten", "prims")
_PYTHON = ("_operator", "math", "builtins")
LARGEST = 4096  # elements of a constant that the model makes itself
_META = ("stack_trace", "original_aten")


class NotKept(Exception):
    """A graph that is captured anew every time; the message says why."""


class CaptureCache:
    """A folder of captured graphs.

    Args:
        folder: where they are; made when the first is written.
    """

    used: dict[str, bytes] = {}  # noqa: RUF012 - what this process has read or written, by key

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Any:
        """What is kept under a key; None for nothing, or for what cannot be read."""
        try:
            whole = self._path(key).read_bytes()
            digest, data = whole[: _DIGEST.digest_size], whole[_DIGEST.digest_size :]
            if digest != _digest(key, data):
                return None
            found = _Reader(io.BytesIO(data)).load()
        except Exception:  # noqa: BLE001 - a file that somebody has cut or changed is as good as none
            return None
        self.used[key] = data
        return found

    def put(self, key: str, content: Any) -> None:
        """Keep what `written` made. Nothing happens where the folder cannot be written to."""
        data = io.BytesIO()
        _Writer(data, protocol=5).dump(content)
        self.used[key] = data.getvalue()
        self.put_bytes(key, data.getvalue())

    def put_bytes(self, key: str, data: bytes) -> None:
        try:
            write_aside(self._path(key), _digest(key, data) + data)
        except OSError:
            return

    def _path(self, key: str) -> Path:
        if not key.isalnum():
            raise ValueError(f"{key!r} is not a key")  # of a file from elsewhere, which would leave the folder
        return self.folder / key[:2] / key


_DIGEST = hashlib.blake2b(digest_size=20)


def _digest(key: str, data: bytes) -> bytes:
    """What stands before the data in a file: another one where either was changed."""
    digest = _DIGEST.copy()
    digest.update(key.encode())
    digest.update(data)
    return digest.digest()


# ---- the key ---------------------------------------------------------------------------------------------------------


def key_of(graph: fx.GraphModule, inputs: Sequence[Any], settings: Sequence[Any]) -> str:
    """What two graphs of Dynamo's have in common if capturing makes the same of them.

    Args:
        inputs: fake values.
        settings: what else capturing depends on.

    Raises:
        NotKept: the graph holds something that cannot be told apart for certain.
    """
    digest = hashlib.blake2b(digest_size=20)

    def add(*values: Any) -> None:
        digest.update(repr(values).encode())

    add(_code(), tuple(settings), [_form(x) for x in inputs])
    storages = [x.untyped_storage()._cdata for x in inputs if isinstance(x, torch.Tensor)]
    if len(set(storages)) < len(storages):
        raise NotKept("two inputs share memory")
    number: dict[fx.Node, int] = {}
    for i, node in enumerate(graph.graph.nodes):
        number[node] = i
        args: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: _Number(number[n]))  # type: ignore[arg-type,return-value]
        for leaf in pytree.tree_leaves(args):
            _check_plain(leaf)
        owned = _form(getattr(graph, str(node.target), None)) if node.op == "get_attr" else ""
        value = node.meta.get("example_value")
        add(node.op, _called(node), args, owned, [_form(x) for x in pytree.tree_leaves(value)], _place(node))
    return digest.hexdigest()


@functools.cache
def _code() -> str:
    """A digest of torch, Python and the code that captures, which is in this folder."""
    digest = hashlib.blake2b(f"{torch.__version__} {sys.version}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _Number:
    """A node in the arguments of another."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __repr__(self) -> str:
        return f"%{self._number}"


def _check_plain(value: Any) -> None:
    kinds = (int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format, _Number)
    if value is not None and value is not Ellipsis and not isinstance(value, kinds):
        if not isinstance(value, slice):
            raise NotKept(f"an argument is a {type(value).__name__}")
        for part in (value.start, value.stop, value.step):
            _check_plain(part)


def _called(node: fx.Node) -> str:
    """What a node of Dynamo's calls, by a name that is no other's."""
    target: Any = node.target
    if isinstance(target, str):
        if node.op == "call_module":
            raise NotKept("it calls a module")
        return target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        if str(target).partition(".")[0] not in _NAMESPACES:
            raise NotKept(f"{target} is not torch's own")
        return str(target)
    module, name = str(getattr(target, "__module__", "")), str(getattr(target, "__qualname__", ""))
    ours = module in _PYTHON or module.partition(".")[0] == "torch"
    if not ours or not name or "<" in name or isinstance(target, torch._ops.HigherOrderOperator):
        raise NotKept(f"{target} is not torch's own")
    return f"{module}:{name}"


def _form(value: Any) -> Any:
    """All that capturing sees of a value without data."""
    if not isinstance(value, torch.Tensor):
        if value is not None and not isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
            raise NotKept(f"a value is a {type(value).__name__}")
        return type(value).__name__, value
    if value.layout is not torch.strided or value.is_conj() or value.is_neg() or value.is_quantized:
        raise NotKept("a tensor is not a plain one")
    size, stride, offset = tuple(value.shape), tuple(value.stride()), value.storage_offset()
    if any(type(n) is not int for n in (*size, *stride, offset)):
        raise NotKept("a size is not a number")
    parameter = isinstance(value, torch.nn.Parameter)
    return size, stride, offset, value.dtype, str(value.device), value.requires_grad, value.is_inference(), parameter


def _place(node: fx.Node) -> tuple[Any, ...]:
    """Where a node stands in the user's code."""
    stack = node.meta.get("nn_module_stack") or {}
    return node.meta.get("stack_trace"), [(str(path), _name(kind)) for path, kind in stack.values()]


def _name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


# ---- a graph as data -------------------------------------------------------------------------------------------------


def written(graph: fx.GraphModule) -> Any:
    """A captured graph as data.

    Raises:
        NotKept: it holds something that cannot be made anew.
    """
    number = {node: i for i, node in enumerate(graph.graph.nodes)}
    rows, constants = [], {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and not str(node.target).startswith(OWN_CONSTANT):
            constants[str(node.target)] = _data(getattr(graph, str(node.target), None))
        target = node.target if isinstance(node.target, str) else _operation(node.target)
        args, kwargs = _plain((node.args, node.kwargs), number)
        meta = {k: node.meta[k] for k in _META if k in node.meta}
        if "original_aten" in meta:
            meta["original_aten"] = _operation(meta["original_aten"])
        _, stack = _place(node)
        value = pytree.tree_map(_kept_form, node.meta["val"]) if "val" in node.meta else _NOTHING
        rows.append((node.op, node.name, target, args, kwargs, value, meta, stack))
    return rows, constants


def _data(value: Any) -> tuple[Any, ...]:
    """A small constant as data."""
    if type(value) is not torch.Tensor or not value.is_cpu or not 0 < value.numel() <= LARGEST or not value.is_contiguous():
        raise NotKept("it holds a constant that is large or not a plain tensor")
    return value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()


def made(content: Any, mode: Any, owned: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The graph that `written` made data of.

    Args:
        mode: the fake tensor mode of its values.
        owned: the tensors that Dynamo's graph owns.
    """
    rows, constants = content
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    result = empty_graph_module(graph)
    for name, (dtype, shape, data) in constants.items():
        setattr(result, name, torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape))

    def node_of(reference: Any) -> Any:
        return nodes[reference.number] if isinstance(reference, _Reference) else reference

    new = factory(mode)

    def value_of(form: Any) -> Any:
        return new(*form.parts) if isinstance(form, _Form) else form

    with torch.no_grad():
        for op, name, target, args, kwargs, value, meta, stack in rows:
            args, kwargs = fx.node.map_aggregate((args, kwargs), node_of)
            called = target if op in ("placeholder", "output", "get_attr") else _found(target)
            node = graph.create_node(op, called, args, kwargs, name=name)
            nodes.append(node)
            node.meta = dict(meta)
            if "original_aten" in meta:
                node.meta["original_aten"] = _found(meta["original_aten"])
            if stack:
                node.meta["nn_module_stack"] = {str(i): tuple(entry) for i, entry in enumerate(stack)}
            if value != _NOTHING:
                node.meta["val"] = value_of(value) if isinstance(value, _Form) else pytree.tree_map(value_of, value)
            if op == "get_attr" and target not in constants:
                held = owned[int(str(target).removeprefix(OWN_CONSTANT))]
                result.register_buffer(str(target), held.detach(), persistent=False)
    return result


_NOTHING = "nothing"


def _plain(value: Any, number: dict[fx.Node, int]) -> Any:
    """Arguments of a node as plain tuples, lists and dicts."""
    if isinstance(value, fx.Node):
        return _Reference(number[value])
    if isinstance(value, (tuple, list)):
        inner = [_plain(v, number) for v in value]
        return inner if isinstance(value, list) else tuple(inner)
    if isinstance(value, dict):
        return {k: _plain(v, number) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_plain(v, number) for v in (value.start, value.stop, value.step)))
    _check_plain(value)
    return value


class _Reference:
    """A node, by its place in the graph."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Form:
    """What a fake tensor is made of: sizes, strides, offset, dtype, device, and whether it requires gradients."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


def _kept_form(value: Any) -> Any:
    form = _form(value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_inference():
        raise NotKept("a value is an inference tensor")
    return _Form(*form[:6])


def _operation(target: Any) -> tuple[str, ...]:
    """The name of an operation in a captured graph."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return target.namespace, target._opname, target._overloadname
    if getattr(target, "__module__", "") == "_operator" and getattr(operator, name := target.__name__, None) is target:
        return ("operator", name)
    raise NotKept(f"{target} is not torch's own")


def _found(name: tuple[str, ...]) -> Any:
    if name[0] == "operator":
        return getattr(operator, name[1])
    return getattr(getattr(getattr(torch.ops, name[0]), name[1]), name[2])


class _Writer(pickle.Pickler):
    """Nodes and forms are told by plain tuples."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Reference):
            return "node", value.number
        return ("form", value.parts) if isinstance(value, _Form) else None


_LAYOUTS = {str(layout): layout for layout in vars(torch).values() if isinstance(layout, torch.layout)}


class _Reader(pickle.Unpickler):
    """Reads plain data, and nothing that could run."""

    def persistent_load(self, pid: Any) -> Any:
        return _Reference(pid[1]) if pid[0] == "node" else _Form(*pid[1])

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype) or found is torch.device:
            return found
        if (module, name) == ("builtins", "slice"):
            return slice
        if module == "torch._utils" and isinstance(
            found := getattr(torch, name.removeprefix("torch."), None), torch.memory_format
        ):
            return found
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _LAYOUTS.get
        raise pickle.UnpicklingError(f"{module}.{name} is no data")
