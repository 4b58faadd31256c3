"""A model whose layers stand behind hooks that bring their weights, run with these hooks off.

Such a hook casts or moves a layer's weights before its forward and puts them back after it. Dynamo breaks the model at every one, so that no
branch is whole. vdcache watches one forward of the model as it is, to see in which form each weight arrives, then takes the hooks off while
the compiled model runs. Stand-ins of that form are in the place of the weights, and the graph itself brings what it reads.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from vdcache.backends.hooks import hooks_of, on_disk, only_bring_weights, places, streams_of, weights_of
from vdcache.ir.stand_ins import brought, stand_in

__all__ = ["HookedModel", "differ"]

SAMPLES = 64  # elements of a weight that are compared
ROUNDING = 0.05  # part of a result by which a compiler's may differ from it

Forward = Callable[..., Any]


class HookedModel:
    """The hooks of one model, except its outermost module's, which run around the model as ever.

    Args:
        root: the model; held weakly.
    """

    _known: ClassVar[weakref.WeakKeyDictionary[nn.Module, HookedModel]] = weakref.WeakKeyDictionary()
    _making: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, root: nn.Module) -> None:
        self._root = weakref.ref(root)
        self._lock = threading.RLock()  # another thread would find a model without hooks
        self._is_bare = False
        self._scan(root)

    @classmethod
    def of(cls, root: nn.Module) -> HookedModel:
        """The one of a model, which knows the hooks that the model has now."""
        with cls._making:
            if (found := cls._known.get(root)) is None:
                found = cls._known[root] = cls(root)
        with found._lock:
            if not found._is_bare and not found._is_as_seen():
                found._scan(root)
        return found

    def _scan(self, root: nn.Module) -> None:
        inner = [m for m in root.modules() if m is not root]
        self._dicts = [m.__dict__ for m in inner]
        self._forwards = [d.get("forward") for d in self._dicts]
        hooked = [m for m in inner if "forward" in m.__dict__ and only_bring_weights(hooks_of(m))]
        self.layers = [_Layer(m) for m in hooked if len(list(places(m))) > 1]
        self.watched, self.why_not = not self.layers, ""

    def _is_as_seen(self) -> bool:
        same_hooks = self._forwards == [d.get("forward") for d in self._dicts]
        return same_hooks and all(weight.is_as_seen() for layer in self.layers for weight in layer.weights)

    @property
    def staying(self) -> set[str]:
        """The hooks in front of single layers that vdcache does not take off, by the names of their classes."""
        off = set() if self.why_not else {layer.module for layer in self.layers}
        layers = (m for m in self._root().modules() if "forward" in m.__dict__ and not any(m.children()) and m not in off)  # type: ignore[union-attr]
        return {type(hook).__name__ for layer in layers for hook in hooks_of(layer)}

    def watch(self, run: Forward, args: Any, kwargs: Any) -> Any:
        """Run the model as it is once, and see what its hooks do. Where they do more than bring weights, `why_not` says so."""
        with self._lock:
            with contextlib.ExitStack() as stack:
                behind = {layer.module for layer in self.layers}
                for layer in self.layers:
                    stack.enter_context(layer.watching(behind))
                result = run(*args, **kwargs)
            self.layers = [layer for layer in self.layers if layer.ran]  # the others may do anything when they run
            names = {m: n for n, m in self._root().named_modules()}  # type: ignore[union-attr]
            self.why_not = next((f"{names[at.module]}: {at.problem}" for at in self.layers if at.problem), "")
            self.watched = True
        return result

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """In this block the hooks are off, and stand-ins are in the place of the weights that they bring."""
        with self._lock:
            layers = () if self._is_bare else self.layers  # a call within a call finds them off
            was_bare = self._is_bare
            try:
                self._is_bare = True
                for layer in layers:
                    layer.take_off()
                for stream in {stream for layer in layers for stream in layer.streams}:
                    stream.synchronize()  # a hook around the model may be bringing a weight right now
                yield
            finally:
                for layer in layers:
                    layer.put_back()
                self._is_bare = was_bare


class _Weight:
    """A weight that the hooks of a module may bring, as it is stored.

    Args:
        name: of the weight, as seen from the module.
        holder: the dict of parameters or buffers that it is in.
        key: its name there.
        hooks: of the module.
    """

    def __init__(self, name: str, holder: dict[str, Any], key: str, hooks: list[Any]) -> None:
        self.name, self._holder, self._key = name, holder, key
        self._real: Tensor = holder[key]
        self._elsewhere = weights_of(hooks, name) if self._real.is_meta else None
        self._place: Tensor | None = None  # what stands in for it; None where it arrives as it is stored
        self._is_lost = on_disk(hooks) or (self._real.is_meta and self._elsewhere is None)
        self._is_plain = type(self._real.data) is Tensor
        kept = self._real if self._is_lost else self._find()
        self._device, self._dtype = kept.device, kept.dtype
        self._elements = _some(kept).clone() if self._is_plain else None

    def _find(self) -> Tensor:
        return self._real if self._elsewhere is None else self._elsewhere[self.name]

    def arrives(self) -> str:
        """The weight is in the form in which its layer computes. Returns why nothing can stand in for it."""
        now = self._holder[self._key]
        same = self._elsewhere is None and (now.device, now.dtype) == (self._device, self._dtype)
        if self._is_lost:
            return f"{self.name} is kept on the disk"
        if self._elements is None:
            return "" if same else f"{self.name} is a tensor of its own kind ({type(self._real.data).__name__})"
        if not torch.equal(brought(self._elements, now), _some(now)):
            return f"{self.name} arrives as something else than the stored weight on another device or in another type"
        if not same:
            self._place = stand_in(now, self._fetch)
        return ""

    def is_as_seen(self) -> bool:
        """Whether the weight is stored as it was when the hooks were watched, or has been brought ahead of time."""
        if self._place is None or self._elsewhere is not None:
            return True
        weight = self._holder.get(self._key)
        if weight is None:
            return False
        form = weight.device, weight.dtype
        return form == (self._device, self._dtype) or form == (self._place.device, self._place.dtype)

    def _fetch(self) -> Tensor:
        """The stored weight, in the form for which graphs are compiled."""
        weight = self._find()
        if (weight.device, weight.dtype) == (self._device, self._dtype):
            return weight
        return weight.detach().to(self._device, self._dtype)  # a hook around the model has brought it ahead of time

    def take_off(self) -> None:
        if self._place is not None:
            self._real, self._holder[self._key] = self._holder[self._key], self._place

    def put_back(self) -> None:
        if self._place is not None and self._holder.get(self._key) is self._place:
            self._holder[self._key] = self._real


@dataclass(eq=False)
class _Layer:
    """A module whose forward stands behind hooks that bring its weights."""

    module: nn.Module
    ran: bool = False
    problem: str = ""
    weights: list[_Weight] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._hooked: Forward = self.module.__dict__["forward"]
        self.streams = streams_of(hooks_of(self.module))
        self._bare = self._without_hooks()

    @contextlib.contextmanager
    def watching(self, behind: set[nn.Module]) -> Iterator[None]:
        """In this block, see what the hooks do.

        Args:
            behind: all modules with such hooks, and those whose weights an outer module's hooks bring; added to.
        """
        inmost = list(places(self.module))[-1]
        own: Forward = inmost.get()
        hooks = hooks_of(self.module)
        self.weights = [_Weight(*weight, hooks) for weight in _owned(self.module, behind)]
        self.ran, self.problem = False, ""  # an earlier attempt may have ended halfway
        given: list[Tensor] = []
        returned: list[Tensor] = []

        def outside(*args: Any, **kwargs: Any) -> Any:
            given[:] = _tensors((args, kwargs))
            result = self._hooked(*args, **kwargs)
            if not _same(_tensors(result), returned):
                self.problem = "its hooks change what it returns"
            return result

        def inside(*args: Any, **kwargs: Any) -> Any:
            if not _same(_tensors((args, kwargs)), given):
                self.problem = "its hooks change what it is given"
            if not self.ran:
                self.ran = True
                self.problem = next(filter(None, [w.arrives() for w in self.weights]), self.problem)
            result = own(*args, **kwargs)
            returned[:] = _tensors(result)
            return result

        inmost.put(inside)
        self.module.__dict__["forward"] = outside
        try:
            yield
        finally:
            self.module.__dict__["forward"] = self._hooked
            inmost.put(own)

    def take_off(self) -> None:
        for weight in self.weights:
            weight.take_off()
        self.module.__dict__["forward"] = self._bare

    def put_back(self) -> None:
        self.module.__dict__["forward"] = self._hooked
        for weight in self.weights:
            weight.put_back()

    def _without_hooks(self) -> Forward:
        own, run_as_ever = list(places(self.module))[-1].get(), self._run_as_ever

        def forward(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs) if torch.compiler.is_compiling() else run_as_ever(*args, **kwargs)

        return forward

    def _run_as_ever(self, *args: Any, **kwargs: Any) -> Any:
        """Where Dynamo leaves a part of the model to Python, nothing else than the hooks brings the weights."""
        self.put_back()
        try:
            return self._hooked(*args, **kwargs)
        finally:
            self.take_off()


def _owned(module: nn.Module, behind: set[nn.Module], prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """The weights that the hooks of a module may bring: its own, and those of the modules in it that have no such hooks."""
    for holder in (module._parameters, module._buffers):
        yield from ((prefix + key, holder, key) for key, value in holder.items() if value is not None)
    for name, child in module.named_children():
        if child not in behind:
            behind.add(child)
            yield from _owned(child, behind, f"{prefix}{name}.")


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _some(weight: Tensor) -> Tensor:
    """Some elements of a weight."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]


def differ(result: Any, expected: Any, exact: bool) -> bool:
    """Whether two results of a model are not the same.

    Args:
        exact: bit for bit; else what rounding makes does not count.
    """
    found, wanted = _tensors(result), _tensors(expected)
    if len(found) != len(wanted) or any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(found, wanted, strict=True)):
        return True
    pairs = [(a.detach().float().nan_to_num(), b.detach().float().nan_to_num()) for a, b in zip(found, wanted, strict=True)]
    if exact:
        return any(not torch.equal(a, b) for a, b in pairs)
    return any(bool((a - b).norm() > ROUNDING * b.norm()) for a, b in pairs)
