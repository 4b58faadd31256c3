"""Which lowering of attention under a mask is the fastest here: measured once per device, mask and size, kept on disk."""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcache.backends.kernels import flex, triton
from vdcache.ir.errors import ConfigError
from vdcache.ir.files import cache_folder, write_aside
from vdcache.ir.tiles import LOWERINGS, Tiled

__all__ = ["Choice", "choose", "measure"]

LOWERINGS |= {"flex": flex.flex, "triton": triton.triton_attention}
ENOUGH = 0.9  # of what the mask could save at most: no other lowering can be much faster
LONGEST = 20e12  # FLOPs of one dense call beyond which nothing is measured on a CPU


@dataclass(frozen=True)
class Choice:
    """What was measured.

    Args:
        lowering: the fastest.
        seconds: of each lowering, and of "dense": scaled_dot_product_attention without a mask.
        density: the share of weights that the mask keeps.
    """

    lowering: str
    seconds: dict[str, float]
    density: float

    @property
    def speedup(self) -> float:
        """Over dense attention without a mask; 1 where nothing was measured."""
        return self.seconds["dense"] / self.seconds[self.lowering] if self.seconds else 1.0

    @property
    def of_ideal(self) -> float:
        """The speed-up as a share of what the mask could save at most."""
        return self.speedup * self.density


def choose(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, on: Tiled, scale: float | None, *, again: bool = False
) -> Choice:
    """The fastest lowering for operands of this form; measured now if it is not known yet.

    Args:
        query, key, value, bias: real or fake tensors: only their form counts.
        again: measure even if it is known.
    """
    name = _key(query, key, value, bias, on)
    known = _read()
    if not again and (kept := _choice(known.get(name))) is not None:
        return kept
    own = None if bias is None else _random(bias)
    found = measure(_random(query), _random(key), _random(value), own, on, scale)
    if found.seconds:
        _write(name, found)
    return found


def measure(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    on: Tiled,
    scale: float | None,
    *,
    every: bool = False,
) -> Choice:
    """Time the lowerings on these tensors; those that cannot win any more are left out unless `every` is asked for."""
    if query.device.type == "cpu" and 4 * query.numel() * query.shape[-2] > LONGEST:
        return Choice("gather", {}, on.density)
    gqa = query.shape[1] != key.shape[1]

    def dense(*_: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=gqa)

    def run(name: str) -> Callable[[], Tensor]:
        lowering = LOWERINGS[name]
        return lambda: lowering(query, key, value, on, scale, bias)

    with torch.no_grad():
        first = dict(zip(("dense", "gather"), _time([dense, run("gather")]), strict=True))
        found = Choice("gather", first, on.density)
        if found.of_ideal >= ENOUGH and not every:
            return found
        rest = [n for n in LOWERINGS if n != "gather" and _can(n, on, query.device)]
        ready = []
        for name in rest:
            try:
                run(name)()
                ready.append(name)
            except Exception:  # noqa: BLE001 — a kernel that cannot run here is not chosen
                continue
        times = _time([dense, run("gather"), *map(run, ready)])
    seconds = dict(zip(("dense", "gather", *ready), times, strict=True))
    return Choice(min(("gather", *ready), key=seconds.__getitem__), seconds, on.density)


def _can(name: str, on: Tiled, device: torch.device) -> bool:
    if name == "masked":  # a matrix of all queries × all keys
        return on.tokens <= 4096
    # interpreted, the kernel of our own is for tests
    return name != "triton" or (device.type == "cuda" and triton.available(device))


def _time(runs: Sequence[Callable[[], Any]], seconds: float = 1.0) -> list[float]:
    """Medians of seconds, side by side, in about so much time each."""
    sync: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    began = time.perf_counter()
    for run in runs:
        run()
    sync()
    once = (time.perf_counter() - began) / len(runs)
    rounds = max(3, min(30, int(seconds / max(once, 1e-6))))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, own in zip(runs, times, strict=True):
            began = time.perf_counter()
            run()
            sync()
            own.append(time.perf_counter() - began)
    return [statistics.median(t) for t in times]


def _random(like: Tensor) -> Tensor:
    """A tensor of that form: size, order in memory, dtype and device."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda i: (-strides[i], i))
    made = torch.randn([like.shape[i] for i in order], device=like.device, dtype=torch.float32)
    made = made > -1.0 if like.dtype == torch.bool else made.to(like.dtype)
    return made.permute([order.index(i) for i in range(like.ndim)])


def _key(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, on: Tiled) -> str:
    device = query.device
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} of {torch.get_num_threads()} threads"
    )
    form = [[list(t.shape), list(t.stride()), str(t.dtype)] for t in (query, key, value, bias) if t is not None]
    where = [list(on.grid), on.before, on.after]
    return json.dumps([name, torch.__version__, _machine(), str(on.mask), where, form])


@functools.lru_cache(maxsize=1)
def _machine() -> str:
    import platform

    return f"{platform.node()} {platform.processor() or platform.machine()}"


def _choice(data: Any) -> Choice | None:
    """What the file holds, if it is a choice that can be made here."""
    try:
        found = Choice(str(data["lowering"]), {str(k): float(v) for k, v in data["seconds"].items()}, float(data["density"]))
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    fits = set(data) == {"lowering", "seconds", "density"} and {"dense", found.lowering} <= found.seconds.keys()
    return found if fits and found.lowering in LOWERINGS else None


def _path() -> Path:
    return cache_folder() / "lowerings.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(name: str, found: Choice) -> None:
    """Add to the file, written aside and renamed; what cannot be written is measured again."""
    path = _path()
    try:
        write_aside(path, json.dumps({**_read(), name: asdict(found)}, indent=1))
    except OSError:
        return


def check_lowering(name: str) -> str:
    """The name of a lowering, or "auto".

    Raises:
        ConfigError: another.
    """
    if name != "auto" and name not in LOWERINGS:
        raise ConfigError(f"no lowering of tile attention is called {name!r}; there are auto, {', '.join(LOWERINGS)}")
    return name
